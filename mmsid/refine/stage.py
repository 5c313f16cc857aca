"""Stage `refine` (`scripts/train_rl.py`): refines a trained tokenizer's codes by reinforcement learning on users' behaviour.

It fits `sid_reward` on the inner fit users, optimises the policy against it, resolves collisions, and lets the acceptance gate decide on
the inner held-out users. A refused run is not an error: the folder then contains the start and `gate.json` the reasons. Nothing is fitted
on valid or test; only early stopping and the gate's quick recommender evaluate on valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from mmsid.accelerator import make_accelerator
from mmsid.annotate.readers import read_text_quality
from mmsid.artifacts import Draft, write_json, writing
from mmsid.catalog import Catalog, Split, co_engagement, read_catalog, split_histories
from mmsid.catalog.picture_opener import PictureOpener
from mmsid.errors import ArtifactError
from mmsid.progress import done
from mmsid.quantize.nearest_items import smoothed_co_engagement
from mmsid.refine import gate
from mmsid.refine.checkpoint import load_state, save_state
from mmsid.refine.code_stability import changed_codes, noisy_sample
from mmsid.refine.config import RefineConfig
from mmsid.refine.content_reading import codes_as_new, greedy_codes, teach_content_reading
from mmsid.refine.early_stopping import next_item_information
from mmsid.refine.evidence import Codes, CodeTable, Floats, NeighboursCodes
from mmsid.refine.features import Material, read_features
from mmsid.refine.item_states import ItemStates, hidden_states, read_states
from mmsid.refine.loop import Policy, Refinement, Scorer
from mmsid.refine.outputs import write_moved, write_near_ties, write_sids, write_tokenizer
from mmsid.refine.policy import ROUNDING, ROUNDING_16_BIT, HeadPolicy, Propose, Reference
from mmsid.refine.publish import make_table
from mmsid.refine.reward import SidReward, train_reward
from mmsid.refine.tracking import RunLog, check_tracker
from mmsid.sids.readings import Readings, load_readings
from mmsid.sids.table import SidTable
from mmsid.tokenizer.added_behaviour import add_behaviour
from mmsid.tokenizer.behaviour import ItemBehaviour, behaviour_of_catalog
from mmsid.tokenizer.further_readings import further_readings, shortened_behaviour
from mmsid.tokenizer.inputs import ItemInput, load_inputs
from mmsid.tokenizer.model import ItemTokenizer

# a table and a seed -> metrics of a short training run, with NDCG@10, HR@50 and coverage@10
QuickRecommender = Callable[[SidTable, int], Mapping[str, float]]
CHECKPOINT = "checkpoint.safetensors"
SCORED_ROWS = 256  # items whose features are computed at once
PROPOSALS = 2  # codes per level of an item's tree that hold most of its neighbours, whatever their probability


def run(config: RefineConfig, quick_recommender: QuickRecommender | None = None) -> Path:
    """Refine into `config.out`: tokenizer/, sids/, reward/, gate.json, log.jsonl, moved.parquet, near_ties.json. -> the folder.

    An interrupted run of the same configuration continues at its last checkpoint.

    Args:
        quick_recommender: short training run that the gate compares both tables with; None: the gate has no ranking guards.

    Raises:
        CatalogError, ArtifactError: inputs are unreadable or do not belong together.
        ConfigError: the tracker is not installed.
        MmsidError: the optimisation diverged.
    """
    check_tracker(config.log_with)
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    with writing(config.out, stage="refine", config=config, inputs=config.inputs(), resume=True) as draft:
        accelerator.wait_for_everyone()
        verdict = Job(config, accelerator, catalog, split, draft, quick_recommender).run()
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        why = "" if verdict.accepted else f"; the start is kept: {'; '.join(verdict.reasons)}"
        done(
            f"refine: {'accepted' if verdict.accepted else 'not accepted'}, {draft.counts['moved']:,} items moved, wrote {config.out}{why}"
        )
    return config.out


def tokenizer_folder(path: Path) -> Path:
    """Tokenizer folder inside a stage's folder: the folder itself, or its `tokenizer/`."""
    return path if (path / "config.json").is_file() else path / "tokenizer"


