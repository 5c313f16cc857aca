"""Recommender of ads and products for user histories, saved and loaded as one folder.

It proposes candidates by Semantic IDs, embeddings, co-engagement and words, and ranks them together (`hybrid.py`). Items that
arrive later are added without training and can be recommended at once.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmsid.artifacts import sha256
from mmsid.catalog.item import Item
from mmsid.catalog.records import read_record
from mmsid.errors import ArtifactError, CatalogError, MmsidError
from mmsid.recommend.embedding_source import unit_rows
from mmsid.recommend.history_batch import HistoryBatch, UnlistedRows
from mmsid.recommend.hybrid import BATCH_SIZE, FittedHybrid, rank
from mmsid.recommend.recommender_card import recommender_card
from mmsid.recommend.recommender_files import RecommenderState, load_state, path_tokens, read_embeddings, save_state
from mmsid.recommend.sources import PER_SOURCE
from mmsid.sids.table import SidTable

Status = Literal["personal", "unknown_history", "empty_history"]
SOURCE_NAMES = {"path": "semantic_id", "near": "co_engagement", "next": "co_engagement", "far": "co_engagement"}  # the others keep theirs
FRESH_EVERY = 5  # without a known history, every fifth item is one that nobody has engaged with yet


@dataclass(frozen=True)
class Recommendations:
    """Recommended items of U users, best first.

    Attributes:
        item_ids: per user, at most k item ids.
        scores: per user, one score per item; comparable within one user only. Without a known history: log(1 + interactions).
        sources: per user and item, names of the sources that proposed it: `semantic_id`, `co_engagement`, `words`, `labels`,
            `embedding`. Without a known history: `popular` or `new`.
        status: per user: `personal`, `unknown_history` (no id of the history is known) or `empty_history`.
        unknown_ids: per user, number of ids in the history that the recommender does not know. They are ignored.
    """

    item_ids: list[list[str]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    sources: list[list[tuple[str, ...]]] = field(default_factory=list)
    status: list[Status] = field(default_factory=list)
    unknown_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class UnlistedItems:
    """Items that occur in histories and are not part of the recommender, such as ads of another shop. They are never recommended.

    Attributes:
        items: `mmsid.Item` objects or dictionaries with ids that the recommender does not know.
        sids: SID table that contains them, of the tokenizer of the recommender.
        embeddings: (n, D) of the items, if the recommender uses embeddings.
    """

    items: Sequence[Item | Mapping[str, Any]]
    sids: SidTable
    embeddings: np.ndarray | torch.Tensor | None = None


class Recommender:
    """Hybrid recommender over a catalogue of items with Semantic IDs.

    Load it with `from_pretrained`; `mmsid train_recommender` writes the folder. Several threads may call `recommend`, but not while
    `add_items` or `grow` runs.

    Attributes:
        item_ids: ids of all items, in the order of the rows.
        sids_sha256: hash of (item id, codes) of all items that it knows.
        tokenizer_sha256: hash of the tokenizer that assigned the Semantic IDs.
    """

    def __init__(self, state: RecommenderState) -> None:
        self._state = state
        self._row_of = state.table.row_of

    @classmethod
    def from_fitted(cls, fitted: FittedHybrid, items: Sequence[Item], sids: SidTable) -> Recommender:
        """Recommender from a trained hybrid, the items it was trained with, and their Semantic IDs, all in one order."""
        table = sids.align([item.item_id for item in items])
        hashes = [item.content_sha256 for item in items]
        added, withdrawn = np.zeros(len(items), dtype=np.int64), np.zeros(len(items), dtype=bool)
        return cls(RecommenderState(table, hashes, added, withdrawn, fitted.sources, fitted.rankers, fitted.vectorizers))

    @classmethod
    def from_pretrained(cls, folder: str | Path, sids: SidTable | str | Path | None = None) -> Recommender:
        """Load a recommender.

        Args:
            sids: SID table or SID folder in use now. It may have more items than the recommender; add these with `grow`. Items that
                are missing from it are not recommended. None: the Semantic IDs stored in the folder.

        Raises:
            ArtifactError: not a recommender folder, damaged files, or `sids` gives known items other codes.
        """
        state, settings = load_state(Path(folder))
        recommender = cls(state)
        if settings["sids_sha256"] != recommender.sids_sha256:
            raise ArtifactError(
                f"{folder}: its Semantic IDs have hash {recommender.sids_sha256[:12]}, it was written with {settings['sids_sha256'][:12]}; "
                "copy the folder again"
            )
        if sids is not None:
            recommender._use(sids if isinstance(sids, SidTable) else SidTable.load(sids))
        return recommender

    def save_pretrained(self, folder: str | Path, *, figures: Mapping[str, float] | None = None) -> None:
        """Write the recommender as a new folder with manifest, checksums and a model card.

        Args:
            figures: metrics for the model card, by name.

        Raises:
            ArtifactError: the folder exists and is not empty.
        """
        identity = {"sids_sha256": self.sids_sha256, "tokenizer_sha256": self.tokenizer_sha256}
        save_state(Path(folder), self._state, recommender_card(self._state, identity, figures or {}), identity)

    @property
    def item_ids(self) -> list[str]:
        return self._state.table.item_ids

    @property
    def sids(self) -> SidTable:
        """Semantic IDs of all items, in the order of `item_ids`."""
        return self._state.table

    @property
    def tokenizer_sha256(self) -> str:
        return self._state.table.tokenizer_sha256

    @property
    def sids_sha256(self) -> str:
        return _sids_sha256(self._state.table)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        only: Collection[str] | None = None,
        unlisted: UnlistedItems | None = None,
    ) -> Recommendations:
        """Recommend items to users.

        A user without a known item in the history gets popular items, mixed with items that nobody has engaged with yet.

        Args:
            histories: item ids in time order, one sequence per user. Unknown ids are ignored and counted.
            k: number of items per user; fewer are returned where fewer qualify.
            exclude_seen: do not recommend items of the user's own history.
            only: ids of the items that may be recommended; None: all.
            unlisted: content of ids in the histories that the recommender does not know.

        Raises:
            CatalogError, ArtifactError: `unlisted`, as `add_items`.
            MmsidError: k is below 1, or `histories` is no list of lists of ids.
        """
        if k < 1:
            raise MmsidError(f"k is {k}, expected at least 1")
        if isinstance(histories, str) or any(isinstance(history, str) for history in histories):
            raise MmsidError("histories holds texts, expected one list of item ids per user; wrap the history of one user as [[...]]")
        allowed = self._allowed(only)
        row_of, content = self._row_of, None
        if unlisted is not None and len(unlisted.items):
            ids, content = self._unlisted_rows(unlisted)
            row_of = ChainMap({item_id: len(row_of) + place for place, item_id in enumerate(ids)}, row_of)
        rows = [np.array([row_of[item] for item in history if item in row_of], dtype=np.int64) for history in histories]
        unknown = [len(history) - len(known) for history, known in zip(histories, rows, strict=True)]
        result = Recommendations(*([None] * len(rows) for _ in range(4)), unknown_ids=unknown)
        personal = [user for user, known in enumerate(rows) if len(known)]
        for start in range(0, len(personal), BATCH_SIZE):
            users = personal[start : start + BATCH_SIZE]
            chosen = [rows[user] for user in users]
            batch = HistoryBatch(chosen, len(self._row_of), exclude_seen=exclude_seen, allowed=allowed, unlisted=content)
            self._rank(batch, users, k, result)
        for user, history in enumerate(histories):
            if not len(rows[user]):
                self._fill(result, user, k, allowed, "unknown_history" if len(history) else "empty_history")
        return result

    def add_items(
        self,
        items: Iterable[Item | Mapping[str, Any]],
        sids: SidTable | str | Path,
        embeddings: np.ndarray | torch.Tensor | None = None,
    ) -> int:
        """Add new items. They can be recommended at once; the scores of known items do not change.

        One call builds the search structures of all items again, so add many items in one call.

        Args:
            items: n `mmsid.Item` objects or dictionaries (`mmsid.catalog.records`).
            sids: SID table or SID folder that contains them, of the tokenizer of this recommender.
            embeddings: (n, D) of the items, if the recommender uses embeddings.

        Returns:
            n.

        Raises:
            CatalogError: an item without an id, an id twice, or the id of a known item.
            ArtifactError: an item has no Semantic ID, or the Semantic IDs are of another tokenizer.
            MmsidError: embeddings are missing, or have the wrong shape or values that are NaN or infinite.
        """
        new = [_as_item(item, f"item {place}") for place, item in enumerate(items)]
        self._check_ids(new)
        table = sids if isinstance(sids, SidTable) else SidTable.load(sids)
        self._check_tokenizer(table)
        vectors = self._check_embeddings(embeddings, len(new))
        if not new:
            return 0
        order = sorted(range(len(new)), key=lambda place: (new[place].content_sha256, new[place].item_id))
        new = [new[place] for place in order]
        table = table.align([item.item_id for item in new])
        state = self._state
        tokens = path_tokens(table, state.sources.path.paths.sizes)
        state.sources.add(tokens, *state.vectorizers.transform(new), None if vectors is None else unit_rows(vectors[order]))
        state.table = _joined(state.table, table)
        state.content_hashes += [item.content_sha256 for item in new]
        state.added = np.concatenate([state.added, np.full(len(new), state.added.max(initial=0) + 1)])
        state.withdrawn = np.concatenate([state.withdrawn, np.zeros(len(new), dtype=bool)])
        self._row_of = state.table.row_of
        self.__dict__.pop("_popular", None)
        return len(new)

    def grow(self, items: Iterable[Item], sids: str | Path) -> int:
        """Follow a grown catalogue: add the items that are new, and stop recommending those that left the SID folder.

        Args:
            items: of the catalogue. Known ids are skipped.
            sids: SID folder of the grown catalogue (`mmsid assign --append`), with embeddings.safetensors.

        Returns:
            The number of items added.

        Raises:
            ArtifactError: known items have other codes there, or a new item has no Semantic ID.
        """
        table = SidTable.load(sids)
        self._use(table)
        new = [item for item in items if item.item_id not in self._row_of]
        return self.add_items(new, table, read_embeddings(Path(sids), [item.item_id for item in new]))

    # --- ranking

    def _rank(self, batch: HistoryBatch, users: Sequence[int], k: int, result: Recommendations) -> None:
        sources, ids = self._state.sources, self.item_ids
        candidates, scores = rank(sources, self._state.rankers, batch, max(PER_SOURCE, k))
        for place, user in enumerate(users):
            items, own = candidates.items[place], scores[place].numpy()
            order = np.lexsort((items, -own))[:k]
            order = order[items[order] >= 0]
            result.item_ids[user] = [ids[row] for row in items[order]]
            result.scores[user] = own[order].tolist()
            result.sources[user] = [_source_names(candidates.names, ranks) for ranks in candidates.ranks[place, order]]
            result.status[user] = "personal"

    def _fill(self, result: Recommendations, user: int, k: int, allowed: np.ndarray | None, status: Status) -> None:
        """Popular items, mixed with items without interactions."""
        popular, fresh = (rows if allowed is None else rows[allowed[rows]] for rows in self._popular)
        places = np.arange(1, k + 1) % FRESH_EVERY == 0
        number = min(len(fresh), max(int(places.sum()), k - len(popular)))
        chosen = list(popular[: k - number])
        for place, row in enumerate(fresh[:number]):
            chosen.insert(min(FRESH_EVERY * (place + 1) - 1, len(chosen)), row)
        counts = self._state.sources.counts
        result.item_ids[user] = [self.item_ids[row] for row in chosen]
        result.scores[user] = [float(np.log1p(counts[row])) for row in chosen]
        result.sources[user] = [("popular",) if counts[row] else ("new",) for row in chosen]
        result.status[user] = status

    @cached_property
    def _popular(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows with interactions, most popular first, and rows without, latest first."""
        counts, rows = self._state.sources.counts, np.arange(len(self._row_of))
        known, new = rows[counts > 0], rows[counts == 0]
        return known[np.lexsort((known, -counts[known]))], new[np.lexsort((new, -self._state.added[new]))]

    def _allowed(self, only: Collection[str] | None) -> np.ndarray | None:
        """(N,) bool of the items that may be recommended, or None for all."""
        if only is None:
            return ~self._state.withdrawn if self._state.withdrawn.any() else None
        if isinstance(only, str):
            raise MmsidError(f"only is the text {only!r}, expected a collection of item ids")
        allowed = np.zeros(len(self._row_of), dtype=bool)
        allowed[[self._row_of[item] for item in only if item in self._row_of]] = True
        return allowed & ~self._state.withdrawn

    def _unlisted_rows(self, unlisted: UnlistedItems) -> tuple[list[str], UnlistedRows]:
        """Ids and content of unlisted items."""
        items = [_as_item(item, f"unlisted item {place}") for place, item in enumerate(unlisted.items)]
        self._check_ids(items)
        self._check_tokenizer(unlisted.sids)
        vectors = self._check_embeddings(unlisted.embeddings, len(items))
        state, ids = self._state, [item.item_id for item in items]
        tokens = path_tokens(unlisted.sids.align(ids), state.sources.path.paths.sizes)
        return ids, UnlistedRows(tokens, *state.vectorizers.transform(items), None if vectors is None else unit_rows(vectors))

    # --- checks

    def _use(self, table: SidTable) -> None:
        """Take the items of `table` as the catalogue: known items that it lacks are no longer recommended."""
        self._check_tokenizer(table)
        present = set(table.item_ids)
        shared = [item_id for item_id in self.item_ids if item_id in present]
        own, other = self._state.table.align(shared), table.align(shared)
        ours, theirs = _sids_sha256(own), _sids_sha256(other)
        if ours != theirs:
            first = next(place for place, (a, b) in enumerate(zip(_codes(own), _codes(other), strict=True)) if a != b)
            raise ArtifactError(
                f"the Semantic IDs give known items other codes (first: item {shared[first]!r}, {list(_codes(other)[first])}, the "
                f"recommender has {list(_codes(own)[first])}; hash {theirs[:12]} of the {len(shared)} shared items, the recommender has "
                f"{ours[:12]}); use the SID folder it was trained with, grown by `mmsid assign --append`, or train the recommender again"
            )
        self._state.withdrawn = np.array([item_id not in present for item_id in self.item_ids])

    def _check_tokenizer(self, table: SidTable) -> None:
        if table.tokenizer_sha256 != self.tokenizer_sha256:
            raise ArtifactError(
                f"the Semantic IDs are of tokenizer {table.tokenizer_sha256[:12] or 'unknown'} (hash of ids and codes "
                f"{_sids_sha256(table)[:12]}), the recommender was trained with those of {self.tokenizer_sha256[:12] or 'unknown'} (hash "
                f"{self.sids_sha256[:12]}); use Semantic IDs of the same tokenizer, or train the recommender again"
            )

    def _check_ids(self, items: Sequence[Item]) -> None:
        seen: set[str] = set()
        for place, item in enumerate(items):
            if not item.item_id:
                raise CatalogError(f"item {place} has no item_id; give every item an id")
            if item.item_id in self._row_of:
                raise CatalogError(f"item {place}: the recommender knows {item.item_id!r} already; add new items only, or use `grow`")
            if item.item_id in seen:
                raise CatalogError(f"item {place}: the id {item.item_id!r} occurs twice; ids must be unique")
            seen.add(item.item_id)

    def _check_embeddings(self, embeddings: np.ndarray | torch.Tensor | None, count: int) -> np.ndarray | None:
        source = self._state.sources.embedding
        if source is None or (embeddings is None and not count):
            return None
        if embeddings is None:
            raise MmsidError("the recommender uses embeddings; give those of the new items, one row per item")
        vectors = np.asarray(embeddings, dtype=np.float32)
        expected = (count, source.embeddings.shape[1])
        if vectors.shape != expected:
            raise MmsidError(f"embeddings have shape {vectors.shape}, expected {expected}: one row per item, of the tokenizer's size")
        if not np.isfinite(vectors).all():
            raise MmsidError(
                f"embeddings of {int((~np.isfinite(vectors)).any(1).sum())} items are NaN or infinite; encode these items again"
            )
        return vectors


