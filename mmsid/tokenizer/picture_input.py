"""Picture input of the tokenizer: features of an item's pictures beside the states of its backbone, for backbones that see no pixels.

Features (`mmsid.backbone.picture_features`) are averaged over the pictures of an item, standardised, scaled to unit length per encoder, and
projected on their principal components. The result has the mean square length of the backbone's content states, so that both halves
count alike in distances. An item without a readable picture gets zeros, which is the mean of all pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmsid.artifacts import sha256
from mmsid.backbone.picture_features import PictureEncoder, PictureEncoderName
from mmsid.backbone.query_tokens import QueryStates
from mmsid.catalog.picture_opener import PictureOpener
from mmsid.config import Section
from mmsid.errors import PictureError
from mmsid.progress import track
from mmsid.tokenizer.feature_cache import FeatureCache
from mmsid.tokenizer.inputs import ItemInput

DIM = 128  # principal components; docs/experiments/picture_encoders_and_ocr.md
COUNTS = ("read", "without_picture", "unreadable")  # items whose pictures are read, that have none, whose pictures cannot be read
SAMPLE = 20_000  # items that the components are fitted on
_VERSION = 1  # of the computation of features; entries of the cache belong to one version
_REMEMBERED = 100_000  # items whose vectors stay in memory


class PictureSettings(Section):
    """Picture input of a tokenizer: the encoders, and the dimension of the picture part of every state."""

    encoders: tuple[PictureEncoderName, ...]
    dim: int = Field(DIM, ge=1)


class PictureInput(nn.Module):
    """Vectors of the pictures of items. All weights are frozen: they are fitted once, and saved with the tokenizer.

    Args:
        open_picture: turns an entry of `item.pictures` into an RGB PIL image. With a `PictureOpener`, features of picture files are cached
            in its folder.

    Attributes:
        unread: pictures of an item -> why none of them could be read, for the items seen so far.
    """

    def __init__(self, settings: PictureSettings, open_picture: Callable[[Any], Any]) -> None:
        super().__init__()
        self.settings, self.open_picture = settings, open_picture
        self.encoder = PictureEncoder(settings.encoders)
        width = sum(self.encoder.widths)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("projection", torch.zeros(width, settings.dim))
        self.unread: dict[tuple[str, ...], str] = {}
        self._remembered: dict[tuple[str, ...], Tensor] = {}
        self._caches: dict[PictureEncoderName, FeatureCache] = {}

    def vectors(self, items: Sequence[ItemInput]) -> Tensor:
        """(n, dim) float32 on the CPU; zeros for items without a readable picture."""
        return torch.stack([self._vector(item.pictures) for item in items])

    def beside(self, output: QueryStates, vectors: Tensor) -> QueryStates:
        """States and mean content state with the picture vectors (B, dim) behind them: H -> H + dim."""
        states, pooled = output
        vectors = vectors.to(states)
        return QueryStates(torch.cat([states, vectors[:, None].expand(-1, states.shape[1], -1)], -1), torch.cat([pooled, vectors], -1))

    @torch.no_grad()
    def fit(self, items: Sequence[ItemInput], size: float, seed: int) -> dict[str, int]:
        """Read the pictures of all items once, and fit mean, deviation and components on a sample.

        Args:
            size: root of the mean square length of the vectors.

        Returns:
            Numbers of items, by the names in `COUNTS`.
        """
        self._remembered.clear()
        with_picture = [row for row, item in enumerate(items) if item.pictures]
        drawn = np.random.default_rng([seed, 23]).permutation(len(with_picture))[:SAMPLE]
        sample = {with_picture[place] for place in drawn}
        read, kept = 0, []
        for row in track(with_picture, what="pictures", unit="items"):
            features = self.features(items[row].pictures)
            read += features is not None
            if features is not None and row in sample:
                kept.append(features)
        if kept:
            x = torch.from_numpy(np.stack(kept)).float()
            self.mean.copy_(x.mean(0))
            self.deviation.copy_(x.std(0, correction=0).clamp_min(1e-3))
            self.projection.copy_(_principal_components(self._standardised(x.to(self.mean)).cpu(), self.settings.dim, size))
        return dict(zip(COUNTS, (read, len(items) - len(with_picture), len(with_picture) - read), strict=True))

    def _vector(self, pictures: tuple[Any, ...]) -> Tensor:
        key = tuple(map(str, pictures)) if all(isinstance(one, (str, Path)) for one in pictures) else None
        if key is not None and key in self._remembered:
            return self._remembered[key]
        features = self.features(pictures) if pictures else None
        vector = torch.zeros(self.settings.dim)
        if features is not None:
            with torch.no_grad():
                vector = (self._standardised(torch.from_numpy(features).float()[None].to(self.mean)) @ self.projection)[0].cpu()
        if key is not None and len(self._remembered) < _REMEMBERED:
            self._remembered[key] = vector
        return vector

    def _standardised(self, x: Tensor) -> Tensor:
        """Features (n, W) with unit deviation, each encoder's part scaled to unit length over the root of the number of encoders."""
        parts = ((x - self.mean) / self.deviation).split(self.encoder.widths, -1)
        return torch.cat([nn.functional.normalize(part, dim=-1) for part in parts], -1) / len(parts) ** 0.5

    def features(self, pictures: tuple[Any, ...]) -> np.ndarray | None:
        """Mean features (W,) of the pictures that can be read; None if there are none."""
        found, reason = [], ""
        for picture in pictures:
            try:
                found.append(self._features_of_one(picture))
            except PictureError as error:
                reason = reason or f"the picture cannot be opened ({error.reason})"
        if not found:
            self.unread.setdefault(tuple(map(str, pictures)), reason)
            return None
        return np.mean(found, 0, dtype=np.float32)

    def _features_of_one(self, picture: Any) -> np.ndarray:
        opener = self.open_picture
        if not isinstance(opener, PictureOpener) or not isinstance(picture, (str, Path)):
            return np.concatenate(self.encoder.features(opener(picture)))
        data, image, parts = opener.read(picture), None, []
        for name, cache in self._open_caches(opener.cache).items():
            features = cache.get(data)
            if features is None:
                image = opener.decode(data, picture) if image is None else image
                features = self.encoder.features_by(name, image)
                cache.put(data, features)
            parts.append(features)
        return np.concatenate(parts)

    def _open_caches(self, folder: Path) -> dict[PictureEncoderName, FeatureCache]:
        if not self._caches:
            for name, width in zip(self.encoder.names, self.encoder.widths, strict=True):
                self._caches[name] = FeatureCache(folder, sha256([_VERSION, name, self.encoder.fingerprint(name)]), width)
        return self._caches


def _principal_components(x: Tensor, dim: int, size: float) -> Tensor:
    """Projection (W, dim) of rows (n, W) on their principal components. Rows have the mean square length `size`^2 after it.

    Components without variance are zero, and the largest entry of the others is positive, so that the result is unique.
    """
    values, vectors = torch.linalg.eigh((x.double().T @ x.double()) / len(x))
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = torch.where(values > 1e-9 * values[0].clamp_min(1e-12), vectors, 0.0)
    found = torch.zeros(x.shape[1], dim)
    found[:, : vectors.shape[1]] = (vectors * (size / values.sum().clamp_min(1e-12).sqrt())).float()
    return found
