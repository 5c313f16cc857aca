"""Configuration of the stage `refine`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mmsid.artifacts import manifest_folder
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.refine.evidence import EvidenceConfig
from mmsid.refine.gate import GateConfig
from mmsid.refine.loop import LoopConfig
from mmsid.refine.reward import RewardConfig
from mmsid.refine.tracking import TrackerName
from mmsid.sids.collisions import Policy as Collisions
from mmsid.tokenizer.behaviour import behaviour_inputs


class RefineConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        catalog: the items, and the logs that the reward and the gate read.
        tokenizer: folder of `train_tokenizer`, or of an earlier `refine`.
        sids: folder of `assign` for that tokenizer: the codes that the gate compares with.
        captions, interests: annotation folders of this catalogue, needed if the tokenizer reads these fields.
        behaviour: the user's own behaviour vectors. A tokenizer that was trained with such files needs them; one that was trained on
            content alone learns to read them instead of co-engagement.
        text_quality: finished `text_quality` folder. The quality q of an item multiplies the advantages of its group, so that items with
            poor mined interests move less. None: q = 1 for every item; the manifest records which of the two was used.
        trainable: `heads` trains code vectors and projection on cached states (minutes on a CPU); `all` also trains the adapter and the
            query tokens (needs a GPU for catalogues of real size; lower `loop.batch`).
        top_m: codes per level in every item's tree of paths; top_m ** num_levels paths are enumerated in every round, under the policy
            of that round.
        start_entropy: mean entropy in nats of the start's policy over an item's tree. The distributions of policy and reference are
            flattened by one temperature until it is reached: a trained tokenizer is nearly deterministic and would not explore.
        collisions: collision policy of the published codes; must be the policy that `sids` was published with.
        batch_size: items per forward pass of the tokenizer.
        evidence: how the logs are read.
        reward: the learned reward.
        loop: policy optimisation.
        gate: margins of the acceptance gate.
        log_with: tracker that accelerate feeds beside `log.jsonl`; its files are in `trackers/` of the folder.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("batch_size", "log_with")

    catalog: CatalogConfig
    tokenizer: Path
    sids: Path
    captions: Path | None = None
    interests: Path | None = None
    behaviour: tuple[Path, ...] = ()
    text_quality: Path | None = None
    trainable: Literal["heads", "all"] = "heads"
    top_m: int = Field(8, ge=3)
    start_entropy: float = Field(2.0, gt=0)
    collisions: Collisions = "relocate"
    batch_size: int = Field(32, ge=1)
    log_with: TrackerName | None = None
    evidence: EvidenceConfig = EvidenceConfig()
    reward: RewardConfig = RewardConfig()
    loop: LoopConfig = LoopConfig()
    gate: GateConfig = GateConfig()

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue, the start, the annotations, the text quality, and the user's behaviour vectors."""
        start = {"tokenizer": manifest_folder(self.tokenizer), "sids": manifest_folder(self.sids)}
        others = {name: getattr(self, name) for name in ("captions", "interests", "text_quality")}
        return {**start, **others, **self.catalog.inputs(), **behaviour_inputs(self.behaviour)}
