"""Semantic IDs from baseline methods, for comparison with the item tokenizer: random, category path, RQ-KMeans, balanced RQ, RQ-VAE.

All methods use the same text, co-engagement and collision handling as the tokenizer. Quantizers are fitted on MiniLM embeddings
(`space: text`, available for new items) or on [MiniLM ; PPMI-SVD of train co-engagement] (`space: fused`). Co-engagement comes from the
users of `Split.fit_histories` only; intrinsic metrics use the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from mmsid.artifacts import read_tensors, sha256, write_tensors
from mmsid.backbone.embed import embed_texts
from mmsid.catalog import Catalog, Item, Split
from mmsid.config import Section
from mmsid.errors import ConfigError
from mmsid.quantize import CodebookScores, fit_quantizer, fuse
from mmsid.quantize.fit import CODEBOOKS
from mmsid.sids import SidTable
from mmsid.sids.collisions import Policy
from mmsid.sids.exports import import_index_json, import_reference_sids
from mmsid.tokenizer.initialization import StartSettings, read_behaviour
from mmsid.tokenizer.inputs import FieldName, load_inputs
from mmsid.tokenizer.publish import publish

Method = Literal["random", "category_path", "rq_kmeans", "balanced_rq", "rq_vae"]


class MethodSpec(Section):
    """Settings of a SID method.

    Attributes:
        method: how the codes are made.
        space: the vectors that the quantizer is fitted on; unused by `random` and `category_path`.
        collisions: collision policy. `random` has no collisions; `category_path` has no scores to relocate by and needs `suffix`
            (items numbered within their path) or `none`.
        num_levels: L, codes per item.
        behaviour_weight: weight of the behaviour vectors beside the text, in the space `fused`.
        codebook_size: codes per level; `category_path` has as many as there are names at a depth.
    """

    method: Method
    space: Literal["text", "fused"] = "text"
    collisions: Policy = "relocate"
    num_levels: int = Field(3, ge=1, le=8)
    codebook_size: int = Field(256, ge=2)
    behaviour_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _relocatable(self) -> MethodSpec:
        if self.method == "category_path" and self.collisions == "relocate":
            raise ValueError("collisions is 'relocate', but category_path has no scores to relocate by; set it to 'suffix' or 'none'")
        return self


@dataclass
class MethodSources:
    """Inputs of SID methods; the text is embedded at most once.

    Attributes:
        captions, interests, use, max_length: the text that MiniLM embeds, as for the tokenizer.
        start: window and dimension of the co-engagement vectors; their weight is taken from the `MethodSpec`.
        cache: folder of text embeddings, named by the hash of the texts and shared by parallel processes.
    """

    catalog: Catalog
    split: Split | None = None
    captions: Path | None = None
    interests: Path | None = None
    use: tuple[FieldName, ...] | None = None
    max_length: int = 96
    start: StartSettings = field(default_factory=StartSettings)
    cache: Path | None = None

    @cached_property
    def text(self) -> np.ndarray:
        """Content of the items: MiniLM embeddings (N, 384) of the tokenizer's input texts, from the cache if they are in it.

        A catalogue with vectors gives these instead, (N, D), unless `use` leaves them out.
        """
        inputs, fields = load_inputs(self.catalog, self.captions, self.interests, self.use)
        if self.catalog.vectors is not None and "vectors" in fields:
            return self.catalog.vectors.normalised().values
        texts = [item.text for item in inputs]
        path = None if self.cache is None else Path(self.cache) / f"text-{sha256([texts, self.max_length])[:32]}.safetensors"
        if path is not None and path.is_file():
            return read_tensors(path)["embeddings"].numpy()
        embeddings = embed_texts(texts, max_length=self.max_length, what="baseline texts")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"embeddings": torch.from_numpy(embeddings)})
        return embeddings

    def behaviour(self, seed: int) -> np.ndarray:
        """Factorised train co-engagement (N, M); M = 0 without sequences. The seed is that of the decomposition."""
        return read_behaviour(self.catalog, self.split, self.start, seed).items.vectors

    def space(self, spec: MethodSpec, seed: int) -> np.ndarray:
        """Vectors (N, D) that the quantizer is fitted on."""
        if spec.space == "text":
            return self.text
        return fuse(self.text, self.behaviour(seed), spec.behaviour_weight)


def make_sids(spec: MethodSpec, sources: MethodSources, folder: Path, seed: int) -> SidTable:
    """Make SIDs, write them as a SID folder with intrinsic metrics, and return the table (rows as in the catalogue).

    The files are written one by one. Call this function inside `artifacts.writing` if the folder must appear as a whole.

    Raises:
        ConfigError: fewer SIDs than items (`random`), or no item has a category (`category_path`).
        MmsidError: more distinct items than SIDs under `relocate`.
    """
    items = sources.catalog.items
    name = f"baseline:{spec.method}" if spec.method in ("random", "category_path") else f"baseline:{spec.method}:{spec.space}"
    sizes: tuple[int, ...] = (spec.codebook_size,) * spec.num_levels
    common: dict[str, Any] = {"tokenizer_sha256": name, "seed": seed}
    if spec.method == "random":
        codes = random_codes([item.content_sha256 for item in items], spec.num_levels, spec.codebook_size, seed)
        return publish(folder, sources.catalog, sources.split, codes, sizes, collisions="none", scores=None, **common)[0]
    if spec.method == "category_path":
        codes, sizes = category_codes(items, spec.num_levels)
        return publish(folder, sources.catalog, sources.split, codes, sizes, collisions=spec.collisions, scores=None, **common)[0]
    space = sources.space(spec, seed)
    quantizer = fit_quantizer(spec.method, space, spec.num_levels, spec.codebook_size, seed)
    codebooks, raw_codes = quantizer.codebooks, quantizer.codes
    scores = CodebookScores(codebooks, quantizer.quantised)
    table, _ = publish(
        folder,
        sources.catalog,
        sources.split,
        raw_codes.numpy(),
        sizes,
        collisions=spec.collisions,
        scores=scores,
        margin=scores.margin(raw_codes),
        embeddings=space,
        decode=lambda codes: codebooks.decode(codes).numpy(),
        **common,
    )
    codebooks.save(Path(folder) / CODEBOOKS)
    return table


def import_published(path: Path, column: str | None, item_ids: Sequence[str]) -> SidTable:
    """Read a published SID set in the order of `item_ids`: a column of a reference_sids.parquet, or an index.json (`column` None).

    Raises:
        ArtifactError: the file has another format, or an item has no SID.
    """
    table = import_index_json(path) if column is None else import_reference_sids(path, column)
    return table.align(item_ids)


def random_codes(content_hashes: list[str], num_levels: int, codebook_size: int, seed: int) -> np.ndarray:
    """Random codes (N, L) int64, unique per distinct content; exact duplicates share them.

    Raises:
        ConfigError: more distinct items than SIDs.
    """
    order = {content: index for index, content in enumerate(sorted(set(content_hashes)))}
    capacity = codebook_size**num_levels
    if len(order) > capacity:
        raise ConfigError(
            f"random: {len(order):,} distinct items, but {num_levels} levels of {codebook_size} codes give {capacity:,} SIDs; "
            "raise codebook_size"
        )
    rng = np.random.default_rng(seed)
    if capacity <= 10**7:
        chosen = rng.permutation(capacity)[: len(order)]
    else:  # rejection sampling: a permutation of all SIDs would not fit into RAM
        chosen = np.zeros(0, np.int64)
        while len(chosen) < len(order):
            drawn = np.concatenate([chosen, rng.integers(capacity, size=2 * len(order))])
            chosen = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        chosen = chosen[: len(order)]
    numbers = chosen[[order[content] for content in content_hashes]]
    return np.stack([numbers // codebook_size ** (num_levels - 1 - level) % codebook_size for level in range(num_levels)], 1)


def category_codes(items: Sequence[Item], num_levels: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Category paths as codes (N, L), and the number of codes per level.

    Level l encodes the name at depth min(l, depth of the item's path). Names are numbered alphabetically per level: equal names under
    different parents share a code. A root that all paths share is left out. Items without a path share one code per level. There are
    at most as many levels as the deepest path has names.

    Raises:
        ConfigError: no item has a category.
    """
    paths = [item.categories for item in items]
    deepest = max(map(len, paths), default=0)
    if deepest == 0:
        raise ConfigError("category_path: no item has a category; map catalog.fields.categories, or leave this method out")
    while deepest > 1 and len({path[0] for path in paths if path}) == 1:  # the shared root
        paths = [path[1:] or path for path in paths]
        deepest -= 1
    columns = []
    for depth in range(1, min(num_levels, deepest) + 1):
        names = [path[min(depth, len(path)) - 1] if path else "" for path in paths]
        number = {name: code for code, name in enumerate(sorted(set(names)))}
        columns.append((np.array([number[name] for name in names], dtype=np.int64), len(number)))
    return np.stack([codes for codes, _ in columns], 1), tuple(size for _, size in columns)
