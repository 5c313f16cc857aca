"""Stage `assign`: a trained tokenizer gives every item of a catalogue its Semantic ID.

Items are streamed in batches; what the head scores with goes to a file that is mapped, not held, because collision handling
needs it again for the items of colliding groups only. The tokenizer reads the fields it was trained on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from mmsid.artifacts import write_json, write_table, writing
from mmsid.catalog import CatalogConfig, load_picture, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.disk import reserve
from mmsid.progress import done, track
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.retrieval import retrieval_table
from mmsid.tokenizer.agreement import FREE_TEXT, evidence_fields, held_to_evidence
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.publish import HeadScores, head_decoder, publish, rebuild_figures

_REBUILT_ROWS = 50_000


class AssignConfig(StageConfig):
    """`tokenizer`: a tokenizer folder. `captions` and `interests`: annotation folders of this catalogue, as far as it reads them.

    `free_text_nats`: an item whose title and description alone would move the beginning of its SID by more than this is assigned
    without them (`agreement`), and named in `overruled.parquet`. For catalogues whose texts strangers write; costs a second reading.
    4 takes the title from 1 % of honest drawn ads and, with the other defences, 94 % of the places that attackers won.
    """

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    collisions: Policy = "relocate"
    free_text_nats: float | None = Field(None, ge=0)
    batch_size: int = Field(32, ge=1)


def run(config: AssignConfig) -> Path:
    """Write a SID folder (`sids.parquet`, `intrinsic.json`, `embeddings.safetensors`, exports) to `config.out`.

    Raises:
        ArtifactError, CatalogError, ConfigError: what is wrong with the folders named, or with the catalogue.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    limits, root = config.catalog.pictures, config.catalog.root
    inputs = {
        "tokenizer": config.tokenizer,
        "items": config.catalog.items,
        "sequences": config.catalog.sequences,
        "captions": config.captions,
        "interests": config.interests,
    }
    with writing(config.out, stage="assign", config=config, inputs=inputs) as draft:
        tokenizer = ItemTokenizer.from_pretrained(config.tokenizer, open_picture=lambda path: load_picture(path, limits, root))
        tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
        items, fields = load_inputs(catalog, config.captions, config.interests, tokenizer.settings.use or None)
        guarded = config.free_text_nats is not None and any(name in FREE_TEXT for name in fields)
        evidence = load_inputs(catalog, config.captions, config.interests, evidence_fields(fields))[0] if guarded else []
        overruled = np.zeros(len(items), bool)
        settings = tokenizer.settings
        width = settings.codebook_size if settings.head == "parallel" else settings.code_dim
        codes = np.zeros((len(items), settings.num_levels), np.int64)
        margin = np.zeros(len(items), np.float32)
        embeddings = np.zeros((len(items), settings.embedding_dim), np.float32)
        path = draft.path / "scores.f32"
        reserve(path, len(items) * settings.num_levels * width * np.dtype(np.float32).itemsize)
        scores = np.memmap(path, np.float32, "r+", shape=(len(items), settings.num_levels, width))
        batches = -(-len(items) // config.batch_size)
        for rows, encoded in track(tokenizer.stream(items, config.batch_size), what="assign", total=batches, unit="batches"):
            if guarded:
                encoded, held = held_to_evidence(tokenizer, encoded, [evidence[row] for row in rows.tolist()], config.free_text_nats)
                overruled[rows] = held.numpy()
            codes[rows], margin[rows] = encoded.raw_codes.numpy(), encoded.margin.numpy()
            embeddings[rows], scores[rows.numpy()] = encoded.embedding.numpy(), encoded.scores.numpy()
        table, metrics = publish(
            draft.path,
            catalog,
            split,
            codes,
            (settings.codebook_size,) * settings.num_levels,
            collisions=config.collisions,
            scores=HeadScores(tokenizer.head, lambda rows, scores=scores: torch.from_numpy(scores[rows])),
            margin=margin,
            embeddings=embeddings,
            decode=head_decoder(tokenizer.head),
            tokenizer_sha256=tokenizer.sha256(),
            seed=config.seed,
        )
        if len(items) <= _REBUILT_ROWS and (rebuilt := rebuild_figures(tokenizer.head, np.asarray(scores[:, -1]), table)):
            metrics |= rebuilt
            write_json(draft.path / INTRINSIC, metrics)
        path.unlink()
        (draft.path / "intrinsic.md").write_text(
            intrinsic_table({"ours": metrics}) + "\n" + retrieval_table({"ours": metrics}), encoding="utf-8"
        )
        if guarded:
            ids = [catalog.items[row].item_id for row in np.flatnonzero(overruled)]
            write_table(draft.path / "overruled.parquet", pa.table({"item_id": pa.array(ids, pa.string())}))
            draft.counts["overruled"] = len(ids)
        draft.counts.update({"items": len(items)})
        draft.extra["collisions"] = metrics["collisions"]
    published = metrics["published"]
    done(
        f"assign: wrote {len(items):,} Semantic IDs ({config.collisions}, {published['uniqueness']:.1%} unique, "
        f"{metrics['collisions']['moved']:,} moved) to {config.out}"
    )
    return config.out
