"""Differences between variants of a finished bench, pooled over data sets with equal weight, paired over users and seeds.

    python benchmarks/refinement.py --dataset amazon_scientific --only start,refined,best_of_n suite.within=0
    python benchmarks/refinement.py --dataset amazon_beauty --only start,refined,best_of_n suite.within=0
    python benchmarks/pooled.py --runs runs --suite refinement --datasets amazon_scientific amazon_beauty --arms start refined best_of_n

The metric is NDCG@10 at the seeds that both variants have. The pooled difference is the mean of the data sets' differences. Intervals come
from a bootstrap over users and seeds within each data set. `share` is a difference relative to the second variant.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

import numpy as np

from mmsid.artifacts import is_complete, write_json
from mmsid.recommend.metrics import per_position
from mmsid.recommend.result_rows import read_ranks

METRIC = "NDCG@10"


def main() -> None:
    """Read the ranks of every variant, data set and seed, then write `pooled.json` and `pooled.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs")], help="one for all data sets, or one for each")
    parser.add_argument("--suite", default="refinement")
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all finished seeds")
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parsed = parser.parse_args()
    runs = parsed.runs * len(parsed.datasets) if len(parsed.runs) == 1 else parsed.runs
    values = {
        dataset: {
            arm: read_arm(folder / "bench" / dataset / parsed.suite / "jobs" / arm, arm, parsed.part, parsed.seeds) for arm in parsed.arms
        }
        for folder, dataset in zip(runs, parsed.datasets, strict=True)
    }
    rows = [row for pair in permutations(parsed.arms, 2) for row in compare(values, *pair, parsed.draws)]
    write_json(parsed.out / "pooled.json", {"metric": METRIC, "part": parsed.part, "draws": parsed.draws, "rows": rows})
    (parsed.out / "pooled.md").write_text(page(rows, parsed.part), encoding="utf-8")
    print(page(rows, parsed.part))


def read_arm(folder: Path, arm: str, part: str, seeds: list[int] | None) -> dict[int, np.ndarray]:
    """Metric of every user (P,) per seed, of the finished fits of one variant. Raises SystemExit if a seed has two fits."""
    found: dict[int, np.ndarray] = {}
    for fit in sorted(path for path in folder.glob("fit-seed*") if is_complete(path)):
        seed = int(fit.name.split("-")[1].removeprefix("seed"))
        if seeds is None or seed in seeds:
            if seed in found:
                raise SystemExit(
                    f"{folder} has two fits of seed {seed}; keep one of them, or name the runs of each bench separately (--runs)"
                )
            found[seed] = per_position(read_ranks(fit / f"{arm}.{part}.parquet", part).ranks, METRIC)
    if not found:
        raise SystemExit(f"{folder} has no finished fit; run the bench first")
    return found


def compare(values: dict[str, dict[str, dict[int, np.ndarray]]], arm: str, baseline: str, draws: int) -> list[dict[str, object]]:
    """Rows of one pair of variants: each data set, then all of them pooled."""
    gaps, figures, drawn, rows = [], [], [], []
    for place, (dataset, arms) in enumerate(values.items()):
        seeds = sorted(arms[arm].keys() & arms[baseline].keys())
        of, base = (np.stack([arms[name][seed] for seed in seeds]) for name in (arm, baseline))
        gaps.append(float((of - base).mean()))
        figures.append((float(of.mean()), float(base.mean())))
        drawn.append(resampled(of - base, draws, np.random.default_rng([0, place])))
        rows.append(row(dataset, arm, baseline, figures[-1:], gaps[-1:], drawn[-1:], len(seeds)))
    return [*rows, row("pooled", arm, baseline, figures, gaps, drawn, min(one["seeds"] for one in rows))]


def resampled(gap: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means (draws,) of the differences (S, P) over seeds and users."""
    seeds, users = gap.shape
    found = []
    for start in range(0, draws, 250):
        count = min(250, draws - start)
        by_seed = rng.multinomial(users, np.full(users, 1 / users), size=count) @ gap.T / users
        found.append((by_seed * rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds).sum(1))
    return np.concatenate(found)


def row(
    name: str, arm: str, baseline: str, figures: list[tuple[float, float]], gaps: list[float], drawn: list[np.ndarray], seeds: int
) -> dict[str, object]:
    """Means over data sets: metrics of both variants, difference, interval, and the smallest detectable effect."""
    means, base = np.mean(drawn, axis=0), float(np.mean([one for _, one in figures]))
    low, high = np.quantile(means, [0.025, 0.975])
    found = {"data": name, "arm": arm, "baseline": baseline, "seeds": seeds, "figure": float(np.mean([one for one, _ in figures]))}
    found |= {"baseline_figure": base, "difference": float(np.mean(gaps)), "low": float(low), "high": float(high)}
    return found | {"share": found["difference"] / base, "detectable_share": float(2.8 * means.std() / base)}


def page(rows: list[dict[str, object]], part: str) -> str:
    """Markdown table of the rows."""
    lines = [
        f"# {METRIC} on {part}, pooled over data sets",
        "",
        "| data | variant | baseline | seeds | figures | difference | 95 % interval | share | detectable share |",
    ]
    lines.append("|---" * 9 + "|")
    for one in rows:
        lines.append(
            f"| {one['data']} | {one['arm']} | {one['baseline']} | {one['seeds']} | {one['figure']:.4f}, {one['baseline_figure']:.4f} "
            f"| {one['difference']:+.4f} | {one['low']:+.4f} .. {one['high']:+.4f} | {one['share']:+.1%} | {one['detectable_share']:.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
