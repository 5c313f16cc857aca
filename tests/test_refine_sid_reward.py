"""Stage sid_reward writes the reward of refinement with its report; benchmark reward_vs_recommender on a tiny catalogue."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_refine_stage import _config, start  # noqa: F401  (a fixture)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reward_vs_recommender

from mmsid.artifacts import read_json, read_manifest
from mmsid.refine.reward import RewardConfig, SidReward
from mmsid.refine.sid_reward import SidRewardConfig, run


def test_the_reward_is_fitted_reported_and_read_back(start, tmp_path):  # noqa: F811
    config = _config(start, tmp_path / "sid_reward", reward=RewardConfig(steps=30))
    out = run(SidRewardConfig(**config.model_dump()))
    extra = read_manifest(out, "sid_reward")["extra"]
    assert extra["report"]["pairs"] > 0 and extra["usable"] == extra["report"]["usable"]
    assert read_json(out / "reward.json")["report"] == extra["report"]
    assert SidReward.load(out).names and not (out / "tokenizer").exists()


@pytest.mark.slow
def test_blocks_of_items_are_moved_and_a_recommender_is_trained_on_each(start, tmp_path):  # noqa: F811
    settings = _config(start, tmp_path / "unused", reward=RewardConfig(steps=30)).model_dump(mode="json")
    refine = {key: settings[key] for key in ("tokenizer", "sids", "reward")}
    config, out = tmp_path / "tiny.yaml", tmp_path / "outcome.json"
    config.write_text(yaml.safe_dump({"name": "tiny", "runs": str(tmp_path), "catalog": settings["catalog"], "refine": refine}))
    script = Path(__file__).parents[1] / "benchmarks" / "reward_vs_recommender.py"
    command = [sys.executable, script, "--config", config, "--blocks", "4", "--epochs", "1", "--jobs", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found["blocks"]) == 4 and not out.with_suffix(".partial").exists()
    assert found["start"]["log_likelihood"] < 0 < found["noise"]["log_likelihood"]
    named = {"whole reward", "sid_reward", "distance expert", "unfitted distance", "gate's target"}
    assert all(named <= found["correlations"][outcome].keys() for outcome in ("log_likelihood", "NDCG@10"))
    correlation, low, high = found["correlations"]["log_likelihood"]["sid_reward"]
    assert -1 - 1e-9 <= low <= correlation <= high <= 1 + 1e-9  # rounding
    assert any(block["predictors"]["sid_reward"] != 0 for block in found["blocks"]), "blocks were moved"


def test_correlations_and_shares_by_hand():
    # two experts that vary apart: the outcome is 2 of the first and -1 of the second, and the reward their sum
    experts = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    rows = [
        {
            "predictors": {"behaviour expert": first, "distance expert": second, "sid_reward": first + second},
            "outcomes": dict.fromkeys(reward_vs_recommender.OUTCOMES, 2 * first - second),
        }
        for first, second in experts
    ]
    found, weights = reward_vs_recommender.correlations(rows)["NDCG@10"], reward_vs_recommender.shares(rows)["NDCG@10"]
    assert [found[name][0] for name in ("behaviour expert", "distance expert")] == pytest.approx([2 / 5**0.5, -1 / 5**0.5])
    assert found["sid_reward"][0] == pytest.approx(1 / 10**0.5)
    assert list(weights.values()) == pytest.approx([2 / 5**0.5, -1 / 5**0.5])
    assert reward_vs_recommender.pearson(np.ones(3), np.arange(3)) == 0.0
