"""Picture cells of a batch as references (paths, URLs, base64 texts) and bytes.

A cell holds a text, bytes, a mapping like `{"bytes": ..., "path": ...}` (Hugging Face datasets) or `{"hi_res": ..., "large": ...}` (Amazon
2023), a list of any of these, or a mapping of lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.fields.cells import Column, lists_of, split_values, text_array
from mmsid.catalog.fields.ragged import Ragged, all_levels, bounds, is_list, joined_rows
from mmsid.catalog.fields.values import plain_text
from mmsid.errors import CatalogError

PICTURE = pa.struct([("ref", pa.large_string()), ("data", pa.large_binary())])

_BYTES_KEYS = ("bytes", "data", "content")
_LARGEST_FIRST = ("hi_res", "hires", "original", "full", "large", "url", "src", "link", "href", "path", "file", "file_name", "filename")
_SMALLER = ("medium", "small", "thumb", "thumbnail")
_LONGEST_WRITTEN_PATH = 4096  # bytes: shorter cells of a bytes column may be a path or URL
_MARK = "\x1e"


def picture_array(columns: Sequence[Column], rows: int, list_separator: str) -> pa.LargeListArray:
    """(N,) pictures of each row, in the order of the columns, of type large_list<struct<ref, data>> with one of both set."""
    parts = [_pictures(column, list_separator) for column in columns]
    if not parts:
        parts = [Ragged(np.zeros(rows + 1, dtype=np.int64), pa.array([], PICTURE))]
    return joined_rows(parts).to_list_array()


def _pictures(column: Column, list_separator: str) -> Ragged:
    data = column.data
    if not isinstance(data, pa.Array):
        return _python_pictures(column, list(enumerate(data)), len(data))
    if pa.types.is_large_string(data.type):
        return _text_pictures(column, list_separator)
    levels = all_levels(data)
    kind = levels.values.type
    if pa.types.is_struct(kind):
        if any(is_list(child.type) for child in kind):
            return _python_pictures(column, list(enumerate(data.to_pylist())), len(data))
        return _struct_pictures(column, levels)
    if pa.types.is_map(kind):
        return _python_pictures(column, list(enumerate(data.to_pylist(maps_as_pydicts="strict"))), len(data))
    if _is_binary(kind):
        return _with_written_paths(Ragged(levels.offsets, levels.values.cast(pa.large_binary())))
    return _references(lists_of(column, list_separator))


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)
    )


def _references(texts: Ragged) -> Ragged:
    return Ragged(
        texts.offsets, pa.StructArray.from_arrays([texts.values, pa.nulls(len(texts.values), pa.large_binary())], fields=list(PICTURE))
    )


def _text_pictures(column: Column, list_separator: str) -> Ragged:
    """Texts: references, or a written mapping or list of mappings."""
    data, written = column.data, []
    nested = pc.fill_null(pc.match_substring_regex(data, r"^\s*(\{|\[\s*\{)"), False)
    if pc.any(nested).as_py():
        cells = [(index, column.written(data[index].as_py(), index)) for index in np.flatnonzero(nested).tolist()]
        written = [_python_pictures(column, cells, len(data))]
        data = pc.if_else(nested, pa.scalar(None, data.type), data)
    texts = lists_of(Column(column.name, data, column.textual, column.place), list_separator)
    if column.textual and pc.any(pc.match_substring_regex(texts.values, r",\s*https?://")).as_py():
        # feeds separate URLs by commas, which also occur inside of URLs
        marked = pc.replace_substring_regex(texts.values, r",\s*(https?://)", _MARK + r"\1")
        texts = split_values(Ragged(texts.offsets, marked), _MARK)
    return joined_rows([_references(texts), *written])


def _with_written_paths(found: Ragged) -> Ragged:
    """Pictures of a bytes column. Bytes that are a short UTF-8 text are a path or URL."""
    data = found.values
    filled = pc.fill_null(pc.greater(pc.binary_length(data), 0), False).to_numpy(zero_copy_only=False)
    found = Ragged(found.offsets, data).kept(filled)
    data = found.values
    short = np.flatnonzero(pc.less(pc.binary_length(data), _LONGEST_WRITTEN_PATH))
    texts: dict[int, str] = {}
    for index in short.tolist():
        text = _written_path(data[index].as_py())
        if text is not None:
            texts[index] = text
    if not texts:
        return Ragged(found.offsets, pa.StructArray.from_arrays([pa.nulls(len(data), pa.large_string()), data], fields=list(PICTURE)))
    references = pa.array([texts.get(index) for index in range(len(data))], pa.large_string())
    only_data = pc.if_else(references.is_valid(), pa.scalar(None, pa.large_binary()), data)
    return Ragged(found.offsets, pa.StructArray.from_arrays([references, only_data], fields=list(PICTURE)))


def _written_path(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() and text and text[0] not in "<{" else None


def _struct_pictures(column: Column, levels: Ragged) -> Ragged:
    """Mappings without lists: bytes if there are any, else the largest reference."""
    structs = levels.values
    children = {field.name: child for field, child in zip(structs.type, structs.flatten())}
    ordered = _reference_keys(children)
    bytes_key = next((key for key in _BYTES_KEYS if key in children and _is_binary(children[key].type)), None)
    if not ordered and bytes_key is None:
        if structs.null_count == len(structs):
            return Ragged(np.zeros(len(levels.offsets), dtype=np.int64), pa.array([], PICTURE))
        raise _unknown_keys(column, levels.row_of(int(np.flatnonzero(structs.is_valid())[0])), children)
    references = pa.nulls(len(structs), pa.large_string())
    for key in ordered:
        texts = text_array(children[key], lambda at, kind, key=key: column.error(levels.row_of(at), kind, name=f"{column.name}.{key}"))
        references = pc.coalesce(references, pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts))
    data = pa.nulls(len(structs), pa.large_binary())
    if bytes_key is not None:
        data = children[bytes_key].cast(pa.large_binary())
        has_data = pc.fill_null(pc.greater(pc.binary_length(data), 0), False)
        if not pc.all(has_data).as_py():
            data = pc.if_else(has_data, data, pa.scalar(None, pa.large_binary()))
        references = pc.if_else(has_data, pa.scalar(None, pa.large_string()), references)
    present = pc.or_(references.is_valid(), data.is_valid()).to_numpy(zero_copy_only=False)
    return Ragged(levels.offsets, pa.StructArray.from_arrays([references, data], fields=list(PICTURE))).kept(present)


def _reference_keys(keys: Any) -> list[str]:
    """Known keys of references, the largest picture first."""
    by_name = {key.lower().replace("-", "_"): key for key in keys}
    known = [by_name[name] for name in (*_LARGEST_FIRST, *_SMALLER) if name in by_name]
    return list(dict.fromkeys(known))


def _unknown_keys(column: Column, index: int, keys: Any) -> CatalogError:
    place, known = f"{column.place(index)}, field {column.name!r}", ", ".join(("bytes", *_LARGEST_FIRST, *_SMALLER))
    return CatalogError(
        f"{place}: holds a mapping with the keys {', '.join(map(str, keys))}, expected one of {known}; "
        "write the path or URL under one of these keys"
    )


def _python_pictures(column: Column, cells: Sequence[tuple[int, Any]], rows: int) -> Ragged:
    lengths = np.zeros(rows, dtype=np.int64)
    pictures: list[dict[str, Any]] = []
    for index, value in cells:
        found = list(_of_value(column, index, value))
        lengths[index] = len(found)
        pictures += found
    return Ragged(bounds(lengths), pa.array(pictures, PICTURE))


def _of_value(column: Column, index: int, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, (list, tuple)):
        return [picture for inner in value for picture in _of_value(column, index, inner)]
    if isinstance(value, bytes):
        text = _written_path(value) if len(value) < _LONGEST_WRITTEN_PATH else None
        return ([{"ref": text, "data": None}] if text else [{"ref": None, "data": value}]) if value else []
    if isinstance(value, Mapping):
        return _of_mapping(column, index, value)
    text = plain_text(value, lambda kind: column.error(index, kind, "a picture"))
    return [{"ref": text, "data": None}] if text else []


def _of_mapping(column: Column, index: int, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    ordered = _reference_keys(value)
    if any(isinstance(value[key], (list, tuple)) for key in ordered):  # {"hi_res": [...], "large": [...]}
        count = max(len(value[key]) for key in ordered if isinstance(value[key], (list, tuple)))
        each = [
            {key: value[key][at] for key in ordered if isinstance(value[key], (list, tuple)) and at < len(value[key])}
            for at in range(count)
        ]
        return [picture for inner in each for picture in _of_mapping(column, index, inner)]
    for key in (*_BYTES_KEYS, *ordered):
        if key in value and value[key] and (key in ordered or isinstance(value[key], bytes)):
            return _of_value(column, index, value[key])
    if not ordered and not any(key in value for key in _BYTES_KEYS) and value:
        raise _unknown_keys(column, index, value)
    return []
