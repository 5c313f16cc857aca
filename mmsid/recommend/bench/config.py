"""What a bench is told: a data set and a suite of arms, each one YAML, shipped below `configs/bench/` or the reader's own.

A suite names arms and rules and no data; a data set names its catalogue and what is true of it (sizes that fit it, published SIDs,
arms that cannot be made of it). So one suite runs on every catalogue, and the same rules judge all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from mmsid.catalog import CatalogConfig
from mmsid.config import Section, build, load_yaml
from mmsid.errors import ConfigError
from mmsid.recommend.classical import CLASSICAL_NAMES
from mmsid.recommend.sasrec import SasrecShape
from mmsid.recommend.train import Architecture, ModelConfig
from mmsid.recommend.training import Schedule
from mmsid.sids.collisions import Policy
from mmsid.tokenizer.inputs import FieldName
from mmsid.tokenizer.sid_methods import MethodSpec

SectionT = TypeVar("SectionT", bound=Section)
KINDS = ("sids", "published", "tokenizer", "refine", "classical", "sasrec", "fusion")


class PublishedConfig(Section):
    """A reference_sids.parquet: `columns` names the sets to take, None all of them."""

    sids: Path
    columns: tuple[str, ...] | None = None


class DatasetConfig(Section):
    """One data set.

    Attributes:
        name: of the results file.
        captions, interests: finished annotation folders, where there are any; `use`: the fields that tokenizers and baselines read.
        num_levels, codebook_size: of every arm that does not name its own.
        published: SID sets that others made for this catalogue.
        truth: best_achievable.json of the demo catalogue; adds the row of the best achievable figures.
        left_out: arm of a suite -> why it cannot be made of this data; listed with the results as not run.
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


def _not_taken(settings: dict[str, Any], by_bench: set[str]) -> dict[str, Any]:
    taken = sorted(by_bench & set(settings))
    if taken:
        raise ValueError(f"{taken[0]} is given by the bench; take it out")
    return settings


