"""Arrow columns of ids: converted to texts as `tables.Cells.text` does it, and looked up without a Python object per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.errors import CatalogError

_WHOLE_NUMBERS = 2.0**53  # a float64 holds every whole number up to this one


def id_texts(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    """Ids (R,) as texts without surrounding white space. Empty texts and NaN become null. Whole floats lose their `.0`.

    Args:
        place: file and field, for messages.

    Raises:
        CatalogError: the column holds neither texts nor numbers.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        column = _float_texts(column)
    elif pa.types.is_integer(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    else:
        raise CatalogError(f"{place}: holds {kind}, expected texts or whole numbers; map another column or convert it")
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.large_string()), column)


def _float_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = pc.cast(column, pa.float64())
    whole = pc.and_(pc.equal(pc.floor(values), values), pc.less_equal(pc.abs(values), _WHOLE_NUMBERS))
    numbers = pc.cast(pc.if_else(whole, values, 0.0), pa.int64()).cast(pa.large_string())
    texts = pc.if_else(whole, numbers, pc.cast(values, pa.large_string()))
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.large_string()), texts)


def rows_of(ids: pa.ChunkedArray, item_ids: Sequence[str]) -> np.ndarray:
    """Index (R,) int64 of each id in `item_ids`; -1 where it is null or does not occur."""
    known = pa.array(item_ids, pa.large_string())
    return pc.fill_null(pc.index_in(ids, value_set=known, skip_nulls=True), -1).to_numpy().astype(np.int64)


def refuse_strangers(path: Path, column: str, ids: pa.ChunkedArray, item_ids: Sequence[str]) -> CatalogError:
    """The error for a table of which no id occurs in the catalogue, with examples of both."""
    theirs = ", ".join(map(repr, pc.drop_null(ids).unique().slice(0, 3).to_pylist())) or "none"
    ours = ", ".join(map(repr, item_ids[:3])) or "none"
    return CatalogError(
        f"{path}, field {column!r}: none of its ids is an item of the catalogue; it holds {theirs}, the catalogue {ours}; "
        "name the file that belongs to this catalogue, or write the ids in the same way"
    )
