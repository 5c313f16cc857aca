"""Stage `train_recommender`: every SID arm under one recommender, classical baselines beside, one ranking table.

Reads sids.parquet of each arm and the catalogue's sequences; knows nothing else of how the SIDs were made. Writes
metrics.json, ranking.md, and ranks/<arm>/<seed>.parquet (one row per user and part), from which every figure and every
paired difference can be computed again. A finished arm and seed in the draft is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field

from mmsid.accelerator import OneProcess, make_accelerator
from mmsid.artifacts import read_json, write_json, writing
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import Section, StageConfig
from mmsid.errors import ConfigError
from mmsid.progress import done
from mmsid.recommend.classical import CLASSICAL_NAMES, classical_baselines
from mmsid.recommend.evaluate import Decoding, Evaluation, Part, evaluate
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.metrics import over_seeds
from mmsid.recommend.result_rows import best_achievable_row, dataset_facts, difference_rows, lost_to_collisions, read_ranks, write_ranks
from mmsid.recommend.result_tables import ranking_table
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import Schedule, Shape, fit, table_paths
from mmsid.sids.folder import read_sid_folder
from mmsid.sids.table import SidTable

Architecture = Literal["sid_transformer", "flat", "tiger"]


class ModelConfig(Section):
    """Sizes of the recommender, each by default the architecture's own; change them for every arm or for none."""

    d_model: int | None = Field(default=None, gt=0)
    layers: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    hidden: int | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    max_history: int | None = Field(default=None, gt=0)

    def shape(self, architecture: Architecture = "sid_transformer") -> Shape:
        """The same sizes, as the model reads them."""
        kind = SidTransformerShape if architecture == "sid_transformer" else FlatShape if architecture == "flat" else TigerShape
        shape = kind(**self.model_dump(exclude_none=True))
        if shape.d_model % shape.heads:
            raise ConfigError(f"train_recommender.model: d_model {shape.d_model} is no multiple of heads {shape.heads}; change one")
        return shape


class TrainRecommenderConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        arms: name -> SID folder (or a sids.parquet).
        seeds: recommender seeds, each arm trained once per seed; default: the run's seed.
        baselines: add popularity, item-kNN, TF-IDF and their hybrid.
        truth: best_achievable.json of the demo catalogue; adds the row of the best achievable figures.
        eval: which parts are ranked at the end. Early stopping and tuning read valid in any case, never test.
        architecture: `instrument` (the one that compares tokenizers), `flat` (a decoder over SID tokens) or `tiger` (an
            encoder-decoder over SID tokens).
        decoding: `exact` scores every item, `beam` searches with `beam` beams; `auto` is exact for the instrument up to
            20,000 items, else beam.
        baseline: the arm that the others are compared with; default: `balanced_rq` where it is an arm, else the first.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"arms": "variants", "floors": "classical_baselines", "truth": "best_achievable"}
    renamed_values: ClassVar[dict[str, dict[str, str]]] = {"architecture": {"instrument": "sid_transformer"}}

    catalog: CatalogConfig
    variants: dict[str, Path] = Field(min_length=1)
    seeds: list[int] | None = Field(default=None, min_length=1)
    architecture: Architecture = "sid_transformer"
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    classical_baselines: bool = True
    best_achievable: Path | None = None
    eval: Literal["valid", "test", "both"] = "both"
    decoding: Decoding = "auto"
    beam: int = Field(default=50, gt=0)
    baseline: str | None = None


