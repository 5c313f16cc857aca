"""The reward model: pairs, accuracy and calibration by hand; it beats distances where behaviour adds information to content."""

import math

import numpy as np
import pytest
import torch

from mmsid.errors import ArtifactError
from mmsid.quantize import nearest_items
from mmsid.refine import features, reward
from mmsid.refine.evidence import EvidenceConfig
from mmsid.refine.features import Material, feature_names, most_alike, read_features
from mmsid.refine.policy import Reference
from mmsid.refine.preference_pairs import Pairs, calibration_curve, calibration_error, make_pairs, pair_accuracy
from mmsid.refine.reward import RewardConfig, SidReward
from mmsid.tokenizer.heads import ResidualHead

SMALL = RewardConfig(steps=120, batch=512)


def _world(seed: int = 0, behavioural: bool = True):
    """120 items in 6 behavioural clusters that content identifies in part; histories stay inside a cluster, or are random."""
    rng = np.random.default_rng(seed)
    items, clusters, dim = 120, 6, 12
    cluster = np.arange(items) % clusters
    centres = rng.normal(size=(clusters, dim))
    content = centres[cluster] + 1.2 * rng.normal(size=(items, dim))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ResidualHead(dim, 2, 8, dim)
    with torch.no_grad():
        head.projection.weight.copy_(torch.eye(dim))
        head.vectors[0, :clusters] = torch.from_numpy(centres)
        head.log_temperature.fill_(1.5)
    states = torch.from_numpy(content).float()[:, None].expand(-1, 2, -1).contiguous()
    groups = [np.flatnonzero(cluster == number) for number in range(clusters)]
    draw = (lambda: rng.choice(groups[rng.integers(clusters)], 6, replace=False)) if behavioural else (lambda: rng.integers(0, items, 6))
    reference = Reference(head, states, top_m=8)
    vectors = (content / np.linalg.norm(content, axis=1, keepdims=True)).astype(np.float32)
    return Material(reference, vectors, reference.greedy, np.arange(items)), [draw() for _ in range(300)], [draw() for _ in range(80)]


def test_bradley_terry_by_hand():
    loss = reward.bradley_terry_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert float(loss) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_pairs_accuracy_and_calibration_by_hand():
    pairs = make_pairs(np.array([[0.5, 0.1, 0.505]]), tie=0.01)
    assert list(zip(*(part.tolist() for part in pairs), strict=True)) == [(0, 0, 1), (0, 2, 1)]  # 0 against 2 is a tie
    scores = np.array([[0.0, 1.0, 2.0]])
    assert pair_accuracy(scores, pairs) == 0.5
    assert pair_accuracy(np.zeros((1, 3)), pairs) == 0.5
    # one right and one wrong, both with confidence sigmoid(1) = .731: error .731 - .5
    curve = calibration_curve(scores, pairs)
    sure = 1 / (1 + math.exp(-1))
    assert curve == [{"confidence": pytest.approx(sure), "right": 0.5, "pairs": 2}]
    assert calibration_error(curve) == pytest.approx(sure - 0.5)
    empty = Pairs(*(np.empty(0, dtype=np.int64) for _ in range(3)))
    assert math.isnan(pair_accuracy(scores, empty))
    assert calibration_curve(scores, empty) == [] and math.isnan(calibration_error([]))


def test_calibration_by_bins_by_hand():
    scores = np.array([[0.0, 1.0, 5.0]])
    pairs = Pairs(np.zeros(3, dtype=np.int64), np.array([1, 2, 1]), np.array([0, 0, 2]))  # right by 1, right by 5, wrong by 4
    sure = [1 / (1 + math.exp(-gap)) for gap in (1, 4, 5)]
    low, high = calibration_curve(scores, pairs, bins=2)
    assert low == {"confidence": pytest.approx(sure[0]), "right": 1.0, "pairs": 1}
    assert high == {"confidence": pytest.approx((sure[1] + sure[2]) / 2), "right": 0.5, "pairs": 2}
    expected = (1 - sure[0] + 2 * abs((sure[1] + sure[2]) / 2 - 0.5)) / 3
    assert calibration_error([low, high]) == pytest.approx(expected)


