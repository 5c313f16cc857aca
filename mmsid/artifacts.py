"""Artefact folders: atomic writing with a manifest and checksums, typed readers, hashes. Pickles are refused.

A stage writes into a draft folder (`.<name>.draft`), fsyncs every file, writes `SHA256SUMS` and `manifest.json` last, and renames
the folder. A folder without a manifest is unfinished and is never read. A file that differs from its checksum is refused.
A finished folder is written again inside `rewriting` only, and stays until the new one is published.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from pydantic import BaseModel

from mmsid._version import __version__
from mmsid.config import StageConfig
from mmsid.disk import disk_errors, folder_lock, fsync, replacing
from mmsid.errors import ArtifactError
from mmsid.identity import deciding
from mmsid.progress import is_main_process

if TYPE_CHECKING:
    import pyarrow as pa  # imported by the functions that need them, so that the command line starts fast
    import torch

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
_POLL_SECONDS = 0.2
MARKER = "draft.json"  # hash of the configuration and inputs of a draft

ConfigT = TypeVar("ConfigT", bound=StageConfig)
Parameters = ParamSpec("Parameters")
_STARTED = time.time()  # of this process
_rewritten: ContextVar[frozenset[Path]] = ContextVar("_rewritten", default=frozenset())


@dataclass
class Draft:
    """An artefact folder that is being written.

    Attributes:
        path: the draft folder; files go here.
        counts: row counts for the manifest.
        extra: further JSON data for the manifest.
        scratch: names of files, such as checkpoints, that are deleted after the folder is published.
    """

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    scratch: set[str] = field(default_factory=set)


@contextlib.contextmanager
def writing(
    out: Path, *, stage: str, config: BaseModel | Mapping[str, Any], inputs: Mapping[str, Path | None] | None = None, resume: bool = False
) -> Iterator[Draft]:
    """Write the artefact folder `out` atomically.

    An exception leaves the draft in place and publishes nothing. Under `accelerate launch` only rank 0 locks, writes the manifest
    and publishes. The other ranks get the same draft path and must call `accelerator.wait_for_everyone()` before they read from it.

    Args:
        inputs: name -> folder or file that the stage reads; their hashes enter the manifest.
        resume: keep an unfinished draft of the same configuration and inputs (`mmsid.identity`). Any other draft is deleted.

    Raises:
        ArtifactError: `out` is finished already (and not in `rewriting`), holds foreign files, is being written by another job, or the
            disk is full or read-only. Finished work is kept.
    """
    out = Path(out)
    draft_path = out.parent / f".{out.name}.draft"
    if not is_main_process():
        yield Draft(draft_path)
        return
    kept = f"What is finished is kept in {draft_path}." if resume else "Nothing was published."
    with disk_errors(out, kept), contextlib.ExitStack() as lock:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.enter_context(folder_lock(out))
        restore(out)
        finished = is_complete(out)
        if finished and not is_rewritten(out):
            raise ArtifactError(f"{out} is finished already; remove it or run `mmsid {stage} --redo` to write it again")
        if not finished and out.exists() and any(out.iterdir()):
            raise ArtifactError(f"{out} holds files but no {MANIFEST}, so mmsid did not write it; name another folder")
        inputs = {name: Path(path) for name, path in (inputs or {}).items() if path is not None}
        settings = {"stage": stage, "config": plain(config), "inputs": input_hashes(inputs), "schema_version": SCHEMA_VERSION}
        identity = settings | {"config": deciding(config, settings["config"], inputs)}
        _open_draft(draft_path, sha256(identity), resume)
        draft, started = Draft(draft_path), time.monotonic()  # wall-clock time may jump
        yield draft
        manifest = settings | {
            "identity_sha256": sha256(identity | {"package_version": __version__}),
            "input_paths": {name: str(path) for name, path in inputs.items()},
            "package_version": __version__,
            "seed": settings["config"].get("seed"),
            "counts": draft.counts,
            "extra": draft.extra,
            "wall_seconds": round(time.monotonic() - started, 3),
            "finished_unix": round(time.time()),
        }
        _check_counts(draft.counts, out)
        _write_checksums(draft_path, draft.scratch)
        write_json(draft_path / MANIFEST, manifest)
        fsync(draft_path)
        if finished:
            shutil.rmtree(_earlier(out), ignore_errors=True)
            os.replace(out, _earlier(out))
        elif out.exists():
            out.rmdir()
        os.replace(draft_path, out)
        fsync(out.parent)
        shutil.rmtree(_earlier(out), ignore_errors=True)
        for name in (*sorted(draft.scratch), MARKER):  # after the rename: a draft without its marker would be deleted
            (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def rewriting(out: Path) -> Iterator[None]:
    """Inside this context, `writing(out)` replaces a folder that is finished already. The old one stays until the new one is complete."""
    token = _rewritten.set(_rewritten.get() | {Path(out).absolute()})
    try:
        yield
    finally:
        _rewritten.reset(token)


def is_rewritten(out: Path) -> bool:
    """Whether a finished folder is to be written again: `rewriting(out)` is active."""
    return Path(out).absolute() in _rewritten.get()


def restore(out: Path) -> None:
    """Finish what a process that was killed while it published left undone.

    Between the two renames that replace a folder, the earlier folder is put back. After them, the draft's marker and scratch files go.
    """
    out = Path(out)
    if is_complete(_earlier(out)):
        if is_complete(out):
            shutil.rmtree(_earlier(out), ignore_errors=True)
        elif not out.exists():
            os.replace(_earlier(out), out)
    if is_complete(out) and (out / MARKER).exists() and (out / CHECKSUMS).is_file():
        kept = {MARKER, MANIFEST, CHECKSUMS} | _checksums(out).keys()
        for path in out.rglob("*"):
            if path.is_file() and path.relative_to(out).as_posix() not in kept:
                path.unlink(missing_ok=True)
        (out / MARKER).unlink(missing_ok=True)


def _earlier(out: Path) -> Path:
    return Path(out).parent / f".{Path(out).name}.earlier"


def on_main_process(run: Callable[Concatenate[ConfigT, Parameters], Path]) -> Callable[Concatenate[ConfigT, Parameters], Path]:
    """Decorator of a stage that works in one process: under a launcher, rank 0 runs it and the other ranks wait for its folder.

    Waiting has no time limit, because the launcher ends all ranks when one of them fails.
    """

    @functools.wraps(run)
    def run_once(config: ConfigT, *arguments: Parameters.args, **options: Parameters.kwargs) -> Path:
        if is_main_process():
            return run(config, *arguments, **options)
        since = _STARTED if is_rewritten(config.out) else 0.0
        while not _is_published(config.out, since):
            time.sleep(_POLL_SECONDS)
        return config.out

    return run_once


def _is_published(out: Path, since: float) -> bool:
    try:
        return (out / MANIFEST).stat().st_mtime >= since
    except FileNotFoundError:  # also for a moment while a folder is replaced
        return False


def read_manifest(folder: Path, stage: str | None = None) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        ArtifactError: no manifest (unfinished), a damaged one, another schema version, or another stage than `stage`.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        state = "is unfinished" if Path(folder).exists() else "does not exist"
        raise ArtifactError(f"{folder} {state} (no {MANIFEST}); run the stage that writes it{f' ({stage})' if stage else ''} first")
    manifest = read_json(path)
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: schema version {found!r}, this mmsid reads {SCHEMA_VERSION}; write the folder again")
    missing = [key for key in ("stage", "config", "inputs", "input_paths", "package_version") if key not in manifest]
    if missing:
        raise ArtifactError(f"{path}: key {missing[0]!r} is missing, so it was damaged or written by hand; write the folder again")
    if stage is not None and manifest.get("stage") != stage:
        found = manifest.get("stage")
        raise ArtifactError(f"{folder} was written by stage {found!r}, expected {stage!r}; check the path in the configuration")
    return manifest


def is_complete(folder: Path) -> bool:
    """True if the folder has a manifest, that is, if it was published."""
    return (Path(folder) / MANIFEST).is_file()


def manifest_folder(folder: Path) -> Path:
    """The folder that holds the manifest of `folder`: itself, or its parent if it is a part of a stage's output (`refine/sids`)."""
    folder = Path(folder)
    return folder.parent if not is_complete(folder) and is_complete(folder.parent) else folder


