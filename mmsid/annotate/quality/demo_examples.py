"""Labelled descriptors from the known facts of the demo catalogue, which need no judge.

Kinds: `right` follows from the facts of the item. `contradicted` is the same descriptor with one fact changed. `borrowed` is right for
another item only. `vague` fits any item; training and held-out items get different phrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from mmsid.annotate.quality.examples import Example
from mmsid.artifacts import read_table
from mmsid.catalog import Item
from mmsid.catalog.demo.facts import CardFacts, interests, random_facts
from mmsid.errors import ConfigError

# Facts that determine each of the three descriptors of an ad.
_FACTS_OF_DESCRIPTOR = (("product",), ("color", "pattern"), ("price",))
_VAGUE = (
    "nice things",
    "everyday use",
    "good products",
    "something for everyone",
    "quality items",
    "people who like shopping",
    "all kinds of needs",
    "useful stuff",
    "modern lifestyle",
    "a great choice",
    "trendy things",
    "great value for all",
    "popular products",
    "various occasions",
    "anyone who wants it",
    "general purposes",
)
_NUM_TRAINING_PHRASES = 12  # of _VAGUE; the others are for held-out items


def read_demo_facts(path: Path, items: Sequence[Item]) -> list[CardFacts]:
    """Facts of every item, in the order of `items`, from the truth.parquet of a demo catalogue.

    Raises:
        ConfigError: the file lacks a column or an item.
    """
    table = read_table(path)
    names = [field.name for field in fields(CardFacts)]
    absent = [name for name in ("item_id", *names) if name not in table.column_names]
    if absent:
        raise ConfigError(f"truth: {path} has no column {absent[0]!r}; give the truth.parquet of a demo catalogue, or use judgements")
    known = {row["item_id"]: CardFacts(**{name: row[name] for name in names}) for row in table.to_pylist()}
    missing = [item.item_id for item in items if item.item_id not in known]
    if missing:
        raise ConfigError(
            f"truth: {path} lacks {len(missing)} items of the catalogue (first: {missing[0]}); give the truth.parquet of this catalogue"
        )
    return [known[item.item_id] for item in items]


def true_descriptors(facts: CardFacts) -> list[str]:
    """The three descriptors that follow from the facts of an ad."""
    return [one["descriptor"] for one in interests(facts)["descriptors"]]


def demo_examples(facts: Sequence[CardFacts], rows: Sequence[int], rng: np.random.Generator, *, held_out: bool) -> list[Example]:
    """The right descriptors of every item in `rows`, and for each of them one `vague`, one `contradicted` and one `borrowed`.

    Args:
        facts: facts of all items of the catalogue.
        held_out: take the vague phrases that are not used in training.
    """
    vague = _VAGUE[_NUM_TRAINING_PHRASES:] if held_out else _VAGUE[:_NUM_TRAINING_PHRASES]
    examples = []
    for row in rows:
        right = true_descriptors(facts[row])
        for place, descriptor in enumerate(right):
            examples += [
                Example(row, descriptor, 1, "right"),
                Example(row, vague[rng.integers(len(vague))], 0, "vague"),
                Example(row, _contradicted(facts[row], place, right, rng), 0, "contradicted"),
                Example(row, _borrowed(facts, row, rows, rng), 0, "borrowed"),
            ]
    return examples


def _contradicted(facts: CardFacts, place: int, right: list[str], rng: np.random.Generator) -> str:
    """The descriptor at `place` after one of the facts that determine it is replaced by a random other value."""
    while True:
        name = _FACTS_OF_DESCRIPTOR[place][rng.integers(len(_FACTS_OF_DESCRIPTOR[place]))]
        other = true_descriptors(replace(facts, **{name: getattr(random_facts(rng), name)}))[place]
        if other not in right:
            return other


def _borrowed(facts: Sequence[CardFacts], row: int, rows: Sequence[int], rng: np.random.Generator) -> str:
    """A descriptor of another item in `rows`; a contradicted one if 20 draws find only descriptors of this item."""
    right = true_descriptors(facts[row])
    for _ in range(20):
        others = true_descriptors(facts[rows[rng.integers(len(rows))]])
        descriptor = others[rng.integers(len(others))]
        if descriptor not in right:
            return descriptor
    return _contradicted(facts[row], 0, right, rng)
