"""Train, valid and test splits of user histories: leave-one-out or by time.

Models are fitted on the interactions before a user's valid item only. The train users are split once more: no model is fitted on the
inner held-out users. Rewards, gates and all figures called "held out" are measured on them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from mmsid.catalog.catalog import Catalog
from mmsid.catalog.config import SplitConfig
from mmsid.catalog.histories import Histories, Slices
from mmsid.catalog.history_order import content_digests
from mmsid.errors import CatalogError


@dataclass
class Split:
    """Split histories of U users, in the order of `Catalog.histories`. Items are rows of the catalogue.

    Attributes:
        train: per user, (T,) int64, the interactions that models may be fitted on.
        valid: (U,) int64, the item to predict from `train`, or -1.
        test: (U,) int64, the item to predict from `before_test`, or -1.
        before_test: per user, all interactions before the test item, including the valid item.
        held_out: (U,) bool, the inner held-out users, on whom no model is fitted.
        train_weights: per user, (T,) float64, weights of the events of `train`; None for a catalogue without event weights.
        valid_weight, test_weight: (U,) float64, weights of the target events, 0 where there is no target; or None.
    """

    train: Sequence[np.ndarray]
    valid: np.ndarray
    test: np.ndarray
    before_test: Sequence[np.ndarray]
    held_out: np.ndarray
    train_weights: Sequence[np.ndarray] | None = None
    valid_weight: np.ndarray | None = None
    test_weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.train_weights is not None and [*map(len, self.train)] != [*map(len, self.train_weights)]:
            raise ValueError("train and train_weights differ in length; shorten both by Split.with_train")

    def with_train(self, kept: Sequence[np.ndarray | slice], valid: np.ndarray) -> Split:
        """This split with fewer train interactions and other valid targets.

        Args:
            kept: per user, a numpy index of the interactions of `train` that stay: a slice, a mask or positions.
            valid: (U,) int64, the new targets, whose weights are unknown.
        """
        weights = None if self.train_weights is None else [w[index] for w, index in zip(self.train_weights, kept, strict=True)]
        train = [rows[index] for rows, index in zip(self.train, kept, strict=True)]
        return replace(self, train=train, valid=valid, train_weights=weights, valid_weight=None)

    def history(self, user: int, which: Literal["valid", "test"]) -> np.ndarray:
        """Input history of the user in this part. Its items are the seen items, which must not be recommended."""
        return self.train[user] if which == "valid" else self.before_test[user]

    def target_seen_before(self, which: Literal["valid", "test"]) -> np.ndarray:
        """(n,) bool for the users of `users(which)`: whether the target occurs in the user's own history, and so cannot be ranked."""
        users = self.users(which)
        inputs = Slices.of(self.train if which == "valid" else self.before_test).take(users)
        positions, offsets = inputs.positions()
        targets = np.repeat((self.valid if which == "valid" else self.test)[users], inputs.lengths)
        return np.diff(np.append(0, np.cumsum(inputs.values[positions] == targets))[offsets]) > 0

    def users(self, which: Literal["valid", "test"]) -> np.ndarray:
        """Indices (int64) of the users that have a target in this part."""
        return np.flatnonzero((self.valid if which == "valid" else self.test) >= 0)

    def target_weights(self, which: Literal["valid", "test"]) -> np.ndarray | None:
        """Weights (float64) of the targets of `users(which)`, in this order; None for a catalogue without event weights."""
        weights = self.valid_weight if which == "valid" else self.test_weight
        return None if weights is None else weights[self.users(which)]

    def fit_histories(self) -> list[np.ndarray]:
        """Non-empty train prefixes of the users on whom models, statistics and labels may be fitted."""
        return [rows for rows, held_out in zip(self.train, self.held_out, strict=True) if len(rows) and not held_out]

    def fit_weights(self) -> list[np.ndarray] | None:
        """Event weights of `fit_histories`, in the same order; None for a catalogue without event weights."""
        return self._weights_of(~self.held_out)

    def held_out_histories(self) -> list[np.ndarray]:
        """Non-empty train prefixes of the inner held-out users."""
        return [rows for rows, held_out in zip(self.train, self.held_out, strict=True) if len(rows) and held_out]

    def held_out_weights(self) -> list[np.ndarray] | None:
        """Event weights of `held_out_histories`, in the same order; None for a catalogue without event weights."""
        return self._weights_of(self.held_out)

    def _weights_of(self, users: np.ndarray) -> list[np.ndarray] | None:
        if self.train_weights is None:
            return None
        return [weights for weights, chosen in zip(self.train_weights, users, strict=True) if len(weights) and chosen]


