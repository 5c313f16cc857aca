"""Query tokens: `num_levels` learnable SID tokens and one EMB token, read by any Hugging Face model after the item's content.

Route B of the two known ways: the ids are extended by placeholder ids, and a forward hook on `get_input_embeddings()` puts the
learnable vectors in their place, so that the model itself merges its image features. Building `inputs_embeds` by hand is
silently wrong on models with multi-axis rotary positions or deep-stacked image features (Qwen-VL).

Layout of a row: `[content][SID_1 .. SID_L][EMB][padding]`. Padding stands last, so that in a causal model nothing sees it.

Attention rule: content never sees a query token; SID token l sees content and the SID tokens up to l; EMB sees content and all
SID tokens. A causal model obeys it by itself. A bidirectional one gets a four-dimensional mask, and its query tokens get fixed
position ids (the last ones the model has), so that neither padding nor the content's length moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmsid.errors import ConfigError

Batch = dict[str, Tensor]


class BackboneInput(Protocol):
    """What a backbone reads of an item: one text and any number of pictures."""

    text: str
    pictures: tuple[Any, ...]


class TokenStates(NamedTuple):
    """Last hidden states by role: `content` (B, T, H) with `content_mask` (B, T) bool; `queries` (B, L + 1, H): SID_1..SID_L, EMB."""

    content: Tensor
    content_mask: Tensor
    queries: Tensor


class QueryStates(NamedTuple):
    """What the heads read: `states` (B, L + 1, H), query state + mean content state; `pooled` (B, H), the mean content state alone."""

    states: Tensor
    pooled: Tensor


class QueryBackbone(nn.Module):
    """A Hugging Face body (no LM head) that reads items and answers at its query tokens.

    The state handed to the heads is the query token's last hidden state *plus the mean content state*: the query tokens start
    untrained, and with the sum the tokenizer carries the encoder's ordinary sentence embedding from step 0. Content never sees
    a query token, so that the mean is exactly what the plain model gives.

    Args:
        model: the body, called with `input_ids` and friends, answering with `last_hidden_state`.
        num_levels: L.
        seed_token: id whose embedding the query vectors start from (plus small noise).
        position_offset: first position id of the content in a bidirectional model (2 for RoBERTa, 0 for BERT).
    """

    extra_fill: dict[str, int]
    look_ahead = 1  # batches whose tokens may be held at once, to put items of like length together

    def __init__(
        self, model: nn.Module, *, num_levels: int, seed_token: int, pad_token: int, seed: int = 0, position_offset: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.num_levels = num_levels
        self.seed_token, self.pad_token, self.position_offset = seed_token, pad_token, position_offset
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.hidden_size: int = config.hidden_size
        self.max_positions: int = getattr(config, "max_position_embeddings", 2048)
        self.extra_fill = {}
        embedding = model.get_input_embeddings()
        with torch.no_grad():
            start = embedding(torch.tensor([seed_token], device=embedding.weight.device)).float()
        noise = torch.randn(num_levels + 1, start.shape[-1], generator=torch.Generator().manual_seed(seed))
        self.queries = nn.Parameter(start.cpu() + 0.1 * start.std().cpu() * noise)
        self.causal = self._is_causal()

    @property
    def num_queries(self) -> int:
        """L + 1: the SID tokens and the EMB token."""
        return self.num_levels + 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.queries.device

    def train(self, mode: bool = True) -> QueryBackbone:
        """The frozen body stays in evaluation mode, so that its dropout never runs: what is trained is what is encoded."""
        super().train(mode)
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def tokens(self, item: BackboneInput) -> Batch:
        """One item's model inputs without query tokens, batch axis of 1; `input_ids` (1, T) among them."""
        raise TypeError(f"{type(self).__name__} does not say how it reads an item")

    def tokens_of(self, items: Sequence[BackboneInput]) -> list[Batch]:
        """`tokens` of several items."""
        return [self.tokens(item) for item in items]

    def collate(self, items: Sequence[BackboneInput], pad_to: int | None = None) -> Batch:
        """Model inputs of a batch with placeholder ids for the query tokens; row length padded to a multiple of `pad_to`, by
        default 8 on a GPU, whose tensor cores want it, and 1 elsewhere.

        Per-token inputs are (B, T); pictures are stacked along their first axis. `query_mask` (B, T) marks the query tokens,
        `content_mask` (B, T) the content.
        """
        return self.stack(self.tokens_of(items), pad_to)

    def stack(self, encoded: Sequence[Batch], pad_to: int | None = None) -> Batch:
        """Put already tokenised items (`tokens`) into one batch."""
        lengths = [row["input_ids"].shape[1] for row in encoded]
        longest = max(lengths) + self.num_queries
        pad_to = pad_to or (8 if self.device.type == "cuda" else 1)
        width = -(-longest // pad_to) * pad_to
        size = (len(encoded), width)
        batch: Batch = {
            "input_ids": torch.full(size, self.pad_token, dtype=torch.int64),
            "attention_mask": torch.zeros(size, dtype=torch.int64),
            "query_mask": torch.zeros(size, dtype=torch.bool),
            "content_mask": torch.zeros(size, dtype=torch.bool),
        }
        per_token = {key for row in encoded for key, value in row.items() if key not in batch and value.shape[:2] == row["input_ids"].shape}
        for key in sorted(per_token):
            batch[key] = torch.full(size, self.extra_fill.get(key, 0), dtype=torch.int64)
        for i, (row, length) in enumerate(zip(encoded, lengths, strict=True)):
            batch["input_ids"][i, :length] = row["input_ids"][0]
            batch["input_ids"][i, length : length + self.num_queries] = self.seed_token
            batch["attention_mask"][i, : length + self.num_queries] = 1
            batch["content_mask"][i, :length] = True
            batch["query_mask"][i, length : length + self.num_queries] = True
            for key in per_token & row.keys():
                batch[key][i, :length] = row[key][0]
        for key in sorted({key for row in encoded for key in row} - batch.keys()):
            batch[key] = _stack_pictures([row[key] for row in encoded if key in row])
        return batch

    def token_states(self, batch: Batch, *, with_queries: bool = True) -> TokenStates:
        """Run the body; `with_queries=False` leaves the placeholders' own embeddings in place (for tests of the hook)."""
        inputs = {key: value for key, value in batch.items() if key not in ("query_mask", "content_mask")}
        mask = batch["query_mask"]
        if not self.causal:
            inputs["attention_mask"] = self._bidirectional_mask(batch)
            inputs["position_ids"] = self._positions(batch)

        def place_queries(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            if output.shape[:2] != mask.shape:
                return output
            which = (mask.cumsum(1) - 1).clamp_min(0)
            # embedding, not indexing: with several threads that adds gradients up in any order, and no run is like another
            return torch.where(mask[..., None], nn.functional.embedding(which, self.queries.to(output.dtype)), output)

        handle = self.model.get_input_embeddings().register_forward_hook(place_queries) if with_queries else None
        try:
            states = self.model(**inputs, **({"use_cache": False} if self.causal else {})).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
        queries = states[mask].view(len(mask), self.num_queries, -1)
        return TokenStates(states, batch["content_mask"], queries)

    def read(self, batch: Batch) -> QueryStates:
        """States for the heads and the mean content state, both in fp32."""
        with_roles = self.token_states(batch)
        weights = with_roles.content_mask[..., None].float()
        pooled = (with_roles.content.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        return QueryStates(with_roles.queries.float() + pooled[:, None], pooled)

    def forward(self, batch: Batch) -> Tensor:
        """States (B, L + 1, H) of SID_1..SID_L and EMB, the mean content state folded in."""
        return self.read(batch).states

    def _bidirectional_mask(self, batch: Batch) -> Tensor:
        """Who may see whom, (B, 1, T, T). Padding sees itself only, so that no softmax is empty."""
        content, query = batch["content_mask"], batch["query_mask"]
        order = torch.where(query, query.cumsum(1), 0)  # 0 content and padding, 1..L+1 the query tokens
        sees_content = (content | query)[:, :, None] & content[:, None, :]
        sees_query = query[:, :, None] & query[:, None, :] & (order[:, :, None] >= order[:, None, :])
        itself = torch.eye(content.shape[1], dtype=torch.bool, device=content.device)
        allowed = (sees_content | sees_query | itself)[:, None]
        if getattr(self.model.config, "_attn_implementation", "sdpa") == "sdpa":
            return allowed
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=content.device).masked_fill(~allowed, torch.finfo(dtype).min)

    def _positions(self, batch: Batch) -> Tensor:
        """Content counts from its start; query tokens stand at the model's last positions whatever the content's length."""
        content, query = batch["content_mask"], batch["query_mask"]
        counted = torch.arange(content.shape[1], device=content.device).expand(content.shape) + self.position_offset
        first = self.max_positions - self.num_queries
        return torch.where(query, first + query.cumsum(1) - 1, torch.where(content, counted, self.position_offset))

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Probe the body: in a causal model the first token's state does not depend on the third token."""
        device = self.model.get_input_embeddings().weight.device
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[self.seed_token] * 3, [self.seed_token] * 2 + [(self.seed_token + 1) % vocabulary]], device=device)
        extra = {key: torch.full_like(ids, value) for key, value in self.probe_fill().items()}
        was = self.model.training
        self.model.eval()
        states = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).last_hidden_state
        self.model.train(was)
        return bool((states[0, :2] - states[1, :2]).abs().max() < 1e-5)

    def probe_fill(self) -> dict[str, int]:
        """Extra per-token inputs, and their value at the query tokens, that make the body causal there."""
        return {}


