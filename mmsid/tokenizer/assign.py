"""Stage `assign`: give every item of a catalogue its Semantic ID with a trained tokenizer.

Items with train interactions are read with their behaviour, if the tokenizer has a behaviour input; others by their content. Items are
encoded in one process (rank 0 of a launcher) or on a Ray cluster; collisions are then resolved. With `append`, the items of an earlier
SID folder keep their codes, and only new items are encoded, by their content. With `refresh`, some published items move to their
behaviour reading.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from mmsid.artifacts import Draft, manifest_folder, on_main_process, write_json, write_table, write_text, writing
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.id_columns import id_array
from mmsid.progress import done
from mmsid.ray_pool import Engine, RayConfig
from mmsid.sids import intrinsic_table
from mmsid.sids.churn import churn_report, churn_table
from mmsid.sids.collisions import Policy
from mmsid.sids.crowding import warn_of_crowding
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.readings import Readings, load_readings
from mmsid.sids.retrieval import retrieval_table
from mmsid.sids.table import BEHAVIOUR, CONTENT, SidTable
from mmsid.tokenizer.behaviour import ItemBehaviour, behaviour_inputs, behaviour_of_catalog
from mmsid.tokenizer.catalog_encoding import CatalogEncoder, CatalogEncodings
from mmsid.tokenizer.further_readings import further_readings, shortened_behaviour
from mmsid.tokenizer.inputs import annotated_inputs, read_annotations
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.publish import HeadScores, head_decoder, publish, reconstruction_figures
from mmsid.tokenizer.published_sids import Published
from mmsid.tokenizer.refresh import misfit, moving_items, sure_items
from mmsid.tokenizer.text_trust import FREE_TEXT, trusted_fields
from mmsid.tokenizer.trained_annotations import check_annotations, trained_annotations

_RECONSTRUCTION_ROWS = 50_000  # items up to which the reconstruction error is measured


class AssignConfig(StageConfig):
    """Configuration of `assign`.

    Attributes:
        tokenizer: a tokenizer folder.
        catalog: the items, and the logs that behaviour is read from.
        captions, interests: annotation folders of this catalogue, needed if the tokenizer reads these fields.
        collisions: policy for items with equal raw codes.
        append: an earlier SID folder of the same tokenizer. Its items keep their codes; codes of removed items stay reserved in
            `retired.parquet`.
        behaviour: vector files, for a tokenizer that was trained with such files; or "none": all items are read by their content.
        refresh: with `append`: items that were published by their content and have sure behaviour now may move.
        max_moved: largest share of the published items that a refresh moves.
        free_text_nats: limit for catalogues with untrusted texts. An item whose first code is less likely by more than this without
            title and description is encoded without them and listed in `overruled.parquet` (`mmsid.tokenizer.text_trust`). Items are
            then encoded twice. At 4, 1 % of the clean drawn ads lose their title.
        allow_missing_annotations: encode items that were never captioned (or mined) although the tokenizer was trained with captions (or
            interests). Their codes differ from those that captions would give.
        batch_size: items per forward pass.
        ray: options of `--engine ray`; not part of the manifest.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("batch_size", "allow_missing_annotations")

    tokenizer: Path
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    collisions: Policy = "relocate"
    append: Path | None = None
    behaviour: Literal["none"] | tuple[Path, ...] | None = None
    refresh: bool = False
    max_moved: float = Field(0.05, ge=0, le=1)
    free_text_nats: float | None = Field(None, ge=0)
    allow_missing_annotations: bool = Field(False, exclude_if=lambda allowed: not allowed)
    batch_size: int = Field(32, ge=1)
    ray: RayConfig = Field(default=RayConfig(), exclude=True)

    def inputs(self) -> dict[str, Path | None]:
        """The tokenizer, the catalogue, the annotations, the user's behaviour vectors, and the published Semantic IDs."""
        return {
            "tokenizer": manifest_folder(self.tokenizer),
            **self.catalog.inputs(),
            **behaviour_inputs(self.behaviour),
            "captions": self.captions,
            "interests": self.interests,
            "append": None if self.append is None else manifest_folder(self.append),
        }

    @field_validator("behaviour", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) and value != "none" else value

    @model_validator(mode="after")
    def _append_is_not_out(self) -> AssignConfig:
        if self.refresh and self.append is None:
            raise ValueError("refresh moves published items, but append names no SID folder; set append to the published one")
        if self.append is not None and self.append.resolve() == self.out.resolve():
            raise ValueError(f"append is {self.append}, which is also the output folder; give the run another `name`")
        return self


