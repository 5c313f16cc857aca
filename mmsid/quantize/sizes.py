"""Proposal of codebook size K and number of levels L for N items, with the figures that speak for and against it.

A SID is a path of L codes, so there are C = K^L paths. The load is N / C. If every item drew its path uniformly at random, an item
would share its path with another one with probability 1 - (1 - 1/C)^(N - 1); N times this is the expected number of colliding items
before collision handling. Real codes are less even than uniform ones and collide more. The proposal is the smallest power of two K
with C >= 10 N at three levels, and four levels where three would need more than 1,024 codes per level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPARE = 10  # paths per item
FORMULA = "N (1 - (1 - 1/C)^(N - 1)), C = K^L"
_LEVELS, _MOST_LEVELS, _MOST_CODES = 3, 8, 1024


@dataclass(frozen=True)
class Sizes:
    """One choice of codebook size K and number of levels L for `num_items` items."""

    codebook_size: int
    num_levels: int
    num_items: int

    @property
    def capacity(self) -> int:
        """C = K^L, the number of SIDs."""
        return self.codebook_size**self.num_levels

    @property
    def load(self) -> float:
        """Items per path, N / C."""
        return self.num_items / self.capacity

    @property
    def expected_collisions(self) -> float:
        """Expected items that share their path with another one before collision handling, if codes were uniform."""
        if self.capacity == 1:
            return float(self.num_items if self.num_items > 1 else 0)
        return float(-self.num_items * np.expm1((self.num_items - 1) * np.log1p(-1 / self.capacity)))


def propose(num_items: int, codebook_size: int | None = None, num_levels: int | None = None) -> Sizes:
    """Choose what is not given so that there are at least ten paths per item; what is given stays.

    Raises:
        ValueError: no items, or a codebook size below 2 without a number of levels.
    """
    if num_items < 1:
        raise ValueError(f"num_items is {num_items}, expected at least 1")
    if codebook_size is not None and num_levels is not None:
        return Sizes(codebook_size, num_levels, num_items)
    if codebook_size is not None:
        if codebook_size < 2:
            raise ValueError(f"codebook_size is {codebook_size}, expected at least 2")
        enough = (levels for levels in range(1, _MOST_LEVELS) if codebook_size**levels >= SPARE * num_items)
        return Sizes(codebook_size, next(enough, _MOST_LEVELS), num_items)
    if num_levels is not None:
        return Sizes(_codes_for(num_items, num_levels), num_levels, num_items)
    levels = _LEVELS
    while levels < _MOST_LEVELS and _codes_for(num_items, levels) > _MOST_CODES:
        levels += 1
    return Sizes(_codes_for(num_items, levels), levels, num_items)


def alternatives(chosen: Sizes) -> list[tuple[str, Sizes]]:
    """The choice and up to four others that can hold the items, each with a name: half or twice the codes, a level less or more."""
    items, size, levels = chosen.num_items, chosen.codebook_size, chosen.num_levels
    found = [("chosen", chosen)]
    if size >= 4:
        found.append(("half the codes", Sizes(size // 2, levels, items)))
    found.append(("twice the codes", Sizes(2 * size, levels, items)))
    if levels > 1:
        found.append(("one level less", Sizes(_codes_for(items, levels - 1), levels - 1, items)))
    if levels < _MOST_LEVELS:
        found.append(("one level more", Sizes(_codes_for(items, levels + 1), levels + 1, items)))
    return [(name, sizes) for name, sizes in found if sizes.capacity >= items or sizes is chosen]


def sizes_table(chosen: Sizes) -> str:
    """Markdown table of the choice and its alternatives."""
    lines = [
        "| | K | L | paths K^L | items per path | expected to collide | share | tokens in the vocabulary |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in alternatives(chosen):
        colliding = sizes.expected_collisions
        lines.append(
            f"| {name} | {sizes.codebook_size:,} | {sizes.num_levels} | {sizes.capacity:,} | {sizes.load:.3g} | {colliding:,.0f} | "
            f"{100 * colliding / sizes.num_items:.2g} % | {sizes.codebook_size * sizes.num_levels:,} |"
        )
    return "\n".join(lines) + "\n"


def reason(chosen: Sizes, codebook_size: int | None, num_levels: int | None) -> str:
    """Where K and L come from, in words. `codebook_size`, `num_levels`: as given, None for what was proposed."""
    sizes = f"K = {chosen.codebook_size:,} codes at L = {chosen.num_levels} levels for {chosen.num_items:,} items"
    paths = f"{chosen.capacity:,} paths, {chosen.load:.3g} items per path"
    if codebook_size is not None and num_levels is not None:
        return f"Given: {sizes}. That is {paths}."
    if codebook_size is not None:
        rule = f"L is the fewest levels of {codebook_size:,} codes"
    elif num_levels is not None:
        rule = "K is the smallest power of two"
    elif chosen.num_levels > _LEVELS:
        rule = f"{chosen.num_levels - 1} levels would need more than {_MOST_CODES:,} codes each; K is the smallest power of two"
    else:
        rule = "Three levels keep SIDs short; K is the smallest power of two"
    return f"Proposed: {sizes}. That is {paths}. {rule} with at least {SPARE} paths per item, so that few items collide."


def _codes_for(num_items: int, num_levels: int) -> int:
    """Smallest power of two K with K^num_levels >= 10 N."""
    size = 2
    while size**num_levels < SPARE * num_items:
        size *= 2
    return size
