"""Stage `baselines`: Semantic IDs of simple methods, which a tokenizer should outperform; one SID folder `baselines/<method>/` each.

`random`: unique random codes. `rq_kmeans` and `balanced_rq`: greedy and Sinkhorn-balanced residual k-means on [MiniLM ; PPMI-SVD of train
co-engagement] (text only without sequences). `balanced_rq_text`: the same on MiniLM alone, which is all that is known of a new item.
Text, sizes and collision handling are those of the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from mmsid.artifacts import on_main_process, read_json, write_text, writing
from mmsid.catalog import CatalogConfig, read_catalog, split_histories
from mmsid.config import StageConfig
from mmsid.progress import done
from mmsid.sids import intrinsic_table
from mmsid.sids.collisions import Policy
from mmsid.sids.crowding import warn_of_crowding
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.retrieval import retrieval_table
from mmsid.tokenizer.capacity import check_capacity
from mmsid.tokenizer.initialization import StartSettings
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.sid_methods import Method, MethodSources, MethodSpec, make_sids

Baseline = Literal["random", "rq_kmeans", "balanced_rq_text", "balanced_rq"]
_METHODS: dict[Baseline, tuple[Method, str]] = {
    "random": ("random", "text"),
    "rq_kmeans": ("rq_kmeans", "fused"),
    "balanced_rq_text": ("balanced_rq", "text"),
    "balanced_rq": ("balanced_rq", "fused"),
}


class BaselinesConfig(StageConfig):
    """Configuration of `baselines`.

    Attributes:
        catalog: the items, and the logs that co-engagement is read from.
        captions, interests, use, max_length: the text that MiniLM embeds, as for the tokenizer.
        methods: the methods to run.
        num_levels: L, codes per item.
        codebook_size: K, codes per level.
        start: behaviour vectors and their weight, as for the tokenizer.
        collisions: policy for items with equal raw codes.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"arms": "methods"}

    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    methods: tuple[Baseline, ...] = ("random", "rq_kmeans", "balanced_rq_text", "balanced_rq")
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    max_length: int = Field(96, ge=1)
    start: StartSettings = StartSettings()
    collisions: Policy = "relocate"

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue and the annotations."""
        return {**self.catalog.inputs(), "captions": self.captions, "interests": self.interests}

    def spec(self, name: Baseline) -> MethodSpec:
        """Settings of one method."""
        method, space = _METHODS[name]
        return MethodSpec.model_validate(
            {
                "method": method,
                "space": space,
                "collisions": self.collisions,
                "num_levels": self.num_levels,
                "codebook_size": self.codebook_size,
                "behaviour_weight": self.start.behaviour_weight or 1.0,
            }
        )


@on_main_process
def run(config: BaselinesConfig) -> Path:
    """Write one SID folder per method below `config.out`, and the tables of all methods to `intrinsic.md`.

    Raises:
        ConfigError: there are fewer SIDs than items.
        ArtifactError, CatalogError: a folder or the catalogue is unusable.
    """
    catalog = read_catalog(config.catalog)
    if config.collisions == "relocate" or "random" in config.methods:
        check_capacity("baselines", catalog, config.num_levels, config.codebook_size)
    split = split_histories(catalog, config.catalog.split) if catalog.histories else None
    sources = MethodSources(catalog, split, config.captions, config.interests, config.use, config.max_length, config.start)
    with writing(config.out, stage="baselines", config=config, inputs=config.inputs()) as draft:
        metrics: dict[str, Any] = {}
        for name in config.methods:
            make_sids(config.spec(name), sources, draft.path / name, config.seed)
            metrics[name] = read_json(draft.path / name / INTRINSIC)
        tables = intrinsic_table(metrics) + "\n" + retrieval_table(metrics)
        write_text(draft.path / "intrinsic.md", tables + warn_of_crowding("baselines", metrics))
        draft.counts.update({"items": len(catalog.items), "methods": len(config.methods)})
    done(f"baselines: wrote {', '.join(config.methods)} for {len(catalog.items):,} items to {config.out}")
    return config.out
