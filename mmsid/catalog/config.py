"""Configuration of the catalogue: which files, which columns, how large a picture may be, how histories are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mmsid.config import Section

PictureFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]


class Fields(Section):
    """Which column holds what. A column that is named here must exist; a default name that is absent is a missing fact.

    Attributes:
        item_id: unique id of an item; ignored when `group_by` is set.
        title, description: text, or None when the table has none.
        image: one column or several; each cell holds a path (relative to `image_root`) or a list of paths.
        categories: a list column, or several columns from root to leaf.
        category_roots: where the column holds more than the path (a brand before it): the path starts at the first of these names,
            and is empty where none occurs.
        attributes: columns with one value or a list of labels each, or a single column holding a mapping.
        group_by: rows with the same value of this column are creatives of one item, and the value is its id.
        user_id, sequence, timestamps: of the sequences table; `sequence` lists item ids in time order.
        list_separator: splits list cells of csv files; a cell that starts with `[` or `{` is read as JSON instead.
    """

    item_id: str = "item_id"
    title: str | None = "title"
    description: str | None = "description"
    image: str | list[str] | None = "image"
    categories: str | list[str] | None = "categories"
    category_roots: list[str] = Field(default_factory=list)
    attributes: list[str] = Field(default_factory=list)
    group_by: str | None = None
    user_id: str = "user_id"
    sequence: str = "items"
    timestamps: str | None = None
    list_separator: str = Field(default="|", min_length=1)

    @model_serializer(mode="wrap")
    def _keep_what_was_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # "named by the user" and "default" mean different things here, so a dump must not turn the one into the other
        dumped = handler(self)
        return {name: value for name, value in dumped.items() if name in self.model_fields_set}


class PictureLimits(Section):
    """What a picture may be. Checked on the file's size and header, before any pixel is decoded.

    Attributes:
        formats: decoders that are allowed to look at the file, whatever its name ends with.
        max_bytes: largest file, in bytes.
        max_pixels: largest width * height. Bounded by the size at which Pillow itself warns of a decompression bomb.
        animated: refuse a picture of several frames, or use its first frame.
        isolate: decode pixels in a process of its own (`isolation`), which may use `max_seconds` of processor time and
            `max_memory` bytes per picture. For pictures of people whom you do not know.
    """

    formats: tuple[PictureFormat, ...] = ("JPEG", "PNG", "WEBP")
    max_bytes: int = Field(default=20_000_000, gt=0)
    max_pixels: int = Field(default=25_000_000, gt=0, le=89_478_485)
    animated: Literal["refuse", "first_frame"] = "refuse"
    isolate: bool = False
    max_seconds: int = Field(default=10, gt=0)
    max_memory: int = Field(default=1_000_000_000, ge=50_000_000)


class SplitConfig(Section):
    """How histories are cut. `valid_from` and `test_from` are quantiles of all timestamps, for the time split only."""

    method: Literal["leave_one_out", "time"] = "leave_one_out"
    inner_held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    seed: int = 0
    valid_from: float = Field(default=0.8, gt=0.0, lt=1.0)
    test_from: float = Field(default=0.9, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        if self.valid_from >= self.test_from:
            raise ValueError(f"valid_from {self.valid_from} must lie before test_from {self.test_from}; lower valid_from")
        return self


class CatalogConfig(Section):
    """A catalogue: items (parquet, jsonl or csv), pictures under `image_root`, sequences of what users engaged with.

    Attributes:
        image_root: pictures lie below it and nowhere else; default: the folder of `items`.
        clean_text: take instructions to models, hidden characters and stuffing (`wording`) out of titles and descriptions. Such
            texts are recorded among the item's problems in any case.
        max_items, max_users: keep only so many, chosen by content hash, so that row order and ids do not matter.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"mend_text": "clean_text"}

    items: Path
    image_root: Path | None = None
    sequences: Path | None = None
    fields: Fields = Fields()
    pictures: PictureLimits = PictureLimits()
    clean_text: bool = False
    split: SplitConfig = SplitConfig()
    max_items: int | None = Field(default=None, gt=0)
    max_users: int | None = Field(default=None, gt=0)

    @property
    def root(self) -> Path:
        """The folder that pictures are confined to."""
        return self.image_root if self.image_root is not None else self.items.parent
