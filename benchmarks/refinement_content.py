"""Does refinement lift a tokenizer that was trained on content alone? (docs/experiments/refinement_content.md)

    OMP_NUM_THREADS=1 python benchmarks/refinement_content.py --dataset demo --seeds 0 1 2 3 4

A seed is also the draw of a tenth of the items that is hidden, with all interactions, from everything that is fitted, and is then appended.
Rows, each judged by a SID transformer of the same seed on test: `content`, the start; `refined`, what the acceptance gate published;
`best_of_n` and `shuffled` (refinement_controls.py, without gate); `behaviour`, the same tokenizer trained with behaviour;
`balanced_rq`, clustering of content and behaviour; `unisid` and `unisid_refined`, the same start with the published losses and head.
Users: all, next item rare (1 to 3 train interactions), next item new. Writes refinement_content.json and .md; finished rows are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from refinement_controls import move

from mmsid.artifacts import is_complete, read_json, read_tensors, write_json, write_tensors
from mmsid.catalog.subset import with_train_histories, write_items
from mmsid.quantize import CodebookScores, balanced_residual_kmeans, fuse
from mmsid.recommend.bench.files import load_dataset
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.recommend.bench.new_items.jobs import NewItemBench
from mmsid.recommend.bench.new_items.methods import decoder_scores, fit_decoder
from mmsid.recommend.bench.new_items.plan import Draw
from mmsid.recommend.evaluate import evaluate
from mmsid.recommend.metrics import Ranks, grouped_bootstrap, per_position
from mmsid.recommend.train import quick_recommender
from mmsid.recommend.training import table_paths
from mmsid.refine import stage as refine
from mmsid.refine.config import RefineConfig
from mmsid.sids import SidTable, relocate
from mmsid.sids.append import append_codes
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.initialization import StartSettings, read_behaviour
from mmsid.tokenizer.ridge import ridge

ROWS = ("content", "refined", "best_of_n", "shuffled", "behaviour", "balanced_rq", "unisid", "unisid_refined")
GROUPS, METRICS = ("all", "rare", "new"), ("NDCG@10", "HR@10")
UNISID = {"loss": "unisid", "learning_rate": 0.001, "head_learning_rate": 0.003}
RIVALS = ("content", "best_of_n", "shuffled", "behaviour", "balanced_rq")


class Seed:
    """Tokenizers and SIDs of one seed; every folder is made once."""

    def __init__(self, bench: NewItemBench, seed: int, work: Path) -> None:
        self.bench, self.seed, self.work = bench, seed, work / f"seed{seed}"
        self.draw = Draw("hidden", seed)
        self.world = bench.world(self.draw)
        fit, dataset = self.world.fit, bench.dataset
        self.grown = with_train_histories(dataset.catalog, bench.catalog, fit.train, self.work / "catalogue", fit.valid)
        self.known = write_items(self.grown, [item.item_id for item in self.world.known_items], self.work / "catalogue")
        self.common = {"captions": dataset.captions, "interests": dataset.interests, "seed": seed}

    def sids(self, row: str) -> SidTable:
        """SIDs of all items, rows as in the catalogue."""
        if row == "balanced_rq":
            return self._balanced_rq()
        kind = "unisid" if row.startswith("unisid") else "behaviour" if row == "behaviour" else "content"
        tokenizer, start = self.work / kind / "tokenizer", self.work / kind / "sids"
        self._make(tokenizer, lambda out: train.run(self._training(kind, out)))
        self._make(start, lambda out: assign.run(self._assigning(out, tokenizer, self.known)))
        published = {"content": start, "behaviour": start, "unisid": start}.get(row, self.work / row)
        given = {"catalog": self.known, "tokenizer": tokenizer, "sids": start, "out": self.work / row} | self.common
        if row.endswith("refined"):
            self._make(published, lambda out: refine.run(RefineConfig(**given), quick_recommender(self.known)))
            tokenizer, published = published / "tokenizer", published / "sids"
        elif published != start:
            self._make(published, lambda out: move(row, given))
        grown = self.work / row / "grown" if published == start else self.work / f"{row}_grown"
        self._make(grown, lambda out: assign.run(self._assigning(out, tokenizer, self.grown, append=published)))
        return SidTable.load(grown).align(self.bench.item_ids)

    def _make(self, folder: Path, make: Callable[[Path], Any]) -> None:
        if not is_complete(folder):
            make(folder)

    def _training(self, kind: str, out: Path) -> train.TrainTokenizerConfig:
        changes = {"behaviour": "coengagement" if kind == "behaviour" else "none"} | (UNISID if kind == "unisid" else {})
        plain = self.bench.plan.tokenizer(self.seed).model_dump(exclude_unset=True)
        return train.TrainTokenizerConfig(**plain | changes | {"out": out, "catalog": self.known})

    def _assigning(self, out: Path, tokenizer: Path, catalog: Any, append: Path | None = None) -> assign.AssignConfig:
        return assign.AssignConfig(out=out, tokenizer=tokenizer, catalog=catalog, append=append, **self.common)

    def _balanced_rq(self) -> SidTable:
        """Clusters of [content; behaviour] of the known items; new items are read by the prediction of that space from content."""
        bench, known, world = self.bench, self.world.known, self.world
        levels, size, text = bench.dataset.num_levels, bench.dataset.codebook_size, bench.sources.text
        behaviour = read_behaviour(world.catalog, world.fit, StartSettings(), self.seed).items.vectors
        space = fuse(text, behaviour)
        codebooks, raw = balanced_residual_kmeans(space[known], levels, size, self.seed)
        weight, bias = ridge(torch.from_numpy(text[known]), torch.from_numpy(space[known]), self.seed)
        read = np.where(world.new[:, None], text @ weight.numpy().T + bias.numpy(), space).astype(np.float32)
        scores, of_all = CodebookScores(codebooks, space[known]), CodebookScores(codebooks, read)
        of_all.temperature = scores.temperature
        hashes, sizes = bench.catalog.content_hashes, (size,) * levels
        published = np.full((len(text), levels), -1)
        published[known] = relocate(raw.numpy(), scores.last_scores, np.array(hashes)[known], sizes, scores.prefix_candidates)
        raw = codebooks.encode(read).numpy()
        codes = append_codes("relocate", raw, hashes, published, sizes, of_all.last_scores, of_all.prefix_candidates)
        return SidTable.from_codes(bench.item_ids, codes, sizes)

    def judge(self, row: str) -> None:
        """Train and rank the SID transformer on the SIDs of a row, and write its ranks and figures."""
        table, world = self.sids(row), self.world
        paths, suite = table_paths(table), self.bench.suite
        common = {"shape": suite.model.shape(), "schedule": suite.schedule, "seed": self.seed, "what": row}
        fitted = fit_decoder(world, paths, **common)
        ranks = evaluate(decoder_scores(fitted.model.state_dict(), paths, common["shape"]), world.whole, "test", len(table)).ranks
        start = self.sids("unisid" if row.startswith("unisid") else "content")
        figures: dict[str, Any] = {"moved": float((table.codes != start.codes)[world.known].any(1).mean())}
        if row.endswith("refined"):
            gate = read_json(self.work / row / "gate.json")
            figures |= {"accepted": gate["accepted"], "reasons": gate["reasons"], "rows": gate["rows"]}
        self.ranks(row).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.ranks(row), {name: torch.from_numpy(getattr(ranks, name)) for name in ("above", "tied")})
        write_json(self.ranks(row).with_suffix(".json"), figures)

    def ranks(self, row: str) -> Path:
        """File of the ranks of a row; its figures are beside it."""
        return self.work / "ranks" / f"{row}.safetensors"

    @cached_property
    def member(self) -> dict[str, np.ndarray]:
        """Users (P,) bool of each group."""
        return self.world.groups()

    def values(self, row: str, metric: str) -> np.ndarray:
        """Metric (P,) of every test user."""
        found = read_tensors(self.ranks(row))
        return per_position(Ranks(found["above"].numpy(), found["tied"].numpy()), metric)


def arguments(doc: str, rows: tuple[str, ...], name: str) -> argparse.Namespace:
    """Command line of a benchmark of this kind; shared with refinement_drift.py."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is finished")
    return parser.parse_args()


