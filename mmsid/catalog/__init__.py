"""Catalogue: items, pictures, user histories, splits and co-engagement, read from the user's files and checked."""

from mmsid.catalog.catalog import Catalog, read_catalog
from mmsid.catalog.coengagement import adjacent_pairs, co_engagement
from mmsid.catalog.config import CatalogConfig, Fields, PictureLimits, SplitConfig
from mmsid.catalog.describe import describe, summary
from mmsid.catalog.histories import Histories, UserHistory
from mmsid.catalog.item import Item
from mmsid.catalog.pictures import load_picture
from mmsid.catalog.splits import Split, split_histories

__all__ = [
    "Catalog",
    "CatalogConfig",
    "Fields",
    "Histories",
    "Item",
    "PictureLimits",
    "Split",
    "SplitConfig",
    "UserHistory",
    "adjacent_pairs",
    "co_engagement",
    "describe",
    "load_picture",
    "read_catalog",
    "split_histories",
    "summary",
]
