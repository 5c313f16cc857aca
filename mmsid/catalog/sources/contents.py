"""Recognition of files by their first bytes: compression, table format, and files that are no tables.

The suffix decides only where the bytes leave a choice, for example between csv and text.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmsid.errors import CatalogError

PARQUET, ARROW, JSON_LINES, JSON, DELIMITED, FEED = "parquet", "arrow", "jsonl", "json", "csv", "xml"
FORMAT_OF_SUFFIX = {
    ".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES,
    ".csv": DELIMITED, ".tsv": DELIMITED, ".txt": DELIMITED, ".json": JSON, ".xml": FEED,
}  # fmt: skip
COMPRESSION_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2")
READABLE = "a .parquet, .arrow, .feather, .jsonl, .ndjson, .json, .csv, .tsv, .txt or .xml file, plain or compressed with gzip or zstd"
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_HEAD, _BLOCK = 65_536, 1 << 20
_EXCEL = "an Excel workbook; Excel files are not read: save the sheet as CSV (UTF-8) or as Unicode text"
_NO_TABLES = {
    b"version https://git-lfs": "a git-lfs pointer, not the table itself; run `git lfs pull` in its folder",
    b"/annex/objects/": "a git-annex pointer, not the table itself; run `git annex get` in its folder",
    b"\xd0\xcf\x11\xe0": _EXCEL,
    b"\xfd7zXZ": "compressed with xz; unpack it with `unxz`, or compress it with gzip or zstd",
    b"SQLite format 3": "an SQLite database; export the table as parquet or csv",
    b"FEA1": "a Feather file of version 1; write it again with a recent pyarrow or as parquet",
}


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        format: PARQUET, ARROW, JSON_LINES, JSON, DELIMITED or FEED.
        compression: "gzip", "zstd", "bz2" or None.
        head: the first 64 KB, decompressed.
        surprise: one sentence if the content is another than the file's name says, otherwise ''.
    """

    path: Path
    format: str
    compression: str | None
    head: bytes
    surprise: str

    def open(self) -> pa.NativeFile:
        """The decompressed bytes, as a stream."""
        return pa.input_stream(str(self.path), compression=self.compression, buffer_size=0)

    def open_seekable(self) -> pa.NativeFile:
        """The decompressed bytes, for readers that jump. A compressed file is unpacked into a temporary file."""
        if self.compression is None:
            return pa.memory_map(str(self.path))
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (closed together with the returned file)
        with self.open() as stream:
            while block := stream.read(_BLOCK):
                unpacked.write(block)
        unpacked.seek(0)
        return pa.PythonFile(unpacked, mode="r")


def table_suffix(path: Path) -> str:
    """Suffix of a table in lower case, without that of a compression: ".csv" for `items.csv.gz`."""
    name = Path(path)
    while name.suffix.lower() in COMPRESSION_SUFFIXES:
        name = name.with_suffix("")
    return name.suffix.lower()


def recognise(path: Path, config_key: str) -> Contents:
    """Recognise a file by its first bytes, and by its suffix where they leave a choice.

    Raises:
        CatalogError: the file is no table, for example a workbook or a git-lfs pointer, or its format is unknown.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(8)
        compression = next((name for magic, name in _COMPRESSIONS.items() if first.startswith(magic)), None)
        with pa.input_stream(str(path), compression=compression, buffer_size=0) as stream:
            head = stream.read(_HEAD)
    except (OSError, pa.ArrowException) as error:
        raise CatalogError(f"{path} cannot be read ({type(error).__name__}: {error}); write or copy the file again") from error
    for magic, description in _NO_TABLES.items():
        if head.startswith(magic):
            raise CatalogError(f"{config_key}: {path} is {description}")
    if head.startswith(b"PK\x03\x04"):
        kind = _EXCEL if b"xl/" in head or b"[Content_Types]" in head else "a zip archive; unpack it and name the table inside"
        raise CatalogError(f"{config_key}: {path} is {kind}")
    suffix = table_suffix(path)
    named = FORMAT_OF_SUFFIX.get(suffix)
    found = _format(path, head, named, config_key)
    if found is None:
        if named in (PARQUET, ARROW):
            raise CatalogError(f"{path} cannot be read as {named} (it starts with {head[:8]!r}); write the file again")
        raise CatalogError(f"{config_key}: {path} ends in {suffix!r}; name {READABLE}")
    return Contents(path, found, compression, head, _surprise(path, found, named, compression))


def head_text(head: bytes) -> str:
    """The beginning of a text file, in any Unicode encoding. Other encodings give their ASCII characters."""
    codec = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if codec == "utf-8-sig" and head[:64].count(0) * 3 > len(head[:64]):
        codec = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    return head.decode(codec, "replace")


def _format(path: Path, head: bytes, named: str | None, config_key: str) -> str | None:
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ARROW
    text = head_text(head).lstrip()
    if re.match(r"<(!doctype\s+html|html)\b", text, re.IGNORECASE):
        raise CatalogError(f"{config_key}: {path} is a web page, not a table; download the file itself")
    if re.match(r"<(\?xml|!--|rss|feed|rdf)\b", text, re.IGNORECASE) or (named == FEED and text.startswith("<")):
        return FEED
    if named in (PARQUET, ARROW, FEED) or named is None:
        return _json_format(text, None, len(head) < _HEAD)
    return _json_format(text, named, len(head) < _HEAD) or named


def _json_format(text: str, named: str | None, whole: bool) -> str | None:
    """JSON or JSON_LINES if the text is JSON, None otherwise. `whole`: the text is the whole file."""
    if text.startswith("["):
        return JSON if named == JSON or re.match(r"\[\s*\{", text) else None
    if not text.startswith("{"):
        return None
    line, _, rest = text.partition("\n")
    if line.startswith("{'"):  # lines of Python literals, as in the Amazon files of 2014
        return JSON_LINES if named in (JSON, JSON_LINES) else None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        if named == JSON_LINES and line.strip() != "{":
            return JSON_LINES
        if not rest and not whole:  # one very long line: a mapping, or the first of several rows
            return JSON if re.match(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]', text) else JSON_LINES
        return JSON if named != DELIMITED and re.match(r'\{\s*("|\}|$)', text) else None
    if rest.strip() or named == JSON_LINES or not whole:
        return JSON_LINES
    return JSON if row and all(isinstance(value, (dict, list)) for value in row.values()) else JSON_LINES


def _surprise(path: Path, found: str, named: str | None, compression: str | None) -> str:
    packed = path.suffix.lower() in COMPRESSION_SUFFIXES
    facts = []
    if found != named and not {found, named} <= {JSON, JSON_LINES}:
        facts.append(f"{found} by its content")
    if compression and not packed:
        facts.append(f"compressed with {compression}")
    if packed and not compression:
        facts.append("not compressed")
    return ", ".join(facts)
