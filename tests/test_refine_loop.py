"""The refinement loop on toy tables: planted rewards, bandits with known answers, determinism and resume (T8, T9, T12)."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mmsid.errors import ArtifactError, MmsidError
from mmsid.refine import ppo
from mmsid.refine.checkpoint import load_state, save_state
from mmsid.refine.loop import LoopConfig, Refinement
from mmsid.refine.policy import HeadPolicy, Reference, path_log_prob
from mmsid.tokenizer.heads import ParallelHead, ResidualHead

ITEMS, LEVELS, CODES = 24, 2, 4
QUICK = {
    "rounds": 60,
    "lr": 0.03,
    "kl": 0.05,
    "batch": 64,
    "moving": 1.0,
    "step_kl": 0.3,
    "weights": {"planted": 1.0},
}


def toy(seed: int = 0, kind: str = "residual"):
    """Head and one-hot states: the shared weights can move every item separately."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ResidualHead(ITEMS, LEVELS, CODES, 8) if kind == "residual" else ParallelHead(ITEMS, LEVELS, CODES)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
    states = torch.eye(ITEMS)[:, None].expand(-1, LEVELS, -1).contiguous()
    return head, states


def tree_of(reference: Reference):
    """The reference's own trees of all items."""
    rows = torch.arange(len(reference.states))
    return reference.tree(rows, reference.proposals(reference.greedy)).take(rows)


def make_loop(scorer, seed=0, kind="residual", quality=None, metric=None, top_m=CODES, refinement=Refinement, **changes):
    head, states = toy(kind=kind)
    reference = Reference(head, states, top_m)
    policy = HeadPolicy(head, lambda rows: states[rows], list(head.parameters()), reference)
    config = LoopConfig(**{**QUICK, **changes})
    return refinement(policy, reference, scorer, config, Accelerator(cpu=True), seed=seed, quality=quality, metric=metric)


def run_loop(scorer, **changes):
    loop, log = make_loop(scorer, **changes), []
    return loop.run(log.append), loop.reference, loop.policy.head, log


def swapped(reference: Reference):
    """The start with the last codes of two items exchanged."""
    target = reference.greedy.copy()
    second = int(np.flatnonzero(target[:, 1] != target[0, 1])[0])
    target[[0, second], 1] = target[[second, 0], 1]
    return target, second


def planted_reward(target):
    return lambda rows, candidates, table: {"planted": (candidates == target[rows][:, None]).all(-1).astype(float)}


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_t9_finds_the_planted_swap(kind):
    target, second = swapped(Reference(*toy(kind=kind), top_m=CODES))
    codes, reference, _, log = run_loop(planted_reward(target), kind=kind)
    assert (codes != reference.greedy).any(1)[[0, second]].all()
    assert (codes == target).all()
    assert log[-1]["reward_planted"] > log[0]["reward_planted"] and log[-1]["kl"] > 0


def test_t9_does_not_move_when_the_reward_is_constant():
    head, _ = toy()
    start = {name: value.clone() for name, value in head.state_dict().items()}
    constant = lambda rows, candidates, table: {"planted": np.full(candidates.shape[:2], 0.3)}  # noqa: E731
    codes, reference, head, log = run_loop(constant, rounds=3)
    assert (codes == reference.greedy).all()
    assert all(torch.equal(value, start[name]) for name, value in head.state_dict().items())
    assert max(abs(record["kl"]) for record in log) < 1e-6 and log[0]["zero_variance_groups"] == 1.0


@pytest.mark.parametrize("better", [0, 1])
def test_t8_of_two_actions_the_better_is_taken(better):
    """The reward is +1 or -1 by the first code, the same for every item."""
    reward = lambda rows, candidates, table: {"planted": np.where(candidates[..., 0] % 2 == better, 1.0, -1.0)}  # noqa: E731
    codes, *_ = run_loop(reward, rounds=20, lr=0.06, top_m=2)
    tree = tree_of(Reference(*toy(), top_m=2)).codes[..., 0].numpy() % 2
    can = (tree == better).any(1)
    assert can.sum() > ITEMS // 3 and (codes[can, 0] % 2 == better).all()


