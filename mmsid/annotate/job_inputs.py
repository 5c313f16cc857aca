"""Inputs of an annotation job: `JobInput` is one row to make, `Task` is the prompt, record type and picture loader of the stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from PIL import Image

from mmsid.annotate.confidence import ANY_MODEL, Confidence
from mmsid.annotate.prompts import Prompt
from mmsid.annotate.records import Record
from mmsid.annotate.word_check import WordCheck


@dataclass(frozen=True)
class JobInput:
    """One row to make. An input with a `reason` (such as a picture that the catalogue refused) is quarantined without a model call."""

    item_id: str
    creative: int = 0
    pictures: tuple[Path, ...] = ()
    evidence: str = ""
    reason: str | None = None


def not_asked(inputs: Iterable[JobInput]) -> Counter[str]:
    """Number of inputs without a model call, per reason. The error-rate gate does not count them, because they fail for any model."""
    return Counter(one.reason for one in inputs if one.reason is not None)


@dataclass(frozen=True)
class Task:
    """What to make of every input.

    Attributes:
        stage: name of the stage (`caption`, `interests`, `judge`).
        prompt: the prompt that every input is rendered into.
        record: type of the record; its fields are columns of the row.
        parse: reads the model's answer into a record. Raises AnnotationError with a reason code.
        load_picture: reads a picture by its path. Raises PictureError.
        any_picture: True uses the first readable picture of an input; False requires every picture to be readable.
        constants: columns with one value in every row.
        words: check of the record's texts against the words in the pictures; None for none.
        confidence: which answers the model is not sure of, and what becomes of them.
        integer_ids: whether item ids become whole numbers in the files, as they are in the user's table.
    """

    stage: str
    prompt: Prompt
    record: type[Record]
    parse: Callable[[str], Record]
    load_picture: Callable[[Path], Image.Image]
    any_picture: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)
    words: WordCheck | None = None
    confidence: Confidence = ANY_MODEL
    integer_ids: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Columns of a row: identity, the record's fields (lists as JSON), status, confidence, provenance."""
        text = [pa.field(name, pa.string()) for name in (*self.record.model_fields, *self.constants)]
        return pa.schema(
            [
                pa.field("item_id", pa.string()),
                pa.field("creative", pa.int64()),
                *text,
                pa.field("status", pa.string()),
                pa.field("reason", pa.string()),
                pa.field("flags", pa.list_(pa.string())),
                pa.field("attempts", pa.list_(pa.string())),
                pa.field("rejected", pa.string()),
                pa.field("log_probability", pa.float64()),
                *(pa.field(name, pa.string()) for name in ("prompt_sha256", "model_id", "input_sha256")),
            ]
        )
