"""Key-value cache of the prompt prefix that all requests of a job share (the instructions before the item's evidence).

A causal text model computes the same keys and values for the prefix of every item. They are computed once and copied per batch. Rows
are padded between the prefix and the rest, under a mask; positions count unmasked tokens only, so answers do not change.
"""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MIN_PREFIX = 64  # tokens; computing a shorter prefix again is cheaper than copying its cache


class PrefixCache:
    """Cache of the current prefix, kept over batches and replaced when a batch begins with another prefix.

    Attributes:
        computed: number of prefixes that were run through the model.
    """

    def __init__(self) -> None:
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._cache: DynamicCache | None = None
        self._supported = True  # until the model returns another type of cache
        self.computed = 0

    def apply(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | DynamicCache]:
        """Inputs of `generate` with the prefix's cache and the rows padded after the prefix.

        The inputs are returned unchanged for a single row without a known prefix, for a prefix shorter than `MIN_PREFIX`, and for a
        model without full attention in every layer (a sliding window would count the padding).

        Args:
            inputs: `input_ids` and `attention_mask` (B, T), padded on the left.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        if not self._matches(rows) and not self._compute(model, rows):
            return dict(inputs)
        length = len(self._ids)
        rest = max(len(row) for row in rows) - length
        padded, attended = torch.zeros(len(rows), rest, dtype=ids.dtype, device=ids.device), torch.zeros_like(ids[:, :rest])
        for at, row in enumerate(rows):
            padded[at, rest - len(row) + length :] = row[length:]
            attended[at, rest - len(row) + length :] = 1
        prefix = self._ids.to(ids).expand(len(rows), -1)
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        return {
            "input_ids": torch.cat([prefix, padded], 1),
            "attention_mask": torch.cat([torch.ones_like(prefix), attended], 1).to(inputs["attention_mask"].dtype),
            _cache_argument(model): cache,
        }

    def _matches(self, rows: list[torch.Tensor]) -> bool:
        """True if every row begins with the current prefix."""
        length = len(self._ids)
        return length > 0 and all(len(row) > length and torch.equal(row[:length], self._ids.to(row)) for row in rows)

    def _compute(self, model: torch.nn.Module, rows: list[torch.Tensor]) -> bool:
        """Find the common prefix of the rows and run it through the model; False if there is none of use."""
        shortest = min(len(row) for row in rows)
        same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(0)
        length = min(int(same.int().cumprod(0).sum()), shortest - 1)
        if not self._supported or len(rows) == 1 or length < MIN_PREFIX:
            return False
        cache = getattr(model(input_ids=rows[0][None, :length], use_cache=True), _cache_argument(model))
        self._supported = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not self._supported:
            return False
        self._ids, self._cache = rows[0][:length].cpu(), cache
        self.computed += 1
        return True


def _cache_argument(model: torch.nn.Module) -> str:
    """Name of the cache in calls and outputs of the model: `cache`, or `past_key_values` before transformers 5.20."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
