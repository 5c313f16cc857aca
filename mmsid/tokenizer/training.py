"""Training of the item tokenizer: closed-form initialization, gradient steps, checkpoints, refit of the head, tokenizer folder."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from mmsid.artifacts import Draft, read_tensors, write_json, write_tensors
from mmsid.catalog import Catalog, Split, adjacent_pairs
from mmsid.catalog.picture_opener import PictureOpener
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import done, track
from mmsid.quantize import fuse
from mmsid.sids import SidTable
from mmsid.tokenizer import initialization
from mmsid.tokenizer.batches import PairPlan
from mmsid.tokenizer.behaviour import BehaviourSettings
from mmsid.tokenizer.behaviour_weight import WEIGHTS, choose_trust_and_weight
from mmsid.tokenizer.code_renaming import check_sizes, rename_codes
from mmsid.tokenizer.head_rate import head_rate_limit
from mmsid.tokenizer.heads import ResidualHead
from mmsid.tokenizer.inputs import FieldName, ItemInput, annotated_inputs, read_annotations, readable_fields
from mmsid.tokenizer.model import ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.model_card import model_card
from mmsid.tokenizer.objective import Labels, Objective
from mmsid.tokenizer.picture_input import COUNTS as PICTURE_COUNTS
from mmsid.tokenizer.picture_input import PictureSettings
from mmsid.tokenizer.reconstruction import FrozenDecoder, train_decoder
from mmsid.tokenizer.text_limit import cut_texts
from mmsid.tokenizer.train_config import TrainTokenizerConfig
from mmsid.tokenizer.trained_annotations import RECORD, coverage_record

MAX_GRAD_NORM = 1.0
MEASURED_ROWS = 512  # items on which the figures are measured if the head is not refitted

OnStep = Callable[[int, dict[str, float]], None]


def _check_pictures(catalog: Catalog, fields: Sequence[FieldName], pictures: PictureSettings | None) -> None:
    """Raise ConfigError if a vision-language model or a picture input would be trained without a picture."""
    if pictures is not None:
        if "pictures" not in fields:
            raise ConfigError(
                f"train_tokenizer.pictures is {', '.join(pictures.encoders)}, but train_tokenizer.without names pictures; set pictures to "
                "none, or remove pictures from without"
            )
        if not any(item.images for item in catalog.items):
            raise ConfigError(
                f"train_tokenizer.pictures is {', '.join(pictures.encoders)}, but none of the {len(catalog.items):,} items has a picture; "
                "set catalog.fields.image, or set pictures to none"
            )
        return
    if "pictures" not in fields:
        raise ConfigError(
            f"train_tokenizer: backbone.kind is 'vlm', but the tokenizer reads {', '.join(fields)} and no pictures; add pictures to "
            "train_tokenizer.use, or choose backbone.kind=text"
        )
    if not any(item.images for item in catalog.items):
        raise ConfigError(
            f"train_tokenizer: backbone.kind is 'vlm', but none of the {len(catalog.items):,} items has a picture; set "
            "catalog.fields.image, or choose backbone.kind=text"
        )


class Training:
    """One training run. Call `loop`, then `finish`."""

    def __init__(self, config: TrainTokenizerConfig, accelerator: Accelerator, catalog: Catalog, split: Split | None, draft: Draft) -> None:
        self.config, self.accelerator, self.catalog, self.split, self.draft = config, accelerator, catalog, split, draft
        self.published = None if config.align_codes_to is None else SidTable.load(config.align_codes_to)
        if self.published is not None:
            check_sizes(self.published, config.num_levels, config.codebook_size)
        annotations = read_annotations(catalog.items, config.captions, config.interests)
        mined = annotations.interests
        backbone = config.backbone.fitted_to(catalog)
        use = config.use if config.use is None or not config.pictures else (*config.use, "pictures")
        readable = {*backbone.fields, *(("pictures",) if config.pictures else ())} - set(config.without)
        fields = tuple(name for name in readable_fields(use, mined) if name in readable)
        pictures = PictureSettings(encoders=config.pictures) if config.pictures else None
        if not fields:
            raise ConfigError(
                f"train_tokenizer: no field is left to read; a backbone of kind {backbone.kind!r} reads {', '.join(backbone.fields)}: "
                "correct use and without" + (", or name a picture encoder in `pictures`" if "pictures" in (config.use or ()) else "")
            )
        if backbone.kind == "vlm" or pictures is not None:
            _check_pictures(catalog, fields, pictures)
        self.inputs: list[ItemInput] = annotated_inputs(catalog, annotations, fields)[0]
        draft.extra[RECORD] = coverage_record(list(annotations.coverage.values()))
        start = config.resolved_start()
        behaviour = initialization.read_behaviour(catalog, split, start, config.seed, config.resolved_behaviour())
        if config.resolved_head() == "residual":
            self.inputs = behaviour.items.added_to(self.inputs)
        width = backbone.hidden_size() + (0 if pictures is None else pictures.dim) + behaviour.items.vectors.shape[1]
        settings = TokenizerSettings(
            backbone=backbone,
            head=config.resolved_head(),
            num_levels=config.num_levels,
            codebook_size=config.codebook_size,
            code_dim=width + config.num_levels,  # one coordinate per level for the prices of its codes
            embedding_dim=width,
            behaviour=self._behaviour_settings(behaviour, start.window),
            pictures=pictures,
            use=fields,
            seed=config.seed,
        )
        self.tokenizer = ItemTokenizer(settings, PictureOpener.of(config.catalog))
        if self.tokenizer.pictures is not None:
            self.tokenizer.pictures.encoder.load_pretrained()
        if self.tokenizer.behaviour is not None and behaviour.factors is not None:
            self.tokenizer.behaviour.item_ids = catalog.item_ids
        self.tokenizer.to(accelerator.device)
        self._warn_of_cut_texts(fields)
        self.categories = initialization.category_ids(catalog.items, config.num_levels)
        self.texts, self.reconstruct = self._reconstruction_texts(mined)
        decoder = self._initialize(behaviour, start)
        weights = config.resolved_weights()
        finest = "engaged" if config.uses_coengagement(config.finest) else "category"
        self.objective = Objective(
            self.tokenizer, weights, decoder, tau=config.tau, finest=finest, reconstruct_from=config.reconstruct_from
        ).to(accelerator.device)
        self.plan = PairPlan(
            [len(item.text) for item in self.inputs],
            self.categories[:, -1].numpy(),
            behaviour.pairs if config.uses_coengagement(config.partners) else None,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.history: list[dict[str, float]] = []
        self.agreement: list[float] | None = None  # per level, of the codes of both readings

    def _warn_of_cut_texts(self, fields: Sequence[FieldName]) -> None:
        backbone = self.tokenizer.backbone
        if not hasattr(backbone, "text_limit") or not self.accelerator.is_main_process:
            return
        cut = cut_texts([item.text for item in self.inputs], fields, *backbone.text_limit())
        if cut is not None:
            self.draft.extra["cut_texts"] = cut._asdict()
            warnings.warn(cut.describe(self.config.backbone.max_length, len(self.inputs)), stacklevel=2)

    # --- initialization: rank 0 writes it, all ranks read it

    def _reconstruction_texts(self, mined: dict[str, Any]) -> tuple[list[str], str]:
        """Texts to reconstruct, one per item, and the kind of text: "summary", "attributes" or "off"."""
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
                        f"train_tokenizer.reconstruct is {target!r}, but no item has such a text; set train_tokenizer.interests, or set "
                        "reconstruct to off"
                    )
        return [""] * len(self.catalog.items), "off"

    def _initialize(self, behaviour: initialization.Behaviour, start: initialization.StartSettings) -> FrozenDecoder | None:
        folder, config = self.draft.path, self.config
        if self.accelerator.is_main_process and not (folder / "start.safetensors").exists():
            if self.reconstruct != "off" and config.decoder is None:
                train_decoder(
                    self.texts, prompt_length=config.num_levels + 1, steps=config.decoder_steps, seed=config.seed
                ).save_pretrained(folder / "decoder")
            pictures = initialization.start_pictures(self.tokenizer, self.inputs, config.seed)
            codes = torch.zeros(len(self.inputs), config.num_levels, dtype=torch.int64)
            fused, rate_limit = torch.zeros(len(self.inputs), 0), math.inf
            if start.mode == "balanced":
                content = initialization.read_states(self.tokenizer, self.inputs, config.batch_size, config.seed)
                space = self._space(content, behaviour, start)
                codes, fused = initialization.balanced_start(self.tokenizer, content, space, behaviour.items, config.seed)
                if config.resolved_head() == "residual":
                    rate_limit = head_rate_limit(content.states[:, :-1], space[:, : content.pooled.shape[1]])
            write_tensors(folder / "initial.safetensors", self.tokenizer.trained_state())
            weight = torch.ones(()) if self.tokenizer.behaviour is None else self.tokenizer.behaviour.value[0, 0].detach().clone()
            start_tensors = {"codes": codes, "fused": fused, "behaviour_weight": weight, "head_rate_limit": torch.tensor(rate_limit)}
            if pictures is not None:
                start_tensors["pictures"] = torch.tensor(list(pictures.values()))
            write_tensors(folder / "start.safetensors", start_tensors)
        self.accelerator.wait_for_everyone()
        self.tokenizer.load_state_dict(read_tensors(folder / "initial.safetensors"), strict=False)
        started = read_tensors(folder / "start.safetensors")
        self.codes, self.fused, self.behaviour_weight = started["codes"], started["fused"], float(started["behaviour_weight"])
        self.head_rate = min(config.head_learning_rate, float(started["head_rate_limit"]))
        if self.head_rate < config.head_learning_rate:
            self.draft.extra["head_learning_rate"] = self.head_rate
            done(
                f"train_tokenizer: head_learning_rate {config.head_learning_rate:g} would lose the codes in the first steps, because the "
                f"states of {config.backbone.path!r} are long and alike; the heads learn with {self.head_rate:.2g}"
            )
        if "pictures" in started:
            self.draft.extra["pictures"] = dict(zip(PICTURE_COUNTS, started["pictures"].tolist(), strict=True))
        if self.reconstruct == "off":
            return None
        return FrozenDecoder.from_pretrained(config.decoder or str(folder / "decoder"))

    def _behaviour_settings(self, behaviour: initialization.Behaviour, window: int) -> BehaviourSettings | None:
        """Behaviour input of the tokenizer; None for a parallel head, or if there is no behaviour."""
        dim = behaviour.items.vectors.shape[1]
        if self.config.resolved_head() != "residual" or self.config.resolved_start().mode != "balanced" or dim == 0:
            return None
        if behaviour.factors is None:
            return BehaviourSettings(source="vectors", dim=dim, window=window)
        return BehaviourSettings(source="coengagement", dim=dim, contexts=len(behaviour.factors.context), window=window)

    def _set_factors(self, behaviour: initialization.Behaviour, kappa: float, weight: float) -> None:
        target = self.tokenizer.behaviour
        if target is None:
            return
        with torch.no_grad():
            target.value.copy_(weight * torch.eye(len(target.value)))
            target.kappa.fill_(kappa)
            if behaviour.factors is not None:
                target.context.copy_(torch.from_numpy(behaviour.factors.context))
                target.log_share.copy_(torch.from_numpy(behaviour.factors.log_share))

    def _space(
        self, content: initialization.ContentStates, behaviour: initialization.Behaviour, start: initialization.StartSettings
    ) -> np.ndarray:
        """Fused vectors (N, D) = [content ; weight x behaviour], from which all targets are made. Sets the behaviour input."""
        unit = initialization.unit_content(content.pooled, centre=self.config.backbone.kind != "text")
        pairs = adjacent_pairs(self.split.held_out_histories() if self.split is not None else [])
        weights = WEIGHTS if start.behaviour_weight is None else (start.behaviour_weight,)
        kappa, weight = choose_trust_and_weight(unit, behaviour.items, pairs, self.config.seed, weights)
        self._set_factors(behaviour, kappa, weight)
        return fuse(unit, behaviour.items.vectors, weight)

    # --- training loop

    def loop(self, on_step: OnStep | None) -> None:
        """Run all steps after the last checkpoint.

        Raises:
            MmsidError: the gradient is NaN or infinite.
        """
        config, accelerator = self.config, self.accelerator
        head_weights = [p for n, p in self.objective.named_parameters() if p.requires_grad and "backbone." not in n]
        backbone_weights = [p for n, p in self.objective.named_parameters() if p.requires_grad and "backbone." in n]
        groups = [(head_weights, self.head_rate), (backbone_weights, config.learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "lr": rate, "base": rate} for weights, rate in groups if weights], weight_decay=0.0
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
            norm = float(accelerator.clip_grad_norm_(self.objective.parameters(), MAX_GRAD_NORM))
            if not math.isfinite(norm):  # the norm of the reduced gradient is the same in all processes, so all of them stop
                parts = ", ".join(f"{name} {value:.4g}" for name, value in sums.items())
                raise MmsidError(
                    f"train_tokenizer: the gradient is {norm} at step {step} ({parts}); lower learning_rate, or check the item texts"
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
        batch = self.tokenizer.collate([self.inputs[row] for row in rows])
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

    # --- tokenizer folder

    def finish(self) -> None:
        """Refit the head, measure it on a sample, and write the tokenizer folder (rank 0 only)."""
        if not self.accelerator.is_main_process:
            return
        self.objective.eval()
        folder, config = self.draft.path, self.config
        codes, target = self._refit()
        figures = measure(codes, target, config.codebook_size)
        if self.tokenizer.behaviour is not None:
            figures["behaviour_weight"] = self.behaviour_weight
            figures["kappa"] = float(self.tokenizer.behaviour.kappa)
            figures["agreement_of_readings"] = self.agreement
        if self.history:
            last = self.history[-10:]
            figures["losses_last_steps"] = {n: float(np.mean([row[n] for row in last if n in row])) for n in last[-1]}
        if self.published is not None:
            item_ids = self.catalog.item_ids
            figures["renamed"] = rename_codes(self.tokenizer, self.inputs, item_ids, self.published, config.batch_size)
        if self.objective.reconstruction is not None:
            write_tensors(folder / "reconstruction.safetensors", self.objective.reconstruction.state_dict())
        write_json(folder / "training.json", {"figures": figures, "reconstruct": self.reconstruct, "history": self.history})
        (folder / "README.md").write_text(model_card(self.tokenizer, config, figures, len(self.inputs)), encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        self.draft.scratch |= {f"{name}.safetensors" for name in ("checkpoint", "initial")}
        self.draft.counts.update({"items": len(self.inputs), "steps": len(self.history), "processes": self.accelerator.num_processes})
        self.draft.extra.update({"figures": figures, "use": list(self.tokenizer.settings.use), "reconstruct": self.reconstruct})

    def _refit(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cluster the trained states again; returns raw and target codes (n, L) of a sample."""
        config, head = self.config, self.tokenizer.head
        balanced = config.resolved_start().mode == "balanced"
        refit = balanced and isinstance(head, ResidualHead) and bool(self.history)
        order = np.random.default_rng([config.seed, 9]).permutation(len(self.inputs))
        sample = np.sort(order[: initialization.RIDGE_ROWS if refit else MEASURED_ROWS])
        inputs = [self.inputs[row] for row in sample]
        if not refit or not isinstance(head, ResidualHead):
            codes = self.tokenizer.encode(inputs, config.batch_size).raw_codes
            return codes, self.codes[torch.from_numpy(sample)] if balanced else None
        content = self.tokenizer.encode([replace(item, behaviour=None) for item in inputs], config.batch_size).scores
        none = np.zeros(1 if head.behaviour is None else head.behaviour.settings.dim + 1, np.float32)
        behaviour = np.stack([none if item.behaviour is None else item.behaviour for item in inputs])
        s, target = initialization.refit_head(head, content, torch.from_numpy(behaviour), config.seed)
        self.agreement = (head.greedy(s).codes == head.greedy(content.to(s.device)).codes).double().mean(0).tolist()
        return head.greedy(s).codes.cpu(), target


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear warm-up, then cosine decay to 0.1."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))


def measure(codes: torch.Tensor, target: torch.Tensor | None, codebook_size: int) -> dict[str, Any]:
    """Metrics of raw codes (n, L): perplexity per level, share of items in collision, agreement with target codes (n, L)."""
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
