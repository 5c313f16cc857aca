"""Adds a behaviour input to a tokenizer that was trained on content alone, so that refinement can learn codes that say behaviour.

Code vectors (weights of a parallel head) are 0 in the new coordinates of the code space: no code changes before the first step. Content
is regressed on the same coordinates, so that items without interactions profit from what the codes of others learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmsid.catalog import Catalog, Split
from mmsid.tokenizer.behaviour import BehaviourSettings, ItemBehaviour
from mmsid.tokenizer.behaviour_weight import choose_trust_and_weight
from mmsid.tokenizer.heads import CodeHead, ResidualHead, make_head
from mmsid.tokenizer.initialization import RIDGE_ROWS, StartSettings, read_behaviour, unit_content
from mmsid.tokenizer.model import ItemTokenizer, TokenizerSettings
from mmsid.tokenizer.ridge import ridge

# Size of a behaviour vector, relative to content. An optimiser step moves each coordinate of a code vector by about the learning rate, so
# that small changes in the direction of long vectors count (docs/experiments/refinement_content.md).
SIZE = 16.0


@torch.no_grad()
def add_behaviour(
    tokenizer: ItemTokenizer, states: Tensor, catalog: Catalog, split: Split, pairs: np.ndarray, files: Sequence[Path], seed: int
) -> ItemBehaviour | None:
    """Give `tokenizer`, which has no behaviour input, such an input in place. Its codes stay as they are.

    Args:
        states: (N, L, H) SID states of the catalogue's items.
        pairs: (P, 2) rows of consecutive items of the held-out users, on which the trust in behaviour is chosen.
        files: the user's own behaviour vectors; by default co-engagement of the fit users is factorised.

    Returns:
        Behaviour of the items; None, and an unchanged tokenizer, if there is none.

    Raises:
        CatalogError: a file is unusable.
    """
    start = StartSettings()
    found = read_behaviour(catalog, split, start, seed, tuple(files) or "coengagement")
    items = found.items
    known = items.interactions > 0
    if not known.any():
        return None
    settings = BehaviourSettings(
        source="vectors" if files else "coengagement",
        dim=items.vectors.shape[1],
        contexts=0 if found.factors is None else len(found.factors.context),
        window=start.window,
    )
    size = SIZE * _content_size(tokenizer.head, states)
    tokenizer.settings, tokenizer.head = _widened(tokenizer, settings)
    behaviour = tokenizer.behaviour
    if found.factors is not None:
        behaviour.context.copy_(torch.from_numpy(found.factors.context))
        behaviour.log_share.copy_(torch.from_numpy(found.factors.log_share))
        behaviour.item_ids = catalog.item_ids
    content = unit_content(states.mean(1).cpu().numpy(), centre=True)
    behaviour.kappa.fill_(choose_trust_and_weight(content, items, pairs, seed)[0])
    behaviour.value.copy_(size * torch.eye(settings.dim))
    _predict(tokenizer.head, states, size * torch.from_numpy(items.vectors), known, seed)
    return items


def _content_size(head: CodeHead, states: Tensor) -> float:
    """Root of the mean square deviation of the content readings from their mean; for a parallel head, of a single logit."""
    s = torch.cat([head.project(piece) for piece in states.split(4096)])
    squared = (s - s.mean(0)).square()
    return float((squared.sum(-1) if isinstance(head, ResidualHead) else squared).mean().sqrt())


def _widened(tokenizer: ItemTokenizer, behaviour: BehaviourSettings) -> tuple[TokenizerSettings, CodeHead]:
    """Settings and head with a behaviour input; the coordinates of behaviour are 0 in all weights."""
    old, dim, place = tokenizer.head, behaviour.dim, tokenizer.content_size
    kept, changes = old.state_dict(), {"behaviour": behaviour}
    if isinstance(old, ResidualHead):
        changes["code_dim"] = tokenizer.settings.code_dim + dim
        wide = lambda x: torch.cat([x[..., :place], x.new_zeros(*x.shape[:-1], dim), x[..., place:]], -1)  # noqa: E731
        kept |= {name: wide(kept[name]) for name in ("bias", "vectors")}
        kept["projection.weight"] = wide(kept["projection.weight"].T).T
    settings = tokenizer.settings.model_copy(update=changes)
    head = make_head(settings.head, place, settings.num_levels, settings.codebook_size, settings.code_dim, behaviour)
    head.load_state_dict(kept, strict=False)
    return settings, head.to(tokenizer.device).train(old.training)


def _predict(head: CodeHead, states: Tensor, target: Tensor, known: np.ndarray, seed: int) -> None:
    """Regress the states (N, L, H) of the known items on their behaviour (N, M), into the rows of the projection that hold it."""
    rows = torch.from_numpy(np.flatnonzero(known)[np.sort(np.random.default_rng(seed).permutation(int(known.sum()))[:RIDGE_ROWS])])
    h, target = states[rows.to(states.device)].cpu(), target[rows]
    mean = states.mean(0).cpu()  # every SID token adds its own constant
    weight, bias = ridge((h - mean).flatten(0, 1), target[:, None].expand(-1, h.shape[1], -1).flatten(0, 1), seed)
    span = head.behaviour.span if isinstance(head, ResidualHead) else slice(None)
    head.projection.weight[span] = weight.to(states.device)
    head.bias[:, span] = (bias - mean @ weight.T).to(states.device)