def run(config: TrainRecommenderConfig) -> Path:
    """Train and rank every arm; returns the folder written.

    Raises:
        ConfigError: an arm's name is no folder name, or the baseline is no arm.
        ArtifactError: an arm lacks a SID for an item of the catalogue.
        MmsidError: the catalogue has no sequences to train or to rank on.
    """
    _check(config)
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    if any(not len(split.users(part)) for part in _parts(config)):
        raise ConfigError("train_recommender: no user has an item to rank; give catalog.sequences with histories of 3 items or more")
    item_ids = [item.item_id for item in catalog.items]
    tables = {arm: read_sid_folder(path).align(item_ids) for arm, path in config.variants.items()}
    files = {f"arm {arm}": path if path.suffix == ".parquet" else path / "sids.parquet" for arm, path in config.variants.items()}
    with writing(
        config.out, stage="train_recommender", config=config, inputs=files | {"best_achievable": config.best_achievable}, resume=True
    ) as draft:
        for arm, table in tables.items():
            for seed in _seeds(config):
                _run_arm(config, arm, table, seed, catalog, split, draft.path, accelerator)
        if accelerator.is_main_process:
            if config.classical_baselines:
                _run_classical(config, catalog, split, draft.path)
            rows = _rows(config, tables, draft.path)
            differences = _differences(config, rows, draft.path)
            write_json(draft.path / "metrics.json", {"dataset": dataset_facts(catalog, split), "arms": rows, "differences": differences})
            (draft.path / "ranking.md").write_text(ranking_table(rows, differences), encoding="utf-8")
            draft.counts |= {"arms": len(rows), "items": len(catalog.items), "test_users": len(split.users("test"))}
        accelerator.wait_for_everyone()
    done(
        f"train_recommender: wrote figures of {len(config.variants)} SID arms x {len(_seeds(config))} seeds to {config.out / 'ranking.md'}"
    )
    return config.out


def quick_recommender(catalog: CatalogConfig, epochs: int = 8, users: int | None = 4096) -> Callable[[SidTable, int], dict[str, float]]:
    """A function that judges a SID table by a short training run from a seed: valid HR@50, NDCG@10, coverage@10, and all the rest.

    Made for gates: the same catalogue, users and few epochs for every table, valid only.

    Args:
        users: valid users ranked (a fixed sample by content hash); None: all.
    """
    known = read_catalog(catalog)
    split = split_histories(known, catalog.split)
    item_ids = [item.item_id for item in known.items]

    def judge(table: SidTable, seed: int = 0) -> dict[str, float]:
        return quick_valid_figures(table.align(item_ids), split, seed=seed, epochs=epochs, users=users)

    return judge


def quick_valid_figures(table: SidTable, split: Split, *, seed: int = 0, epochs: int = 8, users: int | None = 4096) -> dict[str, float]:
    """Valid figures of an instrument that this process trains alone, for a few epochs, on a table whose rows are the catalogue's rows."""
    schedule = Schedule(epochs=epochs, patience=epochs, stop_users=512)
    fitted = fit(table_paths(table), split, schedule=schedule, seed=seed, accelerator=OneProcess(), what="quick recommender")
    return fitted.evaluate(split, "valid", limit=users).summary()


def _seeds(config: TrainRecommenderConfig) -> list[int]:
    return config.seeds if config.seeds is not None else [config.seed]


def _parts(config: TrainRecommenderConfig) -> tuple[Part, ...]:
    return ("valid", "test") if config.eval == "both" else (config.eval,)


def _check(config: TrainRecommenderConfig) -> None:
    config.model.shape(config.architecture)
    for arm in config.variants:
        if not arm or arm != Path(arm).name or arm.startswith("."):
            raise ConfigError(f"train_recommender.variants: {arm!r} must be usable as a folder name; rename it")
        if config.classical_baselines and arm in CLASSICAL_NAMES:
            raise ConfigError(
                f"train_recommender.variants: {arm!r} is the name of a classical baseline; rename it, or set classical_baselines: false"
            )
    if config.baseline is not None and config.baseline not in config.variants:
        raise ConfigError(f"train_recommender.baseline: {config.baseline!r} is no arm; the arms are {', '.join(config.variants)}")
    if len(set(_seeds(config))) < len(_seeds(config)):
        raise ConfigError(f"train_recommender.seeds: {_seeds(config)} names a seed twice; each seed is one run")


