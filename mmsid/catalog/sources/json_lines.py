"""Reader of JSON Lines. Arrow parses blocks of lines; Python parses the blocks that Arrow cannot hold exactly.

Those are blocks with invalid lines, with columns of several types, with whole numbers above 2^53 that Arrow would round, or with very
deep nesting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from mmsid.catalog.sources.batch import Batch, stripped_header
from mmsid.catalog.sources.contents import Contents
from mmsid.catalog.sources.json_values import MAX_KEYS, batch_of_rows, load_line, load_lines
from mmsid.catalog.sources.text_encoding import MARK, detect_encoding, open_text, open_utf8, undecodable

_BLOCK, _DEEPEST, _EXACT = 1 << 22, 1000, 2.0**53


class JsonLinesFile:
    """A .jsonl or .ndjson file. `TableFile` describes the attributes. The whole file is parsed once when it is opened."""

    format = "jsonl"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents = contents.path, contents
        self._encoding = detect_encoding(contents)
        self._by_python: set[int] = set()  # blocks that Arrow cannot hold
        self._types: dict[str, pa.DataType | None] = {}  # key -> type, None for a key of several types or with many keys
        if self._encoding.damaged:
            raise undecodable(contents, self._encoding, self._marked_lines())
        self.num_rows, keys, literals, self._wide = 0, {}, False, False
        for index, (block, numbers) in enumerate(self._blocks()):
            literals = literals or block.lstrip().startswith(b"{'")
            self.num_rows += len(numbers)
            table = None if self._wide else self._parsed(block, numbers, None)
            if table is None:
                if not self._wide:
                    self._by_python.add(index)
                rows = self._python_rows(block, numbers)
                if set().union(*rows) - keys.keys():
                    keys.update(dict.fromkeys(key for row in rows for key in row))
                continue
            keys.update(dict.fromkeys(table.column_names))
            for field in table.schema:
                common = _common(self._types.get(field.name, field.type), field.type)
                if common is not None and _num_keys(common) > MAX_KEYS:
                    common, self._wide = None, True
                self._types[field.name] = common
        self._keys = stripped_header(self.path, list(keys))
        self.columns = tuple(self._keys)
        self.empty = not self.num_rows
        self.notes = [note for note in (self._encoding.note, "lines are Python literals" if literals else "") if note]

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        columns = [(name, self._keys[name]) for name in selected if name in self._keys]
        known = {key: self._types.get(key) for _, key in columns if key in self._types}
        unknown = self._wide and len(known) < len(columns)
        schema = None if unknown or None in known.values() else pa.schema(list(known.items()))
        for index, (block, numbers) in enumerate(self._blocks()):
            table = None
            if schema is not None and index not in self._by_python:
                table = self._parsed(block, numbers, schema)
            if table is None:
                found = self._python_rows(block, numbers)
                batch = batch_of_rows(found, columns, self.path, numbers, "line")
            else:
                present = [(name, key) for name, key in columns if key in known]
                arrays = [table[key].combine_chunks() for _, key in present]
                batch = Batch(pa.table(arrays, names=[name for name, _ in present]), {}, False, self.path, numbers, "line")
            for start in range(0, len(batch), rows):
                yield batch.slice(start, rows) if len(batch) > rows else batch

    def _blocks(self) -> Iterator[tuple[bytes, Sequence[int]]]:
        """Blocks of whole lines, and the number of each line that is not blank."""
        first, rest = 1, b""
        with open_utf8(self._contents, self._encoding) as stream:
            while True:
                try:
                    read = stream.read(_BLOCK)
                except UnicodeDecodeError as error:
                    raise undecodable(self._contents, self._encoding, self._marked_lines()) from error
                block = rest + read
                cut = block.rfind(b"\n") + 1 if read else len(block)
                block, rest = block[:cut], block[cut:]
                if block:
                    lines = block.count(b"\n") + (not block.endswith(b"\n"))
                    if _may_have_blank_lines(block):
                        numbers = [number for number, line in enumerate(block.split(b"\n"), first) if line.strip()]
                    else:
                        numbers = range(first, first + lines)
                    first += lines
                    if numbers:
                        yield block, numbers
                if not read:
                    return

    def _parsed(self, block: bytes, numbers: Sequence[int], schema: pa.Schema | None) -> pa.Table | None:
        """The block as Arrow columns, only those of the schema if one is given; None if Arrow cannot hold it."""
        if schema is None:
            if block.lstrip().startswith(b"{'") or _deepest_line(block) > _DEEPEST:
                return None
            known = pa.schema([(key, kind) for key, kind in self._types.items() if kind is not None and _has_text(kind)])
            table = _parse(block, known, "infer")
            if table is not None and any(_has_time(field.type) for field in table.schema):  # Arrow takes texts for times
                table = _parse(block, pa.schema([(field.name, _as_text(field.type)) for field in table.schema]), "infer")
        else:
            table = _parse(block, schema, "ignore")
        if table is None or table.num_rows != len(numbers) or any(_is_rounded(column) for column in table.columns):
            return None
        return table

    def _python_rows(self, block: bytes, numbers: Sequence[int]) -> list[dict[str, Any]]:
        lines = [line for line in block.split(b"\n") if line.strip()]
        rows = load_lines(lines)
        if rows is None:
            rows = [load_line(line, self.path, number) for line, number in zip(lines, numbers, strict=True)]
        return rows

    def _marked_lines(self) -> Iterator[tuple[str, int, str | None, str]]:
        with open_text(self._contents, self._encoding, "mmsid_mark") as text:
            for number, line in enumerate(text, 1):
                if MARK in line:
                    row = load_line(line.replace(MARK, "\N{REPLACEMENT CHARACTER}").encode(), self.path, number)
                    key = next((key for key, value in row.items() if "\N{REPLACEMENT CHARACTER}" in f"{key}{value}"), None)
                    yield "line", number, key, line


def _parse(block: bytes, schema: pa.Schema, unexpected: str) -> pa.Table | None:
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected)
    try:
        return pyarrow.json.read_json(pa.BufferReader(block), read, parse)
    except (pa.ArrowException, UnicodeDecodeError):
        return None


def _may_have_blank_lines(block: bytes) -> bool:
    return block[:1] in b" \t\r\n" or block.endswith(b"\n\n") or any(start in block for start in (b"\n\n", b"\n\r", b"\n ", b"\n\t"))


def _deepest_line(block: bytes) -> int:
    """Upper bound of the nesting in a line: its largest number of opening brackets."""
    data = np.frombuffer(block, np.uint8)
    starts = np.flatnonzero(data[:-1] == 10) + 1
    return int(np.add.reduceat((data | 32) == 123, np.append(0, starts), dtype=np.int64).max())  # [ | 32 is {


def _is_rounded(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether a float is so large that it may have been a whole number."""
    kind = column.type
    if pa.types.is_floating(kind):
        largest = pc.max(pc.abs(column)).as_py()
        return largest is not None and not largest < _EXACT
    if isinstance(column, pa.ChunkedArray):
        return _contains(kind, pa.types.is_floating) and any(_is_rounded(chunk) for chunk in column.chunks)
    if pa.types.is_list(kind):
        return _is_rounded(column.flatten())
    return pa.types.is_struct(kind) and any(_is_rounded(part) for part in column.flatten())


def _contains(kind: pa.DataType, check) -> bool:
    return check(kind) or any(_contains(kind.field(at).type, check) for at in range(kind.num_fields))


def _has_time(kind: pa.DataType) -> bool:
    return _contains(kind, pa.types.is_temporal)


def _has_text(kind: pa.DataType) -> bool:
    return _contains(kind, pa.types.is_string)


def _as_text(kind: pa.DataType) -> pa.DataType:
    """The type with texts instead of times."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_text(field.type)) for field in kind])
    return kind


def _num_keys(kind: pa.DataType) -> int:
    own = kind.num_fields if pa.types.is_struct(kind) else 0
    return max([own, *(_num_keys(kind.field(at).type) for at in range(kind.num_fields))])


def _common(one: pa.DataType | None, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both types exactly, or None."""
    if one is None or one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = _common(fields.get(field.name, field.type), field.type)
        return None if None in fields.values() else pa.struct(list(fields.items()))
    return None
