"""Plain sentence embeddings of the packaged MiniLM: what baselines cluster and what the tokenizer starts from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mmsid.backbone.packaged_weights import minilm_path
from mmsid.backbone.text import no_loading_bar
from mmsid.progress import track

WIDTH = 384


@lru_cache(maxsize=1)
def _minilm() -> tuple[Any, Any]:
    folder = str(minilm_path())
    with no_loading_bar():
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


@torch.no_grad()
def embed_texts(texts: Sequence[str], *, batch_size: int = 32, max_length: int = 128, what: str | None = None) -> np.ndarray:
    """Mean-pooled MiniLM states, rows of unit length: (N, 384) float32, rows in the order of `texts`.

    Equal texts get equal rows: each distinct text is embedded once. Batches hold texts of like length.

    Args:
        max_length: most tokens read of a text.
        what: name for a progress bar; none by default.
    """
    if not len(texts):
        return np.zeros((0, WIDTH), np.float32)
    text_tokenizer, model = _minilm()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    distinct, where = np.unique(np.asarray(list(texts), dtype=object).astype(str), return_inverse=True)
    order = np.argsort([-len(text) for text in distinct], kind="stable")
    out = np.zeros((len(distinct), WIDTH), np.float32)
    starts = range(0, len(order), batch_size)
    for start in track(starts, what=what, unit="batches") if what else starts:
        rows = order[start : start + batch_size]
        encoded = text_tokenizer(
            [str(distinct[row]) for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        encoded = {key: value.to(device) for key, value in encoded.items()}
        states = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].to(states.dtype)
        pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        out[rows] = pooled.cpu().numpy()
    return out[where.reshape(-1)]
