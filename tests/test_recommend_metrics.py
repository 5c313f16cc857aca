"""Item-level metrics: values computed by hand, chance for one shared SID, permutation, coverage, bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmsid.errors import MmsidError
from mmsid.recommend.metrics import (
    Coverage,
    Ranks,
    hit_rate,
    ndcg,
    over_seeds,
    paired_bootstraps,
    per_position,
    rank_targets,
    sid_level_hits,
    summarise,
)


def ranks(above, tied) -> Ranks:
    return Ranks(np.array([above]), np.array([tied]))


def test_without_ties_metrics_depend_on_the_rank():
    third = ranks(2, 1)
    assert hit_rate(third, 2)[0] == 0 and hit_rate(third, 3)[0] == 1
    assert ndcg(third, 10)[0] == pytest.approx(1 / math.log2(4))
    assert per_position(third, "MRR@50")[0] == pytest.approx(1 / 3)


def test_a_sid_shared_by_three_items_occupies_three_ranks():
    """A target that shares its SID with 2 items after 4 others has ranks 5, 6, 7 with probability 1/3 each."""
    shared = ranks(4, 3)
    assert hit_rate(shared, 5)[0] == pytest.approx(1 / 3)
    assert hit_rate(shared, 6)[0] == pytest.approx(2 / 3)
    assert hit_rate(shared, 10)[0] == 1
    assert ndcg(shared, 6)[0] == pytest.approx((1 / math.log2(6) + 1 / math.log2(7)) / 3)
    assert per_position(shared, "MRR@50")[0] == pytest.approx((1 / 5 + 1 / 6 + 1 / 7) / 3)
    assert per_position(shared, "MRR@6")[0] == pytest.approx((1 / 5 + 1 / 6) / 3)  # the third rank is beyond the cutoff


def test_a_target_that_is_not_a_candidate_earns_nothing():
    assert set(summarise(ranks(7, 0)).values()) == {0.0}
    assert set(summarise(Ranks(np.zeros(0, int), np.zeros(0, int))).values()) == {0.0}


def test_one_sid_for_all_items_gives_exactly_chance():
    scores = torch.zeros(6, 40)
    above, tied = rank_targets(scores, torch.arange(6))
    result = summarise(Ranks(above.numpy(), tied.numpy()))
    for cutoff in (1, 5, 10, 20):
        assert result[f"HR@{cutoff}"] == pytest.approx(cutoff / 40, abs=1e-12)
    # scoring SID strings would count a hit at rank 1 for every user
    assert result["HR@1"] < 1
    coverage = Coverage(40)
    coverage.update(scores)
    assert coverage.value() == pytest.approx(1 - 0.75**6)


def test_sid_level_hits_count_distinct_sids():
    """Items 0 to 2 share SID 0, items 3 and 4 SID 1, item 5 has SID 2."""
    scores, sids = torch.tensor([[3.0, 3.0, 3.0, 2.0, 1.0, 0.0]]), torch.tensor([0, 0, 0, 1, 1, 2])

    def hit(item: int, cutoff: int, given: torch.Tensor = scores) -> float:
        return sid_level_hits(given, torch.tensor([item]), sids, cutoff)[0]

    assert [hit(0, 1), hit(3, 1), hit(3, 2), hit(4, 2), hit(5, 2), hit(5, 3)] == [1, 0, 1, 1, 0, 1]
    above, tied = rank_targets(scores, torch.tensor([0]))
    assert hit_rate(Ranks(above.numpy(), tied.numpy()), 1)[0] == pytest.approx(1 / 3)  # the gap that the shared SID makes
    masked = scores.clone()
    masked[0, [0, 1, 2]] = -torch.inf
    assert hit(0, 3, masked) == 0 and hit(3, 1, masked) == 1
    assert hit(5, 1, torch.zeros(1, 6)) == pytest.approx(1 / 3)  # three SIDs are tied


def test_masked_items_are_not_candidates_and_nan_raises_an_error():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    scores[0, 0] = -torch.inf
    above, tied = rank_targets(scores, torch.tensor([2]))
    assert (above.item(), tied.item()) == (0, 2)
    above, tied = rank_targets(scores, torch.tensor([0]))
    assert (above.item(), tied.item()) == (3, 0)
    with pytest.raises(MmsidError, match="NaN"):
        rank_targets(torch.tensor([[math.nan, 1.0]]), torch.tensor([1]))


def test_permuting_rows_and_ids_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (50, 200), generator=generator).float()
    targets = torch.randint(0, 200, (50,), generator=generator)
    users, items = torch.randperm(50, generator=generator), torch.randperm(200, generator=generator)
    place = torch.argsort(items)
    results = []
    for matrix, chosen in ((scores, targets), (scores[users][:, items], place[targets[users]])):
        above, tied = rank_targets(matrix, chosen)
        coverage = Coverage(200)
        coverage.update(matrix)
        results.append({**summarise(Ranks(above.numpy(), tied.numpy())), "coverage": coverage.value()})
    assert results[0] == pytest.approx(results[1], abs=1e-12)


def test_coverage_of_distinct_scores_and_of_few_candidates():
    coverage = Coverage(5, cutoff=2)
    coverage.update(torch.tensor([[5.0, 4, 3, 2, 1], [5.0, 4, 3, 2, 1]]))
    assert coverage.value() == pytest.approx(2 / 5)
    few = Coverage(5, cutoff=4)
    few.update(torch.tensor([[1.0, -torch.inf, -torch.inf, 2.0, -torch.inf]]))
    assert few.value() == pytest.approx(2 / 5)


def test_paired_bootstrap_detects_a_shift_but_not_noise():
    rng = np.random.default_rng(1)
    base = rng.random((3, 400))
    shifted, noisy = (base + shift + 0.05 * rng.standard_normal((3, 400)) for shift in (0.1, 0.0))
    better, same, one_seed = paired_bootstraps([(shifted, base), (noisy, base), (base, base[:1])], draws=2000)
    assert better.low > 0.08 and better.high < 0.12 and better.p < 0.01 and better.mean == pytest.approx(0.1, abs=0.01)
    assert same.low < 0 < same.high and 0 < same.detectable < 0.02
    assert one_seed.mean == pytest.approx((base - base[:1]).mean())
    with pytest.raises(ValueError, match="pair"):
        paired_bootstraps([(base, base[:, :10])])


def test_mean_and_deviation_over_seeds():
    table = over_seeds([{"HR@1": 0.1}, {"HR@1": 0.3}])
    assert table["HR@1"]["mean"] == pytest.approx(0.2) and table["HR@1"]["std"] == pytest.approx(0.2 / math.sqrt(2))
    assert over_seeds([{"HR@1": 0.1}])["HR@1"]["std"] == 0
    assert over_seeds([{"HR@1": 0.1, "more": 1.0}, {"HR@1": 0.1}]).keys() == {"HR@1"}


def test_weighted_metrics_weight_each_target_by_its_event_and_exist_only_where_weights_differ():
    """A conversion at rank 1 and a click beyond rank 10: 2.5 of 3.5, against 1 of 2 without weights."""
    both = Ranks(np.array([0, 10]), np.array([1, 1]))
    found = summarise(both._replace(weights=np.array([2.5, 1.0])))
    assert found["HR@10"] == 0.5 and found["weighted HR@10"] == pytest.approx(2.5 / 3.5)
    assert found["weighted NDCG@5"] == pytest.approx(2.5 / 3.5) and found["weighted MRR@50"] == pytest.approx((2.5 + 1 / 11) / 3.5)
    for alike in (None, np.array([2.5, 2.5])):
        assert summarise(both._replace(weights=alike)) == summarise(both)
    nothing = Ranks(np.zeros(0, int), np.zeros(0, int))
    assert summarise(nothing._replace(weights=np.zeros(0))) == summarise(nothing)
