"""Recovery of a tokenizer with damaged targets by refinement, and harm to a sound tokenizer, on the demo catalogue.

    mmsid demo-catalog demo/catalog --items 1200 --users 1500 --seed 0
    OMP_NUM_THREADS=1 python benchmarks/recovery.py --seeds 0

Two tokenizers per seed: `good`, and `damaged`, trained on targets of which a share (20 %) was exchanged between items. Both are refined
with the acceptance gate; an accepted result is refined again, up to `--passes` times. Metrics are of published
codes: level-1 lift and target on held-out users; NDCG@10, HR@10 and HR@50 of the SID transformer (test; `--part valid` leaves test unread).

`refined` is the accepted result, `proposed` the last result before the gate. `recovered` = (refined - damaged) / (good - damaged), without
value where the loss is not above two deviations over recommender seeds (0 for lift and target). `harm` = good refined - good.
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
from mmsid.id_columns import with_text_ids
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.refine import gate
from mmsid.refine.config import RefineConfig
from mmsid.sids.table import SidTable
from mmsid.stages import run_stages, stage_configs
from mmsid.tokenizer import initialization
from mmsid.tokenizer.train_config import TrainTokenizerConfig
from mmsid.tokenizer.training import Training

METRICS = ("NDCG@10", "HR@10", "HR@50")
LATER = ("train_tokenizer", "assign", "refine")


class Damaged(Training):
    """Tokenizer training on targets of which a share was exchanged between items."""

    share = 0.2

    def _space(
        self, content: initialization.ContentStates, behaviour: initialization.Behaviour, start: initialization.StartSettings
    ) -> np.ndarray:
        space = super()._space(content, behaviour, start)
        rng = np.random.default_rng([self.config.seed, 11])
        rows = rng.permutation(len(space))[: round(self.share * len(space))]
        space[rows] = space[np.roll(rows, 1)]  # every item of the share gets the target of another
        return space


def main() -> None:
    """Run every seed without result, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs" / "demo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recommender-seeds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=4, help="refinements in a row; ends at the first that the gate refuses")
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
    """Train, refine and rank both tokenizers; -> metrics per table, recovered shares and harm."""
    data = load_yaml(
        parsed.config,
        ["train_tokenizer.behaviour=coengagement", *parsed.overrides, f"seed={seed}", f"name=good{seed}", f"runs={parsed.out}"],
    )
    data = {key: value for key, value in data.items() if key not in ("text_quality", "baselines", "train_recommender", "report")}
    configs = stage_configs(data, str(parsed.config))
    run_stages(configs)
    # the damaged run uses the annotations of the good run
    read = {key: str(configs[stage].out) for stage, key in (("caption", "captions"), ("interests", "interests")) if stage in configs}
    again = {key: value for key, value in data.items() if key not in ("caption", "interests")} | {"name": f"damaged{seed}"}
    damaged = stage_configs(again | {stage: (data[stage] or {}) | read for stage in LATER}, str(parsed.config))
    train_damaged(damaged["train_tokenizer"])
    run_stages({stage: damaged[stage] for stage in ("assign", "refine")})

    catalog = read_catalog(configs["refine"].catalog)
    split = split_histories(catalog, configs["refine"].catalog.split)
    item_ids = catalog.item_ids
    tables, verdicts = {}, {}
    for name, stages in (("good", configs), ("damaged", damaged)):
        passes = refine_again(stages["refine"], parsed.passes)
        tables[name] = SidTable.load(stages["assign"].out).align(item_ids)
        tables[f"{name} refined"] = SidTable.load(passes[-1].out / "sids").align(item_ids)
        tables[f"{name} proposed"] = proposed(SidTable.load(passes[-1].sids).align(item_ids), passes[-1].out)
        verdicts[name] = [{key: read_json(one.out / "gate.json")[key] for key in ("accepted", "reasons")} for one in passes]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, one in tables.items():
        same = next((other for other in figures if np.array_equal(tables[other].codes, one.codes)), None)
        figures[name] = figures[same] if same else measure(one, catalog, split, range(parsed.recommender_seeds), parsed.part)
    moved = {name: int((tables[name].codes != tables[f"{name} proposed"].codes).any(1).sum()) for name in ("good", "damaged")}
    return {"part": parsed.part, "share": parsed.share, "moved": moved, "figures": figures, "verdicts": verdicts} | compare(figures)


def refine_again(config: RefineConfig, passes: int) -> list[RefineConfig]:
    """Refine an accepted result again, up to `passes` in all; -> configurations of all passes, the last may be refused."""
    done = [config]
    while len(done) < passes and read_json(done[-1].out / "gate.json")["accepted"]:
        start = done[-1].out
        again = config.model_copy(update={"tokenizer": start, "sids": start / "sids", "out": start.with_name(f"refine{len(done) + 1}")})
        run_stages({"refine": again})
        done.append(again)
    return done


def train_damaged(config: TrainTokenizerConfig) -> None:
    """`mmsid.tokenizer.train.run` with damaged targets."""
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
    """SIDs that refinement proposed to the gate."""
    codes = start.codes.copy()
    row = {item_id: place for place, item_id in enumerate(start.item_ids)}
    for moved in with_text_ids(read_table(refined / "moved.parquet")).to_pylist():
        codes[row[moved["item_id"]]] = moved["codes_after"]
    return SidTable.from_codes(start.item_ids, codes, start.codebook_sizes)


def measure(one: SidTable, catalog: Catalog, split: Split, seeds: range, part: str) -> dict[str, dict[str, float]]:
    """Mean and deviation of held-out lift and target, and of ranking metrics over recommender seeds."""
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
    """Per metric: loss by damaged targets, recovered share of it (None where the loss is within noise), and harm to the good tokenizer."""
    damage, recovered, harm = {}, {}, {}
    for name in figures["good"]:
        good, bad, repaired, after = (figures[table][name] for table in ("good", "damaged", "damaged refined", "good refined"))
        damage[name] = good["mean"] - bad["mean"]
        measurable = damage[name] > 2 * np.sqrt((good["std"] ** 2 + bad["std"] ** 2) / 2)
        recovered[name] = (repaired["mean"] - bad["mean"]) / damage[name] if measurable else None
        harm[name] = after["mean"] - good["mean"]
    return {"damage": damage, "recovered": recovered, "harm": harm}


def table(seed: int, found: dict[str, Any]) -> str:
    """Markdown table of one seed."""
    names = list(found["figures"]["good"])
    lines = [f"## Seed {seed}, {found['share']:.0%} of the targets exchanged, {found['part']}", "", f"| | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for variant, figures in found["figures"].items():
        lines.append(f"| {variant} | " + " | ".join(f"{one['mean']:.4f} ± {one['std']:.4f}" for one in figures.values()) + " |")
    for name, form in (("damage", "{:.4f}"), ("recovered", "{:.0%}"), ("harm", "{:+.4f}")):
        lines.append(f"| {name} | " + " | ".join("-" if v is None else form.format(v) for v in found[name].values()) + " |")
    lines += ["", *[f"- gate on {name} ({found['moved'][name]} items moved): {one}" for name, one in found["verdicts"].items()], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
