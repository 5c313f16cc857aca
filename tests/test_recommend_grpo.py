"""Reinforcement of the flat decoder: rewards; equal distributions in sampling, scoring and search; train items only."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from test_recommend_architectures import ITEMS, circle_paths, circle_split
from test_recommend_train import SMALL, write_catalogue, write_sids
from transformers import GPT2LMHeadModel
from trl import GRPOConfig

from mmsid.artifacts import read_manifest, write_table, writing
from mmsid.catalog.demo import write_demo_catalog
from mmsid.catalog.demo.new_ads import write_new_ads
from mmsid.errors import ArtifactError, MmsidError
from mmsid.recommend.beam_search import beam_item_scores, beam_search
from mmsid.recommend.flat import FlatShape
from mmsid.recommend.grpo import TrieGRPOTrainer, path_log_probs, sid_text_tokenizer
from mmsid.recommend.history_encoder import pad_histories
from mmsid.recommend.paths import PathTrie, item_paths
from mmsid.recommend.reinforce import TrainRecommenderRLConfig, run, train_examples
from mmsid.recommend.rewards import PathRewards, reward_parts
from mmsid.recommend.training import Schedule, fit
from mmsid.recommend.trie_constraint import TrieConstraint
from mmsid.sids.trie import Trie
from mmsid.stages import run_stages
from mmsid.trl_training import plain_arguments, train_quietly

ROOT = Path(__file__).parents[1]
SHAPE = FlatShape(d_model=32, heads=2, hidden=64, layers=1, dropout=0.1, max_history=4)


def test_rewards_by_hand():
    target = torch.tensor([[3, 1, 4, 2]]).expand(5, -1)
    drawn = torch.tensor([[3, 1, 4, 2], [3, 1, 4, 0], [3, 1, 0, 2], [0, 1, 4, 2], [3, 1, 4, 2]])
    parts = reward_parts(drawn, target, torch.tensor([1.0, 1, 1, 1, 2]), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.8]), num_levels=3)
    assert parts.exact.tolist() == [1, 0, 0, 0, 0.5]  # two items share the SID, so it decodes to the target half of the time
    assert parts.prefix.tolist() == pytest.approx([1, 1, 2 / 3, 0, 1])  # neither the suffix nor a later match counts
    assert parts.quality.tolist() == pytest.approx([0.5, 0, 0, 0, 0.4])  # no bonus for a well-described wrong item


def test_path_log_probs_by_hand():
    """Trie {(0,0), (0,2), (1,1)}: an only child has probability one, illegal codes get no mass even with high logits."""
    trie = Trie.from_codes(np.array([[0, 0], [0, 2], [1, 1]]), (2, 3))
    logits = torch.zeros(2, 2, 6)
    logits[:, 0, 1] = np.log(3.0)  # p(second code) = 3/4
    logits[:, 1, 2:5] = torch.tensor([0.0, 50.0, np.log(4.0)])
    found, entropy = path_log_probs(logits, torch.tensor([[0, 2], [1, 1]]), TrieConstraint.from_trie(trie), [0, 2])
    assert found.exp().flatten().tolist() == pytest.approx([1 / 4, 4 / 5, 3 / 4, 1.0])
    first = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert entropy.flatten().tolist() == pytest.approx([first, -(0.2 * np.log(0.2) + 0.8 * np.log(0.8)), first, 0.0])
    with pytest.raises(ValueError, match="not a path of the trie"):
        path_log_probs(logits, torch.tensor([[0, 1], [1, 1]]), TrieConstraint.from_trie(trie), [0, 2])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A partly trained flat decoder and its folder."""
    folder = tmp_path_factory.mktemp("start")
    schedule = Schedule(epochs=10, batch_size=32, lr=0.01, patience=10)
    fitted = fit(circle_paths(), circle_split(), shape=SHAPE, schedule=schedule, seed=0)
    fitted.model.cpu().language_model.save_pretrained(folder)
    return fitted, folder


