"""Closed-form initialization: ridge regression, balanced codes, category ids; and the repeatable batch plan."""

import numpy as np
import pytest
import torch
from scipy import sparse
from test_tokenizer_inputs import item

from mmsid.tokenizer import initialization
from mmsid.tokenizer.batches import PairPlan
from mmsid.tokenizer.heads import ParallelHead, ResidualHead
from mmsid.tokenizer.ridge import ridge


def test_ridge_finds_a_linear_map() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 6, generator=rng), torch.randn(3, 6, generator=rng)
    weight, bias = ridge(x, x @ w.T + 2.0)
    assert torch.allclose(weight, w, atol=1e-3) and torch.allclose(bias, torch.full((3,), 2.0), atol=1e-3)
    # for noise and few rows, a strong penalty is chosen and the weights shrink
    x, noise = torch.randn(12, 6, generator=rng), torch.randn(12, 3, generator=rng)
    weight, _ = ridge(x, noise)
    assert weight.norm() < 0.5 * torch.linalg.lstsq(x - x.mean(0), noise).solution.norm()


@pytest.mark.parametrize("kind", ["residual", "parallel"])
def test_start_head_reproduces_learnable_codes(kind: str) -> None:
    """If states are a linear map of the fused vector plus a constant per level, the initialized head gives the target codes."""
    torch.manual_seed(0)
    centres = 4 * torch.randn(2, 5, 6)
    codes = torch.randint(0, 5, (300, 2))
    fused = centres[0][codes[:, 0]] + 0.2 * centres[1][codes[:, 1]] + 0.01 * torch.randn(300, 6)
    h = fused[:, None] @ torch.randn(6, 12) + torch.randn(2, 12)
    head = ResidualHead(12, 2, 5, 6) if kind == "residual" else ParallelHead(12, 2, 5)
    initialization.start_head(head, torch.stack([centres[0], 0.2 * centres[1]]), h, fused, codes)
    agreement = (head.greedy(head.project(h)).codes == codes).float().mean(0)
    assert agreement[0] > 0.98
    assert kind == "parallel" or agreement[1] > 0.98
    assert head.log_prob(head.project(h), codes)[:, 0].mean() > -0.5


def test_greedy_codes_of_priced_codebooks_are_balanced() -> None:
    """Skewed items: greedy codes with the prices are the balanced ones; without the prices they crowd a few codes."""
    torch.manual_seed(0)
    x = torch.randn(480, 5).abs().pow(2)
    vectors, codes = initialization.priced_codebooks(x, 2, 8, seed=0)
    assert vectors.shape == (2, 8, 7) and (vectors[0, :, 6] == 0).all() and (vectors[1, :, 5] == 0).all()
    head = ResidualHead(5, 2, 8, 7)
    head.vectors.data.copy_(vectors)
    s = initialization.append_price_coordinates(x, 2)[:, None].expand(-1, 2, -1)
    assert (head.greedy(s).codes == codes).float().mean() > 0.99
    for level in range(2):
        priced = torch.bincount(codes[:, level], minlength=8)
        assert priced.max() <= 90, "60 per code on average"
    head.vectors.data[..., 5:] = 0
    assert torch.bincount(head.greedy(s).codes[:, 0], minlength=8).max() > torch.bincount(codes[:, 0], minlength=8).max()


def test_refit_head_gives_the_new_balanced_codes() -> None:
    torch.manual_seed(0)
    head = ResidualHead(4, 2, 6, 5)
    s = head.project(torch.randn(120, 2, 4)).detach()
    reading, codes = initialization.refit_head(head, s, torch.zeros(120, 1), seed=0)
    assert torch.equal(reading, initialization.append_price_coordinates(s[..., :-2], 2))
    assert (head.greedy(reading).codes == codes).float().mean() > 0.99
    assert head.log_prob(reading, codes)[:, 0].mean() > -1.0


def test_category_ids_of_ragged_paths() -> None:
    items = [item(categories=("a", "x", "deep")), item(categories=("a",)), item(categories=("b", "x")), item(), item(categories=("a", "x"))]
    ids = initialization.category_ids(items, 3)
    assert ids[3].tolist() == [-1, -1, -1]
    assert len(set(ids[1].tolist())) == 1, "a path of depth 1 stays at its depth"
    assert ids[0, 0] == ids[1, 0] == ids[4, 0] != ids[2, 0]
    assert ids[0, 1] == ids[4, 1] != ids[2, 1], "x below a is not x below b"
    assert ids[0, 2] != ids[4, 2]


def plan(pairs: sparse.csr_matrix | None) -> PairPlan:
    category = np.array([0, 0, 1, -1, -1, 1, 1, 0, 2, -1])
    return PairPlan(list(range(10)), category, pairs, batch_size=4, seed=3)


def test_batches_are_a_pure_function_of_seed_step_and_rank() -> None:
    pairs = sparse.csr_matrix((np.ones(2), ([3, 4], [4, 3])), shape=(10, 10))
    one, two = plan(pairs), plan(pairs)
    assert np.array_equal(one.batch(7).rows, two.batch(7).rows)
    steps = [two.batch(step) for step in range(5)]
    assert sorted(row for batch in steps for row in batch.rows[:2]) == list(range(10)), "every item is an anchor once per epoch"
    for batch in steps:
        for anchor, partner, engaged, paired in zip(batch.rows[:2], batch.rows[2:], batch.engaged, batch.paired):
            assert engaged == (anchor in (3, 4)) and (not engaged or partner == 7 - anchor)
            same = one.category[anchor] == one.category[partner] >= 0
            assert paired == (engaged or (same and anchor != partner)) or not paired
            assert anchor != partner or not paired
    ranks = [one.batch(0, rank, 2).rows[:2].tolist() for rank in (0, 1)]
    assert ranks[0] + ranks[1] == [row for step in (0, 1) for row in one.batch(step).rows[:2].tolist()]
