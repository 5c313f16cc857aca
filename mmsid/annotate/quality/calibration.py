"""From scores to probabilities, and how good they are: pure functions on labels and scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from mmsid.annotate.quality.examples import Pair


def pair_accuracy(gaps: NDArray) -> float:
    """Share of pairs ordered rightly, from score of the chosen less score of the rejected (P,); a tie counts half."""
    return float((np.sign(gaps).mean() + 1) / 2)


def accuracy_per_kind(gaps: NDArray, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """kind of the rejected example -> its pairs and the accuracy on them."""
    kinds = np.array([pair.kind for pair in pairs])
    return {str(kind): {"pairs": int((kinds == kind).sum()), "accuracy": pair_accuracy(gaps[kinds == kind])} for kind in np.unique(kinds)}


def fit_platt(scores: NDArray, labels: NDArray) -> tuple[float, float]:
    """(a, b) such that sigmoid(a * score + b) is the probability of label 1 (Platt 1999); both labels weigh what they occur.

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
    """Expected calibration error over equally wide bins, and the curve: per filled bin its size, mean q and share of label 1."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    curve = [
        {"size": int(inside.sum()), "mean_q": float(probabilities[inside].mean()), "share_good": float(labels[inside].mean())}
        for inside in (which == place for place in range(bins))
        if inside.any()
    ]
    error = sum(row["size"] * abs(row["mean_q"] - row["share_good"]) for row in curve) / len(probabilities)
    return {"calibration_error": float(error), "curve": curve}


def item_quality(confidences: NDArray, qualities: NDArray) -> float:
    """q of an item: the mean of its descriptors' q, weighted by the miner's confidences (arXiv 2604.20861: sum c y / sum c).

    A miner that believed nothing it wrote is no reason to stop a catalogue: all zero counts as all equal.
    """
    weights = confidences if confidences.sum() > 0 else np.ones_like(confidences)
    return float((weights * qualities).sum() / weights.sum())
