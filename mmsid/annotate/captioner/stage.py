"""The stage `train_captioner`: a small VLM from config, or a hub VLM with LoRA, taught to caption a catalogue's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmsid.accelerator import make_accelerator
from mmsid.annotate.captioner import evaluate
from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, answer, catalog_set, draw_set
from mmsid.annotate.captioner.labels import LabelHeads, build_labels
from mmsid.annotate.captioner.model import build_captioner, build_processor, save_captioner, tower, train_text_tokenizer
from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.annotate.captioner.training import (
    CaptioningObjective,
    Checkpoint,
    Phase,
    VisionWarmupObjective,
    encode_answers,
    make_batch,
    run_phase,
)
from mmsid.annotate.prompts import load_prompt
from mmsid.artifacts import write_json, writing
from mmsid.errors import ConfigError
from mmsid.progress import done


def run(config: TrainCaptionerConfig) -> Path:
    """Train, measure and write a model folder that any Hugging Face code path loads.

    Writes `config.out/` = model and processor files, `measured.json` (field accuracies on held-out and seen pictures, rate), manifest.

    Raises:
        ConfigError: source, targets and prompts do not fit together.
        CatalogError: the targets table lacks a column or matches no item.
    """
    if config.source == "catalog" and config.catalog is None:
        raise ConfigError("train_captioner.catalog is missing although source is 'catalog'; name the catalogue or set source: drawn")
    inputs = {"items": config.catalog.items, "targets": config.targets.table} if config.source == "catalog" else {}
    accelerator = make_accelerator("auto", unused_parameters=True)  # the tower's closing norm is read by nobody
    with writing(config.out, stage="train_captioner", config=config, inputs=inputs, resume=True) as draft:
        accelerator.wait_for_everyone()  # until rank 0 has made the draft folder
        with accelerator.main_process_first():  # rank 0 draws or decodes, the others find the files
            train, checks = load_pictures(config, draft.path)
        draft.counts["training_pictures"] = len(train.rows(False))
        draft.counts |= {f"{name}_pictures": len(rows) for name, (_, rows) in checks.items()}
        if config.base_model is not None:
            from mmsid.annotate.captioner.lora import fine_tune

            model, processor, history = fine_tune(config, train, draft.path, accelerator)
        else:
            model, processor, history = train_from_config(config, train, draft.path, accelerator)
        draft.extra["phases"] = history
        if accelerator.is_main_process:
            measured = measure(config, model, processor, checks, train)
            write_json(draft.path / "measured.json", measured)
            draft.extra["measured"] = measured
            for leftover in ("pictures", "state"):
                _remove(draft.path / leftover)
    done(f"train_captioner: wrote {config.out} ({_summary(draft.extra.get('measured', {}))})")
    return config.out


def load_pictures(config: TrainCaptionerConfig, draft: Path) -> tuple[PictureSet, dict[str, tuple[PictureSet, np.ndarray]]]:
    """Training pictures, and per check its pictures and rows."""
    if config.source == "drawn":
        drawn, folder = config.drawn, config.drawn.cache or draft / "pictures"
        train = draw_set(folder, drawn.cards, drawn.seed, workers=drawn.workers)
        checks = {}
        for name, number, seed, held_out in (("held_out", drawn.held_out, 11, True), ("seen", drawn.seen, 12, False)):
            if number:
                some = draw_set(folder, number, drawn.seed + 1000 * seed, held_out, drawn.workers)
                checks[name] = (some, np.arange(number))
        return train, checks
    train = catalog_set(
        config.catalog, config.targets, config.fields, config.caption_template, config.sizes.image_size, draft / "pictures", config.seed
    )
    limit, order = config.evaluate_pictures, np.random.default_rng(config.seed)
    checks = {}
    for name, held_out in (("held_out", True), ("seen", False)):
        rows = train.rows(held_out)
        if len(rows):
            checks[name] = (train, np.sort(order.permutation(rows)[:limit]))
    return train, checks


def train_from_config(
    config: TrainCaptionerConfig, train: PictureSet, draft: Path, accelerator: Accelerator
) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """The three phases on a model built from `config.sizes`; leaves model and processor files in `draft`."""
    rows = train.rows(False)
    labels = build_labels({f: train.values[f] for f in config.fields}, config.fields, config.digit_fields)
    prompts = [load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text]
    answers = [answer(caption) for caption in train.captions]
    sample = np.random.default_rng([config.seed, 7]).permutation(rows)[:4000]
    corpus = [answers[row] for row in sample] + [train.interests[row] for row in sample if train.interests[row]] + prompts * 200
    template = CaptionTemplate(config.caption_template)
    tokenizer = train_text_tokenizer(corpus, config.sizes.vocabulary, template.literals)
    processor = build_processor(config.sizes, tokenizer)
    model = build_captioner(config.sizes, tokenizer, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        classes = {name: max(1, len(vocabulary)) for name, vocabulary in labels.vocabularies.items()}
        heads = LabelHeads(config.sizes.tower_hidden, classes, config.dense if train.boxes is not None else {}, train.elements)
    model.to(accelerator.device), heads.to(accelerator.device)
    patches = (config.sizes.image_size // config.sizes.patch_size) ** 2
    spoken = [encode_answers(processor, prompts[0], answers, rows, patches)]
    if any(train.interests) and config.interest_share > 0:
        spoken.append(encode_answers(processor, prompts[1], train.interests, rows, patches))
    parts = {"model": model, "heads": heads}
    checkpoint = Checkpoint(draft / "state", config.checkpoint_seconds, accelerator)
    reached, at_step = checkpoint.load(parts)

    def seeing(phase: Phase):
        def batch_at(step: int, rng: np.random.Generator) -> dict[str, Any]:
            chosen = rng.choice(rows, phase.batch_size)
            batch = make_batch(train, labels, chosen, config.sizes.patch_size, rng, config.augment)
            return {"pixels": batch.pixels, "codes": batch.codes} | ({} if batch.masks is None else {"masks": batch.masks})

        return batch_at

    def telling(phase: Phase):
        def batch_at(step: int, rng: np.random.Generator) -> dict[str, Any]:
            # One prompt per batch, so that no answer is padded to the length of another prompt's answers.
            about_interests = len(spoken) > 1 and np.random.default_rng([config.seed, 9, step]).random() < config.interest_share
            which = spoken[int(about_interests)]
            known = rows if len(which.answer_ids) == len(rows) else np.array(sorted(which.answer_ids))
            batch = make_batch(train, labels, rng.choice(known, phase.batch_size), config.sizes.patch_size, rng, config.augment)
            ids, mask, prompt_length = which.tokens(batch.rows, tokenizer.pad_token_id)
            made = {"pixels": batch.pixels, "codes": batch.codes, "input_ids": ids, "attention_mask": mask, "prompt_length": prompt_length}
            return made | ({} if batch.masks is None else {"masks": batch.masks})

        return batch_at

    vision, history = tower(model), {}
    plan = [
        ("see", config.vision_warmup, lambda: VisionWarmupObjective(vision, heads, config.compile_tower), [vision, heads], seeing),
        ("tell", config.captioning, lambda: CaptioningObjective(model, heads, 0.0), [model], telling),
        ("joint", config.joint, lambda: CaptioningObjective(model, heads, config.label_weight), [model, heads], telling),
    ]
    for number, (name, phase, objective, trained, batches) in enumerate(plan):
        if number < reached:
            continue
        vision.requires_grad_(name != "tell")
        heads.requires_grad_(name != "tell")
        history[name] = run_phase(
            phase,
            f"{name} ({phase.batch_size} pictures a step)",
            objective(),
            trained,
            batches(phase),
            accelerator,
            seed=(config.seed, number),
            start=at_step if number == reached else 0,
            after_step=lambda step, number=number: checkpoint.save(parts, number, step),
        )
        checkpoint.save(parts, number + 1, 0, force=True)
    accelerator.wait_for_everyone()
    model.eval()
    if accelerator.is_main_process:
        save_captioner(model, processor, draft)
    return model, processor, history


def measure(
    config: TrainCaptionerConfig,
    model: torch.nn.Module,
    processor: Any,
    checks: dict[str, tuple[PictureSet, np.ndarray]],
    train: PictureSet,
) -> dict[str, Any]:
    """Field accuracy of generated captions (greedy, batched) and exact-match of interests, per check."""
    vocabularies = {field: sorted({value for value in train.values[field] if value}) for field in config.fields}
    template = CaptionTemplate(config.caption_template, vocabularies)
    prompts = [load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text]
    measured: dict[str, Any] = {}
    for name, (data, rows) in checks.items():
        rows = rows[: config.evaluate_pictures]
        texts, rate = evaluate.generate_texts(model, processor, data.pictures[rows], prompts[0])
        truth = {field: [data.values[field][row] for row in rows] for field in config.fields}
        scored = evaluate.field_accuracy(texts, truth, template)
        measured[name] = scored._asdict() | {"captions_per_second": round(rate, 1)}
        learnt = {field: [train.values[field][row] for row in train.rows(False)] for field in config.fields}
        measured[name]["majority"] = {field: evaluate.majority_accuracy(learnt[field], truth[field]) for field in config.fields}
        spoken = [row for row in rows[:200] if data.interests[row] is not None]
        if spoken:
            texts, _ = evaluate.generate_texts(model, processor, data.pictures[spoken], prompts[1])
            right = [text == data.interests[row] for text, row in zip(texts, spoken, strict=True)]
            measured[name]["interests_exact"] = float(np.mean(right))
    return measured


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _summary(measured: dict[str, Any]) -> str:
    parts = [f"{name}: fields {m['mean']:.3f}, whole captions {m['exact']:.3f}" for name, m in measured.items()]
    return "; ".join(parts) or "not measured"
