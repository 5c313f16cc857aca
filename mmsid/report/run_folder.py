"""Contents of a run folder: SID folders of its methods, manifests of its finished stages, and its catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsid.annotate.readers import ItemInterests, read_captions, read_interests
from mmsid.artifacts import MANIFEST, is_complete, read_manifest
from mmsid.catalog import CatalogConfig
from mmsid.catalog.sources.locate import is_hub, missing_sources, sources_of
from mmsid.config import apply_override, build
from mmsid.errors import ArtifactError
from mmsid.sids.table import FILE_NAME


def sid_folders(run: Path) -> dict[str, Path]:
    """Method -> SID folder, for every method that the run has finished: baselines, `ours`, `ours_refined`."""
    found = {path.parent.name: path.parent for path in sorted((run / "baselines").glob(f"*/{FILE_NAME}")) if is_complete(run / "baselines")}
    if is_complete(run / "assign"):
        found["ours"] = run / "assign"
    if is_complete(run / "refine"):
        found["ours_refined"] = run / "refine" / "sids"
    return found


def annotations(run: Path) -> tuple[dict[str, str], dict[str, ItemInterests]]:
    """Captions and mined interests by item id. Each is empty when the run has not finished the stage."""
    captions = read_captions(run / "caption") if is_complete(run / "caption") else {}
    return captions, read_interests(run / "interests") if is_complete(run / "interests") else {}


def manifests(run: Path) -> dict[str, dict[str, Any]]:
    """Stage -> manifest of every finished stage except the report, in the order in which they finished.

    Raises:
        ArtifactError: `run` has no finished stage, or a manifest has another schema version.
    """
    found = [(path.parent.name, read_manifest(path.parent)) for path in sorted(run.glob(f"*/{MANIFEST}")) if path.parent.name != "report"]
    if not found:
        raise ArtifactError(f"{run} holds no finished stage; give the folder of a run, e.g. runs/demo, or start one with `mmsid run`")
    return dict(sorted(found, key=lambda entry: (entry[1]["finished_unix"], entry[0])))


def catalog_of_run(run: Path, overrides: Sequence[str] = ()) -> CatalogConfig:
    """Catalogue in the manifests of the run. Relative paths start at the working folder of the run.

    Args:
        overrides: `catalog.items=PATH` and similar, for a run folder or a catalogue that was moved.

    Raises:
        ArtifactError: no manifest has a catalogue, or the items file does not exist.
        ConfigError: an override is wrong.
    """
    with_catalog = [(stage, manifest) for stage, manifest in manifests(run).items() if manifest["config"].get("catalog")]
    if not with_catalog:
        raise ArtifactError(f"{run}: no finished stage has a catalogue; write the page with `mmsid report --config CONFIG`")
    stage, manifest = with_catalog[0]
    working_folder = _working_folder(run / stage, Path(manifest["config"]["out"]))
    catalog = manifest["config"]["catalog"]
    for name in ("items", "image_root", "sequences", "events"):
        if found := [str(one if is_hub(one) else working_folder / one) for one in sources_of(catalog.get(name))]:
            catalog[name] = found[0] if len(found) == 1 else found
    if "vectors" in catalog:
        catalog["vectors"] = [str(working_folder / path) for path in catalog["vectors"]]
    data = {"catalog": catalog}
    for override in overrides:
        apply_override(data, override, source=str(run / stage / MANIFEST))
    config = build(CatalogConfig, data["catalog"], source=str(run / stage / MANIFEST), section="catalog")
    if missing := missing_sources(config.items):
        raise ArtifactError(
            f"{run} was made from the catalogue {missing[0]}, which does not exist; give its path: "
            f"`mmsid report {run} catalog.items=FILE` (and catalog.sequences, events, vectors, image_root where the catalogue has them)"
        )
    return config


def _working_folder(folder: Path, out: Path) -> Path:
    """Working folder in which the run was started: the path of the stage folder without the configured `out` at its end."""
    parts = folder.resolve().parts
    return Path(*parts[: -len(out.parts)]) if not out.is_absolute() and parts[-len(out.parts) :] == out.parts else Path.cwd()
