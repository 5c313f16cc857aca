"""Configuration of `mmsid bench`: a data set and a suite of arms, each one YAML file below `configs/bench/` or at any path.

A suite lists arms and selection rules, but no data. A data set gives the catalogue and its properties (suitable sizes, published SIDs,
arms that it does not support). So every suite runs on every catalogue under the same rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmsid.catalog import CatalogConfig
from mmsid.config import Section
from mmsid.recommend.classical import CLASSICAL_NAMES
from mmsid.recommend.sasrec import SasrecShape
from mmsid.recommend.train import Architecture, ModelConfig
from mmsid.recommend.training import Schedule
from mmsid.sids.collisions import Policy
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.sid_methods import MethodSpec

KINDS = ("sids", "published", "tokenizer", "refine", "classical", "sasrec", "fusion")


class PublishedConfig(Section):
    """Published SIDs of other projects.

    Attributes:
        sids: parquet file with `item_id` and one column of SID strings per set, or the `index.json` of other projects.
    """

    sids: Path


class DatasetConfig(Section):
    """One data set.

    Attributes:
        name: name of the results file.
        catalog: keys of the section `catalog`.
        captions, interests: finished annotation folders, if there are any.
        use: the fields that tokenizers and baselines read.
        num_levels, codebook_size: defaults of all arms.
        published: SID sets published by others for this catalogue.
        best_achievable: best_achievable.json of the demo catalogue; adds the row of the best achievable figures.
        left_out: arm of a suite -> reason why this data set does not support it; listed in the results as not run.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"truth": "best_achievable"}

    name: str = Field(pattern=r"^[\w-]+$")
    catalog: CatalogConfig
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    num_levels: int = Field(default=3, ge=1, le=8)
    codebook_size: int = Field(default=256, ge=2)
    published: PublishedConfig | None = None
    best_achievable: Path | None = None
    left_out: dict[str, str] = Field(default_factory=dict)


def refuse_bench_keys(settings: dict[str, Any], bench_keys: set[str]) -> dict[str, Any]:
    """Return `settings`. Raises ValueError if they contain a key that the bench sets."""
    if found := sorted(bench_keys & set(settings)):
        raise ValueError(f"{found[0]} is set by the bench; remove it")
    return settings


class RefineArm(Section):
    """Codes of a tokenizer arm after refinement without its gate.

    Attributes:
        of: the tokenizer arm that is refined.
        control: name of the function that moves the codes (`refine` of `mmsid.recommend.bench.run.run`). `mmsid bench` knows `ppo`,
            refinement itself; control variants run with `python benchmarks/refinement.py`.
        settings: overrides of the stage refine.
    """

    of: str
    control: str = "ppo"
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _refuse_bench_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        return refuse_bench_keys(value, {"out", "seed", "catalog", "captions", "interests", "tokenizer", "sids"})


class ArmConfig(Section):
    """One entry of a suite. Exactly one of `sids`, `published`, `tokenizer`, `refine`, `classical`, `sasrec` and `fusion` is set.

    Attributes:
        sids: SID method of a baseline; sizes default to those of the data set.
        published: one arm per published SID set of the data set, named `<arm>_<column>`.
        tokenizer: item tokenizer, trained for every seed; overrides of the stage train_tokenizer.
        collisions: collision policy of `tokenizer`; a baseline sets it in `sids`.
        refine: codes of a tokenizer arm after refinement without its gate.
        classical: popularity, item-kNN, TF-IDF kNN and their hybrid; deterministic, run once.
        sasrec: SASRec on item ids, without SIDs; trials and seeds as for SID arms.
        fusion: name of a SID arm whose item scores are fused with those of the classical hybrid; it uses the trial and seeds of that arm.
        recommender: architecture of the recommender. The SID transformer compares tokenizers, flat and tiger are cross-checks, and
            hybrid ranks the candidates of the SID transformer together with retrieval evidence.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"floors": "classical"}
    renamed_values: ClassVar[dict[str, dict[str, str]]] = {"recommender": {"grounded": "hybrid"}}

    sids: MethodSpec | None = None
    published: Literal["all"] | None = None
    tokenizer: dict[str, Any] | None = None
    collisions: Policy = "relocate"
    refine: RefineArm | None = None
    classical: Literal[True] | None = None
    sasrec: Literal[True] | None = None
    fusion: str | None = None
    recommender: Architecture = "sid_transformer"

    @property
    def kind(self) -> str:
        """Name of the kind that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def shape(self, model: ModelConfig) -> Any:
        """Sizes of the recommender of this arm; unset sizes have the default of the architecture.

        Raises:
            ConfigError: d_model is no multiple of heads.
        """
        if self.kind == "sasrec":
            settings = model.model_dump(exclude_none=True)
            return SasrecShape(**{name: value for name, value in settings.items() if name in SasrecShape.__dataclass_fields__})
        return model.shape(self.recommender)

    @field_validator("tokenizer")
    @classmethod
    def _refuse_bench_keys(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else refuse_bench_keys(value, {"out", "seed", "catalog", "captions", "interests"})

    @model_validator(mode="after")
    def _exactly_one(self) -> ArmConfig:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if self.tokenizer is None and "collisions" in self.model_fields_set:
            raise ValueError("collisions is set without `tokenizer`; for a baseline, set it inside `sids`")
        if len(kinds) != 1:
            raise ValueError(f"an arm is exactly one of {', '.join(KINDS)}; this one has {', '.join(kinds) or 'none'}")
        return self


class TrialConfig(Section):
    """One point of the tuning grid.

    Attributes:
        model, schedule: overrides of the keys of the same name of the suite.
    """

    model: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)


