"""One item of a catalogue, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Item:
    """One ad or product.

    Attributes:
        item_id: unique id in the catalogue.
        title, description: text, '' where missing.
        images: absolute paths of the creatives that passed the checks of path, size and header. Decoding such a file can still fail.
        categories: names from root to leaf, of any depth.
        attributes: name -> labels.
        content_sha256: hash of title, description, categories, attributes and picture bytes (64 hex digits).
        problems: codes of missing or refused parts. `no_title`, `no_description`, `no_categories` and `no_picture` are set where the
            table has such a column, `picture_<reason>` for each refused picture, and `title_<code>` or `description_<code>` for each
            code of `prompt_injection.text_problems`.
    """

    item_id: str
    title: str
    description: str
    images: tuple[Path, ...]
    categories: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    content_sha256: str
    problems: tuple[str, ...]


def content_sha256(
    title: str, description: str, categories: Sequence[str], attributes: Iterable[tuple[str, Sequence[str]]], pictures: Sequence[str]
) -> str:
    """SHA-256 (hex) of an item's content. Ids, paths and row numbers are not part of it.

    Args:
        attributes: (name, labels) in the order of names.
        pictures: SHA-256 of the bytes of each picture, or of the reason why there are none.
    """
    return hashlib.sha256(_encode([title, description, categories, attributes, pictures]).encode("utf-8")).hexdigest()
