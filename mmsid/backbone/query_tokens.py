"""Query tokens: learnable SID tokens and one EMB token that a Hugging Face model reads after the content of an item.

The input gets placeholder ids, and a forward hook on the input embeddings replaces them by the learnable vectors.
They are not passed through `inputs_embeds`, because the position ids of Qwen-VL models would be wrong.
Row layout: `[content][SID_1 .. SID_L][EMB][padding]`; the attention rule is documented in `QueryBackbone`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmsid.backbone.rows import other_inputs, per_token_keys

Batch = dict[str, Tensor]


class BackboneInput(Protocol):
    """Input of a backbone: one text, any number of pictures, and the user's own vectors, one per family or none."""

    text: str
    pictures: tuple[Any, ...]
    vectors: tuple[Any, ...]


class TokenStates(NamedTuple):
    """Last hidden states: `content` (B, T, H) with `content_mask` (B, T) bool; `queries` (B, L + 1, H) of SID_1..SID_L and EMB."""

    content: Tensor
    content_mask: Tensor
    queries: Tensor


class QueryStates(NamedTuple):
    """Inputs of the heads: `states` (B, L + 1, H), query state + mean content state; `pooled` (B, H), the mean content state."""

    states: Tensor
    pooled: Tensor


class QueryBackbone(nn.Module, ABC):
    """Hugging Face model without LM head, with `num_levels` SID tokens and one EMB token.

    Attention rule: content tokens never attend to query tokens. SID token l attends to content and SID tokens up to l, EMB to content
    and all SID tokens. A causal model fulfils this rule without a mask, because padding comes last. A bidirectional model gets a
    four-dimensional mask, and its query tokens get the last position ids of the model, so that neither padding nor content length
    changes their states.

    The output state of a query token is its last hidden state plus the mean content state. With this sum, the untrained tokens carry
    the sentence embedding of the plain model from step 0. Content does not attend to query tokens, so the mean equals that of the plain
    model.

    Args:
        model: takes `input_ids`, `attention_mask` and processor outputs, returns `last_hidden_state`.
        num_levels: L.
        seed_token: id whose embedding, plus noise, initialises the query vectors; also the placeholder id.
        pad_token: id of padding.
        seed: of the noise.
        position_offset: first position id of the content in a bidirectional model (2 for RoBERTa, 0 for BERT).
    """

    extra_fill: dict[str, int]
    look_ahead = 1  # number of batches tokenized at once, so that items of similar length are batched together

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
        """L + 1: SID tokens and EMB token."""
        return self.num_levels + 1

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.queries.device

    @property
    def number_format(self) -> torch.dtype:
        """Number format of the frozen weights."""
        return self.model.get_input_embeddings().weight.dtype

    def train(self, mode: bool = True) -> QueryBackbone:
        """Set the mode of LoRA dropout and of subclasses; the frozen model stays in evaluation mode, so that its dropout never runs."""
        super().train(mode)
        self.model.eval()
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    @abstractmethod
    def tokens(self, item: BackboneInput) -> Batch:
        """Model inputs of one item without query tokens, with a batch axis of 1; includes `input_ids` (1, T)."""

    def tokens_of(self, items: Sequence[BackboneInput]) -> list[Batch]:
        """`tokens` of several items."""
        return [self.tokens(item) for item in items]

    def collate(self, items: Sequence[BackboneInput], pad_to: int | None = None) -> Batch:
        """Tokenize items into a batch of model inputs with placeholder ids for the query tokens.

        Rows are padded to a multiple of `pad_to` (default: 8 on a GPU, for its tensor cores, otherwise 1). Per-token inputs (integers)
        are (B, T); others, such as pictures, are stacked along their first axis. `query_mask` (B, T) marks query tokens, `content_mask`
        (B, T) content tokens.
        """
        return self.stack(self.tokens_of(items), pad_to)

    def stack(self, encoded: Sequence[Batch], pad_to: int | None = None) -> Batch:
        """Batch items that were tokenized by `tokens`; see `collate`."""
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
        per_token = set(per_token_keys(encoded))
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
        return batch | other_inputs(encoded, batch)

    def token_states(self, batch: Batch) -> TokenStates:
        """Run the model with the learnable vectors in place of the placeholder embeddings."""
        inputs = {
            key: value.to(self.number_format) if value.is_floating_point() else value
            for key, value in batch.items()
            if key not in ("query_mask", "content_mask")
        }
        mask = batch["query_mask"]
        if not self.causal:
            inputs["attention_mask"] = self._bidirectional_mask(batch)
            inputs["position_ids"] = self._positions(batch)

        def insert_queries(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            if output.shape[:2] != mask.shape:
                return output
            index = (mask.cumsum(1) - 1).clamp_min(0)
            # `embedding` sums gradients in a fixed order; indexing does not with several threads, so runs would not be repeatable
            return torch.where(mask[..., None], nn.functional.embedding(index, self.queries.to(output.dtype)), output)

        handle = self.model.get_input_embeddings().register_forward_hook(insert_queries)
        try:
            states = self.model(**inputs, **({"use_cache": False} if self.causal else {})).last_hidden_state
        finally:
            handle.remove()
        queries = states[mask].view(len(mask), self.num_queries, -1)
        return TokenStates(states, batch["content_mask"], queries)

    def read(self, batch: Batch) -> QueryStates:
        """Compute the states for the heads and the mean content state, both in fp32."""
        found = self.token_states(batch)
        weights = found.content_mask[..., None].float()
        pooled = (found.content.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        return QueryStates(found.queries.float() + pooled[:, None], pooled)

    def forward(self, batch: Batch) -> Tensor:
        """States (B, L + 1, H) of SID_1..SID_L and EMB, mean content state included."""
        return self.read(batch).states

    def _bidirectional_mask(self, batch: Batch) -> Tensor:
        """Attention mask (B, 1, T, T) of the attention rule. Padding attends to itself only, so that no softmax is empty."""
        content, query = batch["content_mask"], batch["query_mask"]
        order = torch.where(query, query.cumsum(1), 0)  # 0 content and padding, 1..L+1 the query tokens
        to_content = (content | query)[:, :, None] & content[:, None, :]
        to_query = query[:, :, None] & query[:, None, :] & (order[:, :, None] >= order[:, None, :])
        to_itself = torch.eye(content.shape[1], dtype=torch.bool, device=content.device)
        allowed = (to_content | to_query | to_itself)[:, None]
        if getattr(self.model.config, "_attn_implementation", "sdpa") == "sdpa":
            return allowed
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=content.device).masked_fill(~allowed, torch.finfo(dtype).min)

    def _positions(self, batch: Batch) -> Tensor:
        """Position ids: content counts from `position_offset`, query tokens get the last positions of the model."""
        content, query = batch["content_mask"], batch["query_mask"]
        counted = torch.arange(content.shape[1], device=content.device).expand(content.shape) + self.position_offset
        first = self.max_positions - self.num_queries
        return torch.where(query, first + query.cumsum(1) - 1, torch.where(content, counted, self.position_offset))

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Test the model: in a causal model, the states of the first two tokens do not depend on the third token."""
        device = self.model.get_input_embeddings().weight.device
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.tensor([[self.seed_token] * 3, [self.seed_token] * 2 + [(self.seed_token + 1) % vocabulary]], device=device)
        extra = {key: torch.full_like(ids, value) for key, value in self.probe_fill().items()}
        training = self.model.training
        self.model.eval()
        states = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).last_hidden_state
        self.model.train(training)
        tolerance = max(1e-5, 4 * torch.finfo(states.dtype).eps * float(states.abs().max()))
        return bool((states[0, :2] - states[1, :2]).abs().max() < tolerance)

    def probe_fill(self) -> dict[str, int]:
        """Extra per-token inputs and their values at query tokens that make the model causal there."""
        return {}