class Job:
    """One refinement run: inputs that are loaded once, and the steps of the stage."""

    def __init__(
        self, config: RefineConfig, accelerator: Accelerator, catalog: Catalog, split: Split, draft: Draft, quick: QuickRecommender | None
    ) -> None:
        self.config, self.accelerator, self.catalog, self.draft, self.quick = config, accelerator, catalog, draft, quick
        self.split, self.open_picture = split, PictureOpener.of(config.catalog)
        self.tokenizer = ItemTokenizer.from_pretrained(tokenizer_folder(config.tokenizer), open_picture=self.open_picture)
        self.tokenizer.to(accelerator.device).eval()
        self.inputs, _ = load_inputs(catalog, config.captions, config.interests, self.tokenizer.settings.use or None)
        known = behaviour_of_catalog(self.tokenizer.behaviour, catalog, split, config.behaviour)
        self.inputs = self.inputs if known is None else known.added_to(self.inputs)
        item_ids = catalog.item_ids
        self.start = SidTable.load(config.sids).align(item_ids)
        self.quality = None if config.text_quality is None else read_text_quality(config.text_quality, item_ids)
        self.start_sha256 = self.tokenizer.sha256()
        self.fit_histories, self.held_out = split.fit_histories(), split.held_out_histories()
        _, self.content = np.unique(catalog.content_hashes, return_inverse=True)
        states, item_states = self._read_states(self.inputs)
        self.held_out_pairs = gate.HeldOutPairs.from_histories(self.held_out)
        if known is None and self.fit_histories and self.tokenizer.behaviour is None:
            states = self._add_behaviour(states)
        self.neighbours = co_engagement(self.fit_histories, len(catalog.items), config.evidence.window, split.fit_weights())
        if states.behaviour is not None:
            self.neighbours = smoothed_co_engagement(self.neighbours, states.behaviour[:, :-1].cpu().numpy())
        item_vectors = torch.nn.functional.normalize(item_states, dim=-1).cpu().numpy()
        self.reference = Reference(self.tokenizer.head, states, config.top_m, None, config.start_entropy, self._propose)
        self._check_start()
        self.embedding = self._embed(item_states)
        self.material = Material(self.reference, item_vectors, self.reference.greedy, self.content)

    def run(self) -> gate.GateResult:
        """Fit the reward, run the loop, apply the gate and write the folder (rank 0)."""
        config, folder = self.config, self.draft.path
        reward, report = self.learn_reward()
        refined, states = None, None
        if report["usable"]:
            gained = self._refine(reward)
            states, item_states = (self.reference.states, None) if config.trainable == "heads" else self._read_states(self.inputs)
            heads = (self.reference.head, self.reference.states), (self.tokenizer.head, states)
            self.as_new = [codes_as_new(head, read, config.seed) for head, read in heads]
            if gained:
                self._teach_content_reading(states)
            self.refined_embedding = self.embedding if item_states is None else self._embed(item_states)
            refined = make_table(self.tokenizer, states, self.inputs, self.catalog, config.collisions)
        else:
            RunLog(self.accelerator, folder, None, {})({"stopped": report["reason"]})
        changed = None if refined is None else self._changed_codes(refined)
        verdict = gate.refused(report["reason"]) if refined is None else self._judge(refined, changed)
        if not self.accelerator.is_main_process:
            return verdict
        reward.save(folder / "reward", report)
        write_json(folder / "gate.json", verdict.to_json() | {"margins": config.gate.model_dump(), "reward": report})
        proposed = self.start if refined is None else refined
        moved = write_moved(folder, self.start, proposed, self._gained(reward, proposed), verdict.accepted)
        self._write_tables(proposed if verdict.accepted else self.start, verdict.accepted, states if verdict.accepted else None)
        self.draft.counts.update(
            {
                "items": len(self.inputs),
                "moved": moved if verdict.accepted else 0,
                "proposed": moved,
                "near_ties": write_near_ties(folder, proposed),
                "processes": self.accelerator.num_processes,
            }
        )
        self.draft.extra.update(
            {
                "accepted": verdict.accepted,
                "reasons": verdict.reasons,
                "temperature": self.reference.temperature,
                "raw_to_published": {"before": _relocated_share(self.start), "after": _relocated_share(proposed)},
                "text_quality": self._quality_record(),
            }
        )
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return verdict

    def _propose(self, codes: Codes) -> Propose:
        near = NeighboursCodes(codes, self.tokenizer.codebook_size, self.neighbours, self.content, self.config.evidence)

        return lambda rows, prefixes: near.after(rows, prefixes, PROPOSALS)

    def _add_behaviour(self, states: ItemStates) -> ItemStates:
        """Add a behaviour input to a tokenizer that was trained on content alone; returns the states with behaviour."""
        config, pairs = self.config, self.held_out_pairs.pairs
        added = add_behaviour(self.tokenizer, states.content, self.catalog, self.split, pairs, config.behaviour, config.seed)
        if added is None:
            return states
        self.inputs = added.added_to(self.inputs)
        return ItemStates(states.content, torch.from_numpy(added.rows()).to(states.content))

    def _quality_record(self) -> dict[str, float] | str:
        if self.quality is None:
            return "1 for every item: no text_quality was given"
        return {"mean": float(self.quality.mean()), "deviation": float(self.quality.std())}

    def _read_states(self, inputs: list[ItemInput]) -> tuple[ItemStates, Tensor]:
        return read_states(self.tokenizer, inputs, self.config.batch_size, self.accelerator)

    def _embed(self, item_states: Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.tokenizer.embed(item_states).cpu().numpy()

    def _check_start(self) -> None:
        """Check that the SIDs are those of this tokenizer; the gate compares with them."""
        if self.start.codebook_sizes != (self.tokenizer.codebook_size,) * self.tokenizer.num_levels:
            raise ArtifactError(
                f"{self.config.sids} has codebooks {self.start.codebook_sizes}, the tokenizer {self.config.tokenizer} has "
                f"{self.tokenizer.num_levels} of size {self.tokenizer.codebook_size}; assign SIDs with this tokenizer first"
            )
        own = self.start.tokenizer_sha256 == self.start_sha256
        if own and self.tokenizer.behaviour is not None and self.start.catalog_sha256 != self.catalog.sha256:
            return  # newer logs: the tokenizer reads other behaviour than when it published
        same = float((self.start.raw_codes == self.reference.greedy).all(1).mean())
        if same < 0.98:
            raise ArtifactError(
                f"{self.config.tokenizer} gives only {same:.0%} of the raw codes in {self.config.sids} on this catalogue (98% needed); "
                "assign SIDs with this tokenizer, captions and interests first"
            )

    def learn_reward(self) -> tuple[SidReward, dict[str, Any]]:
        """Fit `sid_reward`; returns it with its held-out report, which has `usable` and `reason`."""
        config = self.config
        weights = self.split.fit_weights(), self.split.held_out_weights()
        return train_reward(self.material, self.fit_histories, self.held_out, config.evidence, config.reward, config.seed, *weights)

    def scorer(self, reward: SidReward) -> Scorer:
        """Scorer of the loop: reward components of candidates, given the current codes of all items."""

        def score(rows: np.ndarray, candidates: Codes, codes: Codes) -> dict[str, Floats]:
            table = self._table(codes)
            parts = table.components(rows, candidates, self.config.evidence)
            return parts | {"sid_reward": self._rewards(reward, table, rows, candidates)}

        return score

    def policy(self) -> HeadPolicy:
        """Policy of the tokenizer, with the weights that `trainable` selects."""
        tokenizer = self.tokenizer
        tokenizer.emb_head.requires_grad_(False)  # the reward does not depend on it
        if self.config.trainable == "all":
            states = lambda rows: hidden_states(tokenizer, [self.inputs[row] for row in rows.tolist()])[0]  # noqa: E731
            trained = [weight for weight in tokenizer.parameters() if weight.requires_grad]
        else:
            states = lambda rows: self.reference.states[rows]  # noqa: E731
            trained = list(tokenizer.head.parameters())
        reads_in_16_bit = self.config.trainable == "all" and tokenizer.backbone.number_format != torch.float32
        return HeadPolicy(tokenizer.head, states, trained, self.reference, ROUNDING_16_BIT if reads_in_16_bit else ROUNDING)

    def loop(self, policy: Policy, scorer: Scorer, kind: type[Refinement] = Refinement) -> Refinement:
        """Build the loop without running it; `kind` is a subclass with another estimator."""
        config, metric = self.config, next_item_information(self.split)
        return kind(policy, self.reference, scorer, config.loop, self.accelerator, config.seed, self.quality, metric)

    def _refine(self, reward: SidReward) -> bool:
        """Run the loop; False if it ended without gain, with the weights of the start."""
        loop = self.loop(self.policy(), self.scorer(reward))
        loop.describe = self._describe
        path, main = self.draft.path / CHECKPOINT, self.accelerator.is_main_process
        load_state(loop, path)
        log = RunLog(self.accelerator, self.draft.path, self.config.log_with, self.config.loop.model_dump(), loop.next_round)
        loop.run(log, (lambda loop: save_state(loop, path)) if main else None)
        log.close()
        return not loop.ended

    def _teach_content_reading(self, states: ItemStates) -> None:
        head = self.tokenizer.head
        self.draft.extra["content_reading"] = teach_content_reading(head, states, greedy_codes(head, states), self.config.seed)

    def _describe(self, number: int, codes: Codes) -> dict[str, Any]:
        """Lift of a round's raw codes; every `checkpoint_every` rounds, with cached states, also after collision handling."""
        figures = {"lift": gate.level_lift(codes, self.held_out_pairs)}
        if number % self.config.loop.checkpoint_every == 0 and self.config.trainable == "heads":
            table = make_table(self.tokenizer, self.reference.states, self.inputs, self.catalog, self.config.collisions, codes)
            figures |= {"raw_to_published": _relocated_share(table), "lift_published": gate.level_lift(table.codes, self.held_out_pairs)}
        return figures

    def _table(self, codes: Codes) -> CodeTable:
        return CodeTable(codes, self.tokenizer.codebook_size, self.neighbours, self.content, self.config.evidence.prior)

    def _rewards(self, reward: SidReward, table: CodeTable, rows: np.ndarray, candidates: Codes) -> Floats:
        pieces = []
        step = max(1, SCORED_ROWS * 8 // candidates.shape[1])
        for start in range(0, len(rows), step):
            features = read_features(self.material, table, rows[start : start + step], candidates[start : start + step])
            with torch.no_grad():
                pieces.append(reward.eval()(features).double().numpy())
        return np.concatenate(pieces)

    def _gained(self, reward: SidReward, refined: SidTable) -> dict[str, Floats]:
        """Reward components of each moved item's new codes in the new table minus those of its old codes in the old table, (M,) each."""
        rows, score = np.flatnonzero((self.start.codes != refined.codes).any(axis=1)), self.scorer(reward)
        scored = rows if len(rows) else np.zeros(1, np.int64)  # the names of the components are needed in any case
        now, then = (score(scored, codes[scored][:, None], codes) for codes in (refined.codes, self.start.codes))
        return {name: (now[name] - then[name])[: len(rows), 0] for name in now}

    def _changed_codes(self, refined: SidTable) -> tuple[np.ndarray, np.ndarray] | None:
        """Whether raw codes of a sample of items change under noise, before and after refinement; None without texts."""
        rows, noisy = noisy_sample(self.inputs, self.catalog.content_hashes)
        if not rows:
            return None
        after = changed_codes(self.tokenizer.head, self._read_states(noisy)[0], refined.raw_codes[rows])
        start = ItemTokenizer.from_pretrained(tokenizer_folder(self.config.tokenizer), open_picture=self.open_picture)
        self.tokenizer, refined_tokenizer = start.to(self.accelerator.device).eval(), self.tokenizer
        before = changed_codes(start.head, self._read_states(noisy)[0], self.reference.greedy[rows])
        self.tokenizer = refined_tokenizer
        return before, after

    def _judge(self, refined: SidTable, changed: tuple[np.ndarray, np.ndarray] | None) -> gate.GateResult:
        """Apply the gate on every process. The quick recommender (several training runs) is used only if all cheaper guards pass."""
        config, tables = self.config.gate, (self.start, refined)
        size = self.tokenizer.codebook_size
        both = [(table.codes, as_new) for table, as_new in zip(tables, self.as_new, strict=True)]
        figures = [
            gate.measure(codes, table.raw_codes, size, self.content, self.held_out_pairs, as_new, config.level_weights)
            for table, (codes, as_new) in zip(tables, both, strict=True)
        ]
        share, noise = gate.bootstrap(*both, size, self.held_out_pairs, config, self.config.seed)
        if changed is not None:
            figures, noise = _merged(figures, noise, *gate.flip_rate_figures(*changed))
        verdict = gate.decide(*figures, share, config, noise)
        ranked: dict[tuple[int, int], Mapping[str, float]] = {}
        for runs in (config.quick_seeds, config.quick_seeds + config.more_seeds):
            # the first runs follow if all other guards pass; further runs follow if the quick recommender refuses
            needed = self.quick is not None and verdict.accepted != bool(ranked) and runs * len(tables) > len(ranked)
            if not broadcast_object_list([needed])[0]:  # rank 0 decides, so that all processes train or none
                break
            more, error = _merged(figures, noise, *self._ranked(self.quick, tables, runs, ranked))
            verdict = gate.decide(*more, share, config, error)
        return verdict

    def _ranked(
        self, quick: QuickRecommender, tables: Sequence[SidTable], seeds: int, known: dict[tuple[int, int], Mapping[str, float]]
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """`gate.ranking_figures` of the tables over a number of seeds.

        Runs that are not in `known` are distributed over the processes, one process per run, and added to `known`.
        """
        chosen = range(self.config.seed, self.config.seed + seeds)
        runs = [run for seed in chosen for place in range(len(tables)) if (run := (place, seed)) not in known]
        own = runs[self.accelerator.process_index :: self.accelerator.num_processes]
        known.update(gather_object([((place, seed), dict(quick(tables[place], seed))) for place, seed in own]))
        return gate.ranking_figures(lambda place, seed: known[place, seed], range(len(tables)), chosen)

    def _write_tables(self, table: SidTable, accepted: bool, states: ItemStates | None) -> None:
        """Write tokenizer and SIDs: the refined ones, with the states of the refined tokenizer, or those of the start."""
        if not accepted:
            self.tokenizer = ItemTokenizer.from_pretrained(tokenizer_folder(self.config.tokenizer))
        outcome = "refined by `mmsid refine`" if accepted else "kept as it was: `mmsid refine` was not accepted by its gate"
        write_tokenizer(
            self.draft.path / "tokenizer", self.tokenizer, f"The tokenizer {self.start_sha256[:12]}, {outcome}; see `../gate.json`."
        )
        embedding = self.refined_embedding if accepted else self.embedding
        write_sids(self.draft.path / "sids", table, embedding, self.catalog, self.held_out, self.config.seed)
        readings = load_readings(self.config.sids, table.item_ids) if states is None else self._readings(states, table)
        if readings is not None:
            readings.save(self.draft.path / "sids")

    def _readings(self, states: ItemStates, table: SidTable) -> Readings | None:
        """Further readings of all items by the refined tokenizer."""
        head = self.tokenizer.head
        shortened = shortened_behaviour(self.tokenizer.behaviour, self.catalog, self.split)
        if shortened is None:
            return None
        behaviour = states.behaviour.cpu().numpy()
        read = ItemBehaviour(behaviour[:, :-1], behaviour[:, -1])
        shortened = shortened.only(read.interactions > 0)
        return further_readings(head, lambda rows: head.project(states[torch.from_numpy(rows)]), read, shortened, table)


def _merged(
    figures: Sequence[dict[str, float]], noise: dict[str, float], more: Sequence[dict[str, float]], error: dict[str, float]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Metrics of every table and their standard errors, extended by further ones."""
    return [one | other for one, other in zip(figures, more, strict=True)], noise | error


def _relocated_share(table: SidTable) -> float:
    """Share of the items whose published codes differ from their raw codes."""
    return float((table.codes != table.raw_codes).any(axis=1).mean())
