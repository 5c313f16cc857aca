"""Write docs/configuration.md, the reference of every configuration key, from the configuration classes.

python scripts/configuration_page.py            writes the page
python scripts/configuration_page.py --check    fails if the page differs from the classes; `make docs` calls this

The meaning of a key is its line in the `Attributes:` of its class or of a base class. A key that holds a section and has no such line is
described by the first sentence of the section's class.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import mmsid.api
from mmsid.catalog import CatalogConfig
from mmsid.config import StageConfig
from mmsid.errors import ConfigError
from mmsid.ray_pool import RayConfig
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.new_items.config import NewItemsSuite
from mmsid.stages import STAGES, RunHeader, config_class, stage_configs
from mmsid.tokenizer.quantize_vectors import QuantizeConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration reference

This page lists every key of a run's YAML, of `mmsid quantize`, and of the YAML files of `mmsid bench`. It is generated from the
configuration classes (`python scripts/configuration_page.py`).

A run's YAML has the [keys at the top](#top-of-the-file), the section [`catalog`](#catalog), and one section per stage. A section that
is left empty has the defaults, and a stage without a section does not run. A key is overridden on the command line as `section.key=value`:

```bash
mmsid catalog --config configs/demo.yaml ingest.max_problems=0.2
```

`${NAME}` and `${NAME:-default}` in a text are replaced from the environment. Unknown keys, wrong types and values outside of the limits
are errors that name the key.

- **set by the run**: the run fills the key in, with the folder of an earlier stage for example. Set it to use another folder.
- **°**: the key does not change the result. A finished folder or an interrupted stage stays valid when it changes.
"""
API = {  # stage -> its function, where the names differ
    "text_quality": "train_text_quality",
    "sid_reward": "train_sid_reward",
    "refine": "refine_tokenizer",
    "recommend": "write_recommendations",
    "report": "write_report",
}
GIVEN: dict[str, dict[str, Any]] = {"judge": {"model": "demo"}}  # keys that a run with all stages cannot fill in
CONSTRAINTS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤", "pattern": "matches"}


def descriptions(cls: type[BaseModel]) -> dict[str, str]:
    """Key -> its meaning, from the `Attributes:` of the class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (isinstance(base, type) and issubclass(base, BaseModel) and base.__dict__.get("__doc__")):
            continue
        _, sign, block = inspect.cleandoc(base.__doc__).partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w)", "\n" + block) if sign else ():
            names, colon, text = entry.strip().partition(":")
            if colon and re.fullmatch(r"\w+(, \w+)*", names):
                found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def first_sentence(described: Any) -> str:
    """First sentence of the docstring of a class or function, or an empty text."""
    text = " ".join(inspect.cleandoc(described.__dict__.get("__doc__", described.__doc__) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The configuration class that a type holds, also inside of unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := section_of(part)) is not None), None)


def meaning(cls: type[BaseModel], key: str) -> str:
    """What a key means, or an empty text if its class does not say."""
    field = cls.model_fields[key]
    inner = section_of(field.annotation)
    text = descriptions(cls).get(key) or field.description or (first_sentence(inner) if inner is not None else "")
    return re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)


def undescribed(cls: type[BaseModel]) -> list[str]:
    """`Class.key` of all keys without a meaning, in this class and in the sections below it."""
    found = [f"{cls.__module__}.{cls.__name__}.{key}" for key in cls.model_fields if not meaning(cls, key)]
    inner = (section_of(field.annotation) for field in cls.model_fields.values())
    return list(dict.fromkeys([*found, *(name for one in inner if one is not None for name in undescribed(one))]))


def type_text(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`" for value in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in parts))
    if origin in (list, tuple):
        return f"list of {type_text(parts[0])}"
    if origin is dict:
        return f"mapping to {type_text(parts[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    words = {str: "text", int: "whole number", float: "number", bool: "true \\| false", Path: "path", Any: "any value"}
    return words[annotation]


def limits(field: FieldInfo) -> str:
    """The limits of a value, such as `≥ 1`."""
    given = [(name, getattr(rule, name, None)) for rule in field.metadata for name in CONSTRAINTS]
    return ", ".join(f"{CONSTRAINTS[name]} {value}" for name, value in given if value is not None)


def default_text(field: FieldInfo) -> str:
    """The default as YAML would write it."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return code(json.dumps(given, ensure_ascii=False).replace('"', "")) if given else "its defaults"
    if field.default_factory is not None and isinstance(value, Path):
        return "see meaning"
    if isinstance(value, Path):
        value = str(PosixPath(value))
    if isinstance(value, str):
        return code(value) if value else "empty text"
    return code(json.dumps(plain(value), ensure_ascii=False))


