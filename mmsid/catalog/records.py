"""Items given in memory: dictionaries, rows of Hugging Face `datasets`, or `Item` objects.

Their pictures are PIL images, paths, bytes, base64 texts or data URLs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.item import Item
from mmsid.catalog.picture_decoding import to_rgb
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.catalog.picture_sources.references import reference_kind
from mmsid.catalog.pictures import load_picture
from mmsid.errors import CatalogError, PictureError

KEYS = ("item_id", "title", "description", "categories", "attributes", "caption", "interests", "image", "images", "vectors")


@dataclass(frozen=True)
class ItemRecord:
    """One ad or product in memory.

    Attributes:
        item_id: id, '' if the record has none.
        title, description, caption: text, '' if absent.
        categories: names from root to leaf.
        attributes: name -> labels.
        interests: mined descriptors, strongest first.
        pictures: decoded RGB pictures.
        vectors: vectors that the user brings, float32, one per family.
    """

    item_id: str
    title: str
    description: str
    categories: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    caption: str
    interests: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    vectors: tuple[np.ndarray, ...] = ()


def read_record(record: Mapping[str, Any] | Item, place: str = "item") -> ItemRecord:
    """Check one record and decode its pictures.

    Args:
        record: an `Item`, or a mapping with keys of `KEYS`. `categories` is a list or one string, `attributes` maps names to a label or
            a list of labels. `image` is a picture and `images` a list of pictures: a PIL image, a path, encoded bytes, or a mapping
            with `bytes` or `path` as in Hugging Face `datasets`. `vectors` is a list of numbers, or one such list per family.
        place: name of the record in error messages, for example "item 3".

    Raises:
        CatalogError: an unknown key, or a value of the wrong type. The message names the record, the key and the value.
        PictureError: a picture that cannot be decoded.
    """
    if isinstance(record, Item):
        pictures = tuple(load_picture(path, PictureLimits()) for path in record.images)
        texts = (record.item_id, record.title, record.description, record.categories, record.attributes)
        return ItemRecord(*texts, caption="", interests=(), pictures=pictures)
    if not isinstance(record, Mapping):
        raise CatalogError(f"{place} is a {type(record).__name__}; give a dictionary, a row of a Hugging Face dataset, or a mmsid.Item")
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise CatalogError(f"{place} has the unknown key {unknown[0]!r}; known keys: {', '.join(KEYS)}. Rename or remove it")
    pictures = [("image", record.get("image"))] if record.get("image") is not None else []
    pictures += [(f"images[{at}]", picture) for at, picture in enumerate(record.get("images") or ())]
    return ItemRecord(
        item_id=_text(record, "item_id", place),
        title=_text(record, "title", place),
        description=_text(record, "description", place),
        categories=_texts(record.get("categories"), f"{place}, categories"),
        attributes=_attributes(record.get("attributes"), place),
        caption=_text(record, "caption", place),
        interests=_texts(record.get("interests"), f"{place}, interests"),
        pictures=tuple(_picture(picture, f"{place}, {key}") for key, picture in pictures),
        vectors=_vectors(record.get("vectors"), f"{place}, vectors"),
    )


def _text(record: Mapping[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise CatalogError(f"{place}, {key} is {value!r}, expected text")
    return str(value)


def _texts(value: Any, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(one, str) for one in values):
        raise CatalogError(f"{place} is {value!r}, expected a text or a list of texts")
    return tuple(one for one in values if one.strip())


def _vectors(value: Any, place: str) -> tuple[np.ndarray, ...]:
    if value is None:
        return ()
    try:
        nested = len(value) > 0 and np.ndim(value[0]) > 0
        families = tuple(np.asarray(one, dtype=np.float32) for one in (value if nested else [value]))
    except (TypeError, ValueError, KeyError):
        families = ()
    if not families or not all(one.ndim == 1 and len(one) and np.isfinite(one).all() for one in families):
        raise CatalogError(f"{place} is {str(value)[:80]}, expected a list of finite numbers, or one such list per family")
    return families


def _attributes(value: Any, place: str) -> dict[str, tuple[str, ...]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CatalogError(f"{place}, attributes is {value!r}, expected a mapping of names to labels")
    return {str(name): _texts(labels, f"{place}, attributes[{name!r}]") for name, labels in value.items()}


def _picture(value: Any, place: str) -> Image.Image:
    limits = PictureLimits()
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, Mapping):  # an undecoded image of Hugging Face datasets
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, bytearray, str, Path)):
        raise CatalogError(f"{place} is a {type(value).__name__}, expected a PIL image, a path, bytes, base64 text or a data URL")
    value = bytes(value) if isinstance(value, bytearray) else value
    if reference_kind(value) in ("web", "store"):
        raise PictureError(
            "not_downloaded", f"{place} is the URL {value!r}; URLs are not downloaded: fetch the picture and give its bytes or path"
        )
    try:
        return load_picture(value, limits)
    except PictureError as error:
        if isinstance(value, (str, Path)) and reference_kind(value) == "path":
            raise
        raise refusal(error.reason, place) from None
