"""Recommendation of items that arrive after training: the hybrid recommender against plain cosine of text embeddings.

    python benchmarks/hidden_items.py --dataset amazon_scientific --draws 3

A tenth of the items, drawn by content hash, is hidden with all interactions from everything that is fitted, then added with
`Recommender.add_items`. The Semantic IDs are balanced RQ on fused vectors, appended by content; the embeddings are MiniLM. Prints
Markdown and writes benchmarks/results/hidden_items_<dataset>.json.
"""

# Metrics cover test users whose next item is new, whose next item is rare (1 to 3 train interactions), and all test users, on
# the full catalogue with seen items masked. The row `no simulated new items` has the same decoder and statistics; only its
# ranker was trained without hidden items. Test is read once per call.

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsid.accelerator import OneProcess
from mmsid.artifacts import write_json
from mmsid.catalog import Split, co_engagement, read_catalog, split_histories
from mmsid.quantize import CodebookScores, balanced_residual_kmeans, fuse, ppmi_svd
from mmsid.recommend.bench.config import DatasetConfig, load_dataset
from mmsid.recommend.classical import item_counts
from mmsid.recommend.embedding_source import unit_rows
from mmsid.recommend.hybrid import HIDDEN_SHARE, fit_hybrid, hidden_items
from mmsid.recommend.metrics import Ranks, summarise
from mmsid.recommend.recommender import Recommender
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.sids import SidTable, relocate
from mmsid.sids.append import append_codes
from mmsid.tokenizer.initialization import StartSettings
from mmsid.tokenizer.sid_methods import MethodSources

SHOWN = ("HR@10", "NDCG@10", "HR@50")
LONGEST = 50  # length of the lists that are ranked
DECAY = 0.6  # of plain cosine, untuned
GROUPS = ("next item new", "next item rare", "all users")


