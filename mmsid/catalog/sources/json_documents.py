"""Reader of one JSON document: an array of objects, or a mapping.

The mapping is read as the public SID projects write it: key -> object for items, where the key becomes `item_id` if the objects have
none, or key -> list for histories, which gives the columns `user_id` and `items`. A list of objects under one key is a table.
The document is decoded value by value, so that it need not fit into memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmsid.catalog.sources.batch import Batch, stripped_header
from mmsid.catalog.sources.contents import Contents
from mmsid.catalog.sources.json_values import SURROGATE, batch_of_rows, without_surrogates
from mmsid.catalog.sources.text_encoding import MARK, detect_encoding, open_text, undecodable
from mmsid.errors import CatalogError

KEY, USER, ITEMS = "item_id", "user_id", "items"
_CHUNK, _LONGEST_VALUE, _ROWS = 1 << 20, 1 << 28, 4096
_SURROGATE = re.compile(SURROGATE.pattern.decode())
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonDocumentFile:
    """A .json file. `TableFile` describes the attributes. The whole file is decoded once when it is opened."""

    format = "json"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents = contents.path, contents
        self._encoding = detect_encoding(contents)
        self._kinds: set[str] = set()
        self.num_rows, keys = 0, {}
        for row in self._rows():
            self.num_rows += 1
            if not keys.keys() >= row.keys():
                keys.update(dict.fromkeys(row))
        self._keys = stripped_header(self.path, list(keys))
        self.columns = tuple(self._keys)
        self.empty = not self.num_rows
        self.notes = [note for note in (self._encoding.note, *sorted(self._kinds)) if note]

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        columns = [(name, self._keys[name]) for name in selected if name in self._keys]
        kept, size = {key for _, key in columns}, min(rows, _ROWS)
        waiting: list[dict[str, Any]] = []
        first = 1
        for row in self._rows():
            waiting.append({key: value for key, value in row.items() if key in kept})
            if len(waiting) == size:
                yield batch_of_rows(waiting, columns, self.path, range(first, first + size), "row")
                first, waiting = first + size, []
        if waiting:
            yield batch_of_rows(waiting, columns, self.path, range(first, first + len(waiting)), "row")

    def _rows(self) -> Iterator[dict[str, Any]]:
        with open_text(self._contents, self._encoding, "mmsid_mark") as text:
            decoder = _Decoder(self, text)
            for number, (key, value) in enumerate(decoder.entries(), 1):
                row = self._row(number, key, value)
                if self._encoding.damaged or self._encoding.name != "utf-8-sig":
                    self._refuse_undecodable(number, row)
                yield without_surrogates(row) if decoder.surrogates else row

    def _row(self, number: int, key: str | None, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            if key is None or KEY in value:
                return value
            self._kinds.add(f"the keys of the mapping are the column {KEY}")
            return {KEY: key} | value
        if isinstance(value, list) and key is not None:
            self._kinds.add(f"a mapping of lists: the keys are the column {USER}, the lists are the column {ITEMS}")
            return {USER: key, ITEMS: value}
        raise CatalogError(
            f"{self.path}, row {number}: holds a {type(value).__name__}, expected an object; write an array of objects, or a mapping "
            "of ids to objects"
        )

    def _refuse_undecodable(self, number: int, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if MARK in (shown := f"{name}{value}"):
                raise undecodable(self._contents, self._encoding, iter([("row", number, name, shown)]))


class _Decoder:
    """Decodes the values of the outermost array or mapping of a document, one after the other."""

    def __init__(self, file: JsonDocumentFile, text: Any) -> None:
        self._file, self._text, self._ended = file, text, False
        self._buffer, self._at, self._number, self.surrogates = "", 0, 0, False
        self._decode = json.JSONDecoder().raw_decode

    def entries(self) -> Iterator[tuple[str | None, Any]]:
        """Key (None in an array) and value of each entry."""
        mark = self._next_character()
        if not mark:
            return
        yield from self._array() if mark == "[" else self._mapping()
        if self._next_character():
            raise self._invalid(f"text after the end of the {'array' if mark == '[' else 'mapping'}")

    def _array(self) -> Iterator[tuple[None, Any]]:
        self._at += 1
        if self._next_character() == "]":
            self._at += 1
            return
        while True:
            yield None, self._value()
            if self._separator("]"):
                return

    def _mapping(self) -> Iterator[tuple[str | None, Any]]:
        self._at += 1
        if self._next_character() == "}":
            self._at += 1
            return
        while True:
            self._number -= 1  # a key is no row
            key = self._value() if self._next_character() == '"' else None
            if key is None or self._next_character() != ":":
                raise self._invalid("expected a key in double quotes and a colon")
            self._at += 1
            if self._next_character() == "[" and self._lists_objects():
                yield from self._array()
            else:
                yield key, self._value()
            if self._separator("}"):
                return

    def _lists_objects(self) -> bool:
        while not (found := re.compile(r"\[[ \t\r\n]*(\S)").match(self._buffer, self._at)) and self._read():
            pass
        return bool(found) and found[1] == "{"

    def _separator(self, end: str) -> bool:
        mark = self._next_character()
        if mark not in (",", end) or not mark:
            raise self._invalid(f"expected ',' or {end!r}, found {mark!r}" if mark else "the file ends here")
        self._at += 1
        return mark == end

    def _next_character(self) -> str:
        while True:
            self._at = _SPACE.match(self._buffer, self._at).end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                return ""

    def _read(self) -> bool:
        more = "" if self._ended else self._text.read(max(_CHUNK, len(self._buffer) - self._at))
        self._ended = not more
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        self.surrogates = self.surrogates or _SURROGATE.search(self._buffer) is not None
        return bool(more)

    def _value(self) -> Any:
        self._next_character()
        self._number += 1
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:
                    self._at = end
                    return value
                self._read()  # a number at the end of the buffer may go on
            except RecursionError as error:
                raise self._invalid(str(error)) from error
            except ValueError as error:
                # only a value that is cut off by the end of the buffer can become valid
                cut = "Unterminated" in str(error) or getattr(error, "pos", 0) >= len(self._buffer) - 16
                if not cut or len(self._buffer) - self._at > _LONGEST_VALUE or not self._read():
                    raise self._invalid(str(error)) from error

    def _invalid(self, reason: str) -> CatalogError:
        return CatalogError(f"{self._file.path}, row {max(1, self._number)}: not valid JSON ({reason}); write the file again")
