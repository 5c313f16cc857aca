"""Intrinsic quality of a SID table: a basket, because every single figure has a corner that scrambles or collapses the codes.

Random hashing wins every distribution figure; a total collapse wins raw prefix agreement. `dominates` therefore asks for
both sides: what the codes mean (lift over chance) and how they are spread (uniqueness, least perplexity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmsid.sids.distribution import (
    bucket_metrics,
    chance_agreement,
    flip_rate,
    joint_entropy,
    level_metrics,
    pair_agreement,
)
from mmsid.sids.retrieval import prefix_recall, retrieval_recall
from mmsid.sids.semantics import category_agreement, fidelity, nearest_neighbour_lcp
from mmsid.sids.table import SidTable

SCHEMA_VERSION = 1


def intrinsic_metrics(
    table: SidTable,
    categories: list[tuple[str, ...]] | None = None,
    held_out_pairs: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    codebook_vectors: np.ndarray | None = None,
    content_hashes: list[str] | None = None,
    seed: int = 0,
    decoded: np.ndarray | None = None,
) -> dict[str, Any]:
    """All intrinsic figures of a table's published codes, ready for JSON. Rows of every argument are the table's rows.

    Args:
        categories: N paths, root to leaf, ragged.
        held_out_pairs: (P, 2) rows adjacent in histories that nothing was fitted on (the inner 10 %).
        embeddings: (N, D); codebook_vectors: (L, K, D) in the same space, for the rebuild figures.
        content_hashes: N; separates exact duplicates from collisions.
        decoded: (N, D') vectors that the published codes decode to, in any space: what retrieval by codes searches with.
    Returns:
        published, raw (bucket figures; `with_suffix` too where there is one), levels, joint_entropy (nats),
        effective_capacity, min_perplexity, max_gini, changed (raw to published, per level and any), margin_median; where
        the inputs are given: coengagement (pairs, agreement, chance, lift per prefix length, code_lift per level, null where chance is 0,
        lcp, lcp_chance, lcp_ratio, lcp_difference), categories, fidelity, retrieval (by the embedding), retrieval_prefix (by the
        codes), retrieval_decoded, neighbour_lcp. Definitions: the functions of `mmsid.sids.distribution`, `mmsid.sids.semantics` and
        `mmsid.sids.retrieval`.
    Raises:
        ValueError: an empty table, or an argument of another number of rows.
    """
    for name, rows in (("categories", categories), ("embeddings", embeddings), ("content_hashes", content_hashes), ("decoded", decoded)):
        if rows is not None and len(rows) != len(table):
            raise ValueError(f"{name} has {len(rows)} rows, the table {len(table)}")
    if not len(table):
        raise ValueError("the table holds no items")
    codes = table.codes
    levels = level_metrics(codes, table.codebook_sizes)
    joint = joint_entropy(codes)
    changed = flip_rate(table.raw_codes, codes)
    margins = table.margin[np.isfinite(table.margin)]
    capacity = float(np.prod([float(size) for size in table.codebook_sizes]))
    metrics: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "num_levels": table.num_levels,
        "codebook_sizes": list(table.codebook_sizes),
        "published": bucket_metrics(codes, content_hashes),
        "raw": bucket_metrics(table.raw_codes, content_hashes),
        "random_colliding_share": float(-np.expm1((len(table) - 1) * np.log1p(-1 / capacity))) if capacity > 1 else float(len(table) > 1),
        "levels": levels,
        "joint_entropy": joint,
        "effective_capacity": float(np.exp(joint)),
        "min_perplexity": min(level["perplexity"] for level in levels),
        "max_gini": max(level["gini"] for level in levels),
        "changed": {"levels": changed[:-1].tolist(), "any": float(changed[-1])},
        "margin_median": float(np.median(margins)) if len(margins) else None,
    }
    if table.suffix is not None:
        metrics["with_suffix"] = bucket_metrics(table.full_codes(), content_hashes)
    if held_out_pairs is not None:
        pairs = np.asarray(held_out_pairs, dtype=np.int64).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            metrics["coengagement"] = coengagement_metrics(codes, pairs)
            metrics["retrieval_prefix"] = prefix_recall(codes, pairs)
            if decoded is not None:
                metrics["retrieval_decoded"] = retrieval_recall(decoded, pairs)
    if categories is not None:
        metrics["categories"] = category_agreement(codes, categories, seed)
    if embeddings is not None and len(table) > 1:
        metrics["neighbour_lcp"] = nearest_neighbour_lcp(codes, embeddings, seed=seed)
        if held_out_pairs is not None and len(pairs):
            metrics["retrieval"] = retrieval_recall(embeddings, pairs)
        if codebook_vectors is not None:
            metrics["fidelity"] = fidelity(embeddings, codebook_vectors, codes)
            metrics["fidelity_raw"] = fidelity(embeddings, codebook_vectors, table.raw_codes)
    return metrics


def coengagement_metrics(codes: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
    """Prefix agreement of co-engaged pairs against its exact chance level: (N, L), (P, 2) rows, no self pairs.

    lcp = mean longest common prefix = the agreements summed over levels, lcp_chance likewise. A raw agreement rewards fat
    clusters (one code at level 1 scores 1.0); the lift of such a set is 1. `code_lift`: of each level's code by itself, whatever stands
    before it, which is how a recommender with one vocabulary per level reads it.
    """
    agreement, chance = pair_agreement(codes, pairs), chance_agreement(codes)
    alone = [codes[:, [level]] for level in range(codes.shape[1])]
    of_codes = [(pair_agreement(code, pairs)[0], chance_agreement(code)[0]) for code in alone]
    lcp, lcp_chance = float(agreement.sum()), float(chance.sum())
    return {
        "pairs": len(pairs),
        "agreement": agreement.tolist(),
        "chance": chance.tolist(),
        "lift": [float(a / c) if c > 0 else None for a, c in zip(agreement, chance)],
        "code_lift": [float(a / c) if c > 0 else None for a, c in of_codes],
        "lcp": lcp,
        "lcp_chance": lcp_chance,
        "lcp_ratio": lcp / lcp_chance if lcp_chance > 0 else None,
        "lcp_difference": lcp - lcp_chance,
    }


def basket(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures a comparison must look at together, higher is better: {"meaning": {...}, "spread": {...}}.

    meaning: lift of level 1 and the LCP difference of the proper prefixes (agreement on the whole SID is a collision and
    belongs to the other side), adjusted V-measure of level 1 at the shallowest category depth, as far as the metrics hold
    them. spread: uniqueness, least perplexity / K.
    """
    meaning: dict[str, float] = {}
    if "coengagement" in metrics:
        meaning["level_1_lift"] = metrics["coengagement"]["lift"][0] or 0.0
        if metrics["num_levels"] > 1:
            agreement, chance = metrics["coengagement"]["agreement"][:-1], metrics["coengagement"]["chance"][:-1]
            meaning["prefix_lcp_difference"] = sum(agreement) - sum(chance)
    if metrics.get("categories"):
        meaning["v_measure_adjusted"] = metrics["categories"][0]["v_measure_adjusted"]
    shares = [level["perplexity"] / size for level, size in zip(metrics["levels"], metrics["codebook_sizes"])]
    return {"meaning": meaning, "spread": {"uniqueness": metrics["published"]["uniqueness"], "min_perplexity_share": min(shares)}}


def dominates(candidate: Mapping[str, Any], reference: Mapping[str, Any], tolerance: float = 0.02) -> bool:
    """True if no figure of the candidate's basket is worse by more than `tolerance` (relative) and one is better by more.

    A gate to reject by, not a goal to climb: figures that agree here say nothing about ranking.

    Raises:
        ValueError: the two share no figure of meaning; spread alone would let random hashing win.
    """
    ours, theirs = basket(candidate), basket(reference)
    if not ours["meaning"].keys() & theirs["meaning"].keys():
        raise ValueError("no figure of meaning in common; give both arms held-out pairs or categories")
    gains = [
        (ours[side][name] - theirs[side][name]) / max(abs(theirs[side][name]), 1e-12)
        for side in theirs
        for name in theirs[side]
        if name in ours[side]
    ]
    return min(gains) >= -tolerance and max(gains) > tolerance
