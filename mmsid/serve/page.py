"""The page of the service: one HTML file without external resources, and the policy that permits its own script and style only."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path


@functools.cache
def page() -> str:
    """HTML of the page, with its style and script inside."""
    folder = Path(__file__).parent
    text = (folder / "page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/* {name} */", (folder / name).read_text(encoding="utf-8"))
    return text


@functools.lru_cache(maxsize=8)
def policy(text: str) -> str:
    """Content-Security-Policy of a page: its inline script and style by their hashes, pictures in data URLs, requests to the service."""
    script, style = (" ".join(map(_hash, re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S))) or "'none'" for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
