"""Reward components of a candidate code sequence, computed from each item's neighbours and from the codes of all other items.

Every component is a difference term: the item itself is removed from the table first, so that two colliding items see each other but not
themselves. Neighbours come from the histories of the fit users: co-engagement, and items alike by behaviour vectors (or by the user's own),
see `smoothed_co_engagement`; `sid_reward` reads and predicts co-engagement alone. The held-out users are reserved for the acceptance gate.
`CodeTable.components` lists the components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmsid.config import Section

T = TypeVar("T")
Codes = NDArray[np.int64]
Floats = NDArray[np.float64]
MAX_PATHS = 1_000_000  # paths scored at once; bounds memory use, changes no result


class EvidenceConfig(Section):
    """Weights of the levels and shrinkage of the co-engagement evidence.

    Attributes:
        level_weights: weights of prefix agreement by prefix length; longer prefixes have weight 0.
        code_weights: weights of code agreement at the second, third, ... level.
        prior: co-engagement weight at which an item's excess share counts half.
        window: largest distance of two interactions in a history that counts as co-engagement.
    """

    level_weights: tuple[float, ...] = (0.6, 0.4)
    code_weights: tuple[float, ...] = (0.7, 0.3)
    prior: float = 1.0
    window: int = 3


def split_users(users: Sequence[T], shares: Sequence[float], seed: int) -> list[list[T]]:
    """Split users at random into disjoint groups with the given shares, which sum to 1. The order within a group is kept.

    Args:
        users: one element per user, for example its history or its number.
    """
    order = np.random.default_rng(seed).permutation(len(users))
    cuts = np.round(np.cumsum(shares)[:-1] * len(users)).astype(int)
    return [[users[user] for user in np.sort(part)] for part in np.split(order, cuts)]


def prefix_keys(codes: Codes, codebook_size: int) -> Codes:
    """Integer keys of all prefixes: codes (..., L) -> keys (..., L); key l identifies the first l+1 codes.

    Raises ValueError when the keys do not fit into 64 bits.
    """
    levels = codes.shape[-1]
    if levels * np.log2(codebook_size) >= 62:
        raise ValueError(f"{codebook_size}^{levels} prefixes do not fit 64 bits")
    keys = np.empty(codes.shape, dtype=np.int64)
    running = np.zeros(codes.shape[:-1], dtype=np.int64)
    for level in range(levels):
        running = running * codebook_size + codes[..., level]
        keys[..., level] = running
    return keys


@dataclass
class _Level:
    """Groups of items that share a prefix (or a code), in ascending order of key, with their sizes and co-engagement weights."""

    keys: Codes  # (U,)
    inverse: Codes  # (N,) group index of each item
    items: Floats  # (U,) number of items in the group, exact duplicates counted once
    weight: Floats  # (U,) co-engagement weight of the items in the group


class CodeTable:
    """Index of the current codes of all items that scores candidate codes of one item against the other items.

    Args:
        codes: (N, L) current codes.
        codebook_size: K.
        neighbours: (N, N) symmetric co-engagement weights.
        content: (N,) equal numbers for exact duplicates, which may share codes and do not crowd each other; None: all items differ.
        prior: see `EvidenceConfig`.
    """

    def __init__(
        self, codes: Codes, codebook_size: int, neighbours: sparse.spmatrix, content: NDArray | None = None, prior: float = 1.0
    ) -> None:
        self.codes, self.codebook_size, self.prior = np.asarray(codes, dtype=np.int64), codebook_size, prior
        self.keys = prefix_keys(self.codes, codebook_size)
        self.edges = sparse.csr_matrix(neighbours, dtype=np.float64)
        if self.edges.diagonal().any():
            self.edges = self.edges.copy()
            self.edges.setdiag(0)
            self.edges.eliminate_zeros()
        self.degree = np.asarray(self.edges.sum(axis=1)).ravel()
        if content is None:
            share = np.ones(len(self.codes))
        else:
            _, which, sizes = np.unique(content, return_inverse=True, return_counts=True)
            share = 1.0 / sizes[which]
        self.levels = [self._level(self.keys[:, level], share) for level in range(self.codes.shape[1])]
        self._kept_totals: dict[int, tuple[NDArray, NDArray, NDArray]] = {}
        self.single = [self._level(self.codes[:, level], share) for level in range(1, self.codes.shape[1])]

    def _level(self, keys: Codes, share: Floats) -> _Level:
        unique, inverse = np.unique(keys, return_inverse=True)
        size = len(unique)
        items, weight = (np.bincount(inverse, weights=of, minlength=size) for of in (share, self.degree))
        return _Level(keys=unique, inverse=inverse, items=items, weight=weight)

    def others(self, rows: NDArray, candidates: Codes) -> Floats:
        """Number of other items under each prefix of candidates (R, P, L) of `rows` (R,), without the item's duplicates. -> (R, P, L)."""
        keys = prefix_keys(candidates, self.codebook_size)
        counts = np.zeros(keys.shape)
        for level, table in enumerate(self.levels):
            number, found = _look_up(table.keys, keys[..., level])
            own = keys[..., level] == self.keys[rows, level][:, None]
            counts[..., level] = np.where(found, table.items[number], 0.0) - own
        return np.maximum(counts, 0.0)

    def agreement(self, rows: NDArray, candidates: Codes) -> tuple[Floats, Floats]:
        """Share of an item's neighbour weight under each prefix minus the chance share, and the chance share.

        The chance share is the prefix's part of all co-engagement weight of the other items. Without it, large groups would win (a single
        code for all items would score 1). The excess is shrunk towards 0 by `prior`; an item without neighbours scores 0.

        Args:
            rows: (R,) items.
            candidates: (R, P, L) codes.

        Returns:
            Excess and chance, (R, P, L) each.
        """
        return self._agreement(self.levels, self.keys, rows, prefix_keys(candidates, self.codebook_size))

    def code_agreement(self, rows: NDArray, candidates: Codes, prefixes: Floats | None = None) -> Floats:
        """Share of an item's neighbour weight that holds the code of a level under another prefix, minus chance.

        Neighbours under the same prefix are counted by `agreement`, and neighbours with the same whole path must not be rewarded.

        Args:
            rows: (R,) items.
            candidates: (R, P, L) codes.
            prefixes: excess of `agreement` for the same arguments, where it is known.

        Returns:
            (R, P, L - 1), for the second level to the last.
        """
        if prefixes is None:
            prefixes, _ = self.agreement(rows, candidates)
        single = [self.holding(rows, candidates[..., level], level) for level in range(1, candidates.shape[-1])]
        return np.stack(single, axis=-1) - prefixes[..., 1:] if single else prefixes[..., 1:]

    def holding(self, rows: NDArray, codes: Codes, level: int) -> Floats:
        """Share of the neighbour weight that holds codes (R, P) of a level (0-based, > 0) under any prefix, minus chance. -> (R, P)."""
        return self._agreement([self.single[level - 1]], self.codes[:, [level]], rows, codes[..., None])[0][..., 0]

    def _agreement(self, levels: Sequence[_Level], current: Codes, rows: NDArray, keys: Codes) -> tuple[Floats, Floats]:
        """Excess and chance of the groups `keys` (R, P, M); `current` (N, M) are the groups that each item is in."""
        excess, chance = np.zeros(keys.shape), np.zeros(keys.shape)
        degree, place = self.degree[rows][:, None], np.arange(len(rows))[:, None]
        rest = np.maximum(self.degree.sum() - degree, 1e-12)
        near = self.edges[rows].tocoo()
        for level, table in enumerate(levels):
            number, found = _look_up(table.keys, keys[..., level])
            own = keys[..., level] == current[rows, level][:, None]
            weight = np.where(found, table.weight[number], 0.0) - np.where(own, degree, 0.0)
            # weight of the neighbours of each row in each group that holds one of them
            groups, of = np.unique(near.row.astype(np.int64) * len(table.keys) + table.inverse[near.col], return_inverse=True)
            held = np.bincount(of, weights=near.data, minlength=len(groups))
            pair, paired = _look_up(groups, place * len(table.keys) + number)
            under = np.where(found & paired, held[pair] if len(held) else 0.0, 0.0)
            chance[..., level] = np.maximum(weight, 0.0) / rest
            excess[..., level] = (under - degree * chance[..., level]) / (degree + self.prior)
        return excess, chance

    def components(self, rows: NDArray, candidates: Codes, config: EvidenceConfig) -> dict[str, Floats]:
        """Reward components of candidates (R, P, L) of `rows` (R,), each (R, P), higher is better.

        - neighbours: prefix agreement beyond chance, weighted over levels (`agreement`).
        - codes: code agreement beyond chance under other prefixes (`code_agreement`). A recommender reads each level with one vocabulary,
          so a code that the item's neighbours hold is easier to predict under any prefix.
        - crowding: minus 1 if another item holds the whole path, minus the filled share of the last-level group.
        - balance: minus the log of each code's use relative to a uniform share, in nats, summed over levels; without it the levels drift
          to a few codes.
        """
        levels = candidates.shape[-1]
        excess, _ = self.agreement(rows, candidates)
        others = self.others(rows, candidates)
        fullness = others[..., -2] / self.codebook_size if levels > 1 else 0.0
        return {
            "neighbours": _weighted_sum(excess, config.level_weights),
            "codes": _weighted_sum(self.code_agreement(rows, candidates, excess), config.code_weights),
            "crowding": -(np.minimum(others[..., -1], 1.0) + np.minimum(fullness, 1.0)),
            "balance": self._balance(rows, candidates),
        }

    def neighbours(self, rows: NDArray, candidates: Codes, config: EvidenceConfig) -> Floats:
        """The component `neighbours` alone, (R, P). It labels the preference pairs of `sid_reward`."""
        return _weighted_sum(self.agreement(rows, candidates)[0], config.level_weights)

    def _balance(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, P, L) -> (R, P): minus log of (other items with the code + this item) / (items / K), summed over levels."""
        total = np.zeros(candidates.shape[:-1])
        for level in range(candidates.shape[-1]):
            used = np.bincount(self.codes[:, level], minlength=self.codebook_size)
            own = candidates[..., level] == self.codes[rows, level][:, None]
            total -= np.log((used[candidates[..., level]] - own + 1.0) * self.codebook_size / len(self.codes))
        return total

    def _totals(self, vectors: NDArray, level: int) -> tuple[NDArray, NDArray]:
        """Sums of the vectors (N, D) in every group of a level, (U, D), and the groups' numbers of items; kept for further calls."""
        kept = self._kept_totals.get(level)
        if kept is None or kept[0] is not vectors:
            table, items = self.levels[level], np.arange(len(vectors))
            members = sparse.csr_matrix((np.ones(len(items), vectors.dtype), (table.inverse, items)), (len(table.keys), len(items)))
            kept = self._kept_totals[level] = (vectors, members @ vectors, np.bincount(table.inverse, minlength=len(table.keys)))
        return kept[1], kept[2]

    def share_under(self, items: NDArray, weights: Floats, candidates: Codes) -> Floats:
        """Share of the weights (R, k) of `items` (R, k) under each prefix of candidates (R, P, L). -> (R, P, L)."""
        keys, held = prefix_keys(candidates, self.codebook_size), self.keys[items]
        shares = [((held[:, None, :, level] == keys[:, :, None, level]) * weights[:, None]).sum(-1) for level in range(keys.shape[-1])]
        return np.stack(shares, axis=-1)

    def mean_under(self, vectors: NDArray, rows: NDArray, candidates: Codes, level: int) -> tuple[NDArray, NDArray]:
        """Mean vector (R, P, D) of the other items under each candidate's prefix up to `level` (0-based), and their number (R, P).

        The mean of an empty prefix is 0.
        """
        table = self.levels[level]
        totals, sizes = self._totals(vectors, level)
        keys = prefix_keys(candidates[..., : level + 1], self.codebook_size)[..., -1]
        number, found = _look_up(table.keys, keys)
        own = keys == self.keys[rows, level][:, None]
        total = np.where(found[..., None], totals[number], 0) - np.where(own[..., None], vectors[rows][:, None], 0)
        size = np.where(found, sizes[number], 0) - own
        return total / np.maximum(size, 1)[..., None], size


