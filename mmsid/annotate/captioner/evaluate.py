"""Evaluation of a captioner: greedy captions, their accuracy per field, and the accuracy of the majority class."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.backbone.chat import ChatFormat
from mmsid.backbone.rows import stack_rows
from mmsid.progress import track


class FieldAccuracy(NamedTuple):
    """Accuracy of generated captions.

    Attributes:
        fields: field -> share of captions with the right value.
        mean: mean over fields.
        exact: share of captions with every field right.
        parsed: share of captions that fit the template.
        count: captions scored.
    """

    fields: dict[str, float]
    mean: float
    exact: float
    parsed: float
    count: int


def caption_text(generated: str) -> str | None:
    """The caption in a generated `{"caption": ...}` record. None if the text is not such a record."""
    try:
        record = json.loads(generated)
    except (json.JSONDecodeError, RecursionError):
        return None
    return record["caption"] if isinstance(record, dict) and isinstance(record.get("caption"), str) else None


def field_accuracy(generated: Sequence[str], truth: Mapping[str, Sequence[object]], template: CaptionTemplate) -> FieldAccuracy:
    """Score generated captions (JSON records or bare captions) field by field.

    Args:
        generated: N texts. A text that does not fit the template is wrong in every field.
        truth: field -> N true values. Fields of the template that are absent here are not scored, and neither are empty true values.
        template: of the captions, with vocabularies where values contain blanks.
    """
    scored = [field for field in template.fields if field in truth]
    right, known = Counter(), Counter()
    exact = parsed = 0
    for row, text in enumerate(generated):
        inner = caption_text(text)
        values = template.read(inner if inner is not None else text)
        parsed += values is not None
        all_right = True
        for field in scored:
            true = str(truth[field][row])
            if true == "":
                continue
            hit = values is not None and values[field] == true
            right[field] += hit
            known[field] += 1
            all_right &= hit
        exact += all_right
    fields = {field: right[field] / max(1, known[field]) for field in scored}
    number = max(1, len(generated))
    return FieldAccuracy(fields, float(np.mean(list(fields.values()))), exact / number, parsed / number, len(generated))


@torch.inference_mode()
def generate_texts(
    model: torch.nn.Module, processor: object, pictures: np.ndarray, prompt: str, batch_size: int = 64, max_new_tokens: int = 96
) -> tuple[list[str], float]:
    """Greedy answers to `prompt` for uint8 pictures (N, S, S, 3), through the processor and its chat template.

    Returns:
        The texts, and the rate in pictures per second.
    """
    from PIL import Image

    model.eval()
    chat = ChatFormat(processor, "captioner")
    prompt_text = chat.prompt(prompt, 1)
    texts: list[str] = []
    begun = time.monotonic()
    for start in track(range(0, len(pictures), batch_size), "generate", unit="batches"):
        images = [Image.fromarray(np.asarray(picture)) for picture in pictures[start : start + batch_size]]
        inputs = stack_rows([chat.tokens(prompt_text, [image]) for image in images], chat.pad_token, left=True)
        inputs = {key: value.to(model.device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=chat.pad_token)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, len(pictures) / max(1e-9, time.monotonic() - begun)


def majority_accuracy(train_y: Sequence[str], test_y: Sequence[str]) -> float:
    """Accuracy on the test rows of the most frequent class of the train rows (of equally frequent ones, the first in sorted order)."""
    classes, counts = np.unique(np.asarray(train_y, dtype=str), return_counts=True)
    return float((np.asarray(test_y, dtype=str) == classes[counts.argmax()]).mean())
