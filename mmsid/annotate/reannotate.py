"""Annotate another catalogue exactly as an earlier one was annotated: same models, prompts and settings."""

from __future__ import annotations

from pathlib import Path

from mmsid.annotate import caption, interests
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig


def reannotate(captions: Path | None, mined: Path | None, catalog: CatalogConfig, folder: Path) -> tuple[Path | None, Path | None]:
    """Captions and interests of `catalog` below `folder`, made by what made `captions` and `mined`; None where there were none.

    Interests that were mined from behaviour come as they are: pictures have no part in them.

    Raises:
        ArtifactError: one of the two is not a finished annotation folder.
    """
    new_captions = None
    if captions is not None:
        config = caption.CaptionConfig.model_validate(read_manifest(captions, "caption")["config"])
        new_captions = caption.run(config.model_copy(update={"catalog": catalog, "out": folder / "caption", "cache": None}))
    if mined is None:
        return new_captions, None
    earlier = interests.InterestsConfig.model_validate(read_manifest(mined, "interests")["config"])
    if earlier.generator == "coengagement":
        return new_captions, mined
    changes = {"catalog": catalog, "out": folder / "interests", "cache": None, "captions": new_captions}
    return new_captions, interests.run(earlier.model_copy(update=changes))
