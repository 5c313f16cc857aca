"""The whole pipeline in small: invariance to the order of rows and to ids, and all stages on subsets of the real catalogues."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmsid.artifacts import read_json, read_manifest, read_table, write_table
from mmsid.catalog.demo import write_demo_catalog
from mmsid.config import load_yaml
from mmsid.sids import SidTable
from mmsid.stages import run_stages, stage_configs

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "train_tokenizer.steps=2",
    "train_tokenizer.decoder_steps=2",
    "train_tokenizer.batch_size=8",
    "train_tokenizer.codebook_size=8",
    "baselines.codebook_size=8",
    "text_quality.model.steps=150",
    "text_quality.least_accuracy=0.5",
    "text_quality.most_calibration_error=0.5",
    "refine.top_m=3",
    "refine.loop.rounds=2",
    "refine.gate.draws=50",
    "train_recommender.seeds=[0]",
    "train_recommender.schedule={epochs: 2, patience: 2}",
]


def permuted(source: Path, target: Path, seed: int) -> None:
    """The same catalogue with shuffled rows and other item and user ids."""
    rng = np.random.default_rng(seed)
    target.mkdir()
    items, sequences = read_table(source / "items.parquet"), read_table(source / "sequences.parquet")
    names = {name: f"z{number:05d}" for name, number in zip(items["item_id"].to_pylist(), rng.permutation(len(items)), strict=True)}
    items = items.set_column(0, "item_id", pa.array([names[name] for name in items["item_id"].to_pylist()]))
    histories = [[names[name] for name in history] for history in sequences["items"].to_pylist()]
    sequences = sequences.set_column(sequences.column_names.index("items"), "items", pa.array(histories))
    users = pa.array([f"v{number:05d}" for number in rng.permutation(len(sequences))])
    sequences = sequences.set_column(sequences.column_names.index("user_id"), "user_id", users)
    write_table(target / "items.parquet", items.take(rng.permutation(len(items))))
    write_table(target / "sequences.parquet", sequences.take(rng.permutation(len(sequences))))
    (target / "images").symlink_to(source / "images")


def run_metrics(run: Path) -> dict:
    """All metrics of a run, without times and names."""
    metrics = {str(path.relative_to(run)): read_json(path) for path in sorted(run.rglob("intrinsic.json"))}
    rows = read_json(run / "train_recommender" / "metrics.json")["arms"]
    metrics["ranking"] = [(row["arm"], row["metrics"], row.get("valid")) for row in rows]
    return metrics


@pytest.mark.slow
def test_permuted_rows_and_ids_give_the_same_metrics(tmp_path):
    write_demo_catalog(tmp_path / "a", items=120, users=80, seed=1)
    # the pictures of the second catalogue are links out of its folder, so the image root is set
    permuted(tmp_path / "a", tmp_path / "b", seed=5)
    for name in ("a", "b"):
        overrides = [f"catalog.{key}={tmp_path / name / key}.parquet" for key in ("items", "sequences")]
        overrides += [f"catalog.image_root={tmp_path / 'a'}", f"name={name}", f"runs={tmp_path / 'runs'}", *SMALL]
        data = load_yaml(CONFIGS / "demo.yaml", [*overrides, "train_recommender.best_achievable=null"])
        for stage in ("text_quality", "report"):  # the known facts name the items by their ids
            data.pop(stage)
        run_stages(stage_configs(data, "demo.yaml"))
    assert run_metrics(tmp_path / "runs" / "a") == run_metrics(tmp_path / "runs" / "b")


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "items", "users"), [("fashion9k", 150, None), ("ml_posters", 150, 150), ("grocery", 20, None)])
def test_all_stages_run_on_a_subset_of_a_real_catalogue(tmp_path, monkeypatch, data_root, name, items, users):
    if not (data_root / name).is_dir():
        pytest.skip(f"{data_root / name} is absent: set MMSID_DATA to the folder that holds it")
    monkeypatch.setenv("MMSID_DATA", str(data_root))
    phases = [f"train_captioner.{phase}={{steps: 3, batch_size: 8}}" for phase in ("vision_warmup", "captioning", "joint")]
    overrides = [f"runs={tmp_path}", f"catalog.max_items={items}", *phases, "train_captioner.evaluate_pictures=20"]
    path = CONFIGS / f"{name}.yaml"
    data = load_yaml(path)
    # a captioner of nine steps writes no valid record, so all rows may be quarantined; every row must be counted
    overrides += ["caption.max_quarantined=1.0", "caption.retries=0", "caption.max_new_tokens=24"]
    overrides += [small for small in SMALL if small.split(".")[0] in data] + ([f"catalog.max_users={users}"] if users else [])
    configs = stage_configs(load_yaml(path, overrides), str(path))
    run_stages(configs)
    counts = read_manifest(configs["caption"].out, "caption")["counts"]
    assert counts["in"] == counts["ok"] + counts["quarantined"] >= items
    table = SidTable.load(configs["assign"].out)
    assert len(table) == items and dataclasses.is_dataclass(table)
    if "train_recommender" in configs:
        variants = {row["arm"]: row for row in read_json(configs["train_recommender"].out / "metrics.json")["arms"]}
        assert {"random", "balanced_rq", "ours", "ours_refined"} <= set(variants)
        assert all(0 <= row["metrics"]["HR@10"]["mean"] <= 1 for row in variants.values())
    assert "## Semantic IDs" in (configs["report"].out / "summary.md").read_text()
