"""Execution of the jobs of the new-item benchmark. Every job writes one artifact folder atomically."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import is_complete, read_tensors, write_json, write_tensors, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.subset import with_train_histories, write_items
from mmsid.quantize import CodebookScores, balanced_residual_kmeans
from mmsid.recommend.bench.config import DatasetConfig
from mmsid.recommend.bench.jobs import FIGURES, ranks_path
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.recommend.bench.new_items.methods import (
    classical_methods,
    cosine_method,
    decoder_scores,
    fit_decoder,
    fit_hybrid_candidates,
    liger_methods,
    retrained_hybrid,
)
from mmsid.recommend.bench.new_items.plan import Draw, NewItemJob, NewItemPlan
from mmsid.recommend.bench.new_items.protocol import NewItemWorld, world_of
from mmsid.recommend.evaluate import Evaluation, evaluate, evaluate_candidates
from mmsid.recommend.metrics import Ranks
from mmsid.recommend.result_rows import write_ranks
from mmsid.recommend.training import fit, table_paths
from mmsid.sids import SidTable, relocate
from mmsid.sids.append import append_codes
from mmsid.sids.readings import load_readings
from mmsid.sids.table import FILE_NAME
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.sid_methods import MethodSources, random_codes

# (world, text embeddings (N, D), seed) -> ranks of the users `world.whole.users("test")` over all N items. Imported by name in workers.
Peer = Callable[[NewItemWorld, np.ndarray, int], Ranks]
WEIGHTS, EMBEDDINGS = "decoder.safetensors", "embeddings.safetensors"


class NewItemBench:
    """Runs jobs on one data set, which is read once.

    Args:
        work: folder of the jobs, and of files that they share.
        peers: name -> a method from outside this package.
    """

    def __init__(self, dataset: DatasetConfig, suite: NewItemsSuite, work: Path, peers: Mapping[str, Peer] | None = None) -> None:
        self.dataset, self.suite, self.work, self.peers = dataset, suite, work, peers or {}
        self.catalog = read_catalog(dataset.catalog)
        self.sources = MethodSources(
            self.catalog, captions=dataset.captions, interests=dataset.interests, use=dataset.use, cache=work / "inputs"
        )
        self.plan = NewItemPlan(dataset, suite, self.catalog.sha256, work, tuple(self.peers))
        self.item_ids = self.catalog.item_ids
        self.world = lru_cache(maxsize=1)(self._world)

    def __call__(self, job: NewItemJob) -> None:
        """Run a job, unless its folder is complete."""
        if is_complete(job.folder):
            return
        if job.kind == "sids" and job.name == "ours":
            self._append_ours(job)
        elif job.kind == "sids" and job.name == "retrained":
            self._retrain_ours(job)
        else:
            inputs = {"sids": job.sids, "decoder": job.decoder}
            with writing(
                job.folder, stage=f"new_items_{job.kind}", config=job.made_from | {"seed": job.draw.number}, inputs=inputs
            ) as draft:
                if job.kind == "sids":
                    self._make_sids(job, draft.path)
                else:
                    self._rank(job, draft.path)

    def _world(self, draw: Draw) -> NewItemWorld:
        suite = self.suite
        return world_of(self.catalog, self.dataset.catalog.split, draw.protocol, draw.number, suite.share, suite.fit_until)

    def _append_ours(self, job: NewItemJob) -> None:
        """Train and assign on the known items, then append the new ones. No file that is read has an interaction of a new item."""
        known, grown = self.known_catalogues(job.draw)
        tokenizer = self._trained(_beside(job.folder, "tokenizer"), known, job.draw.number)
        published = self._assigned(_beside(job.folder, "published"), tokenizer, known, job.draw.number)
        self._assigned(job.folder, tokenizer, grown, job.draw.number, append=published)

    def _retrain_ours(self, job: NewItemJob) -> None:
        """Train and assign on all items with their train interactions."""
        tokenizer = self._trained(_beside(job.folder, "tokenizer"), self.dataset.catalog, job.draw.number)
        self._assigned(job.folder, tokenizer, self.dataset.catalog, job.draw.number)

    def known_catalogues(self, draw: Draw) -> tuple[CatalogConfig, CatalogConfig]:
        """Catalogues of the known items and of all items, both with the histories that may be fitted on."""
        world, folder = self.world(draw), self.work / str(draw) / "catalogue"
        grown = with_train_histories(self.dataset.catalog, self.catalog, world.fit.train, folder)
        return write_items(grown, [item.item_id for item in world.known_items], folder), grown

    def _trained(self, out: Path, catalog: CatalogConfig, seed: int) -> Path:
        if not is_complete(out):
            train.run(self.plan.tokenizer(seed).model_copy(update={"out": out, "catalog": catalog}))
        return out

    def _assigned(self, out: Path, tokenizer: Path, catalog: CatalogConfig, seed: int, append: Path | None = None) -> Path:
        if not is_complete(out):
            annotations = {"captions": self.dataset.captions, "interests": self.dataset.interests}
            assign.run(assign.AssignConfig(out=out, tokenizer=tokenizer, catalog=catalog, seed=seed, append=append, **annotations))
        return out

    def _make_sids(self, job: NewItemJob, folder: Path) -> None:
        levels, size = self.dataset.num_levels, self.dataset.codebook_size
        hashes = self.catalog.content_hashes
        if job.name == "random":
            codes = random_codes(hashes, levels, size, job.draw.number)
        else:
            codes = appended_balanced_codes(self.sources.text, hashes, self.world(job.draw).known, levels, size, job.draw.number)
        SidTable.from_codes(self.item_ids, codes, (size,) * levels).save(folder / FILE_NAME)

    def _rank(self, job: NewItemJob, folder: Path) -> None:
        """Fit and tune the methods of a job, rank the test users, and write ranks and figures."""
        started, world = time.perf_counter(), self.world(job.draw)
        if job.kind == "peer":
            ranks = self.peers[job.name](world, self.sources.text, job.draw.number)
            found = {job.name: (Evaluation(world.whole.users("test"), ranks, math.nan), {})}
        else:
            scored = self._methods(job, folder)
            rank = evaluate_candidates if job.kind == "hybrid" else evaluate
            ranked = {name: rank(score, world.whole, "test", len(self.item_ids)) for name, (score, _) in scored.items()}
            found = {name: (ranked[name], parameters) for name, (_, parameters) in scored.items()}
        for name, (evaluation, _) in found.items():
            write_ranks(method_ranks(folder, name), {"test": evaluation}, self.catalog)
        figures = {"seconds": time.perf_counter() - started, "parameters": {name: parameters for name, (_, parameters) in found.items()}}
        write_json(folder / FIGURES, figures)

    def _methods(self, job: NewItemJob, folder: Path) -> dict[str, Any]:
        """Scoring function and parameters of each method of a job."""
        world, seed, suite = self.world(job.draw), job.draw.number, self.suite
        if job.kind == "classical":
            return classical_methods(world)
        if job.kind == "cosine":
            return {job.name: cosine_method(world, self.sources.text if job.sids is None else self._embeddings(job.sids))}
        paths = table_paths(SidTable.load(job.sids).align(self.item_ids))
        common = {"shape": suite.model.shape(), "schedule": suite.schedule, "seed": seed, "what": job.name}
        split = world.whole if job.name.startswith("retrained") else world.fit
        if job.kind == "hybrid":
            own = job.sids is not None and (job.sids / EMBEDDINGS).is_file()
            vectors = self._embeddings(job.sids) if own else self.sources.text
            fit_candidates = retrained_hybrid if split is world.whole else fit_hybrid_candidates
            readings = load_readings(job.sids, self.item_ids)
            return {job.name: fit_candidates(world, paths, vectors, readings, **common)}
        if job.kind == "liger":
            return liger_methods(world, read_tensors(job.decoder / WEIGHTS), paths, common["shape"], self._embeddings(job.sids))
        fitted = fit(paths, split, **common) if split is world.whole else fit_decoder(world, paths, **common)
        weights = fitted.model.state_dict()
        write_tensors(folder / WEIGHTS, weights)
        score = decoder_scores(weights, paths, common["shape"])
        return {job.name: (score, {"epochs": fitted.epochs, "stopped_at_valid": fitted.best})}

    def _embeddings(self, sids: Path) -> np.ndarray:
        """EMB vectors (N, D) of a SID folder, in the order of the catalogue."""
        row_of = SidTable.load(sids).row_of
        return read_tensors(sids / EMBEDDINGS)["embeddings"].numpy()[[row_of[item_id] for item_id in self.item_ids]]


def appended_balanced_codes(
    text: np.ndarray, hashes: list[str], known: np.ndarray, num_levels: int, codebook_size: int, seed: int
) -> np.ndarray:
    """Codes (N, L) of balanced residual k-means: codebooks and collisions of the known items, then the new items appended.

    Args:
        text: (N, D) text embeddings.
        hashes: N content hashes.
        known: rows (K,) of the known items.
    """
    sizes = (codebook_size,) * num_levels
    codebooks, raw = balanced_residual_kmeans(text[known], num_levels, codebook_size, seed)
    scores, of_all = CodebookScores(codebooks, text[known]), CodebookScores(codebooks, text)
    of_all.temperature = scores.temperature
    published = np.full((len(text), num_levels), -1)
    published[known] = relocate(raw.numpy(), scores.last_scores, np.array(hashes)[known], sizes, scores.prefix_candidates)
    return append_codes("relocate", codebooks.encode(text).numpy(), hashes, published, sizes, of_all.last_scores, of_all.prefix_candidates)


def method_ranks(folder: Path, method: str) -> Path:
    """File of the ranks of one method of a job."""
    return ranks_path(folder, method.replace("/", "-"), "test")


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}-{what}")


class Prepare:
    """Picklable function that a worker process calls once, before its first job."""

    def __init__(self, dataset: DatasetConfig, suite: NewItemsSuite, work: Path, peers: Mapping[str, Peer] | None = None) -> None:
        self.arguments = (dataset, suite, work, peers)

    def __call__(self) -> Callable[[NewItemJob], None]:
        return NewItemBench(*self.arguments)
