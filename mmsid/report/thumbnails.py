"""Thumbnails for the page: base64 WebP, limited in number and total size. Pictures are decoded with the catalogue's limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

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
        picture = _thumbnail(items[row], config)
        if picture is None:
            continue
        left -= len(picture)
        if left < 0:
            break
        found[row] = picture
    return found


def _thumbnail(item: Item, config: CatalogConfig) -> str | None:
    for path in item.images:
        try:
            picture = load_picture(path, config.pictures, config.picture_roots)
        except PictureError:  # a picture that passed the header checks can still fail when it is decoded
            continue
        picture.thumbnail((SIZE, SIZE))
        data = io.BytesIO()
        picture.save(data, format="WEBP", quality=QUALITY, method=4)
        return base64.b64encode(data.getvalue()).decode("ascii")
    return None
