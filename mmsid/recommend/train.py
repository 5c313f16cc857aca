"""Stage `train_recommender`: one recommender per SID table and seed, classical baselines, and one ranking table.

The stage reads sids.parquet of each variant and the catalogue's sequences, not how the SIDs were made. It writes
metrics.json, ranking.md and ranks/<variant>/<seed>.parquet (one row per user and part), from which every metric and
every paired difference can be computed again. It keeps one hybrid recommender. Finished variants and seeds stay.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field

from mmsid.accelerator import OneProcess, make_accelerator
from mmsid.artifacts import read_json, write_json, writing
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.catalog.splits import seen_targets_warning
from mmsid.config import Section, StageConfig
from mmsid.errors import ConfigError
from mmsid.progress import done
from mmsid.recommend.classical import CLASSICAL_NAMES, classical_baselines
from mmsid.recommend.evaluate import PARTS, Evaluation, Part, evaluate
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.hybrid import FittedHybrid, fit_hybrid, hybrid_name
from mmsid.recommend.metrics import over_seeds
from mmsid.recommend.recommender import Recommender
from mmsid.recommend.recommender_files import embeddings_file, read_embeddings
from mmsid.recommend.result_rows import best_achievable_row, dataset_facts, difference_rows, lost_to_collisions, read_ranks, write_ranks
from mmsid.recommend.result_tables import ranking_table
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.tiger import TigerShape
from mmsid.recommend.training import Fitted, Schedule, Shape, fit, table_paths
from mmsid.sids.readings import load_readings, readings_file
from mmsid.sids.table import SidTable

Architecture = Literal["sid_transformer", "flat", "tiger", "hybrid"]
SHAPES: dict[str, type[Shape]] = {
    "sid_transformer": SidTransformerShape,
    "flat": FlatShape,
    "tiger": TigerShape,
    "hybrid": SidTransformerShape,
}
RECOMMENDER = "recommender"  # folder of the recommender that the stage keeps


class ModelConfig(Section):
    """Sizes of the recommender. None uses the default of the architecture. The sizes apply to all variants.

    Attributes:
        d_model: width; a multiple of `heads`.
        layers: transformer layers; of the encoder and of the decoder each for `tiger`.
        heads: attention heads per layer.
        hidden: inner width of the feed-forward layers.
        dropout: dropout rate in training.
        max_history: latest items of a history that are read.
        language_model: folder or hub id of a causal language model, for the flat decoder alone: its body replaces the small GPT-2, and
            SID tokens replace its words. No other size than `max_history` applies then.
    """

    d_model: int | None = Field(default=None, gt=0)
    layers: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    hidden: int | None = Field(default=None, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    max_history: int | None = Field(default=None, gt=0)
    language_model: str | None = Field(default=None, min_length=1)

    def shape(self, architecture: Architecture = "sid_transformer") -> Shape:
        """Shape of the architecture with these sizes.

        Raises:
            ConfigError: d_model is not a multiple of heads; language_model with another architecture than `flat` or with other sizes.
        """
        given = self.model_dump(exclude_none=True)
        if self.language_model is not None:
            unread = [name for name in given if name not in ("language_model", "max_history")]
            if architecture != "flat":
                raise ConfigError(f"model.language_model is read by the flat decoder alone, not by {architecture}; remove it")
            if unread:
                raise ConfigError(f"model.language_model sets the sizes of the model; remove {', '.join(unread)}")
        shape = SHAPES[architecture](**given)
        if shape.d_model % shape.heads:
            raise ConfigError(f"train_recommender.model: d_model {shape.d_model} is not a multiple of heads {shape.heads}; change one")
        return shape


class TrainRecommenderConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        catalog: the items and the users with their histories.
        variants: name -> SID folder (or a sids.parquet).
        seeds: recommender seeds; each variant is trained once per seed. Default: the run's seed.
        architecture: `sid_transformer` (used to compare tokenizers), `flat` (a decoder over SID tokens), `tiger` (an
            encoder-decoder over SID tokens), or `hybrid` (candidates of a SID transformer, of embeddings, co-engagement and words,
            ranked together).
        model: sizes of the recommender.
        schedule: training schedule of the recommender.
        recommender: variant whose hybrid recommender is kept in `out`/recommender, trained with the first seed, and shown as a row
            of its own. True: `ours_refined` if it is a variant, else `ours`, else the first one. False: none.
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
    recommender: bool | str = True

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue, and of every variant the SID table and the files that its hybrid recommender reads."""
        files = {f"arm {name}": path if path.suffix == ".parquet" else path / "sids.parquet" for name, path in self.variants.items()}
        files |= {f"embeddings {name}": embeddings_file(self.variants[name]) for name in self.hybrid_variants}
        files |= {f"readings {name}": readings_file(self.variants[name]) for name in self.hybrid_variants}
        return {**self.catalog.inputs(), **files, "best_achievable": self.best_achievable}

    @property
    def kept_variant(self) -> str | None:
        """Variant whose hybrid recommender is kept, or None."""
        if self.recommender is True:
            return next((name for name in ("ours_refined", "ours") if name in self.variants), next(iter(self.variants)))
        return self.recommender or None

    @property
    def kept_recommender(self) -> Path | None:
        """Folder of the recommender that is kept, or None."""
        return None if self.kept_variant is None else self.out / RECOMMENDER

    @property
    def hybrid_variants(self) -> list[str]:
        """Variants on which a hybrid recommender is trained."""
        return list(self.variants) if self.architecture == "hybrid" else [] if self.kept_variant is None else [self.kept_variant]

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
    warning = seen_targets_warning(int(split.target_seen_before("test").sum()), len(split.users("test")))
    if warning is not None:
        warnings.warn(f"train_recommender: {warning}", stacklevel=2)
    item_ids = catalog.item_ids
    tables = {name: SidTable.load(path).align(item_ids) for name, path in config.variants.items()}
    with writing(config.out, stage="train_recommender", config=config, inputs=config.inputs(), resume=True) as draft:
        world, decoder = _World(config, catalog, split, draft.path), None
        for name, table in tables.items():
            for seed in config.recommender_seeds:
                fitted = _run_variant(world, accelerator, name, table, seed)
                if (name, seed) == (config.kept_variant, config.recommender_seeds[0]) and config.architecture == "sid_transformer":
                    decoder = fitted
        if accelerator.is_main_process:
            if config.kept_variant is not None and config.architecture != "hybrid":
                seed = config.recommender_seeds[0]
                marker = world.marker(hybrid_name(config.kept_variant), seed)
                if not marker.is_file():
                    _run_hybrid(world, config.kept_variant, tables[config.kept_variant], seed, marker, decoder)
            if config.classical_baselines:
                _run_classical(world)
            rows = _rows(config, tables, draft.path)
            differences = _differences(config, rows, draft.path)
            write_json(draft.path / "metrics.json", {"dataset": dataset_facts(catalog, split), "arms": rows, "differences": differences})
            ranking = ranking_table(rows, differences) + ("" if warning is None else f"\nWarning: {warning}.\n")
            (draft.path / "ranking.md").write_text(ranking, encoding="utf-8")
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
    if config.kept_variant is not None and config.kept_variant not in config.variants:
        raise ConfigError(
            f"train_recommender.recommender: {config.kept_variant!r} is not a variant; the variants are {', '.join(config.variants)}; "
            "name one of them, or set recommender: false"
        )
    if config.baseline is not None and config.baseline not in config.variants:
        raise ConfigError(
            f"train_recommender.baseline: {config.baseline!r} is not a variant; the variants are {', '.join(config.variants)}"
        )
    seeds = config.recommender_seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"train_recommender.seeds: {seeds} contains a seed twice; remove the repetition")