def _run_arm(
    config: TrainRecommenderConfig,
    arm: str,
    table: SidTable,
    seed: int,
    catalog: Catalog,
    split: Split,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    marker = folder / "ranks" / arm / f"{seed}.json"
    # rank 0 alone looks at the disk: the processes must agree on what is left to do
    if broadcast_object_list([marker.is_file() if accelerator.is_main_process else None])[0]:
        return
    fitted = fit(
        table_paths(table),
        split,
        shape=config.model.shape(config.architecture),
        schedule=config.schedule,
        seed=seed,
        accelerator=accelerator,
        what=f"{arm}, seed {seed}",
    )
    if not accelerator.is_main_process:
        return
    found = {part: fitted.evaluate(split, part, config.decoding, config.beam) for part in _parts(config)}
    extra = {"seconds": fitted.seconds, "epochs": fitted.epochs, "stopped_at_valid": fitted.best}
    _finish(marker, found, extra, catalog)


def _run_classical(config: TrainRecommenderConfig, catalog: Catalog, split: Split, folder: Path) -> None:
    markers = {name: folder / "ranks" / name / f"{config.seed}.json" for name in CLASSICAL_NAMES}
    if all(marker.is_file() for marker in markers.values()):
        return
    for baseline in classical_baselines(catalog.items, split):
        started = time.perf_counter()
        found = {part: evaluate(baseline.score, split, part, len(catalog.items)) for part in _parts(config)}
        extra = {"seconds": baseline.seconds + time.perf_counter() - started, "parameters": baseline.parameters}
        _finish(markers[baseline.name], found, extra, catalog)


def _finish(marker: Path, found: dict[Part, Evaluation], extra: dict[str, Any], catalog: Catalog) -> None:
    """The ranks, then the marker that says that they are whole."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_ranks(marker.with_suffix(".parquet"), found, catalog)
    write_json(marker, {part: evaluation.summary() for part, evaluation in found.items()} | extra)


def _rows(config: TrainRecommenderConfig, tables: dict[str, SidTable], folder: Path) -> list[dict[str, Any]]:
    """One row per arm: classical baselines first, then the SID arms in the order of the configuration, the optimum last."""
    arms = [(name, "classical", [config.seed]) for name in CLASSICAL_NAMES if config.classical_baselines]
    arms += [(name, "sid", _seeds(config)) for name in tables]
    rows = []
    for arm, family, seeds in arms:
        found = [read_json(folder / "ranks" / arm / f"{seed}.json") for seed in seeds]
        row = {"arm": arm, "family": family, "seeds": seeds, "metrics": {}, "valid": {}}
        for part, key in (("test", "metrics"), ("valid", "valid")):
            if part in found[0]:
                row[key] = over_seeds([result[part] for result in found])
        row["collisions"] = lost_to_collisions(tables[arm]) if arm in tables else None
        row["seconds"] = round(float(np.mean([result["seconds"] for result in found])), 2)
        rows.append(row | ({"parameters": found[0]["parameters"]} if family == "classical" else {}))
    return rows + ([best_achievable_row(config.best_achievable)] if config.best_achievable is not None else [])


def _differences(config: TrainRecommenderConfig, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Every arm against the baseline, paired over users and seeds, on each part that was ranked."""
    baseline = config.baseline or ("balanced_rq" if "balanced_rq" in config.variants else next(iter(config.variants)))
    found = []
    for part in _parts(config):
        ranks = {}
        for row in rows:
            if row["family"] == "best_achievable":
                continue
            read = [read_ranks(folder / "ranks" / row["arm"] / f"{seed}.parquet", part).ranks for seed in row["seeds"]]
            ranks[row["arm"]] = {None: read[0]} if row["family"] == "classical" else dict(zip(row["seeds"], read, strict=True))
        found += difference_rows(ranks, [baseline], part)
    return found
