"""Ids of logs matched with the ids of the items, and the error for a log whose ids do not match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.columns import id_texts
from mmsid.errors import CatalogError

MOST_UNKNOWN = 0.5  # a log of which more than this share is of unknown items is refused
_SAMPLE = 10_000  # unknown ids that the search for a cause looks at
_SHOWN = 3
_NULLS = ("\\N", "NULL", "<NA>", "nan", "NaN", "None")
_FLOAT = r"^(-?\d+)\.0+$"
_ZEROS = r"^0+(\d)"
ROUNDED = r"^\d([.,]\d+)?[eE]\+?\d+$"  # as a spreadsheet writes long numbers
_DECORATION = r"[\s\x{00A0}\x{200B}-\x{200F}\x{FEFF}\"'`]+"  # white space, invisible characters, quotes


@dataclass(frozen=True)
class Encoded:
    """A column of ids with each distinct id once.

    Attributes:
        codes: (R,) int64, index into `ids`; -1 where the id is missing.
        ids: (D,) distinct texts.
    """

    codes: np.ndarray
    ids: pa.Array

    def counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """How often (D,) each id occurs, among the rows of a mask (R,)."""
        codes = self.codes if rows is None else self.codes[rows]
        return np.bincount(codes[codes >= 0], minlength=len(self.ids))


def encode(column: pa.ChunkedArray, place: str, *, with_nulls: bool = False) -> Encoded:
    """Encode a column of ids as texts without surrounding white space; numbers lose a trailing `.0`.

    Args:
        place: file and field, for messages.
        with_nulls: texts by which exports mean a missing value, like `NULL` and `\\N`, are missing.

    Raises:
        CatalogError: the column holds neither texts nor numbers.
    """
    if not isinstance(column.type, pa.BaseExtensionType) and not pa.types.is_nested(column.type) and not pa.types.is_null(column.type):
        # all chunks of a column that is encoded here share one dictionary; unifying them again is slow
        encoded = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
        chunks = encoded.chunks
        codes = [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64) for chunk in chunks]
        first = np.concatenate([np.zeros(0, np.int64), *codes])
        texts = id_texts(pa.chunked_array([chunks[0].dictionary if chunks else pa.array([], column.type)]), place)
    else:
        texts, first = id_texts(column, place), np.arange(len(column))
    if with_nulls:
        texts = pc.if_else(pc.is_in(texts, pa.array(_NULLS, texts.type)), pa.scalar(None, texts.type), texts)
    # distinct values can become equal texts
    again = pc.dictionary_encode(texts.combine_chunks())
    again = again.combine_chunks() if isinstance(again, pa.ChunkedArray) else again
    second = np.append(pc.fill_null(again.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64), -1)
    return Encoded(second[first], again.dictionary)


class ItemIds:
    """The ids of all items, which logs are matched with.

    An id `7.0` matches the item `7`. An id `0007` matches it if no item id has leading zeros.
    """

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids.cast(pa.large_string())

    def rows(self, ids: pa.Array) -> np.ndarray:
        """Row (D,) int64 of each text, -1 for an unknown one."""
        found = _index(ids, self.ids)
        if (found < 0).any():
            for change, ours in self._forms:
                unknown = np.flatnonzero(found < 0)
                found[unknown] = _index(change(ids.take(pa.array(unknown))), ours)
        return found

    def rows_of(self, encoded: Encoded, where: str, notes: list[str]) -> np.ndarray:
        """Row (R,) int64 of each id of a column, -1 for a missing or unknown one. Ids matched in another form are reported in `notes`."""
        rows = self.rows(encoded.ids)
        known = np.flatnonzero(rows >= 0)
        changed = known[~pc.equal(encoded.ids.take(pa.array(known)), self.ids.take(pa.array(rows[known]))).to_numpy(zero_copy_only=False)]
        if len(changed):
            theirs, ours = encoded.ids[int(changed[0])].as_py(), self.ids[int(rows[changed[0]])].as_py()
            notes.append(f"{where}: {len(changed):,} ids were matched in another form, like {theirs!r} with the item {ours!r}")
        return np.append(rows, -1)[encoded.codes]

    def known_share(self, ids: pa.Array) -> float:
        """Share of the texts that are ids of items, 0 if there are none."""
        return float((self.rows(ids) >= 0).mean()) if len(ids) else 0.0

    @cached_property
    def _forms(self) -> list[tuple[Callable[[pa.Array], pa.Array], pa.Array]]:
        """Changes of an unknown id that may make it known, and the ids of the items after the same change."""
        whole = _without_float(self.ids)
        if not _distinct(whole):
            return []
        return [(_without_float, whole)] if _any(whole, _ZEROS) else [(_without_float, whole), (_without_zeros, whole)]

    def refuse_unknown(
        self,
        encoded: Encoded,
        where: str,
        counted: np.ndarray | None = None,
        *,
        limit: float = MOST_UNKNOWN,
        elsewhere: Callable[[pa.Array], str | None] = lambda unknown: None,
    ) -> None:
        """Raise CatalogError when more than `limit` of the interactions are of unknown items.

        Args:
            where: file and field, for the message.
            counted: mask of the rows that count; None: all.
            elsewhere: unknown ids -> a sentence if they, or the ids of the items, stand in another column.
        """
        counts, rows = encoded.counts(counted), self.rows(encoded.ids)
        total, lost = int(counts.sum()), int(counts[rows < 0].sum())
        if not total or lost <= limit * total:
            return
        unknown = encoded.ids.filter(pa.array((rows < 0) & (counts > 0)))
        cause = self._cause(unknown.slice(0, _SAMPLE)) or elsewhere(unknown.slice(0, _SAMPLE))
        cause = cause or "the file belongs to another catalogue, or names the items by other ids; name the file that belongs to this one"
        amount = "none" if lost == total else f"only {total - lost:,}"
        raise CatalogError(
            f"{where}: {amount} of {total:,} interactions is of an item of the catalogue, expected at least {1 - limit:.0%}; "
            f"unknown ids are {_examples(unknown)}, ids of items are {_examples(self.ids)}; likely cause: {cause}"
        )

    def _cause(self, unknown: pa.Array) -> str | None:
        """The likely cause and its remedy, if another spelling would make half of the unknown ids known."""
        for side, ids in (("the log", unknown), ("the items table", self.ids)):
            if 2 * _count(ids, ROUNDED) > len(ids):
                return f"the ids of {side} were rounded by a spreadsheet, like {ids[0].as_py()!r}; export them again as text"
        causes = {
            "the ids differ in upper and lower case; write them in the same way": pc.utf8_lower,
            "the ids differ in white space, quotes or invisible characters; write them in the same way": lambda ids: (
                pc.replace_substring_regex(ids, _DECORATION, "")
            ),
            "the ids differ in leading zeros, which are part of an item's id; write both columns as text with their zeros": _without_zeros,
            "the ids of one side end in '.0', as numbers with decimals do; write them as whole numbers": _without_float,
        }
        for cause, change in causes.items():
            if self._helps(unknown, change, change):
                return cause
        for side, ids in (("the log", unknown), ("the items table", self.ids)):
            prefix = _common_beginning(ids)
            for length in range(len(prefix), 0, -1):
                cut = _after(length)
                if self._helps(unknown, *((cut, _same) if side == "the log" else (_same, cut))):
                    return f"the ids of {side} begin with {prefix[:length]!r}, the others do not; write them in the same way"
        return None

    def _helps(self, unknown: pa.Array, theirs: Callable[[pa.Array], pa.Array], ours: Callable[[pa.Array], pa.Array]) -> bool:
        return 2 * int((_index(theirs(unknown), ours(self.ids)) >= 0).sum()) > len(unknown)


def in_column(name: str, values: pa.ChunkedArray, ids: pa.Array) -> bool:
    """Whether more than half of the `ids` are values of a column of ids; False for columns that hold other things."""
    try:
        found = encode(values, name).ids
    except CatalogError:
        return False
    return len(ids) > 0 and 2 * int((_index(ids, found) >= 0).sum()) > len(ids)


def _index(ids: pa.Array, value_set: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(ids, value_set=value_set, skip_nulls=True), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _same(ids: pa.Array) -> pa.Array:
    return ids


def _after(length: int) -> Callable[[pa.Array], pa.Array]:
    return lambda ids: pc.utf8_slice_codeunits(ids, length)


def _without_float(ids: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(ids, _FLOAT, r"\1")


def _without_zeros(ids: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(_without_float(ids), _ZEROS, r"\1")


def _common_beginning(ids: pa.Array) -> str:
    """Text that the first ids begin with; '' for a single id."""
    if len(ids) < 2:
        return ""
    some = ids.slice(0, _SAMPLE).to_pylist()
    first, last = min(some), max(some)  # in the order of texts, all others lie between these two
    return first[: next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))]


def _count(ids: pa.Array, pattern: str) -> int:
    return pc.sum(pc.match_substring_regex(ids, pattern)).as_py() or 0


def _any(ids: pa.Array, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(ids, pattern)).as_py())


def _distinct(ids: pa.Array) -> bool:
    return pc.count_distinct(ids).as_py() == len(ids)


def _examples(ids: pa.Array) -> str:
    return ", ".join(map(repr, ids.slice(0, _SHOWN).to_pylist())) or "none"
