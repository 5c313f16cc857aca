"""Small pictures for the page: WebP as base64, decoded through the catalogue's safe door, capped in number and in bytes together."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from mmsid.catalog import CatalogConfig, Item, load_picture
from mmsid.errors import PictureError
from mmsid.progress import track

SIZE = 96
QUALITY = 60
MOST = 4000
MOST_CHARACTERS = 7_500_000


def thumbnails(items: list[Item], order: Sequence[int], config: CatalogConfig) -> dict[int, str]:
    """Row -> base64 WebP of the first picture that can be decoded, at most SIZE pixels wide and high.

    Args:
        items: the items that the page shows.
        order: their rows, those that need a picture most first: when MOST pictures or MOST_CHARACTERS are reached, the rest have none.
    """
    wanted = [row for row in order if items[row].images][:MOST]
    found: dict[int, str] = {}
    left = MOST_CHARACTERS
    for row in track(wanted, what="report: thumbnails", unit="pictures"):
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
            picture = load_picture(path, config.pictures, config.root)
        except PictureError:  # a picture may fail once its pixels are read: the page can do without
            continue
        picture.thumbnail((SIZE, SIZE))
        data = io.BytesIO()
        picture.save(data, format="WEBP", quality=QUALITY, method=4)
        return base64.b64encode(data.getvalue()).decode("ascii")
    return None
