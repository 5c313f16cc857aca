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

    train: list[np.ndarray]
    valid: np.ndarray
    test: np.ndarray
    before_test: list[np.ndarray]
    held_out: np.ndarray
    train_weights: list[np.ndarray] | None = None
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

    Raises:
        CatalogError: the method is `time` and the histories have no timestamps.
    """
    if config.method == "time":
        cuts = _time_cuts(catalog, config)
        parts = [_cut_by_time(user.timestamps, *cuts) for user in catalog.histories]
    else:
        parts = [_leave_one_out(len(user.rows)) for user in catalog.histories]
    train = [user.rows[: part.train] for user, part in zip(catalog.histories, parts, strict=True)]
    valid, test = (np.array([getattr(part, name) for part in parts], dtype=np.int64) for name in ("valid", "test"))
    split = Split(
        train=train,
        valid=_at([user.rows for user in catalog.histories], valid, -1, np.int64),
        test=_at([user.rows for user in catalog.histories], test, -1, np.int64),
        before_test=[user.rows[: part.before_test] for user, part in zip(catalog.histories, parts, strict=True)],
        held_out=inner_held_out(catalog, train, config),
    )
    if not any(user.weights is not None for user in catalog.histories):
        return split
    weights = [user.weights for user in catalog.histories]
    return replace(
        split,
        train_weights=[values[: part.train] for values, part in zip(weights, parts, strict=True)],
        valid_weight=_at(weights, valid, 0.0, np.float64),
        test_weight=_at(weights, test, 0.0, np.float64),
    )


class _Parts(NamedTuple):
    """Parts of a history of T interactions: lengths of the prefixes `train` and `before_test`, positions of the targets or -1."""

    train: int
    valid: int
    test: int
    before_test: int


def _at(values: list[np.ndarray], positions: np.ndarray, missing: float, kind: type) -> np.ndarray:
    """Value (U,) of each user at a position of the history, `missing` where the position is -1."""
    return np.array([each[place] if place >= 0 else missing for each, place in zip(values, positions.tolist(), strict=True)], dtype=kind)


def _leave_one_out(length: int) -> _Parts:
    if length < 3:
        return _Parts(length, -1, -1, length)
    return _Parts(length - 2, length - 2, length - 1, length - 1)


def _time_cuts(catalog: Catalog, config: SplitConfig) -> tuple[float, float]:
    if not catalog.histories or any(user.timestamps is None for user in catalog.histories):
        raise CatalogError(
            "split.method is 'time' but the sequences have no timestamps; set catalog.fields.timestamps or use 'leave_one_out'"
        )
    times = np.concatenate([user.timestamps for user in catalog.histories])
    # 'higher' returns a timestamp that occurs, so that rounding cannot separate equal timestamps
    valid_cut, test_cut = np.quantile(times, [config.valid_from, config.test_from], method="higher")
    return valid_cut, test_cut


def _cut_by_time(times: np.ndarray, valid_cut: float, test_cut: float) -> _Parts:
    first_valid, first_test = np.searchsorted(times, [valid_cut, test_cut], side="left").tolist()
    valid = first_valid if 0 < first_valid < first_test else -1
    test = first_test if 0 < first_test < len(times) else -1
    return _Parts(first_valid, valid, test, first_test)


def inner_held_out(catalog: Catalog, train: list[np.ndarray], config: SplitConfig) -> np.ndarray:
    """Choose the inner held-out users: (U,) bool, those with the lowest hash of (seed, content of the train prefix).

    At least one when the share is above 0 and two users have train interactions.
    """
    held_out = np.zeros(len(train), dtype=bool)
    with_train = [user for user, rows in enumerate(train) if len(rows)]
    count = math.ceil(config.inner_held_out * len(with_train)) if len(with_train) > 1 else 0
    rank_hash = {user: hashlib.sha256(f"{config.seed}:{catalog.content_hash(train[user])}".encode()).hexdigest() for user in with_train}
    held_out[sorted(with_train, key=lambda user: (rank_hash[user], user))[:count]] = True
    return held_out
