"""How well a captioner reads: generated captions against the truth, its frozen tower under a linear probe, the majority class."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmsid.annotate.captioner.model import tower
from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.progress import track


class FieldAccuracy(NamedTuple):
    """fields: share of captions right per field; mean: over fields; exact: share right in every field; parsed: share that fit the
    template; count: captions scored."""

    fields: dict[str, float]
    mean: float
    exact: float
    parsed: float
    count: int


def caption_text(generated: str) -> str | None:
    """The caption inside a generated `{"caption": ...}` record, None when it is not one."""
    try:
        record = json.loads(generated)
    except (json.JSONDecodeError, RecursionError):
        return None
    return record["caption"] if isinstance(record, dict) and isinstance(record.get("caption"), str) else None


def field_accuracy(generated: Sequence[str], truth: Mapping[str, Sequence[object]], template: CaptionTemplate | str) -> FieldAccuracy:
    """Score generated captions (JSON records or bare captions) field by field.

    Args:
        generated: N texts. A text that does not fit the template is wrong in every field.
        truth: field -> N true values; fields of the template that are absent here are not scored. A row whose true value is empty is
            not scored for that field.
        template: of the captions; give a `CaptionTemplate` with vocabularies where values have blanks in them.
    """
    if isinstance(template, str):
        template = CaptionTemplate(template, {field: sorted({str(v) for v in values if v != ""}) for field, values in truth.items()})
    scored = [field for field in template.fields if field in truth]
    right, seen = Counter(), Counter()
    exact = parsed = 0
    for row, text in enumerate(generated):
        inner = caption_text(text)
        read = template.read(inner if inner is not None else text)
        parsed += read is not None
        whole = True
        for field in scored:
            true = str(truth[field][row])
            if true == "":
                continue
            hit = read is not None and read[field] == true
            right[field] += hit
            seen[field] += 1
            whole &= hit
        exact += whole
    fields = {field: right[field] / max(1, seen[field]) for field in scored}
    number = max(1, len(generated))
    return FieldAccuracy(fields, float(np.mean(list(fields.values()))), exact / number, parsed / number, len(generated))


@torch.inference_mode()
def generate_texts(
    model: torch.nn.Module, processor: object, pictures: np.ndarray, prompt: str, batch_size: int = 64, max_new_tokens: int = 96
) -> tuple[list[str], float]:
    """Greedy answers to `prompt` for uint8 pictures (N, S, S, 3), through chat template and processor as for any hub model.

    Returns:
        the texts and the rate in pictures per second.
    """
    from PIL import Image

    model.eval()
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    asked = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    texts: list[str] = []
    begun = time.monotonic()
    for start in track(range(0, len(pictures), batch_size), "generate", unit="batches"):
        images = [Image.fromarray(np.asarray(picture)) for picture in pictures[start : start + batch_size]]
        inputs = processor(text=[asked] * len(images), images=images, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, len(pictures) / max(1e-9, time.monotonic() - begun)


@torch.inference_mode()
def tower_features(model: torch.nn.Module, pictures: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Features of the frozen tower: mean and maximum over patches, side by side.

    Args:
        pictures: uint8 (N, S, S, 3) at the tower's own picture size.

    Returns:
        float32 (N, 2 * tower_hidden).
    """
    vision = tower(model)
    vision.eval()
    features = []
    for start in track(range(0, len(pictures), batch_size), "tower features", unit="batches"):
        pixels = torch.from_numpy(np.ascontiguousarray(pictures[start : start + batch_size])).permute(0, 3, 1, 2).float() / 127.5 - 1
        states = vision(pixel_values=pixels.to(model.device), output_hidden_states=True).hidden_states[-1].float()
        features.append(torch.cat([states.mean(1), states.amax(1)], dim=1).cpu().numpy())
    return np.concatenate(features).astype(np.float32)


def linear_probe(train_x: np.ndarray, train_y: Sequence[str], test_x: np.ndarray, test_y: Sequence[str], c: float = 0.1) -> float:
    """Accuracy on the test rows of logistic regression on standardised features (N, D); classes unseen in train count as wrong."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_y, test_y = np.asarray(train_y, dtype=str), np.asarray(test_y, dtype=str)
    if len(np.unique(train_y)) < 2:
        return majority_accuracy(train_y, test_y)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    probe.fit(train_x, train_y)
    return float((probe.predict(test_x) == test_y).mean())


def majority_accuracy(train_y: Sequence[str], test_y: Sequence[str]) -> float:
    """Accuracy on the test rows of always naming the commonest class of the train rows (ties: first in sorted order)."""
    classes, counts = np.unique(np.asarray(train_y, dtype=str), return_counts=True)
    return float((np.asarray(test_y, dtype=str) == classes[counts.argmax()]).mean())
