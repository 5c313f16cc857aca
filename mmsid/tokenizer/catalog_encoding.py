"""Encoding of all items of a catalogue, in this process or in the actors of a Ray cluster, with the same codes.

Head scores are written to a memory-mapped file, because collision handling needs them again, for colliding items only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmsid.catalog import CatalogConfig
from mmsid.catalog.picture_opener import PictureOpener
from mmsid.disk import reserve
from mmsid.progress import track
from mmsid.ray_pool import RayConfig, Worker, map_on_actors, ray_cluster
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.published_sids import Published
from mmsid.tokenizer.text_trust import limit_free_text


class EncodedItems(NamedTuple):
    """Encodings of n items: raw codes (n, L), margins (n,), embeddings (n, D), head scores (n, L, H), and whether the free texts of an
    item were ignored (n,)."""

    codes: np.ndarray
    margin: np.ndarray
    embedding: np.ndarray
    scores: np.ndarray
    overruled: np.ndarray


EncodedBatches = Iterator[tuple[np.ndarray, EncodedItems]]  # indices (b,) of the items, and their encodings


@dataclass(frozen=True)
class CatalogEncoder:
    """Encodes items with a saved tokenizer.

    Attributes:
        tokenizer: the tokenizer's folder.
        catalog: limits and root folder of the pictures.
        free_text_nats: how far free text may move the first code (`mmsid.tokenizer.text_trust`); None for no limit.
    """

    tokenizer: Path
    catalog: CatalogConfig
    batch_size: int
    free_text_nats: float | None = None

    def load(self) -> ItemTokenizer:
        """Load the tokenizer onto the GPU, if there is one."""
        tokenizer = ItemTokenizer.from_pretrained(self.tokenizer, open_picture=PictureOpener.of(self.catalog))
        return tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")

    def encode(self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], trusted: Sequence[ItemInput] | None) -> EncodedBatches:
        """Encode batch by batch. `trusted` are the same items without free text; None if free text is not limited."""
        for indices, encoded in tokenizer.stream(items, self.batch_size):
            overruled = torch.zeros(len(indices), dtype=torch.bool)
            if trusted is not None and self.free_text_nats is not None:
                trusted_batch = [trusted[index] for index in indices.tolist()]
                encoded, overruled = limit_free_text(tokenizer, encoded, trusted_batch, self.free_text_nats)
            columns = (encoded.raw_codes, encoded.margin, encoded.embedding, encoded.scores, overruled)
            yield indices.numpy(), EncodedItems(*(column.numpy() for column in columns))

    def encode_locally(self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], trusted: Sequence[ItemInput] | None) -> EncodedBatches:
        """`encode` with a progress bar."""
        yield from track(self.encode(tokenizer, items, trusted), what="assign", total=-(-len(items) // self.batch_size), unit="batches")

    def encode_on_ray(
        self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], trusted: Sequence[ItemInput] | None, config: RayConfig
    ) -> EncodedBatches:
        """Encode in Ray actors that each load the tokenizer; every machine must see its folder and the pictures.

        A task consists of whole windows (`ItemTokenizer.windows`), as many as hold `rows_per_task` items, so that batches are the same
        as in one process. Codes are the same, too. The last digits of the scores may differ, since an actor uses another number of
        threads, and with them the order of two items that fit a code equally well.

        Raises:
            ConfigError: as `mmsid.ray_pool.ray_cluster` and `map_on_actors`. Errors of actors are raised unchanged.
        """
        tasks: list[list[int]] = []
        for window in tokenizer.windows(items, self.batch_size):
            if tasks and len(tasks[-1]) < config.rows_per_task:
                tasks[-1].extend(window)
            else:
                tasks.append(window)
        arguments = (
            (np.array(task), [items[row] for row in task], None if trusted is None else [trusted[row] for row in task]) for task in tasks
        )
        with ray_cluster(config) as ray:
            results = map_on_actors(ray, partial(_worker, self), arguments, config)
            yield from track(results, what="assign on Ray", total=len(tasks), unit="tasks")


def _worker(encoder: CatalogEncoder) -> Worker:
    """The function that an actor applies to each task."""
    tokenizer = encoder.load()

    def encode_task(task: tuple[np.ndarray, list[ItemInput], list[ItemInput] | None]) -> tuple[np.ndarray, EncodedItems]:
        rows, items, trusted = task
        indices, encoded = zip(*encoder.encode(tokenizer, items, trusted), strict=True)
        columns = zip(*encoded, strict=True)
        return rows[np.concatenate(indices)], EncodedItems(*(np.concatenate(column) for column in columns))

    return encode_task


class CatalogEncodings:
    """Encodings of all items of a catalogue, row by row, either computed or copied from an earlier SID folder.

    Attributes:
        codes, margin, embeddings: (N, L), (N,), (N, D).
        fresh: (n,) rows that are not copied; head scores are kept for these only, in the memory-mapped file `path`.
        overruled: (N,) True if the free texts of the item were ignored.
    """

    def __init__(self, tokenizer: ItemTokenizer, count: int, path: Path) -> None:
        self.path, self.num_levels, self.score_width = path, tokenizer.num_levels, tokenizer.score_width
        self.codes = np.zeros((count, tokenizer.num_levels), np.int64)
        self.margin = np.zeros(count, np.float32)
        self.embeddings = np.zeros((count, tokenizer.settings.embedding_dim), np.float32)
        self.fresh = np.arange(count)
        self.overruled = np.zeros(count, bool)

    def copy_published(self, published: Published, rows: np.ndarray) -> None:
        """Copy published encodings. `rows` (N,) are the rows of the items in the earlier table, -1 for new items."""
        known = rows >= 0
        self.codes[known], self.margin[known] = published.table.raw_codes[rows[known]], published.table.margin[rows[known]]
        self.embeddings[known] = published.embeddings[rows[known]]
        self.fresh = np.flatnonzero(~known)

    def compute(
        self,
        items: Sequence[ItemInput],
        trusted: Sequence[ItemInput] | None,
        encode: Callable[[list[ItemInput], list[ItemInput] | None], EncodedBatches],
    ) -> None:
        """Encode the fresh rows with `encode`, which may yield batches in any order."""
        self._fresh_index = np.full(len(items), -1, np.int64)
        self._fresh_index[self.fresh] = np.arange(len(self.fresh))
        shape = (max(1, len(self.fresh)), self.num_levels, self.score_width)
        reserve(self.path, int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._scores = np.memmap(self.path, np.float32, "r+", shape=shape)
        fresh_trusted = None if trusted is None else [trusted[row] for row in self.fresh]
        for indices, encoded in encode([items[row] for row in self.fresh], fresh_trusted):
            rows = self.fresh[indices]
            self.codes[rows], self.margin[rows] = encoded.codes, encoded.margin
            self.embeddings[rows], self._scores[indices] = encoded.embedding, encoded.scores
            self.overruled[rows] = encoded.overruled

    def keep_published(self, published: Published, rows: np.ndarray, kept: np.ndarray) -> None:
        """Restore the published codes and margins of re-encoded items: `rows` (N,) as in `copy_published`, `kept` (N,) bool."""
        self.codes[kept], self.margin[kept] = published.table.raw_codes[rows[kept]], published.table.margin[rows[kept]]

    def scores_of(self, rows: np.ndarray) -> torch.Tensor:
        """Head scores (n, L, D) of fresh rows (n,)."""
        return torch.from_numpy(self._scores[self._fresh_index[rows]])

    def last_scores(self) -> np.ndarray:
        """Head scores (n, D) of the last level, rows as in `fresh`."""
        return np.asarray(self._scores[:, -1])

    def close(self) -> None:
        """Remove the file of the scores."""
        del self._scores
        self.path.unlink()