def trainer_of(folder, tmp_path, *, quality=None, published=False, steps=2, **arguments) -> TrieGRPOTrainer:
    paths, split = circle_paths(), circle_split()
    tokenizer = sid_text_tokenizer(paths.sizes)
    words = [f"<a_{a}> <b_{b}>" for a, b in paths.tokens]
    examples = train_examples(split)
    data = Dataset.from_dict(
        {
            "prompt": [" ".join([tokenizer.bos_token, *(words[item] for item in history[:-1][-4:])]) for history in examples],
            "target": [int(history[-1]) for history in examples],
        }
    )
    rewards = PathRewards(paths, np.ones(ITEMS) if quality is None else quality, 2).functions(weighted=not published)
    settings = {"per_device_train_batch_size": 32, "num_generations": 8, "beta": 1e-3, "reward_weights": [1.0, 0.3, 0.5]} | arguments
    scale = "group" if published else "none"
    plain = plain_arguments(tmp_path / "trainer", steps=steps, lr=3e-3, seed=0, log_every=1)
    config = GRPOConfig(**plain, **settings, max_completion_length=2, loss_type="grpo", scale_rewards=scale)
    return TrieGRPOTrainer(GPT2LMHeadModel.from_pretrained(folder), rewards, config, data, Trie.from_codes(paths.tokens, paths.sizes))


def test_completions_are_scored_as_trie_search_scores_them(start, tmp_path):
    """With prompts of different lengths, padded on the left, all paths get the log-probabilities of exhaustive search."""
    fitted, folder = start
    trainer = trainer_of(folder, tmp_path)
    model, paths = fitted.model, circle_paths()
    histories = [np.array([3]), np.array([7, 8, 9, 10])]
    trie = PathTrie.build(paths)
    with torch.no_grad():
        beams = beam_search(model.steps(pad_histories(histories, 4)), trie, torch.full((2, 1), -1), beam=ITEMS)
        expected = beam_item_scores(beams, trie)
        prompts, real = model.sequences(pad_histories(histories, 4))
        left = [row[kept] for row, kept in zip(prompts, real, strict=True)]
        batch = trainer.processing_class.pad({"input_ids": [row.tolist() for row in left]}, return_tensors="pt")
        for row in range(2):
            ids = torch.cat([batch["input_ids"][row].expand(ITEMS, -1), model.tokens], 1)
            mask = torch.cat([batch["attention_mask"][row].expand(ITEMS, -1), torch.ones_like(model.tokens)], 1)
            ids, mask = ids.to(trainer.args.device), mask.to(trainer.args.device)
            found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 2, batch_size=7)[0].cpu()
            assert torch.allclose(found.sum(1), expected[row], atol=1e-5)
            assert found.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_rollouts_follow_the_policy_and_are_always_legal(start, tmp_path):
    """Two histories in one padded batch, 3,000 rollouts each: the share of every path matches its probability."""
    fitted, folder = start
    trainer, model, paths = trainer_of(folder, tmp_path), fitted.model, circle_paths()
    histories = [np.array([4]), np.array([1, 2, 3, 4])]
    prompts = ["<begin> " + " ".join("<a_{}> <b_{}>".format(*paths.tokens[item]) for item in history) for history in histories]
    torch.manual_seed(0)
    drawn = trainer.rollout_func(prompts * 3000, trainer)["completion_ids"]
    row_of = {tuple(path): item for item, path in enumerate(model.tokens.tolist())}
    rows = np.array([row_of[tuple(path)] for path in drawn]).reshape(3000, 2)  # a KeyError here is an illegal path
    with torch.no_grad():
        trie = PathTrie.build(paths)
        beams = beam_search(model.steps(pad_histories(histories, 4)), trie, torch.full((2, 1), -1), beam=ITEMS)
        expected = beam_item_scores(beams, trie).exp().numpy()
    for place in range(2):
        shares = np.bincount(rows[:, place], minlength=ITEMS) / 3000
        assert np.abs(shares - expected[place]).max() < 0.037  # four standard errors of a share of one half


