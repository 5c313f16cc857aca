"""Stage `train_captioner`: train a small vision-language model, or LoRA adapters on a hub model, to caption the pictures of a catalogue."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmsid.accelerator import make_accelerator
from mmsid.annotate.captioner import evaluate
from mmsid.annotate.captioner.config import TrainCaptionerConfig
from mmsid.annotate.captioner.data import PictureSet, caption_record, catalog_set, draw_set
from mmsid.annotate.captioner.labels import LabelHeads, build_labels
from mmsid.annotate.captioner.lora import fine_tune
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
    """Train and evaluate a captioner, and write its model folder.

    Writes `config.out/` = model and processor files, `measured.json` (field accuracies on held-out and seen pictures, rate), manifest.
    `AutoProcessor` and `AutoModelForImageTextToText` load the folder.

    Raises:
        ConfigError: the catalogue is missing, or the base model cannot be loaded.
        CatalogError: the targets table lacks a column or matches no item.
    """
    if config.source == "catalog" and config.catalog is None:
        raise ConfigError("train_captioner.catalog is missing although source is 'catalog'; name the catalogue or set source: drawn")
    accelerator = make_accelerator("auto", unused_parameters=True)  # the tower's final norm is not used
    with writing(config.out, stage="train_captioner", config=config, inputs=config.inputs(), resume=True) as draft:
        accelerator.wait_for_everyone()  # until rank 0 has made the draft folder
        with accelerator.main_process_first():  # rank 0 draws or decodes; the other ranks read its files
            train, checks = load_pictures(config, draft.path)
        draft.counts["training_pictures"] = len(train.rows(False))
        draft.counts |= {f"{name}_pictures": len(rows) for name, (_, rows) in checks.items()}
        train_model = train_from_config if config.base_model is None else fine_tune
        model, processor, history = train_model(config, train, draft.path, accelerator)
        draft.extra["phases"] = history
        if accelerator.is_main_process:
            measured = measure(config, model, processor, checks, train)
            write_json(draft.path / "measured.json", measured)
            draft.extra["measured"] = measured
            for temporary in ("pictures", "state"):
                shutil.rmtree(draft.path / temporary, ignore_errors=True)
    done(f"train_captioner: wrote {config.out} ({_summary(draft.extra.get('measured', {}))})")
    return config.out


def load_pictures(config: TrainCaptionerConfig, draft: Path) -> tuple[PictureSet, dict[str, tuple[PictureSet, np.ndarray]]]:
    """Training pictures, and the evaluation sets: name -> its pictures and rows."""
    folder = draft / "pictures"
    checks = {}
    if config.source == "drawn":
        drawn = config.drawn
        train = draw_set(folder, drawn.cards, drawn.seed)
        for name, number, seed, held_out in (("held_out", drawn.held_out, 11, True), ("seen", drawn.seen, 12, False)):
            if number:
                checks[name] = (draw_set(folder, number, drawn.seed + 1000 * seed, held_out), np.arange(number))
        return train, checks
    train = catalog_set(
        config.catalog, config.targets, config.fields, config.caption_template, config.sizes.image_size, folder, config.seed
    )
    rng = np.random.default_rng(config.seed)
    for name, held_out in (("held_out", True), ("seen", False)):
        rows = train.rows(held_out)
        if len(rows):
            checks[name] = (train, np.sort(rng.permutation(rows)[: config.evaluate_pictures]))
    return train, checks


def train_from_config(
    config: TrainCaptionerConfig, train: PictureSet, draft: Path, accelerator: Accelerator
) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """Build a model from `config.sizes` and run the three phases. Write model and processor files into `draft`.

    Returns:
        The model, its processor, and the figures of each phase.
    """
    rows = train.rows(False)
    labels = build_labels({f: train.values[f] for f in config.fields}, config.fields, config.digit_fields)
    prompts = [load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text]
    captions = [caption_record(caption) for caption in train.captions]
    sample = np.random.default_rng([config.seed, 7]).permutation(rows)[:4000]
    corpus = [captions[row] for row in sample] + [train.interests[row] for row in sample if train.interests[row]] + prompts * 200
    tokenizer = train_text_tokenizer(corpus, config.sizes.vocabulary, CaptionTemplate(config.caption_template).literals)
    processor = build_processor(config.sizes, tokenizer)
    model = build_captioner(config.sizes, tokenizer, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        classes = {name: max(1, len(vocabulary)) for name, vocabulary in labels.vocabularies.items()}
        heads = LabelHeads(config.sizes.tower_hidden, classes, config.dense if train.boxes is not None else {}, train.elements)
    model.to(accelerator.device), heads.to(accelerator.device)
    num_patches = (config.sizes.image_size // config.sizes.patch_size) ** 2
    answers = [encode_answers(processor, prompts[0], captions, rows, num_patches)]
    if any(train.interests) and config.interest_share > 0:
        answers.append(encode_answers(processor, prompts[1], train.interests, rows, num_patches))
    parts = {"model": model, "heads": heads}
    checkpoint = Checkpoint(draft / "state", config.checkpoint_seconds, accelerator)
    first_phase, first_step = checkpoint.load(parts)

    def picture_batch(chosen: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
        batch = make_batch(train, labels, chosen, config.sizes.patch_size, rng, config.augment)
        return {"pixels": batch.pixels, "codes": batch.codes} | ({} if batch.masks is None else {"masks": batch.masks}), batch.rows

    def label_batches(phase: Phase):
        return lambda step, rng: picture_batch(rng.choice(rows, phase.batch_size), rng)[0]

    def caption_batches(phase: Phase):
        def batch_at(step: int, rng: np.random.Generator) -> dict[str, Any]:
            # One prompt per batch: no answer is padded to the length of another prompt's answers.
            use_interests = len(answers) > 1 and np.random.default_rng([config.seed, 9, step]).random() < config.interest_share
            texts = answers[int(use_interests)]
            answered = rows if len(texts.answer_ids) == len(rows) else np.array(sorted(texts.answer_ids))
            pictures, chosen = picture_batch(rng.choice(answered, phase.batch_size), rng)
            ids, mask, prompt_length = texts.tokens(chosen, tokenizer.pad_token_id)
            return pictures | {"input_ids": ids, "attention_mask": mask, "prompt_length": prompt_length}

        return batch_at

    vision, history = tower(model), {}
    plan = [
        ("vision_warmup", config.vision_warmup, lambda: VisionWarmupObjective(vision, heads), [vision, heads], label_batches),
        ("captioning", config.captioning, lambda: CaptioningObjective(model, heads, 0.0), [model], caption_batches),
        ("joint", config.joint, lambda: CaptioningObjective(model, heads, config.label_weight), [model, heads], caption_batches),
    ]
    for number, (name, phase, objective, trained, batches) in enumerate(plan):
        if number < first_phase:
            continue
        vision.requires_grad_(name != "captioning")
        heads.requires_grad_(name != "captioning")
        history[name] = run_phase(
            phase,
            f"{name} ({phase.batch_size} pictures a step)",
            objective(),
            trained,
            batches(phase),
            accelerator,
            seed=(config.seed, number),
            start=first_step if number == first_phase else 0,
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
    """Field accuracy of greedy captions, and exact matches of interests on up to 200 pictures, per evaluation set."""
    vocabularies = {field: sorted({value for value in train.values[field] if value}) for field in config.fields}
    template = CaptionTemplate(config.caption_template, vocabularies)
    prompts = [load_prompt(config.caption_prompt).text, load_prompt(config.interests_prompt).text]
    train_values = {field: [train.values[field][row] for row in train.rows(False)] for field in config.fields}
    measured: dict[str, Any] = {}
    for name, (data, rows) in checks.items():
        rows = rows[: config.evaluate_pictures]
        texts, rate = evaluate.generate_texts(model, processor, data.pictures[rows], prompts[0])
        truth = {field: [data.values[field][row] for row in rows] for field in config.fields}
        scored = evaluate.field_accuracy(texts, truth, template)
        measured[name] = scored._asdict() | {"captions_per_second": round(rate, 1)}
        measured[name]["majority"] = {field: evaluate.majority_accuracy(train_values[field], truth[field]) for field in config.fields}
        with_interests = [row for row in rows[:200] if data.interests[row] is not None]
        if with_interests:
            texts, _ = evaluate.generate_texts(model, processor, data.pictures[with_interests], prompts[1])
            right = [text == data.interests[row] for text, row in zip(texts, with_interests, strict=True)]
            measured[name]["interests_exact"] = float(np.mean(right))
    return measured


def _summary(measured: dict[str, Any]) -> str:
    parts = [f"{name}: fields {m['mean']:.3f}, whole captions {m['exact']:.3f}" for name, m in measured.items()]
    return "; ".join(parts) or "not measured"
