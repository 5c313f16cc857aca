"""Vector backbone: reads vectors that the user brings (embeddings of another encoder, a two-tower or a graph model) instead of content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsid.backbone.query_tokens import BackboneInput, Batch, QueryStates
from mmsid.errors import CatalogError


class VectorBackbone(nn.Module):
    """Backbone without a pretrained model, with the interface of `QueryBackbone`.

    Content x = [v_1 / |v_1| ; ... ; v_F / |v_F|] / sqrt(F), with one vector v_f per family; a zero or absent vector gives zeros.
    State of token l: x + b_l + U_l gelu(D_l x), a bottleneck adapter (Houlsby et al. 2019). b_l and U_l are 0 at the start, so that
    the untrained tokens carry the vector itself, which the closed-form initialization builds on.

    Args:
        widths: dimension of each family of vectors; H is their sum.
        num_levels: L.
        rank: width of the bottleneck; 0 for none.
        seed: of the weights D_l.
    """

    look_ahead = 64

    def __init__(self, widths: Sequence[int], *, num_levels: int, rank: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.model = nn.Identity()  # there is no pretrained model
        self.widths, self.num_levels, self.hidden_size = tuple(widths), num_levels, sum(widths)
        tokens = num_levels + 1
        self.queries = nn.Parameter(torch.zeros(tokens, self.hidden_size))
        self.down = nn.Parameter(torch.randn(tokens, rank, self.hidden_size, generator=torch.Generator().manual_seed(seed)))
        self.up = nn.Parameter(torch.zeros(tokens, self.hidden_size, rank))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.queries.device

    @property
    def number_format(self) -> torch.dtype:
        """Number format of the content: float32."""
        return torch.float32

    def tokens_of(self, items: Sequence[BackboneInput]) -> list[Batch]:
        """`vector` (1, H) of each item. An item counts as one token: `input_ids` (1, 1).

        Raises:
            CatalogError: an item has vectors of other families than `widths`.
        """
        return [{"input_ids": torch.zeros(1, 1, dtype=torch.int64), "vector": self._content(item)[None]} for item in items]

    def _content(self, item: BackboneInput) -> Tensor:
        if not item.vectors:
            return torch.zeros(self.hidden_size)
        found = tuple(len(vector) for vector in item.vectors)
        if found != self.widths:
            raise CatalogError(
                f"an item has vectors of dimension {_sizes(found)}, but the tokenizer reads {_sizes(self.widths)}; name the files that it "
                "was trained on, in the same order"
            )
        families = [F.normalize(torch.from_numpy(np.array(vector, dtype=np.float32)), dim=0) for vector in item.vectors]
        return torch.cat(families) / len(families) ** 0.5

    def stack(self, encoded: Sequence[Batch], pad_to: int | None = None) -> Batch:
        """Batch items of `tokens_of`: every input is concatenated along its first axis. Nothing is padded."""
        return {key: torch.cat([row[key] for row in encoded]) for key in encoded[0]}

    def collate(self, items: Sequence[BackboneInput], pad_to: int | None = None) -> Batch:
        """Batch of model inputs of items."""
        return self.stack(self.tokens_of(items))

    def read(self, batch: Batch) -> QueryStates:
        """Compute the states of the SID tokens and the EMB token, and the content x, both in fp32."""
        x = batch["vector"].float()
        inner = F.gelu(torch.einsum("bh,lrh->blr", x, self.down.float()))
        return QueryStates(x[:, None] + self.queries.float() + torch.einsum("blr,lhr->blh", inner, self.up.float()), x)

    def forward(self, batch: Batch) -> Tensor:
        """States (B, L + 1, H) of SID_1..SID_L and EMB."""
        return self.read(batch).states


def _sizes(widths: Sequence[int]) -> str:
    return " + ".join(map(str, widths))