class _World(NamedTuple):
    """Inputs of all methods, and the folder of their results."""

    config: TrainRecommenderConfig
    catalog: Catalog
    split: Split
    folder: Path

    def marker(self, method: str, seed: int) -> Path:
        """File that marks the result of a method and seed as complete."""
        return self.folder / "ranks" / method / f"{seed}.json"


def _run_variant(world: _World, accelerator: Accelerator, name: str, table: SidTable, seed: int) -> Fitted | None:
    """Train and rank one variant. -> the trained recommender, None if it was finished earlier or is a hybrid."""
    config, marker = world.config, world.marker(name, seed)
    # rank 0 checks the disk for all processes, so that they agree on the remaining work
    if broadcast_object_list([marker.is_file() if accelerator.is_main_process else None])[0]:
        return None
    if config.architecture == "hybrid":
        if accelerator.is_main_process:
            _run_hybrid(world, name, table, seed, marker)
        return None
    fitted = fit(
        table_paths(table),
        world.split,
        shape=config.model.shape(config.architecture),
        schedule=config.schedule,
        seed=seed,
        accelerator=accelerator,
        what=f"{name}, seed {seed}",
    )
    if not accelerator.is_main_process:
        return None
    _write_fitted(world, fitted, marker, {part: fitted.evaluate(world.split, part, beam=config.beam) for part in PARTS})
    return fitted


