"""Annotations that are the same for most items, as those of a model that does not see the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

_FEWEST_ROWS = 10  # below it, equal answers say nothing
_LARGEST_SHARE = 0.5
_SHOWN = 80  # characters of the text in a message
_COLUMNS = ("caption", "descriptors")  # the annotation itself, in the files of the stages `caption` and `interests`


class Alike(NamedTuple):
    """The most frequent annotation: its column, its text, the number of its rows, and the number of all rows with an annotation."""

    column: str
    text: str
    count: int
    rows: int

    def describe(self) -> str:
        """Sentence for people."""
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN].rstrip()}..."
        return (
            f"{self.count:,} of {self.rows:,} rows have the same {self.column}, {text!r}; the model may not see the pictures or the texts: "
            "look at a few rows, and at the prompt and the model"
        )


def mostly_alike(shards: Sequence[Path], fields: Sequence[str]) -> Alike | None:
    """The annotation that more than half of the usable rows share, or None.

    Args:
        shards: finished files of an annotation job.
        fields: columns of the job's record.
    """
    column = next((name for name in _COLUMNS if name in fields), None)
    if column is None:
        return None
    hashes = [np.fromiter(map(hash, texts), dtype=np.int64, count=len(texts)) for texts in _texts(shards, column)]
    values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *hashes]), return_counts=True)
    rows = int(counts.sum())
    if rows < _FEWEST_ROWS or counts.max() <= _LARGEST_SHARE * rows:
        return None
    most = int(values[counts.argmax()])
    text = next(text for texts in _texts(shards, column) for text in texts if hash(text) == most)
    return Alike(column, text, int(counts.max()), rows)


def _texts(shards: Sequence[Path], column: str) -> Iterator[list[str]]:
    """Annotations of the usable rows of each file."""
    for path in shards:
        table = pq.read_table(path, columns=[column, "status"], partitioning=None)
        yield table.filter(pc.equal(table["status"], "ok"))[column].to_pylist()
