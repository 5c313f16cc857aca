"""Columns of a batch as texts and as lists of texts, by Arrow functions. Only cells that need it are read in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.ragged import Ragged, all_levels, is_list, joined_rows, one_level, one_per_row, ragged_of
from mmsid.catalog.fields.text_bytes import may_have_outer_spaces, rows_with
from mmsid.catalog.fields.values import first_path, flat_texts, plain_text, written_value
from mmsid.errors import CatalogError

if TYPE_CHECKING:
    from mmsid.catalog.sources import Batch


@dataclass(frozen=True)
class Column:
    """One column of a batch.

    Attributes:
        name: header.
        data: Arrow array, or Python values when the cells have several JSON types.
        textual: whether cells are texts that may hold a written list or mapping, as in csv.
        place: index of a row -> `file, row n`.
    """

    name: str
    data: pa.Array | list[Any]
    textual: bool
    place: Callable[[int], str]

    def error(self, index: int, kind: str, expected: str = "text", name: str | None = None) -> CatalogError:
        """Error of a cell that holds a `kind`."""
        place = f"{self.place(index)}, field {name or self.name!r}"
        return CatalogError(f"{place}: holds a {kind}, expected {expected}; map another column or convert it")

    def written(self, text: str, index: int) -> Any:
        """List or mapping that a textual cell holds. Raises CatalogError when it is not readable."""

        def error(message: str) -> CatalogError:
            place = f"{self.place(index)}, field {self.name!r}"
            return CatalogError(f"{place}: starts like JSON but is not valid JSON ({message}); correct the cell")

        return written_value(text, error)


def column_of(batch: Batch, name: str) -> Column | None:
    """Column `name` of a batch, or None when the batch lacks it."""
    data = batch.column(name)
    if data is None:
        return None
    if isinstance(data, pa.ChunkedArray):
        data = data.combine_chunks()
    if isinstance(data, pa.Array):
        data = _plain_type(data)
    return Column(name, data, bool(batch.textual), batch.place)


def _plain_type(array: pa.Array) -> pa.Array:
    """Without dictionaries, views and extension types."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _plain_type(array.dictionary_decode())
    if isinstance(kind, pa.UuidType):
        return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.large_string())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(array.storage)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.large_binary())
    return array


def text_array(array: pa.Array, error: Callable[[int, str], CatalogError]) -> pa.LargeStringArray:
    """Scalars as texts without surrounding white space, '' where missing. The same as `plain_text` for each value.

    Args:
        array: scalars of any Arrow type.
        error: index of a value, name of its Python type -> error for a value that is no scalar.
    """
    array = _plain_type(array)
    kind = array.type
    if pa.types.is_large_binary(kind):
        array = _decoded(array, error)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return pc.fill_null(array.cast(pa.large_string()), "")
    elif not pa.types.is_large_string(kind):
        return _rare_texts(array, error)
    _refuse_invalid(array, error)
    array = pc.fill_null(array, "") if array.null_count else array
    if len(rows_with(array, "\0")):
        array = pc.replace_substring(array, "\0", " ")
    return pc.utf8_trim_whitespace(array) if may_have_outer_spaces(array) else array


def _decoded(array: pa.LargeBinaryArray, error: Callable[[int, str], CatalogError]) -> pa.LargeStringArray:
    try:
        return array.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array(
            [plain_text(value, lambda kind, at=at: error(at, kind)) for at, value in enumerate(array.to_pylist())], pa.large_string()
        )


def _refuse_invalid(array: pa.LargeStringArray, error: Callable[[int, str], CatalogError]) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        for index, value in enumerate(array.cast(pa.large_binary()).to_pylist()):
            plain_text(value, lambda kind, at=index: error(at, "text that is not UTF-8"))
        raise


def _rare_texts(array: pa.Array, error: Callable[[int, str], CatalogError]) -> pa.LargeStringArray:
    """Numbers, dates and other types: each distinct value is converted once."""
    if pa.types.is_null(array.type):
        return pa.array([""] * len(array), pa.large_string())
    if pa.types.is_nested(array.type):
        index = int(np.flatnonzero(array.is_valid())[:1].sum())
        if array.null_count < len(array):
            raise error(index, "dict" if not is_list(array.type) else "list")
        return pa.array([""] * len(array), pa.large_string())
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    encoded = array.dictionary_encode()
    places = encoded.indices
    texts = [
        plain_text(value, lambda kind, at=at: error(pc.index(places, at).as_py(), kind))
        for at, value in enumerate(encoded.dictionary.to_pylist())
    ]
    return pc.fill_null(pa.array(texts, pa.large_string()).take(places), "")


