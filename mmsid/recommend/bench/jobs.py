"""Jobs of a bench: make SIDs, train and rank a recommender on them, or rank the classical baselines.

Every job writes one artifact folder atomically. Test ranks are in a file of their own, which is read only if test results are
requested. The figures of a job (`figures.json`) are those of valid.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmsid.artifacts import MANIFEST, is_complete, read_json, read_manifest, write_json, writing
from mmsid.catalog import Catalog, Split, adjacent_pairs, read_catalog, split_histories
from mmsid.recommend.bench.config import DatasetConfig, RefineArm
from mmsid.recommend.bench.plan import BenchJob
from mmsid.recommend.classical import classical_baselines
from mmsid.recommend.evaluate import PARTS, Evaluation, Part, evaluate
from mmsid.recommend.hybrid import fit_hybrid
from mmsid.recommend.late_fusion import late_fusion
from mmsid.recommend.result_rows import lost_to_collisions, write_ranks
from mmsid.recommend.sasrec import fit_sasrec
from mmsid.recommend.training import fit, table_paths
from mmsid.sids import SidTable, intrinsic_metrics, write_sid_folder
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.readings import load_readings
from mmsid.tokenizer.assign import AssignConfig
from mmsid.tokenizer.assign import run as assign
from mmsid.tokenizer.sid_methods import MethodSources, MethodSpec, import_published, make_sids
from mmsid.tokenizer.train import run as train_tokenizer
from mmsid.tokenizer.train_config import TrainTokenizerConfig

# control of a refine arm -> function from the keys of the stage refine to the SID folder written. Worker processes import it by name.
Refiners = Mapping[str, Callable[[dict[str, Any]], Path]]

FIGURES = "figures.json"


class Bench:
    """Runs jobs on one data set, which is read once.

    Args:
        inputs: folder of files that all jobs share (text embeddings).
        refine: control -> function that refines the SIDs of an arm.
    """

    def __init__(self, dataset: DatasetConfig, inputs: Path, refine: Refiners | None = None) -> None:
        self.dataset, self.refine = dataset, refine or {}
        self.catalog: Catalog = read_catalog(dataset.catalog)
        self.split: Split = split_histories(self.catalog, dataset.catalog.split)
        self.sources = MethodSources(
            catalog=self.catalog,
            split=self.split,
            captions=dataset.captions,
            interests=dataset.interests,
            use=dataset.use,
            cache=inputs,
        )

    def __call__(self, job: BenchJob) -> None:
        """Run a job, unless its folder is complete."""
        if is_complete(job.folder):
            return
        with writing(job.folder, stage=f"bench_{job.kind}", config=job.made_from | {"seed": job.seed}, inputs={"sids": job.sids}) as draft:
            if job.kind == "sids":
                self._make_sids(job, draft.path)
            elif job.kind == "classical":
                self._rank_classical(draft.path)
            else:
                self._fit(job, draft.path)

    def _make_sids(self, job: BenchJob, folder: Path) -> None:
        started, earlier = time.perf_counter(), 0.0
        if isinstance(job.spec, MethodSpec):
            table = make_sids(job.spec, self.sources, folder, job.seed)
        elif isinstance(job.spec, TrainTokenizerConfig):
            table, earlier = self._train_tokenizer(job.spec, job, folder)
        elif isinstance(job.spec, RefineArm):
            table = self._refine(job.spec, job, folder)
        else:
            table = self._import(job, folder)
        intrinsic = read_json(folder / INTRINSIC)
        lift = intrinsic.get("coengagement", {}).get("lift")
        figures = {
            "collisions": lost_to_collisions(table),
            "perplexity": [level["perplexity"] for level in intrinsic["levels"]],
            "codebook_sizes": intrinsic["codebook_sizes"],
            "level_1_lift": lift[0] if lift else None,
            "v_measure": finest_v_measures(intrinsic.get("categories", [])),
            "seconds": earlier + time.perf_counter() - started,
        }
        write_json(folder / FIGURES, figures)

    def _train_tokenizer(self, spec: TrainTokenizerConfig, job: BenchJob, folder: Path) -> tuple[SidTable, float]:
        """Run the stages train_tokenizer and assign. Returns the table, and the seconds of a training of an earlier call.

        The tokenizer is in a folder next to that of the job, so that an interrupted training resumes from its last checkpoint.
        """
        config = spec.model_copy(update={"out": _tokenizer_folder(job.folder), "seed": job.seed})
        earlier = read_manifest(config.out, "train_tokenizer")["wall_seconds"] if is_complete(config.out) else 0.0
        if not earlier:
            train_tokenizer(config)
        scratch = folder / "scratch"
        annotations = {"captions": config.captions, "interests": config.interests}
        settings = {"seed": job.seed, "collisions": job.arm.config.collisions}
        assigned = assign(AssignConfig(out=scratch / "sids", tokenizer=config.out, catalog=config.catalog, **annotations, **settings))
        _move_files(assigned, folder)
        return SidTable.load(folder), earlier

    def _refine(self, spec: RefineArm, job: BenchJob, folder: Path) -> SidTable:
        given = {
            "out": folder / "scratch" / "sids",
            "seed": job.seed,
            "catalog": self.dataset.catalog,
            "captions": self.dataset.captions,
            "interests": self.dataset.interests,
            "tokenizer": _tokenizer_folder(job.sids),
            "sids": job.sids,
        }
        _move_files(self.refine[spec.control](spec.settings | given), folder)
        return SidTable.load(folder)

    def _import(self, job: BenchJob, folder: Path) -> SidTable:
        items = self.catalog.items
        table = import_published(self.dataset.published.sids, job.arm.column, [item.item_id for item in items])
        table = replace(table, catalog_sha256=self.catalog.sha256)
        held_out = self.split.held_out_histories()
        categories = [item.categories for item in items]
        intrinsic = intrinsic_metrics(
            table,
            categories if any(categories) else None,
            adjacent_pairs(held_out) if held_out else None,
            content_hashes=[item.content_sha256 for item in items],
        )
        write_sid_folder(folder, table, intrinsic)
        return table

    def _fit(self, job: BenchJob, folder: Path) -> None:
        started = time.perf_counter()
        shape, items = job.arm.config.shape(job.model), self.catalog.items
        if job.arm.config.kind == "sasrec":
            fitted = fit_sasrec(len(items), self.split, shape=shape, schedule=job.schedule, seed=job.seed)
        else:
            item_ids = [item.item_id for item in items]
            paths = table_paths(SidTable.load(job.sids).align(item_ids))
            common = {"shape": shape, "schedule": job.schedule, "seed": job.seed, "what": job.arm.name}
            if job.arm.config.recommender == "hybrid":
                fitted = fit_hybrid(paths, items, self.sources.text, self.split, readings=load_readings(job.sids, item_ids), **common)
            else:
                fitted = fit(paths, self.split, **common)
        found = {part: fitted.evaluate(self.split, part) for part in PARTS}
        seconds = time.perf_counter() - started
        rows = {job.arm.name: (found, {"epochs": fitted.epochs, "stopped_at_valid": fitted.best, "seconds": seconds})}
        if job.fusion is not None:
            hybrid = read_json(job.classical / FIGURES)["hybrid_knn"]["parameters"]
            fused = late_fusion(fitted.score, hybrid, items, self.split)
            found = {part: evaluate(fused.score, self.split, part, len(items)) for part in PARTS}
            seconds = time.perf_counter() - started
            rows[job.fusion] = (found, {"epochs": fitted.epochs, "parameters": fused.parameters, "seconds": seconds})
        self._write(folder, rows)

    def _rank_classical(self, folder: Path) -> None:
        rows = {}
        for baseline in classical_baselines(self.catalog.items, self.split):
            started = time.perf_counter()
            found = {part: evaluate(baseline.score, self.split, part, len(self.catalog.items)) for part in PARTS}
            seconds = baseline.seconds + time.perf_counter() - started
            rows[baseline.name] = (found, {"parameters": baseline.parameters, "seconds": seconds})
        self._write(folder, rows)

    def _write(self, folder: Path, rows: dict[str, tuple[dict[Part, Evaluation], dict[str, Any]]]) -> None:
        """Write the ranks of each part to a separate file, and the figures of valid."""
        figures = {}
        for name, (found, extra) in rows.items():
            for part, evaluation in found.items():
                write_ranks(ranks_path(folder, name, part), {part: evaluation}, self.catalog)
            figures[name] = {"valid": found["valid"].summary()} | extra
        write_json(folder / FIGURES, figures)


def finest_v_measures(records: list[dict[str, Any]]) -> list[float] | None:
    """V-measure of every prefix length against the finest category level that most items have (as in UniSID); None without categories.

    Deeper levels of a ragged tree have so few items that any codes separate them.
    """
    num_items = max((record["items"] for record in records), default=0)
    finest = max((record["depth"] for record in records if 2 * record["items"] > num_items), default=0)
    return [record["v_measure"] for record in records if record["depth"] == finest] or None


def _tokenizer_folder(sids: Path) -> Path:
    """Folder of the tokenizer that made the SIDs in folder `sids`."""
    return sids.with_name(f"{sids.name}-tokenizer")


def _move_files(sids: Path, folder: Path) -> None:
    """Move the files of the SID folder `folder`/scratch/sids into `folder`, and delete `folder`/scratch."""
    for path in sids.iterdir():
        if path.name != MANIFEST:
            path.rename(folder / path.name)
    shutil.rmtree(sids.parent)


def ranks_path(folder: Path, name: str, part: Part) -> Path:
    """File of the ranks of one row of a job."""
    return folder / f"{name}.{part}.parquet"


class Prepare:
    """Picklable function that a worker process calls once, before its first job."""

    def __init__(self, dataset: DatasetConfig, inputs: Path, refine: Refiners | None = None) -> None:
        self.dataset, self.inputs, self.refine = dataset, inputs, refine

    def __call__(self) -> Callable[[BenchJob], None]:
        return Bench(self.dataset, self.inputs, self.refine)
