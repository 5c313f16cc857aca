"""Known catalogue formats, recognised by their columns: which column feeds which field.

A preset fills the keys of `catalog.fields` that the user did not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_TYPED = re.compile(r"^(.+):(token|token_seq|float|float_seq)$")


@dataclass(frozen=True)
class Preset:
    """One known format. Names of columns are in the form of `normal_name`.

    Attributes:
        name: name for people.
        required: groups of columns. A table matches when it has at least one column of every group.
        fields: key of `catalog.fields` -> columns, the first that exists for a single column, all that exist for several.
        several: keys of `fields` that take all existing columns.
        separators: column -> separator of the labels or of the category path that it writes as one text.
        note: further fact for people.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    fields: Mapping[str, tuple[str, ...]]
    several: frozenset[str] = frozenset({"image", "attributes"})
    separators: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


_FEED_ATTRIBUTES = ("brand", "color", "colour", "size", "gender", "age_group", "material", "pattern")
_FEED = {
    "item_id": ("id",),
    "group_by": ("item_group_id",),
    "title": ("title",),
    "description": ("description",),
    "image": ("image_link", "additional_image_link"),
    "attributes": _FEED_ATTRIBUTES,
}

PRESETS = (
    Preset(
        "Meta catalogue",
        (("id",), ("title",), ("image_link",), ("fb_product_category", "rich_text_description", "quantity_to_sell_on_facebook")),
        _FEED | {"categories": ("product_type", "fb_product_category", "google_product_category")},
    ),
    Preset(
        "Google Merchant Center feed",
        (
            ("id",),
            ("title",),
            ("image_link",),
            ("link", "price", "availability", "google_product_category", "product_type", "item_group_id"),
        ),
        _FEED | {"categories": ("product_type", "google_product_category")},
    ),
    Preset(
        "Shopify product export",
        (("handle",), ("title",), ("body_html",), ("vendor", "variant_sku", "image_src")),
        {
            "group_by": ("handle",),
            "title": ("title",),
            "description": ("body_html",),
            "image": ("image_src", "variant_image"),
            "categories": ("product_category", "type"),
            "attributes": ("vendor", "type", "tags", "option1_value", "option2_value", "option3_value"),
        },
        separators={"tags": ","},
    ),
    Preset(
        "Amazon reviews 2023",
        (("parent_asin",), ("title",), ("images", "features", "details")),
        {
            "item_id": ("parent_asin",),
            "title": ("title",),
            "description": ("features", "description"),
            "image": ("images",),
            "categories": ("categories", "main_category"),
            "attributes": ("store",),
        },
        several=frozenset({"image", "attributes", "description"}),
    ),
    Preset(
        "Amazon reviews 2014 or 2018",
        (("asin",), ("title",), ("imurl", "imageurl", "imageurlhighres", "salesrank", "also_buy", "related", "rank")),
        {
            "item_id": ("asin",),
            "title": ("title",),
            "description": ("description", "feature"),
            "image": ("imageurlhighres", "imageurl", "imurl"),
            "categories": ("categories", "category"),
            "attributes": ("brand",),
        },
        several=frozenset({"attributes", "description"}),
    ),
    Preset(
        "MovieLens",
        (("movieid", "movie_id"), ("title", "movie_title"), ("genres", "genre", "class")),
        {
            "item_id": ("movieid", "movie_id"),
            "title": ("title", "movie_title"),
            "attributes": ("genres", "genre", "class", "release_year"),
        },
        separators={"genres": "|"},
    ),
)

_RECBOLE = {
    "item_id": ("item_id",),
    "title": ("title", "movie_title", "name", "item_name"),
    "description": ("description",),
    "image": ("image", "image_url", "imurl"),
    "categories": ("categories", "category", "item_category"),
    "attributes": ("class", "genre", "genres", "brand", "store", "release_year"),
}


def normal_name(column: str) -> str:
    """A column name in lower case with single underscores: `g:Image Link` and `imageLink` alike give `image_link`."""
    name = column.strip().removeprefix("g:")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name) if not name.isupper() else name
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def preset_of(columns: Sequence[str]) -> tuple[Preset, dict[str, str]] | None:
    """The known format of a table with these columns, and normal name -> column; None when no format is recognised."""
    typed = [_TYPED.match(column.strip()) for column in columns]
    if columns and all(typed):
        return _recbole(columns)
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(normal_name(column), column)
        names.setdefault(normal_name(column).replace("_", ""), column)
    for preset in PRESETS:
        if "item_id" in names and "item_id" not in preset.fields.get("item_id", ()):
            continue  # the table was made for mmsid
        if all(any(name in names for name in group) for group in preset.required):
            return preset, names
    return None


def _recbole(columns: Sequence[str]) -> tuple[Preset, dict[str, str]] | None:
    names = {normal_name(_TYPED.match(column.strip())[1]): column for column in columns}
    if "item_id" not in names or "user_id" in names:
        return None
    lists = {normal_name(_TYPED.match(column.strip())[1]): " " for column in columns if column.strip().endswith(":token_seq")}
    separators = {name: mark for name, mark in lists.items() if name in ("class", "genre", "genres")}
    return Preset("RecBole .item file", (), _RECBOLE, separators=separators), names