def _source_names(names: Sequence[str], ranks: np.ndarray) -> tuple[str, ...]:
    """Distinct names of the sources whose rank (S,) is not -1."""
    found = (names[source].split(" ")[0] for source in np.flatnonzero(ranks >= 0))
    return tuple(dict.fromkeys(SOURCE_NAMES.get(name, name) for name in found))


def _as_item(record: Item | Mapping[str, Any], place: str) -> Item:
    """The item of a record. Pictures are not read: the recommender knows them by code and embedding."""
    if isinstance(record, Item):
        return record
    if isinstance(record, Mapping):
        record = {key: value for key, value in record.items() if key not in ("image", "images")}
    found = read_record(record, place)
    content = [found.title, found.description, found.categories, sorted(found.attributes.items())]
    return Item(found.item_id, found.title, found.description, (), found.categories, found.attributes, sha256(content), ())


def _codes(table: SidTable) -> list[tuple[int, ...]]:
    return [tuple(code for code in row if code >= 0) for row in table.full_codes().tolist()]


def _sids_sha256(table: SidTable) -> str:
    """Hash of (item id, codes) in the order of the table."""
    return sha256("".join(f"{item_id}\t{codes}\n" for item_id, codes in zip(table.item_ids, _codes(table), strict=True)))


def _joined(table: SidTable, more: SidTable) -> SidTable:
    """`table` followed by the rows of `more`."""
    arrays = {name: np.concatenate([getattr(table, name), getattr(more, name)]) for name in ("codes", "raw_codes", "margin")}
    suffix = None
    if table.suffix is not None:
        suffix = np.concatenate([table.suffix, np.full(len(more), -1) if more.suffix is None else more.suffix])
    source = None if table.source is None or more.source is None else np.concatenate([table.source, more.source])
    return replace(table, item_ids=table.item_ids + more.item_ids, suffix=suffix, source=source, **arrays)
