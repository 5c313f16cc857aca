"""Label heads that train the vision tower: one label per field, and one per patch where the boxes of elements are known.

A captioning loss alone does not teach a tower of this size to read digits or words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

MISSING = -100  # torch's ignore_index
MAX_CLASSES = 512  # per label


@dataclass
class Labels:
    """names: F label names. vocabularies: name -> its classes. codes: int64 (N, F), MISSING where unknown."""

    names: list[str]
    vocabularies: dict[str, list[str]]
    codes: np.ndarray


def build_labels(values: Mapping[str, Sequence[str]], fields: Sequence[str], digit_fields: Sequence[str]) -> Labels:
    """One label per field, with its values in sorted order as classes.

    A two-digit number becomes the labels `<field>_tens` and `<field>_units`, because a head over 90 prices does not learn that prices
    share digits. Only the `MAX_CLASSES` most frequent values of a field are classes; the others are MISSING.
    """
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
        kept = sorted(found[np.argsort(-counts, kind="stable")][:MAX_CLASSES].tolist())
        code_of = {value: code for code, value in enumerate(kept)}
        vocabularies[name] = kept
        codes.append([code_of.get(value, MISSING) for value in column])
    return Labels(list(columns), vocabularies, np.array(codes, dtype=np.int64).reshape(len(columns), -1).T)


def patch_masks(boxes: torch.Tensor, image_size: int, patch_size: int) -> torch.Tensor:
    """Patches that show each element: boxes (B, E, 4) in px -> bool (B, E, patches), patches row by row.

    A patch shows an element if the patch centre is inside the box. The patch under the middle of the box always does, so that a digit
    narrower than a patch has one. A NaN box covers no patch.
    """
    grid = image_size // patch_size
    centre = (torch.arange(grid, device=boxes.device, dtype=boxes.dtype) + 0.5) * patch_size
    x0, y0, x1, y1 = (boxes[..., i : i + 1] for i in range(4))
    cover_x, cover_y = (centre >= x0) & (centre < x1), (centre >= y0) & (centre < y1)
    cells = torch.arange(grid, device=boxes.device)
    middle_x = (((x0 + x1) / 2 / patch_size).nan_to_num(nan=-1.0) // 1).clamp(-1, grid - 1)
    middle_y = (((y0 + y1) / 2 / patch_size).nan_to_num(nan=-1.0) // 1).clamp(-1, grid - 1)
    at_middle = (cells == middle_y)[..., :, None] & (cells == middle_x)[..., None, :]
    return ((cover_y[..., :, None] & cover_x[..., None, :]) | at_middle).flatten(-2)


class LabelHeads(nn.Module):
    """Classification heads on patch states: attention pooling with one learned query per label, and dense heads on patches.

    Args:
        width: channels of the tower.
        classes: label -> number of classes.
        dense: label -> element on whose patches the label is also predicted. Several labels may share an element.
        elements: names of the boxed elements, in the order of the boxes.
    """

    def __init__(self, width: int, classes: Mapping[str, int], dense: Mapping[str, str], elements: Sequence[str]):
        super().__init__()
        self.names, elements = list(classes), list(elements)
        self.dense_of = {name: elements.index(element) for name, element in dense.items() if name in classes and element in elements}
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(self.names), width) * width**-0.5)
        self.pooled = nn.ModuleDict({name: nn.Linear(width, number) for name, number in classes.items()})
        self.patch = nn.ModuleDict({name: nn.Linear(width, classes[name]) for name in self.dense_of})
        self.presence = nn.Linear(width, max(1, len(elements)))  # does this patch show this element?

    def pooled_logits(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """states (B, P, width) -> label -> logits (B, classes)."""
        states = self.norm(states)
        weights = (states @ self.queries.T * 2.0).softmax(dim=1)  # (B, P, F)
        pooled = weights.mT @ states  # (B, F, width)
        return {name: self.pooled[name](pooled[:, column]) for column, name in enumerate(self.names)}

    def forward(self, states: torch.Tensor, codes: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """Sum of three losses, each a mean over its labels, which weighs a label independently of the number of its patches.

        The losses are cross-entropy of the pooled logits, and, with `masks`, cross-entropy on the patches of each dense label's element
        and binary cross-entropy of the elements shown by each patch.

        Args:
            states: (B, P, width) from the tower.
            codes: int64 (B, F), as in `Labels`.
            masks: bool (B, E, P) from `patch_masks`. None: no boxes are known.
        """
        losses = []
        for column, logits in enumerate(self.pooled_logits(states).values()):
            target = codes[:, column]
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
        shown = masks.mT.float()
        presence = nn.functional.binary_cross_entropy_with_logits(self.presence(normed).float(), shown, weight=0.5 + 1.5 * shown)
        return total + (torch.stack(dense).mean() if dense else 0.0) + presence
