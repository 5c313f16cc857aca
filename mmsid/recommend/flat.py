"""Flat decoder: a small Hugging Face GPT-2, built from a config, over the SID tokens of a history.

The token before level l of an item predicts that level (token_recommender.py), so one pass trains all levels of all
items. GPT-2 is used for its dropout on embeddings and residuals; without it a model of this size overfits a small
catalogue. In a beam search the beams of a user are query positions behind one shared history, separated by an attention
mask over ancestors. The history is computed once per user, and no cache is copied or reordered.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from mmsid.recommend.paths import ItemPaths, PathTrie
from mmsid.recommend.shape import RecommenderShape
from mmsid.recommend.token_recommender import TokenRecommender


class FlatShape(RecommenderShape):
    """Sizes of the flat decoder."""

    lr: ClassVar[float] = 1e-3


class FlatRecommender(TokenRecommender):
    """GPT-2 over SID tokens.

    Attributes:
        language_model: the Hugging Face model. Its `generate` works with `TrieLogitsProcessor`.
    """

    def __init__(self, paths: ItemPaths, shape: FlatShape, trie: PathTrie | None = None) -> None:
        super().__init__(paths, shape.max_history, trie)
        self.shape = shape
        config = GPT2Config(
            vocab_size=self.begin + 1,
            n_positions=1 + (shape.max_history + 1) * len(self.sizes),
            n_embd=shape.d_model,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.hidden,
            activation_function="relu",
            embd_pdrop=shape.dropout,
            resid_pdrop=shape.dropout,
            attn_pdrop=0.0,  # attention dropout would disable the fused kernel
            bos_token_id=self.begin,
            eos_token_id=None,
            pad_token_id=None,
        )
        self.language_model = GPT2LMHeadModel(config)

    def level_table(self, level: int) -> torch.Tensor:
        """Embeddings (K_l, d) of one level's tokens, a view of the tied table."""
        start = self.offsets[level]
        return self.language_model.transformer.wte.weight[start : start + self.sizes[level]]

    def forward(self, histories: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of negative log-likelihoods of every item of `histories` (B, T) given the items before it, times `weights` (B, T).

        Histories are padded with -1 on the right.
        """
        real = histories >= 0
        ids, _ = self.sequences(histories)
        hidden = self.language_model.transformer(ids[:, :-1]).last_hidden_state  # causal: no item position attends to padding
        hidden = hidden.unflatten(1, (-1, len(self.sizes)))[real]  # (P, D, d)
        return self.loss(hidden, histories[real], None if weights is None else weights[real])

    def steps(self, histories: torch.Tensor) -> FlatSteps:
        """Decoder for `beam_search` after histories (B, T)."""
        return FlatSteps(self, histories)


class FlatSteps:
    """Level-by-level decoding state of a flat decoder (`beam_search.LevelDecoder`).

    The keys of a user are its history, followed by one block per level with the tokens of all beams. `ancestors` holds,
    for every beam, the index of its own key in each block.
    """

    def __init__(self, model: FlatRecommender, histories: torch.Tensor) -> None:
        self.model, self.network = model, model.language_model.transformer
        ids, real = model.sequences(histories)
        self.length = real.sum(1)
        self.cache = DynamicCache(config=model.language_model.config)
        hidden = self.network(ids, self.cache, use_cache=True).last_hidden_state
        self.last = hidden[torch.arange(len(ids), device=ids.device), self.length - 1][:, None]
        self.history_mask = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(~real, -torch.inf)
        self.ancestors: list[torch.Tensor] = []
        self.blocks: list[int] = []

    def start(self) -> torch.Tensor:
        """Logits (B, 1, K_0)."""
        return self.last @ self.model.level_table(0).T

    def step(self, level: int, owner: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Logits (B, W, K_level) after codes (B, W) were appended to the beams `owner`."""
        width = code.shape[1]
        own = torch.arange(width, device=code.device).expand_as(code)
        self.ancestors = [ancestor.gather(1, owner) for ancestor in self.ancestors] + [own]
        self.blocks.append(width)
        masks = [self.history_mask[:, None].expand(-1, width, -1)]
        for ancestor, block in zip(self.ancestors, self.blocks, strict=True):
            mask = self.history_mask.new_full((*ancestor.shape, block), -torch.inf)
            masks.append(mask.scatter_(2, ancestor[..., None], 0.0))
        hidden = self.network(
            code + self.model.offsets[level - 1],
            self.cache,
            attention_mask=torch.cat(masks, 2)[:, None],
            position_ids=(self.length + level - 1)[:, None].expand_as(code),
            use_cache=True,
        ).last_hidden_state
        return hidden @ self.model.level_table(level).T