def split_histories(catalog: Catalog, config: SplitConfig) -> Split:
    """Split all histories.

    Leave-one-out: the last item is the test target, the one before it the valid target. Users with fewer than 3 interactions are
    in train only. Time: two cuts at quantiles of all timestamps. A user's first interaction in [valid cut, test cut) is the valid
    target, the first one at or after the test cut the test target. A target without any earlier interaction is dropped.

    With `config.repeats` set to `first`, repeated interactions with an item are left out first.

    Raises:
        CatalogError: the method is `time` and the histories have no timestamps.
    """
    histories = catalog.histories if config.repeats == "keep" else catalog.histories.keep(~catalog.histories.repeated())
    starts, lengths = histories.offsets[:-1], histories.lengths
    parts = _cut_by_time(histories, config) if config.method == "time" else _leave_one_out(lengths)
    train = Slices(histories.rows, starts, starts + parts.train)
    split = Split(
        train=train,
        valid=_at(histories.rows, starts, parts.valid, -1),
        test=_at(histories.rows, starts, parts.test, -1),
        before_test=Slices(histories.rows, starts, starts + parts.before_test),
        held_out=inner_held_out(catalog, train, config),
    )
    if histories.weights is None:
        return split
    return replace(
        split,
        train_weights=Slices(histories.weights, starts, starts + parts.train),
        valid_weight=_at(histories.weights, starts, parts.valid, 0.0),
        test_weight=_at(histories.weights, starts, parts.test, 0.0),
    )


class _Parts(NamedTuple):
    """Parts of the histories of U users: lengths (U,) of the prefixes `train` and `before_test`, positions (U,) of the targets or -1."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    before_test: np.ndarray


def _at(values: np.ndarray, starts: np.ndarray, positions: np.ndarray, missing: float) -> np.ndarray:
    """Value (U,) of each user at a position of the history, `missing` where the position is -1."""
    found = np.full(len(starts), missing, dtype=values.dtype)
    given = positions >= 0
    found[given] = values[starts[given] + positions[given]]
    return found


def _leave_one_out(lengths: np.ndarray) -> _Parts:
    long = lengths >= 3
    return _Parts(lengths - 2 * long, np.where(long, lengths - 2, -1), np.where(long, lengths - 1, -1), lengths - long)


def _cut_by_time(histories: Histories, config: SplitConfig) -> _Parts:
    if not histories or histories.timestamps is None:
        raise CatalogError(
            "split.method is 'time' but the sequences have no timestamps; set catalog.fields.timestamps or use 'leave_one_out'"
        )
    # 'higher' returns a timestamp that occurs, so that rounding cannot separate equal timestamps
    cuts = np.quantile(histories.timestamps, [config.valid_from, config.test_from], method="higher")
    users = histories.user_of_row()
    first_valid, first_test = (np.bincount(users[histories.timestamps < cut], minlength=len(histories)) for cut in cuts)
    valid = np.where((first_valid > 0) & (first_valid < first_test), first_valid, -1)
    test = np.where((first_test > 0) & (first_test < histories.lengths), first_test, -1)
    return _Parts(first_valid, valid, test, first_test)


def inner_held_out(catalog: Catalog, train: Sequence[np.ndarray], config: SplitConfig) -> np.ndarray:
    """Choose the inner held-out users: (U,) bool, those with the lowest hash of (seed, content of the train prefix).

    At least one when the share is above 0 and two users have train interactions.
    """
    train = Slices.of(train)
    held_out = np.zeros(len(train), dtype=bool)
    with_train = np.flatnonzero(train.lengths)
    count = math.ceil(config.inner_held_out * len(with_train)) if len(with_train) > 1 else 0
    if not count:
        return held_out
    contents = content_digests(train.take(with_train), [item.content_sha256 for item in catalog.items]).tobytes().hex()
    prefix = f"{config.seed}:".encode()
    hashes = (hashlib.sha256(prefix + contents[at : at + 64].encode()).digest() for at in range(0, len(contents), 64))
    drawn = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 4)  # in the order of the hexadecimal hashes
    held_out[with_train[np.lexsort((with_train, *drawn.T[::-1]))[:count]]] = True
    return held_out


def seen_targets_warning(seen: int, targets: int) -> str | None:
    """A sentence if more than half of the targets occur in their users' own histories, else None."""
    if 2 * seen <= targets:
        return None
    return (
        f"{seen:,} of {targets:,} test targets cannot be ranked, because their users have engaged with the item before and seen items are "
        "masked in evaluation; set catalog.split.repeats: first to count each item at the user's first interaction only"
    )
