"""Reasons for which a picture cannot be used: a finite table of codes, each with its remedy.

The text of a decoder is never passed on, because it has leaked heap addresses (CVE-2026-22778).
"""

from __future__ import annotations

from pathlib import Path

from mmsid.errors import PictureError

REASONS = {
    # local files
    "missing": "the file does not exist; correct the path or the image_root",
    "outside_root": "the path is outside the image_root; move the picture below it, or add the target of a link to pictures.link_targets",
    "not_a_file": "the path is not a regular local file; name a picture file",
    "unreadable": "the file cannot be read; check its permissions",
    # contents
    "empty": "the file has no bytes; copy it again",
    "html": "the file is a web page, often an error page that was saved under the picture's name; download the picture again",
    "svg": "the file is an SVG drawing, which is not decoded; export it as PNG",
    "lfs_pointer": "the file is a git-lfs pointer; run `git lfs pull` where it came from and copy it again",
    "base64": "the text is base64 or a data URL, but not of a picture; correct the text",
    "format": "no allowed decoder supports the file; convert it or extend pictures.formats",
    "heif": "HEIC pictures need the package pillow-heif; install it with: pip install 'mmsid[heif]'",
    "animated": "the file has several frames; save one, or set pictures.animated to first_frame",
    "truncated": "the file is truncated; copy it again",
    "corrupt": "the file cannot be decoded; copy it again",
    # limits
    "too_many_bytes": "the file is larger than pictures.max_bytes; shrink it or raise the limit",
    "too_many_pixels": "the header declares more than pictures.max_pixels; shrink it or raise the limit",
    "too_slow": "decoding took more than pictures.max_seconds of processor time; save it again or raise the limit",
    "too_much_memory": "decoding needs more than pictures.max_memory; shrink it or raise the limit",
    "crashed": "the decoder crashed, so the file may be malicious; do not open it elsewhere",
    # downloads
    "not_downloaded": "the picture is no local file, and nothing is downloaded or unpacked here; give the path of a local file",
    "bad_url": "the URL cannot be used; write it as https://host/path, without user name and password",
    "scheme": "URLs of this kind are not read; use https, or an object store such as s3 or gs",
    "driver": "the package that reads URLs of this kind is missing; install the package that is named",
    "private_address": "the host has a private, local or reserved address; set pictures.allow_private_hosts to true if you trust the URLs",
    "dns": "the host name cannot be resolved; correct the URL or check the network",
    "connection": "the connection failed or ended early; check the network and run again",
    "tls": "the host has no valid TLS certificate; correct the URL or the certificate",
    "timeout": "the host did not answer in time; run again, or raise pictures.request_seconds",
    "too_many_redirects": "the URL was redirected more than 5 times; name the URL of the picture itself",
    "http_403": "the server denies access (401, 402, 403, 407 or 451); give URLs that need no login",
    "http_404": "the server has no such picture (404 or 410); correct the URL",
    "http_429": "the server asks for fewer requests; run again later, or lower pictures.connections",
    "http_5xx": "the server failed; run again later",
    "http_status": "the server answered with an unexpected status; correct the URL",
    "total_limit": "the run has downloaded pictures.max_total_bytes; raise the limit and run again, finished downloads are kept",
}
MAY_PASS = frozenset({"dns", "connection", "timeout", "http_429", "http_5xx", "total_limit"})
"""Reasons of downloads that may succeed at another time."""
_SHOWN = 200  # characters of a reference in a message; base64 texts have millions


def refusal(reason: str, reference: str | bytes | Path, detail: str = "") -> PictureError:
    """PictureError with the message of `reason`, a key of `REASONS`."""
    shown = f"{len(reference)} bytes" if isinstance(reference, bytes) else str(reference)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    text = f"picture {shown!r}: {REASONS[reason]}" + (f" ({detail})" if detail else "")
    return PictureError(reason, text, detail)
