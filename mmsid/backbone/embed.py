"""Sentence embeddings of the packaged MiniLM, used by baselines and for the initialization of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.backbone.packaged_weights import minilm_path
from mmsid.progress import track

_DIM = 384
_BATCH_SIZE = 32


@lru_cache(maxsize=1)
def _minilm() -> tuple[Any, Any]:
    folder = str(minilm_path())
    with no_loading_bar():
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


@torch.no_grad()
def embed_texts(texts: Sequence[str], *, max_length: int = 128, what: str = "texts") -> np.ndarray:
    """Mean-pooled MiniLM states: (N, 384) float32 rows of unit length, in the order of `texts`.

    Each distinct text is embedded once, so equal texts get equal rows. Texts of similar length are batched together.

    Args:
        max_length: maximum number of tokens per text.
        what: label of the progress bar.
    """
    if not len(texts):
        return np.zeros((0, _DIM), np.float32)
    text_tokenizer, model = _minilm()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    distinct, inverse = np.unique(np.asarray(list(texts), dtype=object).astype(str), return_inverse=True)
    order = np.argsort([-len(text) for text in distinct], kind="stable")
    out = np.zeros((len(distinct), _DIM), np.float32)
    for start in track(range(0, len(order), _BATCH_SIZE), what=what, unit="batches"):
        rows = order[start : start + _BATCH_SIZE]
        encoded = text_tokenizer(
            [str(distinct[row]) for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        encoded = {key: value.to(device) for key, value in encoded.items()}
        states = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].to(states.dtype)
        pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        out[rows] = pooled.cpu().numpy()
    return out[inverse.reshape(-1)]