def _run_hybrid(world: _World, name: str, table: SidTable, seed: int, marker: Path, decoder: Fitted | None = None) -> None:
    """Train and rank the hybrid recommender of a variant, in this process alone, and save the one that the stage keeps."""
    config, items = world.config, world.catalog.items
    fitted = fit_hybrid(
        table_paths(table),
        items,
        read_embeddings(config.variants[name], table.item_ids),
        world.split,
        shape=config.model.shape("hybrid"),
        schedule=config.schedule,
        seed=seed,
        what=f"{hybrid_name(name)}, seed {seed}",
        decoder=decoder,
        readings=load_readings(config.variants[name], table.item_ids),
    )
    evaluations = {part: fitted.evaluate(world.split, part) for part in PARTS}
    if (name, seed) == (config.kept_variant, config.recommender_seeds[0]):
        out = world.folder / RECOMMENDER
        shutil.rmtree(out, ignore_errors=True)  # written by a run that was interrupted before its marker
        figures = {f"{metric} on test": evaluations["test"].summary()[metric] for metric in ("HR@10", "NDCG@10")}
        Recommender.from_fitted(fitted, items, table).save_pretrained(out, figures=figures)
    _write_fitted(world, fitted, marker, evaluations)


def _run_classical(world: _World) -> None:
    markers, items = {name: world.marker(name, world.config.seed) for name in CLASSICAL_NAMES}, world.catalog.items
    if all(marker.is_file() for marker in markers.values()):
        return
    for baseline in classical_baselines(items, world.split):
        started = time.perf_counter()
        evaluations = {part: evaluate(baseline.score, world.split, part, len(items)) for part in PARTS}
        extra = {"seconds": baseline.seconds + time.perf_counter() - started, "parameters": baseline.parameters}
        _write_result(markers[baseline.name], evaluations, extra, world.catalog)


def _write_fitted(world: _World, fitted: Fitted | FittedHybrid, marker: Path, evaluations: dict[Part, Evaluation]) -> None:
    extra = {"seconds": fitted.seconds, "epochs": fitted.epochs, "stopped_at_valid": fitted.best}
    _write_result(marker, evaluations, extra, world.catalog)


def _write_result(marker: Path, evaluations: dict[Part, Evaluation], extra: dict[str, Any], catalog: Catalog) -> None:
    """Write the ranks, then the metrics, whose file marks the result as complete."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_ranks(marker.with_suffix(".parquet"), evaluations, catalog)
    write_json(marker, {part: evaluation.summary() for part, evaluation in evaluations.items()} | extra)


def _rows(config: TrainRecommenderConfig, tables: dict[str, SidTable], folder: Path) -> list[dict[str, Any]]:
    """One row per method: classical baselines, then the variants in the order of the configuration, then the best achievable."""
    methods = [(name, "classical", [config.seed]) for name in CLASSICAL_NAMES if config.classical_baselines]
    methods += [(name, "sid", config.recommender_seeds) for name in tables]
    tables = dict(tables)
    if config.kept_variant is not None and config.architecture != "hybrid":
        methods.append((hybrid_name(config.kept_variant), "sid", config.recommender_seeds[:1]))
        tables[hybrid_name(config.kept_variant)] = tables[config.kept_variant]
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
