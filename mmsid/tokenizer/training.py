"""The training loop behind the stage `train_tokenizer`: start, steps, checkpoints, the finished folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from mmsid.artifacts import Draft, read_tensors, write_json, write_tensors
from mmsid.backbone.text import hidden_size_of
from mmsid.catalog import Catalog, Split, load_picture
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import track
from mmsid.sids import read_sid_folder
from mmsid.tokenizer import initialization
from mmsid.tokenizer.batches import PairPlan
from mmsid.tokenizer.behaviour_regression import fit_behaviour_regression
from mmsid.tokenizer.code_renaming import check_sizes, rename_codes
from mmsid.tokenizer.heads import ResidualHead
from mmsid.tokenizer.inputs import ItemInput, build_inputs, read_caption_texts, read_mined_interests, readable_fields
from mmsid.tokenizer.model import ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.model_card import model_card
from mmsid.tokenizer.objective import Labels, Objective
from mmsid.tokenizer.reconstruction import FrozenDecoder, train_decoder
from mmsid.tokenizer.train_config import TrainTokenizerConfig

MEASURED_ROWS = 512

OnStep = Callable[[int, dict[str, float]], None]


class Training:
    """One run: everything that the loop needs, and what it leaves behind."""

    def __init__(self, config: TrainTokenizerConfig, accelerator: Accelerator, catalog: Catalog, split: Split | None, draft: Draft) -> None:
        self.config, self.accelerator, self.catalog, self.draft = config, accelerator, catalog, draft
        self.published = None if config.align_codes_to is None else read_sid_folder(config.align_codes_to)
        if self.published is not None:
            check_sizes(self.published, config.num_levels, config.codebook_size)
        mined = read_mined_interests(config.interests)
        fields = tuple(name for name in readable_fields(config.use, mined) if name not in config.without)
        if config.backbone.kind == "text":
            fields = tuple(name for name in fields if name != "pictures")
        self.inputs: list[ItemInput] = build_inputs(
            catalog, read_caption_texts(config.captions), mined if "interests" in fields else None, fields
        )
        start = config.resolved_start()
        behaviour = initialization.read_behaviour(catalog, split, start, config.seed)
        limits, root = config.catalog.pictures, config.catalog.root
        width = hidden_size_of(config.backbone.path) + behaviour.vectors.shape[1]
        settings = TokenizerSettings(
            backbone=config.backbone,
            head=config.resolved_head(),
            num_levels=config.num_levels,
            codebook_size=config.codebook_size,
            code_dim=width + config.num_levels,  # a place per level for the prices of its codes
            embedding_dim=width,
            use=fields,
            seed=config.seed,
        )
        self.tokenizer = ItemTokenizer(settings, lambda path: load_picture(path, limits, root))
        self.tokenizer.to(accelerator.device)
        self.categories = initialization.category_ids(catalog.items, config.num_levels)
        self.texts, self.reconstruct = self._texts(mined)
        decoder = self._prepare(behaviour, start)
        weights = config.resolved_weights()
        finest = "engaged" if config.behavioural(config.finest) else "category"
        self.interactions = behaviour.interactions
        self.objective = Objective(
            self.tokenizer, weights, decoder, tau=config.tau, finest=finest, reconstruct_from=config.reconstruct_from
        ).to(accelerator.device)
        self.plan = PairPlan(
            [len(item.text) for item in self.inputs],
            self.categories[:, -1].numpy(),
            behaviour.pairs if config.behavioural(config.partners) else None,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.history: list[dict[str, float]] = []

    # --- the start, made by rank 0, read by all

    def _texts(self, mined: dict[str, Any]) -> tuple[list[str], str]:
        choice = self.config.reconstruct
        if self.config.resolved_weights().reconstruction == 0:
            choice = "off"
        for target in ("summary", "attributes"):
            if choice in (None, target):
                texts = initialization.reconstruction_texts(self.catalog.items, mined, target)
                if any(texts):
                    return texts, target
                if choice == target:
                    raise ConfigError(
                        f"reconstruct is {target!r}, but no item has such a text; give the interests folder, or set it to off"
                    )
        return [""] * len(self.catalog.items), "off"

    def _prepare(self, behaviour: initialization.Behaviour, start: initialization.StartSettings) -> FrozenDecoder | None:
        folder, config = self.draft.path, self.config
        if self.accelerator.is_main_process and not (folder / "start.safetensors").exists():
            if self.reconstruct != "off" and config.decoder is None:
                train_decoder(
                    self.texts, prompt_length=config.num_levels + 1, steps=config.decoder_steps, seed=config.seed
                ).save_pretrained(folder / "decoder")
            codes = torch.zeros(len(self.inputs), config.num_levels, dtype=torch.int64)
            fused = torch.zeros(len(self.inputs), 0)
            if start.mode == "balanced":
                readings = initialization.read_states(self.tokenizer, self.inputs, config.batch_size, config.seed)
                space = self._space(readings, behaviour, start)
                codes = initialization.balanced_start(self.tokenizer, readings, space, config.seed)
                fused = initialization.with_price_places(torch.from_numpy(space), config.num_levels)
            write_tensors(folder / "initial.safetensors", self.tokenizer.trained_state())
            write_tensors(folder / "start.safetensors", {"codes": codes, "fused": fused})
        self.accelerator.wait_for_everyone()
        self.tokenizer.load_state_dict(read_tensors(folder / "initial.safetensors"), strict=False)
        started = read_tensors(folder / "start.safetensors")
        self.codes, self.fused = started["codes"], started["fused"]
        if self.reconstruct == "off":
            return None
        return FrozenDecoder.from_pretrained(config.decoder or str(folder / "decoder"))

    def _space(
        self, readings: initialization.ContentStates, behaviour: initialization.Behaviour, start: initialization.StartSettings
    ) -> np.ndarray:
        """What all targets are made of, (N, D): content and behaviour of each item."""
        return initialization.fused_space(readings.pooled, behaviour, start.behaviour_weight, centre=self.config.backbone.kind == "vlm")

    # --- the loop

    def loop(self, on_step: OnStep | None) -> None:
        """All steps from the last checkpoint on."""
        config, accelerator = self.config, self.accelerator
        head_weights = [p for n, p in self.objective.named_parameters() if p.requires_grad and "backbone." not in n]
        body_weights = [p for n, p in self.objective.named_parameters() if p.requires_grad and "backbone." in n]
        groups = [(head_weights, config.head_learning_rate), (body_weights, config.learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "lr": rate, "base": rate} for weights, rate in groups if weights], weight_decay=config.weight_decay
        )
        first = self._resume()
        wrapped, optimizer = accelerator.prepare(self.objective, self.optimizer)
        note: dict[str, object] = {}
        for step in track(range(first, config.steps), what="train_tokenizer", unit="steps", note=note):
            for group in self.optimizer.param_groups:
                group["lr"] = group["base"] * schedule(step, config.steps, config.warmup)
            wrapped.train()
            sums: dict[str, float] = {}
            for micro in range(config.accumulate):
                batch, labels = self._batch(step * config.accumulate + micro)
                last = micro == config.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                    total, parts = wrapped(batch, labels)
                    accelerator.backward(total / config.accumulate)
                for name, value in {"loss": total.detach(), **parts}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / config.accumulate
            norm = float(accelerator.clip_grad_norm_(self.objective.parameters(), config.clip))
            if not math.isfinite(norm):  # of the reduced gradient, so every process stops, and before its weights are spoilt
                parts = ", ".join(f"{name} {value:.4g}" for name, value in sums.items())
                raise MmsidError(
                    f"train_tokenizer: the gradient is {norm} at step {step} ({parts}); lower learning_rate, or check the texts"
                )
            optimizer.step()
            optimizer.zero_grad()
            self.history.append(sums)
            note["loss"] = sums["loss"]
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                self._checkpoint(step + 1)
            if on_step is not None:
                on_step(step, sums)

    def _batch(self, micro: int) -> tuple[dict[str, torch.Tensor], Labels]:
        pairs = self.plan.batch(micro, self.accelerator.process_index, self.accelerator.num_processes)
        return self._collate(pairs.rows, pairs.engaged, pairs.paired)

    def _collate(self, rows: np.ndarray, engaged: np.ndarray, paired: np.ndarray) -> tuple[dict[str, torch.Tensor], Labels]:
        device = self.accelerator.device
        batch = self.tokenizer.backbone.collate([self.inputs[row] for row in rows])
        decoder = self.objective.decoder
        empty = torch.zeros(len(rows), 1, dtype=torch.int64), torch.zeros(len(rows), 1)
        ids, mask = decoder.ids([self.texts[row] for row in rows]) if decoder is not None else empty
        index = torch.from_numpy(rows)
        labels = Labels(
            index,
            self.codes[index],
            self.fused[index],
            self.categories[index],
            torch.from_numpy(engaged),
            torch.from_numpy(paired),
            ids,
            mask,
        )
        return {key: value.to(device) for key, value in batch.items()}, labels.to(device)

    # --- checkpoints

    def _weights(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": value.detach() for name, value in self.objective.named_parameters() if value.requires_grad}

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.objective.named_parameters():
                if f"model.{name}" in tensors:
                    value.copy_(tensors[f"model.{name}"])

    def _checkpoint(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = self._weights()
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors["step"] = torch.tensor(step)
        names = sorted({name for losses in self.history for name in losses})
        rows = [[losses.get(name, math.nan) for name in names] for losses in self.history]
        tensors["history"] = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(names))
        write_tensors(self.draft.path / "checkpoint.safetensors", tensors, metadata={"history": ",".join(names)})

    def _resume(self) -> int:
        path = self.draft.path / "checkpoint.safetensors"
        if not path.exists():
            return 0
        tensors = read_tensors(path)
        self._load(tensors)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        with safe_open(str(path), framework="pt") as handle:
            names = handle.metadata()["history"].split(",")
        self.history = [{n: v for n, v in zip(names, row) if not math.isnan(v)} for row in tensors["history"].tolist()]
        return int(tensors["step"])

    # --- the end

    def finish(self) -> None:
        """Rank 0: measure a sample, write the tokenizer folder."""
        if not self.accelerator.is_main_process:
            return
        self.objective.eval()
        folder, config = self.draft.path, self.config
        head, balanced = self.tokenizer.head, config.resolved_start().mode == "balanced"
        recall = config.behaviour_regression and bool(self.interactions.any())
        refit = balanced and isinstance(head, ResidualHead) and (recall or bool(self.history))
        order = np.random.default_rng([config.seed, 9]).permutation(len(self.inputs))
        sample = np.sort(order[: initialization.RIDGE_ROWS if refit else MEASURED_ROWS])
        encoded = self.tokenizer.encode([self.inputs[row] for row in sample], config.batch_size)
        codes, target = encoded.raw_codes, self.codes[torch.from_numpy(sample)] if balanced else None
        if refit and isinstance(head, ResidualHead):
            s = initialization.with_price_places(encoded.scores[..., : -config.num_levels], config.num_levels)
            if recall:
                misses = self.fused[torch.from_numpy(sample)] - s.mean(1)
                regression = fit_behaviour_regression(s.mean(1), misses, torch.from_numpy(self.interactions[sample]), config.seed)
                s = s + regression(s)
                self.tokenizer.add_behaviour(regression)
            target = initialization.refit_head(head, s, config.seed)
            codes = head.greedy(s.to(self.accelerator.device)).codes.cpu()
        figures = measure(codes, target, config.codebook_size)
        if self.history:
            last = self.history[-10:]
            figures["losses_last_steps"] = {n: float(np.mean([row[n] for row in last if n in row])) for n in last[-1]}
        if self.published is not None:
            item_ids = [item.item_id for item in self.catalog.items]
            figures["renamed"] = rename_codes(self.tokenizer, self.inputs, item_ids, self.published, config.batch_size)
        if self.objective.reconstruction is not None:
            write_tensors(folder / "reconstruction.safetensors", self.objective.reconstruction.state_dict())
        write_json(folder / "training.json", {"figures": figures, "reconstruct": self.reconstruct, "history": self.history})
        (folder / "README.md").write_text(model_card(self.tokenizer, config, figures, len(self.inputs)), encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        self.draft.scratch |= {f"{name}.safetensors" for name in ("checkpoint", "initial")}
        self.draft.counts.update({"items": len(self.inputs), "steps": len(self.history), "processes": self.accelerator.num_processes})
        self.draft.extra.update({"figures": figures, "use": list(self.tokenizer.settings.use), "reconstruct": self.reconstruct})


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to a tenth: a factor on the learning rate at `step` of `steps`."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.55 + 0.45 * math.cos(math.pi * (step - first) / max(1, steps - first))


def measure(codes: torch.Tensor, target: torch.Tensor | None, codebook_size: int) -> dict[str, Any]:
    """Figures of raw codes (n, L) on a sample: perplexity per level, share of items in collision, agreement with the targets."""
    counts = [torch.bincount(codes[:, level], minlength=codebook_size).double() for level in range(codes.shape[1])]
    shares = [count / count.sum().clamp_min(1) for count in counts]
    _, inverse, multiple = codes.unique(dim=0, return_inverse=True, return_counts=True)
    found: dict[str, Any] = {
        "items": len(codes),
        "perplexity": [float(torch.special.entr(share).sum().exp()) for share in shares],
        "in_collision": float((multiple[inverse] > 1).double().mean()) if len(codes) else 0.0,
    }
    if target is not None:
        found["agreement_with_targets"] = (codes == target).double().mean(0).tolist()
    return found
