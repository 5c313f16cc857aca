"""Correlation of the refinement reward with the quality of a recommender trained on the same codes.

    make demo
    OMP_NUM_THREADS=1 python benchmarks/reward_vs_recommender.py --config configs/demo.yaml
    OMP_NUM_THREADS=1 python benchmarks/reward_vs_recommender.py --config mine.yaml refine.tokenizer=... refine.sids=...

A block is a share of the items, each moved to one of 32 paths sampled from the start's policy. The choice among them is tilted by the two
experts of `sid_reward`, with weights drawn per block (-2 to 2 nats per standard deviation), so that blocks differ in both.
Predictors are the changes of the mean of each reward component and of the `whole reward`; outcomes are the changes of the valid
log-likelihood (nats, all levels) and NDCG@10 of a SID transformer trained from scratch on each table. Correlations are over blocks with
bootstrap intervals; `shares` are standardised coefficients of both experts together. Nothing is selected on valid; test stays unread.

Writes benchmarks/results/reward_vs_recommender_<name>.json. An interrupted run continues from finished blocks beside that file.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import read_json, sha256, write_json
from mmsid.catalog import CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import load_yaml
from mmsid.recommend.evaluate import recommender_scores
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.refine import gate, ppo
from mmsid.refine.evidence import Codes
from mmsid.refine.features import read_features
from mmsid.refine.publish import make_table
from mmsid.refine.reward import SidReward, draw_candidates
from mmsid.refine.stage import Job
from mmsid.sids.table import SidTable
from mmsid.stages import stage_configs

RESULTS = Path(__file__).parent / "results"
OUTCOMES = ("log_likelihood", "NDCG@10")
START_SEEDS = 3
ROWS = 512  # items scored at once; bounds memory use
DRAWN = 32  # sampled paths that the new path of an item is chosen from


def main() -> None:
    """Move the blocks, train a recommender on each table, and correlate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "demo.yaml")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.3, help="share of the items that a block moves")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=Schedule().epochs)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/reward_vs_recommender_<name>.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    data = load_yaml(parsed.config, parsed.overrides)
    out = parsed.out or RESULTS / f"reward_vs_recommender_{data['name']}.json"
    config = stage_configs(data, str(parsed.config))["refine"]
    catalog = read_catalog(config.catalog)
    job = Job(
        config, make_accelerator(), catalog, split_histories(catalog, config.catalog.split), None, None
    )  # no draft: nothing is written
    reward, report = job.learn_reward()
    start = make_table(job.tokenizer, job.reference.states, job.inputs, catalog, config.collisions)
    scales = spread(job, reward)
    before = figures_of(job, reward, start, scales)
    blocks = [moved(job, reward, block, parsed.share) for block in range(parsed.blocks)]
    predictions = [{name: value - before[name] for name, value in figures_of(job, reward, table, scales).items()} for table in blocks]

    fits = [(start, seed) for seed in range(START_SEEDS)] + [(table, 0) for table in blocks]
    keys = [sha256([table.codes.tolist(), seed, parsed.epochs]) for table, seed in fits]  # finished blocks may be of another call
    partial = out.with_suffix(".partial")
    found = read_json(partial) if partial.exists() else {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parsed.jobs, context, initializer=prepare, initargs=(config.catalog, parsed.epochs)) as pool:
        left = {key: one for key, one in zip(keys, fits, strict=True) if key not in found}
        for key, outcome in zip(left, pool.map(outcomes, *zip(*left.values(), strict=True)) if left else (), strict=True):
            found[key] = outcome
            write_json(partial, found)
    starts, moves = [found[key] for key in keys[:START_SEEDS]], [found[key] for key in keys[START_SEEDS:]]
    level = {name: float(np.mean([one[name] for one in starts])) for name in OUTCOMES}
    rows = [
        {"predictors": prediction, "outcomes": {name: outcome[name] - level[name] for name in OUTCOMES}}
        for prediction, outcome in zip(predictions, moves, strict=True)
    ]
    noise = {name: float(np.std([one[name] for one in starts], ddof=1)) for name in OUTCOMES}
    result = {"config": data["name"], "share": parsed.share, "items": len(catalog.items), "start": level, "noise": noise, "reward": report}
    result |= {"correlations": correlations(rows), "shares": shares(rows), "blocks": rows}
    write_json(out, result)
    partial.unlink()
    print(page(result))


