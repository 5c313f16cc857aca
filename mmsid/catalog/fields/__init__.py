"""Item fields: which column of a table feeds which field of an item, and the conversion of batches of raw columns."""

from mmsid.catalog.fields.attributes import unite_attributes
from mmsid.catalog.fields.mapping import FieldMapping, not_read_text, resolve_mapping
from mmsid.catalog.fields.reading import ITEM_FIELDS, has_integer_ids, item_fields

__all__ = ["ITEM_FIELDS", "FieldMapping", "has_integer_ids", "item_fields", "not_read_text", "resolve_mapping", "unite_attributes"]
