"""What was published earlier: the SIDs that `assign --append` must not move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmsid.artifacts import read_json, read_tensors
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids import SidTable, read_sid_folder
from mmsid.sids.folder import INTRINSIC
from mmsid.tokenizer.model import ItemTokenizer

RETIRED = "retired.parquet"


@dataclass
class Published:
    """An earlier SID folder.

    Attributes:
        table: its items.
        retired: items that had left the catalogue before it was written; their codes are never given to others.
        embeddings: (N, D) of `table`, for the figures and files that cover the whole catalogue.
    """

    folder: Path
    table: SidTable
    retired: SidTable | None
    embeddings: np.ndarray
    policy: str

    @classmethod
    def read(cls, folder: Path) -> Published:
        """Read a folder that `mmsid assign` or `mmsid refine` wrote.

        Raises:
            ArtifactError: a part of it is missing or torn.
        """
        folder = Path(folder)
        table = read_sid_folder(folder)
        embeddings = read_tensors(folder / "embeddings.safetensors")["embeddings"].numpy()
        if len(embeddings) != len(table):
            raise ArtifactError(f"{folder}: {len(table)} Semantic IDs but {len(embeddings)} embeddings; run `mmsid assign` again")
        retired = SidTable.load(folder / RETIRED) if (folder / RETIRED).is_file() else None
        # refinement publishes under the policy of its start and does not repeat it
        policy = read_json(folder / INTRINSIC).get("collisions", {}).get("policy", "relocate" if table.suffix is None else "suffix")
        return cls(folder, table, retired, embeddings, policy)

    def check(self, tokenizer: ItemTokenizer, policy: str) -> None:
        """Refuse a tokenizer or a collision policy that these SIDs were not made with.

        Raises:
            ArtifactError, ConfigError: names both.
        """
        if self.table.tokenizer_sha256 != tokenizer.sha256():
            raise ArtifactError(
                f"{self.folder} was made by tokenizer {self.table.tokenizer_sha256[:12]}, this one is {tokenizer.sha256()[:12]}; "
                "append with the tokenizer that published, or assign all items anew and look at `mmsid churn`"
            )
        if self.policy != policy:
            raise ConfigError(f"{self.folder} was published with collisions: {self.policy}, now it is {policy}; append with the same")

    def rows_in(self, item_ids: list[str]) -> np.ndarray:
        """(N,) row of each item in `table`, -1 for a new one."""
        row_of = self.table.row_of
        return np.array([row_of.get(item_id, -1) for item_id in item_ids], dtype=np.int64)

    def codes_of(self, item_ids: list[str]) -> np.ndarray:
        """(N, L) published codes, -1 for items never published; an item that comes back has its own again."""
        found = np.full((len(item_ids), self.table.num_levels), -1, dtype=np.int64)
        for table in (self.retired, self.table):
            if table is not None:
                row_of = table.row_of
                known = [(place, row_of[item_id]) for place, item_id in enumerate(item_ids) if item_id in row_of]
                for place, row in known:
                    found[place] = table.codes[row]
        return found

    def left_behind(self, item_ids: list[str]) -> SidTable | None:
        """The items of this folder, and those retired before, that are not among `item_ids`; None when there are none."""
        present = set(item_ids)
        gone = self.table.align([item_id for item_id in self.table.item_ids if item_id not in present])
        if self.retired is not None:
            present |= set(gone.item_ids)
            before = self.retired.align([item_id for item_id in self.retired.item_ids if item_id not in present])
            joined = {name: np.concatenate([getattr(gone, name), getattr(before, name)]) for name in ("codes", "raw_codes", "margin")}
            gone = replace(gone, item_ids=gone.item_ids + before.item_ids, **joined)
        return gone if len(gone) else None
