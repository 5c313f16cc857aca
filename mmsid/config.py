"""Strict YAML configuration: one file per run, one section per stage.

Unknown keys, wrong types and missing files raise errors that name the key, the file and the remedy. `${NAME}` and
`${NAME:-default}` in strings are replaced from the environment. Overrides are dotted: `train_tokenizer.steps=50`.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmsid.errors import ConfigError

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class Section(BaseModel):
    """Base class of configuration sections. Unknown keys are refused; instances are immutable.

    Attributes:
        renamed_keys: old key -> new key. An old key is refused with an error that names the new one.
        renamed_values: key -> {old value: new value}, refused in the same way.
        execution_keys: keys that say how the work is done, and do not change its result. A finished folder or a draft stays valid with
            other values. They are recorded in manifests, unlike keys that are declared with `Field(exclude=True)`.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    execution_keys: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StageConfig(Section):
    """Keys of every stage: the output folder and the random seed.

    Attributes:
        out: folder that the stage writes. A run sets it to runs/NAME/STAGE.
        seed: random seed. A run sets it to the seed at its top.
    """

    out: Path
    seed: int = 0

    def inputs(self) -> dict[str, Path | None]:
        """Name -> file or folder that the stage reads, None if it is not given. The manifest records their hashes."""
        return {}

    def unread_keys(self) -> tuple[str, ...]:
        """Keys that are given but do not change the result, because of the values of other keys. They are not compared."""
        return ()


SectionT = TypeVar("SectionT", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys (YAML would silently keep the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, typing.Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping, apply dotted overrides, and replace environment variables.

    A path that begins with `configs/` and does not exist names a configuration that mmsid ships.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or an override has no `=`.
    """
    path = Path(path)
    if not path.is_file():
        path = _shipped(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; correct the line named") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__} at the top level, expected sections as `name: value`")
    for override in overrides:
        apply_override(data, override, source=str(path))
    return _expand(data, source=str(path))


def _shipped(path: Path) -> Path:
    """The file of the same name that mmsid ships, for a path that begins with `configs/`."""
    roots = (Path(__file__).parents[1], Path(__file__).parent)  # a checkout, an installed package
    found = [root / path for root in roots if path.parts[:1] == ("configs",) and ".." not in path.parts and (root / path).is_file()]
    if not found:
        raise ConfigError(f"configuration {path} does not exist (looked in {Path.cwd()}); give the path of a YAML file")
    return found[0]


def apply_override(data: dict[str, Any], override: str, *, source: str) -> None:
    """Set `a.b.c=value` in place; the value is read as YAML, so `true`, `3`, `[1, 2]` and `null` work."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value (for {source})")
    *parents, last = key.split(".")
    target = data
    for depth, parent in enumerate(parents):
        inner = target.setdefault(parent, {})
        if inner is None:
            inner = target[parent] = {}
        if not isinstance(inner, dict):
            place = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: {place} is {inner!r} in {source}, not a section; override {place} itself")
        target = inner
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value {text!r} is not valid YAML; quote it") from error


def build(cls: type[SectionT], data: dict[str, Any], *, source: str, section: str) -> SectionT:
    """Validate a section and build its configuration class.

    Raises:
        ConfigError: the message names each invalid key, the file, the value and the expectation.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, problem, section) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _explain(cls: type[BaseModel], problem: dict[str, Any], section: str) -> str:
    path = problem["loc"]
    place = ".".join([section, *map(str, path)]) if section else ".".join(map(str, path))
    owner, key = _class_at(cls, path[:-1]), str(path[-1]) if path else ""
    if problem["type"] == "extra_forbidden":
        if new := getattr(owner, "renamed_keys", {}).get(key):
            return f"key {place} was renamed; write {new} instead of {key}"
        close = difflib.get_close_matches(key, owner.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(owner.model_fields))}"
        return f"unknown key {place}; {hint}"
    if problem["type"] == "missing":
        return f"key {place} is missing; add it"
    given = problem.get("input")
    new = getattr(owner, "renamed_values", {}).get(key, {}).get(given) if isinstance(given, str) else None
    if new:
        return f"key {place} is {given!r}, a value that was renamed; write {new!r}"
    return f"key {place} is {given!r}: {problem['msg']}; correct the value"


def _class_at(cls: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The nested configuration class that `path` leads to."""
    for part in path:
        if isinstance(part, str) and part in cls.model_fields:
            inner = _model_in(cls.model_fields[part].annotation)
            if inner is not None:
                cls = inner
    return cls


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict):
        return next((found for part in typing.get_args(annotation) if (found := _model_in(part)) is not None), None)
    return None


def _expand(value: Any, *, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, source=source) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, source=source) for inner in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match["name"], match["default"])
        if found is None:
            raise ConfigError(
                f"{source}: {value!r} needs the environment variable {match['name']}; set it or write a default ${{{match['name']}:-…}}"
            )
        return found

    return _VARIABLE.sub(replace, value)
