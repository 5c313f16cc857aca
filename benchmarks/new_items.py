"""Recommendation of new items: SIDs appended to a published table, against retraining and against clustering.

    python benchmarks/new_items.py --dataset demo
    python benchmarks/new_items.py --dataset amazon_scientific

A random tenth of the items is held out with all interactions, then appended to the published SIDs of our tokenizer and of
balanced RQ on MiniLM (`append_codes`; no published code may change). Both are also retrained on all items. Prints
Markdown and writes benchmarks/results/new_items_<dataset>.json. Finished tokenizers below --work are reused.
"""

# A SID transformer is trained on each table. In the rows `appended` and `retrained tokenizer` it sees no interaction with a
# new item, so it reaches new items only through codes that they share with others; in `retrained, both` it also reads the
# new items' train interactions. Metrics cover test users whose next item is new, and all test users, on the full catalogue
# with seen items masked. Test is read once per call.

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmsid.artifacts import is_complete, read_table, write_json, write_table
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import build
from mmsid.quantize import CodebookScores, balanced_residual_kmeans
from mmsid.recommend.bench.config import DatasetConfig, load_dataset
from mmsid.recommend.evaluate import evaluate
from mmsid.recommend.metrics import summarise
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.sids import SidTable, relocate
from mmsid.sids.append import append_codes
from mmsid.tokenizer import assign, train
from mmsid.tokenizer.sid_methods import MethodSources

SHOWN = ("HR@10", "HR@50", "NDCG@10")