def test_t8_bandit_whose_answer_depends_on_the_item():
    target = np.stack([np.arange(ITEMS) % CODES, (np.arange(ITEMS) // CODES) % CODES], axis=1)
    codes, *_ = run_loop(lambda rows, candidates, table: {"planted": (candidates == target[rows][:, None]).mean(-1)}, rounds=40, lr=0.06)
    assert (codes == target).mean() > 0.95


def test_shuffled_reward_against_kl_stays_near_the_start():
    noise = np.random.default_rng(0)
    _, _, _, loose = run_loop(lambda rows, candidates, table: {"planted": noise.normal(size=candidates.shape[:2])}, kl=0.0, rounds=15)
    _, _, _, held = run_loop(lambda rows, candidates, table: {"planted": noise.normal(size=candidates.shape[:2])}, kl=5.0, rounds=15)
    assert held[-1]["kl"] < 0.3 * loose[-1]["kl"]


def test_quality_zero_keeps_an_item_where_it_is():
    target, second = swapped(Reference(*toy(), top_m=CODES))
    quality = np.ones(ITEMS)
    quality[0] = 0.0
    codes, reference, _, _ = run_loop(planted_reward(target), kind="parallel", quality=np.zeros(ITEMS), rounds=3)
    assert (codes == reference.greedy).all()
    codes, *_ = run_loop(planted_reward(target), quality=quality)
    assert (codes[second] == target[second]).all()


def test_a_sharp_start_is_flattened_until_it_explores():
    head, states = toy()
    with torch.no_grad():
        head.log_temperature.fill_(-7.0)
    sharp = Reference(head, states, top_m=CODES)
    assert float(ppo.entropy(tree_of(sharp).log_prob).mean()) < 0.05 and sharp.temperature == 1.0
    flat = Reference(head, states, top_m=CODES, temperature=None, entropy=1.5)
    assert float(ppo.entropy(tree_of(flat).log_prob).mean()) == pytest.approx(1.5, abs=0.01)
    assert (flat.greedy == sharp.greedy).all() and (tree_of(flat).codes == tree_of(sharp).codes).all()
    assert Reference(*toy(), top_m=CODES, temperature=None, entropy=0.1).temperature == 1.0


def test_a_round_ends_before_a_step_beyond_its_target():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    *_, log = run_loop(planted_reward(target), step_kl=1e-6, rounds=2)
    assert log[0]["stopped_early"] and log[0]["steps"] == 1


def test_a_round_that_goes_much_too_far_is_undone_and_the_rate_falls():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    codes, reference, head, log = run_loop(planted_reward(target), rounds=1, lr=5.0, step_kl=0.01, epochs=1)
    start, _ = toy()
    assert log[0]["undone"] and log[0]["round_kl"] > 0.04 and log[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), head.parameters())) and (codes == reference.greedy).all()
    assert log[0]["lr"] == 5.0 / 4
    *_, log = run_loop(planted_reward(target), rounds=30, lr=5.0, step_kl=0.02)
    late = [record["round_kl"] for record in log if not record["undone"]][-10:]
    assert len(late) == 10 and max(late) <= 4 * 0.02


def test_the_rate_falls_linearly_and_rises_where_steps_are_tiny():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    *_, log = run_loop(planted_reward(target), rounds=4, lr=1e-5, step_kl=0.02)
    assert [record["lr"] for record in log] == pytest.approx([1e-5 * 1.5 ** (n + 1) * (1 - n / 4) for n in range(4)])


def test_a_run_without_gain_in_the_monitored_metric_ends_and_keeps_the_start():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    start = Reference(*toy(), top_m=CODES).greedy
    lost = lambda codes: -float((codes != start).any(1).sum())  # noqa: E731
    codes, _, head, log = run_loop(planted_reward(1 - target.clip(0, 1)), metric=lost, patience=4, rounds=40, lr=0.1)
    assert "stopped" in log[-1] and len(log) < 40 and log[-1]["monitored"] < 0
    assert (codes == start).all() and all(torch.equal(a, b) for a, b in zip(head.parameters(), toy()[0].parameters()))
    assert len(run_loop(planted_reward(target), metric=lambda codes: 0.0, patience=2)[-1]) == 2, "no change is no gain"
    assert len(run_loop(planted_reward(target), metric=lambda codes: 0.0, patience=0, rounds=5)[-1]) == 5


def test_a_run_with_gain_goes_on_after_its_peak():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    values = iter([0.0, -1.0, 3.0, *[1.0] * 20])
    codes, _, _, log = run_loop(planted_reward(target), metric=lambda codes: next(values), patience=2, rounds=12)
    assert len(log) == 12 and "stopped" not in log[-1] and (codes == target).all()


@pytest.mark.parametrize("interrupted", [1, 4])
def test_t12_a_resumed_run_equals_the_uninterrupted_one(interrupted, tmp_path):
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    settings = {"rounds": 6, "moving": 0.5, "batch": 7, "patience": 4, "checkpoint_every": 2}
    metric = lambda codes: float((codes != Reference(*toy(), top_m=CODES).greedy).sum())  # noqa: E731
    whole, log = make_loop(planted_reward(target), metric=metric, **settings), []
    codes = whole.run(log.append)

    first, kept = make_loop(planted_reward(target), metric=metric, **settings), []

    def stop(record):
        if record["round"] == interrupted:
            raise KeyboardInterrupt
        kept.append(record)

    with pytest.raises(KeyboardInterrupt):
        first.run(stop, lambda loop: save_state(loop, tmp_path / "state.safetensors"))
    second = make_loop(planted_reward(target), metric=metric, **settings)
    load_state(second, tmp_path / "state.safetensors")
    assert second.next_round == 2 * (interrupted // 2)
    again = kept[: second.next_round]
    assert (second.run(again.append) == codes).all() and again == log
    assert all(torch.equal(a, b) for a, b in zip(second.policy.parameters, whole.policy.parameters))


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    save_state(make_loop(planted_reward(None)), tmp_path / "state.safetensors")
    with pytest.raises(ArtifactError, match="other weights"):
        load_state(make_loop(planted_reward(None), kind="parallel"), tmp_path / "state.safetensors")


def test_t12_same_seed_same_weights():
    target, _ = swapped(Reference(*toy(), top_m=CODES))
    _, _, first, log = run_loop(planted_reward(target), rounds=4, seed=5)
    _, _, second, again = run_loop(planted_reward(target), rounds=4, seed=5)
    _, _, other, _ = run_loop(planted_reward(target), rounds=4, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters())) and log == again
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_dropout_left_on_is_caught_in_the_first_step():
    loop = make_loop(planted_reward(Reference(*toy(), top_m=CODES).greedy))
    states = loop.policy.states
    loop.policy.states = lambda rows: torch.nn.functional.dropout(states(rows), 0.5)
    with pytest.raises(MmsidError, match="dropout"):
        loop.run(lambda record: None)


def test_a_weight_without_a_component_is_an_error():
    with pytest.raises(MmsidError, match=r"'plantd'.*planted"):
        run_loop(planted_reward(Reference(*toy(), top_m=CODES).greedy), weights={"plantd": 1.0})


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_tree_scores_equal_those_of_the_head(kind):
    head, _ = toy(kind=kind)
    states = torch.randn(7, LEVELS, ITEMS, generator=torch.Generator().manual_seed(1))
    reference = Reference(head, states, top_m=3)
    tree = tree_of(reference)
    assert tree.codes.shape == (7, 9, 2)
    slow = head.log_prob(head.project(states), tree.codes).sum(-1).log_softmax(-1)
    torch.testing.assert_close(path_log_prob(head, states, tree.codes, tree.branching), slow)
    torch.testing.assert_close(tree.log_prob, slow)
    assert (tree.codes[:, 0].numpy() == reference.greedy).all()
    assert reference.error_growth(np.arange(7), reference.greedy[:, None]).max() == pytest.approx(0.0, abs=1e-6)
    flat = Reference(head, states, top_m=3, temperature=4.0)
    torch.testing.assert_close(path_log_prob(head, states, tree.codes, tree.branching, 4.0), tree_of(flat).log_prob)


def test_a_proposed_code_is_in_the_tree_and_can_be_reached():
    head, states = toy()
    far = Reference(head, states, top_m=2).head.level_logits(head.project(states), torch.zeros(len(states), 0, dtype=torch.int64)).argmin(1)
    without, proposed = (
        Reference(head, states, top_m=2, propose=propose)
        for propose in (
            None,
            lambda greedy: lambda rows, kept: far.numpy()[rows][:, None, None],
        )
    )
    holds = lambda reference: (tree_of(reference).codes[..., 0] == far[:, None]).any(1)  # noqa: E731
    assert not holds(without).any() and holds(proposed).all()
    assert (tree_of(proposed).codes[:, 0].numpy() == proposed.greedy).all(), "the greedy path of the reference stays first"


def test_a_path_outside_the_trees_of_the_start_is_reached_over_several_rounds():
    """With two codes per level, a tree of the start holds 4 of the 16 paths; later trees follow the policy."""
    target = np.stack([np.arange(ITEMS) % CODES, (np.arange(ITEMS) // CODES) % CODES], axis=1)
    steps = [dict(zip(range(CODES), rank, strict=True)) for rank in ([0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0])]
    near = np.array([[-steps[goal][code] for code in range(CODES)] for goal in range(CODES)], dtype=float)
    reward = lambda rows, candidates, table: {"planted": near[target[rows][:, None], candidates].mean(-1)}  # noqa: E731
    codes, reference, _, _ = run_loop(reward, rounds=60, lr=0.06, top_m=2)
    outside = ~(tree_of(reference).codes.numpy() == target[:, None]).all(-1).any(-1)
    reached = (codes == target).all(1)
    assert outside.mean() > 0.5 and reached[outside].mean() > 0.5
