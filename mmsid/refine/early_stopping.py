"""Early stopping: the monitored metric that ends a refinement run, and code statistics for the log.

The metric is the information that an item's first code gives about the first code of the next item, in nats. It is counted on the fit users
and evaluated on the step to every user's valid item; no parameter is fitted on valid. It is part of neither the reward nor the gate,
which use equal prefixes of items engaged together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmsid.catalog import Split, adjacent_pairs
from mmsid.refine.evidence import Codes

MonitoredMetric = Callable[[Codes], float]  # raw codes (N, L) of all items -> value, higher is better


def next_item_information(split: Split) -> MonitoredMetric | None:
    """`transition_information` counted on the fit users, evaluated on the steps to valid items; None where there are no such steps."""
    counted = adjacent_pairs(split.fit_histories())
    users = [user for user in split.users("valid") if len(split.train[user])]
    evaluated = np.array([(split.train[user][-1], split.valid[user]) for user in users], dtype=np.int64).reshape(-1, 2)
    evaluated = evaluated[evaluated[:, 0] != evaluated[:, 1]]
    if not len(counted) or not len(evaluated):
        return None
    return lambda codes: transition_information(codes, counted, evaluated)


def transition_information(codes: Codes, counted: NDArray, evaluated: NDArray, prior: float = 4.0) -> float:
    """Mean over the pairs `evaluated` of log p(code of the second | code of the first) - log p(code of the second), in nats, at level 1.

    p is estimated on the pairs `counted`. Counts given the first item's code are smoothed towards the counts for any first item
    (Dirichlet prior of strength `prior`); those are smoothed by one per code in use. The value is 0 if all items share a code. Longer
    prefixes identify single items, whose pairs are predictable under any codes.

    Args:
        codes: (N, L).
        counted, evaluated: (P, 2) and (Q, 2) item rows in time order, P and Q above 0.
    """
    used, own = np.unique(codes[:, 0], return_inverse=True)
    seconds = evaluated[:, 1]
    count = np.bincount(own[counted[:, 1]], minlength=len(used))
    marginal = (count[own[seconds]] + 1) / (len(counted) + len(used))
    both = _pair_counts(own, counted, evaluated)
    given = np.bincount(own[counted[:, 0]], minlength=len(used))[own[evaluated[:, 0]]]
    return float((np.log((both + prior * marginal) / (given + prior)) - np.log(marginal)).mean())


def _pair_counts(label: NDArray, counted: NDArray, evaluated: NDArray) -> NDArray:
    """How often the labels of each pair in `evaluated` (Q, 2) occur among the pairs `counted`. -> (Q,)."""
    size = len(label)
    ones = np.ones(len(counted))
    table = sparse.coo_matrix((ones, (label[counted[:, 0]], label[counted[:, 1]])), shape=(size, size)).tocsr()
    return np.asarray(table[label[evaluated[:, 0]], label[evaluated[:, 1]]]).ravel()


def table_figures(codes: Codes, codebook_size: int, before: Codes, start: Codes) -> dict[str, Any]:
    """Log figures of raw codes (N, L): colliding share, perplexity and dead codes per level, churn against the last round and the start."""
    _, bucket, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    figures: dict[str, Any] = {"collisions": float((sizes[bucket.reshape(-1)] > 1).mean())}
    for level in range(codes.shape[1]):
        share = np.bincount(codes[:, level], minlength=codebook_size) / len(codes)
        share = share[share > 0]
        figures[f"perplexity_{level + 1}"] = float(np.exp(-(share * np.log(share)).sum()))
        figures[f"dead_codes_{level + 1}"] = int(codebook_size - len(share))
    return figures | {"churn": float((codes != before).any(1).mean()), "moved_since_start": float((codes != start).any(1).mean())}
