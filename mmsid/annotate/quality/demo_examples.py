"""Examples from the truth of the drawn catalogue: for every item what is right, vague, contradicted, or borrowed from another item.

No judge is needed where the facts behind every ad are known. `right`: an interest that follows from the facts. `contradicted`: the same
interest with one fact changed, so nearly right. `borrowed`: true of another ad, not of this one. `vague`: fits anything; the phrases of
the held-out items are others than those that were trained on.
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

# What the facts that a descriptor follows from are called, in the order of the three descriptors that every ad has.
_BEHIND = (("product",), ("color", "pattern"), ("price",))
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
_VAGUE_TRAINED = 12  # the others stand in held-out items only


def read_demo_facts(path: Path, items: Sequence[Item]) -> list[CardFacts]:
    """Facts of every item, in the order of `items`.

    Raises:
        ConfigError: the file lacks a fact or an item: it is not the truth of this catalogue.
    """
    table = read_table(path)
    names = [field.name for field in fields(CardFacts)]
    absent = [name for name in ("item_id", *names) if name not in table.column_names]
    if absent:
        raise ConfigError(f"truth: {path} has no column {absent[0]!r}; name the truth.parquet of a drawn catalogue, or use judgements")
    known = {row["item_id"]: CardFacts(**{name: row[name] for name in names}) for row in table.to_pylist()}
    missing = [item.item_id for item in items if item.item_id not in known]
    if missing:
        raise ConfigError(f"truth: {path} lacks {len(missing)} items of the catalogue (first: {missing[0]}); name its own truth.parquet")
    return [known[item.item_id] for item in items]


def true_descriptors(facts: CardFacts) -> list[str]:
    """What is right to say of an ad."""
    return [one["descriptor"] for one in interests(facts)["descriptors"]]


def demo_examples(facts: Sequence[CardFacts], rows: Sequence[int], rng: np.random.Generator, *, held_out: bool) -> list[Example]:
    """The right descriptors of every item of `rows`, and for each of them one of every wrong kind.

    Args:
        facts: of the whole catalogue.
        held_out: draw vague phrases that training never sees.
    """
    vague = _VAGUE[_VAGUE_TRAINED:] if held_out else _VAGUE[:_VAGUE_TRAINED]
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
    """The descriptor at `place` as it would be, were one fact behind it another."""
    while True:
        name = _BEHIND[place][rng.integers(len(_BEHIND[place]))]
        other = true_descriptors(replace(facts, **{name: getattr(random_facts(rng), name)}))[place]
        if other not in right:
            return other


def _borrowed(facts: Sequence[CardFacts], row: int, rows: Sequence[int], rng: np.random.Generator) -> str:
    """A descriptor of another item of the same part; of an invented ad where the others say nothing else."""
    right = true_descriptors(facts[row])
    for _ in range(20):
        theirs = true_descriptors(facts[rows[rng.integers(len(rows))]])
        descriptor = theirs[rng.integers(len(theirs))]
        if descriptor not in right:
            return descriptor
    return _contradicted(facts[row], 0, right, rng)