@on_main_process
def run(config: AssignConfig, engine: Engine = "local") -> Path:
    """Write a SID folder (`sids.parquet`, `intrinsic.json`, `embeddings.safetensors`, exports) to `config.out`.

    Raises:
        ArtifactError, CatalogError, ConfigError: a folder or the catalogue is unusable, or items lack annotations that the tokenizer was
            trained with.
        MmsidError: there are more distinct items than SIDs.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    published = None if config.append is None else Published.read(config.append)
    with writing(config.out, stage="assign", config=config, inputs=config.inputs()) as draft:
        encoder = CatalogEncoder(config.tokenizer.absolute(), config.catalog, config.batch_size, config.free_text_nats)
        tokenizer = encoder.load()
        annotations = read_annotations(catalog.items, config.captions, config.interests)
        items, fields = annotated_inputs(catalog, annotations, tokenizer.settings.use or None)
        limited = config.free_text_nats is not None and any(name in FREE_TEXT for name in fields)
        trusted = annotated_inputs(catalog, annotations, trusted_fields(fields))[0] if limited else None
        known = _known_behaviour(config, tokenizer, catalog, split)
        encodings = CatalogEncodings(tokenizer, len(items), draft.path / "scores.f32")
        rows, sure, moving = np.full(len(items), -1), np.zeros(len(items), bool), None
        if published is not None:
            published.check(tokenizer, config.collisions)
            rows = published.rows_in(catalog.item_ids)
            if config.refresh and tokenizer.behaviour is not None:
                sure = sure_items(published, rows, tokenizer.behaviour, known)
            known = known.only(sure)
            encodings.copy_published(published, np.where(sure, -1, rows))
        if not config.allow_missing_annotations:
            check_annotations(
                trained_annotations(config.tokenizer, fields),
                {"captions": config.captions, "interests": config.interests},
                annotations.coverage,
                [catalog.item_ids[row] for row in encodings.fresh],
                appending=published is not None,
            )
        items = known.added_to(items)
        trusted = None if trusted is None else known.added_to(trusted)
        if engine == "ray":
            encodings.compute(items, trusted, partial(encoder.encode_on_ray, tokenizer, config=config.ray))
        else:
            encodings.compute(items, trusted, partial(encoder.encode_locally, tokenizer))
        if published is not None and config.refresh:
            moving = _moving(config, tokenizer, encodings, published, rows, sure)
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
            source=_sources(known, published, rows, moving),
            moving=moving,
            seed=config.seed,
        )
        readings = _readings(tokenizer, catalog, split, encodings, known, table, config.append, rows, moving)
        if readings is not None:
            readings.save(draft.path)
        if published is not None and moving is not None:
            _write_churn(draft, churn_report(published.table, table), moving)
        if published is None and len(items) <= _RECONSTRUCTION_ROWS:
            metrics |= reconstruction_figures(tokenizer.head, encodings.last_scores(), table) or {}
            write_json(draft.path / INTRINSIC, metrics)
        encodings.close()
        tables = intrinsic_table({"ours": metrics}) + "\n" + retrieval_table({"ours": metrics})
        write_text(draft.path / "intrinsic.md", tables + warn_of_crowding("assign", {"ours": metrics}))
        if limited:
            ids = [catalog.item_ids[row] for row in np.flatnonzero(encodings.overruled)]
            write_table(draft.path / "overruled.parquet", pa.table({"item_id": id_array(ids, catalog.integer_ids)}))
            draft.counts["overruled"] = len(ids)
        draft.counts.update({"items": len(items), "read": len(encodings.fresh), "behaviour": int((table.source == BEHAVIOUR).sum())})
        draft.extra["collisions"] = metrics["collisions"]
        if tokenizer.pictures is not None:
            draft.extra["pictures"] = {"without_picture": sum(not item.pictures for item in items)}
    new = ""
    if published is not None:
        others = "the others unchanged" if moving is None else f"{int(moving.sum()):,} of {int((rows >= 0).sum()):,} published ones moved"
        new = f" ({int((rows < 0).sum()):,} new, {others})"
    done(f"assign: wrote Semantic IDs of {len(items):,} items{new}, {metrics['collisions']['moved']:,} relocated, to {config.out}")
    return config.out


def _known_behaviour(config: AssignConfig, tokenizer: ItemTokenizer, catalog: Catalog, split: Split | None) -> ItemBehaviour:
    """Behaviour of the items; no interactions where the tokenizer or the configuration reads none."""
    known = None
    if config.behaviour != "none":
        known = behaviour_of_catalog(tokenizer.behaviour, catalog, split, config.behaviour or ())
    count = len(catalog.items)
    return known or ItemBehaviour(np.zeros((count, 0), np.float32), np.zeros(count))


def _readings(
    tokenizer: ItemTokenizer,
    catalog: Catalog,
    split: Split | None,
    encodings: CatalogEncodings,
    known: ItemBehaviour,
    table: SidTable,
    append: Path | None,
    rows: np.ndarray,
    moving: np.ndarray | None,
) -> Readings | None:
    """Further readings of all items; None for a tokenizer that reads no co-engagement. Items that keep their published codes keep those
    of the earlier folder; None if that has none."""
    shortened = shortened_behaviour(tokenizer.behaviour, catalog, split)
    if shortened is None or not known.vectors.shape[1]:
        return None
    if append is None:
        return further_readings(tokenizer.head, encodings.scores_of, known, shortened, table)
    kept = (rows >= 0) & ~(np.zeros(len(rows), bool) if moving is None else moving)
    earlier = load_readings(append, [item_id for item_id, keep in zip(table.item_ids, kept, strict=True) if keep])
    if earlier is None:
        return None
    fresh = np.flatnonzero(~kept)
    part = table.align([table.item_ids[row] for row in fresh])
    shortened = shortened.only(known.interactions > 0)
    known, shortened = (ItemBehaviour(each.vectors[fresh], each.interactions[fresh]) for each in (known, shortened))
    computed = further_readings(tokenizer.head, lambda places: encodings.scores_of(fresh[places]), known, shortened, part)
    found = Readings(*(np.zeros_like(table.codes) for _ in Readings._fields))
    for name in Readings._fields:
        getattr(found, name)[kept], getattr(found, name)[fresh] = getattr(earlier, name), getattr(computed, name)
    return found


def _write_churn(draft: Draft, report: dict[str, Any], moving: np.ndarray) -> None:
    write_json(draft.path / "churn.json", report)
    (draft.path / "churn.md").write_text(churn_table(report), encoding="utf-8")
    draft.counts["moved"] = int(moving.sum())


def _moving(
    config: AssignConfig, tokenizer: ItemTokenizer, encodings: CatalogEncodings, published: Published, rows: np.ndarray, sure: np.ndarray
) -> np.ndarray:
    """Published items (N,) bool that a refresh moves; the others of `sure` get their published encodings back."""
    candidates = np.flatnonzero(sure)
    moving = np.zeros(len(rows), bool)
    if len(candidates):
        raw, old = encodings.codes[candidates], published.table.codes[rows[candidates]]
        misfits = misfit(tokenizer.head, encodings.scores_of(candidates).to(tokenizer.device), raw, old)
        moving[candidates] = moving_items(misfits, raw, old, int(config.max_moved * (rows >= 0).sum()))
        encodings.keep_published(published, rows, sure & ~moving)
    return moving


def _sources(known: ItemBehaviour, published: Published | None, rows: np.ndarray, moving: np.ndarray | None) -> np.ndarray:
    """(N,) which reading gave each item its codes."""
    source = np.where(known.interactions > 0, BEHAVIOUR, CONTENT).astype(object)
    if published is not None:
        kept = (rows >= 0) & ~(np.zeros(len(rows), bool) if moving is None else moving)
        earlier = published.table.source
        source[kept] = CONTENT if earlier is None else earlier[rows[kept]]
    return source
