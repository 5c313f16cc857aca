"""A TIGER-style encoder-decoder (Rajput et al., NeurIPS 2023) on a small T5 built from a config.

The encoder reads the flat SID tokens of a history, `begin i1_1 .. iT_D`; the decoder spells the next item's path. Every
position of a train history is one example with the window of items before it (the sliding-window targets of GRID); no
user token; T5 from scratch, dropout 0.2 and a low learning rate (the recipe that doubled cornac's figures).

In a beam search the encoder runs once per user and its keys and values are shared by the user's beams, which are query
positions of the cross-attention: Hugging Face's own `generate` copies them once per beam. That, and the relative
positions of beams that stand side by side, is why `TigerSteps` walks the T5 layers itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from mmsid.recommend.paths import ItemPaths
from mmsid.recommend.token_recommender import TokenRecommender


@dataclass(frozen=True)
class TigerShape:
    """Sizes of the encoder-decoder: `layers` in each stack, `hidden` inside the feed-forward layers."""

    lr: ClassVar[float] = 3e-4

    d_model: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 512
    dropout: float = 0.2
    max_history: int = 20


class TigerRecommender(TokenRecommender):
    """T5 over SID tokens.

    Attributes:
        language_model: the Hugging Face model; the token `begin` starts encoder and decoder alike.
    """

    def __init__(self, paths: ItemPaths, shape: TigerShape) -> None:
        super().__init__(paths, shape.max_history)
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
        """Output vectors (K_l, d) of one level's tokens: T5's tied table with its scale of d ** -0.5."""
        start = self.offsets[level]
        return self.language_model.shared.weight[start : start + self.sizes[level]] * self.shape.d_model**-0.5

    def encode(self, histories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states (B, S, d) of histories (B, T), -1 pads on the right, and which of them are real (B, S)."""
        ids, real = self.sequences(histories)
        return self.language_model.encoder(ids, attention_mask=real.long()).last_hidden_state, real

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Sum of negative log-likelihoods of every item of `histories` (B, T), -1 pads on the right, given the items before it."""
        user, place = (histories >= 0).nonzero(as_tuple=True)
        items = histories[user, place]
        windows = histories[user].masked_fill(torch.arange(histories.shape[1], device=histories.device) >= place[:, None], -1)
        states, real = self.encode(windows[:, :-1])  # the last item of the longest history is only ever a target
        inputs = F.pad(self.tokens[items, :-1], (1, 0), value=self.begin)
        hidden = self.language_model.decoder(
            inputs, encoder_hidden_states=states, encoder_attention_mask=real.long(), use_cache=False
        ).last_hidden_state
        return self.loss(hidden, items)

    def steps(self, histories: torch.Tensor) -> TigerSteps:
        """The decoder of search.py after histories (B, T)."""
        return TigerSteps(self, histories)


class TigerSteps:
    """A T5 decoder in the middle of a search (search.LevelDecoder).

    Keys and values of the encoder (B, heads, S, d_kv) are computed once; those of the beams' own tokens, at most one
    per level, are kept per layer as (B, W, heads, tokens, d_kv) and follow their beams by one gather per level.
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
        """States (B, W, d) of the newest token (B, W) of every beam; appends to `past`."""
        decoder = self.model.language_model.decoder
        x, past, self.past = decoder.embed_tokens(ids), self.past, []
        tokens = 1 + (past[0][0].shape[3] if past else 0)
        # (heads, 1, tokens): the newest token looks back at all of its beam
        bias = self.blocks[0].layer[0].SelfAttention.compute_bias(tokens, tokens)[0, :, -1:]
        for number, block in enumerate(self.blocks):
            own, cross, feed = block.layer
            attention, normed = own.SelfAttention, own.layer_norm(x)
            query, keys, values = (_heads(attention, project(normed))[..., None, :] for project in (attention.q, attention.k, attention.v))
            if past:
                keys, values = (torch.cat(pair, 3) for pair in zip(past[number], (keys, values)))
            self.past.append((keys, values))
            weights = torch.softmax((query * keys).sum(-1)[..., None, :] + bias, -1)  # a product over few tokens; (B, W, heads, 1, tokens)
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
