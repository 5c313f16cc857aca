"""Kinds of picture references in table cells: path, bytes, base64 text, data URL, web URL, URL of an object store."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

from mmsid.catalog.picture_formats import other_content, picture_format
from mmsid.catalog.picture_sources.reasons import refusal

Kind = Literal["path", "bytes", "web", "store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|::.*://)")  # two letters or more: C:\ is a drive
_HOST_FIRST = re.compile(r"//[\w-]+(\.[\w-]+)+(:\d+)?/")  # //cdn.example.com/a.jpg, as shops write it
_DATA_URL = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_SHORTEST_BASE64 = 48  # characters: a picture has more, and a shorter text is a path
_LONGEST_NAME = 255  # bytes of a file name on common file systems


def reference_kind(reference: str | bytes | Path) -> Kind:
    """Kind of a reference: `path`, `bytes` (also as base64 or data URL), `web` (http, https), `store` (other URLs, read by fsspec).

    Text is base64 only if its first bytes are those of a picture. All other text without a scheme is a path.
    """
    if not isinstance(reference, str):
        return "path" if isinstance(reference, Path) else "bytes"
    if scheme := _SCHEME.match(reference):
        name = scheme[1].lower()
        return "web" if name in ("http", "https") else "path" if name == "file" else "store"
    if _HOST_FIRST.match(reference):
        return "web"
    if _DATA_URL.match(reference) or _starts_like_base64_picture(reference):
        return "bytes"
    return "path"


def inline_bytes(reference: str | bytes, max_bytes: int) -> bytes:
    """The bytes of a reference of kind `bytes`.

    Raises:
        PictureError: `base64` if the text cannot be decoded; `too_many_bytes` if there are more than `max_bytes`.
    """
    if isinstance(reference, str):
        header = _DATA_URL.match(reference)
        data = _data_url(reference, header, max_bytes) if header else _decoded(reference, reference, max_bytes)
        if picture_format(data) is None and other_content(data) == "format":
            raise refusal("base64", reference)
    else:
        data = bytes(reference)
    if len(data) > max_bytes:
        raise refusal("too_many_bytes", reference)
    return data


def local_path(reference: str | Path) -> str:
    """The path of a reference of kind `path`: of a `file:` URL its decoded path, of other text the text itself.

    Raises:
        PictureError: `base64` if the text is too long for a file name and is base64, so that it was meant as a picture.
    """
    if isinstance(reference, Path):
        return str(reference)
    if reference[:5].lower() == "file:":
        return _path_of_file_url(reference)
    too_long = len(reference) > _LONGEST_NAME and max(map(len, reference.split("/"))) > _LONGEST_NAME
    if too_long and _BASE64.fullmatch("".join(reference.split())):
        raise refusal("base64", reference)
    return reference


def web_url(reference: str) -> str:
    """The URL of a reference of kind `web`."""
    return f"https:{reference}" if reference.startswith("//") else reference


def _path_of_file_url(url: str) -> str:
    path = url[5:]
    if path.startswith("//"):
        path = path[2:].removeprefix("localhost") if path[2:].startswith("localhost/") else path[2:]
    return unquote(path)


def _data_url(url: str, header: re.Match[str], max_bytes: int) -> bytes:
    body = url[header.end() :]
    if not header[1].lower().replace(" ", "").endswith(";base64"):
        if len(body) > 3 * max_bytes:
            raise refusal("too_many_bytes", url)
        return unquote_to_bytes(body)
    return _decoded(unquote(body) if "%" in body else body, url, max_bytes)


def _starts_like_base64_picture(text: str) -> bool:
    if len(text) < _SHORTEST_BASE64:
        return False
    start = text[: _SHORTEST_BASE64 + 8].lstrip()[:_SHORTEST_BASE64] if text[0].isspace() else text[:_SHORTEST_BASE64]
    if not _BASE64.fullmatch(start) or not _BASE64.fullmatch("".join(text[-_SHORTEST_BASE64:].split())):  # a path ends with a suffix
        return False
    try:
        return picture_format(_decode(start)) is not None
    except binascii.Error:
        return False


def _decoded(text: str, reference: str, max_bytes: int) -> bytes:
    if len(text) // 4 * 3 > max_bytes + max_bytes // 10 + 4:  # with room for line breaks
        raise refusal("too_many_bytes", reference)
    try:
        return _decode("".join(text.split()))
    except (binascii.Error, ValueError):
        raise refusal("base64", reference) from None


def _decode(text: str) -> bytes:
    text = text.replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