def plain(value: Any) -> Any:
    """Lists and mappings of plain values."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def code(text: str) -> str:
    """Text in code style, safe inside of a table."""
    return "`" + text.replace("|", "\\|").replace("\n", " ") + "`"


def table(cls: type[BaseModel], place: str, keys: list[str], by_run: set[str], anchors: dict[type[BaseModel], str]) -> Iterator[str]:
    """Rows of a table with one row per key. `anchors`: section -> heading that describes it; new ones are added."""
    known = getattr(cls, "execution_keys", ())
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for key in keys:
        field = cls.model_fields[key]
        inner, text = section_of(field.annotation), meaning(cls, key).replace("|", "\\|")
        mark = "°" if key in known or field.exclude is True else ""
        kind = type_text(field.annotation) + (f", {limits(field)}" if limits(field) else "")
        if inner is not None:
            kind = kind.replace("section", f"[section](#{slug(anchors.setdefault(inner, f'{place}.{key}'))})")
        default = default_text(field)
        if key in by_run:
            default = "set by the run" if default in ("**required**", "`null`", "`[]`", "its defaults") else f"{default}, or set by the run"
        yield f"| `{key}`{mark} | {kind} | {default} | {text[:1].upper() + text[1:]} |"


def slug(heading: str) -> str:
    """Anchor of a heading."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


class Page:
    """Lines of the page. A section that several keys hold is described once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.anchors: dict[type[BaseModel], str] = {CatalogConfig: "catalog", RayConfig: "ray"}

    def add(self, cls: type[BaseModel], place: str, text: str = "", *, by_run: set[str] = frozenset(), level: int = 2) -> None:
        """Heading, sentence and table of a section, followed by the sections below it that are not described yet."""
        self.lines += ["", f"{'#' * level} `{place}`", "", text or first_sentence(cls), ""]
        common = StageConfig.model_fields if issubclass(cls, StageConfig) and cls is not StageConfig else ()
        keys = [key for key in cls.model_fields if key not in common]
        known = set(self.anchors)
        self.lines += table(cls, place, keys, by_run, self.anchors)
        for key in keys:
            inner = section_of(cls.model_fields[key].annotation)
            if inner is not None and inner not in known:
                known.add(inner)
                self.add(inner, f"{place}.{key}", level=3)


def filled_by_runs() -> dict[str, set[str]]:
    """Stage -> keys that a run with all stages fills in."""
    data = {
        "name": "shop",
        "catalog": {"items": "items.parquet", "sequences": "sequences.parquet"},
        **{stage: GIVEN.get(stage, {}) for stage in STAGES},
    }
    configs = stage_configs(data, "the reference").items()
    return {stage: set(config.model_fields_set) - set(GIVEN.get(stage, ())) for stage, config in configs}


def page() -> str:
    """The whole page.

    Raises:
        ConfigError: a key has no meaning; the message lists all such keys.
    """
    stages = {stage: config_class(stage) for stage in STAGES}
    bench = {"dataset": DatasetConfig, "suite": SuiteConfig, "suite (new items)": NewItemsSuite}
    missing = [name for cls in (RunHeader, StageConfig, *stages.values(), QuantizeConfig, *bench.values()) for name in undescribed(cls)]
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise ConfigError(f"keys without a meaning: {names}; describe each in the `Attributes:` of its class")
    by_run, written = filled_by_runs(), Page()
    written.add(RunHeader, "top of the file")
    written.add(CatalogConfig, "catalog")
    written.add(StageConfig, "every stage", "Keys that every section of a stage has.", by_run=set(StageConfig.model_fields))
    for stage, cls in stages.items():
        function = API.get(stage, stage)
        text = f"{first_sentence(getattr(mmsid.api, function))} Python: [`mmsid.{function}`](api.md#mmsid.{function})."
        base = next((other for other, one in stages.items() if one in cls.__mro__[1:]), None)
        if base is None:
            written.add(cls, stage, text, by_run=by_run[stage])
        else:
            written.lines += ["", f"## `{stage}`", "", f"{text} {first_sentence(cls)} See [`{base}`](#{base})."]
    written.add(RayConfig, "ray")
    written.add(QuantizeConfig, "quantize", "Keys of `mmsid.quantize_vectors`, options of `mmsid quantize`. It is no section of a run.")
    written.lines += ["", "## Files of `mmsid bench`", "", "`--dataset` and `--suite` name a YAML file each, see [Measure](measure.md)."]
    for name, cls in bench.items():
        written.add(cls, name, level=3)
    return INTRODUCTION + "\n".join(written.lines) + "\n"


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{PAGE} differs from the configuration classes; run `python {Path(__file__).name}` in scripts/")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
