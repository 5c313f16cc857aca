"""Does refinement let published SIDs follow newer logs? (docs/experiments/refinement_content.md)

    OMP_NUM_THREADS=1 python benchmarks/refinement_drift.py --dataset demo --seeds 0 1 2 3 4

Tokenizer and SIDs come from the first half of the calendar; the rows may read the logs of three quarters, and the last one judges. Rows:
`stale`, the published codes; `refreshed`, items whose behaviour has become sure are read again (`assign.refresh`); `refined`, what the
acceptance gate published; `refined_kl`, the same with a price on the KL to the start; `retrained`, a new tokenizer whose codes are
renamed to agree with the published ones. A SID transformer is trained on everything before the last quarter and predicts every
user's first interaction in it. Writes refinement_drift.json and .md; finished rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from refinement_content import arguments, over_seeds

from mmsid.artifacts import is_complete, read_json, write_json
from mmsid.catalog import Catalog, CatalogConfig, read_catalog
from mmsid.catalog.subset import with_train_histories
from mmsid.recommend.bench.files import load_dataset
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.recommend.bench.new_items.plan import NewItemPlan
from mmsid.recommend.bench.new_items.protocol import calendar_world
from mmsid.recommend.metrics import paired_bootstraps, per_position
from mmsid.recommend.train import quick_recommender
from mmsid.recommend.training import fit, table_paths
from mmsid.refine import stage as refine
from mmsid.refine.config import RefineConfig
from mmsid.sids import SidTable
from mmsid.tokenizer import assign, train

ROWS = ("stale", "refreshed", "refined", "refined_kl", "retrained")
METRICS = ("NDCG@10", "HR@10")
KL = 0.3  # reward units per nat, of refined_kl


class Quarters:
    """Catalogues with the logs of the first half and of the first three quarters of the calendar, and the split that judges."""

    def __init__(self, catalog: Catalog, config: CatalogConfig, folder: Path) -> None:
        half, self.whole = (calendar_world(catalog, config.split, until) for until in (0.5, 0.75))
        self.half = with_train_histories(config, catalog, half.fit.train, folder / "half", half.fit.valid)
        self.newer = with_train_histories(config, catalog, self.whole.fit.train, folder / "newer", self.whole.fit.valid)


class Seed:
    """SIDs of one seed; every folder is made once."""

    def __init__(self, dataset: Any, plan: NewItemPlan, quarters: Quarters, item_ids: list[str], seed: int, work: Path) -> None:
        self.plan, self.quarters, self.item_ids, self.seed, self.work = plan, quarters, item_ids, seed, work / f"seed{seed}"
        self.common = {"captions": dataset.captions, "interests": dataset.interests, "seed": seed}

    def sids(self, row: str) -> SidTable:
        """SIDs of a row, rows as in the catalogue."""
        tokenizer, stale, quarters = self.work / "tokenizer", self.work / "stale", self.quarters
        self._make(tokenizer, lambda out: train.run(self._training(out, quarters.half)))
        self._make(stale, lambda out: assign.run(self._assigning(out, tokenizer, quarters.half)))
        folder = self.work / row
        if row == "refreshed":
            self._make(folder, lambda out: assign.run(self._assigning(out, tokenizer, quarters.newer, append=stale, refresh=True)))
        elif row == "retrained":
            again = self.work / "retrained_tokenizer"
            self._make(again, lambda out: train.run(self._training(out, quarters.newer, align_codes_to=stale)))
            self._make(folder, lambda out: assign.run(self._assigning(out, again, quarters.newer)))
        elif row != "stale":
            loop = {"kl": KL} if row == "refined_kl" else {}
            given = {"catalog": quarters.newer, "tokenizer": tokenizer, "sids": stale, "out": folder, "loop": loop} | self.common
            self._make(folder, lambda out: refine.run(RefineConfig(**given), quick_recommender(quarters.newer)))
            folder = folder / "sids"
        return SidTable.load(folder).align(self.item_ids)

    def _make(self, folder: Path, make: Callable[[Path], Any]) -> None:
        if not is_complete(folder):
            make(folder)

    def _training(self, out: Path, catalog: CatalogConfig, **changes: Any) -> train.TrainTokenizerConfig:
        plain = self.plan.tokenizer(self.seed).model_dump(exclude_unset=True)
        return train.TrainTokenizerConfig(**plain | {"out": out, "catalog": catalog} | changes)

    def _assigning(self, out: Path, tokenizer: Path, catalog: CatalogConfig, **changes: Any) -> assign.AssignConfig:
        return assign.AssignConfig(out=out, tokenizer=tokenizer, catalog=catalog, **self.common, **changes)

    def result(self, row: str) -> Path:
        """File of the figures of a row."""
        return self.work / f"{row}.json"

    def judge(self, row: str, suite: NewItemsSuite) -> None:
        """Train and rank the SID transformer on the SIDs of a row, and write its figures."""
        table, whole = self.sids(row), self.quarters.whole.whole
        fitted = fit(table_paths(table), whole, shape=suite.model.shape(), schedule=suite.schedule, seed=self.seed, what=row)
        ranks = fitted.evaluate(whole, "test").ranks
        figures: dict[str, Any] = {metric: per_position(ranks, metric).tolist() for metric in METRICS}
        moved = table.codes != self.sids("stale").codes
        figures |= {"moved": float(moved.any(1).mean()), "moved_per_level": moved.mean(0).tolist()}
        if row.startswith("refined"):
            gate = read_json(self.work / row / "gate.json")
            figures |= {"accepted": gate["accepted"], "reasons": gate["reasons"]}
        write_json(self.result(row), figures)


def main() -> None:
    """Run what is not finished, then write the tables of the data set."""
    parsed = arguments(__doc__, ROWS, "refinement_drift")
    dataset, suite, work = load_dataset(parsed.dataset), NewItemsSuite(protocols=["calendar"]), parsed.work / parsed.dataset
    for folder in (work, parsed.results):
        folder.mkdir(parents=True, exist_ok=True)
    catalog = read_catalog(dataset.catalog)
    plan = NewItemPlan(dataset, suite, catalog.sha256, work, ())
    quarters = Quarters(catalog, dataset.catalog, work)
    item_ids = catalog.item_ids
    seeds = [Seed(dataset, plan, quarters, item_ids, seed, work) for seed in parsed.seeds]
    for one in [] if parsed.report else seeds:
        for row in parsed.rows:
            if not one.result(row).exists():
                one.judge(row, suite)
    write_tables(parsed.results, parsed.dataset, seeds)


def write_tables(folder: Path, name: str, seeds: list[Seed]) -> None:
    """Write the figures of a data set beside those of the others."""
    found = {row: {one.seed: read_json(one.result(row)) for one in seeds if one.result(row).exists()} for row in ROWS}
    methods: dict[str, Any] = {}
    for row, of_seed in found.items():
        if not of_seed:
            continue
        means = {metric: [float(np.mean(figures[metric])) for figures in of_seed.values()] for metric in METRICS}
        methods[row] = {"all": {metric: over_seeds(values) for metric, values in means.items()}}
        methods[row] |= {"moved": float(np.mean([figures["moved"] for figures in of_seed.values()])), "seeds": list(of_seed)}
        if row.startswith("refined"):
            methods[row]["accepted"] = [figures["accepted"] for figures in of_seed.values()]
            methods[row]["reasons"] = [figures["reasons"] for figures in of_seed.values()]
        both = sorted(of_seed.keys() & found["stale"].keys())
        pairs = [tuple(np.array([of[seed][metric] for seed in both]) for of in (of_seed, found["stale"])) for metric in METRICS]
        if row != "stale" and both:
            differences = paired_bootstraps(pairs)
            methods[row]["minus_stale"] = {metric: one._asdict() for metric, one in zip(METRICS, differences, strict=True)}
    path = folder / "refinement_drift.json"
    written = read_json(path) if path.exists() else {"datasets": {}}
    written["datasets"][name] = {"methods": methods}
    write_json(path, written)
    path.with_suffix(".md").write_text(page(written), encoding="utf-8")


def page(written: dict[str, Any]) -> str:
    """Markdown tables of all data sets."""
    lines = [f"# {__doc__.splitlines()[0]}", "", *__doc__.splitlines()[4:], ""]
    for name, found in written["datasets"].items():
        lines += [f"## {name}", "", "| row | seeds | NDCG@10 | HR@10 | moved | minus stale, NDCG@10 | gain per share moved | accepted |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row, figures in found["methods"].items():
            shown = [f"{figures['all'][metric]['mean']:.4f} ± {figures['all'][metric]['sd']:.4f}" for metric in METRICS]
            gap = figures.get("minus_stale", {}).get("NDCG@10")
            gained = f"{gap['mean']:+.4f} ({gap['low']:+.4f} .. {gap['high']:+.4f})" if gap else ""
            share = f"{gap['mean'] / figures['moved']:+.4f}" if gap and figures["moved"] else ""
            accepted = f"{sum(figures['accepted'])} of {len(figures['accepted'])}" if "accepted" in figures else ""
            lines.append(
                f"| {row} | {len(figures['seeds'])} | {' | '.join(shown)} | {figures['moved']:.0%} | {gained} | {share} | {accepted} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