def main() -> None:
    """Build the SID tables, train a recommender on each, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="a shipped data set (configs/bench/datasets) or the path of a YAML")
    parser.add_argument("--share", type=float, default=0.1, help="share of the items that are new")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw, the tokenizers and the recommenders")
    parser.add_argument("--steps", type=int, default=100, help="training steps of our tokenizer")
    parser.add_argument("--epochs", type=int, default=16, help="training epochs of the recommenders")
    parser.add_argument("--work", type=Path, default=Path("runs/new_items"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the data set, e.g. captions=runs/demo/caption")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(parsed.dataset, parsed.overrides)
    study = NewItemStudy(dataset, parsed.share, parsed.seed, parsed.work / f"{dataset.name}-{parsed.seed}")
    ours, retrained = study.ours(parsed.steps)
    clustered, clustered_anew = study.balanced_rq()
    hidden, whole = study.without_new(), study.split
    variants = {
        "ours, appended": (ours, hidden),
        "ours, retrained tokenizer": (retrained, hidden),
        "ours, retrained, both": (retrained, whole),
        "balanced RQ on MiniLM, appended": (clustered, hidden),
        "balanced RQ on MiniLM, retrained, both": (clustered_anew, whole),
    }
    schedule = Schedule(epochs=parsed.epochs)
    results = {
        "dataset": dataset.name,
        "seed": parsed.seed,
        "items": len(study.catalog.items),
        "new_items": len(study.new),
        "users_whose_test_item_is_new": len(study.new_test_targets().users("test")),
        "published_codes_moved": study.moved,
        "arms": {name: study.evaluate(table, split, schedule, name) for name, (table, split) in variants.items()},
    }
    out = parsed.out or Path(__file__).parent / "results" / f"new_items_{dataset.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    print(table_of(results))


class NewItemStudy:
    """SID tables and recommenders of a catalogue with and without its new items.

    Attributes:
        new: item rows of the new items.
        moved: published codes that changed when new items were appended, by method.
    """

    def __init__(self, dataset: DatasetConfig, share: float, seed: int, work: Path) -> None:
        self.dataset, self.seed, self.work = dataset, seed, work
        self.catalog: Catalog = read_catalog(dataset.catalog)
        self.split: Split = split_histories(self.catalog, dataset.catalog.split)
        self.item_ids = [item.item_id for item in self.catalog.items]
        order = np.random.default_rng(seed).permutation(len(self.item_ids))
        self.new = np.sort(order[: max(1, round(share * len(order)))])
        self.is_new = np.isin(np.arange(len(order)), self.new)
        self.moved: dict[str, int] = {}

    def without_new(self) -> Split:
        """The split without new items in train and valid. Histories before test items are unchanged."""
        train_rows = [rows[~self.is_new[rows]] for rows in self.split.train]
        return replace(self.split, train=train_rows, valid=self._only(self.split.valid, ~self.is_new))

    def new_test_targets(self) -> Split:
        """The split restricted to test users whose test item is new."""
        return replace(self.split, test=self._only(self.split.test, self.is_new))

    @staticmethod
    def _only(targets: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Targets that are allowed, -1 for the others."""
        return np.where((targets >= 0) & allowed[targets], targets, -1)

    def ours(self, steps: int) -> tuple[SidTable, SidTable]:
        """SID tables of our tokenizer: new items appended to the published SIDs, and all items after retraining on all."""
        known = self._known_catalogue()
        tokenizer = self._trained("known_tokenizer", known, steps)
        published = self._assigned("published", tokenizer, known)
        grown = self._assigned("appended", tokenizer, self.dataset.catalog, append=self.work / "published")
        self._count_moved("ours", published, grown)
        whole = self._trained("whole_tokenizer", self.dataset.catalog, steps)
        return grown, self._assigned("retrained", whole, self.dataset.catalog)

    def balanced_rq(self) -> tuple[SidTable, SidTable]:
        """The same two tables from Sinkhorn-balanced residual k-means on the texts that our tokenizer reads."""
        dataset = self.dataset
        sources = MethodSources(self.catalog, None, dataset.captions, dataset.interests, dataset.use, cache=self.work / "text")
        x, sizes = sources.text, (dataset.codebook_size,) * dataset.num_levels
        hashes = np.array([item.content_sha256 for item in self.catalog.items])

        def clustered(rows: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
            codebooks, codes = balanced_residual_kmeans(x[rows], dataset.num_levels, dataset.codebook_size, self.seed)
            scores = CodebookScores(codebooks, x[rows])
            return codebooks, codes.numpy(), relocate(codes.numpy(), scores.last_scores, hashes[rows], sizes, scores.prefix_candidates)

        known = np.flatnonzero(~self.is_new)
        codebooks, raw, codes = clustered(known)
        raw_all, published = codebooks.encode(x).numpy(), np.full((len(x), dataset.num_levels), -1)
        raw_all[known], published[known] = raw, codes
        scores = CodebookScores(codebooks, x)
        grown = append_codes("relocate", raw_all, list(hashes), published, sizes, scores.last_scores, scores.prefix_candidates)
        before, after = (SidTable.from_codes(self.item_ids, grid, sizes) for grid in (np.maximum(published, 0), grown))
        self._count_moved("balanced RQ", before.align([self.item_ids[row] for row in known]), after)
        return after, SidTable.from_codes(self.item_ids, clustered(np.arange(len(x)))[2], sizes)

    def evaluate(self, table: SidTable, split: Split, schedule: Schedule, name: str) -> dict[str, Any]:
        """Metrics of a recommender trained on `split`, for users whose test item is new and for all users."""
        fitted = fit(table_paths(table.align(self.item_ids)), split, schedule=schedule, seed=self.seed, what=name)
        found = {}
        for who, test_split in (("new", self.new_test_targets()), ("all", self.split)):
            ranks = evaluate(fitted.score, test_split, "test", len(self.item_ids)).ranks
            found[who] = {metric: value for metric, value in summarise(ranks).items() if metric in SHOWN}
        return found

    def _known_catalogue(self) -> CatalogConfig:
        """Catalogue without the new items. The reader drops interactions with missing items."""
        config = self.dataset.catalog
        column = config.fields.group_by or config.fields.item_id
        items = read_table(config.items)
        hidden = {self.item_ids[row] for row in self.new}
        self.work.mkdir(parents=True, exist_ok=True)
        kept = items.filter(pa.array([str(item_id) not in hidden for item_id in items[column].to_pylist()]))
        write_table(self.work / "known.parquet", kept)
        return config.model_copy(update={"items": self.work / "known.parquet", "image_root": config.root})

    def _trained(self, name: str, catalog: CatalogConfig, steps: int) -> Path:
        settings = self.dataset.model_dump(include={"captions", "interests", "use", "num_levels", "codebook_size"})
        settings |= {"out": self.work / name, "seed": self.seed, "catalog": catalog, "steps": steps}
        config = build(train.TrainTokenizerConfig, settings, source="new_items", section="train_tokenizer")
        return config.out if is_complete(config.out) else train.run(config)

    def _assigned(self, name: str, tokenizer: Path, catalog: CatalogConfig, **changes: Any) -> SidTable:
        annotations = {"captions": self.dataset.captions, "interests": self.dataset.interests}
        config = assign.AssignConfig(out=self.work / name, tokenizer=tokenizer, catalog=catalog, seed=self.seed, **annotations, **changes)
        return SidTable.load(config.out if is_complete(config.out) else assign.run(config))

    def _count_moved(self, name: str, published: SidTable, grown: SidTable) -> None:
        self.moved[name] = int((grown.align(published.item_ids).codes != published.codes).any(axis=1).sum())


def table_of(results: dict[str, Any]) -> str:
    """Markdown with one row per method."""
    moved = ", ".join(f"{name} {count}" for name, count in results["published_codes_moved"].items())
    lines = [
        f"{results['dataset']}, seed {results['seed']}: {results['new_items']:,} of {results['items']:,} items new, "
        f"{results['users_whose_test_item_is_new']:,} users whose test item is new. Published codes changed by the append: {moved}.",
        "",
        "| Semantic IDs | " + " | ".join(f"{metric}, {who}" for who in ("next item new", "all users") for metric in SHOWN) + " |",
        "|" + "---|" * (1 + 2 * len(SHOWN)),
    ]
    for name, figures in results["arms"].items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[who][metric]:.3f}" for who in ("new", "all") for metric in SHOWN) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