class RefineArm(Section):
    """The codes of a tokenizer arm after refinement, or after a control of it (`mmsid.refine.controls`).

    Attributes:
        of: the tokenizer arm that is the start.
        settings: overrides of the stage refine.
    """

    of: str
    control: Literal["ppo", "per_item", "best_of_n", "shuffled", "random", "gumbel"] = "ppo"
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _filled_in_by_the_bench(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _not_taken(value, {"out", "seed", "catalog", "captions", "interests", "tokenizer", "sids"})


class ArmConfig(Section):
    """One entry of a suite: exactly one of the following.

    Attributes:
        sids: how a baseline makes its SIDs; sizes default to the data set's.
        published: one arm per published SID set of the data set, named `<arm>_<column>`.
        tokenizer: our tokenizer, trained and assigned anew for every seed; overrides of the stage train_tokenizer.
        collisions: how our tokenizer's collisions are handled (of a baseline it stands in `sids`).
        refine: a tokenizer arm's codes moved by refinement or by one of its controls, published whatever the gate says.
        classical: popularity, item-kNN, TF-IDF kNN and their hybrid: deterministic, run once.
        sasrec: a recommender of item ids, without SIDs; trials and seeds as for the SID arms.
        fusion: name of a SID arm, whose item scores are fused with the hybrid baseline's; its trial and seeds are that arm's.
        recommender: the architecture that ranks by these SIDs. The instrument compares tokenizers; flat and tiger are cross-checks;
            grounded ranks the instrument's answer with retrieval evidence, and shows what SIDs are worth beside it.
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
    recommender: Architecture | Literal["hybrid"] = "sid_transformer"

    @property
    def kind(self) -> str:
        """The one that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def shape(self, model: ModelConfig) -> Any:
        """The sizes of the arm's recommender, each by default its own.

        Raises:
            ConfigError: d_model is no multiple of heads.
        """
        if self.kind == "sasrec":
            given = model.model_dump(exclude_none=True)
            return SasrecShape(**{name: value for name, value in given.items() if name in SasrecShape.__dataclass_fields__})
        return model.shape("sid_transformer" if self.recommender == "hybrid" else self.recommender)

    @field_validator("tokenizer")
    @classmethod
    def _filled_in_by_the_bench(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else _not_taken(value, {"out", "seed", "catalog", "captions", "interests"})

    @model_validator(mode="after")
    def _exactly_one(self) -> ArmConfig:
        named = [name for name in KINDS if getattr(self, name) is not None]
        if self.tokenizer is None and "collisions" in self.model_fields_set:
            raise ValueError("collisions stands beside `tokenizer` only; of a baseline it is a key of `sids`")
        if len(named) != 1:
            raise ValueError(f"an arm is exactly one of {', '.join(KINDS)}; this one names {', '.join(named) or 'none'}")
        return self


class TrialConfig(Section):
    """One point of the tuning grid: what differs from the suite's `model` and `schedule`."""

    model: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)


class SuiteConfig(Section):
    """Arms and the rules that judge them.

    Attributes:
        seeds: the first screens and tunes; all of them train the arms that get so far. Seed s seeds tokenizer and recommender alike.
        claims: arms that get all seeds in any case: those that a claim names.
        baselines: arms that every other is compared with; they get all seeds too.
        within: arms whose best valid NDCG@10 lies within this share of the best of their family get all seeds.
        trials: the tuning grid, the same for every trained arm: all points at the first seed, the best on valid for the others.
        jobs: parallel processes; default: the machine's cores.
        budget_minutes: wall time of one call; jobs that would not fit are not started, and listed.
        results: folder of the tables.
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
                raise ValueError(f"arms: {arm!r} must be a folder name and none of the names of the classical baselines; rename it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} names a seed twice; each seed is one run")
        groups = tuple(f"{name}_" for name, arm in self.arms.items() if arm.kind == "published")
        classical = any(arm.classical for arm in self.arms.values())
        known = [*self.arms, *(CLASSICAL_NAMES if classical else ())]
        for name in (*self.claims, *self.baselines):
            if name not in known and not name.startswith(groups):
                raise ValueError(f"{name!r} in claims or baselines is no arm; the arms are {', '.join(known)}")
        sid_arms = [name for name, arm in self.arms.items() if arm.kind in ("sids", "tokenizer", "refine")]
        for name, arm in self.arms.items():
            if arm.refine is not None and (arm.refine.of not in self.arms or self.arms[arm.refine.of].kind != "tokenizer"):
                raise ValueError(f"arms: {name!r} refines {arm.refine.of!r}, which must be a tokenizer arm of this suite")
            if arm.fusion is not None and not (classical and (arm.fusion in sid_arms or arm.fusion.startswith(groups))):
                raise ValueError(
                    f"arms: {name!r} fuses {arm.fusion!r}, which must be a SID arm, with the classical, which must be there too"
                )
        for place in range(len(self.trials)):
            model, _ = self.settings(place)
            for arm in self.arms.values():
                arm.shape(model)
        return self

    def settings(self, trial: int) -> tuple[ModelConfig, Schedule]:
        """Model and schedule of one trial.

        Raises:
            ValueError (pydantic's): a key or value that they do not know.
        """
        point = self.trials[trial]
        model = ModelConfig.model_validate(self.model.model_dump() | point.model)
        return model, Schedule.model_validate(self.schedule.model_dump() | point.schedule)


def load_dataset(name: str, overrides: Sequence[str] = ()) -> DatasetConfig:
    """A shipped data set by name, or any YAML by path; its name defaults to the file's.

    Raises:
        ConfigError: no such file, or a wrong key.
    """
    path = _find(name, "datasets")
    return _load(DatasetConfig, path, overrides, {"name": path.stem})


def load_suite(name: str, overrides: Sequence[str] = ()) -> SuiteConfig:
    """A shipped suite by name, or any YAML by path.

    Raises:
        ConfigError: no such file, or a wrong key.
    """
    return _load(SuiteConfig, _find(name, "suites"), overrides, {})


def _load(cls: type[SectionT], path: Path, overrides: Sequence[str], defaults: dict[str, Any]) -> SectionT:
    return build(cls, defaults | load_yaml(path, overrides), source=str(path), section="")


def _find(name: str, kind: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    folder = _shipped() / kind
    if not (folder / f"{name}.yaml").is_file():
        shipped = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise ConfigError(f"bench: {name!r} is none of the shipped {kind} ({shipped}); name one of them or the path of a YAML file")
    return folder / f"{name}.yaml"


def _shipped() -> Path:
    """`configs/bench`, inside the installed package or at the top of a checkout."""
    package = Path(__file__).resolve().parents[2]
    return next((folder / "configs" / "bench" for folder in (package, package.parent) if (folder / "configs" / "bench").is_dir()), package)
