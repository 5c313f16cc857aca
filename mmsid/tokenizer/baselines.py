"""Stage `baselines`: what any tokenizer must beat, each arm a SID folder below `baselines/<arm>/`.

`random`: unique random codes. `rq_kmeans` and `balanced_rq`: greedy and Sinkhorn-balanced residual k-means on [MiniLM ; PPMI-SVD
of train co-engagement] (text only without sequences). `balanced_rq_text`: on MiniLM alone, which is all that a new item has, and all
that our tokenizer reads when it encodes. Same text, same sizes, same collision handling as ours. Other arms are named in `specs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from mmsid.artifacts import read_json, writing
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.progress import done
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.retrieval import retrieval_table
from mmsid.tokenizer.initialization import StartSettings
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.sid_methods import Method, MethodSources, MethodSpec, make_sids

_USUAL: dict[str, tuple[Method, str]] = {
    "random": ("random", "text"),
    "rq_kmeans": ("rq_kmeans", "fused"),
    "balanced_rq": ("balanced_rq", "fused"),
    "balanced_rq_text": ("balanced_rq", "text"),
}


class BaselinesConfig(StageConfig):
    """Which arms, on which text; `start` names how behaviour enters, as for the tokenizer.

    `arms` names the usual four (made with this section's sizes, weight and collision policy) or arms that `specs` defines.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"arms": "methods"}

    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    methods: tuple[str, ...] = ("random", "rq_kmeans", "balanced_rq_text", "balanced_rq")
    specs: dict[str, MethodSpec] = Field(default_factory=dict)
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    max_length: int = Field(96, ge=1)
    start: StartSettings = StartSettings()
    collisions: Policy = "relocate"

    @model_validator(mode="after")
    def _methods_are_known(self) -> BaselinesConfig:
        for arm in self.methods:
            if arm not in self.specs and arm not in _USUAL:
                raise ValueError(f"arm {arm!r} is unknown; choose from {', '.join(_USUAL)}, or define it under `specs`")
        return self

    def spec(self, arm: str) -> MethodSpec:
        """How an arm is made."""
        if arm in self.specs:
            return self.specs[arm]
        method, space = _USUAL[arm]
        return MethodSpec.model_validate(
            {
                "method": method,
                "space": space,
                "collisions": self.collisions,
                "num_levels": self.num_levels,
                "codebook_size": self.codebook_size,
                "behaviour_weight": self.start.behaviour_weight,
            }
        )


def run(config: BaselinesConfig) -> Path:
    """Write one SID folder per arm below `config.out`, and `intrinsic.md` over all arms.

    Raises:
        ConfigError: fewer SIDs than items. ArtifactError, CatalogError: what is wrong with the folders or the catalogue.
    """
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    sources = MethodSources(catalog, split, config.captions, config.interests, config.use, config.max_length, config.start)
    inputs = {
        "items": config.catalog.items,
        "sequences": config.catalog.sequences,
        "captions": config.captions,
        "interests": config.interests,
    }
    with writing(config.out, stage="baselines", config=config, inputs=inputs) as draft:
        figures: dict[str, Any] = {}
        for arm in config.methods:
            make_sids(config.spec(arm), sources, draft.path / arm, config.seed)
            figures[arm] = read_json(draft.path / arm / INTRINSIC)
        (draft.path / "intrinsic.md").write_text(intrinsic_table(figures) + "\n" + retrieval_table(figures), encoding="utf-8")
        draft.counts.update({"items": len(catalog.items), "arms": len(config.methods)})
    done(f"baselines: wrote {', '.join(config.methods)} for {len(catalog.items):,} items to {config.out}")
    return config.out
