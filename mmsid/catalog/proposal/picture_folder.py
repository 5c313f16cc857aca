"""The folder that picture paths start from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_TRIED = 50
_URL = re.compile(r"^[a-z][a-z0-9+.-]*:", re.I)


def picture_root(references: Sequence[str], default: Path, folders: Sequence[Path]) -> tuple[Path | None, str]:
    """Folder to set as `image_root`, None if the default does, and a sentence on what was found.

    Args:
        references: texts of the image column. URLs and base64 texts need no folder.
        default: folder of the items table.
        folders: folders that were named; they and their inner folders are tried, two levels deep.
    """
    paths = [text.replace("\\", "/") for text in references if not _URL.match(text) and len(text) < 1024][:_TRIED]
    if not paths:
        return None, ""
    candidates = [default, *folders]
    for folder in (default, *folders):
        if folder.is_dir():
            inner = sorted(path for path in folder.iterdir() if path.is_dir())
            candidates += [*inner, *(path for one in inner[:100] for path in sorted(one.iterdir())[:100] if path.is_dir())]
    found = {folder: sum((folder / path).is_file() for path in paths) for folder in dict.fromkeys(candidates)}
    best = max(found, key=lambda folder: found[folder])
    if not found[best]:
        return None, f"none of the first {len(paths)} pictures was found (for example {paths[0]!r} below {default}); set catalog.image_root"
    said = f"{found[best]} of the first {len(paths)} pictures were found below {best}"
    return (None if found[best] == found[default] else best), said