def main() -> None:
    """Run what is not finished, then write the tables of the data set."""
    parsed = arguments(__doc__, ROWS, "refinement_content")
    work = parsed.work / parsed.dataset
    work.mkdir(parents=True, exist_ok=True)
    bench = NewItemBench(load_dataset(parsed.dataset), NewItemsSuite(protocols=["hidden"]), work)
    seeds = [Seed(bench, seed, work) for seed in parsed.seeds]
    for one in [] if parsed.report else seeds:
        for row in parsed.rows:
            if not one.ranks(row).with_suffix(".json").exists():
                one.judge(row)
    write_tables(parsed.results, parsed.dataset, seeds)


def write_tables(folder: Path, name: str, seeds: list[Seed]) -> None:
    """Write the figures of a data set beside those of the others."""
    methods: dict[str, Any] = {}
    for row in ROWS:
        done = [one for one in seeds if one.ranks(row).with_suffix(".json").exists()]
        if not done:
            continue
        figures = [read_json(one.ranks(row).with_suffix(".json")) for one in done]
        methods[row] = {
            group: {metric: over_seeds([float(one.values(row, metric)[one.member[group]].mean()) for one in done]) for metric in METRICS}
            for group in GROUPS
        } | {"moved": float(np.mean([one["moved"] for one in figures])), "seeds": [one.seed for one in done]}
        if row.endswith("refined"):
            methods[row] |= {key: [one[key] for one in figures] for key in ("accepted", "reasons")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "refinement_content.json"
    written = read_json(path) if path.exists() else {"datasets": {}}
    written["datasets"][name] = {"methods": methods, "differences": differences(seeds, set(methods))}
    write_json(path, written)
    path.with_suffix(".md").write_text(page(written), encoding="utf-8")


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean and sample deviation; 0 for one seed."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def differences(seeds: list[Seed], rows: set[str]) -> list[dict[str, Any]]:
    """`refined` minus each rival, paired bootstrap over users and seeds."""
    found = []
    for rival in [row for row in RIVALS if {row, "refined"} <= rows]:
        both = [one for one in seeds if all(one.ranks(row).with_suffix(".json").exists() for row in (rival, "refined"))]
        for group, metric in [(group, metric) for group in GROUPS for metric in METRICS]:
            values = [np.stack([one.values(row, metric) for one in both]) for row in ("refined", rival)]
            difference = grouped_bootstrap(*values, np.stack([one.member[group] for one in both]))
            found.append({"rival": rival, "group": group, "metric": metric, "seeds": len(both)} | difference._asdict())
    return found


def page(written: dict[str, Any]) -> str:
    """Markdown tables of all data sets."""
    lines = [f"# {__doc__.splitlines()[0]}", "", *__doc__.splitlines()[4:], ""]
    for name, found in written["datasets"].items():
        lines += [f"## {name}", "", "| row | seeds | " + " | ".join(f"{g}: {m}" for g in GROUPS for m in METRICS) + " | moved | accepted |"]
        lines.append("|---" * (4 + len(GROUPS) * len(METRICS)) + "|")
        for row, figures in found["methods"].items():
            cells = [figures[g][m] for g in GROUPS for m in METRICS]
            shown = [f"{cell['mean']:.4f} ± {cell['sd']:.4f}" for cell in cells]
            accepted = f"{sum(figures['accepted'])} of {len(figures['accepted'])}" if "accepted" in figures else ""
            as_of = f" ({figures['as_of']})" if "as_of" in figures else ""  # of an earlier day, and not measured again
            lines.append(f"| {row}{as_of} | {len(figures['seeds'])} | {' | '.join(shown)} | {figures['moved']:.0%} | {accepted} |")
        lines += ["", "| refined minus | users | metric | difference | 95 % interval |", "|---|---|---|---|---|"]
        for one in found["differences"]:
            interval = f"{one['low']:+.4f} .. {one['high']:+.4f}"
            lines.append(f"| {one['rival']} | {one['group']} | {one['metric']} | {one['mean']:+.4f} | {interval} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
