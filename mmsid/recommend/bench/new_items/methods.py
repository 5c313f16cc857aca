"""Methods of the new-item benchmark: fitted and tuned on known items, then applied to known and appended items.

Retrievers without training: `tfidf`, `item_knn` and `classical_hybrid` (`mmsid.recommend.classical`), `minilm_cosine` and
`emb_cosine` (cosine of MiniLM text embeddings, and of the EMB vectors of our tokenizer). `liger` follows Yang et al. 2024
(arXiv 2411.18814): candidates of a generative recommender, joined with all new items, are ranked by embedding similarity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch

from mmsid.catalog import Split
from mmsid.recommend.bench.new_items.protocol import NewItemWorld
from mmsid.recommend.classical import DECAYS, TUNING_USERS, classical_baselines, classical_scorers
from mmsid.recommend.embedding_source import unit_rows
from mmsid.recommend.evaluate import Score, ScoredCandidates, mask_seen, recommender_scores
from mmsid.recommend.hybrid import fit_hybrid
from mmsid.recommend.metrics import Ranks, ndcg, rank_targets
from mmsid.recommend.paths import ItemPaths, PathTrie
from mmsid.recommend.sid_transformer import SidTransformerShape
from mmsid.recommend.sparse_rows import history_weights
from mmsid.recommend.training import Fitted, Schedule, build, fit
from mmsid.sids.readings import Readings

Point = TypeVar("Point")
Tuned = tuple[Score, dict[str, Any]]  # scoring function of the whole catalogue, and what was tuned
CLASSICAL = {"tfidf": "tfidf_knn", "item_knn": "item_knn", "classical_hybrid": "hybrid_knn"}  # method -> its classical baseline
BEAMS = 50  # candidates of the generative recommender in `liger`
WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)  # of a cosine against a log-probability, in `liger_weighted`
BATCH_SIZE = 256


def classical_methods(world: NewItemWorld) -> dict[str, Tuned]:
    """`tfidf`, `item_knn` and `classical_hybrid`, tuned on known items. Words are counted over all texts, known and new."""
    tuned = {baseline.name: baseline.parameters for baseline in classical_baselines(world.known_items, world.fit_known)}
    parameters = {method: tuned[baseline] for method, baseline in CLASSICAL.items()}
    scores = classical_scorers(world.catalog.items, world.fit, parameters)
    return {method: (scores[method], parameters[method]) for method in CLASSICAL}


def cosine_method(world: NewItemWorld, vectors: np.ndarray) -> Tuned:
    """Cosine of each item with the mean of the history, weighted by recency; the decay is tuned on known items.

    Args:
        vectors: (N, D) of known and new items.
    """
    known = _unit(vectors[world.known])
    decay = best_on_valid(DECAYS, lambda histories: (cosines(known, histories, decay) for decay in DECAYS), world.fit_known)
    unit = _unit(vectors)
    return lambda histories: cosines(unit, histories, decay), {"decay": decay}


def cosines(unit: np.ndarray, histories: list[np.ndarray], decay: float) -> torch.Tensor:
    """Scores (B, N): dot products of unit vectors (N, D) with the mean of a history's vectors, weighted by decay^(steps back).

    A user's scores are cosines up to a factor of that user.
    """
    weights = history_weights(histories, len(unit), decay)
    totals = np.asarray(weights.sum(1)).clip(min=1e-12)
    return torch.from_numpy(((weights @ unit) / totals).astype(np.float32) @ unit.T)


def fit_decoder(world: NewItemWorld, paths: ItemPaths, shape: SidTransformerShape, schedule: Schedule, seed: int, what: str) -> Fitted:
    """A SID transformer trained on the paths and histories of known items. `paths` are those of all N items."""
    return fit(paths_of(paths, world.known), world.fit_known, shape=shape, schedule=schedule, seed=seed, what=what)


def decoder_scores(weights: Mapping[str, torch.Tensor], paths: ItemPaths, shape: SidTransformerShape) -> Score:
    """Scoring function of a trained SID transformer on a catalogue that may have grown since."""
    model = build(paths, shape)
    model.load_state_dict(weights)
    return recommender_scores(model, PathTrie.build(paths))


def paths_of(paths: ItemPaths, rows: np.ndarray) -> ItemPaths:
    """Paths of some items."""
    return ItemPaths(paths.tokens[rows], paths.sizes)


def fit_hybrid_candidates(
    world: NewItemWorld,
    paths: ItemPaths,
    vectors: np.ndarray,
    readings: Readings | None,
    shape: SidTransformerShape,
    schedule: Schedule,
    seed: int,
    what: str,
) -> tuple[ScoredCandidates, dict[str, Any]]:
    """The hybrid recommender of the known items, to which the new items are added without any training.

    Args:
        vectors: (N, D) embeddings of known and new items.
        readings: further readings of known and new items; None: the paths were made without behaviour.
    """
    known = None if readings is None else readings.rows(world.known)
    items, settings = world.catalog.items, {"readings": known, "shape": shape, "schedule": schedule, "seed": seed, "what": what}
    fitted = fit_hybrid(paths_of(paths, world.known), world.known_items, vectors[world.known], world.fit_known, **settings)
    new = np.flatnonzero(world.new)
    terms = fitted.vectorizers.transform([items[row] for row in new])
    fitted.sources.add(paths.tokens[new], *terms, unit_rows(vectors[new]))
    row_of = np.concatenate([world.known, new, [-1]])  # the last entry is that of padding
    number = np.argsort(row_of[:-1])

    def candidates(histories: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        found, scores = fitted.ranked([number[history] for history in histories])
        return torch.from_numpy(row_of[found.numpy()]), scores

    return candidates, {"epochs": fitted.epochs, "stopped_at_valid": fitted.best}


def retrained_hybrid(
    world: NewItemWorld, paths: ItemPaths, vectors: np.ndarray, readings: Readings | None, **settings: Any
) -> tuple[ScoredCandidates, dict[str, Any]]:
    """The hybrid recommender trained with the interactions of the new items, too."""
    fitted = fit_hybrid(paths, world.catalog.items, vectors, world.whole, readings=readings, **settings)
    return fitted.ranked, {"epochs": fitted.epochs, "stopped_at_valid": fitted.best}


def liger_methods(
    world: NewItemWorld, weights: Mapping[str, torch.Tensor], paths: ItemPaths, shape: SidTransformerShape, vectors: np.ndarray
) -> dict[str, Tuned]:
    """`liger` and `liger_weighted`: the `BEAMS` most probable items of a SID transformer and all new items, ranked together.

    `liger` ranks by cosine alone, as published, with the decay tuned. `liger_weighted` ranks by log-probability + weight x cosine;
    a new item outside the beam gets the log-probability of the beam's last item. Decay and weight are tuned on known items, where
    there is no new item to join, so valid says what they are worth for known items only.

    Args:
        weights: of a SID transformer trained on known items.
        vectors: (N, D) EMB vectors.
    """
    unit, known = _unit(vectors), _unit(vectors[world.known])
    decode_known, none_new = decoder_scores(weights, paths_of(paths, world.known), shape), np.zeros(len(known), dtype=bool)
    points = {"liger": [(decay, None) for decay in DECAYS], "liger_weighted": list(product(DECAYS, WEIGHTS))}
    every = [point for of_method in points.values() for point in of_method]
    figures = valid_figures(len(every), lambda histories: _liger_scores(decode_known, known, none_new, histories, every), world.fit_known)
    found = dict(zip(every, figures, strict=True))
    decode, tuned = decoder_scores(weights, paths, shape), {}
    for method, of_method in points.items():
        best = max(of_method, key=lambda point: found[point])  # the first of equal ones

        def score(histories: list[np.ndarray], best: tuple[float, float | None] = best) -> torch.Tensor:
            (scores,) = _liger_scores(decode, unit, world.new, histories, [best])
            return scores

        tuned[method] = (score, {"beams": BEAMS, "decay": best[0], "weight": best[1]})
    return tuned


def _liger_scores(
    decode: Score, unit: np.ndarray, new: np.ndarray, histories: list[np.ndarray], points: Sequence[tuple[float, float | None]]
) -> Iterator[torch.Tensor]:
    """Scores (B, N) for each (decay, weight); weight None: cosine alone."""
    log_prob = mask_seen(decode(histories).cpu(), histories)
    last = log_prob.topk(min(BEAMS, log_prob.shape[1]), dim=1).values
    last = torch.where(torch.isneginf(last), torch.inf, last).amin(1, keepdim=True)  # of the reached items
    in_beam = log_prob >= last
    candidate = in_beam | torch.from_numpy(new)
    base = torch.where(in_beam, log_prob, last)
    similar = {decay: cosines(unit, histories, decay) for decay in dict(points)}
    for decay, weight in points:
        scores = similar[decay] if weight is None else base + weight * similar[decay]
        yield torch.where(candidate, scores, -torch.inf)


def best_on_valid(points: Sequence[Point], scores: Callable[[list[np.ndarray]], Iterable[torch.Tensor]], split: Split) -> Point:
    """The point with the best valid NDCG@10, the first of equal ones. `scores` gives (B, K) scores of a batch for each point."""
    return points[int(np.argmax(valid_figures(len(points), scores, split)))]


def valid_figures(count: int, scores: Callable[[list[np.ndarray]], Iterable[torch.Tensor]], split: Split) -> np.ndarray:
    """Valid NDCG@10 (count,) of each point."""
    users, gains = split.users("valid")[:TUNING_USERS], [[] for _ in range(count)]
    for start in range(0, len(users), BATCH_SIZE):
        batch = users[start : start + BATCH_SIZE]
        histories, targets = [split.history(int(user), "valid") for user in batch], torch.from_numpy(split.valid[batch])
        for values, found in zip(gains, scores(histories), strict=True):
            above, tied = rank_targets(mask_seen(found, histories), targets)
            values.append(ndcg(Ranks(above.numpy(), tied.numpy()), 10))
    return np.array([np.concatenate(values).mean() for values in gains])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of norm one, float32; zero rows stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