def moved(job: Job, reward: SidReward, block: int, share: float) -> SidTable:
    """SID table of the start with one block of items moved, after collision handling."""
    rng = np.random.default_rng([job.config.seed, block, 17])
    codes, propose = job.reference.greedy.copy(), job.reference.proposals(job.reference.greedy)
    rows = np.sort(rng.permutation(len(codes))[: max(1, round(share * len(codes)))])
    tilt = rng.uniform(-2, 2, size=2)
    table = job.material.table(job.fit_histories, job.config.evidence)
    for piece in np.split(rows, range(ROWS, len(rows), ROWS)):
        tree = job.reference.tree(torch.from_numpy(piece), propose)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        paths = tree.paths(torch.multinomial(tree.log_prob.exp().cpu(), DRAWN, replacement=True, generator=generator))
        with torch.no_grad():
            experts = reward.experts(read_features(job.material, table, piece, paths))
        preference = torch.zeros(paths.shape[:2])
        for weight, scores in zip(tilt, experts, strict=True):
            preference += weight * (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp_min(1e-6)
        chance = preference.double().softmax(1).cumsum(1).numpy()
        picked = (chance > rng.random((len(piece), 1)) * chance[:, -1:]).argmax(1)
        codes[piece] = paths[np.arange(len(piece)), picked]
    return make_table(job.tokenizer, job.reference.states, job.inputs, job.catalog, job.config.collisions, codes)


def spread(job: Job, reward: SidReward, sample: int = 512) -> dict[str, float]:
    """Scale of each component in the loop: root mean square deviation within groups of paths sampled from the start."""
    rows = np.sort(np.random.default_rng(job.config.seed).permutation(len(job.reference.greedy))[:sample])
    parts = job.scorer(reward)(rows, draw_candidates(job.reference, rows, job.config.loop.group, job.config.seed), job.reference.greedy)
    scale = ppo.RunningScale()
    for name, part in parts.items():
        scale(name, torch.as_tensor(part))
    return scale.scales


def figures_of(job: Job, reward: SidReward, table: SidTable, scales: dict[str, float]) -> dict[str, float]:
    """Means over all items of the reward, its experts and components, each item relative to the others of the same table."""
    codes: Codes = table.codes
    rows = np.arange(len(codes))
    index = replace(job.material, codes=codes).table(job.fit_histories, job.config.evidence)
    totals: dict[str, list[np.ndarray]] = {}
    for piece in np.split(rows, range(ROWS, len(rows), ROWS)):
        paths = codes[piece][:, None]
        features = read_features(job.material, index, piece, paths)
        with torch.no_grad():
            behaviour, distance = reward.experts(features)
            parts = {"sid_reward": reward(features), "behaviour expert": behaviour, "distance expert": distance}
        growth = job.reference.error_growth(piece, paths)
        parts |= {"unfitted distance": -growth} | index.components(piece, paths, job.config.evidence)
        for name, value in parts.items():
            totals.setdefault(name, []).append(np.asarray(value).ravel())
    figures = {name: float(np.concatenate(values).mean()) for name, values in totals.items()}
    whole = sum(weight * figures[name] / scales.get(name, 1.0) for name, weight in job.config.loop.weights.items())
    figures = {"whole reward": whole} | figures
    return figures | {"gate's target": gate.agreement(codes, max(table.codebook_sizes), job.held_out_pairs, job.config.gate.level_weights)}


def prepare(catalog: CatalogConfig, epochs: int) -> None:
    """Load the split and schedule of a worker process."""
    global SPLIT, SCHEDULE
    torch.set_num_threads(1)
    SPLIT, SCHEDULE = split_histories(read_catalog(catalog), catalog.split), Schedule(epochs=epochs)


@torch.no_grad()
def outcomes(table: SidTable, seed: int) -> dict[str, float]:
    """Valid log-likelihood of the next item among all items, and NDCG@10, of a SID transformer trained on the table."""
    split: Split = SPLIT
    with torch.enable_grad():
        fitted = fit(table_paths(table), split, schedule=SCHEDULE, seed=seed)
    score, users, total = recommender_scores(fitted.model, fitted.trie, "exact"), split.users("valid"), 0.0
    for piece in np.split(users, range(256, len(users), 256)):
        log_prob = score([split.history(int(user), "valid") for user in piece]).cpu()
        total += float(log_prob.gather(1, torch.from_numpy(split.valid[piece])[:, None]).sum())
    return {"log_likelihood": total / len(users), "NDCG@10": fitted.evaluate(split, "valid").summary()["NDCG@10"]}


def correlations(rows: list[dict[str, Any]], draws: int = 2000) -> dict[str, dict[str, list[float]]]:
    """Pearson correlation over blocks and its 95 % bootstrap interval, per outcome and predictor."""
    found: dict[str, dict[str, list[float]]] = {}
    drawn = np.random.default_rng(0).integers(0, len(rows), (draws, len(rows)))
    for outcome in OUTCOMES:
        measured = np.array([row["outcomes"][outcome] for row in rows])
        for name in rows[0]["predictors"]:
            values = np.array([row["predictors"][name] for row in rows])
            resampled = [pearson(values[one], measured[one]) for one in drawn]
            found.setdefault(outcome, {})[name] = [pearson(values, measured), *np.quantile(resampled, (0.025, 0.975)).tolist()]
    return found


def pearson(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson correlation; 0 where either side does not vary."""
    spread = left.std() * right.std()
    return float(((left - left.mean()) * (right - right.mean())).mean() / spread) if spread > 1e-15 else 0.0


def shares(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Standardised least-squares coefficients of the two experts together, per outcome."""
    names = ("behaviour expert", "distance expert")
    left = np.array([[row["predictors"][name] for name in names] for row in rows])
    left = (left - left.mean(0)) / left.std(0)
    found = {}
    for outcome in OUTCOMES:
        measured = np.array([row["outcomes"][outcome] for row in rows])
        weights = np.linalg.lstsq(left, (measured - measured.mean()) / measured.std(), rcond=None)[0]
        found[outcome] = dict(zip(names, weights.tolist(), strict=True))
    return found


def page(result: dict[str, Any]) -> str:
    """Markdown table of the result."""
    lines = [f"{len(result['blocks'])} blocks of {result['share']:.0%} of {result['items']:,} items", ""]
    lines += [f"| change of the table | {' | '.join(OUTCOMES)} |", "|---" * (1 + len(OUTCOMES)) + "|"]
    for name in result["correlations"][OUTCOMES[0]]:
        cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*result["correlations"][outcome][name]) for outcome in OUTCOMES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in ("noise", "start"):
        lines.append(f"| {name} | {' | '.join(f'{result[name][outcome]:.4f}' for outcome in OUTCOMES)} |")
    for name in result["shares"][OUTCOMES[0]]:
        cells = [f"{result['shares'][outcome][name]:+.2f}" for outcome in OUTCOMES]
        lines.append(f"| coefficient of the {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
