"""What the behaviour of users says about a candidate code sequence of one item, scored against everybody else's codes.

All components are *difference* terms: the item is taken out of the table before it is judged, so that two colliding items see
each other but never themselves. Interactions come from the histories that the caller passes: fit users only; the held-out tenth
belongs to the gate.

* neighbours: share of an item's co-engagement weight that lies under the candidate's prefix, minus the share that chance would put there
  (the prefix's part of all co-engagement weight), per level. Without the chance term fat clusters win (one code for all scores 1).
* codes: the same for the codes below the first by themselves, under other prefixes than the item's. A recommender reads every level with
  one vocabulary: an item whose second code is that of the items engaged with beside it is easier to predict under any first code.
* crowding: another item already holds the whole path, plus how full the last-level group is.
* balance: how much fuller than a fair share of the items each code already is, in nats: what moving the item there does to the entropy of
  the codes' use. Shares of neighbours grow with the groups, so without it the levels drift to a few codes.
* rebuild: growth of the quantisation error against the item's own best path (handed in by the caller, who knows the code vectors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from mmsid.config import Section

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]
LOOKED_UP = 1_000_000  # paths at once; bounds memory, changes no figure


class EvidenceConfig(Section):
    """How the levels are weighed, and how little evidence counts for nothing."""

    level_weights: tuple[float, ...] = (0.6, 0.4)  # of prefixes, by length; deeper levels weigh nothing
    code_weights: tuple[float, ...] = (0.5, 0.5)  # of the codes of the second, third, ... level by themselves
    prior: float = 1.0  # co-engagement weight that an item must have before its share counts half
    window: int = 3
    behaviour_dim: int = Field(64, ge=1)  # of the factorised co-engagement that `consensus` reads beside the content


def split_users(histories: Sequence[NDArray], shares: Sequence[float], seed: int) -> list[list[NDArray]]:
    """Disjoint groups of users with the given shares (adding up to 1), drawn by seed. Order inside a group is kept."""
    order = np.random.default_rng(seed).permutation(len(histories))
    cuts = np.round(np.cumsum(shares)[:-1] * len(histories)).astype(int)
    return [[histories[user] for user in np.sort(part)] for part in np.split(order, cuts)]


def prefix_keys(codes: Codes, codebook_size: int) -> Codes:
    """Number every prefix: (..., L) codes -> (..., L) keys, key l naming the first l+1 codes.

    Raises ValueError if 64 bits do not suffice.
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
    """One level of a table: its prefixes in ascending order of key, and what lies under each."""

    keys: Codes  # (U,)
    inverse: Codes  # (N,) prefix number of each item
    items: Floats  # (U,) items under the prefix, exact duplicates counted once
    weight: Floats  # (U,) co-engagement weight of the items under the prefix
    pair_keys: Codes  # (E,) row * U + prefix number, ascending: who has neighbours where
    pair_weight: Floats  # (E,)


