"""Policy optimisation functions against hand-computed numbers (T1-T3, T5-T7), and the sampled gradient against the exact one (T4)."""

import math

import pytest
import torch

from mmsid.refine import ppo


def _bandit(seed: int, items: int = 1, paths: int = 5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(items, paths, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = torch.randn(items, paths, generator=generator, dtype=torch.float64)
    return logits, rewards, generator


def test_t1_surrogate_by_hand():
    ratios = torch.tensor([math.log(1.5), math.log(0.5)])
    terms = ppo.clipped_surrogate(ratios, torch.tensor([2.0, -2.0]), 0.2, 0.2)
    assert terms.tolist() == pytest.approx([2.4, -1.6])  # min(3, 2.4) and min(-1, -1.6)
    assert float(terms.mean()) == pytest.approx(0.4)
    assert float(terms.mean()) - 0.5 * 0.4 == pytest.approx(0.2)


def test_t1_clip_higher_is_one_sided():
    ratios = torch.tensor([math.log(1.5), math.log(0.5)])
    terms = ppo.clipped_surrogate(ratios, torch.tensor([1.0, -1.0]), 0.2, 0.28)
    assert terms.tolist() == pytest.approx([1.28, -0.8])


def clipped(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
    return ppo.clipped_surrogate(ppo.log_ratio(new, old), advantages, low, high)


def test_t2_first_epoch_is_reinforce():
    logits, _, generator = _bandit(0, items=3)
    log_p = logits.log_softmax(-1)
    picks = ppo.sample_groups(log_p.detach(), 4, generator)
    advantages = ppo.leave_one_out(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    new = log_p.gather(1, picks)
    assert torch.equal(ppo.log_ratio(new, new.detach()), torch.zeros_like(new))
    # the bound of `surrogate` changes negative advantages only
    for objective, signal in ((clipped, advantages), (ppo.surrogate, advantages.abs())):
        (own,) = torch.autograd.grad(objective(new, new.detach(), signal, 0.2, 0.28).mean(), logits, retain_graph=True)
        (vanilla,) = torch.autograd.grad((new * signal).mean(), logits, retain_graph=True)
        torch.testing.assert_close(own, vanilla)


@pytest.mark.parametrize(("advantage", "ratio", "flat"), [(1.0, 1.5, True), (-1.0, 0.5, True), (1.0, 0.5, False), (-1.0, 1.5, False)])
def test_t3_gradient_vanishes_only_in_the_clipped_corners(advantage, ratio, flat):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    (gradient,) = torch.autograd.grad(clipped(new, torch.zeros(1), torch.tensor([advantage])).sum(), new)
    assert float(gradient) == (0.0 if flat else pytest.approx(advantage * ratio))


def test_bounded_negative_by_hand():
    # pi = .01 = pi_old, A = -2: coefficient A pi / (1 - pi) = -2 * .01 / .99; that of the clipped surrogate is -2
    new = torch.tensor([math.log(0.01)], dtype=torch.float64, requires_grad=True)
    old = new.detach()
    (bounded,) = torch.autograd.grad(ppo.surrogate(new, old, torch.tensor([-2.0]).double(), 0.2, 0.2).sum(), new)
    (plain,) = torch.autograd.grad(clipped(new, old, torch.tensor([-2.0]).double()).sum(), new)
    assert float(bounded) == pytest.approx(-2 * 0.01 / 0.99)
    assert float(plain) == pytest.approx(-2.0)
    # a likely path (pi = .9) keeps the coefficient pi / max(pi_old, 1 - pi) = 1
    likely = torch.tensor([math.log(0.9)], dtype=torch.float64, requires_grad=True)
    (full,) = torch.autograd.grad(ppo.surrogate(likely, likely.detach(), torch.tensor([-2.0]).double(), 0.2, 0.2).sum(), likely)
    assert float(full) == pytest.approx(-2.0)


def test_gradient_through_old_or_advantage_is_refused():
    leaf = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="detached"):
        ppo.surrogate(leaf, leaf, torch.ones(1), 0.2, 0.2)
    with pytest.raises(ValueError, match="detached"):
        ppo.surrogate(leaf, torch.zeros(1), leaf, 0.2, 0.2)


def test_log_ratio_is_clamped_and_checked():
    assert ppo.log_ratio(torch.tensor([100.0]), torch.tensor([0.0])).item() == ppo.LOG_RATIO_LIMIT
    with pytest.raises(FloatingPointError):
        ppo.log_ratio(torch.tensor([float("nan")]), torch.zeros(1))
    with pytest.raises(FloatingPointError):
        ppo.log_ratio(torch.tensor([float("-inf")]), torch.zeros(1))


def test_t4_sampled_gradient_is_unbiased():
    logits, rewards, generator = _bandit(2)
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * rewards).sum(), logits)
    trials, group = 4000, 4
    many = logits.detach().expand(trials, -1).clone().requires_grad_()
    many_log_p = many.log_softmax(-1)
    picks = ppo.sample_groups(many_log_p.detach(), group, generator)
    advantages = ppo.leave_one_out(rewards.expand(trials, -1).gather(1, picks))
    new = many_log_p.gather(1, picks)
    terms = clipped(new, new.detach(), advantages, 0.2, 0.28).mean(dim=1).sum()
    (samples,) = torch.autograd.grad(terms, many)
    error = samples.std(0) / math.sqrt(trials)
    assert bool(((samples.mean(0) - exact[0]).abs() < 4 * error).all())


def test_t5_shift_and_scale_of_rewards():
    rewards = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(ppo.leave_one_out(rewards + 7), ppo.leave_one_out(rewards))
    scaled, tenfold = ppo.RunningScale(), ppo.RunningScale()
    torch.testing.assert_close(scaled("a", rewards), tenfold("a", rewards * 10))


def test_t6_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    assert ppo.leave_one_out(rewards).tolist()[0] == pytest.approx([-1.5, 0.0, 1.5])  # 1 - (2+3)/2


def test_t6_degenerate_groups():
    assert ppo.leave_one_out(torch.full((2, 3), 0.1)).tolist() == [[0.0] * 3] * 2  # exactly 0
    with pytest.raises(ValueError, match="at least 2"):
        ppo.leave_one_out(torch.ones(3, 1))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            ppo.leave_one_out(torch.tensor([[1.0, bad]]))


def test_running_scale_by_hand():
    scale = ppo.RunningScale(decay=0.75)
    first = torch.tensor([[0.0, 2.0], [5.0, 5.0]])  # the flat group is left out: root mean square deviation 1
    assert scale("a", first).tolist() == first.tolist()
    second = torch.tensor([[0.0, 6.0]])  # deviation 3 -> .75 * 1 + .25 * 3 = 1.5
    assert scale("a", second).tolist() == [[0.0, 4.0]]
    assert scale("b", torch.ones(1, 2)).tolist() == [[1.0, 1.0]]  # never varied: passed through
    assert scale("a", torch.full((1, 2), 3.0)).tolist() == [[2.0, 2.0]] and scale.scales["a"] == 1.5
    assert ppo.zero_variance_share(first) == 0.5


def test_t7_kl_estimates():
    logits, _, generator = _bandit(3, paths=6)
    other = torch.randn(1, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    exact = float(ppo.exact_kl(log_p, other).detach())
    picks = torch.multinomial(log_p.detach().exp()[0], 40_000, replacement=True, generator=generator)
    old, new = log_p.detach()[0, picks], other[0, picks]
    k1, k3 = -ppo.log_ratio(new, old), ppo.approximate_kl(new, old)
    assert bool((k3 >= 0).all())
    for value in (k1, k3):
        assert abs(float(value.mean()) - exact) < 4 * float(value.std()) / math.sqrt(len(picks))
    # k1 as a loss has no gradient in expectation: E[grad log pi] = 0
    (gradient,) = torch.autograd.grad((log_p.detach().exp() * (log_p - other)).sum(), logits)
    assert float(gradient.abs().max()) < 1e-12


def test_t7_exact_kl_is_zero_only_for_the_same_policy():
    log_p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert ppo.exact_kl(log_p, log_p).tolist() == [0.0, 0.0]
    value = ppo.exact_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
    assert float(value) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_entropy_and_its_levels_by_hand():
    # two levels of two: P(first) = (.5, .5); second level certain under the first, even under the second
    log_p = torch.tensor([[0.5, 1e-30, 0.25, 0.25]]).log()
    levels = ppo.level_entropies(log_p, (2, 2))[0].tolist()
    assert levels == pytest.approx([math.log(2), 0.5 * math.log(2)], abs=1e-6)
    assert sum(levels) == pytest.approx(float(ppo.entropy(log_p)), abs=1e-6)
    with pytest.raises(ValueError, match="tree"):
        ppo.level_entropies(log_p, (3, 2))


def test_clip_fraction_and_approximate_kl_by_hand():
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.3]).log()
    assert ppo.clip_fraction(ratios.view(2, 2), 0.2, 0.28).tolist() == [0.5, 0.5]
    assert ppo.approximate_kl(ratios, ratios).tolist() == [0.0] * 4
    new, old = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # r = 2: k3 = 2 - 1 - ln 2
    assert float(ppo.approximate_kl(new, old)) == pytest.approx(1 - math.log(2))
