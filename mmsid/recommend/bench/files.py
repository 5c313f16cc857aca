"""Find and load data sets and suites of `mmsid bench`, shipped below `configs/bench/` or at any path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmsid.config import build, load_yaml
from mmsid.errors import ConfigError
from mmsid.recommend.bench.config import DatasetConfig, SuiteConfig
from mmsid.recommend.bench.new_items.config import NewItemsSuite


def load_dataset(name: str, overrides: Sequence[str] = ()) -> DatasetConfig:
    """Load a shipped data set by name, or a YAML file by path. `name` defaults to that of the file.

    Raises:
        ConfigError: the file does not exist or has an invalid key.
    """
    path = _find(name, "datasets")
    return build(DatasetConfig, {"name": path.stem} | load_yaml(path, overrides), source=str(path), section="")


def load_suite(name: str, overrides: Sequence[str] = ()) -> SuiteConfig | NewItemsSuite:
    """Load a shipped suite by name, or a YAML file by path. A suite with the key `protocols` is a new-item benchmark.

    Raises:
        ConfigError: the file does not exist or has an invalid key.
    """
    path = _find(name, "suites")
    data = load_yaml(path, overrides)
    return build(NewItemsSuite if "protocols" in data else SuiteConfig, data, source=str(path), section="")


def _find(name: str, kind: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    folder = _shipped() / kind
    if not (folder / f"{name}.yaml").is_file():
        shipped = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise ConfigError(f"bench: {name!r} is none of the shipped {kind} ({shipped}); use one of them or the path of a YAML file")
    return folder / f"{name}.yaml"


def _shipped() -> Path:
    """The folder `configs/bench` in the installed package or in the repository."""
    package = Path(__file__).resolve().parents[2]
    return next((folder / "configs" / "bench" for folder in (package, package.parent) if (folder / "configs" / "bench").is_dir()), package)
