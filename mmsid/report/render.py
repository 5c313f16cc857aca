"""Rendering of self-contained pages: escaping templates, the common style, and hashes for the content security policy."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(package: str, name: str) -> Template:
    """A template beside the files of a package. It escapes texts, and an unknown variable is an error."""
    environment = Environment(
        loader=PackageLoader(package, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def page_style() -> str:
    """The style sheet of all pages."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def policy_hash(source: str) -> str:
    """Hash by which a content security policy allows one style sheet or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
