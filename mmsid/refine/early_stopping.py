"""What is looked at while the policy moves: a held-out figure that stops the run, and figures of the table for the log.

The figure that stops is of another kind than reward and gate, and of other interactions: how many nats the prefix of an item says
about the prefix of the item that follows. It is counted on the fit users and asked of the step to every user's valid item (selection may
use valid; nothing is fitted on it). A collapsed table says nothing and scores 0, a scrambled one no more. The reward pays for *equal*
prefixes of items engaged with together, the gate for equal prefixes of the held-out users: what follows what, neither looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmsid.catalog import Split, adjacent_pairs
from mmsid.refine.evidence import Codes, prefix_keys

MonitoredMetric = Callable[[Codes], float]  # raw codes (N, L) of all items -> a figure, higher is better


def next_item_information(split: Split, codebook_size: int, levels: int = 1) -> MonitoredMetric | None:
    """`transition_information` from the fit users to the valid items; None where no user has a valid item."""
    counted = adjacent_pairs(split.fit_histories())
    users = [user for user in split.users("valid") if len(split.train[user])]
    asked = np.array([(split.train[user][-1], split.valid[user]) for user in users], dtype=np.int64).reshape(-1, 2)
    asked = asked[asked[:, 0] != asked[:, 1]]
    if not len(counted) or not len(asked):
        return None
    return lambda codes: transition_information(codes, codebook_size, counted, asked, levels)


def transition_information(
    codes: Codes, codebook_size: int, counted: NDArray, asked: NDArray, levels: int = 1, prior: float = 4.0
) -> float:
    """Mean over the pairs `asked` of log p(prefix of the second | prefix of the first) - log p(prefix of the second), in nats.

    p is estimated on the pairs `counted`, level by level: given the code before it and the first item's prefix of the same length,
    counts are smoothed towards what holds whatever the first item is (Dirichlet, strength `prior`; that itself by one per code in use).
    Exactly 0 for a collapsed table.

    Args:
        codes: (N, L).
        counted, asked: (P, 2) and (Q, 2) item rows in time order, P and Q above 0.
        levels: length of the prefixes. Long ones name single items, about which pairs can be remembered whatever the codes mean:
            more than 1 only where the first level is frozen.
    """
    keys = prefix_keys(codes[:, :levels], codebook_size)
    parent = np.zeros(len(codes), dtype=np.int64)
    total = np.zeros(len(asked))
    for level in range(keys.shape[1]):
        _, one_of_each, own = np.unique(keys[:, level], return_index=True, return_inverse=True)
        children = np.bincount(parent[one_of_each], minlength=len(own))  # codes in use after each prefix
        often, often_parent = (np.bincount(label[counted[:, 1]], minlength=len(own)) for label in (own, parent))
        above = parent[asked[:, 1]]
        usual = (often[own[asked[:, 1]]] + 1) / (often_parent[above] + children[above])
        both = _pair_counts(own, own, counted, asked)
        given = _pair_counts(own, parent, counted, asked)
        total += np.log((both + prior * usual) / (given + prior)) - np.log(usual)
        parent = own
    return float(total.mean())


def _pair_counts(of_first: NDArray, of_second: NDArray, counted: NDArray, asked: NDArray) -> NDArray:
    """For every pair of `asked` (Q, 2): how often its (label of the first, label of the second) occurs among `counted`. -> (Q,)."""
    size = len(of_first)
    ones = np.ones(len(counted))
    table = sparse.coo_matrix((ones, (of_first[counted[:, 0]], of_second[counted[:, 1]])), shape=(size, size)).tocsr()
    return np.asarray(table[of_first[asked[:, 0]], of_second[asked[:, 1]]]).ravel()


def table_figures(codes: Codes, codebook_size: int, before: Codes, start: Codes) -> dict[str, Any]:
    """Collisions, perplexity and dead codes per level of raw codes (N, L); churn against the last round and against the start."""
    _, bucket, sizes = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    figures: dict[str, Any] = {"collisions": float((sizes[bucket.reshape(-1)] > 1).mean())}
    for level in range(codes.shape[1]):
        share = np.bincount(codes[:, level], minlength=codebook_size) / len(codes)
        share = share[share > 0]
        figures[f"perplexity_{level + 1}"] = float(np.exp(-(share * np.log(share)).sum()))
        figures[f"dead_codes_{level + 1}"] = int(codebook_size - len(share))
    return figures | {"churn": float((codes != before).any(1).mean()), "moved_since_start": float((codes != start).any(1).mean())}
