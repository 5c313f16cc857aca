"""What the tokenizer reads of an item: one text of labelled fields, and its pictures.

Interests mined without a language model (`coengagement`) restate behaviour. They may be reconstructed; they are never read,
else the tokenizer would look at the labels it is to predict, and could not encode an item nobody has touched yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmsid.artifacts import read_manifest, read_table, verify_folder
from mmsid.catalog import Catalog, Item
from mmsid.errors import ArtifactError, ConfigError

FieldName = Literal["title", "caption", "interests", "categories", "attributes", "description", "pictures"]
ALL_FIELDS: tuple[FieldName, ...] = ("title", "caption", "interests", "categories", "attributes", "description", "pictures")
SENSITIVE = "sensitive"  # the flag that annotation puts on texts about health, faith and the like


@dataclass(frozen=True)
class ItemInput:
    """One item as the backbone reads it: `text` may be empty, `pictures` are paths (or PIL images)."""

    text: str
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class MinedInterests:
    """The interests of one item: `source` is "llm" or "coengagement"; descriptors come strongest first."""

    source: str
    descriptors: tuple[str, ...]
    summary: str


def read_caption_texts(folder: Path | None) -> dict[str, str]:
    """Captions of a finished caption folder by item id, status ok only; several creatives are joined by " ; ". {} for None."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for row in _ok_rows(folder, "caption", ["item_id", "creative", "caption"]):
        texts.setdefault(row["item_id"], []).append((row["creative"] or 0, row["caption"]))
    return {item_id: " ; ".join(dict.fromkeys(text for _, text in sorted(parts))) for item_id, parts in texts.items()}


def read_mined_interests(folder: Path | None) -> dict[str, MinedInterests]:
    """Interests of a finished interests folder by item id, status ok only. {} for None."""
    found = {}
    for row in _ok_rows(folder, "interests", ["item_id", "descriptors", "summary", "source"]):
        ranked = sorted(json.loads(row["descriptors"] or "[]"), key=lambda one: -float(one["confidence"]))
        found[row["item_id"]] = MinedInterests(row["source"], tuple(one["descriptor"] for one in ranked), row["summary"] or "")
    return found


def _ok_rows(folder: Path | None, stage: str, columns: Sequence[str]) -> Iterator[dict]:
    """Rows of status ok. Those flagged `sensitive` are left out: such words must not shape a Semantic ID."""
    if folder is None:
        return
    read_manifest(folder, stage)
    verify_folder(folder)
    for path in sorted((Path(folder) / "shards").glob("part-*.parquet")):
        table = read_table(path)
        absent = [name for name in (*columns, "status", "flags") if name not in table.column_names]
        if absent:
            raise ArtifactError(f"{path}: column {absent[0]!r} is missing (found {table.column_names}); run the stage {stage} again")
        for row in table.select([*columns, "status", "flags"]).to_pylist():
            if row["status"] == "ok" and SENSITIVE not in (row["flags"] or ()):
                yield row


def readable_fields(use: Sequence[FieldName] | None, interests: Mapping[str, MinedInterests]) -> tuple[FieldName, ...]:
    """The fields that the encoder will read: `use`, or by default all that it may read.

    Raises:
        ConfigError: `use` names the interests although they were mined from behaviour.
    """
    behavioural = any(mined.source != "llm" for mined in interests.values())
    if use is None:
        return tuple(name for name in ALL_FIELDS if not (name == "interests" and behavioural))
    if "interests" in use and behavioural:
        raise ConfigError(
            "the tokenizer is told to read `interests`, but these were mined from co-engagement (behaviour), which may only be "
            "reconstructed; take `interests` out of `use`, or mine them with a language model"
        )
    return tuple(name for name in ALL_FIELDS if name in use)


def build_inputs(
    catalog: Catalog | Sequence[Item],
    captions: Mapping[str, str] | None = None,
    interests: Mapping[str, MinedInterests] | None = None,
    use: Sequence[FieldName] | None = None,
) -> list[ItemInput]:
    """One input per item, in the catalogue's order. A missing field is left out; an item may end up with an empty text.

    The text is `title: ... . caption: ... .` and so on; the description stands last, because it is what truncation may cost.

    Raises:
        ConfigError: interests mined from co-engagement are to be read (see `readable_fields`).
    """
    captions, interests = captions or {}, interests or {}
    fields = readable_fields(use, interests)
    items = catalog.items if isinstance(catalog, Catalog) else catalog
    return [
        ItemInput(
            _text(item, captions.get(item.item_id, ""), interests.get(item.item_id), fields), item.images if "pictures" in fields else ()
        )
        for item in items
    ]


def load_inputs(
    catalog: Catalog, captions: Path | None, interests: Path | None, use: Sequence[FieldName] | None = None
) -> tuple[list[ItemInput], tuple[FieldName, ...]]:
    """`build_inputs` from annotation folders; also the fields that were read in the end."""
    mined = read_mined_interests(interests)
    fields = readable_fields(use, mined)
    return build_inputs(catalog, read_caption_texts(captions), mined if "interests" in fields else None, fields), fields


def attribute_text(item: Item) -> str:
    """Attributes as one phrase: `material: wool, silk; season: winter`."""
    return "; ".join(f"{name}: {', '.join(labels)}" for name, labels in sorted(item.attributes.items()) if labels)


def _text(item: Item, caption: str, mined: MinedInterests | None, fields: Sequence[FieldName]) -> str:
    values = {
        "title": item.title,
        "caption": caption,
        "interests": "; ".join(mined.descriptors) if mined else "",
        "categories": " > ".join(item.categories),
        "attributes": attribute_text(item),
        "description": item.description,
    }
    return " ".join(f"{name}: {values[name].strip().rstrip('.')}." for name in fields if values.get(name, "").strip())
