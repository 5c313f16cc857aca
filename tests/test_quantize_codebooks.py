"""Sinkhorn balancing, balanced residual k-means, RQ-KMeans, RQ-VAE and the codebook policy."""

import numpy as np
import pytest
import torch

from mmsid.errors import MmsidError
from mmsid.quantize import CodebookScores, ResidualCodebooks, balanced_residual_kmeans, rq_kmeans, rq_vae
from mmsid.quantize.sinkhorn import column_log_weights


def clustered(num_items=600, dim=12, clusters=10, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.dirichlet(np.full(clusters, 0.6))  # uneven, so that balancing has an effect
    centres = rng.normal(size=(clusters, dim)) * 2
    return (centres[rng.choice(clusters, num_items, p=sizes)] + rng.normal(size=(num_items, dim))).astype(np.float32)


def perplexity(codes, size):
    share = torch.bincount(codes, minlength=size).double() / len(codes)
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


def balanced_plan(scores, epsilon, iterations, block=16):
    """Plan (N, K) of the column weights that `column_log_weights` finds over row blocks; rows sum to 1."""
    kernel = ((scores - scores.max(1, keepdim=True).values) / epsilon).exp()
    plan = kernel * column_log_weights(lambda: iter(kernel.split(block)), *scores.shape, iterations).exp()
    return plan / plan.sum(1, keepdim=True)


def test_sinkhorn_by_hand():
    scores = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    plan = balanced_plan(scores, epsilon=1.0, iterations=200)
    # doubly stochastic 2x2: diagonal p with p^2/(1-p)^2 = e^2 e^0 / (e^0 e^1) = e  ->  p = sqrt(e) / (1 + sqrt(e))
    p = np.sqrt(np.e) / (1 + np.sqrt(np.e))
    assert plan.numpy() == pytest.approx(np.array([[p, 1 - p], [1 - p, p]]), abs=1e-9)


def test_sinkhorn_columns_have_equal_mass_and_row_shifts_and_blocks_have_no_effect():
    scores = torch.randn((90, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = balanced_plan(scores, epsilon=0.5, iterations=100)
    assert torch.allclose(plan.sum(0), torch.full((6,), 15.0, dtype=torch.float64), atol=1e-3)
    shifted = scores + torch.arange(90.0)[:, None].double()
    assert torch.allclose(plan, balanced_plan(shifted, epsilon=0.5, iterations=100, block=90), atol=1e-9)


def test_balanced_levels_are_balanced_and_reduce_the_error():
    x = clustered()
    fit = balanced_residual_kmeans(x, num_levels=3, codebook_size=16, seed=0)
    plain = rq_kmeans(x, 3, 16).encode(x)
    for level in range(3):
        assert perplexity(fit.codes[:, level], 16) > 14.5
        assert perplexity(fit.codes[:, level], 16) > perplexity(plain[:, level], 16) - 0.1
    errors = [float((torch.from_numpy(x) - fit.codebooks.decode(fit.codes[:, :level])).square().sum(1).mean()) for level in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]


def test_centroids_are_means_of_their_residuals():
    x = clustered(num_items=200)
    fit = balanced_residual_kmeans(x, num_levels=2, codebook_size=8, seed=3)
    residual = torch.from_numpy(x)
    for level in range(2):
        for code in fit.codes[:, level].unique():
            mean = residual[fit.codes[:, level] == code].mean(0)
            assert torch.allclose(fit.codebooks.vectors[level, code], mean, atol=1e-5)
        residual = residual - fit.codebooks.vectors[level][fit.codes[:, level]]


def test_fit_depends_on_seed_but_not_on_row_order_or_cache(monkeypatch):
    x = clustered()
    order = np.random.default_rng(5).permutation(len(x))
    first = balanced_residual_kmeans(x, 3, 16, seed=0)
    monkeypatch.setattr("mmsid.quantize.balanced._CACHE_BYTES", 0)
    again = balanced_residual_kmeans(x, 3, 16, seed=0)
    permuted = balanced_residual_kmeans(x[order], 3, 16, seed=0)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.codebooks.vectors, again.codebooks.vectors)
    assert torch.equal(first.codes[torch.from_numpy(order)], permuted.codes)
    assert torch.equal(first.codebooks.vectors, permuted.codebooks.vectors)
    assert not torch.equal(first.codebooks.vectors, balanced_residual_kmeans(x, 3, 16, seed=1).codebooks.vectors)
    rq = rq_kmeans(x, 3, 16)
    assert torch.equal(rq.vectors, rq_kmeans(x[order], 3, 16).vectors)


def test_duplicates_share_codes_and_count_once():
    x = clustered(num_items=100)
    doubled = np.concatenate([x, x[:40], x[:40]])
    fit = balanced_residual_kmeans(doubled, 3, 8)
    assert torch.equal(fit.codes[:40], fit.codes[100:140]) and torch.equal(fit.codes[:40], fit.codes[140:])
    assert torch.equal(fit.codebooks.vectors, balanced_residual_kmeans(x, 3, 8).codebooks.vectors)


@pytest.mark.parametrize("fit", [lambda x: balanced_residual_kmeans(x, 3, 16).codebooks, lambda x: rq_kmeans(x, 3, 16)])
def test_fewer_items_than_codes(fit):
    x = clustered(num_items=5)
    codebooks = fit(x)
    codes = codebooks.encode(x)
    assert len(codes.unique(dim=0)) == 5
    assert codebooks.used[0].sum() == 5 and torch.isfinite(codebooks.vectors).all()
    assert codebooks.used[0][codes[:, 0]].all()
    assert torch.allclose(codebooks.decode(codes), torch.from_numpy(x), atol=1e-4)


@pytest.mark.parametrize("num_items", [1, 7])
def test_zero_vectors_are_allowed(num_items):
    x = np.zeros((num_items, 4), dtype=np.float32)
    fit = balanced_residual_kmeans(x, 2, 4)
    assert (fit.codes == 0).all() and (fit.codebooks.encode(x) == 0).all() and (rq_kmeans(x, 2, 4).encode(x) == 0).all()
    assert torch.equal(fit.codebooks.vectors, torch.zeros(2, 4, 4))


@pytest.mark.parametrize("fit", [balanced_residual_kmeans, rq_kmeans])
def test_nan_is_an_error_with_the_row(fit):
    x = clustered(num_items=20)
    x[13, 2] = np.nan
    with pytest.raises(MmsidError, match="first row 13"):
        fit(x)
    with pytest.raises(MmsidError, match=r"shape \(0, 4\)"):
        fit(np.zeros((0, 4)))


def test_encode_by_hand_with_ties_and_batches():
    codebooks = ResidualCodebooks(torch.tensor([[[1.0, 0], [-1, 0], [1, 0]], [[0.0, 0.5], [0, -0.5], [0.2, 0]]]))
    x = np.array([[1.2, 0], [0, 0.4], [-1, -0.4]], dtype=np.float32)
    # row 0: nearest (1, 0), the equal code 2 loses the tie; residual (.2, 0) -> code 2. row 1: a tie of all -> 0; residual (-1, .4) -> 0
    assert codebooks.encode(x).tolist() == [[0, 2], [0, 0], [1, 1]]
    assert codebooks.decode([[0, 2]]).tolist() == [[pytest.approx(1.2), 0.0]]
    assert codebooks.decode([[0]]).tolist() == [[1.0, 0.0]]
    with pytest.raises(MmsidError, match="3 dimensions, the codebooks 2"):
        codebooks.encode(np.zeros((1, 3)))
    many = clustered(num_items=64)
    fitted = rq_kmeans(many, 3, 8)
    assert torch.equal(fitted.encode(many), torch.cat([fitted.encode(row[None]) for row in many]))


def test_codebooks_round_trip(tmp_path):
    codebooks = rq_kmeans(clustered(num_items=6), 2, 8)
    codebooks.save(tmp_path / "codebooks.safetensors")
    loaded = ResidualCodebooks.load(tmp_path / "codebooks.safetensors")
    assert torch.equal(loaded.vectors, codebooks.vectors) and torch.equal(loaded.used, codebooks.used)


def test_scores_by_hand():
    codebooks = ResidualCodebooks(torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]]))
    scores = CodebookScores(codebooks, np.array([[4.5], [0.0]]))
    assert scores.temperature == [0.125, 0.125]  # after each level, item 0 leaves a squared residual of 0.25, item 1 leaves 0
    scores.temperature = [2.0, 0.5]
    # item 0 after prefix (1): residual .5, both codes at squared distance .25 -> log 1/2 each.
    # item 1 after prefix (0): residual 0, distances 0 and 1, temperature .5 -> softmax(0, -2).
    expected = [[np.log(0.5)] * 2, [-np.log1p(np.exp(-2)), -2 - np.log1p(np.exp(-2))]]
    assert scores.last_scores(np.array([0, 1]), np.array([[1], [0]])) == pytest.approx(np.array(expected))
    # prefixes of item 1: squared distances 0 and 16 over 2 -> softmax(0, -8)
    candidates = list(scores.prefix_candidates(1))
    assert [prefix for prefix, _ in candidates] == [(0,), (1,)]
    assert candidates[1][1] == pytest.approx(-8 - np.log1p(np.exp(-8)))
    # margins: item 1 with codes (0, 0): min(8, 2) = 2; with (0, 1): level 2 is 2 worse than the other code
    assert scores.margin([[1, 0], [0, 1]])[1] == pytest.approx(-2)
    assert scores.margin([[1, 0], [0, 0]])[1] == pytest.approx(2)


