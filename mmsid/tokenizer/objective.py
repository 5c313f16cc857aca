"""What training minimises: the tokenizer's losses on one batch of pairs, as one module (so that DDP wraps a single forward)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from mmsid.backbone.query_tokens import Batch
from mmsid.config import Section
from mmsid.tokenizer import losses
from mmsid.tokenizer.heads import ResidualHead
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.reconstruction import FrozenDecoder, ReconstructionHead


class LossWeights(Section):
    """Weight of each loss; 0 leaves it out."""

    codes: float = Field(1.0, ge=0)
    regression: float = Field(1.0, ge=0)
    contrast: float = Field(0.1, ge=0)
    embedding: float = Field(0.1, ge=0)
    reconstruction: float = Field(0.1, ge=0)


UNISID_WEIGHTS = LossWeights(codes=0.0, regression=0.0, contrast=1.0, embedding=1.0, reconstruction=0.1)


class Labels(NamedTuple):
    """Targets of a batch of A anchors followed by their A partners (B = 2A rows).

    `rows` (B,) item rows; `codes` (B, L); `fused` (B, D) or (B, 0) when there is no fused space; `categories` (B, L), -1 = none;
    `engaged`, `paired` (A,) bool; `text_ids`, `text_mask` (B, T) of what is to be reconstructed.
    """

    rows: Tensor
    codes: Tensor
    fused: Tensor
    categories: Tensor
    engaged: Tensor
    paired: Tensor
    text_ids: Tensor
    text_mask: Tensor

    def to(self, device: torch.device) -> Labels:
        """The same on `device`."""
        return Labels(*(value.to(device) for value in self))


class Objective(nn.Module):
    """Weighted losses of a batch.

    Args:
        finest: positives of the last level: co-engaged items of the batch ("engaged"; where the batch has none, the category
            decides), or the category as published.
        reconstruct_from: "states" (as published) or "codes".
    """

    def __init__(
        self,
        tokenizer: ItemTokenizer,
        weights: LossWeights,
        decoder: FrozenDecoder | None,
        *,
        tau: float = 0.07,
        finest: Literal["engaged", "category"] = "engaged",
        reconstruct_from: Literal["states", "codes"] = "states",
    ) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.tau, self.finest = tokenizer, weights, tau, finest
        self.reconstruct_from = reconstruct_from
        self.decoder = decoder
        self.reconstruction = None
        if decoder is not None:
            levels, settings = tokenizer.num_levels, tokenizer.settings
            if reconstruct_from == "states":
                positions, size = levels + 1, tokenizer.backbone.hidden_size
            else:
                positions, size = levels, settings.code_dim if settings.head == "residual" else settings.codebook_size
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed + 2)
                self.reconstruction = ReconstructionHead(positions, size, decoder)

    def forward(self, batch: Batch, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """(total, each loss before its weight); every loss is a mean over this process's rows."""
        h, e = self.tokenizer.hidden(batch)
        with torch.autocast(h.device.type, enabled=False):  # distances in bf16 would lose the small differences they are for
            return self._losses(h.float(), e.float(), labels)

    def _losses(self, h: Tensor, e: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        head, weights = self.tokenizer.head, self.weights
        s = head.project(h)
        logits = head.teacher_logits(s, labels.codes)
        residual = isinstance(head, ResidualHead)
        prefixes = head.soft_prefix_vectors(s, labels.codes) if residual else s
        parts: dict[str, Tensor] = {}
        if weights.codes:
            parts["codes"] = losses.code_cross_entropy(logits, labels.codes)
        if weights.regression and residual and labels.fused.shape[1]:
            parts["regression"] = losses.space_regression(s, labels.fused)
        if weights.contrast:
            parts["contrast"] = self._contrast(prefixes, labels)
        if weights.embedding:
            parts["embedding"] = self._embedding(self.tokenizer.embed(e), labels)
        if weights.reconstruction and self.reconstruction is not None and self.decoder is not None:
            vectors = torch.cat([h, e[:, None]], 1) if self.reconstruct_from == "states" else prefixes if residual else s.softmax(-1)
            nll = self.decoder.nll(self.reconstruction(vectors), labels.text_ids, labels.text_mask)
            parts["reconstruction"] = nll.sum() / (labels.text_mask.sum(1) > 0).sum().clamp_min(1)
        total = sum(getattr(weights, name) * value for name, value in parts.items())
        return total, {name: value.detach() for name, value in parts.items()}

    def _contrast(self, z: Tensor, labels: Labels) -> Tensor:
        """Candidates are the rows of all processes; gradient flows through this process's rows only."""
        rank, size = (dist.get_rank(), len(z)) if _several() else (0, len(z))
        own = torch.arange(size, device=z.device) + rank * size
        categories, rows = everyone(labels.categories), everyone(labels.rows)
        same = (labels.categories[:, None] == categories[None]) & (labels.categories[:, None] >= 0)
        positives = same.permute(2, 0, 1)
        if self.finest == "engaged" and labels.engaged.any():
            anchors = size // 2
            mates = torch.zeros(size, len(rows), dtype=torch.bool, device=z.device)
            index = torch.arange(anchors, device=z.device)
            mates[index, rank * size + anchors + index] = labels.engaged
            mates[anchors + index, rank * size + index] = labels.engaged
            positives = torch.cat([positives[:-1], mates[None]])
        # an item drawn twice is its own positive, never its own negative
        positives = positives | (labels.rows[:, None] == rows[None])
        itself = nn.functional.one_hot(own, len(rows)).bool()
        return losses.multi_granularity_contrast(z, everyone(z), positives & ~itself, self.tau, own)

    def _embedding(self, z: Tensor, labels: Labels) -> Tensor:
        anchors = len(z) // 2
        a, p = z[:anchors], z[anchors:]
        ra, rp = labels.rows[:anchors], labels.rows[anchors:]
        known = (rp[:, None] == rp[None]) | (ra[:, None] == rp[None])
        back = (ra[:, None] == ra[None]) | (rp[:, None] == ra[None])
        forward = losses.info_nce(a, p, labels.paired, self.tau, known)
        return (forward + losses.info_nce(p, a, labels.paired, self.tau, back)) / 2


def everyone(x: Tensor) -> Tensor:
    """Rows of all processes, this one's with their gradient; x itself in a single process. All must bring equally many rows."""
    if not _several():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
