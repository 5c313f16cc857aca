"""Training data of the text quality: labelled (item, descriptor) examples, and preference pairs of them.

The items are split into three parts, and no pair crosses them: `fit` trains the model, `calibrate` fits the map from scores to
probabilities, `held_out` is evaluated.
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
    """A descriptor of the item at `row`. label: 1 good, 0 bad. kind: how the example was made (`right`, `vague`, ...)."""

    row: int
    descriptor: str
    label: int
    kind: str


class Pair(NamedTuple):
    """A good example (`chosen`) that is preferred to a bad one (`rejected`), usually of the same item."""

    chosen: Example
    rejected: Example

    @property
    def kind(self) -> str:
        """Kind of the bad example."""
        return self.rejected.kind


def judged_examples(items: Sequence[Item], interests: Mapping[str, ItemInterests], labels: Mapping[tuple[str, int], int]) -> list[Example]:
    """One example per judged descriptor, of kind `accepted` or `refused`.

    Args:
        interests: item_id -> its mined interests.
        labels: (item_id, position of the descriptor) -> label of the judge.
    """
    return [
        Example(row, mined.descriptor, label, "accepted" if label else "refused")
        for row, item in enumerate(items)
        if item.item_id in interests
        for position, mined in enumerate(interests[item.item_id].descriptors)
        if (label := labels.get((item.item_id, position))) is not None
    ]


def part_of(item: Item, seed: int, shares: tuple[float, float]) -> Part:
    """Part of an item, by a hash of its content. Exact duplicates get the same part; row and id have no influence.

    Args:
        shares: of `calibrate` and of `held_out`; the rest is `fit`.
    """
    digest = hashlib.sha256(f"text_quality {seed} {item.content_sha256}".encode()).digest()
    position = int.from_bytes(digest[:6], "big") / 2**48
    return "calibrate" if position < shares[0] else "held_out" if position < sum(shares) else "fit"


def preference_pairs(examples: Sequence[Example], rng: np.random.Generator) -> list[Pair]:
    """One pair per bad example, with a random good example of the same item, or of any item if this one has none.

    Empty if one of the labels does not occur.
    """
    good = [example for example in examples if example.label]
    good_of_item = defaultdict(list)
    for example in good:
        good_of_item[example.row].append(example)
    pairs = []
    for example in examples:
        if not example.label and good:
            candidates = good_of_item.get(example.row, good)
            pairs.append(Pair(candidates[rng.integers(len(candidates))], example))
    return pairs
