"""Weight of behaviour beside content in the code space, chosen on the inner held-out users.

Where content says little about what users engage with, behaviour should dominate the codes, and the reverse. The weight is the one with
which the next item of a held-out train history is nearest in the space [content ; weight x behaviour].
"""

from __future__ import annotations

import numpy as np
import torch

from mmsid.tokenizer.behaviour import ItemBehaviour, estimate_kappa
from mmsid.tokenizer.ridge import ridge

WEIGHTS = (0.5, 0.7, 1.0, 1.4, 2.0)  # beyond 2, codes would hardly depend on content, and those of new items would be arbitrary
MIN_PAIRS = 100  # with fewer pairs of held-out users, the weight is 1
MAX_PAIRS, MAX_CANDIDATES = 3000, 20_000  # samples: the cost is their product
_BLOCK = 256


def choose_weight(content: np.ndarray, behaviour: ItemBehaviour, pairs: np.ndarray, seed: int) -> tuple[float, dict[str, float]]:
    """Weight of behaviour with the highest mean reciprocal rank of the second item of each pair, by distance from the first.

    Behaviour is mixed with its prediction from content, as far as it is trusted (`mmsid.tokenizer.behaviour`). Ties go to the smaller
    weight.

    Args:
        content: (N, H), rows of unit length.
        behaviour: behaviour of the N items, from users other than those of the pairs.
        pairs: (P, 2) rows of consecutive items of held-out users.

    Returns:
        The weight, and the mean reciprocal rank of every weight ({} if there are too few pairs).
    """
    known = np.flatnonzero(behaviour.interactions > 0)
    if len(pairs) < MIN_PAIRS or len(known) < 2:
        return 1.0, {}
    rng = np.random.default_rng([seed, 17])
    fitted = known[np.sort(rng.permutation(len(known))[:MAX_CANDIDATES])]
    weight, bias = ridge(torch.from_numpy(content[fitted]), torch.from_numpy(behaviour.vectors[fitted]), seed)
    pairs = pairs[np.sort(rng.permutation(len(pairs))[:MAX_PAIRS])]
    sampled = rng.permutation(len(content))[:MAX_CANDIDATES]
    rows = np.unique(np.concatenate([sampled, pairs.ravel()]))
    predicted = content[rows] @ weight.numpy().T + bias.numpy()
    own = ItemBehaviour(behaviour.vectors[rows], behaviour.interactions[rows])
    trust = (own.interactions / (own.interactions + estimate_kappa(predicted, own)))[:, None].astype(np.float32)
    mixed = predicted + trust * (own.vectors - predicted)
    ranks = _ranks(content[rows], mixed, np.searchsorted(rows, pairs))
    figures = {str(value): float((1 / ranks[place]).mean()) for place, value in enumerate(WEIGHTS)}
    return WEIGHTS[int(np.argmax(list(figures.values())))], figures


def _ranks(content: np.ndarray, mixed: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Ranks (W, P) of the second item of each pair among all others, for every weight."""
    found = []
    for start in range(0, len(pairs), _BLOCK):
        first, second = pairs[start : start + _BLOCK].T
        by_content, by_behaviour = (2 * x[first] @ x.T - np.square(x).sum(1) for x in (content, mixed))
        blocks = []
        for weight in WEIGHTS:
            score = by_content + weight**2 * by_behaviour
            score[np.arange(len(first)), first] = -np.inf
            own = score[np.arange(len(first)), second][:, None]
            # an equal score (a duplicate) counts half, so that the order of the rows does not decide
            blocks.append(1 + (score > own).sum(1) + ((score == own).sum(1) - 1) / 2)
        found.append(np.stack(blocks))
    return np.concatenate(found, 1)
