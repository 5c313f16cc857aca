"""Interests that a model gave together with the captions (`caption.with_interests`), taken over as rows of stage `interests`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.annotate.confidence import CUT_SHORT
from mmsid.annotate.generator import Answer, Request
from mmsid.annotate.job_inputs import JobInput
from mmsid.annotate.readers import read_rows
from mmsid.artifacts import read_manifest
from mmsid.catalog import Item
from mmsid.errors import ConfigError

_COLUMNS = ("item_id", "status", "reason", "descriptors", "summary", "flags", "log_probability", "model_id")


class CaptionedInterests:
    """Generator that reads an item's interests from its caption row (the prompt is the row as JSON), without a model.

    Attributes:
        model_id: the model that wrote the captions.
        constrained: whether its answers were held to the JSON schema.
    """

    def __init__(self, model_id: str, constrained: bool | None) -> None:
        self.model_id, self.constrained = model_id, constrained

    @property
    def parameters(self) -> dict[str, Any]:
        """Empty: the evidence determines the answer."""
        return {}

    def generate(self, requests: list[Request]) -> list[Answer]:
        """One JSON object of `records.Interests` per request, with the log-probability of the whole answer that it was a part of."""
        rows = [json.loads(request.prompt) for request in requests]
        return [
            Answer(json.dumps(row["interests"], ensure_ascii=False), log_probability=row["log_probability"], cut_short=row["cut_short"])
            for row in rows
        ]


def wrote_interests(captions: Path) -> bool:
    """True if a finished caption folder holds interests as well."""
    return bool(read_manifest(captions, "caption")["config"].get("with_interests"))


def captioned_interests(captions: Path, items: Sequence[Item]) -> tuple[CaptionedInterests, list[JobInput]]:
    """Generator and inputs of the interests in a caption folder: of every item the first creative with a usable answer.

    An item of which no creative has one becomes a row without a request, with the reason of its first creative, or `not_captioned`.

    Raises:
        ConfigError: the captions were made without interests.
        ArtifactError: `captions` is not a finished caption folder.
    """
    if not wrote_interests(captions):
        raise ConfigError(
            f"interests.generator: captions, but {captions} holds captions alone; set caption.with_interests: true and run caption again, "
            "or name a model for the interests"
        )
    manifest = read_manifest(captions, "caption")
    found: dict[str, dict[str, Any]] = {}
    model_id = ""
    for row in read_rows(captions, "caption", _COLUMNS):
        model_id = row["model_id"]
        if row["item_id"] not in found or (found[row["item_id"]]["status"] != "ok" and row["status"] == "ok"):
            found[row["item_id"]] = row
    inputs = [_job_input(item.item_id, found.get(item.item_id)) for item in items]
    return CaptionedInterests(model_id, manifest["extra"].get("constrained")), inputs


def _job_input(item_id: str, row: dict[str, Any] | None) -> JobInput:
    if row is None or row["status"] != "ok":
        return JobInput(item_id, reason="not_captioned" if row is None else row["reason"])
    interests = {"descriptors": json.loads(row["descriptors"]), "summary": row["summary"]}
    evidence = {"interests": interests, "log_probability": row["log_probability"], "cut_short": CUT_SHORT in row["flags"]}
    return JobInput(item_id, evidence=json.dumps(evidence, ensure_ascii=False))
