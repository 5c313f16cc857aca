"""Memory and time of refinement on synthetic catalogues: peak resident memory, seconds of the preparation and of a round.

    OMP_NUM_THREADS=2 python benchmarks/refine_scale.py --items 100000 1000000

States (3 levels x 384 and 64 behaviour coordinates) and histories are drawn; the backbone is not run. Every size runs in a process of its
own. A round treats at most 2,048 items and reads the codes of all, so that its time grows linearly with the catalogue.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmsid.artifacts import write_json
from mmsid.catalog import co_engagement
from mmsid.quantize.nearest_items import smoothed_co_engagement
from mmsid.refine.evidence import Codes, CodeTable, EvidenceConfig, NeighboursCodes
from mmsid.refine.features import Material, feature_names, read_features
from mmsid.refine.item_states import ItemStates
from mmsid.refine.loop import LoopConfig, Refinement
from mmsid.refine.policy import HeadPolicy, Reference
from mmsid.refine.reward import RewardConfig, SidReward
from mmsid.tokenizer.behaviour import BehaviourSettings
from mmsid.tokenizer.heads import ResidualHead

LEVELS, CODES, HIDDEN, BEHAVIOUR = 3, 256, 384, 64
PIECE = 2048  # items whose features are computed at once


def main() -> None:
    """Measure every size and write `refine_scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "refine_scale.json")
    parser.add_argument("--measure", action="store_true", help="measure one size in this process and print JSON")
    parsed = parser.parse_args()
    if parsed.measure:
        print(json.dumps(measure(parsed.items[0], parsed.rounds)))
        return
    rows = []
    for items in parsed.items:
        command = [sys.executable, __file__, "--items", str(items), "--rounds", str(parsed.rounds), "--measure"]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        print(rows[-1])
    write_json(parsed.out, {"threads": torch.get_num_threads(), "levels": LEVELS, "codebook_size": CODES, "sizes": rows})


def measure(items: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of one size."""
    rng, seconds = np.random.default_rng(0), {}

    def timed(name: str, started: float) -> None:
        seconds[name] = round(time.perf_counter() - started, 1)

    states, item_vectors, histories = draw(items, rng)
    head = start_head(states)
    started = time.perf_counter()
    neighbours, evidence = co_engagement(histories, items), EvidenceConfig()
    timed("co_engagement", started)
    started = time.perf_counter()
    neighbours = smoothed_co_engagement(neighbours, states.behaviour[:, :-1].numpy())
    timed("nearest_by_behaviour", started)
    content = np.arange(items)
    started = time.perf_counter()
    propose = lambda codes: (lambda near: lambda rows, kept: near.after(rows, kept, 2))(  # noqa: E731
        NeighboursCodes(codes, CODES, neighbours, content, evidence)
    )
    reference = Reference(head, states, 8, None, 2.0, propose)
    timed("reference", started)
    material = Material(reference, item_vectors, reference.greedy, content)
    started = time.perf_counter()
    _ = material.alike
    timed("nearest_items", started)
    reward = SidReward(feature_names(LEVELS), RewardConfig().hidden, RewardConfig().distance_weight).eval()

    def score(rows: np.ndarray, candidates: Codes, codes: Codes) -> dict[str, np.ndarray]:
        table = CodeTable(codes, CODES, neighbours, content)
        parts, pieces = table.components(rows, candidates, evidence), []
        for start in range(0, len(rows), PIECE):
            with torch.no_grad():
                features = read_features(material, table, rows[start : start + PIECE], candidates[start : start + PIECE])
                pieces.append(reward(features).double().numpy())
        return parts | {"sid_reward": np.concatenate(pieces)}

    policy = HeadPolicy(head, lambda rows: states[rows], list(head.parameters()), reference)
    loop = Refinement(policy, reference, score, LoopConfig(), Accelerator(cpu=True))
    each, table = [], policy.greedy()
    for _ in range(rounds):
        started = time.perf_counter()
        loop.round(table)
        table = policy.greedy()
        each.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"items": items, "peak_gib": round(peak, 2), "seconds": seconds | {"round": round(float(np.median(each)), 1)}}


def draw(items: int, rng: np.random.Generator) -> tuple[ItemStates, np.ndarray, list[np.ndarray]]:
    """States of items in clusters, item vectors (N, H), and histories of eight items of one cluster, one per two items."""
    cluster = rng.integers(0, items // 50, items)
    centres = rng.standard_normal((items // 50, HIDDEN), dtype=np.float32)
    vectors = centres[cluster] + rng.standard_normal((items, HIDDEN), dtype=np.float32)
    order, starts = np.argsort(cluster, kind="stable"), np.searchsorted(np.sort(cluster), np.arange(items // 50))
    sizes = np.diff(np.append(starts, items))
    of_user = rng.choice(np.flatnonzero(sizes >= 8), items // 2)
    histories = [order[starts[of] + rng.permutation(sizes[of])[:8]] for of in of_user]
    content = torch.from_numpy(vectors)[:, None].expand(-1, LEVELS, -1).contiguous()
    behaviour = rng.standard_normal((items, BEHAVIOUR + 1), dtype=np.float32)
    behaviour[:, -1] = 4
    return ItemStates(content, torch.from_numpy(behaviour)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), histories


def start_head(states: ItemStates) -> ResidualHead:
    """A head with the identity as projection, random items as code vectors and none in the behaviour coordinates."""
    size = HIDDEN + BEHAVIOUR + LEVELS
    head = ResidualHead(HIDDEN, LEVELS, CODES, size, BehaviourSettings(source="coengagement", dim=BEHAVIOUR))
    with torch.no_grad():
        head.projection.weight.zero_()
        head.projection.weight[:HIDDEN] = torch.eye(HIDDEN)
        head.vectors.zero_()
        for level in range(LEVELS):
            head.vectors[level, :, :HIDDEN] = states.content[level * CODES : (level + 1) * CODES, 0] / 2**level
        head.log_temperature.fill_(3.0)
    return head.eval()


if __name__ == "__main__":
    main()
