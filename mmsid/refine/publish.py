"""SID table of a policy from cached states, without writing it, so that the gate can compare it with the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmsid.catalog import Catalog
from mmsid.refine.evidence import Codes
from mmsid.refine.item_states import ItemStates
from mmsid.refine.policy import BATCH
from mmsid.sids.collisions import Policy, resolve
from mmsid.sids.table import BEHAVIOUR, CONTENT, SidTable
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import ItemTokenizer
from mmsid.tokenizer.publish import HeadScores

ScoresOf = Callable[[np.ndarray], Tensor]


@torch.no_grad()
def raw_codes(
    tokenizer: ItemTokenizer, states: Tensor | ItemStates, inputs: Sequence[ItemInput] | None
) -> tuple[Codes, np.ndarray, ScoresOf]:
    """Argmax codes (N, L), margins (N,), and a function from rows (n,) to projected states (n, L, D), of cached states; on the CPU.

    Items whose margin is within rounding error are encoded again by `ItemTokenizer.encode`, so that the codes equal its codes; without
    `inputs`, they are not.
    """
    head = copy.deepcopy(tokenizer.head).eval()  # the tokenizer's own may be in training
    greedy = [head.greedy(head.project(piece)) for piece in states.split(BATCH)]
    codes, margin, relative = (torch.cat(column).cpu() for column in zip(*greedy, strict=True))
    again: dict[int, Tensor] = {}
    for row in [] if inputs is None else (relative < tokenizer.rounding_margin).nonzero().flatten().tolist():
        encoded = tokenizer.encode([inputs[row]])
        codes[row], margin[row], again[row] = encoded.raw_codes[0], encoded.margin[0], encoded.scores[0]

    @torch.no_grad()
    def scores_of(rows: np.ndarray) -> Tensor:
        scores = head.project(states[torch.from_numpy(rows).to(states.device)]).cpu()
        for place, row in enumerate(rows.tolist()):
            if row in again:
                scores[place] = again[row]
        return scores

    return codes.numpy(), margin.numpy(), scores_of


def make_table(
    tokenizer: ItemTokenizer,
    states: Tensor | ItemStates,
    inputs: Sequence[ItemInput],
    catalog: Catalog,
    policy: Policy,
    moved: Codes | None = None,
) -> SidTable:
    """SID table that the tokenizer publishes under a collision policy, rows in the order of the catalogue.

    `moved` (N, L) replaces the tokenizer's own raw codes; the tokenizer still scores where collisions are relocated.
    """
    codes, margin, scores_of = raw_codes(tokenizer, states, inputs if moved is None else None)
    if moved is not None:
        codes, margin = moved, np.full(len(moved), np.nan, np.float32)
    # a copy, because `HeadScores` moves its head to the CPU and this head may be in training
    head_scores = HeadScores(copy.deepcopy(tokenizer.head), scores_of)
    sizes = (tokenizer.codebook_size,) * tokenizer.num_levels
    hashes = catalog.content_hashes
    resolution = resolve(policy, codes, hashes, sizes, head_scores.last_scores, head_scores.prefix_candidates, head_scores.prefix_beams)
    return SidTable(
        item_ids=catalog.item_ids,
        codes=resolution.codes,
        raw_codes=codes,
        suffix=resolution.suffix,
        margin=margin,
        codebook_sizes=sizes,
        tokenizer_sha256=tokenizer.sha256(),
        catalog_sha256=catalog.sha256,
        source=np.array([CONTENT if item.behaviour is None else BEHAVIOUR for item in inputs], dtype=object),
        integer_ids=catalog.integer_ids,
    )
