"""What a run folder tells by itself: its arms, its finished stages, and the catalogue that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.artifacts import MANIFEST, is_complete, read_manifest
from mmsid.catalog import CatalogConfig
from mmsid.config import apply_override, build
from mmsid.errors import ArtifactError
from mmsid.sids.folder import TABLE


def sid_folders(run: Path) -> dict[str, Path]:
    """Arm name -> SID folder, for every arm that a run has finished: baselines first, then ours, then ours refined."""
    found = {path.parent.name: path.parent for path in sorted((run / "baselines").glob(f"*/{TABLE}")) if is_complete(run / "baselines")}
    if is_complete(run / "assign"):
        found["ours"] = run / "assign"
    if is_complete(run / "refine"):
        found["ours_refined"] = run / "refine" / "sids"
    return found


def manifests(run: Path) -> dict[str, dict[str, Any]]:
    """Stage -> manifest of every finished stage but the report itself, in the order in which they were finished.

    Raises:
        ArtifactError: no finished stage in `run`, or one of another schema version.
    """
    found = [(path.parent.name, read_manifest(path.parent)) for path in sorted(run.glob(f"*/{MANIFEST}")) if path.parent.name != "report"]
    if not found:
        raise ArtifactError(f"{run} holds no finished stage; name the folder of a run, e.g. runs/demo, or start one with `mmsid run`")
    return dict(sorted(found, key=lambda entry: (entry[1]["finished_unix"], entry[0])))


def catalog_of_run(run: Path, overrides: Sequence[str] = ()) -> CatalogConfig:
    """The catalogue that the run's manifests name; relative paths start where the run was started.

    Args:
        overrides: `catalog.items=PATH` and the like, for a run folder or a catalogue that was moved.
    Raises:
        ArtifactError: no stage names a catalogue, or its items are not where they were.
        ConfigError: an override is wrong.
    """
    named = [(stage, manifest) for stage, manifest in manifests(run).items() if manifest["config"].get("catalog")]
    if not named:
        raise ArtifactError(f"{run}: no finished stage names a catalogue; write its page with `mmsid report --config CONFIG`")
    stage, manifest = named[0]
    started_in = _started_in(run / stage, Path(manifest["config"]["out"]))
    found = manifest["config"]["catalog"]
    found |= {name: str(started_in / found[name]) for name in ("items", "image_root", "sequences") if found.get(name)}
    data = {"catalog": found}
    for override in overrides:
        apply_override(data, override, source=str(run / stage / MANIFEST))
    config = build(CatalogConfig, data["catalog"], source=str(run / stage / MANIFEST), section="catalog")
    if not config.items.is_file():
        raise ArtifactError(
            f"{run} was made from the catalogue {config.items}, which is not there; name it: `mmsid report {run} catalog.items=FILE` "
            "(and catalog.sequences, catalog.image_root where the catalogue has them)"
        )
    return config


def _started_in(folder: Path, out: Path) -> Path:
    """The working folder of the run: what is left of the stage's path when its configured `out` is taken off the end."""
    parts = folder.resolve().parts
    return Path(*parts[: -len(out.parts)]) if not out.is_absolute() and parts[-len(out.parts) :] == out.parts else Path.cwd()
