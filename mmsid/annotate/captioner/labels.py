"""What the tower is taught to see first: one label per field, and one per patch where boxes are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

MISSING = -100  # torch's ignore_index


@dataclass
class Labels:
    """names: F label names. vocabularies: name -> its classes. codes: int64 (N, F), MISSING where unknown."""

    names: list[str]
    vocabularies: dict[str, list[str]]
    codes: np.ndarray


def build_labels(values: Mapping[str, Sequence[str]], fields: Sequence[str], digit_fields: Sequence[str], max_classes: int = 512) -> Labels:
    """One label per field; a two-digit number becomes two labels, `<field>_tens` and `<field>_units`, because a head over 90 prices
    would never see that they share digits. Values are classes in sorted order; beyond `max_classes` the rarest have no label."""
    columns: dict[str, list[str]] = {}
    for field in fields:
        if field in digit_fields:
            columns[f"{field}_tens"] = [value[-2:-1] for value in values[field]]
            columns[f"{field}_units"] = [value[-1:] for value in values[field]]
        else:
            columns[field] = list(values[field])
    vocabularies, codes = {}, []
    for name, column in columns.items():
        found, counts = np.unique([value for value in column if value != ""], return_counts=True)
        kept = sorted(found[np.argsort(-counts, kind="stable")][:max_classes].tolist())
        place = {value: code for code, value in enumerate(kept)}
        vocabularies[name] = kept
        codes.append([place.get(value, MISSING) for value in column])
    return Labels(list(columns), vocabularies, np.array(codes, dtype=np.int64).reshape(len(columns), -1).T)


def patch_masks(boxes: torch.Tensor, image_size: int, patch_size: int) -> torch.Tensor:
    """Which patches show an element: boxes (B, E, 4) in px -> bool (B, E, patches), row by row.

    A patch shows it when its centre lies in the box; the patch under the middle of the box always does, so that a digit narrower than
    a patch is never lost. A NaN box covers nothing."""
    grid = image_size // patch_size
    centre = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) * patch_size
    x0, y0, x1, y1 = (boxes[..., i : i + 1] for i in range(4))
    cover_x, cover_y = (centre >= x0) & (centre < x1), (centre >= y0) & (centre < y1)
    cells = torch.arange(grid, device=boxes.device)
    middle_x = ((x0 + x1) / 2 / patch_size).nan_to_num(nan=-1.0).floor().clamp(-1, grid - 1)
    middle_y = ((y0 + y1) / 2 / patch_size).nan_to_num(nan=-1.0).floor().clamp(-1, grid - 1)
    at_middle = (cells == middle_y)[..., :, None] & (cells == middle_x)[..., None, :]
    return ((cover_y[..., :, None] & cover_x[..., None, :]) | at_middle).flatten(-2)


class LabelHeads(nn.Module):
    """Reads labels from patch states: per label one learned query pools the patches; per boxed label a dense head over patches.

    Args:
        width: channels of the tower.
        classes: label -> number of classes.
        dense: label -> element whose patches carry it, for labels that have a box of their own or share another's (colour and pattern
            on the product's patches).
        elements: order of the boxes.
    """

    def __init__(self, width: int, classes: Mapping[str, int], dense: Mapping[str, str], elements: Sequence[str]):
        super().__init__()
        self.names, self.elements = list(classes), list(elements)
        self.dense_of = {name: self.elements.index(element) for name, element in dense.items() if name in classes and element in elements}
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(self.names), width) * width**-0.5)
        self.pooled = nn.ModuleDict({name: nn.Linear(width, number) for name, number in classes.items()})
        self.patch = nn.ModuleDict({name: nn.Linear(width, classes[name]) for name in self.dense_of})
        self.where = nn.Linear(width, max(1, len(self.elements)))  # is this element on this patch?

    def pooled_logits(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """states (B, P, width) -> label -> logits (B, classes)."""
        states = self.norm(states)
        weights = (states @ self.queries.T * 2.0).softmax(dim=1)  # (B, P, F)
        pooled = weights.mT @ states  # (B, F, width)
        return {name: self.pooled[name](pooled[:, place]) for place, name in enumerate(self.names)}

    def forward(self, states: torch.Tensor, codes: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """Mean cross-entropy over labels: pooled, plus dense per patch where `masks` (B, E, P) is given.

        Every label weighs the same however few patches it covers: two digits would drown among 64 patches otherwise."""
        losses = []
        for place, logits in enumerate(self.pooled_logits(states).values()):
            target = codes[:, place]
            if bool((target != MISSING).any()):
                losses.append(nn.functional.cross_entropy(logits.float(), target, ignore_index=MISSING))
        total = torch.stack(losses).mean() if losses else states.sum() * 0.0
        if masks is None or not self.dense_of:
            return total
        normed, dense = self.norm(states), []
        for name, element in self.dense_of.items():
            sample, patch = masks[:, element].nonzero(as_tuple=True)
            target = codes[sample, self.names.index(name)]
            if bool((target != MISSING).any()):
                dense.append(nn.functional.cross_entropy(self.patch[name](normed[sample, patch]).float(), target, ignore_index=MISSING))
        present = masks.mT.float()
        where = nn.functional.binary_cross_entropy_with_logits(self.where(normed).float(), present, weight=0.5 + 1.5 * present)
        return total + (torch.stack(dense).mean() if dense else 0.0) + where
