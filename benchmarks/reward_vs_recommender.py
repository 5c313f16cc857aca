"""Does the reward know what a recommender will make of other codes? Blocks of items are moved, and a recommender is fitted to each table.

    make demo
    OMP_NUM_THREADS=1 python benchmarks/reward_vs_recommender.py --config configs/demo.yaml
    OMP_NUM_THREADS=1 python benchmarks/reward_vs_recommender.py --config mine.yaml refine.tokenizer=… refine.sids=…

A block is a share of the items, each moved to one of 32 paths drawn from the start's own policy, chosen by what the two experts of
`sid_reward` say of them, liked or disliked by as much as is drawn for the block (-2 to 2 nats a standard deviation, the two apart), so
that blocks differ in what they do to the one and to the other. The moved table is relocated like any other.

What is said of a block is the mean over *all* items in the moved table less that in the start's, of each component of the reward and of
the `whole reward` as the loop weighs and scales it; what comes of it is the change
of the mean log-likelihood of the valid users' next item (nats, all levels), and of valid NDCG@10, under an instrument trained on each
table from scratch. Correlations are over blocks; the interval is a bootstrap over them. `shares` are the standardised coefficients of both
experts together. Valid is only measured here; nothing is chosen by it, and test is not opened.

Writes benchmarks/results/reward_outcome_<name>.json, Markdown to the screen. Finished blocks are kept beside it while the run goes on.
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
from mmsid.recommend.history_encoder import pad_histories
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
ROWS = 512  # items scored at once: bounds memory
DRAWN = 32  # paths of an item that its new one is chosen from


def main() -> None:
    """Draw the blocks, fit a recommender to each, correlate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "demo.yaml")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.3, help="of the items that a block moves")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=Schedule().epochs)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/reward_outcome_<name>.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    data = load_yaml(parsed.config, parsed.overrides)
    out = parsed.out or RESULTS / f"reward_outcome_{data['name']}.json"
    config = stage_configs(data, str(parsed.config))["refine"]
    catalog = read_catalog(config.catalog)
    job = Job(config, make_accelerator(), catalog, split_histories(catalog, config.catalog.split), None, None)  # it writes nothing here
    reward, report = job.learn_reward()
    start = make_table(job.tokenizer, job.reference.states, job.inputs, catalog, config.collisions)
    scales = spread(job, reward)
    was = said(job, reward, start, scales)
    blocks = [moved(job, reward, block, parsed.share) for block in range(parsed.blocks)]
    predictions = [{name: value - was[name] for name, value in said(job, reward, table, scales).items()} for table in blocks]

    wanted = [(start, seed) for seed in range(START_SEEDS)] + [(table, 0) for table in blocks]
    keys = [sha256([table.codes.tolist(), seed, parsed.epochs]) for table, seed in wanted]  # what was kept may be of another call
    kept = out.with_suffix(".partial")
    found = read_json(kept) if kept.exists() else {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parsed.jobs, context, initializer=prepare, initargs=(config.catalog, parsed.epochs)) as pool:
        left = {key: one for key, one in zip(keys, wanted, strict=True) if key not in found}
        for key, outcome in zip(left, pool.map(outcomes, *zip(*left.values(), strict=True)) if left else (), strict=True):
            found[key] = outcome
            write_json(kept, found)
    starts, moves = [found[key] for key in keys[:START_SEEDS]], [found[key] for key in keys[START_SEEDS:]]
    level = {name: float(np.mean([one[name] for one in starts])) for name in OUTCOMES}
    rows = [
        {"said": prediction, "came": {name: outcome[name] - level[name] for name in OUTCOMES}}
        for prediction, outcome in zip(predictions, moves, strict=True)
    ]
    noise = {name: float(np.std([one[name] for one in starts], ddof=1)) for name in OUTCOMES}
    result = {"config": data["name"], "share": parsed.share, "items": len(catalog.items), "start": level, "noise": noise, "reward": report}
    result |= {"correlations": correlations(rows), "shares": shares(rows), "blocks": rows}
    write_json(out, result)
    kept.unlink()
    print(page(result))


