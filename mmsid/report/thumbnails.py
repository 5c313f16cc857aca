"""Thumbnails for the page: base64 WebP, limited in number and total size. Pictures are decoded with the catalogue's limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from mmsid.catalog import CatalogConfig, Item, load_picture
from mmsid.errors import PictureError
from mmsid.progress import track

SIZE = 96
QUALITY = 60
MAX_PICTURES = 4000
MAX_CHARACTERS = 7_500_000


def thumbnails(items: list[Item], order: Sequence[int], config: CatalogConfig) -> dict[int, str]:
    """Row -> base64 WebP of the item's first picture that can be decoded, at most SIZE px wide and high.

    Args:
        items: the items of the page.
        order: their rows by decreasing priority. Rows beyond MAX_PICTURES or MAX_CHARACTERS get no thumbnail.
    """
    rows = [row for row in order if items[row].images][:MAX_PICTURES]
    found: dict[int, str] = {}
    left = MAX_CHARACTERS
    for row in track(rows, what="report: thumbnails", unit="pictures"):
        data = item_thumbnail(items[row], config)
        if data is None:
            continue
        picture = base64.b64encode(data).decode("ascii")
        left -= len(picture)
        if left < 0:
            break
        found[row] = picture
    return found


def item_thumbnail(item: Item, config: CatalogConfig) -> bytes | None:
    """WebP thumbnail of the item's first picture that can be decoded, None if there is none."""
    for path in item.images:
        try:
            return thumbnail(load_picture(path, config.pictures, config.picture_roots))
        except PictureError:  # a picture that passed the header checks can still fail when it is decoded
            continue
    return None


def thumbnail(picture: Image.Image) -> bytes:
    """WebP of a picture, at most SIZE px wide and high. The picture itself stays as it is."""
    small, data = picture.copy(), io.BytesIO()
    small.thumbnail((SIZE, SIZE))
    small.save(data, format="WEBP", quality=QUALITY, method=4)
    return data.getvalue()
