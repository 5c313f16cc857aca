"""Sources of tables in configurations, and the files behind them: a file, a folder of parts, a pattern, a saved data set, a hub id."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmsid.catalog.sources.contents import FORMAT_OF_SUFFIX, table_suffix
from mmsid.catalog.sources.hub import PREFIX, saved_files
from mmsid.errors import CatalogError

Source = Path | str
_RARELY_PARTS = (".txt", ".json", ".xml")  # notes and metadata beside the parts of a folder


@dataclass(frozen=True)
class LocatedFiles:
    """Files of a local source in the order of reading, and what is to be said about them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def as_source(value: Any) -> Any:
    """A local source as a path, a hub id as text, a list of several as a tuple, a list of one as its element.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, (list, tuple)) and value:
        found = tuple(map(as_source, value))
        return found[0] if len(found) == 1 else found
    if isinstance(value, (str, Path)):
        return str(value) if is_hub(value) else Path(value)
    raise ValueError(f"{value!r} is no source; name a file, a folder, a pattern, hf:OWNER/NAME, or a list of these")


def is_hub(source: Source) -> bool:
    """Whether a source is a data set of the Hugging Face hub."""
    return str(source).startswith(PREFIX)


def sources_of(source: Source | Sequence[Source] | None) -> tuple[Source, ...]:
    """One source, several or none as a tuple."""
    if source is None:
        return ()
    return (as_source(source),) if isinstance(source, (str, Path)) else tuple(map(as_source, source))


def shown(source: Source | Sequence[Source]) -> str:
    """A source in messages."""
    return ", ".join(map(str, sources_of(source)))


def folder_of(source: Source | Sequence[Source]) -> Path:
    """Folder of the first local source: the folder of a file, a folder itself, the fixed beginning of a pattern."""
    for one in sources_of(source):
        if is_hub(one):
            continue
        path = Path(one)
        if path.is_dir():
            return path
        while _is_pattern(path.parent):
            path = path.parent
        return path.parent
    return Path()


def missing_sources(source: Source | Sequence[Source] | None) -> list[Path]:
    """Local sources that do not exist."""
    local = [Path(one) for one in sources_of(source) if not is_hub(one)]
    return [path for path in local if not path.exists() and not (_is_pattern(path) and glob.glob(str(path), recursive=True))]


def local_files(source: Source | Sequence[Source] | None) -> list[Path]:
    """All local files of a source. A source that does not exist stands for itself."""
    found: list[Path] = []
    for one in sources_of(source):
        if not is_hub(one):
            found += [Path(one)] if missing_sources(one) else locate(one, "catalog").files
    return found


def named_files(name: str, source: Source | Sequence[Source] | None) -> dict[str, Path | None]:
    """Name -> local file of a source: `name`, `name 2`, ...; `name` -> None if no file is local."""
    files = local_files(source) or [None]
    return {name if number == 1 else f"{name} {number}": file for number, file in enumerate(files, start=1)}


def locate(source: Source, config_key: str) -> LocatedFiles:
    """Files of one local source.

    Raises:
        CatalogError: nothing is there, a folder holds no table, or tables of several formats.
    """
    path = Path(source)
    if path.is_dir():
        saved = saved_files(path)
        if saved is not None:
            return LocatedFiles(tuple(saved[0]), (f"{path}: {saved[1]}",))
        return _parts(path, config_key)
    if path.is_file():
        return LocatedFiles((path,))
    if _is_pattern(path):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files and len(folders := [match for match in matches if match.is_dir()]):
            parts = [locate(folder, config_key) for folder in folders]
            return LocatedFiles(tuple(file for one in parts for file in one.files), tuple(note for one in parts for note in one.notes))
        if not files:
            raise CatalogError(f"{config_key}: no file matches {path} (working folder {Path.cwd()}); correct the pattern")
        return LocatedFiles(tuple(files), (f"{path}: {len(files)} files",))
    raise CatalogError(f"{config_key}: {path} does not exist or is not a file (working folder {Path.cwd()}); correct the path")


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(str(path))


def _parts(folder: Path, config_key: str) -> LocatedFiles:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith((".", "_"))]
    if not any(table_suffix(path) in FORMAT_OF_SUFFIX for path in files):
        inner = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [path for path in inner if not any(name.startswith((".", "_")) for name in path.relative_to(folder).parts)]
    kinds = Counter(table_suffix(path) for path in files if table_suffix(path) in FORMAT_OF_SUFFIX)
    main = [kind for kind in kinds if kind not in _RARELY_PARTS] or list(kinds)
    if not main:
        raise CatalogError(f"{config_key}: the folder {folder} holds no table; name a folder with parquet, csv or jsonl files")
    if len(main) > 1:
        listed = ", ".join(f"{kinds[kind]} {kind}" for kind in main)
        raise CatalogError(
            f"{config_key}: the folder {folder} holds tables of several formats ({listed}); name one, as {folder}/*{main[0]}"
        )
    parts = [path for path in files if table_suffix(path) == main[0]]
    others = [str(path.relative_to(folder)) for path in files if path not in set(parts)]
    rest = f"; not read: {', '.join(others[:5])}{f' and {len(others) - 5} more' if len(others) > 5 else ''}" if others else ""
    return LocatedFiles(tuple(parts), (f"{folder}: {len(parts)} {main[0]} files{rest}",))