class NeighboursCodes:
    """Proposes codes of an item: after a prefix, those that hold most of its neighbours beyond chance.

    Prefix agreement and code agreement are weighted as in the evidence.

    Args:
        codes, codebook_size, neighbours, content: see `CodeTable`.
        config: weights.
    """

    def __init__(
        self, codes: Codes, codebook_size: int, neighbours: sparse.spmatrix, content: NDArray | None, config: EvidenceConfig
    ) -> None:
        self.codebook_size, levels = codebook_size, codes.shape[1]
        self.tables = [CodeTable(codes[:, : level + 1], codebook_size, neighbours, content) for level in range(levels)]
        self.prefix_weight = (*config.level_weights, *[0.0] * levels)[:levels]
        self.code_weight = (0.0, *config.code_weights, *[0.0] * levels)[:levels]

    def after(self, rows: NDArray, prefixes: Codes, count: int) -> Codes:
        """Codes (R, M, count) to follow prefixes (R, M, l) of `rows` (R,), best first; -1 where fewer codes exceed chance."""
        if len(rows) > 1 and prefixes.shape[0] * prefixes.shape[1] * self.codebook_size > MAX_PATHS:
            halves = (slice(None, len(rows) // 2), slice(len(rows) // 2, None))
            return np.concatenate([self.after(rows[half], prefixes[half], count) for half in halves])
        level, every = prefixes.shape[-1], np.arange(self.codebook_size)
        size, table = (*prefixes.shape[:2], self.codebook_size), self.tables[level]
        score = np.zeros(size)
        if self.prefix_weight[level]:
            paths = np.concatenate([np.broadcast_to(prefixes[:, :, None], (*size, level)), np.broadcast_to(every[:, None], (*size, 1))], -1)
            excess = table.agreement(rows, paths.reshape(len(rows), -1, level + 1))[0][..., level].reshape(size)
            score += self.prefix_weight[level] * excess
        if self.code_weight[level]:
            held = table.holding(rows, np.broadcast_to(every, (len(rows), len(every))), level)
            score += self.code_weight[level] * held[:, None]
        best = np.full((*score.shape[:2], count), -1)
        for place in range(count):  # argmax takes the lowest code among ties; a sort of all codes would cost more
            code = score.argmax(-1, keepdims=True)
            best[..., place] = np.where(np.take_along_axis(score, code, -1) > 0, code, -1)[..., 0]
            np.put_along_axis(score, code, -np.inf, -1)
        return best


def _weighted_sum(excess: Floats, weights: Sequence[float]) -> Floats:
    """Weighted sum over the last axis (..., M) -> (...); levels without a weight count 0."""
    levels = excess.shape[-1]
    return excess @ np.array((*weights, *[0.0] * levels)[:levels])


def _look_up(sorted_keys: Codes, keys: Codes) -> tuple[Codes, NDArray[np.bool_]]:
    """Position of each key among the sorted ones (0 where it is missing), and whether it is present."""
    if len(sorted_keys) == 0:
        return np.zeros(keys.shape, dtype=np.int64), np.zeros(keys.shape, dtype=bool)
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found = sorted_keys[position] == keys
    return np.where(found, position, 0), found
