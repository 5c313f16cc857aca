"""Preference pairs of candidate codes of one item, and accuracy and calibration of a scorer on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsid.refine.evidence import Floats


class Pairs(NamedTuple):
    """Preferences between two candidates: item `row` in the features, preferred candidate, other candidate; (P,) int64 each."""

    row: NDArray[np.int64]
    better: NDArray[np.int64]
    worse: NDArray[np.int64]


def make_pairs(evidence: Floats, tie: float) -> Pairs:
    """All pairs of candidates of one item whose evidence (R, C) differs by more than `tie`; the higher one is preferred."""
    left, right = np.triu_indices(evidence.shape[1], k=1)
    gap = evidence[:, left] - evidence[:, right]
    row, pair = np.nonzero(np.abs(gap) > tie)
    first = gap[row, pair] > 0
    return Pairs(row, np.where(first, left[pair], right[pair]), np.where(first, right[pair], left[pair]))


def pair_accuracy(scores: NDArray, pairs: Pairs) -> float:
    """Share of the pairs that scores (R, C) order correctly, a tie counting half; NaN without pairs."""
    if len(pairs.row) == 0:
        return float("nan")
    gap = scores[pairs.row, pairs.better] - scores[pairs.row, pairs.worse]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def calibration_curve(scores: NDArray, pairs: Pairs, bins: int = 10) -> list[dict[str, float]]:
    """Reliability curve of sigmoid(r_a - r_b): its confidence in the favoured candidate, and how often that candidate is preferred.

    Returns:
        One record per non-empty bin: `confidence` and `right` are means over its `pairs`. Bins divide 0.5 to 1 evenly; a tie is half right.
    """
    gap = scores[pairs.row, pairs.better] - scores[pairs.row, pairs.worse]
    confidence = 1.0 / (1.0 + np.exp(-np.abs(gap)))
    right = (gap > 0) + 0.5 * (gap == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    bins_with_pairs = [which == number for number in np.unique(which)]
    return [
        {"confidence": float(confidence[part].mean()), "right": float(right[part].mean()), "pairs": int(part.sum())}
        for part in bins_with_pairs
    ]


def calibration_error(curve: Sequence[dict[str, float]]) -> float:
    """Expected calibration error of a `calibration_curve`: mean over pairs of |confidence - right|; NaN without pairs."""
    size = sum(part["pairs"] for part in curve)
    return sum(part["pairs"] * abs(part["confidence"] - part["right"]) for part in curve) / size if size else float("nan")


def gain_error(scores: NDArray, rival: NDArray, pairs: Pairs, items: int) -> float:
    """Standard error of the difference in pair accuracy of two scorers, clustered by item."""
    right = [np.sign(part[pairs.row, pairs.better] - part[pairs.row, pairs.worse]) / 2 for part in (scores, rival)]
    gain = right[0] - right[1]
    per_item = np.bincount(pairs.row, weights=gain - gain.mean(), minlength=items)
    return float(np.sqrt(np.square(per_item).sum()) / len(gain))
