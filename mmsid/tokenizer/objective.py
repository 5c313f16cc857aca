"""Training objective of the item tokenizer: weighted losses of one batch of pairs, as a single module for DDP."""

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
    """Weight of each loss; a loss of weight 0 is not computed.

    Attributes:
        codes: cross-entropy of the SID head with the target codes.
        regression: distance of the projected states from the fused vectors of content and behaviour.
        contrast: contrastive loss at every level, on the vectors of the code prefixes (residual head) or on the logits (parallel head).
        embedding: contrastive loss (InfoNCE) on the item embedding.
        reconstruction: cross-entropy of a language model that writes the item's text from its states.
    """

    codes: float = Field(1.0, ge=0)
    regression: float = Field(1.0, ge=0)
    contrast: float = Field(0.1, ge=0)
    embedding: float = Field(0.1, ge=0)
    reconstruction: float = Field(0.1, ge=0)


UNISID_WEIGHTS = LossWeights(codes=0.0, regression=0.0, contrast=1.0, embedding=1.0, reconstruction=0.1)


class Labels(NamedTuple):
    """Targets of a batch of A anchors followed by their A partners (B = 2A rows).

    Attributes:
        rows: (B,) row numbers of the items.
        codes: (B, L) target codes.
        fused: (B, D) fused vectors; (B, 0) if there is no fused space.
        categories: (B, L) category ids per level, -1 for none.
        engaged, paired: (A,) bool, as in `PairBatch`.
        text_ids, text_mask: (B, T) tokens of the text to reconstruct.
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
        """Copy to `device`."""
        return Labels(*(value.to(device) for value in self))


class Objective(nn.Module):
    """Weighted losses of a batch. With a behaviour input, both readings of every item learn its target codes.

    Args:
        tau: temperature of both contrastive losses.
        finest: positives of the last level: "engaged", co-engaged items of the batch (the category if the batch has none); or
            "category", as in UniSID.
        reconstruct_from: input of the reconstruction: "states" (as in UniSID) or the vectors of the chosen "codes".
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
                positions, size = levels + 1, tokenizer.content_size
            else:
                positions, size = levels, settings.code_dim if settings.head == "residual" else settings.codebook_size
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed + 2)
                self.reconstruction = ReconstructionHead(positions, size, decoder)

    def forward(self, batch: Batch, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, and each loss before weighting; every loss is a mean over the rows of this process."""
        h, e = self.tokenizer.hidden(batch)
        with torch.autocast(h.device.type, enabled=False):  # bf16 is too coarse for differences of distances
            return self._losses(h.float(), e.float(), labels)

    def _losses(self, h: Tensor, e: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        head, weights = self.tokenizer.head, self.weights
        residual = isinstance(head, ResidualHead)
        s = head.content(h) if residual else head.project(h)  # a reading without behaviour: new items have none
        prefixes = head.soft_prefix_vectors(s, labels.codes) if residual else s
        parts: dict[str, Tensor] = {}
        if weights.codes:
            parts["codes"] = losses.code_cross_entropy(head.teacher_logits(s, labels.codes), labels.codes)
            if self.tokenizer.behaviour is not None:
                both = losses.code_cross_entropy(head.teacher_logits(head.project(h), labels.codes), labels.codes)
                parts["codes"] = (parts["codes"] + both) / 2
        if weights.regression and residual and labels.fused.shape[1]:
            parts["regression"] = losses.space_regression(s, labels.fused)
        if weights.contrast:
            parts["contrast"] = self._contrast(prefixes, labels)
        if weights.embedding:
            parts["embedding"] = self._embedding(self.tokenizer.embed(e), labels)
        if weights.reconstruction and self.reconstruction is not None and self.decoder is not None:
            h = h[..., : self.tokenizer.content_size]
            vectors = torch.cat([h, e[:, None]], 1) if self.reconstruct_from == "states" else prefixes if residual else s.softmax(-1)
            nll = self.decoder.nll(self.reconstruction(vectors), labels.text_ids, labels.text_mask)
            parts["reconstruction"] = nll.sum() / (labels.text_mask.sum(1) > 0).sum().clamp_min(1)
        total = sum(getattr(weights, name) * value for name, value in parts.items())
        return total, {name: value.detach() for name, value in parts.items()}

    def _contrast(self, z: Tensor, labels: Labels) -> Tensor:
        """Multi-granularity contrast against the rows of all processes; gradient flows through the rows of this process only."""
        size, rank = len(z), dist.get_rank() if _is_distributed() else 0
        own = torch.arange(size, device=z.device) + rank * size
        categories, rows = gather_rows(labels.categories), gather_rows(labels.rows)
        same = (labels.categories[:, None] == categories[None]) & (labels.categories[:, None] >= 0)
        positives = same.permute(2, 0, 1)
        if self.finest == "engaged" and labels.engaged.any():
            anchors = size // 2
            partners = torch.zeros(size, len(rows), dtype=torch.bool, device=z.device)
            index = torch.arange(anchors, device=z.device)
            partners[index, rank * size + anchors + index] = labels.engaged
            partners[anchors + index, rank * size + index] = labels.engaged
            positives = torch.cat([positives[:-1], partners[None]])
        # two rows of the same item are positives of each other
        positives = positives | (labels.rows[:, None] == rows[None])
        itself = nn.functional.one_hot(own, len(rows)).bool()
        return losses.multi_granularity_contrast(z, gather_rows(z), positives & ~itself, self.tau, own)

    def _embedding(self, z: Tensor, labels: Labels) -> Tensor:
        """InfoNCE of anchors against partners and back; rows of either item of a pair are not negatives of the pair."""
        half = len(z) // 2
        anchors, partners = z[:half], z[half:]
        anchor_rows, partner_rows = labels.rows[:half], labels.rows[half:]
        no_negatives = (partner_rows[:, None] == partner_rows[None]) | (anchor_rows[:, None] == partner_rows[None])
        no_negatives_back = (anchor_rows[:, None] == anchor_rows[None]) | (partner_rows[:, None] == anchor_rows[None])
        forward = losses.info_nce(anchors, partners, labels.paired, self.tau, no_negatives)
        return (forward + losses.info_nce(partners, anchors, labels.paired, self.tau, no_negatives_back)) / 2


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes, those of this process with their gradient; `x` itself in a single process. Row counts must be equal."""
    if not _is_distributed():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