def test_prefix_candidates_are_in_order_and_complete():
    x = clustered(num_items=80)
    fit = balanced_residual_kmeans(x, 3, 6)
    candidates = list(CodebookScores(fit.codebooks, x).prefix_candidates(3))
    assert len({prefix for prefix, _ in candidates}) == len(candidates) == 36
    head = [value for _, value in candidates[:16]]
    assert head == sorted(head, reverse=True)
    assert sum(np.exp(value) for _, value in candidates) == pytest.approx(1)


def reference_codes(x, codebooks):
    """Slow reference: greedy assignment by explicit differences in float64."""
    residual, codes = x.astype(np.float64), []
    for vectors, used in zip(codebooks.vectors.double().numpy(), codebooks.used.numpy()):
        distance = np.square(residual[:, None] - vectors[None]).sum(-1) + np.where(used, 0.0, np.inf)
        codes.append(distance.argmin(axis=1))
        residual = residual - vectors[codes[-1]]
    return np.stack(codes, 1)


@pytest.mark.parametrize("shift", [0.0, 30.0])  # far from the origin, float32 distances are noise and float64 decides
def test_encode_is_the_exact_greedy_assignment_for_any_batching(shift):
    x = clustered(num_items=3000, dim=24, seed=2) + np.float32(shift)
    codebooks = rq_kmeans(x, 3, 32)
    codes = codebooks.encode(x).numpy()
    assert np.array_equal(codes, reference_codes(x, codebooks))
    order = np.random.default_rng(0).permutation(len(x))
    assert np.array_equal(codebooks.encode(x[order]).numpy(), codes[order])
    assert np.array_equal(torch.cat([codebooks.encode(part) for part in np.array_split(x, 700)]).numpy(), codes)