def verify_folder(folder: Path) -> None:
    """Compare every file of a finished folder with its checksum. Folders without `SHA256SUMS` pass.

    Raises:
        ArtifactError: files are missing or differ from their checksums; the message names them.
    """
    wrong = [state for name, digest in _checksums(folder).items() if (state := _state(Path(folder) / name, digest))]
    if wrong:
        raise _damaged(Path(folder), wrong)


def verify_file(path: Path) -> None:
    """`verify_folder` for one file of a finished folder, at most two levels deep. Files outside of such folders pass."""
    path = Path(path)
    for folder in list(path.parents)[:3]:
        digest = _checksums(folder).get(path.relative_to(folder).as_posix())
        if digest is not None:
            if state := _state(path, digest):
                raise _damaged(folder, [state])
            return


def _write_checksums(folder: Path, scratch: set[str]) -> None:
    """Fsync every file and list its hash in the format of `sha256sum -c`."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in {MARKER, MANIFEST, CHECKSUMS} | scratch:
            fsync(path)
            lines.append(f"{file_sha256(path)}  {name}\n")
    write_text(folder / CHECKSUMS, "".join(lines))


def _checksums(folder: Path) -> dict[str, str]:
    """Relative file name -> listed hash; {} without a list."""
    path = Path(folder) / CHECKSUMS
    if not (path.is_file() and is_complete(folder)):
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is damaged: not UTF-8 text; write the folder again") from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _state(path: Path, digest: str) -> str | None:
    """Description of a missing or changed file, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    found = file_sha256(path)
    return None if found == digest else f"{path.name} has sha256 {found[:12]}, expected {digest[:12]}"


