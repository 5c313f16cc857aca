"""Stage `baselines`: what any tokenizer must beat, each arm a SID folder below `baselines/<arm>/`.

`random`: unique random codes. `rq_kmeans` and `balanced_rq`: greedy and Sinkhorn-balanced residual k-means on [MiniLM ; PPMI-SVD
of train co-engagement] (text only without sequences). `balanced_rq_text`: on MiniLM alone, which is all that a new item has, and all
that our tokenizer reads when it encodes. Same text, same sizes, same collision handling as ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mmsid.artifacts import writing
from mmsid.backbone.embed import embed_texts
from mmsid.catalog import Catalog, CatalogConfig, Split, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.errors import ConfigError
from mmsid.progress import done
from mmsid.quantize import CodebookScores, balanced_residual_kmeans, fuse, rq_kmeans
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.tokenizer.inputs import FieldName, load_inputs
from mmsid.tokenizer.publish import publish
from mmsid.tokenizer.targets import StartSettings, read_behaviour

Arm = Literal["random", "rq_kmeans", "balanced_rq", "balanced_rq_text"]


class BaselinesConfig(StageConfig):
    """Which arms, on which text; `start` names how behaviour enters, as for the tokenizer."""

    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    arms: tuple[Arm, ...] = ("random", "rq_kmeans", "balanced_rq_text", "balanced_rq")
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    max_length: int = Field(96, ge=1)
    start: StartSettings = StartSettings()
    collisions: Policy = "relocate"


def run(config: BaselinesConfig) -> Path:
    """Write one SID folder per arm below `config.out`, and `intrinsic.md` over all arms.

    Raises:
        ConfigError: fewer SIDs than items. ArtifactError, CatalogError: what is wrong with the folders or the catalogue.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    inputs = {
        "items": config.catalog.items,
        "sequences": config.catalog.sequences,
        "captions": config.captions,
        "interests": config.interests,
    }
    with writing(config.out, stage="baselines", config=config, inputs=inputs) as draft:
        figures: dict[str, Any] = {}
        text = _text(config, catalog) if set(config.arms) != {"random"} else None
        for arm in config.arms:
            figures[arm] = _arm(arm, _space(arm, text, config, catalog, split), config, catalog, split, draft.path / arm)
        (draft.path / "intrinsic.md").write_text(intrinsic_table(figures), encoding="utf-8")
        draft.counts.update({"items": len(catalog.items), "arms": len(config.arms)})
    done(f"baselines: wrote {', '.join(config.arms)} for {len(catalog.items):,} items to {config.out}")
    return config.out


def random_codes(content_hashes: list[str], num_levels: int, codebook_size: int, seed: int) -> np.ndarray:
    """Unique random codes (N, L) int64 per distinct content; exact duplicates share theirs.

    Raises:
        ConfigError: more distinct items than SIDs.
    """
    order = {content: place for place, content in enumerate(sorted(set(content_hashes)))}
    capacity = codebook_size**num_levels
    if len(order) > capacity:
        raise ConfigError(
            f"{len(order):,} distinct items, but {num_levels} levels of {codebook_size} codes name {capacity:,}; raise codebook_size"
        )
    rng = np.random.default_rng(seed)
    if capacity <= 10**7:
        chosen = rng.permutation(capacity)[: len(order)]
    else:  # rejection: a permutation of all SIDs would not fit in memory
        chosen = np.zeros(0, np.int64)
        while len(chosen) < len(order):
            drawn = np.concatenate([chosen, rng.integers(capacity, size=2 * len(order))])
            chosen = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        chosen = chosen[: len(order)]
    numbers = chosen[[order[content] for content in content_hashes]]
    return np.stack([numbers // codebook_size ** (num_levels - 1 - level) % codebook_size for level in range(num_levels)], 1)


def _text(config: BaselinesConfig, catalog: Catalog) -> np.ndarray:
    """MiniLM embeddings (N, 384) of what our tokenizer reads."""
    items, _ = load_inputs(catalog, config.captions, config.interests, config.use)
    return embed_texts([item.text for item in items], max_length=config.max_length, what="baseline texts")


def _space(arm: Arm, text: np.ndarray | None, config: BaselinesConfig, catalog: Catalog, split: Split | None) -> np.ndarray | None:
    """What the arm clusters; None for random codes."""
    if arm == "random" or text is None:
        return None
    if arm == "balanced_rq_text":
        return text
    return fuse(text, read_behaviour(catalog, split, config.start, config.seed).vectors, config.start.behaviour_weight)


def _arm(
    arm: Arm, space: np.ndarray | None, config: BaselinesConfig, catalog: Catalog, split: Split | None, folder: Path
) -> dict[str, Any]:
    sizes = (config.codebook_size,) * config.num_levels
    common: dict[str, Any] = {"tokenizer_sha256": f"baseline:{arm}", "seed": config.seed}
    if space is None:
        hashes = [item.content_sha256 for item in catalog.items]
        codes = random_codes(hashes, config.num_levels, config.codebook_size, config.seed)
        return publish(folder, catalog, split, codes, sizes, collisions="none", scores=None, **common)[1]
    if arm == "rq_kmeans":
        codebooks = rq_kmeans(space, config.num_levels, config.codebook_size, config.seed)
        codes = codebooks.encode(space)
    else:
        codebooks, codes = balanced_residual_kmeans(space, config.num_levels, config.codebook_size, config.seed)
    scores = CodebookScores(codebooks, space)
    _, metrics = publish(
        folder,
        catalog,
        split,
        codes.numpy(),
        sizes,
        collisions=config.collisions,
        scores=scores,
        margin=scores.margin(codes),
        embeddings=space,
        **common,
    )
    codebooks.save(folder / "codebooks.safetensors")
    return metrics
