"""Stage `train_recommender`: one recommender per SID table and seed, classical baselines, and one ranking table.

The stage reads sids.parquet of each variant and the catalogue's sequences, not how the SIDs were made. It writes
metrics.json, ranking.md and ranks/<variant>/<seed>.parquet (one row per user and part), from which every metric and
every paired difference can be computed again. Finished variants and seeds are not run again.
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
from mmsid.recommend.evaluate import PARTS, Evaluation, Part, evaluate
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.metrics import over_seeds
from mmsid.recommend.result_rows import best_achievable_row, dataset_facts, difference_rows, lost_to_collisions, read_ranks, write_ranks
from mmsid.recommend.result_tables import ranking_table
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import Schedule, Shape, fit, table_paths
from mmsid.sids.table import SidTable

Architecture = Literal["sid_transformer", "flat", "tiger"]
SHAPES: dict[str, type[Shape]] = {"sid_transformer": SidTransformerShape, "flat": FlatShape, "tiger": TigerShape}


class ModelConfig(Section):
    """Sizes of the recommender. None uses the default of the architecture. The sizes apply to all variants."""

    d_model: int | None = Field(default=None, gt=0)
    layers: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    hidden: int | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    max_history: int | None = Field(default=None, gt=0)

    def shape(self, architecture: Architecture = "sid_transformer") -> Shape:
        """Shape of the architecture with these sizes.

        Raises:
            ConfigError: d_model is not a multiple of heads.
        """
        shape = SHAPES[architecture](**self.model_dump(exclude_none=True))
        if shape.d_model % shape.heads:
            raise ConfigError(f"train_recommender.model: d_model {shape.d_model} is not a multiple of heads {shape.heads}; change one")
        return shape


class TrainRecommenderConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        variants: name -> SID folder (or a sids.parquet).
        seeds: recommender seeds; each variant is trained once per seed. Default: the run's seed.
        architecture: `sid_transformer` (used to compare tokenizers), `flat` (a decoder over SID tokens) or `tiger` (an
            encoder-decoder over SID tokens).
        classical_baselines: add popularity, item-kNN, TF-IDF kNN and the classical hybrid.
        best_achievable: best_achievable.json of a demo catalogue; adds its row to the table.
        beam: beams of the search that ranks items; the SID transformer scores up to 20,000 items exactly instead.
        baseline: variant that the others are compared with. Default: `balanced_rq` if it is a variant, else the first one.
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
    beam: int = Field(default=50, gt=0)
    baseline: str | None = None

    @property
    def recommender_seeds(self) -> list[int]:
        """`seeds`, or the run's seed."""
        return self.seeds if self.seeds is not None else [self.seed]


def run(config: TrainRecommenderConfig) -> Path:
    """Train and rank every variant. -> the folder written.

    Raises:
        ConfigError: a variant's name is not a folder name, the baseline is not a variant, or no user can be ranked.
        ArtifactError: a variant has no SID for an item of the catalogue.
        MmsidError: no user has a train history.
    """
    _check(config)
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    if any(not len(split.users(part)) for part in PARTS):
        raise ConfigError(
            "train_recommender: no user has an item to rank; give catalog.sequences or events with histories of 3 items or more"
        )
    item_ids = [item.item_id for item in catalog.items]
    tables = {name: SidTable.load(path).align(item_ids) for name, path in config.variants.items()}
    inputs = {f"arm {name}": path if path.suffix == ".parquet" else path / "sids.parquet" for name, path in config.variants.items()}
    inputs["best_achievable"] = config.best_achievable
    with writing(config.out, stage="train_recommender", config=config, inputs=inputs, resume=True) as draft:
        for name, table in tables.items():
            for seed in config.recommender_seeds:
                _run_variant(config, name, table, seed, catalog, split, draft.path, accelerator)
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
        f"train_recommender: wrote metrics of {len(tables)} variants x {len(config.recommender_seeds)} seeds to {config.out / 'ranking.md'}"
    )
    return config.out


def quick_recommender(catalog: CatalogConfig, epochs: int = 8) -> Callable[[SidTable, int], dict[str, float]]:
    """Function that trains a SID transformer on a SID table for a few epochs and returns its valid metrics.

    Acceptance gates use it: every table gets the same catalogue, epochs and 4,096 valid users (a fixed sample by content
    hash). The model is trained by the calling process alone. The function takes a table and a seed.
    """
    items = read_catalog(catalog)
    split = split_histories(items, catalog.split)
    item_ids = [item.item_id for item in items.items]
    schedule = Schedule(epochs=epochs, patience=epochs, stop_users=512)

    def valid_metrics(table: SidTable, seed: int = 0) -> dict[str, float]:
        paths = table_paths(table.align(item_ids))
        fitted = fit(paths, split, schedule=schedule, seed=seed, accelerator=OneProcess(), what="quick recommender")
        return fitted.evaluate(split, "valid", limit=4096).summary()

    return valid_metrics


