"""Published generative recommenders of the library cornac (RPG, TIGER), trained by its own code and ranked by our protocol.

    pip install "mmsid[peers]"
    python benchmarks/peers.py --dataset amazon_scientific --model rpg
    python benchmarks/peers.py --dataset amazon_scientific --model tiger --share 0.1

cornac reads our train histories, our valid targets (it selects its best epoch by them) and MiniLM embeddings of the texts
that our tokenizer reads. With `--share`, a share of the items is hidden with all interactions, as in new_items.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from new_items import NewItemStudy

from mmsid.artifacts import write_json
from mmsid.catalog import Split
from mmsid.recommend.bench.config import load_dataset
from mmsid.recommend.evaluate import evaluate
from mmsid.recommend.metrics import summarise
from mmsid.tokenizer.sid_methods import MethodSources

SHOWN = ("HR@10", "NDCG@10", "HR@50")
NOT_FOUND = -1e9  # cornac scores items that its search did not reach as -1e10


def main() -> None:
    """Train one model, rank all users and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="demo", help="a shipped data set (configs/bench/datasets) or the path of a YAML")
    parser.add_argument("--model", choices=("rpg", "tiger"), default="rpg")
    parser.add_argument("--recipe", help="settings shipped by cornac, e.g. RPG_TOYS_CONFIG; default: RPG_CONFIG, GRID_CONFIG")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes of the recipe, e.g. n_epochs=50")
    parser.add_argument("--share", type=float, default=0.0, help="share of the items that is hidden from training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and of the draw of hidden items")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the data set")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(parsed.dataset, parsed.overrides)
    study = NewItemStudy(dataset, parsed.share, parsed.seed, parsed.work / f"{dataset.name}-{parsed.seed}")
    split = study.without_new() if parsed.share else study.split
    sources = MethodSources(study.catalog, None, dataset.captions, dataset.interests, dataset.use, cache=parsed.work / "text")
    settings = recipe(parsed.model, parsed.recipe) | {"seed": parsed.seed}
    settings |= {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in parsed.set)}
    started = time.perf_counter()
    peer = Peer(parsed.model, settings, split, sources.text)
    seconds = time.perf_counter() - started
    parts = {part: evaluate(peer, study.split, part, len(study.item_ids)) for part in ("valid", "test")}
    results: dict[str, Any] = {"dataset": dataset.name, "model": parsed.model, "settings": settings, "training_seconds": round(seconds)}
    results |= {part: shown(found.ranks) for part, found in parts.items()}
    if parsed.share:
        new = evaluate(peer, study.new_test_targets(), "test", len(study.item_ids))
        results |= {"hidden_share": parsed.share, "test, next item new": shown(new.ranks) | {"users": len(new.users)}}
    results["seconds"] = round(time.perf_counter() - started)
    out = parsed.out or Path(__file__).parent / "results" / f"peer_{parsed.model}_{dataset.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    for part in ("valid", "test", "test, next item new"):
        if part in results:
            print(f"{parsed.model} on {dataset.name}, {part}: " + ", ".join(f"{name} {value:.4f}" for name, value in results[part].items()))


class Peer:
    """A trained cornac model as a scoring function: histories -> (B, N).

    Args:
        settings: arguments of the cornac model.
        split: whose train histories and valid targets the model is fitted and selected on.
        embeddings: (N, D), of all items.
    """

    def __init__(self, model: str, settings: dict[str, Any], split: Split, embeddings: np.ndarray) -> None:
        from cornac.data import FeatureModality
        from cornac.eval_methods import NextItemEvaluation
        from cornac.models import RPG, TIGER

        data = NextItemEvaluation.from_splits(
            train_data=events("train", split.train),
            val_data=events("valid", [np.append(split.train[user], split.valid[user]) for user in split.users("valid")]),
            # cornac knows only items that occur in some part: this session names all others, and nothing is fitted on it
            test_data=events("all", [np.arange(len(embeddings))]),
            item_feature=FeatureModality(features=embeddings, ids=[str(row) for row in range(len(embeddings))]),
        )
        self.model = {"rpg": RPG, "tiger": TIGER}[model](**settings)
        self.model.fit(data.train_set, data.val_set)
        self.index = np.array([data.global_iid_map[str(row)] for row in range(len(embeddings))])

    def __call__(self, histories: list[np.ndarray]) -> torch.Tensor:
        """Scores (B, N), -inf for items that the model's search did not reach."""
        scores = np.stack([self.model.score(0, self.index[history].tolist())[self.index] for history in histories])
        return torch.from_numpy(np.where(scores <= NOT_FOUND, -np.inf, scores))


def events(part: str, histories: list[np.ndarray]) -> list[tuple[str, str, int]]:
    """Histories as cornac's rows (session, item, time); sessions of different parts have different names."""
    return [(f"{part}{user}", str(row), time) for user, rows in enumerate(histories) for time, row in enumerate(rows)]


def recipe(model: str, name: str | None) -> dict[str, Any]:
    """Settings that cornac ships for a model."""
    from cornac.models import rpg, tiger

    return dict(getattr(rpg, name or "RPG_CONFIG") if model == "rpg" else getattr(tiger, name or "GRID_CONFIG"))


def shown(ranks: Any) -> dict[str, float]:
    """The metrics of the table."""
    return {name: value for name, value in summarise(ranks).items() if name in SHOWN}


if __name__ == "__main__":
    main()
