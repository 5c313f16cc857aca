"""Flat decoder: a causal language model over the SID tokens of a history; a small GPT-2, or a pretrained body.

The token before level l of an item predicts that level (token_recommender.py), so one pass trains all levels of all
items. GPT-2 is used for its dropout on embeddings and residuals; without it a model of this size overfits a small
catalogue. In a beam search the beams of a user are query positions behind one shared history, separated by an attention
mask over ancestors. The history is computed once per user, and no cache is copied or reordered.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache

from mmsid.recommend.language_model import pretrained_body, small_gpt2
from mmsid.recommend.paths import ItemPaths, PathTrie
from mmsid.recommend.shape import RecommenderShape
from mmsid.recommend.token_recommender import TokenRecommender


@dataclass(frozen=True)
class FlatShape(RecommenderShape):
    """Sizes of the flat decoder.

    Attributes:
        language_model: folder or hub id of a causal language model. Its body replaces the GPT-2, and the other sizes, except
            `max_history`, do not apply.
    """

    language_model: str | None = None

    @property
    def lr(self) -> float:
        """Default learning rate; lower for pretrained weights."""
        return 1e-3 if self.language_model is None else 1e-4


class FlatRecommender(TokenRecommender):
    """Causal language model over SID tokens: a small GPT-2, or the body of a pretrained model.

    Attributes:
        language_model: the Hugging Face model. Its `generate` works with `TrieLogitsProcessor`.

    Raises:
        ConfigError: the pretrained model cannot be used.
    """

    def __init__(self, paths: ItemPaths, shape: FlatShape, trie: PathTrie | None = None) -> None:
        super().__init__(paths, shape.max_history, trie)
        self.shape = shape
        tokens, positions = self.begin + 1, 1 + (shape.max_history + 1) * len(self.sizes)
        if shape.language_model is not None:
            self.language_model = pretrained_body(shape.language_model, tokens, positions)
        else:
            sizes = {"width": shape.d_model, "layers": shape.layers, "heads": shape.heads, "hidden": shape.hidden, "dropout": shape.dropout}
            self.language_model = small_gpt2(tokens, positions, **sizes)

    def level_table(self, level: int) -> torch.Tensor:
        """Embeddings (K_l, d) of one level's tokens, a view of the tied table."""
        start = self.offsets[level]
        return self.language_model.get_input_embeddings().weight[start : start + self.sizes[level]]

    def forward(self, histories: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of negative log-likelihoods of every item of `histories` (B, T) given the items before it, times `weights` (B, T).

        Histories are padded with -1 on the right.
        """
        real = histories >= 0
        ids, _ = self.sequences(histories)
        hidden = self.language_model.base_model(ids[:, :-1]).last_hidden_state  # causal: no item position attends to padding
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
        self.model, self.network = model, model.language_model.base_model
        ids, real = model.sequences(histories)
        self.length = real.sum(1)
        cache = DynamicCache(config=model.language_model.config)
        # the argument was named past_key_values before transformers 5.20
        name = "cache" if "cache" in inspect.signature(self.network.forward).parameters else "past_key_values"
        self.decode = partial(self.network, **{name: cache}, use_cache=True)
        hidden = self.decode(ids).last_hidden_state
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
        hidden = self.decode(
            code + self.model.offsets[level - 1],
            attention_mask=torch.cat(masks, 2)[:, None],
            position_ids=(self.length + level - 1)[:, None].expand_as(code),
        ).last_hidden_state
        return hidden @ self.model.level_table(level).T
