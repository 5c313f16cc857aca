"""What the text quality is learned from: labelled (item, descriptor) examples, and preference pairs made of them.

Pairs never cross the parts of the catalogue: `fit` trains, `calibrate` turns scores into probabilities, `held_out` is reported.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mmsid.annotate.readers import ItemInterests
from mmsid.catalog import Item

Part = Literal["fit", "calibrate", "held_out"]
PARTS: tuple[Part, ...] = ("fit", "calibrate", "held_out")


class Example(NamedTuple):
    """A descriptor put to the item at `row`; label 1 = good. `kind` says what sort of example it is (`right`, `vague`, ...)."""

    row: int
    descriptor: str
    label: int
    kind: str


class Pair(NamedTuple):
    """A comparison: a good example preferred to a bad one, usually of the same item. `kind` is that of the bad one."""

    chosen: Example
    rejected: Example

    @property
    def kind(self) -> str:
        return self.rejected.kind


def judged_examples(items: Sequence[Item], interests: Mapping[str, ItemInterests], labels: Mapping[tuple[str, int], int]) -> list[Example]:
    """One example per judged descriptor of a finished `judge` folder; kinds `accepted` and `refused`."""
    return [
        Example(row, one.descriptor, label, "accepted" if label else "refused")
        for row, item in enumerate(items)
        if item.item_id in interests
        for at, one in enumerate(interests[item.item_id].descriptors)
        if (label := labels.get((item.item_id, at))) is not None
    ]


def part_of(item: Item, seed: int, shares: tuple[float, float]) -> Part:
    """Which part an item belongs to, by its content: exact duplicates stay together, rows and ids do not matter.

    Args:
        shares: of `calibrate` and of `held_out`; the rest is `fit`.
    """
    digest = hashlib.sha256(f"text_quality {seed} {item.content_sha256}".encode()).digest()
    place = int.from_bytes(digest[:6], "big") / 2**48
    return "calibrate" if place < shares[0] else "held_out" if place < sum(shares) else "fit"


def preference_pairs(examples: Sequence[Example], rng: np.random.Generator) -> list[Pair]:
    """Every bad example against one good one: of the same item where it has any, else of another item, drawn by `rng`.

    An item whose examples are all good gives its good ones to the pool of the others. Empty where one label is missing altogether.
    """
    good = [example for example in examples if example.label]
    own = defaultdict(list)
    for example in good:
        own[example.row].append(example)
    pairs = []
    for example in examples:
        if not example.label and good:
            among = own.get(example.row, good)
            pairs.append(Pair(among[rng.integers(len(among))], example))
    return pairs