def check_attention_rule(backbone: QueryBackbone, item: BackboneInput, tolerance: float = 1e-4) -> None:
    """Three forwards that prove the attention rule on this body: a changed query vector moves nothing that may not see it.

    Raises:
        ConfigError: the body ignores the mask (for example attention written without one).
    """
    batch = {key: value.to(backbone.device) for key, value in backbone.collate([item]).items()}
    with torch.no_grad():
        before = backbone.token_states(batch)
        kept = backbone.queries.detach().clone()
        moved = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).to(kept)
        try:
            for changed in (backbone.num_levels, min(1, backbone.num_levels - 1)):  # EMB, then a SID token
                backbone.queries.data[changed] = moved[changed]
                after = backbone.token_states(batch)
                backbone.queries.data.copy_(kept)
                content = (after.content - before.content)[before.content_mask].abs().max().item() if before.content_mask.any() else 0.0
                earlier = (after.queries - before.queries)[:, :changed].abs()
                if content > tolerance or (earlier.numel() and earlier.max().item() > tolerance):
                    raise ConfigError(
                        f"{type(backbone.model).__name__} lets content or an earlier SID token see query token {changed + 1} "
                        f"(content moved by {content:.1e}); load it with attn_implementation='sdpa' or choose another backbone"
                    )
        finally:
            backbone.queries.data.copy_(kept)


def _stack_pictures(parts: list[Tensor]) -> Tensor:
    """Join pixel inputs along the first axis; a second axis counting pictures per item (idefics3) is zero-padded to the longest."""
    if parts[0].dim() >= 4 and len({part.shape[1] for part in parts}) > 1:
        most = max(part.shape[1] for part in parts)
        parts = [torch.cat([part, part.new_zeros(part.shape[0], most - part.shape[1], *part.shape[2:])], 1) for part in parts]
    return torch.cat(parts, 0)
