"""Published Semantic IDs: the codes that `assign --append` must not change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmsid.artifacts import read_json, read_tensors
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids import SidTable
from mmsid.sids.folder import INTRINSIC
from mmsid.tokenizer.model import ItemTokenizer

RETIRED = "retired.parquet"


@dataclass
class Published:
    """An earlier SID folder.

    Attributes:
        table: the SIDs of its items.
        retired: SIDs of items that were removed from the catalogue before; no other item gets their codes.
        embeddings: (N, D), rows as in `table`.
        policy: collision policy of the folder.
    """

    folder: Path
    table: SidTable
    retired: SidTable | None
    embeddings: np.ndarray
    policy: str

    @classmethod
    def read(cls, folder: Path) -> Published:
        """Read a folder written by `mmsid assign` or `mmsid refine`.

        Raises:
            ArtifactError: a part of the folder is missing or damaged.
        """
        folder = Path(folder)
        table = SidTable.load(folder)
        embeddings = read_tensors(folder / "embeddings.safetensors")["embeddings"].numpy()
        if len(embeddings) != len(table):
            raise ArtifactError(f"{folder}: {len(table)} Semantic IDs but {len(embeddings)} embeddings; run `mmsid assign` again")
        retired = SidTable.load(folder / RETIRED) if (folder / RETIRED).is_file() else None
        # refinement keeps the collision policy of the tokenizer it starts from and does not record it
        policy = read_json(folder / INTRINSIC).get("collisions", {}).get("policy", "relocate" if table.suffix is None else "suffix")
        return cls(folder, table, retired, embeddings, policy)

    def check(self, tokenizer: ItemTokenizer, policy: str) -> None:
        """Check that these SIDs were made with this tokenizer and this collision policy.

        Raises:
            ArtifactError: the tokenizer is another one.
            ConfigError: the collision policy is another one.
        """
        if self.table.tokenizer_sha256 != tokenizer.sha256():
            raise ArtifactError(
                f"{self.folder} was made by tokenizer {self.table.tokenizer_sha256[:12]}, this one is {tokenizer.sha256()[:12]}; "
                "append with the tokenizer that published these SIDs, or assign all items again and check `mmsid churn`"
            )
        if self.policy != policy:
            raise ConfigError(f"{self.folder} was published with collisions: {self.policy}, now it is {policy}; set it to {self.policy}")

    def rows_in(self, item_ids: list[str]) -> np.ndarray:
        """Row (N,) of each item in `table`, -1 for new items."""
        row_of = self.table.row_of
        return np.array([row_of.get(item_id, -1) for item_id in item_ids], dtype=np.int64)

    def codes_of(self, item_ids: list[str]) -> np.ndarray:
        """Published codes (N, L), -1 for items never published. A retired item that returns gets its former codes."""
        found = np.full((len(item_ids), self.table.num_levels), -1, dtype=np.int64)
        for table in (self.retired, self.table):
            if table is not None:
                row_of = table.row_of
                for index, item_id in enumerate(item_ids):
                    if item_id in row_of:
                        found[index] = table.codes[row_of[item_id]]
        return found

    def removed(self, item_ids: list[str]) -> SidTable | None:
        """SIDs of the published and retired items that are not among `item_ids`; None if there are none."""
        present = set(item_ids)
        removed = self.table.align([item_id for item_id in self.table.item_ids if item_id not in present])
        if self.retired is not None:
            present |= set(removed.item_ids)
            earlier = self.retired.align([item_id for item_id in self.retired.item_ids if item_id not in present])
            joined = {name: np.concatenate([getattr(removed, name), getattr(earlier, name)]) for name in ("codes", "raw_codes", "margin")}
            removed = replace(removed, item_ids=removed.item_ids + earlier.item_ids, source=None, **joined)
        return removed if len(removed) else None
