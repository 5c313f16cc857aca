"""Local picture files: paths confined to a root, repaired when the plain path is missing, read through one checked handle.

A catalogue may come from strangers, and so may the folder with its pictures. Without confinement, a row with `../../.ssh/id_rsa`, or a
link of that target in an unpacked archive, would make mmsid read private files and show them in captions and reports. Three rules hold:

1. The path as written must stay below the root. It is normalised as text first, so `..` cannot climb out through a link. An absolute
   path must begin with the root.
2. Links are resolved, and their final target must be below the root, below a folder of `pictures.link_targets`, or, if the root is a
   snapshot of the Hugging Face cache (`REPOSITORY/snapshots/REVISION`), below `REPOSITORY/blobs`, where that cache keeps the files. The
   first comes from the user's configuration and the second from the user's choice of the root. Nothing inside the root decides it.
   The root itself may be a link, because the user names it.
3. The resolved path is opened without following links, and only a regular file is read. A link that is exchanged after the check, a pipe
   and a device are refused.
"""

from __future__ import annotations

import functools
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mmsid.catalog.config import PictureLimits
from mmsid.catalog.picture_sources.reasons import refusal
from mmsid.errors import PictureError

Roots = Path | str | Sequence[Path] | None


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A picture file that passed the checks of its path.

    Attributes:
        path: absolute path, with links as written.
        real: the same with all links resolved.
        repaired: '' or the path that was found instead of the plain one, relative to the root.
    """

    path: str
    real: str
    repaired: str = ""


def find_file(path: str | Path, limits: PictureLimits, root: Roots) -> LocalFile:
    """Find the file of a path below `root`. With several roots, a relative path starts at the first and may end below any.

    A plain path that does not exist is tried again in other spellings: backslashes as separators, without the query of a URL, with
    percent signs decoded, and with accents composed or decomposed as other systems write them. Each is confined like the plain path.

    Raises:
        PictureError: `outside_root`, or `not_a_file` for a name that no file system accepts. A missing file does not raise here.
    """
    text = str(path)
    try:
        plain = _confined(text, limits, root)
        if not _exists(plain.real):
            for spelling in _spellings(text):
                if (found := _confined_or_none(spelling, limits, root)) is not None and _exists(found.real):
                    return LocalFile(found.path, found.real, spelling)
        return plain
    except (ValueError, OSError):  # NUL bytes, or names that no file system accepts
        raise refusal("not_a_file", path) from None


def read_file(file: LocalFile, limits: PictureLimits, reference: str | Path) -> tuple[bytes, int]:
    """Bytes of the file, and its time of modification in nanoseconds.

    Raises:
        PictureError: `missing`, `unreadable`, `not_a_file` or `too_many_bytes`.
    """
    try:
        # O_NOFOLLOW: links are resolved already, so a link here was swapped in since. O_NONBLOCK: opening a pipe must not block.
        handle = os.open(file.real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise refusal("missing", reference) from None
    except (OSError, ValueError):
        raise refusal("unreadable", reference) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise refusal("not_a_file", reference)
        if status.st_size > limits.max_bytes:
            raise refusal("too_many_bytes", reference)
        parts = [os.read(handle, status.st_size + 1)]  # one byte more than expected, to notice a file that grows
        while parts[-1] and sum(map(len, parts)) <= limits.max_bytes:
            parts.append(os.read(handle, 1_000_000))
        data = b"".join(parts)
    except OSError:
        raise refusal("unreadable", reference) from None
    finally:
        os.close(handle)
    if len(data) > limits.max_bytes:  # the file grew after fstat
        raise refusal("too_many_bytes", reference)
    return data, status.st_mtime_ns


def _exists(path: str) -> bool:
    return os.access(path, os.F_OK)


def _confined_or_none(path: str, limits: PictureLimits, root: Roots) -> LocalFile | None:
    try:
        return _confined(path, limits, root)
    except PictureError:
        return None


def _confined(path: str, limits: PictureLimits, root: Roots) -> LocalFile:
    if root is None:
        real = os.path.realpath(path)
        return LocalFile(os.path.abspath(path), real)
    roots = [root] if isinstance(root, (str, Path)) else list(root)
    written = os.path.join(os.path.abspath(roots[0]), path)
    lexical = os.path.normpath(written)
    for one in roots:
        absolute, real_root = _root_paths(str(one))
        if not (_is_below(lexical, absolute) or _is_below(lexical, real_root)):
            continue
        real = os.path.realpath(lexical)
        allowed = (real_root, *_snapshot_blobs(real_root), *(_root_paths(str(folder))[1] for folder in limits.link_targets))
        if any(_is_below(real, folder) for folder in allowed):
            return LocalFile(written, real)
        raise refusal("outside_root", path, "it is a link" if real != lexical else "")
    raise refusal("outside_root", path)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


@functools.lru_cache(maxsize=64)
def _root_paths(root: str) -> tuple[str, str]:
    """Absolute path of a folder, as written and with links resolved. Cached: the folders come from the configuration and are few."""
    return os.path.abspath(root), os.path.realpath(root)


@functools.lru_cache(maxsize=64)
def _snapshot_blobs(real_root: str) -> tuple[str, ...]:
    """The folder `blobs` of the Hugging Face cache, if `real_root` is below `snapshots/REVISION` of a repository."""
    parts = Path(real_root).parts
    places = [at for at, part in enumerate(parts[:-1]) if part == "snapshots"]
    return tuple(os.path.join(*parts[:at], "blobs") for at in places)


def _spellings(path: str) -> Iterator[str]:
    """Other spellings of a path, nearest first, without the path itself."""
    texts = [path]
    for change in (str.strip, lambda text: text.replace("\\", "/"), _without_query, unquote):
        texts += [changed for text in list(texts) if (changed := change(text)) not in texts]
    for text in list(texts):
        texts += [changed for form in ("NFC", "NFD") if (changed := unicodedata.normalize(form, text)) not in texts]
    return iter(texts[1:])


def _without_query(text: str) -> str:
    return text.split("?", 1)[0].split("#", 1)[0] or text
