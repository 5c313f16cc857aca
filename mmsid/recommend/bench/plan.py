"""Jobs of a bench and their inputs.

The folder name of a job contains the hash of its inputs. So a finished job is found again, and a changed catalogue, method, schedule
or package version gives another job.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmsid._version import __version__
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
    """One row of the result table: the arm `entry` of the suite, or one `column` of its published SID sets."""

    entry: str
    config: ArmConfig
    column: str | None = None

    @property
    def name(self) -> str:
        """Name in the result table."""
        return self.entry if self.column is None else f"{self.entry}_{self.column}"

    @property
    def family(self) -> str:
        """Family of the arm; screening compares the arms of one family."""
        if self.config.recommender == "hybrid":
            return "fusion"
        return {"sasrec": "classical", "fusion": "fusion"}.get(self.config.kind, "sid")

    @property
    def sids_seeded(self) -> bool:
        """True if the SIDs depend on the seed; published SIDs do not."""
        return self.column is None


@dataclass(frozen=True)
class BenchJob:
    """One unit of work, which writes `folder`.

    Kind `sids` makes the Semantic IDs of an arm by `spec` (None: a published set), from those in folder `sids` if it refines them.
    Kind `fit` trains and ranks a recommender on the SIDs in `sids` with model and schedule of one trial, and its `fusion` with the
    hybrid in folder `classical`. Kind `classical` ranks the classical baselines. `made_from` holds the inputs: the folder name contains
    their hash, and the manifest lists them.
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
        """Identity of the job: its folder."""
        return self.folder

    @property
    def needs(self) -> tuple[Path, ...]:
        """Folders that must be complete before the job starts."""
        return tuple(path for path in (self.sids, self.classical) if path is not None)


@dataclass(frozen=True)
class Plan:
    """All jobs of one suite on one data set.

    Attributes:
        catalog_sha256: hash of the catalogue.
        work: folder of the jobs.
    """

    dataset: DatasetConfig
    suite: SuiteConfig
    catalog_sha256: str
    work: Path

    def arms(self) -> list[Arm]:
        """Trained arms in the order of the suite, one per published set, without those that the data set leaves out."""
        found = []
        for name, config in self.suite.arms.items():
            if config.kind == "published":
                found += [Arm(name, config, column) for column in self._columns()]
            elif config.kind not in ("classical", "fusion"):
                found.append(Arm(name, config))
        return [arm for arm in found if arm.name not in self.dataset.left_out]

    def left_out(self) -> dict[str, str]:
        """Arms of the suite that the data set does not support -> reason."""
        found = {name: reason for name, reason in self.dataset.left_out.items() if name in self.suite.arms}
        if self.dataset.published is None:
            found |= {name: "the data set has no published SIDs" for name, arm in self.suite.arms.items() if arm.kind == "published"}
        return found

    def classical(self) -> BenchJob | None:
        """The job of the classical baselines, or None if the suite has none."""
        name = next((name for name, arm in self.suite.arms.items() if arm.kind == "classical"), None)
        if name is None:
            return None
        arm = Arm(name, self.suite.arms[name])
        return self._job("classical", arm, self._data(), self.suite.seeds[0])

    def sid_jobs(self, arm: Arm, seed: int) -> list[BenchJob]:
        """Jobs that make the SIDs of an arm; a refined arm needs those of its start first."""
        start = [self.sids(self._start_of(arm), seed)] if arm.config.refine else []
        return [*start, self.sids(arm, seed)]

    def sids(self, arm: Arm, seed: int) -> BenchJob:
        """The job that makes the SIDs of an arm."""
        if arm.config.refine is not None:
            start = self.sids(self._start_of(arm), seed)
            made_from = {"start": start.made_from, "refine": plain(arm.config.refine), "seed": seed}
            return self._job("sids", arm, made_from, seed, spec=arm.config.refine, sids=start.folder)
        spec = self.spec(arm)
        # paths are not hashed; the hashes of the files are
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
        """The job that trains and ranks a recommender on the SIDs of an arm, or SASRec on item ids."""
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
        """Rows of the result table from the fits of an arm: the arm, and its fusion if the suite has one."""
        fusion = self.fusion(arm)
        return [arm] if fusion is None else [arm, fusion]

    def fusion(self, arm: Arm) -> Arm | None:
        """The arm that fuses this one with the hybrid baseline, if the suite has one."""
        return next((Arm(name, config) for name, config in self.suite.arms.items() if config.fusion == arm.name), None)

    def spec(self, arm: Arm) -> MethodSpec | TrainTokenizerConfig | None:
        """Settings of the SIDs of an arm, with the sizes of the data set as defaults; None for a published set.

        Raises:
            ConfigError: an override that the stage train_tokenizer does not have.
        """
        sizes = {"num_levels": self.dataset.num_levels, "codebook_size": self.dataset.codebook_size}
        if arm.config.sids is not None:
            method = arm.config.sids
            return method.model_copy(update={name: size for name, size in sizes.items() if name not in method.model_fields_set})
        if arm.config.tokenizer is None:
            return None
        inputs = {
            "out": self.work,  # replaced by the job
            "catalog": self.dataset.catalog,
            "captions": self.dataset.captions,
            "interests": self.dataset.interests,
            "use": self.dataset.use,
        }
        return build(TrainTokenizerConfig, inputs | sizes | arm.config.tokenizer, source="suite", section=f"arms.{arm.name}.tokenizer")

    def _start_of(self, arm: Arm) -> Arm:
        """The arm that a refined arm starts from."""
        return Arm(arm.config.refine.of, self.suite.arms[arm.config.refine.of])

    def _columns(self) -> tuple[str, ...]:
        published = self.dataset.published
        if published is None:
            return ()
        return tuple(name for name in read_table(published.sids).column_names if name != "item_id")

    def _data(self) -> dict[str, Any]:
        return {"catalog": self.catalog_sha256, "split": plain(self.dataset.catalog.split), "version": __version__}

    def _job(self, kind: str, arm: Arm, made_from: dict[str, Any], seed: int, **rest: Any) -> BenchJob:
        seeded = kind == "fit" or (kind == "sids" and arm.sids_seeded)
        label = f"{kind}-seed{seed}" if seeded else kind
        folder = self.work / "jobs" / arm.name / f"{label}-{sha256(made_from)[:12]}"
        return BenchJob(kind=kind, arm=arm, folder=folder, made_from=made_from, seed=seed, **rest)


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
