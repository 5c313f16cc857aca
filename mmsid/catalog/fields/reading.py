"""Item fields of a batch of raw columns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.attributes import ATTRIBUTES, attribute_array
from mmsid.catalog.fields.categories import category_paths
from mmsid.catalog.fields.cells import Column, column_of, text_array, texts_of
from mmsid.catalog.fields.mapping import FieldMapping
from mmsid.catalog.fields.picture_cells import PICTURE, picture_array
from mmsid.catalog.fields.ragged import Ragged, bounds
from mmsid.catalog.fields.text_cleaning import MAX_CHARACTERS, CleanedTexts, cleaned_texts

if TYPE_CHECKING:
    from mmsid.catalog.sources import Batch
from mmsid.id_columns import holds_integers

_JOINED_BY = {"title": " ", "description": "\n"}  # texts of several columns, and of a list

ITEM_FIELDS = pa.schema(
    [
        ("item_id", pa.large_string()),
        ("title", pa.large_string()),
        ("description", pa.large_string()),
        ("categories", pa.large_list(pa.large_string())),
        ("attributes", ATTRIBUTES),
        ("pictures", pa.large_list(PICTURE)),
        ("problems", pa.large_list(pa.large_string())),
        ("original", pa.large_string()),
    ]
)


def item_fields(batch: Batch, mapping: FieldMapping, clean_text: bool) -> pa.Table:
    """Convert the raw columns of a batch to item fields, one row per row of the batch.

    Titles and descriptions are read without HTML and cut at `MAX_CHARACTERS`; the texts before that are kept in `original`.

    Args:
        batch: N rows with the columns `mapping.columns` that exist.
        mapping: columns of the fields.
        clean_text: also remove instructions to models, hidden characters and repeated keywords.

    Returns:
        Table of N rows with the columns of `ITEM_FIELDS`: `item_id` is '' where the row has none, `title` and `description` are ''
        where missing, `attributes` have sorted names, each picture has a `ref` or `data`, `problems` are codes like `title_html`,
        `description_cut` and `title_instruction`, and `original` is the JSON of the texts before cleaning, or null if nothing was
        cleaned.

    Raises:
        CatalogError: a cell has the wrong type. The message names file, row and field.
    """
    rows = len(batch.numbers)

    def present(names: tuple[str, ...]) -> list[Column]:
        return [column for name in names if (column := column_of(batch, name)) is not None]

    texts = {
        name: cleaned_texts(
            _joined_texts(present(getattr(mapping, name)), rows, _JOINED_BY[name]),
            MAX_CHARACTERS[name],
            clean_text,
            one_line=name == "title",
        )
        for name in ("title", "description")
    }
    categories = category_paths(present(mapping.categories), mapping.list_separator, mapping.separators, mapping.category_roots, rows)
    columns = [
        _ids(batch, mapping, rows),
        texts["title"].texts,
        texts["description"].texts,
        categories.to_list_array(),
        attribute_array(present(mapping.attributes), rows, mapping.list_separator, mapping.separators),
        picture_array(present(mapping.image), rows, mapping.list_separator),
        _problems(texts, rows),
        _originals(texts, rows),
    ]
    return pa.Table.from_arrays(columns, schema=ITEM_FIELDS)


def has_integer_ids(batch: Batch, mapping: FieldMapping) -> bool:
    """Whether the ids of the rows are whole numbers in the table: in all columns that ids are taken from."""
    names = [name for name in (mapping.group_by, mapping.item_id) if name is not None]
    found = [column.data for column in (column_of(batch, name) for name in names) if column is not None]
    return bool(found) and all(holds_integers(one.type if isinstance(one, pa.Array) else one) for one in found)


def _ids(batch: Batch, mapping: FieldMapping, rows: int) -> pa.LargeStringArray:
    """Id of the item of each row: its group if it has one, else its own id, '' if it has neither."""
    names = [name for name in (mapping.group_by, mapping.item_id) if name is not None]
    ids = pa.array([""] * rows, pa.large_string())
    for column in filter(None, (column_of(batch, name) for name in names)):
        missing = pc.equal(ids, "")
        if not pc.any(missing).as_py():
            break
        if isinstance(column.data, pa.Array):
            texts = text_array(column.data, column.error)
        else:
            texts = texts_of(column, "\n")
        ids = texts if pc.all(missing).as_py() else pc.if_else(missing, texts, ids)
    return ids


def _joined_texts(columns: list[Column], rows: int, separator: str) -> pa.LargeStringArray:
    parts = [texts_of(column, separator) for column in columns]
    if not parts:
        return pa.array([""] * rows, pa.large_string())
    if len(parts) == 1:
        return parts[0]
    joined, mark = parts[0], pa.scalar(separator, pa.large_string())
    for part in parts[1:]:  # null_handling="skip" of Arrow loses rows in which all parts are null
        both = pc.binary_join_element_wise(joined, part, mark)
        joined = pc.if_else(pc.equal(joined, ""), part, pc.if_else(pc.equal(part, ""), joined, both))
    return joined


def _problems(texts: dict[str, CleanedTexts], rows: int) -> pa.LargeListArray:
    codes: dict[int, list[str]] = {}
    for name, cleaned in texts.items():
        for index, found in cleaned.problems.items():
            codes.setdefault(index, []).extend(f"{name}_{code}" for code in found)
    lengths = np.zeros(rows, dtype=np.int64)
    lengths[list(codes)] = [len(found) for found in codes.values()]
    values = [code for index in sorted(codes) for code in codes[index]]
    return Ragged(bounds(lengths), pa.array(values, pa.large_string())).to_list_array()


def _originals(texts: dict[str, CleanedTexts], rows: int) -> pa.LargeStringArray:
    originals: dict[int, dict[str, str]] = {}
    for name, cleaned in texts.items():
        for index, text in cleaned.originals.items():
            originals.setdefault(index, {})[name] = text
    if not originals:
        return pa.nulls(rows, pa.large_string())
    values = [json.dumps(originals[index], ensure_ascii=False) if index in originals else None for index in range(rows)]
    return pa.array(values, pa.large_string())
