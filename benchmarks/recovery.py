"""Does refinement repair a damaged tokenizer, and does it leave a good one in peace? Drawn demo catalogue, truth known.

    mmsid demo-catalog demo/catalog --items 1200 --users 1500 --seed 0
    OMP_NUM_THREADS=1 python benchmarks/recovery.py --seeds 0

Per seed two tokenizers of the same configuration are trained: `good`, and `damaged`, which learns from targets of which a share (20 %)
was exchanged between items: their content stays, the vectors that their codes are made of are somebody else's. Both are refined, with KL
to themselves, by the recipe `repair`, and go through the gate; what the gate let through is refined again, up to `--passes` in all, from a
reference, trees and a reward that no longer believe the damaged start. Figures are of published codes: level-1 lift and target on the
held-out users, and NDCG@10, HR@10 and HR@50 of the instrument on test (`--part valid` opens no test ranks).

`refined` is what the gate let through, `proposed` what the last pass wanted. `recovered` is (refined - damaged) / (good - damaged); where
the damage is not above 0, or smaller than two deviations over recommender seeds (lift and target have none), no share is given. `harm`
is good refined - good.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import is_complete, read_json, read_table, write_json, writing
from mmsid.catalog import Catalog, Split, read_catalog, split_histories
from mmsid.config import load_yaml
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.refine import gate
from mmsid.refine.config import RefineConfig
from mmsid.sids.folder import read_sid_folder
from mmsid.sids.table import SidTable
from mmsid.stages import run_stages, stage_configs
from mmsid.tokenizer import initialization
from mmsid.tokenizer.train_config import TrainTokenizerConfig
from mmsid.tokenizer.training import Training

METRICS = ("NDCG@10", "HR@10", "HR@50")
LATER = ("train_tokenizer", "assign", "refine")


class Damaged(Training):
    """The training of the product, on targets of which a share was exchanged between items."""

    share = 0.2

    def _space(
        self, readings: initialization.ContentStates, behaviour: initialization.Behaviour, start: initialization.StartSettings
    ) -> np.ndarray:
        space = super()._space(readings, behaviour, start)
        rng = np.random.default_rng([self.config.seed, 11])
        rows = rng.permutation(len(space))[: round(self.share * len(space))]
        space[rows] = space[np.roll(rows, 1)]  # nobody keeps his own
        return space


def main() -> None:
    """Run every seed that has no result yet, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recommender-seeds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=4, help="refine again what the gate let through, until it refuses")
    parser.add_argument("--share", type=float, default=Damaged.share)
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    Damaged.share = parsed.share
    parsed.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in parsed.seeds:
        path = parsed.out / f"seed{seed}.json"
        if not path.exists():
            write_json(path, one_seed(parsed, seed))
        results.append(read_json(path))
    page = "\n".join(table(seed, found) for seed, found in zip(parsed.seeds, results, strict=True))
    (parsed.out / "results.md").write_text(page, encoding="utf-8")
    print(page)