def main() -> None:
    """Measure every draw, write the JSON and print the table of means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="a shipped data set (configs/bench/datasets) or the path of a YAML")
    parser.add_argument("--share", type=float, default=0.1, help="share of the items that are new")
    parser.add_argument("--draws", type=int, default=3, help="number of draws of new items, each with a seed of its own")
    parser.add_argument("--epochs", type=int, default=16, help="training epochs of the decoders")
    parser.add_argument("--work", type=Path, default=Path("runs/hidden_items"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the data set")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(parsed.dataset, parsed.overrides)
    draws = [one_draw(dataset, parsed.share, 100 + draw, parsed.epochs, parsed.work) for draw in range(parsed.draws)]
    out = parsed.out or Path(__file__).parent / "results" / f"hidden_items_{dataset.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"dataset": dataset.name, "draws": draws})
    print(table(dataset.name, draws))


def one_draw(dataset: DatasetConfig, share: float, seed: int, epochs: int, work: Path) -> dict[str, Any]:
    """Hide items, train, add the items, and rank every test user with each method."""
    catalog = read_catalog(dataset.catalog)
    split = split_histories(catalog, dataset.catalog.split)
    text = MethodSources(catalog, None, dataset.captions, dataset.interests, dataset.use, cache=work / "text").text
    hidden = hidden_items(catalog.items, share, seed)
    known, new = np.flatnonzero(~hidden), np.flatnonzero(hidden)
    kept = known_part(split, hidden)
    table = semantic_ids(dataset, catalog, kept, known, new, text)
    items, added = [catalog.items[row] for row in known], [catalog.items[row] for row in new]
    own = table.align([item.item_id for item in items])
    settings = {"schedule": Schedule(epochs=epochs), "seed": 0}
    decoder = fit(table_paths(own), kept, accelerator=OneProcess(), **settings)
    users = split.users("test")
    histories = [[catalog.items[row].item_id for row in split.history(int(user), "test")] for user in users]
    targets = [catalog.items[row].item_id for row in split.test[users]]
    lists = {"cosine of MiniLM, no training": cosine_lists(text, split, users, catalog)}
    for name, simulated in (("hybrid recommender", HIDDEN_SHARE), ("hybrid recommender, no simulated new items", 0.0)):
        fitted = fit_hybrid(table_paths(own), items, text[known], kept, decoder=decoder, hidden_share=simulated, what=name, **settings)
        recommender = Recommender.from_fitted(fitted, items, own)
        recommender.add_items(added, table, text[new])
        lists[name] = recommender.recommend(histories, k=LONGEST).item_ids
    counts = item_counts(split.train, len(catalog.items))[split.test[users]]
    is_new = hidden[split.test[users]]
    groups = dict(zip(GROUPS, (is_new, ~is_new & (counts > 0) & (counts <= 3), np.ones(len(users), dtype=bool)), strict=True))
    return {
        "seed": seed,
        "items": len(catalog.items),
        "new_items": len(new),
        "users": {group: int(chosen.sum()) for group, chosen in groups.items()},
        "methods": {name: {group: figures(found, targets, chosen) for group, chosen in groups.items()} for name, found in lists.items()},
    }


def known_part(split: Split, hidden: np.ndarray) -> Split:
    """The split of the known items alone, with rows among them, and without test targets."""
    row_of = np.cumsum(~hidden) - 1
    train = [row_of[rows[~hidden[rows]]] for rows in split.train]
    valid = np.where((split.valid >= 0) & ~hidden[split.valid], row_of[split.valid], -1)
    return replace(split, train=train, valid=valid, test=np.full(len(train), -1), before_test=train)


def semantic_ids(dataset: DatasetConfig, catalog: Any, kept: Split, known: np.ndarray, new: np.ndarray, text: np.ndarray) -> SidTable:
    """Balanced RQ on the fused vectors of the known items; the new ones are appended by their text, without behaviour."""
    start, sizes = StartSettings(), (dataset.codebook_size,) * dataset.num_levels
    behaviour = ppmi_svd(co_engagement(kept.fit_histories(), len(known), start.window), start.behaviour_dim, seed=0)
    order = np.concatenate([known, new])
    space = fuse(text[order], np.concatenate([behaviour, np.zeros((len(new), behaviour.shape[1]), np.float32)]))
    codebooks, codes = balanced_residual_kmeans(space[: len(known)], dataset.num_levels, dataset.codebook_size, 0)
    hashes = [catalog.items[row].content_sha256 for row in order]
    scores = CodebookScores(codebooks, space[: len(known)])
    raw, published = codebooks.encode(space).numpy(), np.full((len(order), dataset.num_levels), -1)
    raw[: len(known)] = codes.numpy()
    published[: len(known)] = relocate(codes.numpy(), scores.last_scores, np.array(hashes[: len(known)]), sizes, scores.prefix_candidates)
    scores = CodebookScores(codebooks, space)
    grown = append_codes("relocate", raw, hashes, published, sizes, scores.last_scores, scores.prefix_candidates)
    return SidTable.from_codes([catalog.items[row].item_id for row in order], grown, sizes, tokenizer_sha256="balanced_rq")


def cosine_lists(text: np.ndarray, split: Split, users: np.ndarray, catalog: Any) -> list[list[str]]:
    """The nearest unseen items of each test user's decayed mean embedding."""
    vectors, found = unit_rows(text), []
    for user in users:
        history = split.history(int(user), "test")
        scores = vectors @ (DECAY ** np.arange(len(history) - 1, -1, -1) @ vectors[history])
        scores[history] = -np.inf
        found.append([catalog.items[row].item_id for row in np.argsort(-scores, kind="stable")[:LONGEST]])
    return found


def figures(lists: list[list[str]], targets: list[str], chosen: np.ndarray) -> dict[str, float]:
    """Metrics of the chosen users from their lists of item ids."""
    ranks = [lists[user].index(targets[user]) if targets[user] in lists[user] else -1 for user in np.flatnonzero(chosen)]
    above = np.array(ranks, dtype=np.int64)
    found = summarise(Ranks(np.where(above < 0, LONGEST, above), (above >= 0).astype(np.int64)))
    return {metric: found[metric] for metric in SHOWN}


def table(name: str, draws: list[dict[str, Any]]) -> str:
    """Markdown with one row per method: means over the draws, and the standard deviation between them."""
    users = " / ".join(f"{draws[0]['users'][group]:,} ({group})" for group in GROUPS)
    lines = [
        f"{name}, {len(draws)} draws of {draws[0]['new_items']:,} new items of {draws[0]['items']:,}; {users} users in the first draw.",
        "",
        "| method | " + " | ".join(f"{metric}, {group}" for group in GROUPS for metric in SHOWN) + " |",
        "|" + "---|" * (1 + len(GROUPS) * len(SHOWN)),
    ]
    for method in draws[0]["methods"]:
        cells = []
        for group in GROUPS:
            for metric in SHOWN:
                values = [draw["methods"][method][group][metric] for draw in draws]
                cells.append(f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
