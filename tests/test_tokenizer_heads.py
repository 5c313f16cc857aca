"""SID heads: residual logits by hand, ties, exact enumeration of paths, and the common interface of both heads."""

import math

import numpy as np
import pytest
import torch

from mmsid.tokenizer.heads import ParallelHead, ResidualHead
from mmsid.tokenizer.publish import HeadScores


def one_dimensional() -> ResidualHead:
    """Two levels of two codes in one dimension: level 1 at {0, 4}, level 2 at {-1, +1}; t = 1 and 2."""
    head = ResidualHead(hidden_size=1, num_levels=2, codebook_size=2, code_dim=1)
    with torch.no_grad():
        head.vectors.copy_(torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]]))
        head.log_temperature.copy_(torch.tensor([0.0, math.log(2.0)]))
    return head


def test_residual_logits_by_hand() -> None:
    head = one_dimensional()
    s = torch.tensor([[[3.0], [3.5]]])
    first = head.level_logits(s, torch.zeros(1, 0, dtype=torch.int64))
    assert torch.allclose(first, torch.tensor([[-9.0, -1.0]]))
    # after code 1 the residual of level 2 is 3.5 - 4 = -0.5: distances to -1 and 1 are .25 and 2.25, halved by t = 2
    second = head.level_logits(s, torch.tensor([[1]]))
    assert torch.allclose(second, torch.tensor([[-0.125, -1.125]]))
    greedy = head.greedy(s)
    assert greedy.codes.tolist() == [[1, 0]]
    assert greedy.margin.item() == pytest.approx(1.0)
    assert greedy.relative_margin.item() == pytest.approx(8.0 / (9.0 + 16.0))  # level 1: gap 8 over |r|^2 + |e|^2
    lp = head.log_prob(s, torch.tensor([[1, 0]]))
    assert lp[0, 0].item() == pytest.approx(-math.log1p(math.exp(-8.0)), abs=1e-6)
    assert lp[0, 1].item() == pytest.approx(-math.log1p(math.exp(-1.0)), abs=1e-6)
    assert head.prefix_vectors(torch.tensor([[1, 0]])).squeeze().tolist() == [4.0, 3.0]
    assert head.reconstruction(torch.tensor([[1, 0]])).tolist() == [[3.0]]


def test_ties_go_to_the_lowest_index() -> None:
    head = one_dimensional()
    s = torch.tensor([[[2.0], [0.0]]])  # 2 is as far from 0 as from 4, and 0 as far from -1 as from 1
    greedy = head.greedy(s)
    assert greedy.codes.tolist() == [[0, 0]] and greedy.margin.item() == 0.0
    parallel = ParallelHead(4, 2, 5)
    assert parallel.greedy(torch.zeros(3, 2, 5)).codes.tolist() == [[0, 0]] * 3
    assert parallel.top_paths(torch.zeros(1, 2, 5), 2).codes.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]]]


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_full_tree_is_the_whole_policy(kind: str) -> None:
    torch.manual_seed(0)
    head = ResidualHead(6, 3, 4, 5) if kind == "residual" else ParallelHead(6, 3, 4)
    s = head.project(torch.randn(7, 3, 6))
    paths = head.top_paths(s, 4)
    assert paths.codes.shape == (7, 64, 3)
    assert len({tuple(p) for p in paths.codes[0].tolist()}) == 64
    joint = head.log_prob(s, paths.codes).sum(-1)
    assert torch.allclose(joint.exp().sum(1), torch.ones(7), atol=1e-5)
    assert torch.allclose(joint, paths.log_prob, atol=1e-5)
    assert torch.equal(paths.codes[:, 0], head.greedy(s).codes)
    # scoring one path alone gives the same as scoring it among all paths
    assert torch.allclose(head.log_prob(s, paths.codes[:, 9]), head.log_prob(s, paths.codes)[:, 9], atol=1e-6)
    assert torch.allclose(head.teacher_logits(s, paths.codes[:, 9])[:, 2], head.level_logits(s, paths.codes[:, 9, :2]))


def test_truncated_tree_is_renormalised() -> None:
    torch.manual_seed(1)
    head = ResidualHead(6, 2, 8, 5)
    s = head.project(torch.randn(3, 2, 6))
    paths = head.top_paths(s, 3)
    joint = head.log_prob(s, paths.codes).sum(-1)
    assert paths.codes.shape == (3, 9, 2)
    assert torch.allclose(paths.log_prob, joint.log_softmax(-1), atol=1e-6)
    assert head.top_paths(s, 99).codes.shape == (3, 64, 2)