def _damaged(folder: Path, wrong: list[str]) -> ArtifactError:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    stage = read_manifest(folder)["stage"]
    return ArtifactError(
        f"{folder} is damaged: {'; '.join(wrong[:3])}{more}. Copy it again from an intact copy or run `mmsid {stage} --redo`"
    )


def input_hashes(inputs: Mapping[str, Path | None]) -> dict[str, str]:
    """Hash of each input: a finished folder by its content, or by what decided its content (`mmsid.identity`); a file by its bytes."""
    hashes = {}
    for name, path in sorted(inputs.items()):
        if path is None:
            continue
        if Path(path).is_dir():
            manifest = read_manifest(path)
            verify_folder(path)
            content = manifest.get("extra", {}).get("content_sha256")  # of a folder that is known by its content, wherever it was made from
            content = content or manifest.get("identity_sha256")  # folders of earlier versions lack it
            hashes[name] = content or sha256({key: manifest[key] for key in ("stage", "config", "inputs", "package_version")})
        elif Path(path).is_file():
            hashes[name] = file_sha256(path)
        else:
            raise ArtifactError(f"input {name}: {path} does not exist; run the stage that writes it or correct the path")
    return hashes


def plain(value: Any) -> Any:
    """Convert `value` to JSON data: pydantic models become dicts, paths become strings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return json.loads(json.dumps(value, default=str))


def sha256(value: bytes | str | Any) -> str:
    """Hex digest of bytes, of text (UTF-8), or of JSON-able data with sorted keys."""
    if isinstance(value, BaseModel):
        value = plain(value)
    if not isinstance(value, (bytes, str)):
        value = json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (temporary file, fsync, rename). NaN raises ValueError."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises ArtifactError with the path if the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({type(error).__name__}); write the folder again") from error


def write_table(path: Path, table: pa.Table | list[dict[str, Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write a parquet file atomically. `metadata` (text to text) is stored in the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(table, pa.Table):
        table = pa.Table.from_pylist(table)
    if metadata is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **{key: str(value) for key, value in metadata.items()}})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """Read a parquet file. Raises ArtifactError with the path if the file is missing, damaged, or fails a page checksum."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        table.column_names  # noqa: B018 (raises on names that are not UTF-8)
        return table
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as parquet ({type(error).__name__}); write the folder again") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(temporary), metadata=dict(metadata or {})
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Other formats, pickles above all, are refused.

    Raises:
        ArtifactError: the file is missing, damaged, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if Path(path).suffix != ".safetensors":
        raise ArtifactError(f"{path}: only .safetensors is read (a pickle can run code); convert it first")
    try:
        return load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"{path} is missing or is not a whole safetensors file ({type(error).__name__}); write the folder again"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """`read_tensors` for model weights. NaN and infinite values are refused.

    Raises:
        ArtifactError: as `read_tensors`, or a tensor holds such a value; the message names the first tensor.
    """
    import torch

    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArtifactError(f"{path}: {name} holds {bad} NaN or infinite of {tensor.numel()} values; restore the file or train again")
    return tensors


def _check_counts(counts: Mapping[str, int], out: Path) -> None:
    if {"in", "ok", "quarantined"} <= counts.keys() and counts["in"] != counts["ok"] + counts["quarantined"]:
        raise ArtifactError(
            f"{out}: rows do not add up: in {counts['in']} != ok {counts['ok']} + quarantined {counts['quarantined']}; "
            "this is a bug, please report it"
        )


def _open_draft(path: Path, identity: str, resume: bool) -> None:
    marker = path / MARKER
    if path.exists():
        same = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace") == _marker(identity)
        if not (resume and same):
            shutil.rmtree(path)
        for partial in path.rglob(".*.tmp"):  # left by a process that was killed while it wrote
            partial.unlink()
    path.mkdir(exist_ok=True)
    if not marker.exists():
        write_text(marker, _marker(identity))


def _marker(identity: str) -> str:
    return json.dumps({"identity": identity}) + "\n"
