"""Stage `refine` (started by `scripts/train_rl.py`): move the quantizer policy towards codes that users' behaviour bears out.

Reads a trained tokenizer and its published SIDs. Fits `sid_reward` on the inner fit users, refines the policy against it, relocates,
and lets the gate decide on the inner held-out users. Refused runs are no failures: the folder then holds the start, and `gate.json` why.
Nothing here reads valid or test interactions; only the quick recommender that the gate may be handed looks at valid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from mmsid.artifacts import Draft, write_json, write_table, write_tensors, writing
from mmsid.catalog import Catalog, CatalogConfig, Split, adjacent_pairs, co_engagement, load_picture, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.errors import ArtifactError
from mmsid.precision import make_accelerator
from mmsid.progress import done, track
from mmsid.refine import gate
from mmsid.refine.evidence import Codes, CodeTable, EvidenceConfig, Floats
from mmsid.refine.gate import GateConfig
from mmsid.refine.loop import LoopConfig, Refinement
from mmsid.refine.policy import Reference
from mmsid.refine.publish import make_table
from mmsid.refine.reward import Material, RewardConfig, SidReward, read_features, train_reward
from mmsid.sids.collisions import Policy
from mmsid.sids.folder import read_sid_folder, write_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.table import SidTable
from mmsid.tokenizer.inputs import load_inputs
from mmsid.tokenizer.model import ItemTokenizer

QuickRecommender = Callable[[SidTable], Mapping[str, float]]  # a table -> figures of a short training run, HR@50 and coverage@10 among them
SCORED_ROWS = 256  # items whose candidates' features are built at once


class RefineConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        tokenizer: folder of `train_tokenizer`, or of an earlier `refine`.
        sids: folder of `assign` for that tokenizer: the start that must be beaten.
        trainable: `heads` moves code vectors and projection, states cached once (minutes on a CPU); `all` also the adapter and the query
            tokens (needs a GPU for real sizes; lower `loop.batch`).
        top_m: codes per level in every item's tree of paths; top_m ** num_levels paths are enumerated.
        temperature: flattens (> 1) the joint path distribution of policy and reference alike, in sampling and in scoring; None: as much
            as it takes for the start to have `start_entropy` nats over an item's tree on average (never below 1).
        collisions: how refined codes are published; must be what the start was published with.
    """

    catalog: CatalogConfig
    tokenizer: Path
    sids: Path
    captions: Path | None = None
    interests: Path | None = None
    trainable: Literal["heads", "all"] = "heads"
    top_m: int = Field(8, ge=2)
    freeze_first_level: bool = False
    temperature: float | None = Field(None, gt=0)
    start_entropy: float = Field(2.0, gt=0)
    collisions: Policy = "relocate"
    batch_size: int = Field(32, ge=1)
    evidence: EvidenceConfig = EvidenceConfig()
    reward: RewardConfig = RewardConfig()
    loop: LoopConfig = LoopConfig()
    gate: GateConfig = GateConfig()


def run(config: RefineConfig, quick_recommender: QuickRecommender | None = None) -> Path:
    """Refine into `config.out`: tokenizer/, sids/, reward/, gate.json, log.jsonl, moved.parquet. -> the folder.

    Raises:
        CatalogError, ArtifactError: inputs that cannot be read or do not belong together.
        MmsidError: the optimisation diverged.
    """
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    inputs = {name: getattr(config, name) for name in ("tokenizer", "sids", "captions", "interests")}
    inputs |= {"items": config.catalog.items, "sequences": config.catalog.sequences}
    inputs["tokenizer"] = _manifest_folder(config.tokenizer)
    inputs["sids"] = _manifest_folder(config.sids)
    with writing(config.out, stage="refine", config=config, inputs=inputs) as draft:
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
    """The tokenizer in a stage's folder: the folder itself, or its `tokenizer/`."""
    return path if (path / "config.json").is_file() else path / "tokenizer"


def _manifest_folder(path: Path) -> Path:
    """A stage's folder has the manifest; of `refine`, tokenizer and SIDs lie one below it."""
    return path if (path / "manifest.json").is_file() or not (path.parent / "manifest.json").is_file() else path.parent


