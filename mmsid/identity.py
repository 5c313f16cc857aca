"""What decides the result of a stage: its configuration without the keys and the paths that do not change it.

Two folders of one stage are the same work when this part of their configurations and the hashes of their inputs are equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_USER_TABLES = ("items", "sequences", "events", "vectors")  # keys of a catalogue that name its sources
_OUT = "out"

Keys = tuple[str, ...]


def deciding(config: BaseModel | Mapping[str, Any], dumped: Mapping[str, Any], inputs: Mapping[str, Path]) -> dict[str, Any]:
    """The part of a dumped configuration that decides the result, as nested JSON data.

    The output folder, keys that are not part of manifests and the `execution_keys` of the sections are left out. A path of an input
    becomes the name of the input, because inputs are compared by their content. Of a catalogue that is an input itself, only the split
    is kept.

    Args:
        config: configuration of the stage. Its class says which keys are left out and which values are paths.
        dumped: JSON data of this configuration, or of an earlier one of the same stage.
        inputs: name -> path of the inputs that belong to `dumped`.
    """
    ignored = {(_OUT,), *_ignored(config)}
    paths = set(_paths(config))
    names = {name: os.path.normpath(path) for name, path in sorted(inputs.items())}
    found = _masked(dumped, (), ignored, paths, names)
    if isinstance(catalog := found.get("catalog"), dict):
        found["catalog"] = _catalog(catalog, dumped["catalog"], names)
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any], dumped_was: Any, dumped_now: Any, prefix: str = "") -> list[str]:
    """One phrase per key that differs between two results of `deciding`: `catalog.pictures.max_bytes was 1, is 2`.

    Args:
        dumped_was, dumped_now: the dumped configurations, whose values are shown.
    """
    found = []
    for key in sorted({*was, *now}):
        old, new = was.get(key), now.get(key)
        if old == new:
            continue
        shown = [one.get(key) if isinstance(one, Mapping) else None for one in (dumped_was, dumped_now)]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, *shown, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} was {shown[0]!r}, is {shown[1]!r}")
    return found


def _ignored(config: Any, place: Keys = ()) -> Iterator[Keys]:
    """Places of the keys that do not change the result."""
    if isinstance(config, BaseModel):
        execution = (*getattr(config, "execution_keys", ()), *getattr(config, "unread_keys", tuple)())
        for name, field in type(config).model_fields.items():
            if name in execution or field.exclude:
                yield (*place, name)
            else:
                yield from _ignored(getattr(config, name), (*place, name))


def _paths(config: Any, place: Keys = ()) -> Iterator[Keys]:
    """Places of values that are paths, or lists of paths."""
    if isinstance(config, Path) or (isinstance(config, tuple) and any(isinstance(one, Path) for one in config)):
        yield place
    elif isinstance(config, BaseModel):
        for name in type(config).model_fields:
            yield from _paths(getattr(config, name), (*place, name))
    elif isinstance(config, Mapping):
        for name, value in config.items():
            yield from _paths(value, (*place, str(name)))


def _masked(value: Any, place: Keys, ignored: set[Keys], paths: set[Keys], names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(inner, (*place, key), ignored, paths, names) for key, inner in value.items() if (*place, key) not in ignored}
    if isinstance(value, list):
        return [_masked(inner, place, ignored, paths, names) for inner in value]
    return _input_name(value, place in paths, names) if isinstance(value, str) and value else value


def _input_name(value: str, is_path: bool, names: Mapping[str, str]) -> str:
    """`input NAME` for the path of an input, of a folder around it, or of a part of it; other values as they are."""
    path = os.path.normpath(value)
    for name, of_input in names.items():
        if path == of_input or (is_path and (_is_inside(path, of_input) or _is_inside(of_input, path))):
            return f"input {name}"
    return value


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _catalog(masked: dict[str, Any], dumped: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    if "catalog" in names:  # compared by its content
        return {name: value for name, value in masked.items() if name == "split"}
    found = {name: value for name, value in masked.items() if name not in _USER_TABLES or not _is_input(name, names)}
    items = dumped.get("items")
    first = items[0] if isinstance(items, list) and items else items
    if isinstance(root := dumped.get("image_root"), str) and isinstance(first, str):
        found["image_root"] = root
        if os.path.isabs(root) == os.path.isabs(first):  # as seen from the table: both may be moved together
            relative = os.path.relpath(root, os.path.dirname(first) or os.curdir)
            found["image_root"] = None if relative == os.curdir else relative
    return found


def _is_input(table: str, names: Mapping[str, str]) -> bool:
    return any(name == table or name.startswith(f"{table} ") for name in names)
