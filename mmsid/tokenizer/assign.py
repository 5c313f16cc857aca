"""Stage `assign`: give every item of a catalogue its Semantic ID with a trained tokenizer.

Items are encoded from the fields that the tokenizer was trained on, in this process or on a Ray cluster; collisions are then resolved.
With `append`, the items of an earlier SID folder keep their rows, even if their content has changed since; only new items are encoded.
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
from mmsid.tokenizer.text_trust import FREE_TEXT, trusted_fields

_RECONSTRUCTION_ROWS = 50_000  # items up to which the reconstruction error is measured


class AssignConfig(StageConfig):
    """Configuration of `assign`.

    Attributes:
        tokenizer: a tokenizer folder.
        captions, interests: annotation folders of this catalogue, needed if the tokenizer reads these fields.
        collisions: policy for items with equal raw codes.
        append: an earlier SID folder of the same tokenizer. Its items keep their codes; codes of removed items stay reserved in
            `retired.parquet`.
        free_text_nats: limit for catalogues with untrusted texts. An item whose first code is less likely by more than this without
            title and description is encoded without them and listed in `overruled.parquet` (`mmsid.tokenizer.text_trust`). Items are
            then encoded twice. At 4, 1 % of the clean drawn ads lose their title.
        ray: options of `--engine ray`; not part of the manifest.
    """

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    collisions: Policy = "relocate"
    append: Path | None = None
    free_text_nats: float | None = Field(None, ge=0)
    batch_size: int = Field(32, ge=1)
    ray: RayConfig = Field(default=RayConfig(), exclude=True)

    @model_validator(mode="after")
    def _append_is_not_out(self) -> AssignConfig:
        if self.append is not None and self.append.resolve() == self.out.resolve():
            raise ValueError(f"append is {self.append}, which is also the output folder; give the run another `name`")
        return self


def run(config: AssignConfig, engine: Engine = "local") -> Path:
    """Write a SID folder (`sids.parquet`, `intrinsic.json`, `embeddings.safetensors`, exports) to `config.out`.

    Raises:
        ArtifactError, CatalogError, ConfigError: a folder or the catalogue is unusable.
        MmsidError: there are more distinct items than SIDs.
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
        encoder = CatalogEncoder(config.tokenizer.absolute(), config.catalog, config.batch_size, config.free_text_nats)
        tokenizer = encoder.load()
        items, fields = load_inputs(catalog, config.captions, config.interests, tokenizer.settings.use or None)
        limited = config.free_text_nats is not None and any(name in FREE_TEXT for name in fields)
        trusted = load_inputs(catalog, config.captions, config.interests, trusted_fields(fields))[0] if limited else None
        encodings = CatalogEncodings(tokenizer, len(items), draft.path / "scores.f32")
        if published is not None:
            published.check(tokenizer, config.collisions)
            encodings.copy_published(published, published.rows_in([item.item_id for item in catalog.items]))
        if engine == "ray":
            encodings.compute(items, trusted, partial(encoder.encode_on_ray, tokenizer, config=config.ray))
        else:
            encodings.compute(items, trusted, partial(encoder.encode_locally, tokenizer))
        scores = HeadScores(tokenizer.head, encodings.scores_of)
        table, metrics = publish(
            draft.path,
            catalog,
            split,
            encodings.codes,
            (tokenizer.codebook_size,) * tokenizer.num_levels,
            collisions=config.collisions,
            scores=scores,
            published=published,
            margin=encodings.margin,
            embeddings=encodings.embeddings,
            decode=head_decoder(tokenizer.head),
            tokenizer_sha256=tokenizer.sha256(),
            seed=config.seed,
        )
        if published is None and len(items) <= _RECONSTRUCTION_ROWS:
            metrics |= reconstruction_figures(tokenizer.head, encodings.last_scores(), table) or {}
            write_json(draft.path / INTRINSIC, metrics)
        encodings.close()
        (draft.path / "intrinsic.md").write_text(
            intrinsic_table({"ours": metrics}) + "\n" + retrieval_table({"ours": metrics}), encoding="utf-8"
        )
        if limited:
            ids = [catalog.items[row].item_id for row in np.flatnonzero(encodings.overruled)]
            write_table(draft.path / "overruled.parquet", pa.table({"item_id": pa.array(ids, pa.string())}))
            draft.counts["overruled"] = len(ids)
        draft.counts.update({"items": len(items), "read": len(encodings.fresh)})
        draft.extra["collisions"] = metrics["collisions"]
    new = "" if published is None else f" ({len(encodings.fresh):,} new, the others unchanged)"
    done(f"assign: wrote Semantic IDs of {len(items):,} items{new}, {metrics['collisions']['moved']:,} relocated, to {config.out}")
    return config.out
