"""Encodings of text files: detection, decoding, and the place of bytes that cannot be decoded."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mmsid.catalog.sources.contents import Contents
from mmsid.errors import CatalogError

MARK = "\udcff"  # stands for bytes that cannot be decoded; valid text never holds it
_BLOCK, _WINDOW = 1 << 20, 1 << 16
_HIGH = re.compile(rb"[\x80-\xff]+")


@dataclass(frozen=True)
class TextEncoding:
    """Encoding of a text file, and where its first `\\"` is.

    Attributes:
        name: codec of Python.
        quotes: a double quote occurs.
        escaped_quote: byte offset of the first backslash before a double quote, or -1.
        damaged: the file is UTF-8, but some of its bytes are not.
    """

    name: str
    quotes: bool
    escaped_quote: int
    damaged: bool = False

    @property
    def note(self) -> str:
        """`encoding windows-1252`, or '' for UTF-8."""
        shown = {"cp1252": "windows-1252", "cp1250": "windows-1250", "cp1251": "windows-1251", "utf-8-sig": ""}.get(self.name, self.name)
        return f"encoding {shown}" if shown else ""


def mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs that replaces bytes which cannot be decoded by `MARK`."""
    return MARK, error.end


codecs.register_error("mmsid_mark", mark_undecodable)


def detect_encoding(contents: Contents) -> TextEncoding:
    """Detect the encoding of a text file. The whole file is read once.

    A file that is valid UTF-8 is UTF-8. A byte order mark or many zero bytes mean UTF-16. A file with more valid than invalid sequences
    is damaged UTF-8, and its encoding is UTF-8. For other files, Windows-1252 is taken where high bytes stand alone between
    letters, as in western languages, and charset-normalizer decides otherwise.
    """
    head = contents.head
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return TextEncoding("utf-16", True, -1)
    if head[:64].count(0) * 3 > len(head[:64]) > 1:
        return TextEncoding("utf-16-le" if head[1:2] == b"\0" else "utf-16-be", True, -1)
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    quotes, escaped, offset, valid, suspects, pending = False, -1, 0, 0, b"", b""
    with contents.open() as stream:
        while block := stream.read(_BLOCK):
            quotes = quotes or b'"' in block
            if escaped < 0 and (at := (pending + block).find(b'\\"')) >= 0:
                escaped = offset - len(pending) + at
            pending, offset = block[-1:], offset + len(block)
            if suspects:
                continue
            try:
                text = decoder.decode(block)
                valid += not text.isascii()
            except UnicodeDecodeError as error:
                start = max(0, error.start - _WINDOW)
                suspects = error.object[start : error.end + 4 * _WINDOW]
        if not suspects:
            try:
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                suspects = error.object
    if not suspects or _damaged_utf8(suspects, valid):
        return TextEncoding("utf-8-sig", quotes, escaped, damaged=bool(suspects))
    return TextEncoding(_legacy_encoding(suspects), quotes, escaped)


def _damaged_utf8(sample: bytes, valid_blocks: int) -> bool:
    marked = sample.decode("utf-8", "mmsid_mark")
    wrong = marked.count(MARK)
    return valid_blocks + sum(not char.isascii() for char in marked) - wrong >= max(1, wrong)


def _legacy_encoding(sample: bytes) -> str:
    """Encoding of a sample that is no Unicode. A file in Windows-1252 has few high bytes beside each other."""
    runs = [len(run) for run in _HIGH.findall(sample)]
    alone = sum(run for run in runs if run <= 2)
    if alone >= 0.8 * sum(runs):
        try:
            sample.decode("cp1252")
            return "cp1252"
        except UnicodeDecodeError:
            pass
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    return best.encoding if best is not None and not best.encoding.startswith("utf") else "cp1252"


class _DecodedBytes(io.RawIOBase):
    """Readable stream of the bytes of a `Contents`, for `io.TextIOWrapper`."""

    def __init__(self, contents: Contents) -> None:
        self._stream = contents.open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_text(contents: Contents, encoding: TextEncoding, errors: str = "strict") -> io.TextIOWrapper:
    """The text of a file, with its line ends as they are."""
    raw = io.BufferedReader(_DecodedBytes(contents), _BLOCK)
    return io.TextIOWrapper(raw, encoding=encoding.name, errors=errors, newline="")


class _Utf8(io.RawIOBase):
    def __init__(self, contents: Contents, encoding: TextEncoding) -> None:
        self._text, self._rest = open_text(contents, encoding), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        block = self._rest or self._text.read(_BLOCK).encode("utf-8", "replace")
        taken, self._rest = block[: len(buffer)], block[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._text.close()
        super().close()


def open_utf8(contents: Contents, encoding: TextEncoding) -> BinaryIO:
    """The bytes of a text file as UTF-8 without a byte order mark."""
    if encoding.name != "utf-8-sig":
        return io.BufferedReader(_Utf8(contents, encoding), _BLOCK)
    stream = io.BufferedReader(_DecodedBytes(contents), _BLOCK)
    if stream.peek(3)[:3] == codecs.BOM_UTF8:
        stream.read(3)
    return stream


def undecodable(contents: Contents, encoding: TextEncoding, places: Iterator[tuple[str, int, str | None, str]]) -> CatalogError:
    """The error for a text file with bytes that cannot be decoded.

    Args:
        places: unit, number, column and text of each cell of the file, decoded with `errors="mmsid_mark"`.
    """
    name = "UTF-8" if encoding.name == "utf-8-sig" else encoding.name
    remedy = "correct these bytes, or save the file as UTF-8"
    try:
        for unit, number, column, text in places:
            if MARK in text:
                field = "" if column is None else f", field {column!r}"
                shown = text.replace(MARK, "\N{REPLACEMENT CHARACTER}")
                at = shown.find("\N{REPLACEMENT CHARACTER}")
                excerpt = shown[max(0, at - 30) : at + 30]
                return CatalogError(f"{contents.path}, {unit} {number}{field}: {excerpt!r} cannot be decoded as {name}; {remedy}")
    except (ValueError, OSError, csv.Error, CatalogError, RecursionError):  # the file is damaged in another way too
        pass
    return CatalogError(f"{contents.path} cannot be decoded as {name}; {remedy}")
