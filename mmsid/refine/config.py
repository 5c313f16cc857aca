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

# Defaults of `loop` under `recipe: repair`, for a tokenizer that learnt wrong targets for single items
# (docs/experiments/recovery_from_label_noise.md).
REPAIR: dict[str, Any] = {
    "objective": "likelihood",  # paths are drawn uniformly: a policy that is wrong about an item hardly ever samples the right one
    "group": 128,
    "lr": 3e-5,
    "adapt": False,
    "rounds": 40,
    "step_kl": 0.1,
    "anneal": True,
    "patience": 0,  # the monitored metric has no counts yet for codes that no item holds
    "most_kl": 9.0,
    "weights": {"sid_reward": 1.0, "codes": 1.0, "balance": 1.5, "crowding": 1.5, "reconstruction": 0.2, "robust_prediction": 5.0},
}


class RefineConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        tokenizer: folder of `train_tokenizer`, or of an earlier `refine`.
        sids: folder of `assign` for that tokenizer: the codes that the gate compares with.
        behaviour: vector files, for a tokenizer that was trained with such files.
        text_quality: finished `text_quality` folder. The quality q of an item multiplies the advantages of its group, so that items with
            poor mined interests move less. None: q = 1 for every item; the manifest records which of the two was used.
        recipe: `polish` for a sound tokenizer; `repair` for one that learnt wrong targets for single items (measured for targets that were
            exchanged between items). `repair` replaces the defaults of `loop` by `REPAIR`; its result may be refined again until the gate
            refuses.
        trainable: `heads` trains code vectors and projection on cached states (minutes on a CPU); `all` also trains the adapter and the
            query tokens (needs a GPU for catalogues of real size; lower `loop.batch`).
        top_m: codes per level in every item's tree of paths; top_m ** num_levels paths are enumerated in every round, under the policy
            of that round.
        proposals: codes among the `top_m` of every level that are chosen because most of an item's neighbours hold them, whatever their
            probability. A positive weight of `robust_prediction` adds the code that it predicts. The sum must be below top_m.
        temperature: flattens (> 1) the joint path distribution of policy and reference, in sampling and in scoring. None: the smallest
            value of at least 1 that gives the start `start_entropy` nats over an item's tree on average.
        collisions: collision policy of the published codes; must be the policy that `sids` was published with.
        log_with: tracker that accelerate feeds beside `log.jsonl`; its files are in `trackers/` of the folder.
    """

    catalog: CatalogConfig
    tokenizer: Path
    sids: Path
    captions: Path | None = None
    interests: Path | None = None
    behaviour: tuple[Path, ...] = ()
    text_quality: Path | None = None
    recipe: Literal["polish", "repair"] = "polish"
    trainable: Literal["heads", "all"] = "heads"
    top_m: int = Field(8, ge=2)
    proposals: int = Field(2, ge=0)
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
    def _apply_recipe(cls, values: Any) -> Any:
        loop = (values.get("loop") or {}) if isinstance(values, Mapping) and values.get("recipe") == "repair" else None
        return values if not isinstance(loop, Mapping) else {**values, "loop": REPAIR | dict(loop)}

    @model_validator(mode="after")
    def _own_code_in_tree(self) -> RefineConfig:
        proposed = self.proposals + self.uses_robust_prediction
        if proposed >= self.top_m:
            also = ", plus one for robust_prediction" if self.uses_robust_prediction else ""
            raise ValueError(
                f"proposals is {self.proposals}{also}, top_m is {self.top_m}; the sum must be below top_m, which also holds the item's "
                "own best code: lower proposals"
            )
        return self

    @property
    def uses_robust_prediction(self) -> bool:
        """Whether the reward has the component `robust_prediction`."""
        return bool(self.loop.weights.get("robust_prediction"))
