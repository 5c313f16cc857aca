"""Inputs of the item tokenizer: one text of labelled fields per item, its pictures, and vectors that the user brings.

Interests mined from co-engagement (`source: coengagement`) restate behaviour. They may be reconstruction targets but are never text
that the backbone reads: it could not read an item without interactions. Behaviour has an input of its own (`behaviour.py`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmsid.annotation_coverage import Coverage, report_coverage
from mmsid.catalog import Catalog, Item
from mmsid.catalog.annotations import SENSITIVE, read_captions, read_ok_rows
from mmsid.catalog.records import ItemRecord, read_record
from mmsid.errors import CatalogError, ConfigError

FieldName = Literal["title", "caption", "interests", "categories", "attributes", "description", "pictures", "vectors"]
ALL_FIELDS: tuple[FieldName, ...] = ("title", "caption", "interests", "categories", "attributes", "description", "pictures", "vectors")


@dataclass(frozen=True)
class ItemInput:
    """One item as the tokenizer reads it.

    Attributes:
        text: may be empty.
        pictures: paths or PIL images.
        behaviour: (M + 1,) float32, behaviour vector and number of interactions (`mmsid.tokenizer.behaviour`); None reads content alone.
        vectors: vectors that the user brings, one per family; () for none.
    """

    text: str
    pictures: tuple[Any, ...] = ()
    behaviour: np.ndarray | None = field(default=None, compare=False)
    vectors: tuple[np.ndarray, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class MinedInterests:
    """The interests of one item: `source` is "llm" or "coengagement"; descriptors are sorted by confidence, highest first."""

    source: str
    descriptors: tuple[str, ...]
    summary: str


def read_caption_texts(folder: Path | None) -> dict[str, str]:
    """Item id -> caption, from a finished caption folder; rows flagged `sensitive` are left out. {} for None."""
    return {} if folder is None else read_captions(folder, without_flags=(SENSITIVE,))


def read_mined_interests(folder: Path | None) -> dict[str, MinedInterests]:
    """Item id -> interests, from a finished interests folder; rows flagged `sensitive` are left out. {} for None."""
    if folder is None:
        return {}
    found = {}
    for row in read_ok_rows(folder, "interests", ("item_id", "descriptors", "summary", "source"), (SENSITIVE,)):
        ranked = sorted(json.loads(row["descriptors"] or "[]"), key=lambda one: -float(one["confidence"]))
        found[row["item_id"]] = MinedInterests(row["source"], tuple(one["descriptor"] for one in ranked), row["summary"] or "")
    return found


@dataclass(frozen=True)
class ItemAnnotations:
    """Captions and interests of a catalogue's items.

    Attributes:
        captions, interests: by item id; rows flagged `sensitive` are left out.
        coverage: configuration key -> coverage of the catalogue, for every folder that was given.
    """

    captions: Mapping[str, str]
    interests: Mapping[str, MinedInterests]
    coverage: Mapping[str, Coverage]


def read_annotations(items: Sequence[Item], captions: Path | None, interests: Path | None) -> ItemAnnotations:
    """Read the annotation folders of a catalogue and print how many of its items they cover.

    Raises:
        ArtifactError: a folder is unfinished or damaged, or was made from another catalogue.
    """
    texts, mined = read_caption_texts(captions), read_mined_interests(interests)
    folders = {"captions": (captions, texts), "interests": (interests, mined)}
    ids = [item.item_id for item in items]
    coverage = {key: report_coverage(key, folder, ids, found) for key, (folder, found) in folders.items() if folder is not None}
    return ItemAnnotations(texts, mined, coverage)


def readable_fields(use: Sequence[FieldName] | None, interests: Mapping[str, MinedInterests]) -> tuple[FieldName, ...]:
    """The fields that the encoder reads: those in `use`, by default all that it may read, in the order of `ALL_FIELDS`.

    Raises:
        ConfigError: `use` names the interests although they were mined from behaviour.
    """
    from_behaviour = any(mined.source != "llm" for mined in interests.values())
    if use is None:
        return tuple(name for name in ALL_FIELDS if not (name == "interests" and from_behaviour))
    if "interests" in use and from_behaviour:
        raise ConfigError(
            "`use` contains `interests`, but the given interests were mined from co-engagement (behaviour) and may only be "
            "reconstructed; remove `interests` from `use`, or mine them with a language model"
        )
    return tuple(name for name in ALL_FIELDS if name in use)


def build_inputs(
    catalog: Catalog | Sequence[Item],
    captions: Mapping[str, str] | None = None,
    interests: Mapping[str, MinedInterests] | None = None,
    use: Sequence[FieldName] | None = None,
) -> list[ItemInput]:
    """One input per item, in the catalogue's order. Missing fields are left out; the text of an item may be empty.

    The text has the form `title: ... . caption: ... .`. The description is the last field, because truncation cuts the end.

    Raises:
        ConfigError: `use` names interests that were mined from co-engagement (see `readable_fields`).
    """
    captions, interests = captions or {}, interests or {}
    fields = readable_fields(use, interests)
    items = catalog.items if isinstance(catalog, Catalog) else catalog
    vectors = catalog.vectors.of_items() if isinstance(catalog, Catalog) and catalog.vectors and "vectors" in fields else None
    return [
        ItemInput(
            _text(item, captions.get(item.item_id, ""), interests.get(item.item_id), fields),
            item.images if "pictures" in fields else (),
            vectors=() if vectors is None else vectors[row],
        )
        for row, item in enumerate(items)
    ]


def load_inputs(
    catalog: Catalog, captions: Path | None, interests: Path | None, use: Sequence[FieldName] | None = None
) -> tuple[list[ItemInput], tuple[FieldName, ...]]:
    """`build_inputs` from annotation folders (`read_annotations`); returns the inputs and the fields in them."""
    return annotated_inputs(catalog, read_annotations(catalog.items, captions, interests), use)


def annotated_inputs(
    catalog: Catalog, annotations: ItemAnnotations, use: Sequence[FieldName] | None = None
) -> tuple[list[ItemInput], tuple[FieldName, ...]]:
    """`build_inputs` from annotations that were read; returns the inputs and the fields in them."""
    mined = annotations.interests
    fields = readable_fields(use, mined)
    return build_inputs(catalog, annotations.captions, mined if "interests" in fields else None, fields), fields


def record_input(item: ItemInput | Item | Mapping[str, Any], fields: Sequence[FieldName], reads_pictures: bool, place: str) -> ItemInput:
    """Input of an item given in memory (`mmsid.catalog.records`); an `ItemInput` is returned unchanged.

    Args:
        fields: fields that the encoder reads.
        reads_pictures: whether its backbone reads pictures. If not, a picture without a caption causes a warning.
        place: name of the item in messages, for example "item 3".

    Raises:
        CatalogError: as `read_record`, or the encoder reads vectors and the item has none.
        PictureError: as `read_record`.
    """
    if isinstance(item, ItemInput):
        return item
    has_picture = bool(item.images) if isinstance(item, Item) else False
    record = read_record(replace(item, images=()) if isinstance(item, Item) and not reads_pictures else item, place)
    if (has_picture or record.pictures) and not reads_pictures and not record.caption:
        remedy = "give its text under the key `caption`" if "caption" in fields else "the picture has no influence on its codes"
        warnings.warn(f"{place} has a picture, but this tokenizer does not read pictures; {remedy}", stacklevel=3)
    if "vectors" in fields and not record.vectors:
        raise CatalogError(
            f"{place} has no vectors, which this tokenizer reads; give them under the key `vectors`, a list of numbers or one list per "
            "family, or assign SIDs to a catalogue with `vectors`"
        )
    mined = MinedInterests("llm", record.interests, "") if record.interests else None
    return ItemInput(_text(record, record.caption, mined, fields), record.pictures if reads_pictures else (), vectors=record.vectors)


def attribute_text(item: Item | ItemRecord) -> str:
    """Attributes as one phrase: `material: wool, silk; season: winter`."""
    return "; ".join(f"{name}: {', '.join(labels)}" for name, labels in sorted(item.attributes.items()) if labels)


def _text(item: Item | ItemRecord, caption: str, mined: MinedInterests | None, fields: Sequence[FieldName]) -> str:
    values = {
        "title": item.title,
        "caption": caption,
        "interests": "; ".join(mined.descriptors) if mined else "",
        "categories": " > ".join(item.categories),
        "attributes": attribute_text(item),
        "description": item.description,
    }
    return " ".join(f"{name}: {values[name].strip().rstrip('.')}." for name in fields if values.get(name, "").strip())
