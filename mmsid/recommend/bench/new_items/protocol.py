"""Protocols of the new-item benchmark: which items are new, what may be fitted, and which users are ranked.

Known items are numbered by themselves (0 .. K-1) while methods are fitted and tuned, so nothing that is fitted can see a new item.
Methods are then applied to the whole catalogue (rows 0 .. N-1), known and appended items together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmsid.catalog import Catalog, Item, Split, SplitConfig, split_histories
from mmsid.catalog.splits import inner_held_out
from mmsid.errors import CatalogError
from mmsid.recommend.bench.new_items.config import Protocol
from mmsid.recommend.classical import item_counts

GROUPS = ("new", "rare", "all")
RARE_UP_TO = 3


@dataclass(frozen=True)
class NewItemWorld:
    """A catalogue of N items, of which K are known and the others new.

    Attributes:
        catalog: known and new items with all histories.
        new: (N,) bool.
        fit: split of the interactions that methods may be fitted and tuned on. Items are rows of the *whole* catalogue, never new
            ones. It has no test targets. Its users are those with a train history, ordered by content.
        whole: split of all users of the catalogue. Its `test` and `before_test` give the ranked users and their whole histories.
            Its `train` and `valid` are for methods that are retrained with the new items' interactions (protocol hidden only).
    """

    catalog: Catalog
    new: np.ndarray
    fit: Split
    whole: Split

    @property
    def known(self) -> np.ndarray:
        """Rows (K,) of the known items in the whole catalogue."""
        return np.flatnonzero(~self.new)

    @property
    def known_items(self) -> list[Item]:
        """The K known items."""
        return [self.catalog.items[row] for row in self.known]

    @property
    def fit_known(self) -> Split:
        """`fit` with items numbered among the known ones."""
        number = np.cumsum(~self.new) - 1

        def renumbered(rows: np.ndarray) -> np.ndarray:
            return np.where(rows >= 0, number[rows], -1)

        train = [renumbered(rows) for rows in self.fit.train]
        return replace(self.fit, train=train, valid=renumbered(self.fit.valid), before_test=train)

    def groups(self) -> dict[str, np.ndarray]:
        """Membership of the ranked users in `GROUPS`, each (P,) bool, in the order of `whole.users("test")`.

        `new`: the user's next item is new. `rare`: it is a known item with 1 to 3 interactions in `fit.train`. `all`: all ranked users,
        including those whose next item has more interactions, or is known without any in `fit.train`.
        """
        targets = self.whole.test[self.whole.users("test")]
        counts = item_counts(self.fit.train, len(self.catalog.items))[targets]
        new = self.new[targets]
        return {"new": new, "rare": ~new & (counts >= 1) & (counts <= RARE_UP_TO), "all": np.ones(len(targets), dtype=bool)}


def drawn_items(items: Sequence[Item], share: float, draw: int) -> np.ndarray:
    """New items (N,) bool of a draw: the share of the contents with the lowest hash of (draw, content).

    Row order and ids do not matter. Items with equal content are hidden together. At least one content is hidden and one is known.

    Raises:
        CatalogError: all items have the same content.
    """
    contents = {item.content_sha256 for item in items}
    if len(contents) < 2:
        raise CatalogError("all items have the same content, so none can be hidden; give a catalogue of at least two different items")
    ranked = sorted(contents, key=lambda content: hashlib.sha256(f"{draw}:{content}".encode()).hexdigest())
    chosen = set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])
    return np.array([item.content_sha256 in chosen for item in items], dtype=bool)


def hidden_world(catalog: Catalog, config: SplitConfig, share: float, draw: int) -> NewItemWorld:
    """Hide a share of the items with all their interactions.

    Train histories lose the hidden items, and valid users are those whose valid item is known. Test histories keep everything that a
    user did before the test item.

    Raises:
        CatalogError: the split cannot be made, or no valid or test user is left.
    """
    new = drawn_items(catalog.items, share, draw)
    whole = split_histories(catalog, config)
    train = [rows[~new[rows]] for rows in whole.train]
    valid = np.where((whole.valid >= 0) & ~new[whole.valid], whole.valid, -1)
    return _checked(NewItemWorld(catalog, new, _fit_split(catalog, train, valid, config), whole))


def calendar_world(catalog: Catalog, config: SplitConfig, fit_until: float) -> NewItemWorld:
    """Fit on the interactions before the time t at the quantile `fit_until` of all timestamps.

    New are the items whose first interaction is at t or later; items without any interaction count as known. A user's first
    interaction at t or later is the test target, the last one before t the valid target, and those before it are the train history. A
    user with one interaction before t is in train only.

    Raises:
        CatalogError: no timestamps, no new item, or no valid or test user.
    """
    histories = catalog.histories
    if not histories or histories.timestamps is None:
        raise CatalogError("the sequences have no timestamps; set catalog.fields.timestamps, or leave `calendar` out of suite.protocols")
    # 'higher' returns a timestamp that occurs, so that rounding cannot separate equal timestamps
    cut = np.quantile(histories.timestamps, fit_until, method="higher")
    parts = [(user.rows, int(np.searchsorted(user.timestamps, cut, side="left"))) for user in histories]
    before = [rows[:first] for rows, first in parts]
    train = [rows[:-1] if len(rows) > 1 else rows for rows in before]
    valid = np.array([rows[-1] if len(rows) > 1 else -1 for rows in before], dtype=np.int64)
    test = np.array([rows[first] if 0 < first < len(rows) else -1 for rows, first in parts], dtype=np.int64)
    num_items = len(catalog.items)
    new = (item_counts(before, num_items) == 0) & (item_counts([histories.rows], num_items) > 0)
    if not new.any():
        raise CatalogError(f"no item is first seen in the time from quantile {fit_until} on; lower suite.fit_until")
    whole = Split(train, valid, test, before, inner_held_out(catalog, train, config))
    return _checked(NewItemWorld(catalog, new, _fit_split(catalog, train, valid, config), whole))


def world_of(catalog: Catalog, config: SplitConfig, protocol: Protocol, draw: int, share: float, fit_until: float) -> NewItemWorld:
    """The world of one draw of a protocol."""
    if protocol == "calendar":
        return calendar_world(catalog, config, fit_until)
    return hidden_world(catalog, config, share, draw)


def _fit_split(catalog: Catalog, train: list[np.ndarray], valid: np.ndarray, config: SplitConfig) -> Split:
    """Split of the users with a train history, ordered by the content of train history and valid item alone.

    The catalogue orders users by their whole histories, so its order would depend on hidden interactions.
    """

    def key(user: int) -> tuple[str, str, list[int], int]:
        target = valid[user]
        return (
            catalog.content_hash(train[user]),
            catalog.content_hash(np.array([target])) if target >= 0 else "",
            train[user].tolist(),
            target,
        )

    users = sorted((user for user, rows in enumerate(train) if len(rows)), key=key)
    histories = [train[user] for user in users]
    targets = np.array([valid[user] for user in users], dtype=np.int64)
    return Split(histories, targets, np.full(len(users), -1), histories, inner_held_out(catalog, histories, config))


def _checked(world: NewItemWorld) -> NewItemWorld:
    if not len(world.fit.users("valid")):
        raise CatalogError("no user has a known valid item after a known train item; give longer histories or hide fewer items")
    if not len(world.whole.users("test")):
        raise CatalogError("no user has a test item; give histories of at least 3 items (hidden), or that go on after the cut (calendar)")
    return world
