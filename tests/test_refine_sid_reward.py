"""`--part sid`: the reward of codes by itself is the one that refinement would fit, written with its report."""

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
    told = _config(start, tmp_path / "sid_reward", reward=RewardConfig(steps=30))
    out = run(SidRewardConfig(**told.model_dump()))
    extra = read_manifest(out, "sid_reward")["extra"]
    assert extra["report"]["pairs"] > 0 and extra["usable"] == extra["report"]["usable"]
    assert read_json(out / "reward.json")["report"] == extra["report"]
    assert SidReward.load(out).names and not (out / "tokenizer").exists()


@pytest.mark.slow
def test_blocks_of_items_are_moved_and_a_recommender_is_asked_about_each(start, tmp_path):  # noqa: F811
    told = _config(start, tmp_path / "unused", reward=RewardConfig(steps=30)).model_dump(mode="json")
    refine = {key: told[key] for key in ("tokenizer", "sids", "reward")}
    config, out = tmp_path / "tiny.yaml", tmp_path / "outcome.json"
    config.write_text(yaml.safe_dump({"name": "tiny", "runs": str(tmp_path), "catalog": told["catalog"], "refine": refine}))
    script = Path(__file__).parents[1] / "benchmarks" / "reward_vs_recommender.py"
    command = [sys.executable, script, "--config", config, "--blocks", "4", "--epochs", "1", "--jobs", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found["blocks"]) == 4 and not out.with_suffix(".partial").exists()
    assert found["start"]["log_likelihood"] < 0 < found["noise"]["log_likelihood"]
    named = {"whole reward", "sid_reward", "distance expert", "unfitted distance", "gate's target"}
    assert all(named <= found["correlations"][outcome].keys() for outcome in ("log_likelihood", "NDCG@10"))
    came, low, high = found["correlations"]["log_likelihood"]["sid_reward"]
    assert -1 <= low <= came <= high <= 1
    assert any(block["said"]["sid_reward"] != 0 for block in found["blocks"]), "blocks were moved"


def test_what_was_said_and_what_came_by_hand():
    # two experts that vary apart: the outcome is 2 of the first and -1 of the second, and the reward their sum
    said = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    rows = [
        {
            "said": {"behaviour expert": first, "distance expert": second, "sid_reward": first + second},
            "came": dict.fromkeys(reward_vs_recommender.OUTCOMES, 2 * first - second),
        }
        for first, second in said
    ]
    found, weights = reward_vs_recommender.correlations(rows)["NDCG@10"], reward_vs_recommender.shares(rows)["NDCG@10"]
    assert [found[name][0] for name in ("behaviour expert", "distance expert")] == pytest.approx([2 / 5**0.5, -1 / 5**0.5])
    assert found["sid_reward"][0] == pytest.approx(1 / 10**0.5)
    assert list(weights.values()) == pytest.approx([2 / 5**0.5, -1 / 5**0.5])
    assert reward_vs_recommender.pearson(np.ones(3), np.arange(3)) == 0.0
