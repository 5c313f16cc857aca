"""Behaviour input of the item tokenizer: what logs say of an item, added to the projected state of its content.

With s_l the projected content state of level l, v_i the behaviour vector of item i and n_i its train interactions, the state becomes
s_l + g_i (V v_i - P s_l), g_i = n_i / (n_i + kappa), P the coordinates of the code space that hold behaviour. An item without
interactions has g_i = 0: its content alone is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor, nn

from mmsid.artifacts import read_table, write_table
from mmsid.catalog import Catalog, Split, co_engagement
from mmsid.catalog.vectors import several
from mmsid.config import Section
from mmsid.errors import ArtifactError, ConfigError
from mmsid.quantize import CoEngagementFactors
from mmsid.tokenizer.inputs import ItemInput

FULL_TRUST = 1e6  # interactions assumed for the user's vectors if neither their file nor the sequences give a number
CONTEXT_ITEMS = "behaviour_items.parquet"


class BehaviourSettings(Section):
    """Size and source of a tokenizer's behaviour input.

    Attributes:
        source: "coengagement", vectors from the factors that the tokenizer stores; or "vectors", those of the user's own files.
        dim: M, size of a behaviour vector.
        contexts: number of items whose factors are stored (0 for "vectors").
        window: two items of a history co-engage if they are at most this many steps apart.
    """

    source: Literal["coengagement", "vectors"]
    dim: int = Field(ge=1)
    contexts: int = Field(0, ge=0)
    window: int = Field(3, ge=1)


class BehaviourInput(nn.Module):
    """Adds behaviour vectors to projected content states.

    Args:
        settings: source and sizes.
        first: first of the `settings.dim` coordinates of the code space that hold behaviour.

    Attributes:
        value: V, (M, M), the identity times the weight of behaviour at the start.
        kappa: (), number of interactions at which behaviour and content prediction have equal weight.
        context, log_share: factors of co-engagement, see `mmsid.quantize.CoEngagementFactors`.
        item_ids: ids of the context items.
    """

    def __init__(self, settings: BehaviourSettings, first: int) -> None:
        super().__init__()
        self.settings = settings
        self.span = slice(first, first + settings.dim)
        self.value = nn.Parameter(torch.eye(settings.dim))
        self.register_buffer("kappa", torch.ones(()))
        self.register_buffer("context", torch.zeros(settings.contexts, settings.dim))
        self.register_buffer("log_share", torch.zeros(settings.contexts, dtype=torch.float64))
        self.item_ids: list[str] = []

    def forward(self, s: Tensor, behaviour: Tensor) -> Tensor:
        """States with behaviour: projected content states s (B, L, D), behaviour (B, M + 1) -> (B, L, D).

        The last column of `behaviour` is n_i. Rows with n_i = 0 are returned unchanged.
        """
        trust = self.trust(behaviour[:, -1:])[:, None]
        before, own, after = s[..., : self.span.start], s[..., self.span], s[..., self.span.stop :]
        seen = (behaviour[:, :-1] @ self.value.T)[:, None]
        return torch.cat([before, own + trust * (seen - own), after], -1)

    def replaced(self, s: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """States (B, L, D) with the behaviour `after` (B, M + 1), from states `s` that were computed with the behaviour `before`.

        The content part (1 - g) P s is what remains of a state without g V v; it is scaled by (1 - g') / (1 - g).
        """
        (seen, trust), (other, other_trust) = ((each[:, :-1] @ self.value.T, self.trust(each[:, -1:])) for each in (before, after))
        scale = (before[:, -1:] + self.kappa) / (after[:, -1:] + self.kappa)
        own = (s[..., self.span] - (trust * seen)[:, None]) * scale[:, None] + (other_trust * other)[:, None]
        return torch.cat([s[..., : self.span.start], own, s[..., self.span.stop :]], -1)

    def trust(self, interactions: Tensor) -> Tensor:
        """g = n / (n + kappa)."""
        return interactions / (interactions + self.kappa)

    def factors(self) -> CoEngagementFactors:
        """The stored factors of co-engagement."""
        return CoEngagementFactors(self.context.cpu().numpy(), self.log_share.cpu().numpy())

    def save_items(self, folder: Path) -> None:
        """Write the ids of the context items, if there are any."""
        if self.item_ids:
            write_table(folder / CONTEXT_ITEMS, pa.table({"item_id": pa.array(self.item_ids, pa.string())}))

    def load_items(self, folder: Path) -> None:
        """Read the ids of the context items.

        Raises:
            ArtifactError: their number is not that of the stored factors.
        """
        if not self.settings.contexts:
            return
        self.item_ids = read_table(folder / CONTEXT_ITEMS)["item_id"].to_pylist()
        if len(self.item_ids) != self.settings.contexts:
            raise ArtifactError(
                f"{folder / CONTEXT_ITEMS} has {len(self.item_ids)} items, but the tokenizer has factors of {self.settings.contexts}; "
                "copy the whole tokenizer folder again"
            )


@dataclass(frozen=True)
class ItemBehaviour:
    """Behaviour of N items: `vectors` (N, M) float32 and `interactions` (N,), 0 for items that are read by content alone."""

    vectors: np.ndarray
    interactions: np.ndarray

    def rows(self) -> np.ndarray:
        """(N, M + 1) float32: vectors and interactions, the input of `BehaviourInput`."""
        return np.concatenate([self.vectors, self.interactions[:, None]], 1).astype(np.float32)

    def added_to(self, inputs: Sequence[ItemInput]) -> list[ItemInput]:
        """The inputs, in the same order, with behaviour."""
        return [replace(item, behaviour=row) if row[-1] > 0 else item for item, row in zip(inputs, self.rows(), strict=True)]

    def only(self, rows: np.ndarray) -> ItemBehaviour:
        """Behaviour of the items where `rows` (N,) is True; the others are read by content alone."""
        return replace(self, interactions=np.where(rows, self.interactions, 0))


def behaviour_of_catalog(
    behaviour: BehaviourInput | None, catalog: Catalog, split: Split | None, files: Sequence[Path] = ()
) -> ItemBehaviour | None:
    """Behaviour of the items of a catalogue as a trained tokenizer reads it; None if the tokenizer reads none or nothing is known.

    Vectors from co-engagement use the fit histories of `split` and the stored factors: items that the training did not know get a
    vector from their co-engagement with items that it knew.

    Args:
        files: vector files of the user, for a tokenizer whose source is "vectors".

    Raises:
        ConfigError: the tokenizer needs vector files and none are given, or they have another dimension.
        CatalogError: a file is unusable.
    """
    if behaviour is None:
        return None
    histories = split.fit_histories() if split is not None else []
    item_ids = catalog.item_ids
    if behaviour.settings.source == "vectors":
        if not files:
            raise ConfigError(
                "this tokenizer was trained with behaviour vectors from files; name such files under `behaviour`, "
                "or write `behaviour: none` to read items by their content alone"
            )
        found = read_files(files, item_ids, histories)
        if found.vectors.shape[1] != behaviour.settings.dim:
            raise ConfigError(
                f"behaviour: {', '.join(map(str, files))} has vectors of dimension {found.vectors.shape[1]}, the tokenizer reads "
                f"{behaviour.settings.dim}; give the vectors of the model that it was trained with"
            )
        return found
    if not histories:
        return None
    pairs = co_engagement(histories, len(item_ids), behaviour.settings.window, split.fit_weights()).tocoo()
    column_of = {item_id: column for column, item_id in enumerate(behaviour.item_ids)}
    columns = np.array([column_of.get(item_id, -1) for item_id in item_ids])[pairs.col]
    known = columns >= 0
    shape = (len(item_ids), len(behaviour.item_ids))
    weights = sparse.csr_matrix((pairs.data[known], (pairs.row[known], columns[known])), shape=shape)
    return with_interactions(behaviour.factors().vectors(weights), histories)


def behaviour_inputs(behaviour: str | tuple[Path, ...] | None) -> dict[str, Path]:
    """Name -> vector file, for the manifests of stages; {} if `behaviour` names no files."""
    files = behaviour if isinstance(behaviour, tuple) else ()
    return {f"behaviour {number}": path for number, path in enumerate(files, start=1)}


def read_files(files: Sequence[Path], item_ids: Sequence[str], histories: Sequence[np.ndarray]) -> ItemBehaviour:
    """Behaviour vectors of the user's own files. n_i is the column `interactions` of the files, else the occurrences in `histories`,
    else so large that the vectors are trusted fully.

    Raises:
        CatalogError: a file is unusable.
    """
    found = several(files, item_ids)
    if found.counts is not None:
        return ItemBehaviour(found.values, np.where(found.present, found.counts, 0))
    if len(histories):
        return with_interactions(found.values, histories)
    return ItemBehaviour(found.values, np.where(found.present, FULL_TRUST, 0))


def with_interactions(vectors: np.ndarray, histories: Sequence[np.ndarray]) -> ItemBehaviour:
    """Count the occurrences of each item in `histories`; items whose vector is zero have n_i = 0."""
    counts = np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64), minlength=len(vectors))
    return ItemBehaviour(vectors, np.where(vectors.any(1), counts, 0).astype(np.float64))