def test_proposed_codes_replace_the_least_likely() -> None:
    torch.manual_seed(0)
    head = ResidualHead(4, 2, 8, 5)
    s = head.project(torch.randn(3, 2, 4))
    likely = head.level_logits(s, torch.zeros(3, 0, dtype=torch.int64)).argsort(1, descending=True)
    proposed = torch.stack([likely[:, 7], torch.tensor([-1, int(likely[1, 0]), -1])], 1)
    paths = head.top_paths(s, 3, lambda kept: (proposed if kept.shape[-1] == 0 else proposed[:, :0])[:, None].expand(-1, kept.shape[1], -1))
    firsts = paths.codes[:, ::3, 0]
    assert firsts[0].tolist() == likely[0, [0, 1, 7]].tolist(), "best first; -1 proposes nothing"
    assert firsts[1].tolist() == likely[1, [0, 1, 7]].tolist(), "a code that is kept anyway appears once"
    slow = head.log_prob(s, paths.codes).sum(-1).log_softmax(-1)
    torch.testing.assert_close(paths.log_prob, slow)
    assert torch.equal(
        head.top_paths(s, 3, lambda kept: torch.full_like(kept[..., :1], -1) if kept.shape[-1] else torch.full((3, 1, 1), -1)).codes,
        head.top_paths(s, 3).codes,
    )
    everywhere = head.top_paths(s, 3, lambda kept: torch.full((3, kept.shape[1], 1), 7))
    assert (everywhere.codes.view(3, 3, 3, 2)[..., 1] == 7).any(2).all(), "after every kept prefix"


def test_soft_prefix_is_an_expectation_and_carries_gradient() -> None:
    head = one_dimensional()
    s = torch.tensor([[[3.0], [3.5]]], requires_grad=True)
    codes = torch.tensor([[1, 0]])
    soft = head.soft_prefix_vectors(s, codes)
    p0 = torch.tensor([-9.0, -1.0]).softmax(0)
    p1 = torch.tensor([-0.125, -1.125]).softmax(0)
    assert soft[0, 0, 0].item() == pytest.approx(4 * p0[1].item(), abs=1e-5)
    assert soft[0, 1, 0].item() == pytest.approx(4 + (p1[1] - p1[0]).item(), abs=1e-5)
    soft.sum().backward()
    assert (s.grad.abs() > 0).all()


def test_parallel_levels_ignore_the_prefix() -> None:
    torch.manual_seed(2)
    head = ParallelHead(6, 3, 4)
    s = head.project(torch.randn(2, 3, 6))
    a = head.level_logits(s, torch.tensor([[0, 1], [2, 3]]))
    b = head.level_logits(s, torch.tensor([[3, 3], [0, 0]]))
    assert torch.equal(a, b)


@pytest.mark.parametrize("head", [ResidualHead(8, 3, 20, 8), ParallelHead(8, 3, 20)], ids=["residual", "parallel"])
def test_prefixes_of_many_items_at_once_are_those_of_one_at_a_time(head, monkeypatch):
    torch.manual_seed(0)
    with torch.no_grad():
        s = head.project(torch.randn(30, 3, 8))
    scores = HeadScores(head, lambda rows: s[torch.from_numpy(rows)])
    for beam in (16, 300):
        together = scores.prefix_beams(np.arange(30), beam)
        monkeypatch.setattr("mmsid.tokenizer.publish._BEAM_BYTES", 2**14)
        assert np.array_equal(scores.prefix_beams(np.arange(30), beam), together), "the size of the blocks changes nothing"
    narrow = scores.prefix_beams(np.arange(30), 16)
    for row in range(30):
        alone = [prefix for (prefix, _), _ in zip(scores.prefix_candidates(row), range(16), strict=False)]
        assert [tuple(prefix) for prefix in narrow[row].tolist()] == alone
    # a beam that keeps all first codes finds the best of all 400 prefixes
    every = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    exact = head.log_prob(s, torch.cat([every, torch.zeros(400, 1, dtype=torch.int64)], 1).expand(30, -1, -1))[..., :2].sum(-1)
    best = exact.topk(300, dim=1).values
    torch.testing.assert_close(exact.gather(1, torch.from_numpy(together @ np.array([20, 1]))).detach(), best.detach())
