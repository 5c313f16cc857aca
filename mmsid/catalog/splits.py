"""Train, valid and test splits of user histories: leave-one-out or by time.

Models are fitted on the interactions before a user's valid item only. The train users are split once more: no model is fitted on the
inner held-out users. Rewards, gates and all figures called "held out" are measured on them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

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
    """

    train: list[np.ndarray]
    valid: np.ndarray
    test: np.ndarray
    before_test: list[np.ndarray]
    held_out: np.ndarray

    def history(self, user: int, which: Literal["valid", "test"]) -> np.ndarray:
        """Input history of the user in this part. Its items are the seen items, which must not be recommended."""
        return self.train[user] if which == "valid" else self.before_test[user]

    def users(self, which: Literal["valid", "test"]) -> np.ndarray:
        """Indices (int64) of the users that have a target in this part."""
        return np.flatnonzero((self.valid if which == "valid" else self.test) >= 0)

    def fit_histories(self) -> list[np.ndarray]:
        """Non-empty train prefixes of the users on whom models, statistics and labels may be fitted."""
        return [rows for rows, held_out in zip(self.train, self.held_out, strict=True) if len(rows) and not held_out]

    def held_out_histories(self) -> list[np.ndarray]:
        """Non-empty train prefixes of the inner held-out users."""
        return [rows for rows, held_out in zip(self.train, self.held_out, strict=True) if len(rows) and held_out]


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
        parts = [_cut_by_time(user.rows, user.timestamps, *cuts) for user in catalog.histories]
    else:
        parts = [_leave_one_out(user.rows) for user in catalog.histories]
    train = [part[0] for part in parts]
    return Split(
        train=train,
        valid=np.array([part[1] for part in parts], dtype=np.int64),
        test=np.array([part[2] for part in parts], dtype=np.int64),
        before_test=[part[3] for part in parts],
        held_out=inner_held_out(catalog, train, config),
    )


def _leave_one_out(rows: np.ndarray) -> tuple[np.ndarray, int, int, np.ndarray]:
    if len(rows) < 3:
        return rows, -1, -1, rows
    return rows[:-2], int(rows[-2]), int(rows[-1]), rows[:-1]


def _time_cuts(catalog: Catalog, config: SplitConfig) -> tuple[float, float]:
    if not catalog.histories or any(user.timestamps is None for user in catalog.histories):
        raise CatalogError(
            "split.method is 'time' but the sequences have no timestamps; set catalog.fields.timestamps or use 'leave_one_out'"
        )
    times = np.concatenate([user.timestamps for user in catalog.histories])
    # 'higher' returns a timestamp that occurs, so that rounding cannot separate equal timestamps
    valid_cut, test_cut = np.quantile(times, [config.valid_from, config.test_from], method="higher")
    return valid_cut, test_cut


def _cut_by_time(rows: np.ndarray, times: np.ndarray, valid_cut: float, test_cut: float) -> tuple[np.ndarray, int, int, np.ndarray]:
    first_valid, first_test = np.searchsorted(times, [valid_cut, test_cut], side="left")
    train, before_test = rows[:first_valid], rows[:first_test]
    valid = int(rows[first_valid]) if 0 < first_valid < first_test else -1
    test = int(rows[first_test]) if 0 < first_test < len(rows) else -1
    return train, valid, test, before_test


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
