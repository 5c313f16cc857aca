"""Opening of a catalogue's pictures under its limits, as one object that models take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmsid.catalog.config import CatalogConfig, PictureLimits
from mmsid.catalog.pictures import decode_picture, load_picture, picture_bytes


@dataclass(frozen=True)
class PictureOpener:
    """Function from the path of a picture to an RGB picture. It can be pickled.

    Attributes:
        limits: limits of size, format and time.
        roots: folders that the pictures stay below.
        cache: folder for what is computed from pictures.
    """

    limits: PictureLimits
    roots: tuple[Path, ...]
    cache: Path

    @classmethod
    def of(cls, config: CatalogConfig) -> PictureOpener:
        """Opener of the pictures of a catalogue."""
        return cls(config.pictures, config.picture_roots, config.picture_cache.absolute())

    def __call__(self, path: str | Path) -> Image.Image:
        """Open a picture. Raises PictureError as `load_picture`."""
        return load_picture(path, self.limits, self.roots)

    def read(self, path: str | Path) -> bytes:
        """Bytes of a picture file, not decoded. Raises PictureError as `load_picture`."""
        return picture_bytes(path, self.limits, self.roots)

    def decode(self, data: bytes, path: str | Path) -> Image.Image:
        """Decode the result of `read`. Raises PictureError as `load_picture`."""
        return decode_picture(data, self.limits, path)