def _check(config: TrainRecommenderConfig) -> None:
    config.model.shape(config.architecture)
    for name in config.variants:
        if not name or name != Path(name).name or name.startswith("."):
            raise ConfigError(f"train_recommender.variants: {name!r} is not usable as a folder name; rename it")
        if config.classical_baselines and name in CLASSICAL_NAMES:
            raise ConfigError(
                f"train_recommender.variants: {name!r} is the name of a classical baseline; rename it, or set classical_baselines: false"
            )
    if config.baseline is not None and config.baseline not in config.variants:
        raise ConfigError(
            f"train_recommender.baseline: {config.baseline!r} is not a variant; the variants are {', '.join(config.variants)}"
        )
    seeds = config.recommender_seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"train_recommender.seeds: {seeds} contains a seed twice; remove the repetition")


def _run_variant(
    config: TrainRecommenderConfig,
    name: str,
    table: SidTable,
    seed: int,
    catalog: Catalog,
    split: Split,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    marker = folder / "ranks" / name / f"{seed}.json"
    # rank 0 checks the disk for all processes, so that they agree on the remaining work
    if broadcast_object_list([marker.is_file() if accelerator.is_main_process else None])[0]:
        return
    fitted = fit(
        table_paths(table),
        split,
        shape=config.model.shape(config.architecture),
        schedule=config.schedule,
        seed=seed,
        accelerator=accelerator,
        what=f"{name}, seed {seed}",
    )
    if not accelerator.is_main_process:
        return
    evaluations = {part: fitted.evaluate(split, part, beam=config.beam) for part in PARTS}
    extra = {"seconds": fitted.seconds, "epochs": fitted.epochs, "stopped_at_valid": fitted.best}
    _write_result(marker, evaluations, extra, catalog)


def _run_classical(config: TrainRecommenderConfig, catalog: Catalog, split: Split, folder: Path) -> None:
    markers = {name: folder / "ranks" / name / f"{config.seed}.json" for name in CLASSICAL_NAMES}
    if all(marker.is_file() for marker in markers.values()):
        return
    for baseline in classical_baselines(catalog.items, split):
        started = time.perf_counter()
        evaluations = {part: evaluate(baseline.score, split, part, len(catalog.items)) for part in PARTS}
        extra = {"seconds": baseline.seconds + time.perf_counter() - started, "parameters": baseline.parameters}
        _write_result(markers[baseline.name], evaluations, extra, catalog)


def _write_result(marker: Path, evaluations: dict[Part, Evaluation], extra: dict[str, Any], catalog: Catalog) -> None:
    """Write the ranks, then the metrics, whose file marks the result as complete."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_ranks(marker.with_suffix(".parquet"), evaluations, catalog)
    write_json(marker, {part: evaluation.summary() for part, evaluation in evaluations.items()} | extra)


def _rows(config: TrainRecommenderConfig, tables: dict[str, SidTable], folder: Path) -> list[dict[str, Any]]:
    """One row per method: classical baselines, then the variants in the order of the configuration, then the best achievable."""
    methods = [(name, "classical", [config.seed]) for name in CLASSICAL_NAMES if config.classical_baselines]
    methods += [(name, "sid", config.recommender_seeds) for name in tables]
    rows = []
    for name, family, seeds in methods:
        results = [read_json(folder / "ranks" / name / f"{seed}.json") for seed in seeds]
        metrics, valid = (over_seeds([result[part] for result in results]) for part in ("test", "valid"))
        row = {"arm": name, "family": family, "seeds": seeds, "metrics": metrics, "valid": valid}
        row["collisions"] = lost_to_collisions(tables[name]) if name in tables else None
        row["seconds"] = round(float(np.mean([result["seconds"] for result in results])), 2)
        rows.append(row | ({"parameters": results[0]["parameters"]} if family == "classical" else {}))
    return rows + ([best_achievable_row(config.best_achievable)] if config.best_achievable is not None else [])


def _differences(config: TrainRecommenderConfig, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Every method against the baseline, paired over users and seeds, on each ranked part."""
    baseline = config.baseline or ("balanced_rq" if "balanced_rq" in config.variants else next(iter(config.variants)))
    differences = []
    for part in PARTS:
        ranks = {}
        for row in rows:
            if row["family"] == "best_achievable":
                continue
            by_seed = {seed: read_ranks(folder / "ranks" / row["arm"] / f"{seed}.parquet", part).ranks for seed in row["seeds"]}
            ranks[row["arm"]] = {None: by_seed[config.seed]} if row["family"] == "classical" else by_seed
        differences += difference_rows(ranks, [baseline], part)
    return differences
