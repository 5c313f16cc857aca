"""Cost of an optimiser step of refinement relative to a supervised step of the tokenizer on the same items.

    OMP_NUM_THREADS=1 python benchmarks/refine_step.py

Times three steps on the same batches of a small demo catalogue: `supervised` (losses of `train_tokenizer`), `refinement` with
`trainable: all` (log-probabilities of all paths, surrogate, exact KL), both including the backbone, and `refinement_heads` on cached states
(the default). Times are CPU seconds of the process; the result is the ratio of medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import Draft, write_json
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.catalog.demo import write_demo_catalog
from mmsid.refine import ppo
from mmsid.refine.loop import LoopConfig
from mmsid.refine.policy import HeadPolicy, Reference
from mmsid.tokenizer.train_config import TrainTokenizerConfig
from mmsid.tokenizer.training import Training


def main() -> None:
    """Time the three kinds of step, print the result and write `refine_step.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "refine_step.json")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = time_steps(Path(scratch), parsed.items, parsed.repeats)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    found = {
        "threads": 1,
        "batch": 32,
        "repeats": parsed.repeats,
        "cpu_seconds_per_step": {name: round(value, 4) for name, value in medians.items()},
        "refinement_over_supervised": round(medians["refinement"] / medians["supervised"], 3),
        "heads_over_supervised": round(medians["refinement_heads"] / medians["supervised"], 3),
    }
    print(found)
    write_json(parsed.out, found)


def time_steps(folder: Path, items: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each repetition per kind of step, without the first one (warm-up)."""
    write_demo_catalog(folder / "catalog", items=items, users=2 * items, seed=0)
    catalog_config = CatalogConfig(
        items=folder / "catalog" / "items.parquet",
        sequences=folder / "catalog" / "sequences.parquet",
        fields={"attributes": ["attributes"], "timestamps": "timestamps"},
    )
    config = TrainTokenizerConfig(
        out=folder / "tokenizer", catalog=catalog_config, use=("title", "categories", "attributes"), codebook_size=32,
        steps=repeats + 1, decoder_steps=20, checkpoint_every=1000, precision="fp32",
    )  # fmt: skip
    accelerator, catalog = make_accelerator("fp32"), read_catalog(catalog_config)
    (folder / "draft").mkdir()
    training = Training(config, accelerator, catalog, split_histories(catalog, catalog_config.split), Draft(folder / "draft"))
    ends = [time.process_time()]
    training.loop(lambda step, losses: ends.append(time.process_time()))
    seconds = {"supervised": list(np.diff(ends)[1:])}

    tokenizer = training.tokenizer.eval()
    read = lambda rows: tokenizer.hidden(tokenizer.collate([training.inputs[row] for row in rows], 16))[0].float()  # noqa: E731
    with torch.no_grad():
        states = torch.cat([read(range(start, min(start + 32, items))) for start in range(0, items, 32)])
    reference = Reference(tokenizer.head, states, top_m=8, temperature=None)
    weights = {
        "refinement": [weight for weight in tokenizer.parameters() if weight.requires_grad],
        "refinement_heads": list(tokenizer.head.parameters()),
    }
    states_of = {"refinement": lambda rows: read(rows.tolist()), "refinement_heads": lambda rows: states[rows]}
    for name, trained in weights.items():
        policy = HeadPolicy(tokenizer.head, states_of[name], trained, reference)
        optimizer = torch.optim.Adam(trained, lr=1e-6)
        batches = [torch.from_numpy(training.plan.batch(step, 0, 1).rows) for step in range(repeats + 1)]
        seconds[name] = [refinement_step(policy, optimizer, rows) for rows in batches][1:]
    return seconds


def refinement_step(policy: HeadPolicy, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    """One step of the loop on sampled paths with random advantages; -> CPU seconds."""
    config, reference = LoopConfig(), policy.reference
    tree = reference.tree(rows, None).take(torch.arange(len(rows)))
    old_all = tree.log_prob
    picks = ppo.sample_groups(old_all, config.group, torch.Generator().manual_seed(0))
    signal = ppo.leave_one_out(torch.randn(picks.shape, generator=torch.Generator().manual_seed(1)))
    started = time.process_time()
    new_all = policy.log_prob(rows, tree)
    gain = ppo.surrogate(new_all.gather(1, picks), old_all.gather(1, picks), signal, config.clip_low, config.clip_high).mean(1)
    loss = (config.kl * ppo.exact_kl(new_all, old_all) - gain).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters, config.grad_norm)
    optimizer.step()
    return time.process_time() - started


if __name__ == "__main__":
    main()
