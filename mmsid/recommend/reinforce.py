"""Stage `train_recommender_rl`: GRPO of the flat decoder after supervised training (arXiv 2604.20861, section 2.4).

Each example is a train history; its last item is the target. Valid and test items are never prompts or targets. Variant
`rl` weights advantages by the target's text quality; `rl_published` divides them by the group's standard deviation, which
cancels the quality (rewards.py). Both start from the supervised weights of a seed. The stage writes metrics.json,
ranking.md, ranks/<variant>/, models/<variant>/<seed>/ (Hugging Face folders) and logs/<variant>/<seed>.jsonl.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig

from mmsid.accelerator import make_accelerator
from mmsid.annotate.readers import read_text_quality
from mmsid.artifacts import read_json, write_json, writing
from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import Section, StageConfig
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done
from mmsid.recommend.evaluate import PARTS, evaluate, recommender_scores
from mmsid.recommend.flat import FlatRecommender
from mmsid.recommend.grpo import TrieGRPOTrainer, sid_text_tokenizer
from mmsid.recommend.metrics import over_seeds
from mmsid.recommend.paths import PathTrie
from mmsid.recommend.result_rows import dataset_facts, difference_rows, lost_to_collisions, read_ranks, write_ranks
from mmsid.recommend.result_tables import ranking_table
from mmsid.recommend.rewards import PathRewards
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule, fit, table_paths
from mmsid.sids.table import SidTable
from mmsid.sids.trie import Trie
from mmsid.trl_training import plain_arguments, train_quietly

START = "supervised"
Variant = Literal["rl", "rl_published"]
SHOWN = {"reward": "reward", "kl": "KL", "entropy": "entropy"}  # logged by TRL -> shown in the progress bar


class ReinforcementConfig(Section):
    """Settings of GRPO.

    Attributes:
        steps: optimiser steps; each samples `group` rollouts for each of `histories` users.
        histories: users per step.
        group: rollouts per user.
        lr: peak learning rate.
        kl: weight of the KL divergence from the supervised weights.
        prefix_weight, quality_weight: weights of these parts of the reward; the exact hit has weight 1 (rewards.py).
    """

    steps: int = Field(default=60, gt=0)
    histories: int = Field(default=32, gt=0)
    group: int = Field(default=8, gt=1)
    lr: float = Field(default=1e-4, gt=0)
    kl: float = Field(default=1e-3, ge=0)
    prefix_weight: float = Field(default=0.3, ge=0)
    quality_weight: float = Field(default=0.5, ge=0)


class TrainRecommenderRLConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        catalog: the items and the users with their histories.
        sids: SID folder (or a sids.parquet).
        text_quality: a finished `text_quality` folder. Without one the quality of every item is 1, which the manifest records.
        seeds: of supervised training and reinforcement. Default: the run's seed.
        variants: normalisations of the advantage that are trained.
        model, schedule: of supervised training of the flat decoder.
        reinforcement: settings of GRPO.
        beam: beams of the search that ranks items.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"arms": "variants"}

    catalog: CatalogConfig
    sids: Path
    text_quality: Path | None = None
    seeds: list[int] | None = Field(default=None, min_length=1)
    variants: tuple[Variant, ...] = Field(default=("rl", "rl_published"), min_length=1)
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    reinforcement: ReinforcementConfig = ReinforcementConfig()
    beam: int = Field(default=50, gt=0)

    def inputs(self) -> dict[str, Path | None]:
        """The SID table, the catalogue, and the text quality."""
        sids = self.sids if self.sids.suffix == ".parquet" else self.sids / "sids.parquet"
        return {"sids": sids, **self.catalog.inputs(), "text_quality": self.text_quality}


def run(config: TrainRecommenderRLConfig) -> Path:
    """Train, reinforce and rank. -> the folder written. Finished seeds of an interrupted run are not run again.

    Raises:
        ArtifactError: an item has no SID, or `text_quality` is unfinished.
        ConfigError: no user can be ranked.
        MmsidError: no user has two train items.
    """
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    if any(not len(split.users(part)) for part in PARTS):
        raise ConfigError(
            "train_recommender_rl: no user has an item to rank; give catalog.sequences or events with histories of 3 items or more"
        )
    item_ids = catalog.item_ids
    table = SidTable.load(config.sids).align(item_ids)
    quality = np.ones(len(item_ids)) if config.text_quality is None else read_text_quality(config.text_quality, item_ids)
    seeds = config.seeds or [config.seed]
    examples = train_examples(split)
    if not examples:
        raise MmsidError("train_recommender_rl: no user has two train items, so there are no training examples; give longer sequences")
    with writing(config.out, stage="train_recommender_rl", config=config, inputs=config.inputs(), resume=True) as draft:
        accelerator.wait_for_everyone()
        for seed in seeds:
            marker = draft.path / "ranks" / f"{seed}.json"
            # rank 0 checks the disk for all processes, so that they agree on the remaining work
            if not broadcast_object_list([marker.is_file() if accelerator.is_main_process else None])[0]:
                _SeedRun(config, seed, table, quality, catalog, split, draft.path, accelerator).run()
        if accelerator.is_main_process:
            rows, differences = _results(config, seeds, table, draft.path)
            write_json(draft.path / "metrics.json", {"dataset": dataset_facts(catalog, split), "arms": rows, "differences": differences})
            (draft.path / "ranking.md").write_text(ranking_table(rows, differences), encoding="utf-8")
            draft.counts |= {"arms": len(rows), "items": len(item_ids), "questions": len(examples)}
            spread = {"mean": float(quality.mean()), "deviation": float(quality.std())}
            draft.extra["text_quality"] = spread if config.text_quality else "1 for every item: no text_quality was given"
        accelerator.wait_for_everyone()
    note = "" if config.text_quality else " (text quality 1 for every item, because text_quality is not set)"
    done(f"train_recommender_rl: wrote {', '.join((START, *config.variants))} x {len(seeds)} seeds to {config.out / 'ranking.md'}{note}")
    return config.out


def train_examples(split: Split) -> list[np.ndarray]:
    """Train histories with at least two items. The last item is the target, the items before it are the prompt."""
    return [history for history in split.train if len(history) >= 2]


@dataclass
class _SeedRun:
    """Supervised training and all reinforced variants of one seed."""

    config: TrainRecommenderRLConfig
    seed: int
    table: SidTable
    quality: np.ndarray
    catalog: Catalog
    split: Split
    folder: Path
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.shape = self.config.model.shape("flat")
        self.paths = table_paths(self.table)
        self.rewards = PathRewards(self.paths, self.quality, len(self.table.codebook_sizes))

    def run(self) -> None:
        """Train, rank and save. The file of metrics, written last, marks the seed as complete."""
        fitted = fit(
            self.paths,
            self.split,
            shape=self.shape,
            schedule=self.config.schedule,
            seed=self.seed,
            accelerator=self.accelerator,
            what=f"{START}, seed {self.seed}",
        )
        model, seconds = fitted.model, {START: fitted.seconds}
        self._save(model.language_model, START)
        summaries = {START: self._rank(model, fitted.trie, START)}
        for variant in self.config.variants:
            started = time.perf_counter()
            policy = self._reinforce(variant)
            seconds[variant] = fitted.seconds + time.perf_counter() - started
            self._save(policy, variant)
            model.language_model.load_state_dict(policy.state_dict())
            summaries[variant] = self._rank(model, fitted.trie, variant)
        if self.accelerator.is_main_process:
            write_json(self.folder / "ranks" / f"{self.seed}.json", {"summaries": summaries, "seconds": seconds})

    def _model_folder(self, variant: str) -> Path:
        return self.folder / "models" / variant / str(self.seed)

    def _save(self, policy: PreTrainedModel, variant: str) -> None:
        if self.accelerator.is_main_process:
            with no_loading_bar():
                policy.save_pretrained(self._model_folder(variant))
            sid_text_tokenizer(self.paths.sizes).save_pretrained(self._model_folder(variant))
        self.accelerator.wait_for_everyone()

    def _dataset(self) -> Dataset:
        """Columns `prompt` (text of the history's SIDs) and `target` (item row)."""
        tokenizer = sid_text_tokenizer(self.paths.sizes)
        names = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        offsets = np.cumsum([0, *self.paths.sizes[:-1]])
        words = [" ".join(row) for row in names[self.paths.tokens + offsets]]
        examples, length = train_examples(self.split), self.shape.max_history
        prompts = [" ".join([tokenizer.bos_token, *(words[item] for item in history[:-1][-length:])]) for history in examples]
        return Dataset.from_dict({"prompt": prompts, "target": [int(history[-1]) for history in examples]})

    def _reinforce(self, variant: Variant) -> PreTrainedModel:
        """GRPO from the supervised weights. -> the trained policy."""
        settings, processes = self.config.reinforcement, self.accelerator.num_processes
        batch_size = settings.histories * settings.group
        if batch_size % processes:
            raise ConfigError(
                f"train_recommender_rl.reinforcement: histories {settings.histories} x group {settings.group} is not divisible by "
                f"{processes} processes; change one of them"
            )
        device, published = self.accelerator.device, variant == "rl_published"
        arguments = GRPOConfig(  # resets accelerate's state; the trainer sets it up again
            **plain_arguments(self.folder / "trainer", steps=settings.steps, lr=settings.lr, seed=self.seed),
            per_device_train_batch_size=batch_size // processes,
            num_generations=settings.group,
            max_completion_length=len(self.paths.sizes),
            beta=settings.kl,
            loss_type="grpo",
            scale_rewards="group" if published else "none",
            reward_weights=[1.0, settings.prefix_weight, settings.quality_weight],
        )
        trie = Trie.from_codes(self.paths.tokens, self.paths.sizes).to(device)
        with no_loading_bar():
            policy = AutoModelForCausalLM.from_pretrained(self._model_folder(START), dtype=torch.float32).to(device)
            trainer = TrieGRPOTrainer(policy, self.rewards.functions(weighted=not published), arguments, self._dataset(), trie)
        log = self.folder / "logs" / variant / f"{self.seed}.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        train_quietly(trainer, f"{variant}, seed {self.seed}", log, SHOWN)
        return self.accelerator.unwrap_model(trainer.model).eval()

    def _rank(self, model: FlatRecommender, trie: PathTrie, variant: str) -> dict[str, dict[str, float]]:
        """Rank on every part and write the ranks. -> metrics by part, on the main process."""
        if not self.accelerator.is_main_process:
            return {}
        scores = recommender_scores(model, trie, "beam", self.config.beam)
        evaluations = {part: evaluate(scores, self.split, part, trie.num_items) for part in PARTS}
        path = self.folder / "ranks" / variant / f"{self.seed}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ranks(path, evaluations, self.catalog)
        return {part: evaluation.summary() for part, evaluation in evaluations.items()}


def _results(
    config: TrainRecommenderRLConfig, seeds: list[int], table: SidTable, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per variant over all seeds, and the paired differences from supervised training."""
    results = [read_json(folder / "ranks" / f"{seed}.json") for seed in seeds]
    variants = (START, *config.variants)
    rows = []
    for variant in variants:
        figures = {part: over_seeds([result["summaries"][variant][part] for result in results]) for part in PARTS}
        seconds = round(float(np.mean([result["seconds"][variant] for result in results])), 2)
        row = {"arm": variant, "family": "sid", "seeds": seeds, "metrics": figures["test"], "valid": figures["valid"]}
        rows.append(row | {"collisions": lost_to_collisions(table), "seconds": seconds})
    differences = []
    for part in PARTS:
        ranks = {name: {seed: read_ranks(folder / "ranks" / name / f"{seed}.parquet", part).ranks for seed in seeds} for name in variants}
        differences += difference_rows(ranks, [START], part)
    return rows, differences
