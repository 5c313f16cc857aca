"""Losses of the item tokenizer, as pure functions of tensors. B items, L levels, K codes, D vector size.

Sources: multi-granularity contrast and the embedding loss are UniSID's (arXiv 2602.10445, equations of 2.3 and 2.4), the former
in the supervised-contrastive form of Khosla et al. 2020; the rest is ours (design section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def category_positives(categories: Tensor) -> Tensor:
    """Which items of a batch share a level's category: ids (B, L), -1 = no path -> (L, B, B) bool, diagonal False."""
    same = (categories[:, None] == categories[None]) & (categories[:, None] >= 0)
    return same.permute(2, 0, 1) & ~torch.eye(len(categories), dtype=torch.bool, device=categories.device)


def supervised_contrast(anchors: Tensor, candidates: Tensor, positives: Tensor, tau: float = 0.07, own: Tensor | None = None) -> Tensor:
    """SupCon, the mean over anchors that have a positive; 0 where none has.

        - 1/|P(i)| sum_{p in P(i)} log [ exp(sim(i, p) / tau) / sum_{a != i} exp(sim(i, a) / tau) ],  sim = cosine

    Args:
        anchors: (B, D). candidates: (C, D), the anchors among them.
        positives: (B, C) bool, False at an anchor's own place.
        own: (B,) place of each anchor among the candidates; default its row number.
    """
    similarity = functional.normalize(anchors, dim=-1) @ functional.normalize(candidates, dim=-1).T / tau
    place = torch.arange(len(anchors), device=anchors.device) if own is None else own
    itself = functional.one_hot(place, len(candidates)).bool()
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positives.sum(1)
    per_anchor = -log_share.masked_fill(~positives, 0.0).sum(1) / count.clamp_min(1)
    return per_anchor.sum() / (count > 0).sum().clamp_min(1)


def multi_granularity_contrast(z: Tensor, candidates: Tensor, positives: Tensor, tau: float = 0.07, own: Tensor | None = None) -> Tensor:
    """UniSID's L_sid: the mean over levels of `supervised_contrast`; z (B, L, D), candidates (C, L, D), positives (L, B, C).

    z is the logit vectors z^l for the loss as published, the cumulative prefix vectors for residual heads.
    """
    levels = [supervised_contrast(z[:, level], candidates[:, level], positives[level], tau, own) for level in range(z.shape[1])]
    return torch.stack(levels).mean()


def info_nce(anchors: Tensor, partners: Tensor, valid: Tensor | None = None, tau: float = 0.07, excluded: Tensor | None = None) -> Tensor:
    """UniSID's L_emb: cross-entropy of every anchor's own partner among all partners, by cosine; mean over `valid` anchors.

    Args:
        anchors, partners: (B, D), row i of both is a pair.
        valid: (B,) bool, anchors that have a true partner; all by default. 0 where none has.
        excluded: (B, B) bool, partners that are no negatives of an anchor (its other positives); its own pair always counts.
    """
    logits = functional.normalize(anchors, dim=-1) @ functional.normalize(partners, dim=-1).T / tau
    target = torch.arange(len(anchors), device=anchors.device)
    if excluded is not None:
        logits = logits.masked_fill(excluded & ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device), -torch.inf)
    per_anchor = functional.cross_entropy(logits, target, reduction="none")
    if valid is None:
        return per_anchor.mean()
    return (per_anchor * valid).sum() / valid.sum().clamp_min(1)


def code_cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Distillation of target codes: logits (B, L, K) under the target prefix, codes (B, L) -> mean -log pi(c_l | x, c_<l)."""
    return functional.cross_entropy(logits.flatten(0, 1), codes.flatten())


def space_regression(s: Tensor, target: Tensor) -> Tensor:
    """Content states regressed on the fused space: mean over items and levels of |s_l - f|^2 / 2; s (B, L, D), target (B, D)."""
    return (s - target[:, None]).square().sum(-1).mean() / 2


def sequence_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of each row, in nats: logits (B, T, V) for positions of ids (B, T), mask (B, T) -> (B,).

    A row without tokens gives 0.
    """
    per_token = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
    return per_token.sum(1) / mask.sum(1).clamp_min(1)
