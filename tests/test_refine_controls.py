"""Control variants of refinement (benchmarks/refinement_controls.py) on toy tables, and the whole suite on a tiny catalogue."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_refine_loop import CODES, QUICK, make_loop, planted_reward, swapped, toy
from test_refine_stage import make_catalog
from tiny_backbones import tiny_bert

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from refinement_controls import (
    CONTROLS,
    ExactGradient,
    Grpo,
    RewardWeighted,
    TablePolicy,
    best_of_n,
    displaced_at_random,
    expected_reward,
    group_normalised,
    reward_weighted,
    shuffled,
    start_tree,
)

from mmsid.artifacts import read_json
from mmsid.cli import main
from mmsid.errors import ConfigError
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.files import load_suite
from mmsid.recommend.bench.plan import Plan
from mmsid.recommend.bench.run import BenchOptions, run
from mmsid.refine import ppo
from mmsid.refine.loop import LoopConfig
from mmsid.refine.policy import Reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SUITE = str(BENCHMARKS / "suites" / "refinement.yaml")

# --- gradient estimators


@pytest.mark.parametrize("kind", [ExactGradient, Grpo, RewardWeighted])
def test_every_estimator_finds_the_swap(kind):
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    log = []
    codes = make_loop(planted_reward(target), refinement=kind).run(log.append)
    assert (codes == target).all() and log[-1]["reward_planted"] > log[0]["reward_planted"]


def test_the_exact_gradient_is_zero_under_a_constant_reward():
    loop, log = make_loop(lambda rows, candidates, table: {"planted": np.full(candidates.shape[:2], 0.3)}, refinement=ExactGradient), []
    assert (loop.run(log.append) == loop.reference.greedy).all() and max(abs(record["kl"]) for record in log) < 1e-6


def test_group_normalised_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    edge = 1 / (math.sqrt(2 / 3) + 1e-6)
    assert group_normalised(rewards).tolist()[0] == pytest.approx([-edge, 0.0, edge])
    assert group_normalised(rewards, ddof=1, eps=0.0).tolist()[0] == pytest.approx([-1.0, 0.0, 1.0])
    torch.testing.assert_close(group_normalised(rewards * 10 + 7, eps=0.0), group_normalised(rewards, eps=0.0))


def test_reward_weights_by_hand():
    assert reward_weighted(torch.tensor([[0.0, math.log(3)]])).tolist()[0] == pytest.approx([0.5, 1.5])
    assert reward_weighted(torch.tensor([[0.0, math.log(9)]]), temperature=2.0).tolist()[0] == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("advantage", [group_normalised, reward_weighted])
def test_degenerate_groups(advantage):
    assert advantage(torch.full((2, 3), 0.1)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="at least 2"):
        advantage(torch.ones(3, 1))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            advantage(torch.tensor([[1.0, bad]]))


def test_t4_autograd_against_finite_difference():
    generator = torch.Generator().manual_seed(1)
    logits, rewards = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()

    def objective(x: torch.Tensor) -> torch.Tensor:
        log_p = x.log_softmax(-1)
        kl = ppo.exact_kl(log_p, torch.full_like(log_p, -math.log(5)))
        return (expected_reward(log_p, rewards) - 0.3 * kl + 0.1 * ppo.entropy(log_p)).sum()

    (gradient,) = torch.autograd.grad(objective(logits), logits)
    step = 1e-6
    for index in range(logits.numel()):
        shift = torch.zeros(logits.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.reshape(logits.shape)
        slope = (objective(logits.detach() + shift) - objective(logits.detach() - shift)) / (2 * step)
        assert float(slope) == pytest.approx(float(gradient.reshape(-1)[index]), abs=1e-8)
    with pytest.raises(ValueError, match="detached"):
        expected_reward(torch.zeros(1, 1), torch.zeros(1, 1, requires_grad=True))


# --- other policies and rewards


def test_a_table_per_item_starts_at_the_reference_and_finds_the_swap():
    reference = Reference(*toy(), top_m=CODES)
    policy = TablePolicy(reference)
    rows = torch.tensor([3, 0])
    tree = policy.tree(rows, reference.greedy)
    torch.testing.assert_close(policy.log_prob(rows, tree).detach(), start_tree(reference).log_prob[rows])
    assert (policy.greedy() == reference.greedy).all()
    target, _ = swapped(reference)
    loop = make_loop(planted_reward(target), lr=0.003)  # the table's rate is a hundred times the head's
    loop.policy = TablePolicy(loop.reference)
    loop.optimizer = torch.optim.Adam(loop.policy.parameters)
    assert (loop.run(lambda record: None) == target).all()


def test_best_of_n_takes_better_paths_and_keeps_codes_under_equal_rewards():
    reference = Reference(*toy(), top_m=CODES)
    target, _ = swapped(reference)
    config = LoopConfig(**QUICK | {"rounds": 60})
    assert (best_of_n(reference, planted_reward(target), config, seed=0) == target).all()
    flat = lambda rows, candidates, table: {"planted": np.zeros(candidates.shape[:2])}  # noqa: E731
    assert (best_of_n(reference, flat, config, seed=0) == reference.greedy).all()


def test_shuffled_rewards_are_the_same_rewards_for_other_items():
    rewards = {"planted": np.arange(12.0).reshape(6, 2)}
    score = shuffled(lambda rows, candidates, table: rewards, seed=0)
    first = score(np.arange(6), None, None)["planted"]
    assert not np.array_equal(first, rewards["planted"]) and sorted(map(tuple, first)) == sorted(map(tuple, rewards["planted"]))


def test_random_displacement_keeps_the_churn_and_its_ranks():
    reference = Reference(*toy(), top_m=CODES)
    tree = start_tree(reference).codes.numpy()
    codes = reference.greedy.copy()
    codes[[1, 4, 7]] = tree[[1, 4, 7], [2, 5, 5]]
    moved = displaced_at_random(reference, codes, seed=1)
    rank = (tree == moved[:, None]).all(-1).argmax(1)
    assert sorted(rank[rank > 0]) == [2, 5, 5] and (moved != reference.greedy).any(1).sum() == 3
    assert set(np.flatnonzero(rank)) != {1, 4, 7}
    assert len({tuple(np.flatnonzero((displaced_at_random(reference, codes, seed) != reference.greedy).any(1))) for seed in range(9)}) > 1


# --- in the bench


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"refined": {"refine": {"of": "start"}}}, "tokenizer arm"),
        ({"start": {"sids": {"method": "random"}}, "refined": {"refine": {"of": "start"}}}, "tokenizer arm"),
        ({"start": {"tokenizer": {}}, "refined": {"refine": {"of": "start", "settings": {"sids": "x"}}}}, "by the bench"),
    ],
)
def test_an_invalid_refine_arm_is_refused(arms, message):
    with pytest.raises(ValueError, match=message):
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


@pytest.mark.parametrize("control", ["ppo", "best_of_n"])
def test_an_unknown_setting_of_the_stage_is_named(control):
    with pytest.raises(ConfigError, match="temprature"):
        CONTROLS[control]({"temprature": 1.0})


def _dataset(folder):
    make_catalog(folder, np.random.default_rng(0))
    (folder / "tiny.yaml").write_text(
        f"catalog: {{items: {folder}/items.parquet, sequences: {folder}/sequences.parquet, split: {{inner_held_out: 0.25}}}}\n"
        "num_levels: 2\ncodebook_size: 8\n"
    )
    return ["--dataset", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--results", str(folder / "out")]


def test_the_command_refuses_a_control_before_any_job_and_names_the_script(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--suite", SUITE, *_dataset(tmp_path)])
    assert "refine.control is 'exact', known here: ppo; " in (error := capsys.readouterr().err) and "benchmarks/refinement.py" in error
    assert not list(tmp_path.glob("runs/**/jobs"))


def test_the_script_knows_every_control_of_its_suite(tmp_path, capsys, monkeypatch):
    controls = {arm.refine.control for arm in load_suite(SUITE).arms.values() if arm.refine is not None}
    assert controls == set(CONTROLS)
    monkeypatch.setattr(sys, "argv", ["refinement.py", *_dataset(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(BENCHMARKS / "refinement.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert "--only" in error and all(name in error for name in ("best_of_n", "exact", "full_distances"))


@pytest.mark.slow
def test_the_whole_suite_on_a_tiny_catalogue(tmp_path):
    """Every arm makes SIDs in worker processes and gets a row; random moves as many items as refinement."""
    catalog = make_catalog(tmp_path, np.random.default_rng(0))
    dataset = DatasetConfig(name="tiny", catalog=catalog, num_levels=2, codebook_size=8)
    backbone = {"path": tiny_bert(tmp_path / "bert"), "max_length": 32}
    arms = {name: arm.model_dump(exclude_unset=True) for name, arm in load_suite(SUITE).arms.items()}
    arms["start"]["tokenizer"] = {"backbone": backbone, "steps": 0, "behaviour": "none", "reconstruct": "off"}
    for name, arm in arms.items():
        if name != "start":
            loop = {"rounds": 6, "lr": 1e-3, "batch": 16, "step_kl": 0.3, "patience": 0}
            arm["refine"]["settings"] = {
                "loop": loop | arm["refine"].get("settings", {}).get("loop", {}), "reward": {"steps": 40, "least_gain": -1.0},
            }  # fmt: skip
    suite = SuiteConfig(
        arms=arms, seeds=[0], baselines=["start", "best_of_n"], budget_minutes=20, jobs=2,
        model={"d_model": 16, "heads": 2, "hidden": 16, "layers": 1}, schedule={"epochs": 2, "batch_size": 32, "lr": 0.02},
    )  # fmt: skip
    options = BenchOptions(suite_name="refinement", results=tmp_path / "out", runs=tmp_path / "runs", part="valid")
    written = read_json(run(dataset, suite, options, refine=CONTROLS))
    assert [row["arm"] for row in written["arms"]] == list(arms) and not written["dataset"]["not_run"]
    jobs = tmp_path / "runs" / "bench" / "tiny" / "refinement" / "jobs"
    moved = {name: read_json(next((jobs / name).glob("sids-*/moved.json")))["items"] for name in arms if name != "start"}
    assert min(moved.values()) > 0 and moved["random"] == moved["refined"] and max(moved.values()) <= 48
