"""Trust and weight of behaviour beside content, chosen on the inner held-out users.

Where content says little about what users engage with, behaviour should dominate the codes, and the reverse. Chosen are the kappa of the
trust and the weight with which the next item of a held-out train history is nearest in the space [content ; weight x behaviour].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmsid.tokenizer.behaviour import ItemBehaviour
from mmsid.tokenizer.ridge import ridge

KAPPAS = (0.1, 0.3, 1.0, 3.0)  # interactions at which behaviour and its prediction from content count alike
WEIGHTS = (0.5, 0.7, 1.0, 1.4, 2.0)  # beyond 2, codes would hardly depend on content, and those of new items would be arbitrary
MIN_PAIRS = 100  # with fewer pairs of held-out users, `DEFAULT` is taken
DEFAULT = (0.3, 1.0)
MAX_PAIRS, MAX_CANDIDATES = 3000, 20_000  # samples: the cost is their product
_BLOCK = 256


def choose_trust_and_weight(
    content: np.ndarray, behaviour: ItemBehaviour, pairs: np.ndarray, seed: int, weights: Sequence[float] = WEIGHTS
) -> tuple[float, float]:
    """The kappa and weight with the highest mean reciprocal rank of the second item of each pair, by distance from the first.

    Behaviour is mixed with its prediction from content, as far as it is trusted (`mmsid.tokenizer.behaviour`). Ties go to the smaller
    values.

    Args:
        content: (N, H), rows of unit length.
        behaviour: behaviour of the N items, from users other than those of the pairs.
        pairs: (P, 2) rows of consecutive items of held-out users.
        weights: the weights to choose from.
    """
    known = np.flatnonzero(behaviour.interactions > 0)
    if len(pairs) < MIN_PAIRS or len(known) < 2:
        return DEFAULT[0], weights[0] if len(weights) == 1 else DEFAULT[1]
    rng = np.random.default_rng([seed, 17])
    fitted = known[np.sort(rng.permutation(len(known))[:MAX_CANDIDATES])]
    weight, bias = ridge(torch.from_numpy(content[fitted]), torch.from_numpy(behaviour.vectors[fitted]), seed)
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MAX_PAIRS])]
    rows = np.unique(np.concatenate([rng.permutation(len(content))[:MAX_CANDIDATES], pairs.ravel()]))
    predicted = content[rows] @ weight.numpy().T + bias.numpy()
    own, interactions = behaviour.vectors[rows], behaviour.interactions[rows]
    places, found = np.searchsorted(rows, pairs), {}
    for kappa in KAPPAS:
        trust = (interactions / (interactions + kappa))[:, None].astype(np.float32)
        ranks = _ranks(content[rows], predicted + trust * (own - predicted), places, weights)
        found |= {(kappa, value): (1 / of_weight).mean() for value, of_weight in zip(weights, ranks, strict=True)}
    return max(found, key=lambda point: found[point])


def _ranks(content: np.ndarray, mixed: np.ndarray, pairs: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Ranks (W, P) of the second item of each pair among all others, for every weight."""
    found = []
    for start in range(0, len(pairs), _BLOCK):
        first, second = pairs[start : start + _BLOCK].T
        by_content, by_behaviour = (2 * x[first] @ x.T - np.square(x).sum(1) for x in (content, mixed))
        blocks = []
        for weight in weights:
            score = by_content + weight**2 * by_behaviour
            score[np.arange(len(first)), first] = -np.inf
            own = score[np.arange(len(first)), second][:, None]
            # an equal score (a duplicate) counts half, so that the order of the rows does not decide
            blocks.append(1 + (score > own).sum(1) + ((score == own).sum(1) - 1) / 2)
        found.append(np.stack(blocks))
    return np.concatenate(found, 1)