def moved(job: Job, reward: SidReward, block: int, share: float) -> SidTable:
    """The start's table with one block of items moved and relocated."""
    rng = np.random.default_rng([job.config.seed, block, 17])
    codes, tree = job.reference.greedy.copy(), job.reference.tree
    rows = np.sort(rng.permutation(len(codes))[: max(1, round(share * len(codes)))])
    tilt = rng.uniform(-2, 2, size=2)
    table = job.material.table(job.fit_histories, job.config.evidence)
    for piece in np.split(rows, range(ROWS, len(rows), ROWS)):
        log_prob = tree.log_prob[torch.from_numpy(piece)].cpu()
        drawn = torch.multinomial(
            log_prob.exp(), DRAWN, replacement=True, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
        )
        paths = tree.codes[torch.from_numpy(piece)].cpu().numpy()[np.arange(len(piece))[:, None], drawn.numpy()]
        with torch.no_grad():
            experts = reward.experts(read_features(job.material, table, piece, paths))
        liked = torch.zeros(paths.shape[:2])
        for weight, scores in zip(tilt, experts, strict=True):
            liked += weight * (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp_min(1e-6)
        chance = liked.double().softmax(1).cumsum(1).numpy()
        picked = (chance > rng.random((len(piece), 1)) * chance[:, -1:]).argmax(1)
        codes[piece] = paths[np.arange(len(piece)), picked]
    return make_table(job.tokenizer, job.reference.states, job.inputs, job.catalog, job.config.collisions, codes)


def spread(job: Job, reward: SidReward, sample: int = 512) -> dict[str, float]:
    """What the loop divides each component by: its root mean square deviation within groups of paths that the start would draw."""
    rows = np.sort(np.random.default_rng(job.config.seed).permutation(len(job.reference.greedy))[:sample])
    parts = job.scorer(reward)(rows, draw_candidates(job.reference, rows, job.config.loop.group, job.config.seed), job.reference.greedy)
    scale = ppo.RunningScale()
    for name, part in parts.items():
        scale(name, torch.as_tensor(part))
    return scale.scales


def said(job: Job, reward: SidReward, table: SidTable, scales: dict[str, float]) -> dict[str, float]:
    """Means over all items of the reward, of its experts and of the evidence, each item against the others of the same table."""
    codes: Codes = table.codes
    others, rows = replace(job.material, codes=codes), np.arange(len(codes))
    known = others.table(job.fit_histories, job.config.evidence)
    totals: dict[str, list[np.ndarray]] = {}
    for piece in np.split(rows, range(ROWS, len(rows), ROWS)):
        paths = codes[piece][:, None]
        features = read_features(job.material, known, piece, paths)
        with torch.no_grad():
            behaviour, distance = reward.experts(features)
            parts = {"sid_reward": reward(features), "behaviour expert": behaviour, "distance expert": distance}
        growth = job.reference.error_growth(piece, paths)
        parts |= {"unfitted distance": -growth} | known.components(piece, paths, growth, job.config.evidence)
        for name, value in parts.items():
            totals.setdefault(name, []).append(np.asarray(value).ravel())
    figures = {name: float(np.concatenate(values).mean()) for name, values in totals.items()}
    whole = sum(weight * figures[name] / scales.get(name, 1.0) for name, weight in job.config.loop.weights.items())
    figures = {"whole reward": whole} | figures
    return figures | {"gate's target": gate.agreement(codes, max(table.codebook_sizes), job.held_out_pairs, job.config.gate.level_weights)}


def prepare(catalog: CatalogConfig, epochs: int) -> None:
    """What a worker reads once."""
    global SPLIT, SCHEDULE
    torch.set_num_threads(1)
    SPLIT, SCHEDULE = split_histories(read_catalog(catalog), catalog.split), Schedule(epochs=epochs)


@torch.no_grad()
def outcomes(table: SidTable, seed: int) -> dict[str, float]:
    """An instrument trained on the table: mean log-likelihood of the valid users' next item, and valid NDCG@10."""
    split: Split = SPLIT
    with torch.enable_grad():
        fitted = fit(table_paths(table), split, schedule=SCHEDULE, seed=seed)
    model, users, total = fitted.model, split.users("valid"), 0.0
    for piece in np.split(users, range(256, len(users), 256)):
        histories = [split.history(int(user), "valid")[-model.shape.max_history :] for user in piece]
        states = model.last_states(pad_histories(histories, model.shape.max_history).to(model.paths.device))
        targets = torch.from_numpy(split.valid[piece]).to(model.paths.device)
        total += float(model.path_log_prob(states, model.paths[targets], model.decided[targets]).sum())
    return {"log_likelihood": total / len(users), "NDCG@10": fitted.evaluate(split, "valid").summary()["NDCG@10"]}


def correlations(rows: list[dict[str, Any]], draws: int = 2000) -> dict[str, dict[str, list[float]]]:
    """Per outcome and predictor: Pearson correlation over blocks and its 95 % bootstrap interval."""
    found: dict[str, dict[str, list[float]]] = {}
    drawn = np.random.default_rng(0).integers(0, len(rows), (draws, len(rows)))
    for outcome in OUTCOMES:
        came = np.array([row["came"][outcome] for row in rows])
        for name in rows[0]["said"]:
            values = np.array([row["said"][name] for row in rows])
            again = [pearson(values[one], came[one]) for one in drawn]
            found.setdefault(outcome, {})[name] = [pearson(values, came), *np.quantile(again, (0.025, 0.975)).tolist()]
    return found


def pearson(left: np.ndarray, right: np.ndarray) -> float:
    """Correlation; 0 where either side does not vary."""
    spread = left.std() * right.std()
    return float(((left - left.mean()) * (right - right.mean())).mean() / spread) if spread > 1e-15 else 0.0


def shares(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Standardised least-squares coefficients of the two experts together, per outcome."""
    names = ("behaviour expert", "distance expert")
    left = np.array([[row["said"][name] for name in names] for row in rows])
    left = (left - left.mean(0)) / left.std(0)
    found = {}
    for outcome in OUTCOMES:
        came = np.array([row["came"][outcome] for row in rows])
        weights = np.linalg.lstsq(left, (came - came.mean()) / came.std(), rcond=None)[0]
        found[outcome] = dict(zip(names, weights.tolist(), strict=True))
    return found


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"{len(result['blocks'])} blocks of {result['share']:.0%} of {result['items']:,} items", ""]
    lines += [f"| said of the table | {' | '.join(OUTCOMES)} |", "|---" * (1 + len(OUTCOMES)) + "|"]
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