def test_reward_beats_distances_where_behaviour_adds_information(tmp_path):
    material, histories, held_out = _world()
    model, report = reward.train_reward(material, histories, held_out, EvidenceConfig(), SMALL, seed=0)
    assert report["usable"] and report["gain"] > 0.03
    accuracy = report["accuracy"]
    assert accuracy["reward"] > 0.7 and 0 <= report["calibration_error"] < 0.25
    assert report["gain"] == pytest.approx(accuracy["reward"] - accuracy["distance_only"])
    assert report["gain_over_unfitted"] == pytest.approx(accuracy["reward"] - accuracy["distance_unfitted"])
    assert sum(part["pairs"] for part in report["calibration"]) == report["test_pairs"]
    # histories stay inside clusters that content identifies only in part
    assert report["carried"]["neighbours"] > 0.05 > abs(report["carried"]["crowding"])
    model.save(tmp_path / "reward", report)
    again = SidReward.load(tmp_path / "reward")
    rows = np.arange(10)
    read = read_features(material, material.table(histories, EvidenceConfig()), rows, material.codes[rows, None])
    assert read.shape == (10, 1, len(feature_names(2)))
    with torch.no_grad():
        torch.testing.assert_close(again(read), model.eval()(read))
    (tmp_path / "reward" / "reward.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError):
        SidReward.load(tmp_path / "reward")


def test_reward_on_random_behaviour_is_not_usable():
    material, histories, held_out = _world(behavioural=False)
    _, report = reward.train_reward(material, histories, held_out, EvidenceConfig(), SMALL.model_copy(update={"least_gain": 0.05}), seed=0)
    assert not report["usable"] and "distances" in report["reason"]


def test_reward_without_co_engagement_is_not_usable():
    material, *_ = _world()
    histories = held_out = [np.array([row]) for row in range(50)]
    _, report = reward.train_reward(material, histories, held_out, EvidenceConfig(), SMALL, seed=0)
    assert not report["usable"] and "nothing to learn" in report["reason"]


def test_most_alike_by_hand():
    vectors = np.array([[1.0, 0], [0.8, 0.6], [0, 1], [-1.8, -1.6]])  # their mean is 0; the last unit vector is (-.747, -.664)
    near, weight = most_alike(vectors, count=2, sharpness=1.0)
    assert near.tolist() == [[1, 2], [0, 2], [1, 0], [2, 0]]  # cosines: 0-1 .8, 1-2 .6, 0-2 0, 3-2 -.66, 3-0 -.75
    assert weight[0] == pytest.approx([1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(0.8))])
    assert weight.sum(1) == pytest.approx(np.ones(4)) and most_alike(vectors, count=9)[0].shape == (4, 3)


def test_experts_read_their_own_features_only():
    material, histories, _ = _world()
    names = feature_names(2)
    rows = np.arange(5)
    read = read_features(material, material.table(histories, EvidenceConfig()), rows, material.codes[rows, None])
    model = SidReward(names, 8, distance_weight=0.5)
    other = read.clone()
    other[..., [number for number, name in enumerate(names) if not name.startswith("distance")]] += 3
    with torch.no_grad():
        (behaviour, distance), (changed, same) = model.experts(read), model.experts(other)
        assert torch.equal(distance, same) and not torch.equal(behaviour, changed)
        torch.testing.assert_close(model(read), behaviour + 0.5 * distance)


def test_same_seed_same_reward():
    material, histories, held_out = _world()
    quick = SMALL.model_copy(update={"steps": 5})
    first, report = reward.train_reward(material, histories, held_out, EvidenceConfig(), quick, seed=3)
    second, again = reward.train_reward(material, histories, held_out, EvidenceConfig(), quick, seed=3)
    assert report == again and all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_event_weights_let_sure_events_outvote_many_weak_ones():
    material, histories, held_out = _world()
    rng = np.random.default_rng(0)
    noise = [rng.integers(len(material.codes), size=len(history)) for history in histories * 12]
    weights = [np.ones(len(history)) for history in histories] + [np.full(len(history), 0.01) for history in noise]
    gains = {}
    for name, given in (("unweighted", None), ("weighted", weights)):
        gains[name] = reward.train_reward(material, histories + noise, held_out, EvidenceConfig(), SMALL, 0, given)[1]["gain"]
    assert gains["weighted"] > gains["unweighted"] + 0.02


def test_a_large_catalogue_is_searched_by_an_inverted_file(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 16))
    vectors = np.repeat(centres, 60, axis=0) + 0.3 * rng.standard_normal((2400, 16))
    exact, _ = features.most_alike(vectors)
    monkeypatch.setattr(nearest_items, "EXACT_UP_TO", 100)
    near, approximate = features.most_alike(vectors)
    assert near.shape == exact.shape and (near != np.arange(len(near))[:, None]).all() and approximate.sum(1) == pytest.approx(1)
    same = np.mean([len(set(one) & set(other)) / near.shape[1] for one, other in zip(near, exact, strict=True)])
    assert same > 0.6, f"only {same:.0%} of the nearest items are found"
