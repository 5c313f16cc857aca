"""Stage `train_tokenizer`: from a catalogue and its annotations to a tokenizer folder.

Runs in one process or under `accelerate launch` (DDP; without GPUs `--multi_gpu --num_processes 2`, with gloo). The data order is a
function of (seed, step, rank) and a step draws nothing at random, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

from pathlib import Path

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import writing
from mmsid.catalog import read_catalog, split_histories
from mmsid.progress import done
from mmsid.tokenizer.capacity import check_capacity
from mmsid.tokenizer.train_config import TrainTokenizerConfig
from mmsid.tokenizer.training import OnStep, Training


def run(config: TrainTokenizerConfig, on_step: OnStep | None = None) -> Path:
    """Train a tokenizer and write it to `config.out`; an unfinished run of the same configuration is resumed.

    `on_step(step, losses)` is called after every optimiser step.

    Raises:
        ConfigError, CatalogError, ArtifactError: the settings, the catalogue or an earlier folder are unusable; there are fewer
            Semantic IDs than distinct items.
        MmsidError: the gradient is NaN or infinite.
    """
    accelerator = make_accelerator(config.precision, unused_parameters=True)
    catalog = read_catalog(config.catalog)
    check_capacity("train_tokenizer", catalog, config.num_levels, config.codebook_size)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    with writing(config.out, stage="train_tokenizer", config=config, inputs=config.inputs(), resume=True) as draft:
        accelerator.wait_for_everyone()  # rank 0 has opened the draft
        training = Training(config, accelerator, catalog, split, draft)
        training.loop(on_step)
        training.finish()
        accelerator.wait_for_everyone()
    done(
        f"train_tokenizer: wrote a tokenizer of {config.num_levels} x {config.codebook_size} codes, {config.steps} steps on "
        f"{len(catalog.items):,} items, to {config.out}"
    )
    return config.out
