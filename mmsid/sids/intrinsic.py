"""Intrinsic metrics of a SID table: uniqueness, codebook use, co-engagement lift, category agreement and retrieval recall.

No single figure ranks tables. Random hashing has the best distribution figures, and a total collapse has the best raw prefix
agreement, so read the meaning of the codes (lift over chance) together with their distribution (uniqueness, perplexity).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from mmsid.sids.semantics import category_agreement, nearest_neighbour_lcp
from mmsid.sids.table import SidTable

SCHEMA_VERSION = 1


def intrinsic_metrics(
    table: SidTable,
    categories: list[tuple[str, ...]] | None = None,
    held_out_pairs: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
    content_hashes: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
    decoded: np.ndarray | None = None,
    retrieval_pairs: int = 20_000,
) -> dict[str, Any]:
    """Compute all intrinsic metrics of a table's published codes, ready for JSON. Rows of every argument are rows of the table.

    Args:
        categories: N category paths from root to leaf, of any length.
        held_out_pairs: (P, 2) rows that are adjacent in held-out histories (the inner 10 %), on which nothing was fitted.
        embeddings: (N, D).
        content_hashes: N strings, or integers (N,); separates exact duplicates from collisions.
        seed: of the category shuffle and of the nearest-neighbour queries.
        decoded: (N, D') vectors decoded from the published codes, in any space; used for retrieval by codes.
        retrieval_pairs: pairs that retrieval is measured on, at most; each costs a pass over all items. 0: no retrieval figures.
    Returns:
        Always: published, raw (bucket metrics; with_suffix if the table has suffixes), levels, joint_entropy (nats),
        effective_capacity, min_perplexity, max_gini, changed (raw to published codes, per level and any), margin_median.
        If their inputs are given: coengagement, categories, retrieval (by the embedding), retrieval_prefix (by shared prefixes),
        retrieval_decoded, neighbour_lcp. They are defined in `mmsid.sids.distribution`, `semantics` and `retrieval`.
    Raises:
        ValueError: an empty table, or an argument with another number of rows.
    """

    for name, rows in (("categories", categories), ("embeddings", embeddings), ("content_hashes", content_hashes), ("decoded", decoded)):
        if rows is not None and len(rows) != len(table):
            raise ValueError(f"{name} has {len(rows)} rows, the table {len(table)}")
    if not len(table):
        raise ValueError("the table contains no items")
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
            metrics["coengagement"] = _coengagement_metrics(codes, pairs)
            if retrieval_pairs:
                metrics["retrieval_prefix"] = prefix_recall(codes, pairs, max_pairs=retrieval_pairs)
            if decoded is not None and retrieval_pairs:
                metrics["retrieval_decoded"] = retrieval_recall(decoded, pairs, max_pairs=retrieval_pairs)
    if categories is not None:
        metrics["categories"] = category_agreement(codes, categories, seed)
    if embeddings is not None and len(table) > 1:
        metrics["neighbour_lcp"] = nearest_neighbour_lcp(codes, embeddings, seed=seed)
        if held_out_pairs is not None and len(pairs) and retrieval_pairs:
            metrics["retrieval"] = retrieval_recall(embeddings, pairs, max_pairs=retrieval_pairs)
    return metrics


def _coengagement_metrics(codes: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
    """Prefix agreement of co-engaged pairs against its exact chance level: (N, L) codes, (P, 2) rows without self pairs.

    Returns:
        agreement, chance, lift = agreement / chance: per prefix length; lift is None where chance is 0. A collapsed level has
        agreement 1 and lift 1.
        code_lift: lift of each level's code alone, without the codes before it, as a recommender with one vocabulary per level uses it.
        lcp: mean longest common prefix, the sum of the agreements; lcp_chance, lcp_ratio, lcp_difference: its chance level and
        comparison.
    """

    agreement, chance = pair_agreement(codes, pairs), chance_agreement(codes)
    single_levels = [codes[:, [level]] for level in range(codes.shape[1])]
    of_codes = [(pair_agreement(code, pairs)[0], chance_agreement(code)[0]) for code in single_levels]
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
