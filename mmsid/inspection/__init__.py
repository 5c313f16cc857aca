"""Audit of a mapping from items to Semantic IDs, of mmsid or of another project (`mmsid inspect`)."""

from mmsid.inspection.audit import inspect_sids
from mmsid.inspection.mapping import Mapping, read_mapping

__all__ = ["Mapping", "inspect_sids", "read_mapping"]