class CodeTable:
    """Everybody's current codes, ready to answer what would happen if one item took another path.

    Args:
        codes: (N, L) current codes.
        codebook_size: K.
        neighbours: (N, N) symmetric co-engagement weights.
        content: (N,) equal numbers for exact duplicates (they may share codes and never crowd each other); None = all different.
        prior: see EvidenceConfig.
    """

    def __init__(
        self, codes: Codes, codebook_size: int, neighbours: sparse.spmatrix, content: NDArray | None = None, prior: float = 1.0
    ) -> None:
        self.codes, self.codebook_size, self.prior = np.asarray(codes, dtype=np.int64), codebook_size, prior
        self.keys = prefix_keys(self.codes, codebook_size)
        edges = sparse.csr_matrix(neighbours, dtype=np.float64)
        edges.setdiag(0)
        edges.eliminate_zeros()
        self.degree = np.asarray(edges.sum(axis=1)).ravel()
        edges = edges.tocoo()
        if content is None:
            share = np.ones(len(self.codes))
        else:
            _, which, sizes = np.unique(content, return_inverse=True, return_counts=True)
            share = 1.0 / sizes[which]
        self.levels = [self._level(self.keys[:, level], share, edges) for level in range(self.codes.shape[1])]
        self.single = [self._level(self.codes[:, level], share, edges) for level in range(1, self.codes.shape[1])]

    def _level(self, keys: Codes, share: Floats, edges: sparse.coo_matrix) -> _Level:
        unique, inverse = np.unique(keys, return_inverse=True)
        size = len(unique)
        pair_keys, where = np.unique(edges.row.astype(np.int64) * size + inverse[edges.col], return_inverse=True)
        return _Level(
            keys=unique,
            inverse=inverse,
            items=np.bincount(inverse, weights=share, minlength=size),
            weight=np.bincount(inverse, weights=self.degree, minlength=size),
            pair_keys=pair_keys,
            pair_weight=np.bincount(where, weights=edges.data, minlength=len(pair_keys)),
        )

    def others(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, P, L) -> (R, P, L): other items (duplicates of the item itself left out) under each prefix of each candidate."""
        keys = prefix_keys(candidates, self.codebook_size)
        counts = np.zeros(keys.shape)
        for level, table in enumerate(self.levels):
            number, found = _look_up(table.keys, keys[..., level])
            own = keys[..., level] == self.keys[rows, level][:, None]
            counts[..., level] = np.where(found, table.items[number], 0.0) - own
        return np.maximum(counts, 0.0)

    def agreement(self, rows: NDArray, candidates: Codes) -> tuple[Floats, Floats]:
        """(R,), (R, P, L) -> share of the row's neighbour weight under each prefix minus chance, and that chance; both (R, P, L).

        The share is shrunk towards chance by `prior`; a row without neighbours scores 0 everywhere.
        """
        return self._agreement(self.levels, self.keys, rows, prefix_keys(candidates, self.codebook_size))

    def code_agreement(self, rows: NDArray, candidates: Codes, prefixes: Floats | None = None) -> Floats:
        """As `agreement`, of the codes of the second level and below by themselves: share of the neighbour weight that holds the code under
        *another* prefix, minus chance; (R, P, L - 1). Neighbours under the same prefix are `agreement`'s (handed in as `prefixes`
        by who has asked already), and those with the same whole path must not be paid for."""
        if prefixes is None:
            prefixes, _ = self.agreement(rows, candidates)
        single = [self.holding(rows, candidates[..., level], level) for level in range(1, candidates.shape[-1])]
        return np.stack(single, axis=-1) - prefixes[..., 1:] if single else prefixes[..., 1:]

    def holding(self, rows: NDArray, codes: Codes, level: int) -> Floats:
        """(R,), codes (R, P) of one level (0-based, not the first) -> (R, P): share of the neighbour weight that holds the code, whatever
        stands before it, minus chance."""
        return self._agreement([self.single[level - 1]], self.codes[:, [level]], rows, codes[..., None])[0][..., 0]

    def _agreement(self, levels: Sequence[_Level], current: Codes, rows: NDArray, keys: Codes) -> tuple[Floats, Floats]:
        """For groups named by `keys` (R, P, M), of which every item holds `current` (N, M)."""
        excess, chance = np.zeros(keys.shape), np.zeros(keys.shape)
        degree = self.degree[rows][:, None]
        rest = np.maximum(self.degree.sum() - degree, 1e-12)
        for level, table in enumerate(levels):
            number, found = _look_up(table.keys, keys[..., level])
            own = keys[..., level] == current[rows, level][:, None]
            weight = np.where(found, table.weight[number], 0.0) - np.where(own, degree, 0.0)
            pair, paired = _look_up(table.pair_keys, rows[:, None].astype(np.int64) * len(table.keys) + number)
            under = np.where(found & paired, table.pair_weight[pair] if len(table.pair_weight) else 0.0, 0.0)
            chance[..., level] = np.maximum(weight, 0.0) / rest
            excess[..., level] = (under - degree * chance[..., level]) / (degree + self.prior)
        return excess, chance

    def components(self, rows: NDArray, candidates: Codes, error_growth: Floats, config: EvidenceConfig) -> dict[str, Floats]:
        """The components, each (R, P), higher is better. `error_growth` (R, P): relative growth of the quantisation error."""
        levels = candidates.shape[-1]
        excess, _ = self.agreement(rows, candidates)
        others = self.others(rows, candidates)
        fullness = others[..., -2] / self.codebook_size if levels > 1 else 0.0
        return {
            "neighbours": _weighed(excess, config.level_weights),
            "codes": _weighed(self.code_agreement(rows, candidates, excess), config.code_weights),
            "crowding": -(np.minimum(others[..., -1], 1.0) + np.minimum(fullness, 1.0)),
            "balance": self._balance(rows, candidates),
            "reconstruction": -error_growth,
        }

    def neighbours(self, rows: NDArray, candidates: Codes, config: EvidenceConfig) -> Floats:
        """The component `neighbours` alone, (R, P): what labels the pairs that `sid_reward` is fitted on."""
        return _weighed(self.agreement(rows, candidates)[0], config.level_weights)

    def _balance(self, rows: NDArray, candidates: Codes) -> Floats:
        """(R,), (R, P, L) -> (R, P): minus the log of (others with the code, and this item, over a fair share), summed over levels."""
        total = np.zeros(candidates.shape[:-1])
        for level in range(candidates.shape[-1]):
            used = np.bincount(self.codes[:, level], minlength=self.codebook_size)
            own = candidates[..., level] == self.codes[rows, level][:, None]
            total -= np.log((used[candidates[..., level]] - own + 1.0) * self.codebook_size / len(self.codes))
        return total

    def share_under(self, items: NDArray, weights: Floats, candidates: Codes) -> Floats:
        """Items (R, k) of each row with their weights (R, k), candidates (R, P, L) -> (R, P, L): share of the weight under each prefix."""
        keys, held = prefix_keys(candidates, self.codebook_size), self.keys[items]
        shares = [((held[:, None, :, level] == keys[:, :, None, level]) * weights[:, None]).sum(-1) for level in range(keys.shape[-1])]
        return np.stack(shares, axis=-1)

    def mean_under(self, vectors: NDArray, rows: NDArray, candidates: Codes, level: int) -> tuple[NDArray, NDArray]:
        """Mean vector of the *other* items under each candidate's prefix of `level` (0-based), (R, P, D), and their number (R, P).

        An empty prefix gives zeros.
        """
        table = self.levels[level]
        totals = np.zeros((len(table.keys), vectors.shape[1]), dtype=vectors.dtype)
        np.add.at(totals, table.inverse, vectors)
        sizes = np.bincount(table.inverse, minlength=len(table.keys))
        keys = prefix_keys(candidates[..., : level + 1], self.codebook_size)[..., -1]
        number, found = _look_up(table.keys, keys)
        own = keys == self.keys[rows, level][:, None]
        total = np.where(found[..., None], totals[number], 0) - np.where(own[..., None], vectors[rows][:, None], 0)
        size = np.where(found, sizes[number], 0) - own
        return total / np.maximum(size, 1)[..., None], size


class NeighboursCodes:
    """Where an item's neighbours lie: the codes after a prefix that hold most of them beyond chance, prefixes and single codes weighed as
    in the evidence.

    Args: as `CodeTable`; `config` for the weights.
    """

    def __init__(
        self, codes: Codes, codebook_size: int, neighbours: sparse.spmatrix, content: NDArray | None, config: EvidenceConfig
    ) -> None:
        self.codebook_size, levels = codebook_size, codes.shape[1]
        self.tables = [CodeTable(codes[:, : level + 1], codebook_size, neighbours, content) for level in range(levels)]
        self.prefix_weight = (*config.level_weights, *[0.0] * levels)[:levels]
        self.code_weight = (0.0, *config.code_weights, *[0.0] * levels)[:levels]

    def after(self, rows: NDArray, prefixes: Codes, count: int) -> Codes:
        """(R,), prefixes (R, M, l) of each row -> codes (R, M, count), best first; -1 where fewer hold more than chance would put there."""
        if len(rows) > 1 and prefixes.shape[0] * prefixes.shape[1] * self.codebook_size > LOOKED_UP:
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
        best = np.argsort(-score, axis=-1, kind="stable")[..., :count]
        return np.where(np.take_along_axis(score, best, -1) > 0, best, -1)


def _weighed(excess: Floats, weights: Sequence[float]) -> Floats:
    """(..., M) excesses -> (...): their sum by weight, levels without one weighing nothing."""
    levels = excess.shape[-1]
    return excess @ np.array((*weights, *[0.0] * levels)[:levels])


def _look_up(sorted_keys: Codes, wanted: Codes) -> tuple[Codes, NDArray[np.bool_]]:
    """Position of each wanted key among the sorted ones, and whether it is there (position 0 where it is not)."""
    if len(sorted_keys) == 0:
        return np.zeros(wanted.shape, dtype=np.int64), np.zeros(wanted.shape, dtype=bool)
    position = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    found = sorted_keys[position] == wanted
    return np.where(found, position, 0), found