def test_quality_weighs_our_advantages_and_cancels_under_the_published_normalisation(start, tmp_path):
    """A = q (r - mean r), where r of a hit contains alpha q. Divided by the deviation, advantages hardly depend on q."""
    _, folder = start
    seen = {}
    for name, published, level in (("ours", False, 0.25), ("published", True, 1.0), ("published", True, 0.25)):
        trainer = trainer_of(folder, tmp_path, quality=np.full(ITEMS, level), published=published, steps=1, reward_weights=[1.0, 0.0, 0.5])
        train_quietly(trainer, "test", tmp_path / "log.jsonl", {})
        hits = torch.tensor([value > 0 for value in trainer._logs["rewards"]["exact"]]).view(4, 8)
        seen[name, level] = hits.float(), torch.tensor(list(trainer._logs["advantages"])).view(4, 8)
    hits, advantages = seen["ours", 0.25]
    assert hits.any() and torch.allclose(advantages, 0.25 * (1 + 0.5 * 0.25) * (hits - hits.mean(1, keepdim=True)), atol=1e-6)
    assert torch.equal(seen["published", 1.0][0], seen["published", 0.25][0])
    assert torch.allclose(seen["published", 1.0][1], seen["published", 0.25][1], atol=2e-3)


def test_reinforcement_makes_targets_likelier_and_starts_from_the_reference(start, tmp_path):
    fitted, folder = start
    trainer = trainer_of(folder, tmp_path, steps=20, per_device_train_batch_size=128)
    before = torch.get_rng_state()
    train_quietly(trainer, "test", tmp_path / "log.jsonl", {"reward": "reward"})
    assert torch.equal(before, torch.get_rng_state()) and not (tmp_path / "trainer").exists()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "rewards/exact/mean" in line]
    assert len(steps) == 20 and steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-4
    supervised = mean_probability(fitted.model)
    moved = copy.deepcopy(fitted.model)
    moved.language_model.load_state_dict(trainer.model.state_dict())
    assert mean_probability(moved) > supervised + 0.05


def mean_probability(model) -> float:
    """Mean probability of the target over all examples, under the trie."""
    examples, trie = train_examples(circle_split()), PathTrie.build(circle_paths())
    with torch.no_grad():
        steps = model.eval().steps(pad_histories([history[:-1] for history in examples], 4))
        scores = beam_item_scores(beam_search(steps, trie, torch.full((len(examples), 1), -1), beam=ITEMS), trie)
    return scores[torch.arange(len(examples)), torch.tensor([history[-1] for history in examples])].exp().mean().item()


def test_train_examples_do_not_depend_on_valid_and_test():
    split = circle_split()
    examples = train_examples(split)
    assert len(examples) == sum(len(history) >= 2 for history in split.train)
    split.valid[:], split.test[:] = -1, -1
    assert all(np.array_equal(one, other) for one, other in zip(examples, train_examples(split), strict=True))


def _config(folder, **changes) -> TrainRecommenderRLConfig:
    catalog = {"items": folder / "items.parquet", "sequences": folder / "sequences.parquet"}
    settings = {"out": folder / "out", "catalog": catalog, "sids": folder / "random.parquet", "model": SMALL, "schedule": {"epochs": 2}}
    return TrainRecommenderRLConfig(**settings | {"reinforcement": {"steps": 2, "histories": 4, "group": 4}, "beam": 10} | changes)


def _write_quality(folder, ids) -> None:
    with writing(folder, stage="text_quality", config={}) as draft:
        write_table(draft.path / "items.parquet", [{"item_id": name, "q": None if at % 2 else 0.5} for at, name in enumerate(ids)])


