"""Annotations that are the same for most items, as those of a model that does not see the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

_FEWEST_INPUTS = 10  # below it, equal answers say nothing
_LARGEST_SHARE = 0.5
_SHOWN = 80  # characters of the text in a message
_COLUMNS = ("caption", "descriptors")  # the annotation itself, in the files of the stages `caption` and `interests`


class Alike(NamedTuple):
    """The most frequent annotation: its column, its text, the number of different inputs that have it, and of all different inputs."""

    column: str
    text: str
    count: int
    inputs: int

    def describe(self) -> str:
        """Sentence for people."""
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[:_SHOWN].rstrip()}..."
        return (
            f"{self.count:,} of {self.inputs:,} different inputs have the same {self.column}, {text!r}; the model may not see the pictures "
            "or the texts: look at a few rows, and at the prompt and the model"
        )


def mostly_alike(shards: Sequence[Path], fields: Sequence[str]) -> Alike | None:
    """The annotation that more than half of the different inputs share, or None. Rows of equal pictures and texts are one input.

    Args:
        shards: finished files of an annotation job.
        fields: columns of the job's record.
    """
    column = next((name for name in _COLUMNS if name in fields), None)
    if column is None:
        return None
    hashes = [[np.fromiter(map(hash, texts), dtype=np.int64) for texts in rows] for rows in _rows(shards, column)]
    inputs, texts = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in zip(*hashes)) if hashes else ([], [])
    _, first = np.unique(inputs, return_index=True)
    if len(first) < _FEWEST_INPUTS:
        return None
    values, counts = np.unique(texts[first], return_counts=True)
    if counts.max() <= _LARGEST_SHARE * len(first):
        return None
    most = int(values[counts.argmax()])
    text = next(text for _, texts in _rows(shards, column) for text in texts if hash(text) == most)
    return Alike(column, text, int(counts.max()), len(first))


def _rows(shards: Sequence[Path], column: str) -> Iterator[tuple[list[str], list[str]]]:
    """Hash of the input and annotation of the usable rows of each file."""
    for path in shards:
        table = pq.read_table(path, columns=["input_sha256", column, "status"], partitioning=None)
        usable = table.filter(pc.equal(table["status"], "ok"))
        yield usable["input_sha256"].to_pylist(), usable[column].to_pylist()