class SuiteConfig(Section):
    """Arms and selection rules.

    Attributes:
        arms: name -> method of the comparison.
        seeds: the first seed is used for screening and tuning, all seeds for the selected arms. A seed applies to tokenizer and
            recommender.
        claims: arms of which a claim is made; they always get all seeds.
        baselines: arms that all others are compared with; they always get all seeds.
        within: arms with a best valid NDCG@10 within this share of the best of their family get all seeds.
        model, schedule: settings of all recommenders.
        trials: tuning grid of every trained arm. All trials run at the first seed, the best on valid at the other seeds.
        jobs: parallel processes; default: number of cores.
        budget_minutes: wall time of one call; jobs that would exceed it are not started and are listed as not run.
        results: folder of the result tables.
    """

    arms: dict[str, ArmConfig] = Field(min_length=1)
    seeds: list[int] = Field(default=[0, 1, 2, 3, 4], min_length=1)
    claims: list[str] = Field(default_factory=list)
    baselines: list[str] = Field(default_factory=list)
    within: float = Field(default=0.05, ge=0, lt=1)
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    trials: list[TrialConfig] = Field(default=[TrialConfig()], min_length=1)
    jobs: int | None = Field(default=None, gt=0)
    budget_minutes: float = Field(gt=0)
    results: Path = Path("benchmarks/results")

    @model_validator(mode="after")
    def _consistent(self) -> SuiteConfig:
        for arm in self.arms:
            if not arm or arm != Path(arm).name or arm.startswith(".") or arm in CLASSICAL_NAMES:
                raise ValueError(
                    f"arms: {arm!r} must be a folder name and must not be one of the names of the classical baselines; rename it"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} contains a seed twice; list each seed once")
        groups = tuple(f"{name}_" for name, arm in self.arms.items() if arm.kind == "published")
        classical = any(arm.classical for arm in self.arms.values())
        known = [*self.arms, *(CLASSICAL_NAMES if classical else ())]
        for name in (*self.claims, *self.baselines):
            if name not in known and not name.startswith(groups):
                raise ValueError(f"{name!r} in claims or baselines is not an arm; the arms are {', '.join(known)}")
        sid_arms = [name for name, arm in self.arms.items() if arm.kind in ("sids", "tokenizer", "refine") and arm.recommender != "hybrid"]
        for name, arm in self.arms.items():
            if arm.refine is not None and (arm.refine.of not in self.arms or self.arms[arm.refine.of].kind != "tokenizer"):
                raise ValueError(f"arms: {name!r} refines {arm.refine.of!r}, which must be a tokenizer arm of this suite")
            if arm.fusion is not None and not (classical and (arm.fusion in sid_arms or arm.fusion.startswith(groups))):
                raise ValueError(
                    f"arms: {name!r} fuses {arm.fusion!r}, which must be a SID arm and not a hybrid; `classical` must be an arm as well"
                )
        for trial in range(len(self.trials)):
            model, _ = self.settings(trial)
            for arm in self.arms.values():
                arm.shape(model)
        return self

    def settings(self, trial: int) -> tuple[ModelConfig, Schedule]:
        """Model and schedule of one trial.

        Raises:
            ValueError: an unknown key or an invalid value (pydantic).
        """
        point = self.trials[trial]
        model = ModelConfig.model_validate(self.model.model_dump() | point.model)
        return model, Schedule.model_validate(self.schedule.model_dump() | point.schedule)
