"""Configuration of the catalogue: files, columns, limits on pictures, splits of the histories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mmsid.artifacts import is_complete, read_manifest
from mmsid.catalog.sources.locate import Source, as_source, folder_of, named_files, shown
from mmsid.config import Section

PictureFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF"]

PICTURE_CACHE = "MMSID_PICTURE_CACHE"  # environment variable: default of `picture_cache`


class Fields(Section):
    """Mapping of table columns to fields. A column set by the user must exist; a column with a default name may be absent.

    Attributes:
        item_id: column with the unique id of an item. Ignored when `group_by` is set.
        title, description: text columns, or None when the table has none. The texts of several columns are joined.
        image: one column or several. Each cell holds a path (relative to `image_root`) or a list of paths.
        categories: a list column, or several columns from root to leaf.
        category_roots: names at which a category path may start, for a column that also holds other values (a brand, for example).
            Values before the first of these names are dropped. The path is empty when none of them occurs.
        category_separator: text between the names of a category path that is written as one text, as in "Shoes > Boots". None finds it in
            the table, and "" keeps such texts whole.
        attributes: columns with one value or a list of labels each, or a single column that holds a mapping.
        group_by: column whose equal values mark the creatives of one item. The value is the item's id.
        user_id: column with the id of a user, in the sequences table or the events table.
        sequence, timestamps: columns of the sequences table. `sequence` lists item ids in time order.
        event_item, event_time: columns of the events table, the item id and the time of the event.
        event_type, event_weight: columns of the events table. Without them every event has the same type, or the weight 1.
        list_separator: separator of list cells in csv files. A cell that starts with `[` or `{` is read as JSON instead.
    """

    item_id: str = "item_id"
    title: str | list[str] | None = "title"
    description: str | list[str] | None = "description"
    image: str | list[str] | None = "image"
    categories: str | list[str] | None = "categories"
    category_roots: list[str] = Field(default_factory=list)
    category_separator: str | None = None
    attributes: list[str] = Field(default_factory=list)
    group_by: str | None = None
    user_id: str = "user_id"
    sequence: str = "items"
    timestamps: str | None = None
    event_item: str = "item_id"
    event_time: str = "timestamp"
    event_type: str = "event_type"
    event_weight: str = "weight"
    list_separator: str = Field(default="|", min_length=1)

    @model_serializer(mode="wrap")
    def _dump_only_set_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a column set by the user must exist and a default one need not, so a dump must keep the difference
        dumped = handler(self)
        return {name: value for name, value in dumped.items() if name in self.model_fields_set}


def _default(value: Any) -> dict[str, Any]:
    """Arguments of `Field` for a key that a dump leaves out at its default, so that manifests of earlier versions stay valid."""
    return {"default": value, "exclude_if": lambda given: given == value}


class PictureLimits(Section):
    """Limits on pictures. Those of size and format are checked on the file's size and header, before any pixel is decoded.

    Attributes:
        formats: allowed decoders. The file's suffix does not matter. HEIF needs the extra `heif`.
        max_bytes: maximum file size in bytes.
        max_pixels: maximum width * height. The upper bound is the size at which Pillow warns of a decompression bomb.
        animated: refuse a picture with several frames, or use its first frame.
        isolate: decode pixels in a sandboxed child process (`isolated_decoding`), for pictures from untrusted sources.
        max_seconds: processor seconds per picture in the child process.
        max_memory: bytes of additional memory per picture in the child process.
        link_targets: folders outside of the image root to which symbolic links below it may point.
        allow_private_hosts: download also from private, loopback and link-local addresses, and from file systems whose URL names a
            host (`ftp://`, `sftp://`). Without it, a catalogue cannot make this machine read its own network.
        connections: maximum number of simultaneous downloads. At most half of them, rounded up, ask the same host.
        request_seconds: time limit of one request, from its connection to its last byte. All tries of one picture take at most four
            times as long.
        max_total_bytes: maximum number of bytes that one run downloads.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("isolate", "max_seconds", "max_memory", "connections")

    formats: tuple[PictureFormat, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF")
    max_bytes: int = Field(default=20_000_000, gt=0)
    max_pixels: int = Field(default=25_000_000, gt=0, le=89_478_485)
    animated: Literal["refuse", "first_frame"] = "first_frame"
    isolate: bool = False
    max_seconds: int = Field(default=10, gt=0)
    max_memory: int = Field(default=1_000_000_000, ge=50_000_000)
    link_targets: tuple[Path, ...] = Field(**_default(()))
    allow_private_hosts: bool = Field(**_default(False))
    connections: int = Field(**_default(16), ge=1, le=256)
    request_seconds: float = Field(**_default(20.0), gt=0, allow_inf_nan=False)
    max_total_bytes: int = Field(**_default(100_000_000_000), gt=0)


def _is_keep(value: str) -> bool:
    return value == "keep"  # the dump of a split without the key stays that of earlier versions, and finished stages stay valid


class SplitConfig(Section):
    """Split of the histories into train, valid and test.

    Attributes:
        method: leave-one-out, or a split by time.
        inner_held_out: share of the train users that no model is fitted on.
        seed: seed of the choice of these users.
        valid_from, test_from: quantiles of all timestamps at which valid and test begin. Used by the time split only.
        repeats: `keep` all interactions, or count an item at the user's `first` interaction with it only. Seen items are masked in
            evaluation, so a target that repeats an item cannot be ranked.
    """

    method: Literal["leave_one_out", "time"] = "leave_one_out"
    inner_held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    seed: int = 0
    valid_from: float = Field(default=0.8, gt=0.0, lt=1.0)
    test_from: float = Field(default=0.9, gt=0.0, lt=1.0)
    repeats: Literal["keep", "first"] = Field(default="keep", exclude_if=_is_keep)

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        if self.valid_from >= self.test_from:
            raise ValueError(f"valid_from {self.valid_from} must be smaller than test_from {self.test_from}; lower valid_from")
        return self


def _source_texts(source: Source | tuple[Source, ...]) -> str | list[str]:
    return [str(one) for one in source] if isinstance(source, tuple) else str(source)


Sources = Annotated[
    Source | tuple[Source, ...],
    PlainSerializer(_source_texts, when_used="json-unless-none"),  # pydantic's own warns of tuples
    PlainValidator(as_source),  # a JSON text becomes a path, too
]


def _picture_cache() -> Path:
    return Path(os.environ.get(PICTURE_CACHE) or Path.home() / ".cache" / "mmsid" / "pictures")


def _absolute(place: Any, folder: Path) -> Any:
    if isinstance(place, tuple):
        return tuple(_absolute(one, folder) for one in place)
    return folder / place if isinstance(place, Path) else place


def _is_default(value: Any) -> bool:
    return not value  # the dump of a catalogue without the new keys stays that of earlier versions, and finished stages stay valid


class CatalogConfig(Section):
    """Catalogue: a table of items, pictures below `image_root`, vectors, and a table of user sequences or of events.

    Attributes:
        items: table of items: one source or several, each a file in a format of `mmsid.catalog.sources`, a folder of parts, a pattern like
            `parts/*.csv.gz`, a folder of `datasets.save_to_disk`, or `hf:OWNER/NAME[:SPLIT]`. The same holds for `sequences` and `events`.
        image_root: folder that contains all pictures. Default: the folder of the first local source of `items`.
        sequences: table with one row per user and the items that the user engaged with, or None.
        events: table with one row per event (user, item, time, and optionally type and weight), or None. It replaces `sequences`.
        event_types: type -> weight of its events. Weight 0 leaves the events out of the histories, as for exposures. A type that is not
            listed is an error. An empty mapping gives all types the weight 1. A weight column multiplies.
        vectors: parquet files with a vector per item, one file per family of vectors (`mmsid.catalog.vectors`).
        clean_text: remove instructions to models, hidden characters and repeated keywords (`prompt_injection`) from titles and
            descriptions. Such texts are recorded among the item's problems in any case.
        fields: which column of the tables holds which field of an item.
        pictures: limits on pictures and downloads.
        split: which interactions are train, valid and test.
        max_items, max_users: keep at most this many. They are chosen by content hash, so row order and ids do not matter.
        picture_cache: folder for pictures that are not local files: bytes in a table, and remote pictures; also for the
            features of pictures (`train_tokenizer.pictures`). A run uses `.cache/pictures` in
            its folder of runs. Otherwise the default is the environment variable MMSID_PICTURE_CACHE, else `~/.cache/mmsid/pictures`.
        ingested: folder of the stage `ingest` for this catalogue. It is opened instead of the sources if it was made with these keys.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"mend_text": "clean_text"}

    items: Sources
    image_root: Path | None = None
    sequences: Sources | None = None
    events: Sources | None = Field(default=None, exclude_if=_is_default)
    event_types: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict, exclude_if=_is_default)
    vectors: tuple[Path, ...] = Field(default=(), exclude_if=_is_default)
    fields: Fields = Fields()
    pictures: PictureLimits = PictureLimits()
    clean_text: bool = False
    split: SplitConfig = SplitConfig()
    max_items: int | None = Field(default=None, gt=0)
    max_users: int | None = Field(default=None, gt=0)
    ingested: Path | None = Field(default=None, exclude=True)
    picture_cache: Path = Field(default_factory=_picture_cache, exclude=True)

    @property
    def root(self) -> Path:
        """Folder that picture paths must stay below."""
        return self.image_root if self.image_root is not None else folder_of(self.items)

    @property
    def picture_roots(self) -> tuple[Path, Path]:
        """Folders that the pictures of items stay below: `root` and `picture_cache`."""
        return self.root.absolute(), self.picture_cache.absolute()

    @property
    def users_file(self) -> Source | tuple[Source, ...] | None:
        """The source that the histories are read from: `sequences` or `events`."""
        return self.sequences if self.events is None else self.events

    def absolute(self, folder: Path) -> CatalogConfig:
        """This catalogue with its relative paths starting at `folder`."""
        places = ("items", "image_root", "sequences", "events", "vectors")
        return self.model_copy(update={name: _absolute(getattr(self, name), folder) for name in places})

    def reading(self, folder: Path | None = None) -> dict[str, Any]:
        """The keys that decide what is read from the sources, as JSON data. Relative paths start at `folder`, by default here."""
        keys = self.absolute(Path.cwd() if folder is None else folder).model_dump(mode="json")
        return {name: value for name, value in keys.items() if name != "split"}

    def artefact(self) -> Path | None:
        """The ingested catalogue, if it is finished and was made with these keys, with or without the users. Otherwise None."""
        if self.ingested is None or not is_complete(self.ingested):
            return None
        manifest = read_manifest(self.ingested, "ingest")
        made, folder = CatalogConfig(**manifest["config"]["catalog"]), Path(manifest["extra"]["working_folder"])
        same = self.reading() in (made.reading(folder), made.without_users().reading(folder))
        return self.ingested if same else None

    def inputs(self) -> dict[str, Path | None]:
        """Name -> what a stage reads of the catalogue, for its manifest: the ingested catalogue, or the sources."""
        folder = self.artefact()
        return self.input_files() if folder is None else {"catalog": folder}

    def input_files(self) -> dict[str, Path | None]:
        """Name -> local file of every table of the catalogue, for the manifests of stages: `items`, `items 2`, ..., `vectors 1`, ...

        A table that is not configured or not local is None. A file that does not exist is listed.

        Raises:
            CatalogError: a folder or a pattern of the configuration holds no table.
        """
        tables = {"items": self.items, "sequences": self.sequences, "events": self.events}
        found = {name: file for table, source in tables.items() for name, file in named_files(table, source).items()}
        return found | {f"vectors {number}": path for number, path in enumerate(self.vectors, start=1)}

    def item_files(self) -> dict[str, Path | None]:
        """The part of `input_files` that belongs to `items`."""
        return named_files("items", self.items)

    def without_users(self) -> CatalogConfig:
        """The same catalogue without histories."""
        return self.model_copy(update={"sequences": None, "events": None, "event_types": {}})

    @field_validator("vectors", mode="before")
    @classmethod
    def _one_file_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _one_source_of_users(self) -> CatalogConfig:
        if self.sequences is not None and self.events is not None:
            raise ValueError(f"sequences is {shown(self.sequences)} and events is {shown(self.events)}; name one of them")
        if self.event_types and self.events is None:
            raise ValueError("event_types is set, but events is not; name the table of events, or remove event_types")
        if self.event_types and not any(self.event_types.values()):
            raise ValueError("event_types gives every type the weight 0, so no event is left; give one type a weight above 0")
        return self
