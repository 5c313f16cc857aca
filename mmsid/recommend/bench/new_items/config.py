"""Configuration of the suite `new_items` of `mmsid bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from mmsid.config import Section
from mmsid.recommend.bench.config import refuse_bench_keys
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule

Protocol = Literal["hidden", "calendar"]
SidsName = Literal["ours", "balanced_rq_text", "random", "retrained"]
Method = Literal[
    "tfidf",
    "minilm_cosine",
    "emb_cosine",
    "item_knn",
    "classical_hybrid",
    "sid_transformer/ours",
    "sid_transformer/balanced_rq_text",
    "sid_transformer/random",
    "liger",
    "liger_weighted",
    "hybrid/ours",
    "hybrid/balanced_rq_text",
    "hybrid/random",
    "retrained_sid_transformer",
    "retrained_hybrid",
]
METHODS: tuple[Method, ...] = get_args(Method)
RETRAINED = ("retrained_sid_transformer", "retrained_hybrid")


class NewItemsSuite(Section):
    """Rules of the new-item benchmark.

    Attributes:
        protocols: `hidden` hides items with all their interactions while everything is fitted, and appends them afterwards. `calendar`
            fits everything on the interactions before a point in time; it needs timestamps.
        draws: number of draws of hidden items. The number of a draw is also the seed of its tokenizers and recommenders. The calendar
            has one draw.
        share: share of the items that a draw hides.
        fit_until: quantile of all timestamps at which the calendar's point in time lies.
        methods: methods that run (`mmsid.recommend.bench.new_items.methods`).
        tokenizer: overrides of the stage train_tokenizer.
        model, schedule: settings of all recommenders.
        jobs: parallel processes; default: number of cores.
        results: folder of new_items.json and new_items.md. Other data sets in these files are kept.
    """

    protocols: list[Protocol] = Field(min_length=1)
    draws: int = Field(default=3, ge=1)
    share: float = Field(default=0.1, gt=0, lt=1)
    fit_until: float = Field(default=0.8, gt=0, lt=1)
    methods: list[Method] = Field(default=list(METHODS), min_length=1)
    tokenizer: dict[str, Any] = Field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    jobs: int | None = Field(default=None, gt=0)
    results: Path = Path("benchmarks/results")

    @field_validator("tokenizer")
    @classmethod
    def _refuse_bench_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        return refuse_bench_keys(value, {"out", "seed", "catalog", "captions", "interests"})

    @model_validator(mode="after")
    def _valid_shape(self) -> NewItemsSuite:
        self.model.shape()
        return self
