"""Stage `assign`: a trained tokenizer gives every item of a catalogue its Semantic ID.

The tokenizer reads the fields it was trained on (`readings`, in this process or on a Ray cluster); collisions are handled here.

With `append`, the items of an earlier SID folder keep their rows as they are, and only the others are read. What such a row says
is what was published: an item whose text has changed since keeps its codes until all are assigned anew.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from mmsid.artifacts import manifest_folder, write_json, write_table, writing
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.progress import done
from mmsid.ray_pool import Engine, RayConfig
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.retrieval import retrieval_table
from mmsid.tokenizer.catalog_encoding import CatalogEncoder, CatalogEncodings
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.publish import HeadScores, head_decoder, publish, reconstruction_figures
from mmsid.tokenizer.published_sids import Published
from mmsid.tokenizer.text_trust import FREE_TEXT, evidence_fields

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
    ray: RayConfig = Field(default=RayConfig(), exclude=True)  # how `--engine ray` spreads the reading; in no manifest

    @model_validator(mode="after")
    def _not_onto_itself(self) -> AssignConfig:
        if self.append is not None and self.append.resolve() == self.out.resolve():
            raise ValueError(f"append names {self.append}, the folder that is to be written; give the run another `name`")
        return self


def run(config: AssignConfig, engine: Engine = "local") -> Path:
    """Write a SID folder (`sids.parquet`, `intrinsic.json`, `embeddings.safetensors`, exports) to `config.out`.

    Raises:
        ArtifactError, CatalogError, ConfigError: what is wrong with the folders named, or with the catalogue.
        MmsidError: more distinct items than SIDs.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
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
        reader = CatalogEncoder(config.tokenizer.absolute(), config.catalog, config.batch_size, config.free_text_nats)
        tokenizer = reader.load()
        items, fields = load_inputs(catalog, config.captions, config.interests, tokenizer.settings.use or None)
        guarded = config.free_text_nats is not None and any(name in FREE_TEXT for name in fields)
        evidence = load_inputs(catalog, config.captions, config.interests, evidence_fields(fields))[0] if guarded else None
        readings = CatalogEncodings(tokenizer, len(items), draft.path / "scores.f32")
        if published is not None:
            published.check(tokenizer, config.collisions)
            readings.take_over(published, published.rows_in([item.item_id for item in catalog.items]))
        if engine == "ray":
            readings.read(items, evidence, partial(reader.on_ray, tokenizer, config=config.ray))
        else:
            readings.read(items, evidence, partial(reader.here, tokenizer))
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
            metrics |= reconstruction_figures(tokenizer.head, readings.last_scores(), table) or {}
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
