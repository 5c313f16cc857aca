"""Control arms: each by what it must and must not do on toy tables, then the whole suite on a tiny catalogue."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_refine_loop import CODES, QUICK, _loop, _planted, _swapped, _toy
from test_refine_stage import _catalog
from tiny_backbones import tiny_bert

from mmsid.artifacts import read_json
from mmsid.errors import ConfigError
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig, load_suite
from mmsid.recommend.bench.plan import Plan
from mmsid.recommend.bench.run import BenchOptions, run
from mmsid.refine.controls import TablePolicy, best_of_n, control_arm, displaced_at_random, shuffled
from mmsid.refine.loop import LoopConfig
from mmsid.refine.policy import Reference


def test_a_table_per_item_starts_at_the_reference_and_finds_the_swap():
    reference = Reference(*_toy(), top_m=CODES)
    policy = TablePolicy(reference)
    rows = torch.tensor([3, 0])
    torch.testing.assert_close(policy.log_prob(rows).detach(), reference.tree.log_prob[rows])
    assert (policy.greedy() == reference.greedy).all()
    target, _ = _swapped(reference)
    loop = _loop(_planted(target), lr=0.003)  # at a hundred times the head's rate
    loop.policy = TablePolicy(loop.reference)
    loop.optimizer = torch.optim.Adam(loop.policy.parameters)
    assert (loop.run(lambda record: None) == target).all()


def test_best_of_n_takes_what_pays_and_stays_where_nothing_does():
    reference = Reference(*_toy(), top_m=CODES)
    target, _ = _swapped(reference)
    config = LoopConfig(**QUICK | {"rounds": 60})
    assert (best_of_n(reference, _planted(target), config, seed=0) == target).all()
    flat = lambda rows, candidates, table: {"planted": np.zeros(candidates.shape[:2])}  # noqa: E731
    assert (best_of_n(reference, flat, config, seed=0) == reference.greedy).all()


def test_shuffled_rewards_are_the_same_rewards_for_other_items():
    paid = {"planted": np.arange(12.0).reshape(6, 2)}
    score = shuffled(lambda rows, candidates, table: paid, seed=0)
    first = score(np.arange(6), None, None)["planted"]
    assert not np.array_equal(first, paid["planted"]) and sorted(map(tuple, first)) == sorted(map(tuple, paid["planted"]))


def test_random_displacement_keeps_the_churn_and_its_ranks():
    reference = Reference(*_toy(), top_m=CODES)
    tree = reference.tree.codes.numpy()
    codes = reference.greedy.copy()
    codes[[1, 4, 7]] = tree[[1, 4, 7], [2, 5, 5]]
    moved = displaced_at_random(reference, codes, seed=1)
    rank = (tree == moved[:, None]).all(-1).argmax(1)
    assert sorted(rank[rank > 0]) == [2, 5, 5] and (moved != reference.greedy).any(1).sum() == 3
    assert set(np.flatnonzero(rank)) != {1, 4, 7}
    assert len({tuple(np.flatnonzero((displaced_at_random(reference, codes, seed) != reference.greedy).any(1))) for seed in range(9)}) > 1


# --- in the bench


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"refined": {"refine": {"of": "start"}}}, "must be a tokenizer arm"),
        ({"start": {"sids": {"method": "random"}}, "refined": {"refine": {"of": "start"}}}, "must be a tokenizer arm"),
        ({"start": {"tokenizer": {}}, "refined": {"refine": {"of": "start", "settings": {"sids": "x"}}}}, "given by the bench"),
        ({"start": {"tokenizer": {}}, "refined": {"refine": {"of": "start", "control": "luck"}}}, "best_of_n"),
    ],
)
def test_a_wrong_refine_arm_is_refused(arms, words):
    with pytest.raises(ValueError, match=words):
        SuiteConfig(arms=arms, budget_minutes=1)


def test_a_refined_arm_needs_its_start_and_is_another_job_when_that_changes():
    dataset = DatasetConfig(name="some", catalog={"items": Path("items.parquet")})

    def job(**tokenizer):
        suite = SuiteConfig(arms={"start": {"tokenizer": tokenizer}, "refined": {"refine": {"of": "start"}}}, budget_minutes=1)
        plan = Plan(dataset, suite, "sha", Path("work"))
        start, refined = plan.sid_jobs(plan.arms()[1], seed=3)
        assert refined.needs == (start.folder,) and plan.sid_jobs(plan.arms()[0], seed=3) == [start]
        assert plan.fit(plan.arms()[1], 0, 3).sids == refined.folder
        return refined

    assert job(steps=1).folder == job(steps=1).folder != job(steps=2).folder


def test_a_wrong_setting_of_the_stage_is_named():
    with pytest.raises(ConfigError, match="temprature"):
        control_arm("ppo", {"temprature": 1.0})


@pytest.mark.slow
def test_the_whole_suite_on_a_tiny_catalogue(tmp_path):
    """Every arm of the shipped suite makes SIDs and gets a row; the controls keep what they promise."""
    catalog = _catalog(tmp_path, np.random.default_rng(0))
    dataset = DatasetConfig(name="tiny", catalog=catalog, num_levels=2, codebook_size=8)
    backbone = {"path": tiny_bert(tmp_path / "bert"), "max_length": 32}
    arms = {name: arm.model_dump(exclude_unset=True) for name, arm in load_suite("refinement").arms.items()}
    arms["start"]["tokenizer"] = {"backbone": backbone, "steps": 0, "start": {"behaviour_dim": 0}, "reconstruct": "off"}
    for name, arm in arms.items():
        if name != "start":
            loop = {"rounds": 6, "lr": 1e-3, "batch": 16, "step_kl": 0.3, "most_kl": 99.0, "patience": 0}
            arm["refine"]["settings"] = {
                "loop": loop | arm["refine"].get("settings", {}).get("loop", {}), "reward": {"steps": 40, "least_gain": -1.0},
            }  # fmt: skip
    suite = SuiteConfig(
        arms=arms, seeds=[0], baselines=["start", "best_of_n"], budget_minutes=20, jobs=2,
        model={"d_model": 16, "heads": 2, "hidden": 16, "layers": 1}, schedule={"epochs": 2, "batch_size": 32, "lr": 0.02},
    )  # fmt: skip
    options = BenchOptions(suite_name="refinement", results=tmp_path / "out", runs=tmp_path / "runs", part="valid")
    written = read_json(run(dataset, suite, options, refine=control_arm))
    assert [row["arm"] for row in written["arms"]] == list(arms) and not written["dataset"]["not_run"]
    jobs = tmp_path / "runs" / "bench" / "tiny" / "refinement" / "jobs"
    moved = {name: read_json(next((jobs / name).glob("sids-*/moved.json")))["items"] for name in arms if name != "start"}
    assert min(moved.values()) > 0 and moved["random"] == moved["refined"] and max(moved.values()) <= 48
