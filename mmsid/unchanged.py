"""Whether a finished stage folder is still valid: the same deciding configuration, and inputs of the same content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsid.artifacts import input_hashes, plain, read_manifest
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.config import StageConfig
from mmsid.identity import deciding, differences

_CATALOG = "catalog"  # name of the input that is an ingested catalogue


def changes(stage: str, config: StageConfig) -> list[str]:
    """What differs between `config` with its inputs and the finished folder `config.out`, one phrase per key or input.

    Inputs are compared by content, wherever they are now. Keys that do not change the result are not compared.

    Raises:
        ArtifactError: the folder was written by another stage or is damaged, or an input is missing or damaged.
    """
    manifest = read_manifest(config.out, stage)
    recorded, recorded_paths = manifest["inputs"], {name: Path(path) for name, path in manifest["input_paths"].items()}
    inputs, hashes = _present(config, recorded)
    was, now = manifest["config"], plain(config)
    found = differences(deciding(config, was, recorded_paths), deciding(config, now, inputs), was, now)
    for name in sorted({*recorded} & {*hashes}):
        if recorded[name] != hashes[name]:
            found.append(f"its input {name} ({inputs[name]}) has changed{_cause(name, config, manifest)}")
    if not found:  # a key that adds or removes an input is named above
        found += [f"its input {name} is new" for name in sorted({*hashes} - {*recorded})]
        found += [f"its input {name} ({recorded_paths[name]}) is not read any more" for name in sorted({*recorded} - {*hashes})]
    return found


def _present(config: StageConfig, recorded: Mapping[str, str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Paths and hashes of the inputs of `config`. The catalogue is compared in the form that was recorded: ingested, or its sources."""
    inputs = {name: path for name, path in config.inputs().items() if path is not None}
    catalog = getattr(config, "catalog", None)
    if not isinstance(catalog, CatalogConfig):
        return inputs, input_hashes(inputs)
    sources = {name: path for name, path in catalog.input_files().items() if path is not None}
    if _CATALOG in recorded and _CATALOG not in inputs:
        others = {name: path for name, path in inputs.items() if name not in sources}
        return others | {_CATALOG: Path("read from its sources")}, input_hashes(others) | {_CATALOG: read_catalog(catalog).sha256}
    if _CATALOG in inputs and _CATALOG not in recorded:
        del inputs[_CATALOG]
        inputs |= {name: path for name, path in sources.items() if name in recorded}
    return inputs, input_hashes(inputs)


def _cause(name: str, config: StageConfig, manifest: Mapping[str, Any]) -> str:
    """The keys of the catalogue that differ, for a catalogue of another content."""
    if name != _CATALOG:
        return ""
    was, now = ({"catalog": one["catalog"]} for one in (manifest["config"], plain(config)))
    keys = differences(deciding(config, was, {}), deciding(config, now, {}), was, now)
    return f" ({'; '.join(keys)})" if keys else ""
