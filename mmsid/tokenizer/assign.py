"""Stage `assign`: a trained tokenizer gives every item of a catalogue its Semantic ID.

Items are streamed in batches; what the head scores with goes to a file that is mapped, not held, because collision handling
needs it again for the items of colliding groups only. The tokenizer reads the fields it was trained on.

With `append`, the items of an earlier SID folder keep their rows as they are, and only the others are read. What such a row says
is what was published: an item whose text has changed since keeps its codes until all are assigned anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator

from mmsid.artifacts import manifest_folder, write_json, write_table, writing
from mmsid.catalog import CatalogConfig, load_picture, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.disk import reserve
from mmsid.progress import done, track
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.retrieval import retrieval_table
from mmsid.tokenizer.agreement import FREE_TEXT, evidence_fields, held_to_evidence
from mmsid.tokenizer.inputs import ItemInput, load_inputs
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.publish import HeadScores, head_decoder, publish, rebuild_figures
from mmsid.tokenizer.published import Published

_REBUILT_ROWS = 50_000


class AssignConfig(StageConfig):
    """`tokenizer`: a tokenizer folder. `captions` and `interests`: annotation folders of this catalogue, as far as it reads them.
    `append`: an earlier SID folder of the same tokenizer, of which no code moves; items that left keep theirs in `retired.parquet`.

    `free_text_nats`: an item whose title and description alone would move the beginning of its SID by more than this is assigned
    without them (`agreement`), and named in `overruled.parquet`. For catalogues whose texts strangers write; costs a second reading.
    4 takes the title from 1 % of honest drawn ads and, with the other defences, 94 % of the places that attackers won.
    """

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    collisions: Policy = "relocate"
    append: Path | None = None
    free_text_nats: float | None = Field(None, ge=0)
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _not_onto_itself(self) -> AssignConfig:
        if self.append is not None and self.append.resolve() == self.out.resolve():
            raise ValueError(f"append names {self.append}, the folder that is to be written; give the run another `name`")
        return self


def run(config: AssignConfig) -> Path:
    """Write a SID folder (`sids.parquet`, `intrinsic.json`, `embeddings.safetensors`, exports) to `config.out`.

    Raises:
        ArtifactError, CatalogError, ConfigError: what is wrong with the folders named, or with the catalogue.
        MmsidError: more distinct items than SIDs.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    limits, root = config.catalog.pictures, config.catalog.root
    published = None if config.append is None else Published.read(config.append)
    inputs = {
        "tokenizer": manifest_folder(config.tokenizer),
        "items": config.catalog.items,
        "sequences": config.catalog.sequences,
        "captions": config.captions,
        "interests": config.interests,
        "append": None if config.append is None else manifest_folder(config.append),
    }
    with writing(config.out, stage="assign", config=config, inputs=inputs) as draft:
        tokenizer = ItemTokenizer.from_pretrained(config.tokenizer, open_picture=lambda path: load_picture(path, limits, root))
        tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
        items, fields = load_inputs(catalog, config.captions, config.interests, tokenizer.settings.use or None)
        guarded = config.free_text_nats is not None and any(name in FREE_TEXT for name in fields)
        evidence = load_inputs(catalog, config.captions, config.interests, evidence_fields(fields))[0] if guarded else None
        readings = _Readings(tokenizer, len(items), draft.path / "scores.f32")
        if published is not None:
            published.check(tokenizer, config.collisions)
            readings.take_over(published, published.rows_in([item.item_id for item in catalog.items]))
        readings.read(items, config.batch_size, evidence, config.free_text_nats)
        scores = HeadScores(tokenizer.head, readings.scores_of)
        table, metrics = publish(
            draft.path,
            catalog,
            split,
            readings.codes,
            (tokenizer.codebook_size,) * tokenizer.num_levels,
            collisions=config.collisions,
            scores=scores,
            published=published,
            margin=readings.margin,
            embeddings=readings.embeddings,
            decode=head_decoder(tokenizer.head),
            tokenizer_sha256=tokenizer.sha256(),
            seed=config.seed,
        )
        if published is None and len(items) <= _REBUILT_ROWS:
            metrics |= rebuild_figures(tokenizer.head, readings.last_scores(), table) or {}
            write_json(draft.path / INTRINSIC, metrics)
        readings.close()
        (draft.path / "intrinsic.md").write_text(
            intrinsic_table({"ours": metrics}) + "\n" + retrieval_table({"ours": metrics}), encoding="utf-8"
        )
        if guarded:
            ids = [catalog.items[row].item_id for row in np.flatnonzero(readings.overruled)]
            write_table(draft.path / "overruled.parquet", pa.table({"item_id": pa.array(ids, pa.string())}))
            draft.counts["overruled"] = len(ids)
        draft.counts.update({"items": len(items), "read": len(readings.fresh)})
        draft.extra["collisions"] = metrics["collisions"]
    new = "" if published is None else f" ({len(readings.fresh):,} new, no other moved)"
    done(f"assign: wrote Semantic IDs of {len(items):,} items{new}, {metrics['collisions']['moved']:,} relocated, to {config.out}")
    return config.out


class _Readings:
    """What the tokenizer says of each item, row by row of the catalogue: read now, or taken over from an earlier folder.

    `fresh` (n,) are the rows read now; only of these the head's scores are kept, in a mapped file. `overruled` (N,) is true where an
    item's free texts were left out.
    """

    def __init__(self, tokenizer: ItemTokenizer, count: int, path: Path) -> None:
        settings = tokenizer.settings
        self.tokenizer, self.path = tokenizer, path
        self.width = settings.codebook_size if settings.head == "parallel" else settings.code_dim
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
        self, items: Sequence[ItemInput], batch_size: int, evidence: Sequence[ItemInput] | None = None, free_text_nats: float | None = None
    ) -> None:
        """Encode the fresh rows; with `evidence`, the items without their free texts, held to it (`agreement`)."""
        self._place = np.full(len(items), -1, np.int64)
        self._place[self.fresh] = np.arange(len(self.fresh))
        shape = (max(1, len(self.fresh)), self.tokenizer.num_levels, self.width)
        reserve(self.path, int(np.prod(shape)) * np.dtype(np.float32).itemsize)
        self._scores = np.memmap(self.path, np.float32, "r+", shape=shape)
        stream = self.tokenizer.stream([items[row] for row in self.fresh], batch_size)
        for places, encoded in track(stream, what="assign", total=-(-len(self.fresh) // batch_size), unit="batches"):
            rows = self.fresh[places.numpy()]
            if evidence is not None and free_text_nats is not None:
                encoded, held = held_to_evidence(self.tokenizer, encoded, [evidence[row] for row in rows], free_text_nats)
                self.overruled[rows] = held.numpy()
            self.codes[rows], self.margin[rows] = encoded.raw_codes.numpy(), encoded.margin.numpy()
            self.embeddings[rows], self._scores[places.numpy()] = encoded.embedding.numpy(), encoded.scores.numpy()

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
