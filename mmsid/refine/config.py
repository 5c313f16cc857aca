"""Configuration of the stage `refine`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.refine.evidence import EvidenceConfig
from mmsid.refine.gate import GateConfig
from mmsid.refine.loop import LoopConfig
from mmsid.refine.reward import RewardConfig
from mmsid.refine.tracking import TrackerName
from mmsid.sids.collisions import Policy as Collisions

# How a start that is wrong about single items is cleaned (LOG.md, 2026-11-27); what the configuration says of the loop itself comes on top.
REPAIR: dict[str, Any] = {
    "objective": "likelihood",  # of paths drawn evenly: a wrong start gives the right ones no chance to be sampled
    "group": 128,
    "lr": 3e-5,
    "behaviour_rate": 100.0,  # the damage sits in what the memory adds to single items, which no shared weight undoes one by one
    "adapt": False,
    "rounds": 40,
    "step_kl": 0.1,
    "anneal": True,
    "patience": 0,  # next items know nothing yet of codes that nobody holds
    "most_kl": 9.0,
    "weights": {"sid_reward": 1.0, "codes": 1.0, "balance": 1.5, "crowding": 1.5, "reconstruction": 0.2, "robust_prediction": 5.0},
}


class RefineConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        tokenizer: folder of `train_tokenizer`, or of an earlier `refine`.
        sids: folder of `assign` for that tokenizer: the start that must be beaten.
        text_quality: a finished `text_quality` folder: q of an item multiplies the advantage of its group, so that items whose mined
            interests are worth little move less. None: q = 1 for every item, and the manifest says so.
        recipe: `polish` for a start that is sound; `repair` for one that learnt wrong targets for single items (measured for targets
            that were exchanged): `REPAIR` in place of the defaults of `loop`; refine what came of it again until the gate refuses.
        trainable: `heads` moves code vectors and projection, states cached once (minutes on a CPU); `all` also the adapter and the query
            tokens (needs a GPU for real sizes; lower `loop.batch`).
        top_m: codes per level in every item's tree of paths; top_m ** num_levels paths are enumerated.
        proposals: of the `top_m` codes of every level, those that most of an item's neighbours hold, however unlikely
            to the start (none at a frozen first level); where `consensus` is paid for, the code that it asks for comes on top.
            Fewer than top_m in all.
        temperature: flattens (> 1) the joint path distribution of policy and reference alike, in sampling and in scoring; None: as much
            as it takes for the start to have `start_entropy` nats over an item's tree on average (never below 1).
        collisions: how refined codes are published; must be what the start was published with.
        log_with: a tracker that accelerate feeds beside `log.jsonl`; its files lie in `trackers/` of the folder.
    """

    catalog: CatalogConfig
    tokenizer: Path
    sids: Path
    captions: Path | None = None
    interests: Path | None = None
    text_quality: Path | None = None
    recipe: Literal["polish", "repair"] = "polish"
    trainable: Literal["heads", "all"] = "heads"
    top_m: int = Field(8, ge=2)
    proposals: int = Field(2, ge=0)
    freeze_first_level: bool = False
    temperature: float | None = Field(None, gt=0)
    start_entropy: float = Field(2.0, gt=0)
    collisions: Collisions = "relocate"
    batch_size: int = Field(32, ge=1)
    log_with: TrackerName | None = None
    evidence: EvidenceConfig = EvidenceConfig()
    reward: RewardConfig = RewardConfig()
    loop: LoopConfig = LoopConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="before")
    @classmethod
    def _repairs(cls, values: Any) -> Any:
        loop = (values.get("loop") or {}) if isinstance(values, Mapping) and values.get("recipe") == "repair" else None
        return values if not isinstance(loop, Mapping) else {**values, "loop": REPAIR | dict(loop)}

    @model_validator(mode="after")
    def _leaves_room(self) -> RefineConfig:
        places = self.proposals + self.uses_robust_prediction
        if places >= self.top_m:
            also = ", and one place for consensus" if self.uses_robust_prediction else ""
            raise ValueError(
                f"proposals is {self.proposals}{also}, top_m {self.top_m}; an item's own best code needs a place: lower proposals"
            )
        return self

    @property
    def uses_robust_prediction(self) -> bool:
        """Whether the reward asks what the other items say of one."""
        return bool(self.loop.weights.get("robust_prediction"))
