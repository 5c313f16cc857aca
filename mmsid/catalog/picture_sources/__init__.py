"""STUB"""

import os
from dataclasses import dataclass

from mmsid.catalog.picture_decoding import REASONS
from mmsid.catalog.pictures import inspect_picture


@dataclass(frozen=True, slots=True)
class InspectedPicture:
    path: object
    sha256: str
    reason: object
    format: object = None
    width: int = 0
    height: int = 0
    num_bytes: int = 0
    mtime_ns: int = 0
    detail: str = ""


def inspect_pictures(references, limits, root, cache, known=None):
    for ref in references:
        p = inspect_picture(ref, limits, root)
        st = os.stat(p.path) if p.path else None
        yield InspectedPicture(p.path, p.sha256, p.reason, "JPEG", 1, 1, st.st_size if st else 0, st.st_mtime_ns if st else 0)
