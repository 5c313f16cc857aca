"""Everything a bundle can do with new ads: caption, interests, codes, nearest ads, recommendations, and appending.

An engine is used by one thread. Batches are for speed only: what an ad gets does not depend on the other ads of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmsid.artifacts import read_manifest
from mmsid.catalog import Item
from mmsid.errors import ArtifactError, MmsidError
from mmsid.recommend.recommender import Recommender, UnlistedItems
from mmsid.report.thumbnails import thumbnail
from mmsid.serve.ads import Ad
from mmsid.serve.annotation import AdAnnotator, AdTexts
from mmsid.serve.annotation_settings import read_settings
from mmsid.serve.bundling import RECOMMENDER
from mmsid.serve.known_items import Appended, KnownItems
from mmsid.serve.store import AppendedStore
from mmsid.sids.append import GrowingSids
from mmsid.sids.table import CONTENT, SidTable, token
from mmsid.tokenizer.bundle import FORMAT, SIDS, load_bundle
from mmsid.tokenizer.publish import HeadScores
from mmsid.tokenizer.published_sids import Published

UNCAPTIONED = "captions and interests are switched off"


@dataclass(frozen=True)
class EncodedAd:
    """One encoded ad.

    Attributes:
        codes: (L,) int64, raw codes.
        margin: smallest lead of a code over the second best, in nats.
        embedding: (D,) float32, of unit length.
        scores: (L, H), projected states.
    """

    ad: Ad
    texts: AdTexts
    codes: np.ndarray
    margin: float
    embedding: np.ndarray
    scores: torch.Tensor

    @property
    def sid(self) -> list[str]:
        """SID tokens of the raw codes."""
        return [token(level, code) for level, code in enumerate(self.codes.tolist())]


@dataclass(frozen=True)
class AppendResult:
    """What became of one ad: `added`, `known` (the same id and content were there), or `conflict` (the id is another ad's); `failed` with
    the reason in `detail`."""

    status: str
    item_id: str
    row: int | None = None
    detail: str = ""


class Engine:
    """A loaded bundle.

    Args:
        folder: bundle of `mmsid bundle`.
        state: sqlite file of appended items; None: items cannot be appended.
        captions: write captions and interests; without, ads are read by what is given with them.

    Attributes:
        known: all items.

    Raises:
        ArtifactError: not a bundle of this version, or a damaged one; or `state` belongs to another bundle.
    """

    def __init__(self, folder: Path, state: Path | None = None, *, captions: bool = True) -> None:
        folder = Path(folder)
        found = read_manifest(folder, "bundle")["config"].get("format")
        if found != FORMAT:
            raise ArtifactError(f"{folder} is a bundle of format {found}, this mmsid reads {FORMAT}; write it again with `mmsid bundle`")
        self.bundle = load_bundle(folder)
        self.version = self.bundle.version
        self.known = KnownItems(self.bundle)
        self.annotator = AdAnnotator(folder) if captions else None
        self.clean_text = read_settings(folder).get("clean_text", False)
        self.recommender: Recommender | None = None
        if RECOMMENDER in self.bundle.parts:
            self.recommender = Recommender.from_pretrained(folder / RECOMMENDER, sids=folder / SIDS)
        self.store = None if state is None else AppendedStore(state, self.version)
        self._growing: GrowingSids | None = None
        if self.store is not None:
            self._take(self.store.items())

    @property
    def tokenizer(self) -> Any:
        """The item tokenizer."""
        return self.bundle.tokenizer

    @property
    def notes(self) -> list[str]:
        """What this bundle cannot do, and why."""
        notes = [*self.annotator.notes] if self.annotator else [UNCAPTIONED]
        return notes if self.recommender is not None else [*notes, "no recommendations: the bundle has no recommender"]

    def warm_up(self) -> None:
        """Load what the first ad would load, so that no request waits for it."""
        blank = Item("", "warm-up", "", (), (), {}, "", ())
        self.encode([Ad(blank, pictures=(Image.new("RGB", (64, 64), "white"),))])

    def close(self) -> None:
        """Close the file of appended items."""
        if self.store is not None:
            self.store.close()

    def encode(self, ads: Sequence[Ad]) -> list[EncodedAd]:
        """Caption, mine and encode ads."""
        if not ads:
            return []
        texts = self.annotator.annotate(ads) if self.annotator else [_given_texts(ad) for ad in ads]
        records = [_record(ad, found, self.tokenizer.reads_pictures) for ad, found in zip(ads, texts, strict=True)]
        encoded = self.tokenizer.encode(records)
        columns = (encoded.raw_codes.numpy(), encoded.margin.tolist(), encoded.embedding.numpy(), encoded.scores)
        return [EncodedAd(*parts) for parts in zip(ads, texts, *columns, strict=True)]

    def recommend(
        self, histories: Sequence[Sequence[str | EncodedAd]], k: int, *, exclude_seen: bool = True, only: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The best k items for histories of item ids and of encoded new ads, oldest first.

        Returns:
            Per history: `status`, `unknown_ids`, and `items` with `row`, `score` and `sources`.

        Raises:
            MmsidError: the bundle has no recommender.
        """
        if self.recommender is None:
            raise MmsidError("this bundle has no recommender; write it from a run with the stage train_recommender")
        unlisted: dict[str, EncodedAd] = {}
        asked = []
        for history in histories:
            ids = []
            for one in history:
                if isinstance(one, EncodedAd):
                    own = f"\0new:{one.ad.item.content_sha256}:{len(unlisted)}"  # no item has such an id
                    unlisted[own] = one
                    ids.append(own)
                else:
                    ids.append(one)
            asked.append(ids)
        content = None
        if unlisted:
            ads = list(unlisted.values())
            items = [_item(one.ad, item_id) for item_id, one in unlisted.items()]
            content = UnlistedItems(items, self._table([*unlisted], np.stack([one.codes for one in ads]), ads), _embeddings(ads))
        found = self.recommender.recommend(asked, k, exclude_seen=exclude_seen, only=only, unlisted=content)
        return [
            {
                "status": found.status[user],
                "unknown_ids": found.unknown_ids[user],
                "items": [
                    {"row": self.known.row_of[item_id], "score": score, "sources": list(sources)}
                    for item_id, score, sources in zip(found.item_ids[user], found.scores[user], found.sources[user], strict=True)
                ],
            }
            for user in range(len(asked))
        ]

    def append(self, ads: Sequence[Ad]) -> list[AppendResult]:
        """Append ads with ids. They are on the disk, and can be recommended, when the call returns.

        Raises:
            ArtifactError: the file cannot be written. Nothing was appended then.
        """
        if self.store is None:
            raise MmsidError("items cannot be appended: no file for them was named (--state)")
        results: list[AppendResult | None] = [self._seen(ad) for ad in ads]
        first: dict[str, int] = {}
        for place, ad in enumerate(ads):
            if results[place] is None:
                first.setdefault(ad.item.item_id, place)
        new = sorted(first.values(), key=lambda place: (ads[place].item.content_sha256, ads[place].item.item_id))
        encoded = self.encode([ads[place] for place in new])
        if encoded:
            failure = self._append_new(encoded)
            for place in new:
                item_id = ads[place].item.item_id
                row = self.known.row_of.get(item_id)
                results[place] = AppendResult("failed", item_id, None, failure) if row is None else AppendResult("added", item_id, row)
        for place, ad in enumerate(ads):  # the same id twice in one call
            if results[place] is None:
                results[place] = self._seen(ad) or results[first[ad.item.item_id]]
        return results  # type: ignore[return-value]

    # --- appending

    def _seen(self, ad: Ad) -> AppendResult | None:
        row = self.known.row_of.get(ad.item.item_id)
        if row is None:
            return None
        if self.known.content_sha256(row) == ad.item.content_sha256:
            return AppendResult("known", ad.item.item_id, row)
        return AppendResult("conflict", ad.item.item_id, row, f"item {ad.item.item_id!r} exists with other content; use another id")

    def _append_new(self, encoded: Sequence[EncodedAd]) -> str:
        """Append encoded ads of distinct new ids. -> '' or the reason why there are no codes for them."""
        head = HeadScores(self.tokenizer.head, lambda rows: torch.stack([encoded[row].scores for row in rows.tolist()]))
        raw = np.stack([one.codes for one in encoded])
        hashes = [one.ad.item.content_sha256 for one in encoded]
        try:
            codes = self._sids().append(raw, hashes, head.last_scores, head.prefix_candidates)
        except MmsidError as error:
            self._growing = None  # it may hold codes that were not published
            return str(error)
        items = [_appended(one, own) for one, own in zip(encoded, codes, strict=True)]
        try:
            self.store.add(items)  # type: ignore[union-attr]
        except ArtifactError:
            self._growing = None
            raise
        self._publish(items)
        return ""

    def _take(self, items: Sequence[Appended]) -> None:
        """Take the items that were appended before this start."""
        if items:
            self._publish(items)

    def _publish(self, items: Sequence[Appended]) -> None:
        """Make stored items visible to everything."""
        if self.recommender is not None:
            ids = [item.item_id for item in items]
            table = self._table(ids, np.stack([item.codes for item in items]), items)
            self.recommender.add_items([_stored_item(item) for item in items], table, _embeddings(items))
        self.known.add(items)

    def _sids(self) -> GrowingSids:
        """Codes that are taken, built with the first append."""
        if self._growing is None:
            published = Published.read(self.bundle.folder / SIDS)
            retired = None if published.retired is None else published.retired.codes
            sizes, hashes = published.table.codebook_sizes, self.known.content_hashes()
            hashes = [content or f"unknown {row}" for row, content in enumerate(hashes)]
            self._growing = GrowingSids(published.policy, self.known.codes, hashes, sizes, retired)
        return self._growing

    def _table(self, ids: Sequence[str], codes: np.ndarray, items: Sequence[EncodedAd | Appended]) -> SidTable:
        own, sizes = self.bundle.table, self.bundle.table.codebook_sizes
        raw = np.stack([one.codes if isinstance(one, EncodedAd) else one.raw_codes for one in items])
        columns = {"raw_codes": raw, "margin": np.array([one.margin for one in items], np.float32)}
        source = np.full(len(ids), CONTENT, dtype=object)
        return SidTable.from_codes(list(ids), codes, sizes, tokenizer_sha256=own.tokenizer_sha256, source=source, **columns)


def _embeddings(items: Sequence[EncodedAd | Appended]) -> np.ndarray:
    return np.stack([one.embedding for one in items])


def _given_texts(ad: Ad) -> AdTexts:
    return AdTexts(ad.caption, tuple((name, 1.0) for name in ad.interests))


def _record(ad: Ad, texts: AdTexts, reads_pictures: bool) -> dict[str, Any]:
    """The ad as `ItemTokenizer.encode` reads it; pictures that only the captioner reads are left out."""
    item = ad.item
    fields = {"title": item.title, "description": item.description, "categories": item.categories, "attributes": item.attributes}
    return fields | {
        "caption": texts.caption,
        "interests": [name for name, _ in texts.interests],
        "images": ad.pictures if reads_pictures else (),
    }


def _item(ad: Ad, item_id: str) -> Item:
    return replace(ad.item, item_id=item_id)


def _appended(one: EncodedAd, codes: np.ndarray) -> Appended:
    item = one.ad.item
    record = {
        "item_id": item.item_id,
        "title": item.title,
        "description": item.description,
        "categories": list(item.categories),
        "attributes": {name: list(labels) for name, labels in item.attributes.items()},
        "caption": one.texts.caption,
        "interests": [name for name, _ in one.texts.interests],
    }
    picture = thumbnail(one.ad.pictures[0]) if one.ad.pictures else None
    return Appended(record, item.content_sha256, codes, one.codes, one.margin, one.embedding, picture)


def _stored_item(item: Appended) -> Item:
    texts = item.record
    attributes = {name: tuple(labels) for name, labels in texts["attributes"].items()}
    return Item(item.item_id, texts["title"], texts["description"], (), tuple(texts["categories"]), attributes, item.content_sha256, ())
