"""Histories of users as columns: one array for the interactions of all users, and one offset per user.

A million users need no Python object each. A `UserHistory` is made when one user is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

_USERS_AT_ONCE = 4096  # whose ids become Python texts together while the histories are iterated
_ARRAYS = ("offsets", "rows", "timestamps", "weights")


@dataclass
class UserHistory:
    """History of one user.

    Attributes:
        rows: (T,) int64, item rows in time order.
        timestamps: (T,), or None.
        weights: (T,) float64, weights of the events. None for sequences, and for events that all have the weight 1.
    """

    user_id: str
    rows: np.ndarray
    timestamps: np.ndarray | None
    weights: np.ndarray | None = None


class Slices(Sequence[np.ndarray]):
    """Pieces of one array, as a sequence of views: piece i is `values[starts[i] : ends[i]]`."""

    def __init__(self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.values, self.starts, self.ends = values, starts, ends

    @classmethod
    def of(cls, pieces: Sequence[np.ndarray], kind: type = np.int64) -> Slices:
        """The pieces themselves if they are `Slices`, else a copy of them in one array of the type `kind`."""
        if isinstance(pieces, Slices):
            return pieces
        offsets = _offsets(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        return cls(np.concatenate([*pieces, np.zeros(0, kind)]).astype(kind, copy=False), offsets[:-1], offsets[1:])

    @property
    def lengths(self) -> np.ndarray:
        """Number of values (U,) of each piece."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Slices: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Slices(self.values, self.starts[index], self.ends[index])
        return self.values[self.starts[index] : self.ends[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield self.values[start:end]

    def take(self, index: np.ndarray) -> Slices:
        """The pieces of an index array or a mask."""
        return Slices(self.values, self.starts[index], self.ends[index])

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (E,) in `values` of all pieces end to end, and the offsets (U + 1,) of the pieces among them."""
        offsets = _offsets(self.lengths)
        return np.repeat(self.starts - offsets[:-1], self.lengths) + np.arange(offsets[-1]), offsets


class Histories(Sequence[UserHistory]):
    """Histories of U users with E interactions.

    Attributes:
        user_ids: (U,) texts.
        offsets: (U + 1,) int64. User u has the interactions `offsets[u]` to `offsets[u + 1]`.
        rows: (E,) int64, item rows, in time order per user.
        timestamps: (E,), or None.
        weights: (E,) float64 weights of the events, or None where all are 1.
        without_items: (V,) texts, ids of the other users of the log, who have no known item. Set by the functions that read logs.
            Slices and selections do not keep it.
        integer_user_ids: whether the log holds whole numbers as user ids. Set and kept like `without_items`.
    """

    def __init__(
        self,
        user_ids: pa.Array,
        offsets: np.ndarray,
        rows: np.ndarray,
        timestamps: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        """Raises ValueError when the arrays do not belong together."""
        if len(offsets) != len(user_ids) + 1 or any(len(each) != offsets[-1] for each in (rows, timestamps, weights) if each is not None):
            raise ValueError(f"{len(user_ids)} users, {len(offsets)} offsets up to {offsets[-1:]} and {len(rows)} rows do not fit together")
        self.user_ids, self.offsets, self.rows, self.timestamps, self.weights = user_ids, offsets, rows, timestamps, weights
        self.without_items = pa.array([], pa.large_string())
        self.integer_user_ids = False

    @classmethod
    def of(cls, users: Iterable[UserHistory]) -> Histories:
        """The users themselves if they are `Histories`, else a copy of them.

        Raises:
            ValueError: some users have timestamps or weights, and others have none.
        """
        if isinstance(users, Histories):
            return users
        users = list(users)
        rows = Slices.of([user.rows for user in users])
        found: dict[str, np.ndarray | None] = {}
        for name in ("timestamps", "weights"):
            given = [values for user in users if (values := getattr(user, name)) is not None]
            if given and len(given) < len(users):
                raise ValueError(f"{len(given)} of {len(users)} users have {name}; give them for all users or for none")
            found[name] = np.concatenate(given) if given else None
        ids = pa.array([user.user_id for user in users], pa.large_string())
        return cls(ids, _offsets(rows.lengths), rows.values, **found)

    @property
    def lengths(self) -> np.ndarray:
        """Number of interactions (U,) of each user."""
        return np.diff(self.offsets)

    def user_of_row(self) -> np.ndarray:
        """Index (E,) int64 of the user of each interaction."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def pieces(self) -> Slices:
        """Item rows of each user, as views."""
        return Slices(self.rows, self.offsets[:-1], self.offsets[1:])

    def __len__(self) -> int:
        return len(self.user_ids)

    @overload
    def __getitem__(self, index: int) -> UserHistory: ...
    @overload
    def __getitem__(self, index: slice) -> Histories: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._consecutive(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
        user = range(len(self))[index]  # negative numbers count from the end, others raise IndexError
        return self._user(self.user_ids[user].as_py(), int(self.offsets[user]), int(self.offsets[user + 1]))

    def __iter__(self) -> Iterator[UserHistory]:
        for first in range(0, len(self), _USERS_AT_ONCE):
            ids = self.user_ids.slice(first, _USERS_AT_ONCE).to_pylist()
            offsets = self.offsets[first : first + len(ids) + 1].tolist()
            yield from map(self._user, ids, offsets[:-1], offsets[1:])

    def _user(self, user_id: str, start: int, end: int) -> UserHistory:
        times, weights = (None if values is None else values[start:end] for values in (self.timestamps, self.weights))
        return UserHistory(user_id, self.rows[start:end], times, weights)

    def _consecutive(self, start: int, stop: int) -> Histories:
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        parts = (None if values is None else values[first:last] for values in (self.rows, self.timestamps, self.weights))
        return Histories(self.user_ids.slice(start, stop - start), self.offsets[start : stop + 1] - first, *parts)

    def take(self, users: np.ndarray) -> Histories:
        """The users of an index array, in its order, or of a mask (U,) bool."""
        users = np.asarray(users)
        users = np.flatnonzero(users) if users.dtype == bool else users.astype(np.int64)
        places, offsets = self.pieces().take(users).positions()
        parts = (None if values is None else values[places] for values in (self.rows, self.timestamps, self.weights))
        return Histories(self.user_ids.take(pa.array(users)), offsets, *parts)

    def keep(self, interactions: np.ndarray) -> Histories:
        """The interactions of a mask (E,) bool. Users without any are dropped."""
        before = _offsets(interactions)[self.offsets]  # interactions kept before each user
        users = np.diff(before) > 0
        parts = (None if values is None else values[interactions] for values in (self.rows, self.timestamps, self.weights))
        return Histories(self.user_ids.filter(pa.array(users)), _offsets(np.diff(before)[users]), *parts)

    def mapped(self, new_row: np.ndarray, keep: np.ndarray | None = None) -> Histories:
        """The same interactions under new item numbers.

        Args:
            new_row: (N,) int64, new row of each item. -1 drops the interactions with the item, and users without any left.
            keep: (U,) bool, the users that stay; None: all.
        """
        rows = new_row[self.rows]
        kept = rows >= 0 if keep is None else (rows >= 0) & np.repeat(keep, self.lengths)
        found = Histories(self.user_ids, self.offsets, rows, self.timestamps, self.weights)
        return found if kept.all() and self.lengths.all() else found.keep(kept)

    def repeated(self) -> np.ndarray:
        """(E,) bool: True where the user has engaged with the item before."""
        order = np.lexsort((self.rows, self.user_of_row()))  # stable: equal pairs stay in time order
        rows, users = self.rows[order], self.user_of_row()[order]
        again = np.zeros(len(rows), dtype=bool)
        again[order[1:]] = (rows[1:] == rows[:-1]) & (users[1:] == users[:-1])
        return again

    def save(self, folder: Path) -> None:
        """Write offsets.npy, rows.npy, user_ids.arrow and, if there are any, timestamps.npy, weights.npy and without_items.arrow."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            if (values := getattr(self, name)) is not None:
                np.save(folder / f"{name}.npy", values, allow_pickle=False)
        for name, ids in (("user_ids", self.user_ids), ("without_items", self.without_items)):
            table = pa.table({"user_id": ids})
            if len(ids) or name == "user_ids":
                with pa.ipc.new_file(folder / f"{name}.arrow", table.schema) as file:
                    file.write_table(table)

    @classmethod
    def open(cls, folder: Path) -> Histories:
        """Open what `save` wrote, memory-mapped and read-only."""
        folder, arrays = Path(folder), []
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            found = name in ("offsets", "rows") or path.is_file()
            arrays.append(np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) if found else None)
        found = cls(_ids(folder / "user_ids.arrow"), *arrays)
        if (without := folder / "without_items.arrow").is_file():
            found.without_items = _ids(without)
        return found


def _ids(path: Path) -> pa.Array:
    column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["user_id"]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
