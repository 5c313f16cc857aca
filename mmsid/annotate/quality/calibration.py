"""Pair accuracy, Platt scaling and calibration error of scores, and the quality of an item from that of its descriptors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from mmsid.annotate.quality.examples import Pair


def pair_accuracy(gaps: NDArray) -> float:
    """Share of pairs in the right order. `gaps` (P,) are scores of the chosen minus scores of the rejected; a tie counts half."""
    return float((np.sign(gaps).mean() + 1) / 2)


def accuracy_per_kind(gaps: NDArray, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """kind of the rejected example -> number of pairs and accuracy on them."""
    kinds = np.array([pair.kind for pair in pairs])
    return {str(kind): {"pairs": int((kinds == kind).sum()), "accuracy": pair_accuracy(gaps[kinds == kind])} for kind in np.unique(kinds)}


def fit_platt(scores: NDArray, labels: NDArray) -> tuple[float, float]:
    """(a, b) such that sigmoid(a * score + b) is the probability of label 1 (Platt 1999). Labels are not reweighted.

    Raises:
        ValueError: only one label occurs.
    """
    fitted = LogisticRegression(C=1e3).fit(scores[:, None], labels)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def probability(scores: NDArray, platt: tuple[float, float]) -> NDArray:
    """sigmoid(a * score + b), elementwise."""
    a, b = platt
    return 1.0 / (1.0 + np.exp(-np.clip(a * scores + b, -60, 60)))


def reliability(probabilities: NDArray, labels: NDArray, bins: int = 10) -> dict:
    """Expected calibration error over bins of equal width, and the curve: size, mean q and share of label 1 of each nonempty bin."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    curve = [
        {"size": int(inside.sum()), "mean_q": float(probabilities[inside].mean()), "share_good": float(labels[inside].mean())}
        for inside in (which == bin_number for bin_number in range(bins))
        if inside.any()
    ]
    error = sum(row["size"] * abs(row["mean_q"] - row["share_good"]) for row in curve) / len(probabilities)
    return {"calibration_error": float(error), "curve": curve}


def item_quality(confidences: NDArray, qualities: NDArray) -> float:
    """q of an item: mean q of its descriptors, weighted by the miner's confidences (arXiv 2604.20861: sum c y / sum c).

    The weights are equal if all confidences are 0.
    """
    weights = confidences if confidences.sum() > 0 else np.ones_like(confidences)
    return float((weights * qualities).sum() / weights.sum())
