"""Settings of captions and interests in a bundle: what the stages were run with, so that a new ad is annotated in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsid.annotate.prompts import load_prompt
from mmsid.artifacts import is_complete, read_json, read_manifest
from mmsid.backbone.packaged_weights import DEMO
from mmsid.errors import ArtifactError, ConfigError

FILE_NAME = "annotation.json"
MODELS = "models"
_LEFT_OUT = ("catalog", "out", "captions", "prompt", "server", "model", "shard_rows")  # paths, addresses, and what a job alone needs


def read_settings(bundle: Path) -> dict[str, Any]:
    """Contents of `annotation.json`, {} if the bundle has none: `caption`, `interests`, and `clean_text`, whether titles are cleaned of
    instructions to models before anything reads them."""
    path = Path(bundle) / FILE_NAME
    return read_json(path) if path.is_file() else {}


def annotation_settings(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Path] | None]:
    """Settings of a finished annotation folder for `annotation.json`, and model folders to copy: name in the bundle -> folder.

    A model that is a folder of this machine is copied. A hub model is named by its id and revision.

    Raises:
        ArtifactError: the folder is unfinished, or its prompt was changed.
    """
    manifest = read_manifest(folder, stage)
    config, extra = manifest["config"], manifest["extra"]
    source = extra.get("source", "llm")
    found: dict[str, Any] = {
        "generator": config["generator"],
        "settings": {name: value for name, value in config.items() if name not in _LEFT_OUT and name != "generator"},
        "source": source,
    }
    if source != "llm" or config["generator"] == "captions":  # `captions`: the caption stage gives the interests, too
        return found, None
    found["prompt"] = _prompt(folder, config.get("prompt") or extra["prompt"], extra["prompt_sha256"])
    found["fields"] = _fields(stage, config, found["prompt"])
    model = str(config["model"])
    if config["generator"] != "huggingface":
        return found | {"model": model}, None
    if model != DEMO and (is_complete(Path(model)) or Path(model).is_dir()):
        name = f"{MODELS}/{Path(model).name}"
        return found | {"model": name, "in_bundle": True}, {name: Path(model)}
    return found | {"model": model, "in_bundle": False}, None


def _prompt(folder: Path, name: str, expected: str) -> dict[str, str]:
    try:
        prompt = load_prompt(name)
    except ConfigError as error:
        raise ArtifactError(f"{folder} was made with a prompt that cannot be read ({error}); restore it, or annotate again") from error
    if prompt.sha256 != expected:
        raise ArtifactError(
            f"{folder} was made with prompt {name!r} of sha256 {expected[:12]}, which is {prompt.sha256[:12]} now; restore it, or annotate "
            "again with --redo"
        )
    return {"name": Path(name).stem, "text": prompt.text, "sha256": prompt.sha256}


def _fields(stage: str, config: Mapping[str, Any], prompt: Mapping[str, str]) -> list[str]:
    """What the model reads of an ad, out of "picture", "title", "description", "categories", "attributes" and "caption"."""
    texts = ["title", "description", "categories", "attributes"] if "{{evidence}}" in prompt["text"] else []
    if stage == "caption":
        return ["picture", *texts]
    pictures = not texts if config.get("pictures") is None else config["pictures"]
    captions = ["caption"] if texts and config.get("captions") else []
    return [*(["picture"] if pictures else []), *texts, *captions]
