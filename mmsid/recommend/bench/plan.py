"""Which jobs a bench consists of, and what each is made from.

A job's folder is named by the hash of what made it, so that a finished one is found again, and a changed catalogue, method, schedule
or package version is another job.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mmsid
from mmsid.artifacts import file_sha256, input_hashes, plain, read_table, sha256
from mmsid.config import build
from mmsid.recommend.bench.config import ArmConfig, DatasetConfig, RefineArm, SuiteConfig
from mmsid.recommend.train import ModelConfig
from mmsid.recommend.training import Schedule
from mmsid.tokenizer.sid_methods import MethodSpec
from mmsid.tokenizer.train_config import TrainTokenizerConfig

_PATHS = ("out", "seed", "catalog", "captions", "interests")


@dataclass(frozen=True)
class Arm:
    """One row of the table to be: what the suite says under `entry`; of the published sets, one `column`."""

    entry: str
    config: ArmConfig
    column: str | None = None

    @property
    def name(self) -> str:
        """As the table names it."""
        return self.entry if self.column is None else f"{self.entry}_{self.column}"

    @property
    def family(self) -> str:
        """Arms of one family are screened against one another."""
        if self.config.recommender == "hybrid":
            return "fusion"
        return {"sasrec": "classical", "fusion": "fusion"}.get(self.config.kind, "sid")

    @property
    def sids_seeded(self) -> bool:
        """Whether the SIDs themselves vary with the seed; published ones are what they are."""
        return self.column is None


@dataclass(frozen=True)
class BenchJob:
    """One unit of work, and the folder that it writes.

    `sids` makes an arm's Semantic IDs after `spec` (None: a published set), from those in `sids` where it refines them; `fit`
    trains and ranks a recommender on `sids` with one trial's model and schedule, and beside it its `fusion` with the hybrid of `classical`;
    `classical` ranks the classical ones. `made_from` is what the folder's name is the hash of, and what its manifest keeps.
    """

    kind: Literal["sids", "fit", "classical"]
    arm: Arm
    folder: Path
    made_from: dict[str, Any]
    seed: int
    spec: MethodSpec | TrainTokenizerConfig | RefineArm | None = None
    sids: Path | None = None
    classical: Path | None = None
    fusion: str | None = None
    trial: int | None = None
    model: ModelConfig | None = None
    schedule: Schedule | None = None

    @property
    def key(self) -> Path:
        """The folder: two jobs that write the same are the same job."""
        return self.folder

    @property
    def needs(self) -> tuple[Path, ...]:
        """Folders that must be there before."""
        return tuple(path for path in (self.sids, self.classical) if path is not None)


@dataclass(frozen=True)
class Plan:
    """All jobs of one suite on one data set. `catalog_sha256`: of the catalogue as read; `work`: where jobs write."""

    dataset: DatasetConfig
    suite: SuiteConfig
    catalog_sha256: str
    work: Path

    def arms(self) -> list[Arm]:
        """Trained arms, in the suite's order; published sets one by one. Those that the data set leaves out are not among them."""
        found = []
        for name, config in self.suite.arms.items():
            if config.kind == "published":
                found += [Arm(name, config, column) for column in self._columns()]
            elif config.kind not in ("classical", "fusion"):
                found.append(Arm(name, config))
        return [arm for arm in found if arm.name not in self.dataset.left_out]

    def left_out(self) -> dict[str, str]:
        """Arms of the suite that cannot be made of this data -> why."""
        found = {name: why for name, why in self.dataset.left_out.items() if name in self.suite.arms}
        if self.dataset.published is None:
            found |= {name: "the data set has no published SIDs" for name, arm in self.suite.arms.items() if arm.kind == "published"}
        return found

    def classical(self) -> BenchJob | None:
        """The job of the classical classical, if the suite has them."""
        named = [name for name, arm in self.suite.arms.items() if arm.kind == "classical"]
        if not named:
            return None
        arm = Arm(named[0], self.suite.arms[named[0]])
        return self._job("classical", arm, self._data(), self.suite.seeds[0])

    def sid_jobs(self, arm: Arm, seed: int) -> list[BenchJob]:
        """The jobs that make an arm's SIDs, in order: what is refined, then the refined."""
        start = [self.sids(Arm(arm.config.refine.of, self.suite.arms[arm.config.refine.of]), seed)] if arm.config.refine else []
        return [*start, self.sids(arm, seed)]

    def sids(self, arm: Arm, seed: int) -> BenchJob:
        """The job that makes an arm's SIDs."""
        if arm.config.refine is not None:
            start = self.sids(Arm(arm.config.refine.of, self.suite.arms[arm.config.refine.of]), seed)
            made_from = {"start": start.made_from, "refine": plain(arm.config.refine), "seed": seed}
            return self._job("sids", arm, made_from, seed, spec=arm.config.refine, sids=start.folder)
        spec = self.spec(arm)
        # paths are no part of what SIDs are made from; what lies there enters by its hash
        made_from: dict[str, Any] = self._data() | {"arm": None if spec is None else _without(plain(spec), _PATHS)}
        if arm.column is not None:
            made_from |= {"published": file_sha256(self.dataset.published.sids), "column": arm.column}
        else:
            folders = {"captions": self.dataset.captions, "interests": self.dataset.interests}
            made_from |= {"use": self.dataset.use, "annotations": input_hashes(folders), "seed": seed}
        if arm.config.tokenizer is not None and arm.config.collisions != "relocate":
            made_from["collisions"] = arm.config.collisions
        return self._job("sids", arm, made_from, seed, spec=spec)

    def fit(self, arm: Arm, trial: int, seed: int) -> BenchJob:
        """The job that trains and ranks a recommender: on an arm's SIDs, or SASRec on item ids."""
        model, schedule = self.suite.settings(trial)
        settings = {"model": plain(model), "schedule": plain(schedule), "seed": seed}
        of_trial: dict[str, Any] = {"trial": trial, "model": model, "schedule": schedule}
        if arm.config.kind == "sasrec":
            return self._job("fit", arm, self._data() | {"recommender": "sasrec"} | settings, seed, **of_trial)
        sids, classical, fusion = self.sids(arm, seed), self.classical(), self.fusion(arm)
        made_from = {"sids": sids.made_from, "recommender": arm.config.recommender} | settings
        if fusion is not None:
            made_from["fused_with"] = classical.made_from
            of_trial |= {"fusion": fusion.name, "classical": classical.folder}
        return self._job("fit", arm, made_from, seed, sids=sids.folder, **of_trial)

    def rows(self, arm: Arm) -> list[Arm]:
        """The rows of the table that come from an arm's fits: the arm, and its fusion if the suite has one."""
        fusion = self.fusion(arm)
        return [arm] if fusion is None else [arm, fusion]

    def fusion(self, arm: Arm) -> Arm | None:
        """The arm that fuses this one with the hybrid baseline, if the suite has one."""
        return next((Arm(name, config) for name, config in self.suite.arms.items() if config.fusion == arm.name), None)

    def spec(self, arm: Arm) -> MethodSpec | TrainTokenizerConfig | None:
        """How the arm's SIDs are made, sizes filled in from the data set; None for a published set.

        Raises:
            ConfigError: an override of the tokenizer that its stage does not know.
        """
        sizes = {"num_levels": self.dataset.num_levels, "codebook_size": self.dataset.codebook_size}
        if arm.config.sids is not None:
            given = arm.config.sids
            return given.model_copy(update={name: size for name, size in sizes.items() if name not in given.model_fields_set})
        if arm.config.tokenizer is None:
            return None
        filled = {
            "out": self.work,  # the job names its own
            "catalog": self.dataset.catalog,
            "captions": self.dataset.captions,
            "interests": self.dataset.interests,
            "use": self.dataset.use,
        }
        return build(TrainTokenizerConfig, filled | sizes | arm.config.tokenizer, source="suite", section=f"arms.{arm.name}.tokenizer")

    def _columns(self) -> tuple[str, ...]:
        published = self.dataset.published
        if published is None:
            return ()
        if published.columns is not None:
            return published.columns
        return tuple(name for name in read_table(published.sids).column_names if name != "item_id")

    def _data(self) -> dict[str, Any]:
        return {"catalog": self.catalog_sha256, "split": plain(self.dataset.catalog.split), "version": mmsid.__version__}

    def _job(self, kind: str, arm: Arm, made_from: dict[str, Any], seed: int, **rest: Any) -> BenchJob:
        seeded = kind == "fit" or (kind == "sids" and arm.sids_seeded)
        label = f"{kind}-seed{seed}" if seeded else kind
        folder = self.work / "jobs" / arm.name / f"{label}-{sha256(made_from)[:12]}"
        return BenchJob(kind=kind, arm=arm, folder=folder, made_from=made_from, seed=seed, **rest)


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
