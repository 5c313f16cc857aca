"""From the policy's states to a SID table, without writing it: the gate compares before anything is published."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmsid.catalog import Catalog
from mmsid.refine.evidence import Codes
from mmsid.refine.policy import BATCH
from mmsid.sids.collisions import Policy, resolve
from mmsid.sids.table import SidTable
from mmsid.tokenizer.inputs import ItemInput
from mmsid.tokenizer.model import DOUBTFUL, ItemTokenizer
from mmsid.tokenizer.publish import HeadScores


@torch.no_grad()
def raw_codes(tokenizer: ItemTokenizer, states: Tensor, inputs: Sequence[ItemInput]) -> tuple[Codes, np.ndarray, Tensor]:
    """Argmax codes (N, L), margins (N,) and head scores (N, L, D) from cached states (N, L, H), results on the CPU.

    Items whose lead is within rounding error are read again by `ItemTokenizer.encode`, so that the codes are those it will give.
    """
    scores = torch.cat([tokenizer.head.project(piece) for piece in states.split(BATCH)])
    greedy = [tokenizer.head.greedy(piece) for piece in scores.split(BATCH)]
    codes, margin, relative = (torch.cat(column).cpu() for column in zip(*greedy, strict=True))
    scores = scores.cpu()
    for row in (relative < DOUBTFUL).nonzero().flatten().tolist():
        again = tokenizer.encode([inputs[row]])
        codes[row], margin[row], scores[row] = again.raw_codes[0], again.margin[0], again.scores[0]
    return codes.numpy(), margin.numpy(), scores


def make_table(
    tokenizer: ItemTokenizer,
    states: Tensor,
    inputs: Sequence[ItemInput],
    catalog: Catalog,
    policy: Policy,
    moved: Codes | None = None,
) -> SidTable:
    """The table that the tokenizer would publish under a collision policy; rows in the catalogue's order.

    `moved` (N, L): raw codes that are not the tokenizer's own (control arms); it still says where collisions may go.
    """
    codes, margin, scores = raw_codes(tokenizer, states, inputs)
    if moved is not None:
        codes, margin = moved, np.full(len(moved), np.nan, np.float32)
    # a copy: `HeadScores` takes its head to the CPU, this one may be in training elsewhere
    head_scores = HeadScores(copy.deepcopy(tokenizer.head), lambda rows: scores[torch.from_numpy(rows)])
    sizes = (tokenizer.codebook_size,) * tokenizer.num_levels
    hashes = [item.content_sha256 for item in catalog.items]
    resolution = resolve(policy, codes, hashes, sizes, head_scores.last_scores, head_scores.prefix_candidates)
    return SidTable(
        item_ids=[item.item_id for item in catalog.items],
        codes=resolution.codes,
        raw_codes=codes,
        suffix=resolution.suffix,
        margin=margin,
        codebook_sizes=sizes,
        tokenizer_sha256=tokenizer.sha256(),
        catalog_sha256=catalog.sha256,
    )
