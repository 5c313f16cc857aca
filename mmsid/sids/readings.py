"""Further readings of the items of a SID folder (`readings.safetensors`), for recommenders that hold interactions out.

Codes that were read with behaviour know every train interaction. A ranker that learns on held-out interactions would trust such codes
too much, and would take items that it hides for better placed than new items are. It therefore uses these codes instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmsid.artifacts import read_tensors, write_tensors
from mmsid.errors import ArtifactError
from mmsid.sids.table import FILE_NAME as SIDS
from mmsid.sids.table import SidTable

FILE_NAME = "readings.safetensors"


class Readings(NamedTuple):
    """Codes of N items in two further readings.

    Attributes:
        shortened: (N, L) int64, read with the behaviour of train histories that end one item earlier.
        content: (N, L) int64, read by content alone, as new items are.
    """

    shortened: np.ndarray
    content: np.ndarray

    def save(self, folder: Path) -> None:
        """Write into a SID folder; rows as in its `sids.parquet`."""
        write_tensors(folder / FILE_NAME, {name: torch.from_numpy(np.ascontiguousarray(codes)) for name, codes in self._asdict().items()})

    def rows(self, rows: np.ndarray) -> Readings:
        """The readings of some rows (n,)."""
        return Readings(self.shortened[rows], self.content[rows])


def readings_file(sids: Path) -> Path | None:
    """File of the readings beside a SID table, None where there is none. `sids`: a SID folder or its sids.parquet."""
    path = (Path(sids).parent if Path(sids).name == SIDS else Path(sids)) / FILE_NAME
    return path if path.is_file() else None


def load_readings(sids: Path, item_ids: list[str]) -> Readings | None:
    """Readings of items in this order, from a SID folder or its sids.parquet; None if it has none.

    Raises:
        ArtifactError: an item has no Semantic ID, or the file does not fit the table.
    """
    path = readings_file(sids)
    if path is None:
        return None
    table, found = SidTable.load(sids), read_tensors(path)
    if any(name not in found or tuple(found[name].shape) != table.codes.shape for name in Readings._fields):
        raise ArtifactError(
            f"{path} does not fit {SIDS} beside it: expected {' and '.join(Readings._fields)} of shape {table.codes.shape}, found "
            f"{ {name: tuple(tensor.shape) for name, tensor in found.items()} }; run `mmsid assign` again"
        )
    row_of = table.row_of
    if missing := [item_id for item_id in item_ids if item_id not in row_of]:
        raise ArtifactError(f"{sids} has no Semantic ID for {missing[0]!r}; run `mmsid assign` on this catalogue")
    return Readings(*(found[name].numpy().astype(np.int64) for name in Readings._fields)).rows(np.array([row_of[one] for one in item_ids]))
