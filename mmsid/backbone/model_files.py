"""Local folder of a model: a packaged one, a folder, a finished stage, or a hub id (downloaded, or from the local cache)."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from mmsid.backbone.packaged_weights import DEMO, demo_weights
from mmsid.backbone.processors import load_processor
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError

_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def locate_model(name: str, revision: str | None = None) -> Path:
    """The model's folder. Only safetensors and configuration files are downloaded, never code or pickled weights.

    The processor of a hub model is loaded before the weights are downloaded, so that a missing package is named in seconds.

    Raises:
        ConfigError: the model is found nowhere, has no whole safetensors, or its processor cannot be loaded.
    """
    if name == DEMO:
        return demo_weights()
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise ConfigError(f"model folder {name} does not exist; correct the path, or run the stage that writes it first")
        folder = _download(name, revision)
    elif not (folder / "config.json").is_file():  # an artefact folder: the model is in a subfolder beside the manifest
        inner = sorted(found.parent for found in folder.glob("*/config.json"))
        folder = inner[0] if len(inner) == 1 else folder
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model {name!r}: no safetensors in {folder}; pickled weights are refused, so convert the model to safetensors")
    check_weight_files(folder)
    return folder


def copy_processor(source: Path, target: Path) -> None:
    """Copy the files of tokenizer, processor and chat template unchanged, the settings of videos included."""
    weights = {"config.json", "generation_config.json", "model.safetensors.index.json", "manifest.json"}
    for path in sorted({path for pattern in _SMALL_FILES for path in source.glob(pattern)}):
        if path.name not in weights:
            shutil.copyfile(path, target / path.name)


def _download(name: str, revision: str | None) -> Path:
    try:
        small = Path(snapshot_download(name, revision=revision, allow_patterns=list(_SMALL_FILES)))
        if not any(small.glob("*.safetensors")):
            load_processor(small, name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *_SMALL_FILES]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} is neither a folder nor available from the hub ({type(error).__name__}); download it first, or use `demo`"
        ) from error
