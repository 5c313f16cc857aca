"""Stage `ingest`: the user's sources are read once and written as one folder, which all later stages open memory-mapped."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mmsid._version import __version__
from mmsid.artifacts import file_sha256, is_complete, is_rewritten, read_manifest, read_table, restore, rewriting, writing
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.fields import not_read_text
from mmsid.catalog.ingest.build import build
from mmsid.catalog.ingest.built import Built
from mmsid.catalog.ingest.writing import ITEMS, PROBLEMS
from mmsid.catalog.item_table import ItemTable
from mmsid.catalog.picture_sources.reasons import MAY_PASS
from mmsid.catalog.pictures import InspectedPicture
from mmsid.config import StageConfig
from mmsid.progress import done, is_main_process
from mmsid.ray_pool import Engine, RayConfig

STAGE = "ingest"
_SECONDS_BETWEEN_LOOKS = 1.0
_MISSING = "picture_missing"


class IngestConfig(StageConfig):
    """Keys of the section `ingest`.

    Attributes:
        catalog: the sources.
        max_problems: share of the rows, of the pictures, or of the interactions that may be unusable. Above it the stage stops with the
            likely cause. A draft can be resumed with another value.
        ray: options of `--engine ray`, which looks at the pictures; not part of the manifest.
    """

    execution_keys: ClassVar[tuple[str, ...]] = ("max_problems",)

    catalog: CatalogConfig
    max_problems: float = Field(default=0.5, ge=0.0, le=1.0)
    ray: RayConfig = Field(default=RayConfig(), exclude=True)

    def inputs(self) -> dict[str, Path | None]:
        """The local files of all tables."""
        return self.catalog.input_files()


def run(config: IngestConfig, engine: Engine = "local") -> Path:
    """Read the sources, unless the folder is finished and they have not changed. Returns the folder.

    It contains `items.arrow` (`item_table.SCHEMA`, in canonical order), `problems.parquet`, and `histories/` and `vectors.npy` where the
    catalogue has them. Under `accelerate launch` rank 0 reads, and the other ranks wait.

    Raises:
        CatalogError: a source is unusable, or more than `max_problems` of its rows or pictures are.
    """
    if not is_main_process():
        while not is_current(config):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return config.out
    restore(config.out)
    if is_current(config) and not is_rewritten(config.out):
        done(f"{STAGE}: the sources are unchanged, kept ({config.out})")
        return config.out
    known = _pictures(config.out, config.catalog.root) if is_complete(config.out) and not is_rewritten(config.out) else {}
    with rewriting(config.out):
        built = _write(config, known, config.ray if engine == "ray" else None)
    for line in summary(built):
        done(f"{STAGE}: {line}")
    done(f"{STAGE}: wrote {built.items:,} items to {config.out}")
    return config.out


def _write(config: IngestConfig, known: dict[str, InspectedPicture], ray: RayConfig | None) -> Built:
    catalog = config.catalog
    files = {name: path for name, path in config.inputs().items() if path is not None}
    with writing(config.out, stage=STAGE, config=config, inputs=files, resume=True) as draft:
        built = build(catalog, draft.path, config.max_problems, known, ray)
        draft.counts |= {"in": built.rows, "ok": built.rows - built.quarantined, "quarantined": built.quarantined}
        draft.counts |= {"items": built.items, "merged": built.merged}
        sources = {name: _state(path) for name, path in files.items()}
        draft.extra |= {**built.to_json(), "content_sha256": built.catalog_sha256, "sources": sources, "working_folder": str(Path.cwd())}
        draft.extra["picture_cache"] = str(catalog.picture_cache.absolute())
    return built


def summary(built: Built) -> list[str]:
    """What a person should know of the sources, one line per fact."""
    lines = list(built.notes)
    if built.not_read:
        lines.append(not_read_text(built.not_read))
    if built.formats:
        lines.append("pictures: " + ", ".join(f"{count:,} {name}" for name, count in built.formats.most_common()))
    problems = built.problems + built.history_problems
    if problems:
        lines.append("problems: " + ", ".join(f"{code} {count:,}" for code, count in problems.most_common()))
    if failed := sum(count for code, count in problems.items() if code.removeprefix("picture_") in MAY_PASS):
        lines.append(f"{failed:,} downloads failed for reasons that may pass; `mmsid ingest --redo` asks for them again")
    if built.quarantined:
        lines.append(f"{built.quarantined:,} of {built.rows:,} rows are no items (problems.parquet lists them)")
    return lines


def is_current(config: IngestConfig) -> bool:
    """Whether the folder is finished, was made with these keys, and the sources and pictures have not changed since.

    A file counts as unchanged if size and time are the same, or if its hash is.
    """
    if not is_complete(config.out):
        return False
    manifest = read_manifest(config.out, STAGE)
    made = CatalogConfig(**manifest["config"]["catalog"])
    files = {name: path for name, path in config.inputs().items() if path is not None}
    sources: dict[str, Any] = manifest["extra"]["sources"]
    if (
        made.reading(Path(manifest["extra"]["working_folder"])) != config.catalog.reading()
        or manifest["package_version"] != __version__
        or files.keys() != sources.keys()
    ):
        return False
    for name, path in files.items():
        if not path.is_file():
            return False
        now, was = _state(path), sources[name]
        if now["size"] != was["size"] or (now["mtime_ns"] != was["mtime_ns"] and file_sha256(path) != manifest["inputs"][name]):
            return False
    return not _pictures_changed(config)


def _state(path: Path) -> dict[str, int]:
    status = os.stat(path)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _pictures_changed(config: IngestConfig) -> bool:
    """Whether a picture file differs in size or time, or one that was missing is there now."""
    root = config.catalog.root.absolute()
    for chunk in ItemTable.open(config.out / ITEMS, root).table["creatives"].chunks:
        values = chunk.flatten()
        for path, size, mtime_ns in zip(*(values.field(name).to_pylist() for name in ("path", "num_bytes", "mtime_ns")), strict=True):
            try:
                status = os.stat(root / path)
            except OSError:
                return True
            if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                return True
    problems = read_table(config.out / PROBLEMS).select(["code", "detail"]).to_pylist()
    return any(problem["code"] == _MISSING and os.path.lexists(root / problem["detail"]) for problem in problems)


def _pictures(folder: Path, root: Path) -> dict[str, InspectedPicture]:
    """Stored path -> picture, for all pictures of an ingested catalogue."""
    items = ItemTable.open(folder / ITEMS, root)
    found = {}
    for chunk in items.table["creatives"].chunks:
        for creative in chunk.flatten().to_pylist():
            path = creative.pop("path")
            found[path] = InspectedPicture(path=root / path, reason=None, detail="", **creative)
    return found