def test_the_stage_writes_the_table_of_three_variants(tmp_path):
    folder = tmp_path / "data"
    numbers = write_catalogue(folder)
    write_sids(folder / "random.parquet", numbers)
    out = run(_config(folder, seeds=[0, 1]))
    found = json.loads((out / "metrics.json").read_text())
    assert [row["arm"] for row in found["arms"]] == ["supervised", "rl", "rl_published"]
    assert all({"HR@5", "HR@10", "NDCG@10", "HR@50", "coverage@10"} <= row["metrics"].keys() for row in found["arms"])
    assert {row["baseline"] for row in found["differences"]} == {"supervised"} and len(found["differences"]) == 8
    manifest = read_manifest(out, "train_recommender_rl")
    assert "none" not in manifest["extra"]["text_quality"] and "1 for every item" in manifest["extra"]["text_quality"]
    weights = [GPT2LMHeadModel.from_pretrained(out / "models" / name / "1").lm_head.weight for name in ("supervised", "rl")]
    assert not torch.equal(*weights) and not (out / "trainer").exists()
    _write_quality(folder / "quality", numbers)
    config = _config(folder, out=folder / "again", text_quality=folder / "quality", variants=["rl"])
    run_stages({"train_recommender_rl": config})
    assert read_manifest(folder / "again")["extra"]["text_quality"] == {"mean": 0.5, "deviation": 0.0}


def test_untrainable_inputs_raise_errors(tmp_path):
    folder = tmp_path / "data"
    ids = list(numbers := write_catalogue(folder))
    write_sids(folder / "random.parquet", numbers)
    with pytest.raises(ArtifactError, match="text_quality"):
        run(_config(folder, text_quality=folder / "none"))
    config = _config(folder)
    pairs = [{"user_id": f"u{at}", "items": ids[:3]} for at in range(4)]  # a single item before the two targets
    pq.write_table(pa.Table.from_pylist(pairs), folder / "sequences.parquet")
    with pytest.raises(MmsidError, match="no user has two train items"):
        run(config)


def test_a_suffix_level_counts_for_the_exact_reward_only():
    paths = item_paths(np.array([[0, 1], [0, 1], [1, 0]]), np.array([0, 1, -1]), (2, 2))
    rewards = PathRewards(paths, np.array([1.0, 1.0, 0.5]), num_levels=2)
    exact, prefix, quality = rewards.functions(weighted=True)
    offsets = np.array([0, 2, 4])
    completions = [(paths.tokens[0] + offsets).tolist(), (paths.tokens[1] + offsets).tolist(), (paths.tokens[2] + offsets).tolist()]
    assert exact(completion_ids=completions, target=[0, 0, 2]) == [1.0, 0.0, 0.5]
    assert prefix(completion_ids=completions, target=[0, 0, 2]) == [1.0, 1.0, 0.5]
    assert quality(completion_ids=completions, target=[0, 0, 2]) == [1.0, 0.0, 0.25]


@pytest.mark.slow
def test_pipeline_from_demo_ads_to_a_reinforced_recommender_on_two_processes(tmp_path):
    """The shipped configuration through its scripts, made small: quality from known facts, then GRPO on two processes."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def call(*command: str) -> str:
        finished = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
        return finished.stderr

    write_demo_catalog(tmp_path / "demo" / "catalog", items=90, users=80, seed=0)
    write_new_ads(tmp_path / "demo" / "catalog", tmp_path / "demo" / "known")
    for stage in ("caption", "interests", "baselines"):
        call(
            "scripts/" + stage + ".py",
            "--config",
            "configs/demo.yaml",
            "baselines.codebook_size=8",
            "baselines.methods=[random,balanced_rq]",
        )
    quality = ["text_quality.model.steps=150", "text_quality.least_accuracy=0.6", "text_quality.most_calibration_error=0.5"]
    call("scripts/train_reward.py", "--part", "text", "--config", "configs/demo_recommender_rl.yaml", *quality)
    assert 0 < read_manifest(tmp_path / "runs/demo/text_quality", "text_quality")["extra"]["mean_q"] < 1
    section = "train_recommender_rl."
    small = [section + "schedule={epochs: 2}", section + "reinforcement={steps: 3, histories: 4, group: 4}"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    call(*launch, "scripts/train_recommender_rl.py", "--config", "configs/demo_recommender_rl.yaml", *small)
    out = tmp_path / "runs/demo/train_recommender_rl"
    assert read_manifest(out, "train_recommender_rl")["extra"]["text_quality"]["deviation"] > 0
    log = [json.loads(line) for line in (out / "logs" / "rl" / "0.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and log[-1]["train_samples_per_second"] > 0
    assert "| rl_published |" in (out / "ranking.md").read_text()