def one_seed(parsed: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, damage, refine, rank; -> figures per table and what was recovered."""
    data = load_yaml(parsed.config, ["refine.recipe=repair", *parsed.overrides, f"seed={seed}", f"name=good{seed}", f"runs={parsed.out}"])
    data = {key: value for key, value in data.items() if key not in ("baselines", "train_recommender", "report")}
    configs = stage_configs(data, str(parsed.config))
    run_stages(configs)
    # the annotations are the good run's; everything after them is made anew
    read = {key: str(configs[stage].out) for stage, key in (("caption", "captions"), ("interests", "interests")) if stage in configs}
    again = {key: value for key, value in data.items() if key not in ("caption", "interests")} | {"name": f"damaged{seed}"}
    damaged = stage_configs(again | {stage: (data[stage] or {}) | read for stage in LATER}, str(parsed.config))
    train_damaged(damaged["train_tokenizer"])
    run_stages({stage: damaged[stage] for stage in ("assign", "refine")})

    catalog = read_catalog(configs["refine"].catalog)
    split = split_histories(catalog, configs["refine"].catalog.split)
    item_ids = [item.item_id for item in catalog.items]
    tables, verdicts = {}, {}
    for name, stages in (("good", configs), ("damaged", damaged)):
        passes = refine_again(stages["refine"], parsed.passes)
        tables[name] = read_sid_folder(stages["assign"].out).align(item_ids)
        tables[f"{name} refined"] = read_sid_folder(passes[-1].out / "sids").align(item_ids)
        tables[f"{name} proposed"] = proposed(read_sid_folder(passes[-1].sids).align(item_ids), passes[-1].out)
        verdicts[name] = [{key: read_json(one.out / "gate.json")[key] for key in ("accepted", "reasons")} for one in passes]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, one in tables.items():
        same = next((other for other in figures if np.array_equal(tables[other].codes, one.codes)), None)
        figures[name] = figures[same] if same else measure(one, catalog, split, range(parsed.recommender_seeds), parsed.part)
    moved = {name: int((tables[name].codes != tables[f"{name} proposed"].codes).any(1).sum()) for name in ("good", "damaged")}
    return {"part": parsed.part, "share": parsed.share, "moved": moved, "figures": figures, "verdicts": verdicts} | compare(figures)


def refine_again(config: RefineConfig, passes: int) -> list[RefineConfig]:
    """Configurations of a finished refinement and of its further passes, each of what the one before published; none after a refusal."""
    done = [config]
    while len(done) < passes and read_json(done[-1].out / "gate.json")["accepted"]:
        start = done[-1].out
        again = config.model_copy(update={"tokenizer": start, "sids": start / "sids", "out": start.with_name(f"refine{len(done) + 1}")})
        run_stages({"refine": again})
        done.append(again)
    return done


def train_damaged(config: TrainTokenizerConfig) -> None:
    """As `mmsid.tokenizer.train.run`, with the damaged targets."""
    if is_complete(config.out):
        return
    accelerator = make_accelerator(config.precision, unused_parameters=True)
    catalog = read_catalog(config.catalog)
    described = config.model_dump(mode="json") | {"damaged": Damaged.share}
    with writing(config.out, stage="train_tokenizer", config=described, resume=True) as draft:
        training = Damaged(config, accelerator, catalog, split_histories(catalog, config.catalog.split), draft)
        training.loop(None)
        training.finish()


def proposed(start: SidTable, refined: Path) -> SidTable:
    """What refinement wanted to publish, whatever the gate said."""
    codes = start.codes.copy()
    row = {item_id: place for place, item_id in enumerate(start.item_ids)}
    for moved in read_table(refined / "moved.parquet").to_pylist():
        codes[row[moved["item_id"]]] = moved["codes_after"]
    return SidTable.from_codes(start.item_ids, codes, start.codebook_sizes)


def measure(one: SidTable, catalog: Catalog, split: Split, seeds: range, part: str) -> dict[str, dict[str, float]]:
    """Held-out lift and target, and ranking figures over recommender seeds: mean and deviation of each."""
    held_out = gate.HeldOutPairs.from_histories(split.held_out_histories())
    target = gate.agreement(one.codes, max(one.codebook_sizes), held_out, gate.GateConfig().level_weights)
    found = {"lift": [gate.level_lift(one.codes, held_out)], "target": [target], **{metric: [] for metric in METRICS}}
    for seed in seeds:
        summary = fit(table_paths(one), split, schedule=Schedule(), seed=seed, what="recommender").evaluate(split, part).summary()
        for metric in METRICS:
            found[metric].append(summary[metric])
    return {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
        for name, values in found.items()
    }


def compare(figures: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Per figure: the damage, the share of it recovered (None where the damage is within noise), and the harm to the good one."""
    damage, recovered, harm = {}, {}, {}
    for name in figures["good"]:
        good, bad, repaired, after = (figures[arm][name] for arm in ("good", "damaged", "damaged refined", "good refined"))
        damage[name] = good["mean"] - bad["mean"]
        seen = damage[name] > 2 * np.sqrt((good["std"] ** 2 + bad["std"] ** 2) / 2)
        recovered[name] = (repaired["mean"] - bad["mean"]) / damage[name] if seen else None
        harm[name] = after["mean"] - good["mean"]
    return {"damage": damage, "recovered": recovered, "harm": harm}


def table(seed: int, found: dict[str, Any]) -> str:
    """Markdown of one seed."""
    names = list(found["figures"]["good"])
    lines = [f"## Seed {seed}, {found['share']:.0%} of the targets exchanged, {found['part']}", "", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for arm, figures in found["figures"].items():
        lines.append(f"| {arm} | " + " | ".join(f"{one['mean']:.4f} ± {one['std']:.4f}" for one in figures.values()) + " |")
    for name, tell in (("damage", "{:.4f}"), ("recovered", "{:.0%}"), ("harm", "{:+.4f}")):
        lines.append(f"| {name} | " + " | ".join("-" if v is None else tell.format(v) for v in found[name].values()) + " |")
    lines += ["", *[f"- gate on {name} ({found['moved'][name]} items moved): {one}" for name, one in found["verdicts"].items()], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
