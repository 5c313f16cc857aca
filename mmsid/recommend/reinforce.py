"""Stage `train_recommender_rl`: GRPO on the flat decoder after a supervised start, and the table that shows what it trades.

The second paper's reinforcement (arXiv 2604.20861, section 2.4): not the quantizer but the recommender is moved, on one question per
user: the train history without its last item, whose answer is that item. Nothing of valid or test is a question or an answer. Two
arms start from the same supervised weights of a seed: `rl`, whose advantages are weighted by the target's text quality and divided by
nothing, and `rl_published`, whose advantages are divided by the group's deviation, which cancels the quality (see rewards.py).

Writes metrics.json, ranking.md, ranks/<arm>/<seed>.parquet (as train_recommender does), models/<arm>/<seed>/ (plain Hugging Face
folders) and logs/<arm>/<seed>.jsonl (what TRL logs: every part of the reward, KL, entropy, share of groups without a difference).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from pydantic import Field
from transformers import GPT2LMHeadModel
from trl import GRPOConfig

from mmsid.accelerator import make_accelerator
from mmsid.annotate.readers import read_text_quality
from mmsid.artifacts import read_json, write_json, writing
from mmsid.backbone.text import no_loading_bar
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import Section, StageConfig
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done
from mmsid.recommend.evaluate import evaluate, recommender_scores
from mmsid.recommend.flat import FlatRecommender
from mmsid.recommend.grpo import TrieGRPOTrainer, sid_text_tokenizer
from mmsid.recommend.metrics import over_seeds
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.result_rows import dataset_facts, difference_rows, lost_to_collisions, read_ranks, write_ranks
from mmsid.recommend.result_tables import ranking_table
from mmsid.recommend.rewards import PathRewards
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.sids.folder import read_sid_folder
from mmsid.sids.table import SidTable
from mmsid.sids.trie import Trie
from mmsid.trl_training import plain_arguments, train_quietly

START = "supervised"
Arm = Literal["rl", "rl_published"]
SHOWN = {"reward": "reward", "kl": "KL", "entropy": "entropy"}


class ReinforcementConfig(Section):
    """How the policy is moved.

    Attributes:
        steps: optimiser steps; each draws `group` rollouts for each of `histories` users.
        updates: optimiser steps per batch of rollouts; above 1 the ratio is clipped at `clip`.
        kl: weight of the KL to the supervised start.
        prefix_weight, quality_weight: of the parts of the reward beside the exact hit (rewards.py).
    """

    steps: int = Field(default=60, gt=0)
    histories: int = Field(default=32, gt=0)
    group: int = Field(default=8, gt=1)
    updates: int = Field(default=1, gt=0)
    clip: float = Field(default=0.2, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    kl: float = Field(default=1e-3, ge=0)
    prefix_weight: float = Field(default=0.3, ge=0)
    quality_weight: float = Field(default=0.5, ge=0)


class TrainRecommenderRLConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        sids: SID folder (or a sids.parquet).
        text_quality: a finished `text_quality` folder; without one the quality of every item is 1, and the manifest says so.
        seeds: of the supervised start and of its reinforcement; default: the run's seed.
        model, schedule: of the supervised start, the flat decoder.
        beam: beams of the search that ranks.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"arms": "variants"}

    catalog: CatalogConfig
    sids: Path
    text_quality: Path | None = None
    seeds: list[int] | None = Field(default=None, min_length=1)
    variants: tuple[Arm, ...] = Field(default=("rl", "rl_published"), min_length=1)
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    reinforcement: ReinforcementConfig = ReinforcementConfig()
    eval: Literal["valid", "test", "both"] = "both"
    beam: int = Field(default=50, gt=0)


def run(config: TrainRecommenderRLConfig) -> Path:
    """Train, reinforce and rank; returns the folder written. A finished seed in the draft is not run again.

    Raises:
        ArtifactError: an item has no SID, or `text_quality` is unfinished.
        ConfigError: no user can be ranked.
        MmsidError: no user has two train items to make a question of.
    """
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    parts = ("valid", "test") if config.eval == "both" else (config.eval,)
    if any(not len(split.users(part)) for part in parts):
        raise ConfigError("train_recommender_rl: no user has an item to rank; give catalog.sequences with histories of 3 items or more")
    item_ids = [item.item_id for item in catalog.items]
    table = read_sid_folder(config.sids).align(item_ids)
    quality = np.ones(len(item_ids)) if config.text_quality is None else read_text_quality(config.text_quality, item_ids)
    inputs = {"sids": config.sids if config.sids.suffix == ".parquet" else config.sids / "sids.parquet"}
    inputs |= {"items": config.catalog.items, "sequences": config.catalog.sequences, "text_quality": config.text_quality}
    seeds = config.seeds or [config.seed]
    if not questions(split):
        raise MmsidError("train_recommender_rl: no user has two train items, so there is no question to learn from; give longer sequences")
    with writing(config.out, stage="train_recommender_rl", config=config, inputs=inputs, resume=True) as draft:
        accelerator.wait_for_everyone()
        for seed in seeds:
            marker = draft.path / "ranks" / f"{seed}.json"
            # rank 0 alone looks at the disk: the processes must agree on what is left to do
            if not broadcast_object_list([marker.is_file() if accelerator.is_main_process else None])[0]:
                _Seed(config, seed, table, quality, catalog, split, parts, draft.path, accelerator).run()
        if accelerator.is_main_process:
            rows, differences = _results(config, seeds, table, parts, draft.path)
            write_json(draft.path / "metrics.json", {"dataset": dataset_facts(catalog, split), "arms": rows, "differences": differences})
            (draft.path / "ranking.md").write_text(ranking_table(rows, differences), encoding="utf-8")
            draft.counts |= {"arms": len(rows), "items": len(item_ids), "questions": len(questions(split))}
            spread = {"mean": float(quality.mean()), "deviation": float(quality.std())}
            draft.extra["text_quality"] = spread if config.text_quality else "1 for every item: no text_quality was given"
        accelerator.wait_for_everyone()
    note = "" if config.text_quality else " (text quality 1 for every item: none was given)"
    done(f"train_recommender_rl: wrote {', '.join((START, *config.variants))} x {len(seeds)} seeds to {config.out / 'ranking.md'}{note}")
    return config.out


def questions(split: Split) -> list[np.ndarray]:
    """Train histories of two items or more: the last is the answer."""
    return [history for history in split.train if len(history) >= 2]


class _Seed:
    """One seed: the supervised start and every arm from it."""

    def __init__(
        self,
        config: TrainRecommenderRLConfig,
        seed: int,
        table: SidTable,
        quality: np.ndarray,
        catalog: Catalog,
        split: Split,
        parts: Sequence[str],
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.seed, self.table, self.catalog, self.split, self.parts = config, seed, table, catalog, split, parts
        self.folder, self.accelerator = folder, accelerator
        self.paths = table_paths(table)
        self.rewards = PathRewards(self.paths, quality, len(table.codebook_sizes))

    def run(self) -> None:
        """Train, rank and save; the marker says that the seed is whole."""
        config = self.config
        shape = config.model.shape("flat")
        what = f"{START}, seed {self.seed}"
        fitted = fit(self.paths, self.split, shape=shape, schedule=config.schedule, seed=self.seed, accelerator=self.accelerator, what=what)
        model, seconds = fitted.model, {START: fitted.seconds}
        self._save(model.language_model, START)
        summaries = {START: self._rank(model, fitted.trie, START)}
        for arm in config.variants:
            started = time.perf_counter()
            policy = self._reinforce(arm)
            seconds[arm] = fitted.seconds + time.perf_counter() - started
            self._save(policy, arm)
            model.language_model.load_state_dict(policy.state_dict())
            summaries[arm] = self._rank(model, fitted.trie, arm)
        if self.accelerator.is_main_process:
            write_json(self.folder / "ranks" / f"{self.seed}.json", {"summaries": summaries, "seconds": seconds})

    def _model_folder(self, arm: str) -> Path:
        return self.folder / "models" / arm / str(self.seed)

    def _save(self, policy: GPT2LMHeadModel, arm: str) -> None:
        if self.accelerator.is_main_process:
            with no_loading_bar():
                policy.save_pretrained(self._model_folder(arm))
            sid_text_tokenizer(self.paths.sizes).save_pretrained(self._model_folder(arm))
        self.accelerator.wait_for_everyone()

    def _reinforce(self, arm: Arm) -> GPT2LMHeadModel:
        """GRPO from the supervised weights; -> the moved policy."""
        told, scratch = self.config.reinforcement, self.folder / "trainer"
        tokenizer = sid_text_tokenizer(self.paths.sizes)
        names = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        offsets = np.cumsum([0, *self.paths.sizes[:-1]])
        words = [" ".join(row) for row in names[self.paths.tokens + offsets]]
        reach = self.config.model.shape("flat").max_history
        asked = questions(self.split)
        data = Dataset.from_dict(
            {
                "prompt": [" ".join([tokenizer.bos_token, *(words[item] for item in history[:-1][-reach:])]) for history in asked],
                "target": [int(history[-1]) for history in asked],
            }
        )
        size = told.histories * told.group
        if size % self.accelerator.num_processes:
            raise ConfigError(
                f"reinforcement: {told.histories} histories x {told.group} rollouts do not divide among "
                f"{self.accelerator.num_processes} processes; change one"
            )
        device, published = self.accelerator.device, arm == "rl_published"
        arguments = GRPOConfig(  # resets accelerate's state; the trainer sets it up again
            **plain_arguments(scratch, steps=told.steps, lr=told.lr, seed=self.seed),
            per_device_train_batch_size=size // self.accelerator.num_processes,
            num_generations=told.group,
            num_iterations=told.updates,
            max_completion_length=len(self.paths.sizes),
            epsilon=told.clip,
            beta=told.kl,
            loss_type="grpo",
            scale_rewards="group" if published else "none",
            reward_weights=[1.0, told.prefix_weight, told.quality_weight],
        )
        trie = Trie.from_codes(self.paths.tokens, self.paths.sizes).to(device)
        with no_loading_bar():
            policy = GPT2LMHeadModel.from_pretrained(self._model_folder(START)).to(device)
            trainer = TrieGRPOTrainer(policy, self.rewards.functions(weighted=not published), arguments, data, trie)
        log = self.folder / "logs" / arm / f"{self.seed}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        train_quietly(trainer, f"{arm}, seed {self.seed}", log, SHOWN)
        return self.accelerator.unwrap_model(trainer.model).eval()

    def _rank(self, model: FlatRecommender, trie: PathTrie, arm: str) -> dict[str, dict[str, float]]:
        if not self.accelerator.is_main_process:
            return {}
        scores = recommender_scores(model, trie, "beam", self.config.beam)
        found = {part: evaluate(scores, self.split, part, len(self.catalog.items)) for part in self.parts}
        path = self.folder / "ranks" / arm / f"{self.seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ranks(path, found, self.catalog)
        return {part: evaluation.summary() for part, evaluation in found.items()}


def _results(
    config: TrainRecommenderRLConfig, seeds: list[int], table: SidTable, parts: Sequence[str], folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per arm over all seeds, and the paired differences from the supervised start."""
    found = [read_json(folder / "ranks" / f"{seed}.json") for seed in seeds]
    arms = (START, *config.variants)
    rows = []
    for arm in arms:
        figures = {part: over_seeds([one["summaries"][arm][part] for one in found]) for part in parts}
        seconds = round(float(np.mean([one["seconds"][arm] for one in found])), 2)
        row = {"arm": arm, "family": "sid", "seeds": seeds, "metrics": figures.get("test", {}), "valid": figures.get("valid", {})}
        rows.append(row | {"collisions": lost_to_collisions(table), "seconds": seconds})
    differences = []
    for part in parts:
        ranks = {arm: {seed: read_ranks(folder / "ranks" / arm / f"{seed}.parquet", part).ranks for seed in seeds} for arm in arms}
        differences += difference_rows(ranks, [START], part)
    return rows, differences
