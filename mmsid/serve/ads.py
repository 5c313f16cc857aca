"""New ads given to `mmsid encode` and to the service: texts cleaned as a catalogue's are, pictures decoded under limits, content hashed.

The content hash is that of the catalogue, so that an ad with the texts and picture bytes of a catalogue item is known as its duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from mmsid.catalog import Item, PictureLimits, load_picture
from mmsid.catalog.fields.text_cleaning import MAX_CHARACTERS, cleaned_texts
from mmsid.catalog.item import content_sha256
from mmsid.catalog.picture_sources.local_files import find_file, read_file
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.catalog.picture_sources.references import inline_bytes, local_path, reference_kind
from mmsid.catalog.records import ItemRecord, read_record
from mmsid.errors import CatalogError, PictureError

MAX_SIDE = 1024  # pixels; decoded pictures are shrunk to this longer side, which the models read at most
MAX_PICTURES = 8
MAX_LABELS, LONGEST_LABEL, LONGEST_ID, LONGEST_CAPTION = 200, 200, 200, 2_000  # the lengths are in characters


@dataclass(frozen=True)
class Ad:
    """A new ad.

    Attributes:
        item: id ('' if none is given), cleaned texts, categories, attributes, content hash; without pictures.
        caption, interests: texts that come with the ad; '' and () if there are none.
        pictures: decoded RGB pictures, at most `MAX_SIDE` px wide and high.
    """

    item: Item
    caption: str = ""
    interests: tuple[str, ...] = ()
    pictures: tuple[Image.Image, ...] = ()


def read_ad(record: Mapping[str, Any], limits: PictureLimits, place: str, *, clean_text: bool = False, folder: Path | None = None) -> Ad:
    """Check one ad and decode its pictures.

    Args:
        record: keys of `mmsid.catalog.records.KEYS` except `vectors`. Pictures are bytes, base64 texts or data URLs.
        limits: limits on pictures.
        place: name of the ad in messages.
        clean_text: also remove instructions to models, as the catalogue of the bundle does.
        folder: pictures may also be paths of files below this folder; None: they may not.

    Raises:
        CatalogError: an unknown key, a value of the wrong type, too many labels, or no content at all.
        PictureError: a picture cannot be used.
    """
    if isinstance(record, Mapping) and record.get("vectors") is not None:
        raise CatalogError(f"{place} has vectors; a bundle encodes titles, texts and pictures, so remove the key")
    plain = read_record({name: value for name, value in record.items() if name not in ("image", "images")}, place)
    given = [record["image"]] if record.get("image") is not None else []
    more = record.get("images") or ()
    if isinstance(more, (str, bytes)) or not isinstance(more, Sequence):
        raise CatalogError(f"{place}, images is a {type(more).__name__}, expected a list of pictures")
    given += more
    if len(given) > MAX_PICTURES:
        raise CatalogError(f"{place} has {len(given)} pictures, at most {MAX_PICTURES} are read")
    _check_texts(plain, place)
    data = [_bytes(picture, limits, f"{place}, picture {at + 1}", folder) for at, picture in enumerate(given)]
    title, description = (_cleaned(getattr(plain, name), name, clean_text) for name in ("title", "description"))
    if not (data or title or description or plain.caption):
        raise CatalogError(f"{place} has neither a picture nor a title, description or caption; give one of them")
    pictures = tuple(_decoded(one, limits, f"{place}, picture {at + 1}") for at, one in enumerate(data))
    attributes = sorted(plain.attributes.items())
    digest = content_sha256(title, description, plain.categories, attributes, [hashlib.sha256(one).hexdigest() for one in data])
    item = Item(plain.item_id, title, description, (), plain.categories, dict(attributes), digest, ())
    return Ad(item, plain.caption.strip(), plain.interests, pictures)


def _check_texts(ad: ItemRecord, place: str) -> None:
    labels = [*ad.categories, *ad.interests, *ad.attributes, *(label for found in ad.attributes.values() for label in found)]
    if len(labels) > MAX_LABELS or any(len(label) > LONGEST_LABEL for label in labels):
        longest = max(map(len, labels), default=0)
        raise CatalogError(
            f"{place} has {len(labels)} categories, attributes and interests, the longest of {longest} characters; at most {MAX_LABELS} of "
            f"{LONGEST_LABEL} characters are read"
        )
    for name, text, most in (("item_id", ad.item_id, LONGEST_ID), ("caption", ad.caption, LONGEST_CAPTION)):
        if len(text) > most:
            raise CatalogError(f"{place}, {name} has {len(text)} characters, at most {most} are read")
    try:
        "".join([ad.item_id, ad.caption, *labels]).encode()
    except UnicodeEncodeError as error:
        raise CatalogError(f"{place} holds half of a surrogate pair, which is no text; send valid UTF-8") from error


def _bytes(picture: Any, limits: PictureLimits, place: str, folder: Path | None) -> bytes:
    """Bytes of a picture file. A text is base64 or a data URL; it is a path only if there is a `folder`."""
    if isinstance(picture, Mapping):  # an undecoded image of Hugging Face datasets
        picture = picture.get("bytes") or picture.get("path")
    picture = bytes(picture) if isinstance(picture, bytearray) else picture
    if not isinstance(picture, (bytes, str, Path)):
        expected = "bytes, base64 text or a data URL" if folder is None else "a path, bytes, base64 text or a data URL"
        raise CatalogError(f"{place} is a {type(picture).__name__}, expected {expected}")
    kind = reference_kind(picture)
    if kind == "bytes":
        try:
            return inline_bytes(picture, limits.max_bytes)
        except PictureError as error:
            raise refusal(error.reason, place) from None
    if folder is not None and kind == "path":
        return read_file(find_file(local_path(picture), limits, folder), limits, picture)[0]
    if folder is not None:
        raise PictureError("not_downloaded", f"{place} is the URL {picture!r}; URLs are not downloaded: fetch the picture, give its path")
    raise refusal("base64", place)


def _decoded(data: bytes, limits: PictureLimits, place: str) -> Image.Image:
    try:
        picture = load_picture(data, limits)
    except PictureError as error:
        raise refusal(error.reason, place) from None
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def _cleaned(text: str, field: str, clean_text: bool) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
    found = cleaned_texts(pa.array([text], pa.large_string()), MAX_CHARACTERS[field], clean_text, one_line=field == "title")
    return found.texts[0].as_py()
