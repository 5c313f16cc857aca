"""Annotate another catalogue with the models, prompts and settings of an earlier annotation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsid.annotate import caption, interests
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig


def reannotate(captions: Path | None, mined: Path | None, catalog: CatalogConfig, folder: Path) -> tuple[Path | None, Path | None]:
    """Caption `catalog` and mine its interests below `folder`, with the configurations of the folders `captions` and `mined`.

    Returns the two new folders, None where the earlier folder is None. Interests mined from behaviour do not depend on pictures, so
    the earlier folder is returned unchanged.

    Raises:
        ArtifactError: `captions` or `mined` is not a finished annotation folder.
    """
    new_captions = None
    if captions is not None:
        config = caption.CaptionConfig.model_validate(_settings(captions, "caption"))
        new_captions = caption.run(config.model_copy(update={"catalog": catalog, "out": folder / "caption"}))
    if mined is None:
        return new_captions, None
    earlier = interests.InterestsConfig.model_validate(_settings(mined, "interests"))
    if earlier.generator == "coengagement":
        return new_captions, mined
    changes = {"catalog": catalog, "out": folder / "interests", "captions": new_captions}
    return new_captions, interests.run(earlier.model_copy(update=changes))


def _settings(folder: Path, stage: str) -> dict[str, Any]:
    """Keys of the stage that wrote `folder`, without its cache and with the error rate that it accepted."""
    manifest = read_manifest(folder, stage)
    gate = {"max_quarantined": manifest["extra"]["gate"]["max_quarantined"]} if "gate" in manifest["extra"] else {}
    return manifest["config"] | gate | {"cache": None}
