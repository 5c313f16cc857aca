"""Refinement without acceptance gate, for `mmsid bench`: it compares what refinement does, not what the gate keeps.

`benchmarks/refinement_controls.py` writes other ways to move codes with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import write_json, writing
from mmsid.catalog import read_catalog, split_histories
from mmsid.config import build
from mmsid.errors import MmsidError
from mmsid.refine.config import RefineConfig
from mmsid.refine.evidence import Codes
from mmsid.refine.loop import Policy, Refinement, Scorer
from mmsid.refine.outputs import write_sids
from mmsid.refine.publish import make_table
from mmsid.refine.stage import Job
from mmsid.refine.tracking import RunLog


def refine_ungated(settings: dict[str, Any]) -> Path:
    """Refine with the keys of the stage `refine` and write the SIDs whatever the gate would decide. -> the SID folder.

    Raises:
        ConfigError: an unknown key of the stage.
        MmsidError: the reward is not usable on this catalogue; and what the stage raises.
    """
    return write_moved_sids(settings, lambda job: run_loop(job, usable_scorer(job)))


def write_moved_sids(settings: dict[str, Any], move: Callable[[Job], Codes]) -> Path:
    """Move the codes of a tokenizer by `move` and write a SID folder to `settings["out"]`. -> the folder.

    Args:
        settings: keys of the stage `refine`.
        move: the loaded job -> raw codes (N, L).
    """
    config = build(RefineConfig, settings, source="suite", section="refine")
    accelerator, catalog = make_accelerator(), read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    inputs = {"tokenizer": config.tokenizer, "sids": config.sids} | config.catalog.item_files()
    with writing(config.out, stage="refine_ungated", config=config, inputs=inputs) as draft:
        job = Job(config, accelerator, catalog, split, draft, None)
        codes = move(job)
        table = make_table(job.tokenizer, job.reference.states, job.inputs, catalog, config.collisions, codes)
        table = replace(table, tokenizer_sha256=job.start_sha256)  # no other tokenizer is kept
        write_sids(draft.path, table, job.embedding, catalog, job.held_out, config.seed)
        changed = codes != job.reference.greedy
        draft.counts["moved"] = int(changed.any(axis=1).sum())
        write_json(draft.path / "moved.json", {"items": draft.counts["moved"], "per_level": changed.mean(0).tolist()})
    return config.out


def usable_scorer(job: Job) -> Scorer:
    """Scorer of the job with a newly fitted reward. Raises MmsidError if the reward is not usable."""
    reward, report = job.learn_reward()
    if not report["usable"]:
        raise MmsidError(f"refinement has no usable reward on this catalogue: {report['reason']}")
    return job.scorer(reward)


def run_loop(job: Job, scorer: Scorer, policy: Policy | None = None, kind: type[Refinement] = Refinement) -> Codes:
    """Run the loop, by default on the tokenizer's own policy. -> greedy codes (N, L) at the end."""
    loop = job.loop(policy or job.policy(), scorer, kind)
    return loop.run(RunLog(job.accelerator, job.draft.path, None, {}))
