"""Stage `sid_reward` (`scripts/train_reward.py --part sid`): fits the reward model of refinement alone and reports its accuracy.

The model and its settings are those that the stage `refine` fits first; no codes are changed.
"""

from __future__ import annotations

from pathlib import Path

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import writing
from mmsid.catalog import read_catalog, split_histories
from mmsid.progress import done
from mmsid.refine.config import RefineConfig
from mmsid.refine.stage import Job


class SidRewardConfig(RefineConfig):
    """The keys of `refine`; those of the loop and the gate are ignored."""


def run(config: SidRewardConfig) -> Path:
    """Fit the reward into `config.out`: reward.safetensors and reward.json (shape, features, held-out report). -> the folder.

    A reward that is no better than the distances alone is written too; the manifest then has `usable: false` and the reason.

    Raises:
        CatalogError, ArtifactError: inputs are unreadable or do not belong together.
    """
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    with writing(config.out, stage="sid_reward", config=config, inputs=config.inputs()) as draft:
        accelerator.wait_for_everyone()
        job = Job(config, accelerator, catalog, split, draft, None)
        reward, report = job.learn_reward()
        if accelerator.is_main_process:
            reward.save(draft.path, report)
            draft.extra.update({"usable": report["usable"], "reason": report["reason"], "report": report})
        accelerator.wait_for_everyone()
    done(f"sid_reward: wrote {config.out} ({'usable' if report['usable'] else report['reason']})")
    return config.out
