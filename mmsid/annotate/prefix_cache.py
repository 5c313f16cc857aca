"""The beginning that all prompts of a job share, run through the model once.

A prompt is a page of rules and then an item's evidence. A causal text model reads the rules the same for every item, so their keys
and values are kept and copied for each batch. Rows are then padded *behind* the beginning, under a mask: positions count what is not
masked, so every row reads what it would read alone.
"""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST = 64  # tokens; a shorter beginning costs less to read again than to copy


class PrefixCache:
    """What the prompts seen so far begin with, and the model's cache of it. Kept over batches; found anew when one begins otherwise."""

    def __init__(self) -> None:
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._cache: DynamicCache | None = None
        self._allowed = True  # until the model shows another kind of cache
        self.computed = 0  # times that a beginning went through the model

    def apply(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | DynamicCache]:
        """`generate`'s inputs with the beginning's cache, the rows padded behind it; as they are where nothing is gained.

        Args:
            inputs: `input_ids` and `attention_mask` (B, T), padded on the left.

        Left alone: a single row before any beginning is known, a beginning under `LEAST` tokens, a model whose cache is not of
        full attention in every layer (a window would count the padding).
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        if not self._begins(rows) and not self._find(model, rows):
            return dict(inputs)
        length = len(self._ids)
        rest = max(len(row) for row in rows) - length
        padded, seen = torch.zeros(len(rows), rest, dtype=ids.dtype, device=ids.device), torch.zeros_like(ids[:, :rest])
        for at, row in enumerate(rows):
            padded[at, rest - len(row) + length :] = row[length:]
            seen[at, rest - len(row) + length :] = 1
        begin = self._ids.to(ids).expand(len(rows), -1)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        return {
            "input_ids": torch.cat([begin, padded], 1),
            "attention_mask": torch.cat([torch.ones_like(begin), seen], 1).to(inputs["attention_mask"].dtype),
            "past_key_values": cache,
        }

    def _begins(self, rows: list[torch.Tensor]) -> bool:
        length = len(self._ids)
        return length > 0 and all(len(row) > length and torch.equal(row[:length], self._ids.to(row)) for row in rows)

    def _find(self, model: torch.nn.Module, rows: list[torch.Tensor]) -> bool:
        shortest = min(len(row) for row in rows)
        same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
        length = min(int(same.int().cumprod(0).sum()), shortest - 1)
        if not self._allowed or len(rows) == 1 or length < LEAST:
            return False
        cache = model(input_ids=rows[0][None, :length], use_cache=True).past_key_values
        self._allowed = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not self._allowed:
            return False
        self._ids, self._cache = rows[0][:length].cpu(), cache
        self.computed += 1
        return True