def texts_of(column: Column, separator: str) -> pa.LargeStringArray:
    """(N,) one text per row. The texts of a list are joined with `separator`; empty ones are left out."""
    if isinstance(column.data, pa.Array) and not is_list(column.data.type):
        texts = text_array(column.data, column.error)
        if not column.textual:
            return texts
        listed = pc.match_substring_regex(texts, r"(?s)^\[\s*['\"].*['\"]\s*\]$|^\[\s*\]$")
        if not pc.any(listed).as_py():
            return texts
        written = {index: _written_texts(column, texts[index].as_py(), index) for index in np.flatnonzero(listed).tolist()}
        values = [separator.join(written[index]) if index in written else text for index, text in enumerate(texts.to_pylist())]
        return pa.array(values, pa.large_string())
    lists = lists_of(column, "\n")
    return pc.binary_join(
        pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), lists.values), pa.scalar(separator, pa.large_string())
    )


def _written_texts(column: Column, text: str, index: int) -> list[str]:
    try:
        return flat_texts(column.written(text, index), lambda kind: column.error(index, kind))
    except CatalogError:
        return [text]  # a title in brackets and quotes


def lists_of(column: Column, list_separator: str, first_path_only: bool = False) -> Ragged:
    """One list of non-empty texts per row. Inner lists are flattened, or only the first one is kept (`first_path_only`)."""
    if not isinstance(column.data, pa.Array):
        return _python_lists(column, list(enumerate(column.data)), len(column.data), first_path_only)
    array = column.data
    if pa.types.is_large_string(array.type):
        return _written_lists(column, list_separator, first_path_only) if column.textual else _scalars(array, column)
    if not is_list(array.type):
        return _scalars(array, column)
    levels = all_levels(array)
    if pa.types.is_nested(levels.values.type):
        return _python_lists(column, list(enumerate(array.to_pylist(maps_as_pydicts="strict"))), len(array), first_path_only)
    values = text_array(levels.values, lambda at, kind: column.error(levels.row_of(at), kind))
    present = pc.not_equal(values, "").to_numpy(zero_copy_only=False)
    found = Ragged(levels.offsets, values).kept(present)
    return _first_paths(array, found, present) if first_path_only and is_list(array.type.value_type) else found


def _first_paths(array: pa.Array, found: Ragged, present: np.ndarray) -> Ragged:
    """Of the inner lists of a row, keep the first one that holds a text."""
    outer = one_level(_plain_type(array))
    inner = all_levels(outer.values)
    inner_of_value = inner.rows[present]
    first = np.zeros(len(found.offsets) - 1, dtype=np.int64)
    filled = found.lengths > 0
    first[filled] = inner_of_value[found.offsets[:-1][filled]]
    return found.kept(inner_of_value == first[found.rows])


def _scalars(array: pa.Array, column: Column) -> Ragged:
    texts = text_array(array, column.error)
    return one_per_row(texts, pc.not_equal(texts, "").to_numpy(zero_copy_only=False))


def _python_lists(column: Column, cells: list[tuple[int, Any]], rows: int, first_path_only: bool) -> Ragged:
    lists: list[list[str]] = [[]] * rows
    for index, value in cells:
        value = first_path(value) if first_path_only else value
        lists[index] = flat_texts(value, lambda kind, at=index: column.error(at, kind))
    return ragged_of(lists)


def _written_lists(column: Column, list_separator: str, first_path_only: bool) -> Ragged:
    texts = text_array(column.data, column.error)
    listed = np.flatnonzero(pc.starts_with(texts, "["))
    written = []
    if len(listed):
        cells = [(index, column.written(texts[index].as_py(), index)) for index in listed.tolist()]
        written = [_python_lists(column, cells, len(texts), first_path_only)]
        texts = pc.if_else(pc.starts_with(texts, "["), "", texts)
    if not pc.any(pc.match_substring(texts, list_separator)).as_py():
        return joined_rows([one_per_row(texts, pc.not_equal(texts, "").to_numpy(zero_copy_only=False)), *written])
    return joined_rows([split_values(Ragged(np.arange(len(texts) + 1), texts), list_separator), *written])


def split_values(lists: Ragged, separator: str) -> Ragged:
    """Each text of the lists split at `separator`, without surrounding white space and without empty parts."""
    parts = one_level(pc.split_pattern(lists.values, separator))
    values = pc.utf8_trim_whitespace(parts.values)
    return Ragged(parts.offsets[lists.offsets], values).kept(pc.not_equal(values, "").to_numpy(zero_copy_only=False))