def test_encode_decides_near_ties_in_float64():
    # Items next to the midpoint of two codes: float64 resolves a lead of 1e-9, float32 distances do not.
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(2, 40)).astype(np.float32)
    midpoint = codebook.astype(np.float64).mean(0)
    towards = codebook[0].astype(np.float64) - codebook[1]
    x = np.stack([(midpoint + side * 1e-7 * towards).astype(np.float32) for side in rng.uniform(-1, 1, size=300)])
    codebooks = ResidualCodebooks(torch.from_numpy(codebook[None]))
    expected = reference_codes(x, codebooks)
    assert 20 < expected.sum() < 280
    assert np.array_equal(codebooks.encode(x).numpy(), expected)
    single = np.square(x[:, None] - codebook[None]).sum(-1).argmin(axis=1)
    assert not np.array_equal(single[:, None], expected), "float32 alone gives other codes"


def test_unused_codes_are_never_chosen():
    codebooks = ResidualCodebooks(torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[True, False, True]]))
    assert codebooks.encode(np.array([[0.9], [1.1], [4.0]])).ravel().tolist() == [0, 0, 2]


def test_rq_vae_uses_its_codes_and_is_independent_of_row_order():
    x = clustered(num_items=400)
    settings = {"num_levels": 2, "codebook_size": 16, "steps": 60, "batch_rows": 128, "latent_dim": 8, "hidden": 32, "check_every": 20}
    fit = rq_vae(x, seed=0, **settings)
    codes = fit.codebooks.encode(fit.latent)
    assert codes.shape == (400, 2) and min(perplexity(codes[:, level], 16) for level in range(2)) > 8
    unexplained = (fit.latent - fit.codebooks.decode(codes)).square().sum() / (fit.latent - fit.latent.mean(0)).square().sum()
    assert unexplained < 0.5
    order = np.random.default_rng(5).permutation(len(x))
    permuted = rq_vae(np.concatenate([x[order], x[order[:30]]]), seed=0, **settings)  # duplicates have no effect either
    assert torch.equal(permuted.codebooks.vectors, fit.codebooks.vectors)
    assert torch.equal(permuted.codebooks.encode(permuted.latent)[:400], codes[torch.from_numpy(order)])


def test_rq_vae_keeps_the_global_random_state_and_allows_fewer_items_than_codes():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    fit = rq_vae(clustered(num_items=5), 2, 8, steps=5, latent_dim=4, hidden=8)
    assert torch.equal(torch.rand(3), expected)
    assert fit.latent.shape == (5, 4) and torch.isfinite(fit.codebooks.vectors).all()
    with pytest.raises(MmsidError, match="first row 1"):
        rq_vae(np.array([[0.0, 1.0], [np.nan, 0.0]]))
