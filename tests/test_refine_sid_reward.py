"""`--part sid`: the reward of codes by itself is the one that refinement would fit, written with its report."""

from test_refine_stage import _config, start  # noqa: F401  (a fixture)

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
