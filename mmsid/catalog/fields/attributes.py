"""Attributes of a batch: name -> labels, from columns of labels, mappings and lists of names with values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.cells import Column, lists_of, split_values, text_array
from mmsid.catalog.fields.ragged import Ragged, all_levels, bounds, is_list, one_level, ragged_of
from mmsid.catalog.fields.values import flat_mapping, name_and_value_keys
from mmsid.errors import CatalogError

ATTRIBUTES = pa.large_list(pa.struct([("name", pa.large_string()), ("labels", pa.large_list(pa.large_string()))]))

_Error = Callable[[int, str, str], CatalogError]  # row, name of the Python type, name of the attribute


@dataclass(frozen=True)
class _Entries:
    """E attributes: the (E,) row and name of each, and its labels."""

    rows: np.ndarray
    names: pa.LargeStringArray
    labels: Ragged


def attribute_array(columns: Sequence[Column], rows: int, list_separator: str, separators: Mapping[str, str]) -> pa.LargeListArray:
    """(N,) attributes with sorted names, of type `ATTRIBUTES`. Labels of one name in one row are united.

    A single column that holds mappings gives its keys as names. With several columns, such a key is called `column.key`.

    Args:
        columns: columns of the attributes.
        rows: number of rows N.
        list_separator: separator of lists in csv cells.
        separators: column -> separator of labels that it writes as one text.
    """
    found: list[_Entries] = []
    for column in columns:
        prefix = "" if len(columns) == 1 else f"{column.name}."
        found += _column_entries(column, rows, prefix, list_separator, separators.get(column.name))
    return _assembled(found, rows)


def unite_attributes(rows: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """Attributes of an item whose variants are several rows: all labels of each name, in the order of their first appearance."""
    united: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, labels in row.items():
            united.setdefault(name, {}).update(dict.fromkeys(labels))
    return {name: tuple(united[name]) for name in sorted(united)}


def _column_entries(column: Column, rows: int, prefix: str, list_separator: str, separator: str | None) -> Iterator[_Entries]:
    data = column.data

    def error(row: int, kind: str, name: str) -> CatalogError:
        return column.error(row, kind, name=name)

    if isinstance(data, pa.Array) and _holds_mappings(data.type):
        yield from _nested_entries(data, np.arange(rows), prefix, column.name, error)
        return
    mappings: dict[int, dict[str, list[str]]] = {}
    if not isinstance(data, pa.Array):
        mappings = _python_mappings(column, enumerate(data), prefix)
        data = [None if index in mappings else value for index, value in enumerate(data)]
    elif pa.types.is_large_string(data.type):
        mappings = _written_mappings(column, prefix)
        if mappings:
            data = pc.if_else(pa.array([index in mappings for index in range(rows)]), pa.scalar(None, data.type), data)
    if mappings:
        named = [(index, name, labels) for index, labels_of in mappings.items() for name, labels in labels_of.items()]
        names = pa.array([name for _, name, _ in named], pa.large_string())
        yield _Entries(np.array([index for index, _, _ in named], dtype=np.int64), names, ragged_of([labels for _, _, labels in named]))
    labels = lists_of(Column(column.name, data, column.textual, column.place), list_separator)
    if separator is not None:
        labels = split_values(labels, separator)
    yield _Entries(np.arange(rows), pa.array([column.name], pa.large_string()).take(pa.array(np.zeros(rows, dtype=np.int64))), labels)


def _holds_mappings(kind: pa.DataType) -> bool:
    while is_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or pa.types.is_map(kind)


def _python_mappings(column: Column, cells: Any, prefix: str) -> dict[int, dict[str, list[str]]]:
    found = {}
    for index, value in cells:
        mapping = flat_mapping(value, lambda kind, at=index: column.error(at, kind), prefix)
        if mapping is not None:
            found[index] = mapping
    return found


def _written_mappings(column: Column, prefix: str) -> dict[int, dict[str, list[str]]]:
    """Cells with a mapping in JSON. In a csv cell anything that begins with a brace must be one."""
    candidates = pc.match_substring_regex(column.data, r"^\s*(\{|\[\s*\{)")
    cells = []
    for index in np.flatnonzero(pc.fill_null(candidates, False)).tolist():
        try:
            cells.append((index, column.written(column.data[index].as_py(), index)))
        except CatalogError:
            if column.textual:
                raise
    return _python_mappings(column, cells, prefix)


def _nested_entries(array: pa.Array, rows: np.ndarray, prefix: str, name: str, error: _Error, in_list: bool = False) -> Iterator[_Entries]:
    """Entries of structs and maps. `rows` (V,) is the row of each value, `name` the column and keys that lead to the values.

    A struct of a list (`in_list`) with keys like `name` and `value` is one attribute. Other structs have one attribute per key.
    """
    kind = array.type
    if is_list(kind) and _holds_mappings(kind):
        values = all_levels(array)
        yield from _nested_entries(values.values, rows[values.rows], prefix, name, error, in_list=True)
    elif pa.types.is_struct(kind):
        fields = {field.name: child for field, child in zip(kind, array.flatten())}
        pair = name_and_value_keys(fields) if in_list else None
        if pair is not None:
            names = text_array(fields[pair[0]], lambda at, what: error(int(rows[at]), what, f"{name}.{pair[0]}"))
            yield _Entries(rows, _prefixed(prefix, names), _labels(fields[pair[1]], rows, f"{name}.{pair[1]}", error))
            return
        for key, child in fields.items():
            if _holds_mappings(child.type):
                yield from _nested_entries(child, rows, f"{prefix}{key}.", f"{name}.{key}", error)
            else:
                names = pa.array([prefix + key], pa.large_string()).take(pa.array(np.zeros(len(rows), dtype=np.int64)))
                yield _Entries(rows, names, _labels(child, rows, f"{name}.{key}", error))
    else:
        pairs = one_level(array.cast(pa.large_list(pa.struct([("key", kind.key_type), ("value", kind.item_type)]))))
        yield from _nested_entries(pairs.values, rows[pairs.rows], prefix, name, error, in_list=True)


def _prefixed(prefix: str, names: pa.LargeStringArray) -> pa.LargeStringArray:
    return pc.binary_join_element_wise(pa.scalar(prefix, pa.large_string()), names, pa.scalar("", pa.large_string())) if prefix else names


def _labels(array: pa.Array, rows: np.ndarray, name: str, error: _Error) -> Ragged:
    levels = all_levels(array)
    texts = text_array(levels.values, lambda at, kind: error(int(rows[levels.row_of(at)]), kind, name))
    return Ragged(levels.offsets, texts).kept(pc.not_equal(texts, "").to_numpy(zero_copy_only=False))


def _assembled(parts: Sequence[_Entries], rows: int) -> pa.LargeListArray:
    parts = [part for part in parts if len(part.labels.values)]
    if not parts:
        return pa.LargeListArray.from_arrays(pa.array(np.zeros(rows + 1), pa.int64()), pa.array([], ATTRIBUTES.value_type))
    names = pa.concat_arrays([part.names for part in parts]).dictionary_encode()
    distinct = [name.replace("\0", " ") for name in names.dictionary.to_pylist()]
    ordered = sorted(set(distinct))
    place = {name: rank for rank, name in enumerate(ordered)}
    rank = np.array([place[name] for name in distinct])
    entry_rows = np.concatenate([part.rows for part in parts])
    lengths = np.concatenate([part.labels.lengths for part in parts])
    values = pa.concat_arrays([part.labels.values for part in parts])
    keys = entry_rows * len(ordered) + rank[names.indices.to_numpy()]
    order = np.argsort(keys, kind="stable")
    order = order[lengths[order] > 0]
    starts = bounds(lengths)[:-1][order]
    inner = bounds(lengths[order])
    taken = np.arange(inner[-1]) + np.repeat(starts - inner[:-1], lengths[order])
    keys = keys[order]
    is_new = np.concatenate([[True], keys[1:] != keys[:-1]])  # entries of one name in one row become one
    label_bounds = np.append(inner[:-1][is_new], inner[-1])
    labels = pa.LargeListArray.from_arrays(pa.array(label_bounds, pa.int64()), values.take(pa.array(taken)))
    name_column = pa.array(ordered, pa.large_string()).take(pa.array(keys[is_new] % len(ordered)))
    per_row = np.bincount(keys[is_new] // len(ordered), minlength=rows)
    structs = pa.StructArray.from_arrays([name_column, labels], fields=list(ATTRIBUTES.value_type))
    return pa.LargeListArray.from_arrays(pa.array(bounds(per_row), pa.int64()), structs)
