"""Teaches the content reading the refined codes, so that new items, which have no behaviour, land where refinement put items like them.

Only the rows of the projection that predict behaviour from content are trained: an item with interactions hardly reads them, so that the
codes of known items stay.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from mmsid.refine.evidence import Codes
from mmsid.refine.item_states import ItemStates
from mmsid.refine.policy import BATCH
from mmsid.tokenizer.heads import CodeHead, ResidualHead
from mmsid.tokenizer.losses import code_cross_entropy

STEPS, BATCH_ITEMS = 400, 1024
LEARNING_RATE = 0.001  # relative to the mean size of the weights
HELD_OUT = 0.1  # share of the items that decides when to stop
FOLDS = 2  # of `codes_as_new`
EVERY, PATIENCE = 5, 5  # steps between evaluations, and evaluations without gain before the end


def teach_content_reading(head: CodeHead, states: ItemStates, codes: Tensor, seed: int, among: Tensor | None = None) -> dict[str, float]:
    """Train the content reading on the codes (N, L) of items with behaviour, by cross-entropy; in place.

    Training ends when the cross-entropy of a tenth of these items, which are not trained on, no longer falls; their best weights are kept.

    Args:
        among: (N,) bool, the items that may be trained on; None: all.

    Returns:
        `before`, `after`: cross-entropy of the held-out items in nats per code; {} if the head reads no behaviour.
    """
    if getattr(head, "behaviour", None) is None:
        return {}
    known = states.behaviour[:, -1] > 0
    known = torch.nonzero(known if among is None else known & among).flatten()
    if len(known) < 2 / HELD_OUT:
        return {}
    order = known[torch.from_numpy(np.random.default_rng([seed, 23]).permutation(len(known))).to(known.device)]
    cut = round(HELD_OUT * len(order))
    held_out, fitted = order[:cut], order[cut:]
    span = head.behaviour.span if isinstance(head, ResidualHead) else slice(None)
    weight, bias = (part.detach().clone().requires_grad_() for part in (head.projection.weight[span], head.bias[:, span]))
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE * float(weight.detach().square().mean().sqrt()))
    generator = torch.Generator().manual_seed(seed)
    full_weight, full_bias = head.projection.weight.detach(), head.bias.detach()

    def loss_of(rows: Tensor) -> Tensor:
        h = states.content[rows]
        s = _content(head, h, _filled(full_weight, weight, span, 0), _filled(full_bias, bias, span, 1))
        return code_cross_entropy(head.teacher_logits(s, codes[rows]), codes[rows])

    def held_out_loss() -> float:
        with torch.no_grad():
            pieces = held_out.split(BATCH_ITEMS)
            return float(sum(loss_of(piece) * len(piece) for piece in pieces) / len(held_out))

    before = best = held_out_loss()
    kept, waited = (weight.detach().clone(), bias.detach().clone()), 0
    for step in range(1, STEPS + 1):
        rows = fitted if len(fitted) <= BATCH_ITEMS else fitted[torch.randint(len(fitted), (BATCH_ITEMS,), generator=generator)]
        optimizer.zero_grad()
        loss_of(rows).backward()
        optimizer.step()
        if step % EVERY == 0:
            now = held_out_loss()
            if now < best:
                best, kept, waited = now, (weight.detach().clone(), bias.detach().clone()), 0
            else:
                waited += 1
            if waited == PATIENCE:
                break
    with torch.no_grad():
        head.projection.weight[span], head.bias[:, span] = kept
    return {"before": before, "after": best}


@torch.no_grad()
def codes_as_new(head: CodeHead, states: ItemStates, seed: int) -> Codes:
    """Codes (N, L) that the items would have as new ones: read by content alone, which was taught the codes of other items only."""
    codes = greedy_codes(head, states)
    if getattr(head, "behaviour", None) is not None:
        folds = torch.from_numpy(np.random.default_rng([seed, 29]).permutation(len(codes)) % FOLDS).to(codes.device)
        nothing, own = ItemStates(states.content, torch.zeros_like(states.behaviour)), codes.clone()
        for fold in range(FOLDS):
            taught = copy.deepcopy(head)
            with torch.enable_grad():
                teach_content_reading(taught, states, own, seed, folds != fold)
            codes[folds == fold] = greedy_codes(taught, nothing)[folds == fold]
    return codes.cpu().numpy()


@torch.no_grad()
def greedy_codes(head: CodeHead, states: Tensor | ItemStates) -> Tensor:
    """Argmax codes (N, L) of cached states."""
    return torch.cat([head.greedy(head.project(piece)).codes for piece in states.split(BATCH)])


def _filled(full: Tensor, part: Tensor, span: slice, axis: int) -> Tensor:
    """`full` with `part` in place of a span of an axis, with the gradient of `part`."""
    first, last = span.start or 0, full.shape[axis] if span.stop is None else span.stop
    return torch.cat([full.narrow(axis, 0, first), part, full.narrow(axis, last, full.shape[axis] - last)], axis)


def _content(head: CodeHead, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`head.content` with other weights of the projection."""
    projected = h @ weight.T + bias
    if isinstance(head, ResidualHead):
        return projected
    return torch.cat([torch.stack([linear(h[:, level]) for level, linear in enumerate(head.levels)], 1), projected], -1)
