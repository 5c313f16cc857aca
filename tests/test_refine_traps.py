"""Reward hacking (T10): the loop maximises a wrong reward, and the gate refuses the result."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import sparse

from mmsid.refine import gate
from mmsid.refine.evidence import CodeTable
from mmsid.refine.gate import GateConfig, HeldOutPairs
from mmsid.refine.loop import LoopConfig, Refinement
from mmsid.refine.policy import HeadPolicy, Reference
from mmsid.tokenizer.heads import ParallelHead

CLUSTERS, PER, CODES = 6, 8, 8
ITEMS = CLUSTERS * PER


def _start():
    """Items of a cluster share the first code; two items share a path. With one-hot states every item can move separately."""
    codes = np.stack([np.arange(ITEMS) // PER, np.arange(ITEMS) % PER], axis=1)
    codes[1] = codes[0]
    head = ParallelHead(ITEMS, 2, CODES)
    with torch.no_grad():
        for level, linear in enumerate(head.levels):
            linear.weight.zero_(), linear.bias.zero_()
            linear.weight[torch.from_numpy(codes[:, level]), torch.arange(ITEMS)] = 2.0
    return head, torch.eye(ITEMS)[:, None].expand(-1, 2, -1).contiguous(), codes


def _loosely(value: float) -> LoopConfig:
    return LoopConfig(rounds=25, lr=value, kl=0.0, moving=1.0, step_kl=2.0, weights={"hacked": 1.0})


def _rewards_uniqueness(rows, candidates, codes):
    table = CodeTable(codes, CODES, sparse.csr_matrix((ITEMS, ITEMS)))
    return {"hacked": -table.others(rows, candidates).sum(-1)}


def _rewards_collapse(rows, candidates, codes):
    table = CodeTable(codes, CODES, sparse.csr_matrix((ITEMS, ITEMS)))
    return {"hacked": table.others(rows, candidates).sum(-1)}


def _rewards_scrambling(rows, candidates, codes):
    target = np.random.default_rng(1).integers(0, CODES, size=(ITEMS, 2))
    return {"hacked": (candidates == target[rows][:, None]).mean(-1)}


@pytest.mark.parametrize(
    ("scorer", "failed"),
    [
        (_rewards_uniqueness, {"target", "lift"}),
        (_rewards_collapse, {"target", "lift", "raw_collisions", "published_collisions", "least_perplexity"}),
        (_rewards_scrambling, {"target", "lift"}),
    ],
)
def test_t10_the_gate_refuses_a_hacked_reward(scorer, failed):
    head, states, start = _start()
    reference = Reference(head, states, top_m=CODES)
    assert (reference.greedy == start).all()
    log: list[dict] = []
    policy = HeadPolicy(head, lambda rows: states[rows], list(head.parameters()), reference)
    codes = Refinement(policy, reference, scorer, _loosely(0.2), Accelerator(cpu=True)).run(log.append)
    assert log[-1]["reward_hacked"] > log[0]["reward_hacked"] and (codes != start).any(1).mean() > 0.3, "the wrong reward was not gained"

    rng = np.random.default_rng(0)
    cluster = np.arange(ITEMS) // PER
    histories = [rng.permutation(np.flatnonzero(cluster == rng.integers(CLUSTERS)))[:5] for _ in range(80)]
    held_out, config = HeldOutPairs.from_histories(histories), GateConfig()
    figures = [gate.measure(table, table, CODES, np.arange(ITEMS), held_out, table, config.level_weights) for table in (start, codes)]
    share = gate.bootstrap((start, start), (codes, codes), CODES, held_out, config, seed=0).gain_share
    verdict = gate.decide(*figures, share, config)
    assert not verdict.accepted and {row.metric for row in verdict.rows if not row.passed} >= failed
