"""What the tokenizer says of every item of a catalogue: read in this process, or in the actors of a Ray cluster, to the same codes.

What the head scores with goes to a file that is mapped, not held, because collision handling needs it again for the items of
colliding groups only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmsid.catalog import CatalogConfig, load_picture
from mmsid.disk import reserve
from mmsid.progress import track
from mmsid.ray_pool import RayConfig, Worker, map_on_actors, ray_cluster
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.published_sids import Published
from mmsid.tokenizer.text_trust import held_to_evidence


class EncodedItems(NamedTuple):
    """Of n items: raw codes (n, L), margin (n,), embedding (n, D), what the head scores with (n, L, H), and whether free texts were
    left out (n,)."""

    codes: np.ndarray
    margin: np.ndarray
    embedding: np.ndarray
    scores: np.ndarray
    overruled: np.ndarray


@dataclass(frozen=True)
class CatalogEncoder:
    """How items are read: a tokenizer's folder, where its pictures may lie, and how far a free text is trusted (`agreement`)."""

    tokenizer: Path
    catalog: CatalogConfig
    batch_size: int
    free_text_nats: float | None = None

    def load(self) -> ItemTokenizer:
        """The tokenizer on the machine's best device."""
        limits, root = self.catalog.pictures, self.catalog.root
        tokenizer = ItemTokenizer.from_pretrained(self.tokenizer, open_picture=lambda path: load_picture(path, limits, root))
        return tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")

    def read(
        self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], evidence: Sequence[ItemInput] | None
    ) -> Iterator[tuple[np.ndarray, EncodedItems]]:
        """Batch by batch: places (b,) in `items`, and what the tokenizer says of them; `evidence`: the items without free texts."""
        for places, encoded in tokenizer.stream(items, self.batch_size):
            overruled = torch.zeros(len(places), dtype=torch.bool)
            if evidence is not None and self.free_text_nats is not None:
                without = [evidence[place] for place in places.tolist()]
                encoded, overruled = held_to_evidence(tokenizer, encoded, without, self.free_text_nats)
            columns = (encoded.raw_codes, encoded.margin, encoded.embedding, encoded.scores, overruled)
            yield places.numpy(), EncodedItems(*(column.numpy() for column in columns))

    def here(
        self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], evidence: Sequence[ItemInput] | None
    ) -> Iterator[tuple[np.ndarray, EncodedItems]]:
        """`read`, with a progress bar."""
        yield from track(self.read(tokenizer, items, evidence), what="assign", total=-(-len(items) // self.batch_size), unit="batches")

    def on_ray(
        self, tokenizer: ItemTokenizer, items: Sequence[ItemInput], evidence: Sequence[ItemInput] | None, config: RayConfig
    ) -> Iterator[tuple[np.ndarray, EncodedItems]]:
        """As `here`, in actors that each hold the tokenizer; its folder and the pictures must lie where every machine reads them.

        A task is as many whole windows (`ItemTokenizer.windows`) as hold `rows_per_task` items, so that items meet in the batches in
        which they meet here, padded as little. Codes are the same; the last digits of what the head scores with may differ (an actor
        has other threads), and with them which of two items that fit a code equally well gets it.

        Raises:
            ConfigError: as `on_ray.ray_cluster` and `map_on_actors`; an error of an actor is raised as it was there.
        """
        parts: list[list[int]] = []
        for window in tokenizer.windows(items, self.batch_size):
            if parts and len(parts[-1]) < config.rows_per_task:
                parts[-1].extend(window)
            else:
                parts.append(window)
        pieces = (
            (np.array(part), [items[at] for at in part], None if evidence is None else [evidence[at] for at in part]) for part in parts
        )
        with ray_cluster(config) as ray:
            found = map_on_actors(ray, partial(_worker, self), pieces, config)
            yield from track(found, what="assign on Ray", total=len(parts), unit="pieces")


def _worker(reader: CatalogEncoder) -> Worker:
    tokenizer = reader.load()

    def read(piece: tuple[np.ndarray, list[ItemInput], list[ItemInput] | None]) -> tuple[np.ndarray, EncodedItems]:
        where, items, evidence = piece
        places, readings = zip(*reader.read(tokenizer, items, evidence), strict=True)
        columns = zip(*readings, strict=True)
        return where[np.concatenate(places)], EncodedItems(*(np.concatenate(column) for column in columns))

    return read


class CatalogEncodings:
    """What the tokenizer says of each item, row by row of the catalogue: read now, or taken over from an earlier folder.

    `fresh` (n,) are the rows read now; only of these the head's scores are kept, in a mapped file. `overruled` (N,) is true where an
    item's free texts were left out.
    """

    def __init__(self, tokenizer: ItemTokenizer, count: int, path: Path) -> None:
        settings = tokenizer.settings
        self.path = path
        self.levels, self.width = settings.num_levels, settings.codebook_size if settings.head == "parallel" else settings.code_dim
        self.codes = np.zeros((count, settings.num_levels), np.int64)
        self.margin = np.zeros(count, np.float32)
        self.embeddings = np.zeros((count, settings.embedding_dim), np.float32)
        self.fresh = np.arange(count)
        self.overruled = np.zeros(count, bool)

    def take_over(self, published: Published, rows: np.ndarray) -> None:
        """Rows (N,) of the earlier table, -1 for those to be read."""
        kept = rows >= 0
        self.codes[kept], self.margin[kept] = published.table.raw_codes[rows[kept]], published.table.margin[rows[kept]]
        self.embeddings[kept] = published.embeddings[rows[kept]]
        self.fresh = np.flatnonzero(~kept)

    def read(
        self,
        items: Sequence[ItemInput],
        evidence: Sequence[ItemInput] | None,
        reader: Callable[[list[ItemInput], list[ItemInput] | None], Iterator[tuple[np.ndarray, EncodedItems]]],
    ) -> None:
        """Have the fresh rows read: `reader` gets them, with what is left of them without free texts, and yields in any order."""
        self._place = np.full(len(items), -1, np.int64)
        self._place[self.fresh] = np.arange(len(self.fresh))
        shape = (max(1, len(self.fresh)), self.levels, self.width)
        reserve(self.path, int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._scores = np.memmap(self.path, np.float32, "r+", shape=shape)
        without = None if evidence is None else [evidence[row] for row in self.fresh]
        for places, found in reader([items[row] for row in self.fresh], without):
            rows = self.fresh[places]
            self.codes[rows], self.margin[rows] = found.codes, found.margin
            self.embeddings[rows], self._scores[places] = found.embedding, found.scores
            self.overruled[rows] = found.overruled

    def scores_of(self, rows: np.ndarray) -> torch.Tensor:
        """(n,) fresh rows -> (n, L, D) what the head scores with."""
        return torch.from_numpy(self._scores[self._place[rows]])

    def last_scores(self) -> np.ndarray:
        """(n, D) of the last level, rows as in `fresh`."""
        return np.asarray(self._scores[:, -1])

    def close(self) -> None:
        """Remove the file."""
        del self._scores
        self.path.unlink()
