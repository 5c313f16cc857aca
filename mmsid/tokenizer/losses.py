"""Losses of the item tokenizer, as pure functions of tensors. B items, L levels, K codes, D vector size.

The multi-granularity contrast and the embedding loss are those of UniSID (arXiv 2602.10445, sections 2.3 and 2.4), the former in
the supervised-contrastive form of Khosla et al. 2020. Code distillation and the regression on the fused space are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def supervised_contrast(anchors: Tensor, candidates: Tensor, positives: Tensor, tau: float = 0.07, own: Tensor | None = None) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020), mean over the anchors with a positive; 0 if there are none.

        - 1/|P(i)| sum_{p in P(i)} log [ exp(sim(i, p) / tau) / sum_{a != i} exp(sim(i, a) / tau) ],  sim = cosine

    Args:
        anchors: (B, D). candidates: (C, D), the anchors among them.
        positives: (B, C) bool, False where the candidate is the anchor itself.
        own: (B,) index of each anchor among the candidates; by default its row number.
    """
    similarity = functional.normalize(anchors, dim=-1) @ functional.normalize(candidates, dim=-1).T / tau
    index = torch.arange(len(anchors), device=anchors.device) if own is None else own
    itself = functional.one_hot(index, len(candidates)).bool()
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positives.sum(1)
    per_anchor = -log_share.masked_fill(~positives, 0.0).sum(1) / count.clamp_min(1)
    return per_anchor.sum() / (count > 0).sum().clamp_min(1)


def multi_granularity_contrast(z: Tensor, candidates: Tensor, positives: Tensor, tau: float = 0.07, own: Tensor | None = None) -> Tensor:
    """L_sid of UniSID: the mean over levels of `supervised_contrast`; z (B, L, D), candidates (C, L, D), positives (L, B, C).

    z contains the logit vectors z^l in the published loss, and the cumulative prefix vectors with residual heads.
    """
    levels = [supervised_contrast(z[:, level], candidates[:, level], positives[level], tau, own) for level in range(z.shape[1])]
    return torch.stack(levels).mean()


def info_nce(anchors: Tensor, partners: Tensor, valid: Tensor | None = None, tau: float = 0.07, excluded: Tensor | None = None) -> Tensor:
    """L_emb of UniSID: cross-entropy of each anchor's partner among all partners by cosine similarity, mean over `valid` anchors.

    Args:
        anchors, partners: (B, D), row i of both is a pair.
        valid: (B,) bool, anchors with a true partner; all by default. The loss is 0 if there are none.
        excluded: (B, B) bool, partners that are not negatives of an anchor (its other positives). The pair itself is never excluded.
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
    """Distillation of target codes, mean of -log pi(c_l | x, c_<l): logits (B, L, K) under the target prefixes, codes (B, L)."""
    return functional.cross_entropy(logits.flatten(0, 1), codes.flatten())


def space_regression(s: Tensor, target: Tensor) -> Tensor:
    """Regression of projected states on fused vectors, mean of |s_l - f|^2 / 2 over items and levels: s (B, L, D), target (B, D)."""
    return (s - target[:, None]).square().sum(-1).mean() / 2


def sequence_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood per token of each row, in nats; 0 for a row without tokens.

    logits (B, T, V), token ids (B, T), mask (B, T) -> (B,).
    """
    per_token = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
    return per_token.sum(1) / mask.sum(1).clamp_min(1)