class Job:
    """One run: what is read once, and the steps in their order."""

    def __init__(
        self, config: RefineConfig, accelerator: Accelerator, catalog: Catalog, split: Split, draft: Draft, quick: QuickRecommender | None
    ) -> None:
        self.config, self.accelerator, self.catalog, self.draft, self.quick = config, accelerator, catalog, draft, quick
        limits, root = config.catalog.pictures, config.catalog.root
        self.tokenizer = ItemTokenizer.from_pretrained(
            tokenizer_folder(config.tokenizer), open_picture=lambda path: load_picture(path, limits, root)
        )
        self.tokenizer.to(accelerator.device).eval()
        self.inputs, _ = load_inputs(catalog, config.captions, config.interests, self.tokenizer.settings.use or None)
        self.start = read_sid_folder(config.sids).align([item.item_id for item in catalog.items])
        self.start_sha256 = self.tokenizer.sha256()
        self.fit_histories, self.held_out = split.fit_histories(), split.held_out_histories()
        _, self.content = np.unique([item.content_sha256 for item in catalog.items], return_inverse=True)
        states, item_states = self._read_states()
        self.reference = Reference(
            self.tokenizer.head, states, config.top_m, config.freeze_first_level, config.temperature, config.start_entropy
        )
        self._check_start()
        item_vectors = torch.nn.functional.normalize(item_states, dim=-1).cpu().numpy()
        self.embedding = self._embed(item_states)
        self.material = Material(self.reference, item_vectors, self.reference.greedy, self.content)
        self.neighbours = co_engagement(self.fit_histories, len(catalog.items), config.evidence.window)

    def run(self) -> gate.GateResult:
        """Reward, loop, gate, folder; only rank 0 judges and writes."""
        config, folder = self.config, self.draft.path
        reward, report = train_reward(self.material, self.fit_histories, self.held_out, config.evidence, config.reward, config.seed)
        refined = None
        if report["usable"]:
            self._refine(reward)
            states, item_states = (self.reference.states, None) if config.trainable == "heads" else self._read_states()
            self.refined_embedding = self.embedding if item_states is None else self._embed(item_states)
            refined = make_table(self.tokenizer, states, self.inputs, self.catalog, config.collisions)
        if not self.accelerator.is_main_process:
            return gate.refused("only rank 0 judges")
        verdict = gate.refused(report["reason"]) if refined is None else self._judge(refined)
        reward.save(folder / "reward", report)
        write_json(folder / "gate.json", verdict.to_json() | {"margins": config.gate.model_dump(), "reward": report})
        if not (folder / "log.jsonl").exists():
            self._log({"stopped": report["reason"]})
        moved = self._write_moved(reward, refined, verdict.accepted)
        self._write_outcome(refined if refined is not None and verdict.accepted else self.start, verdict.accepted)
        self.draft.counts.update({"items": len(self.inputs), "moved": moved if verdict.accepted else 0, "proposed": moved})
        self.draft.extra.update(
            {
                "accepted": verdict.accepted,
                "reasons": verdict.reasons,
                "temperature": self.reference.temperature,
                "text_quality": "1 for every item: no judgements were given",
            }
        )
        return verdict

    def _read_states(self) -> tuple[Tensor, Tensor]:
        """SID states (N, L, H) and EMB states (N, H) of all items, each process reading its share."""
        device, size = self.accelerator.device, self.config.batch_size
        order = sorted(range(len(self.inputs)), key=lambda row: (len(self.inputs[row].text), len(self.inputs[row].pictures)))
        starts = range(0, len(order), size)[self.accelerator.process_index :: self.accelerator.num_processes]
        width = (self.tokenizer.num_levels + 1, self.tokenizer.backbone.hidden_size)
        states = torch.zeros(len(order), *width, device=device)
        with torch.no_grad():
            for start in track(starts, what="refine: reading items", unit="batches"):
                rows = order[start : start + size]
                h, e = self.tokenizer.hidden(self._collate(rows))
                states[torch.tensor(rows, device=device)] = torch.cat([h, e[:, None]], dim=1).float()
        states = self.accelerator.reduce(states, reduction="sum")
        return states[:, :-1].contiguous(), states[:, -1].contiguous()

    def _embed(self, item_states: Tensor) -> np.ndarray:
        with torch.no_grad():
            return self.tokenizer.embed(item_states).cpu().numpy()

    def _collate(self, rows: list[int]) -> dict[str, Tensor]:
        batch = self.tokenizer.backbone.collate([self.inputs[row] for row in rows], 16)
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _check_start(self) -> None:
        """The SIDs must be this tokenizer's, else the gate would compare with someone else's start."""
        if self.start.codebook_sizes != (self.tokenizer.codebook_size,) * self.tokenizer.num_levels:
            raise ArtifactError(
                f"{self.config.sids} has codebooks {self.start.codebook_sizes}, the tokenizer {self.config.tokenizer} "
                f"{self.tokenizer.num_levels} of {self.tokenizer.codebook_size}; assign SIDs with this tokenizer first"
            )
        same = float((self.start.raw_codes == self.reference.greedy).all(1).mean())
        if same < 0.98:
            raise ArtifactError(
                f"only {same:.0%} of the raw codes in {self.config.sids} are what {self.config.tokenizer} gives on this catalogue; "
                "assign SIDs with this tokenizer, captions and interests first"
            )

    def _refine(self, reward: SidReward) -> None:
        tokenizer, everything = self.tokenizer, self.config.trainable == "all"
        cached = self.reference.states
        states = (lambda rows: tokenizer.hidden(self._collate(rows.tolist()))[0].float()) if everything else (lambda rows: cached[rows])
        tokenizer.emb_head.requires_grad_(False)  # no reward reaches it
        trained = [weight for weight in tokenizer.parameters() if weight.requires_grad] if everything else list(tokenizer.head.parameters())

        def score(rows: np.ndarray, candidates: Codes, codes: Codes) -> dict[str, Floats]:
            table = self._table(codes)
            growth = self.reference.error_growth(rows, candidates)
            parts = table.components(rows, candidates, growth, self.config.evidence)
            parts["sid_reward"] = self._rewards(reward, table, rows, candidates)
            return parts

        refinement = Refinement(
            tokenizer.head, states, trained, self.reference, score, self.config.loop, self.accelerator, seed=self.config.seed
        )
        refinement.run(self._log)

    def _table(self, codes: Codes) -> CodeTable:
        return CodeTable(codes, self.tokenizer.codebook_size, self.neighbours, self.content, self.config.evidence.prior)

    def _rewards(self, reward: SidReward, table: CodeTable, rows: np.ndarray, candidates: Codes) -> Floats:
        pieces = []
        step = max(1, SCORED_ROWS * 8 // candidates.shape[1])
        for start in range(0, len(rows), step):
            features = read_features(
                self.reference,
                self.material.item_vectors,
                table,
                rows[start : start + step],
                candidates[start : start + step],
            )
            with torch.no_grad():
                pieces.append(reward.eval()(features).double().numpy())
        return np.concatenate(pieces)

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.draft.path / "log.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")

    def _judge(self, refined: SidTable) -> gate.GateResult:
        """The gate; the quick recommender (two training runs) is asked only when everything cheaper has passed."""
        config, held_out = self.config.gate, gate.HeldOutPairs.from_histories(self.held_out)
        size = self.tokenizer.codebook_size
        figures = [
            gate.measure(table.codes, table.raw_codes, size, self.content, held_out, self.reference.rebuild_error, config.level_weights)
            for table in (self.start, refined)
        ]
        share = gate.gain_share(self.start.codes, refined.codes, size, held_out, config, self.config.seed)
        verdict = gate.decide(*figures, share, config)
        if verdict.accepted and self.quick is not None:
            for figure, table in zip(figures, (self.start, refined), strict=True):
                figure |= gate.ranking_figures(self.quick(table))
            verdict = gate.decide(*figures, share, config)
        return verdict

    def _write_moved(self, reward: SidReward, refined: SidTable | None, accepted: bool) -> int:
        """Which items the run would move, from where to where, and the reward gained: new codes in the new table less old in the old."""
        before = self.start.codes
        after = before if refined is None else refined.codes
        rows = np.flatnonzero((before != after).any(axis=1))
        gained = np.zeros(len(rows))
        for codes, sign in ((before, -1.0), (after, 1.0)):
            if len(rows):
                gained += sign * self._rewards(reward, self._table(codes), rows, codes[rows][:, None])[:, 0]
        columns = {
            "item_id": [self.start.item_ids[row] for row in rows],
            "codes_before": before[rows].tolist(),
            "codes_after": after[rows].tolist(),
            "reward_gained": gained.tolist(),
        }
        write_table(self.draft.path / "moved.parquet", _columns(columns), {"accepted": str(accepted).lower()})
        return len(rows)

    def _write_outcome(self, table: SidTable, accepted: bool) -> None:
        """The tokenizer and its SIDs: the refined ones, or the start's as they were."""
        if not accepted:
            self.tokenizer = ItemTokenizer.from_pretrained(tokenizer_folder(self.config.tokenizer))
        folder = self.draft.path / "tokenizer"
        folder.mkdir()
        outcome = "refined by `mmsid refine`" if accepted else "kept as it was: `mmsid refine` was not accepted by its gate"
        card = (
            f"# Item tokenizer\n\n{self.tokenizer.describe()}\n\nThe tokenizer {self.start_sha256[:12]}, {outcome}; see `../gate.json`.\n"
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        embedding = self.refined_embedding if accepted else self.embedding
        categories = [item.categories for item in self.catalog.items]
        metrics = intrinsic_metrics(
            table,
            categories if any(categories) else None,
            adjacent_pairs(self.held_out) if self.held_out else None,
            embeddings=embedding,
            content_hashes=[item.content_sha256 for item in self.catalog.items],
            seed=self.config.seed,
        )
        write_sid_folder(self.draft.path / "sids", table, metrics)
        write_tensors(self.draft.path / "sids" / "embeddings.safetensors", {"embeddings": torch.from_numpy(embedding)})


def _columns(columns: dict[str, list]) -> pa.Table:
    types = {
        "item_id": pa.string(),
        "codes_before": pa.list_(pa.int64()),
        "codes_after": pa.list_(pa.int64()),
        "reward_gained": pa.float64(),
    }
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
