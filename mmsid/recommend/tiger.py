"""TIGER-style encoder-decoder (Rajput et al., NeurIPS 2023): a small Hugging Face T5 built from a config.

The encoder reads the flat SID tokens of a history, the decoder predicts the next item's path. Every position of a train
history is one example (the sliding-window targets of GRID); there is no user token; training starts from scratch with
dropout 0.2 and a low learning rate. In a beam search the encoder runs once per user and all beams of the user share its
keys and values. Hugging Face's `generate` copies them per beam, so `TigerSteps` runs the T5 layers itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from mmsid.recommend.paths import ItemPaths, PathTrie
from mmsid.recommend.shape import RecommenderShape
from mmsid.recommend.token_recommender import TokenRecommender


@dataclass(frozen=True)
class TigerShape(RecommenderShape):
    """Sizes of the encoder-decoder; `layers` counts the layers of each stack."""

    lr: ClassVar[float] = 3e-4

    layers: int = 4
    hidden: int = 512
    dropout: float = 0.2


class TigerRecommender(TokenRecommender):
    """T5 over SID tokens.

    Attributes:
        language_model: the Hugging Face model. The token `begin` is the first token of both encoder and decoder.
    """

    def __init__(self, paths: ItemPaths, shape: TigerShape, trie: PathTrie | None = None) -> None:
        super().__init__(paths, shape.max_history, trie)
        self.shape = shape
        config = T5Config(
            vocab_size=self.begin + 1,
            d_model=shape.d_model,
            d_kv=shape.d_model // shape.heads,
            d_ff=shape.hidden,
            num_layers=shape.layers,
            num_heads=shape.heads,
            dropout_rate=shape.dropout,
            decoder_start_token_id=self.begin,
            pad_token_id=self.begin,
            eos_token_id=None,
        )
        self.language_model = T5ForConditionalGeneration(config)

    def level_table(self, level: int) -> torch.Tensor:
        """Output vectors (K_l, d) of one level's tokens: T5's tied table, scaled by d ** -0.5."""
        start = self.offsets[level]
        return self.language_model.shared.weight[start : start + self.sizes[level]] * self.shape.d_model**-0.5

    def encode(self, histories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states (B, S, d) of histories (B, T), padded with -1 on the right, and the mask (B, S) of real tokens."""
        ids, real = self.sequences(histories)
        return self.language_model.encoder(ids, attention_mask=real.long()).last_hidden_state, real

    def forward(self, histories: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of negative log-likelihoods of every item of `histories` (B, T) given the items before it, times `weights` (B, T).

        Histories are padded with -1 on the right.
        """
        user, place = (histories >= 0).nonzero(as_tuple=True)
        items = histories[user, place]
        windows = histories[user].masked_fill(torch.arange(histories.shape[1], device=histories.device) >= place[:, None], -1)
        states, real = self.encode(windows[:, :-1])  # the last item of the longest history is only a target
        inputs = F.pad(self.tokens[items, :-1], (1, 0), value=self.begin)
        hidden = self.language_model.decoder(
            inputs, encoder_hidden_states=states, encoder_attention_mask=real.long(), use_cache=False
        ).last_hidden_state
        return self.loss(hidden, items, None if weights is None else weights[user, place])

    def steps(self, histories: torch.Tensor) -> TigerSteps:
        """Decoder for `beam_search` after histories (B, T)."""
        return TigerSteps(self, histories)


class TigerSteps:
    """Level-by-level decoding state of a T5 decoder (`beam_search.LevelDecoder`).

    Keys and values of the encoder (B, heads, S, d_kv) are computed once. Those of the beams' own tokens, at most one per
    level, are kept per layer as (B, W, heads, tokens, d_kv) and are reordered with their beams by one gather per level.
    """

    def __init__(self, model: TigerRecommender, histories: torch.Tensor) -> None:
        self.model, self.blocks = model, model.language_model.decoder.block
        states, real = model.encode(histories)
        cross = [block.layer[1].EncDecAttention for block in self.blocks]
        self.encoder_keys = [_heads(layer, layer.k(states)).transpose(1, 2) for layer in cross]
        self.encoder_values = [_heads(layer, layer.v(states)).transpose(1, 2) for layer in cross]
        self.encoder_mask = torch.zeros(real.shape, dtype=states.dtype, device=states.device).masked_fill_(~real, -torch.inf)[:, None, None]
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self) -> torch.Tensor:
        """Logits (B, 1, K_0)."""
        begin = torch.full((len(self.encoder_mask), 1), self.model.begin, device=self.encoder_mask.device)
        return self._hidden(begin) @ self.model.level_table(0).T

    def step(self, level: int, owner: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Logits (B, W, K_level) after codes (B, W) were appended to the beams `owner`."""
        users = torch.arange(len(owner), device=owner.device)[:, None]
        self.past = [(keys[users, owner], values[users, owner]) for keys, values in self.past]
        return self._hidden(code + self.model.offsets[level - 1]) @ self.model.level_table(level).T

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """States (B, W, d) of the newest token (B, W) of every beam. Updates `past`."""
        decoder = self.model.language_model.decoder
        x, past, self.past = decoder.embed_tokens(ids), self.past, []
        tokens = 1 + (past[0][0].shape[3] if past else 0)
        # (heads, 1, tokens): the newest token attends to all tokens of its beam
        bias = self.blocks[0].layer[0].SelfAttention.compute_bias(tokens, tokens)[0, :, -1:]
        for number, block in enumerate(self.blocks):
            own, cross, feed = block.layer
            attention, normed = own.SelfAttention, own.layer_norm(x)
            query, keys, values = (_heads(attention, project(normed))[..., None, :] for project in (attention.q, attention.k, attention.v))
            if past:
                keys, values = (torch.cat(pair, 3) for pair in zip(past[number], (keys, values)))
            self.past.append((keys, values))
            weights = torch.softmax((query * keys).sum(-1)[..., None, :] + bias, -1)  # (B, W, heads, 1, tokens)
            x = x + attention.o((weights @ values).flatten(2))
            attention = cross.EncDecAttention
            query = _heads(attention, attention.q(cross.layer_norm(x))).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                query, self.encoder_keys[number], self.encoder_values[number], attn_mask=self.encoder_mask, scale=1.0
            )
            x = x + attention.o(mixed.transpose(1, 2).flatten(2))
            x = feed(x)
        return decoder.final_layer_norm(x)


def _heads(attention: T5Attention, x: torch.Tensor) -> torch.Tensor:
    """(B, S, heads * d_kv) -> (B, S, heads, d_kv)."""
    return x.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim))
