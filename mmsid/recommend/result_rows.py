"""Ranks on disk and the rows of a ranking table, shared by the stages and the bench.

The ranks of every user are stored, so that each metric and each paired difference can be computed again. User ids stay
in these files and never enter a results table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mmsid.artifacts import read_json, read_table, write_table
from mmsid.catalog import Catalog, Split
from mmsid.errors import ConfigError
from mmsid.recommend.evaluate import Evaluation, Part
from mmsid.recommend.metrics import Ranks, holm, paired_bootstraps, per_position
from mmsid.sids.table import SidTable

COMPARED = ("NDCG@10", "HR@10")
SIGNIFICANT = 0.05


class ReadRanks(NamedTuple):
    """Ranks of one part, and coverage and SID-level gain (None without SIDs) measured with them, read from disk."""

    ranks: Ranks
    coverage: float
    sid_level_gain: float | None

    def summary(self) -> dict[str, float]:
        """All metrics by name, including coverage."""
        return Evaluation(np.zeros(0, np.int64), *self).summary()


def write_ranks(path: Path, evaluations: Mapping[Part, Evaluation], catalog: Catalog) -> None:
    """Write columns user_id, part, above, tied, and weight where events have weights. Coverage and SID-level gain are stored in
    the schema's metadata."""
    columns: dict[str, list[Any]] = {"user_id": [], "part": [], "above": [], "tied": []}
    for part, evaluation in evaluations.items():
        columns["user_id"] += catalog.histories.user_ids.take(pa.array(evaluation.users)).to_pylist()
        columns["part"] += [part] * len(evaluation.users)
        columns["above"] += evaluation.ranks.above.tolist()
        columns["tied"] += evaluation.ranks.tied.tolist()
    types = {"user_id": pa.string(), "part": pa.string(), "above": pa.int64(), "tied": pa.int64()}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    weights = [evaluation.ranks.weights for evaluation in evaluations.values()]
    if weights and all(each is not None for each in weights):
        table = table.append_column("weight", pa.array(np.concatenate(weights)))
    metadata = {f"coverage_{part}": repr(evaluation.coverage) for part, evaluation in evaluations.items()}
    metadata |= {f"sid_level_gain_{part}": repr(one.sid_level_gain) for part, one in evaluations.items() if one.sid_level_gain is not None}
    write_table(path, table, metadata)


def read_ranks(path: Path, part: Part) -> ReadRanks:
    """Read one part of a file of `write_ranks`, with users in the order of the split."""
    table = read_table(path)
    rows = np.array(table["part"].to_pylist()) == part
    metadata = table.schema.metadata or {}
    gain = metadata.get(f"sid_level_gain_{part}".encode())
    columns = [table[name].to_numpy()[rows] for name in ("above", "tied", "weight") if name in table.column_names]
    return ReadRanks(Ranks(*columns), float(metadata[f"coverage_{part}".encode()]), None if gain is None else float(gain))


def lost_to_collisions(table: SidTable) -> int:
    """Number of items minus number of distinct published SIDs."""
    return len(table) - len(np.unique(table.full_codes(), axis=0))


def best_achievable_row(path: Path) -> dict[str, Any]:
    """Row of the best achievable metrics, in expectation, from the best_achievable.json of the demo catalogue.

    Raises:
        ConfigError: the file does not contain these metrics.
    """
    best = read_json(path)
    try:
        test, valid = ({name: {"mean": value, "std": 0.0} for name, value in best[part]["expected"].items()} for part in ("test", "valid"))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"best_achievable: {path} lacks the keys test.expected and valid.expected; give the best_achievable.json of a demo catalogue"
        ) from error
    return {
        "arm": "best achievable",
        "family": "best_achievable",
        "seeds": [],
        "metrics": test,
        "valid": valid,
        "collisions": None,
        "seconds": None,
    }


def dataset_facts(catalog: Catalog, split: Split) -> dict[str, Any]:
    """Facts about the data: catalogue hash, numbers of items and ranked users, and how many test items occur in the user's history."""
    return {
        "catalog_sha256": catalog.sha256,
        "items": len(catalog.items),
        "valid_users": len(split.users("valid")),
        "test_users": len(split.users("test")),
        "target_seen_before": int(split.target_seen_before("test").sum()),
    }


def difference_rows(ranks: Mapping[str, Mapping[int | None, Ranks]], baselines: Sequence[str], part: Part) -> list[dict[str, Any]]:
    """Compare every method with every baseline on the metrics of `COMPARED` by a paired bootstrap over users and shared seeds.

    Args:
        ranks: method -> seed -> ranks of this part. A deterministic method has the single seed None and is paired with every seed of
            the other. Pairs without a shared seed are left out.

    Returns:
        Rows with arm, baseline, part, metric, seeds (number of paired seeds; 0 for two deterministic methods), the fields of
        `Difference`, `p_holm` (Holm-corrected over all comparisons of this part and metric) and `exceeds_noise` (p_holm < 0.05).
    """
    rows: list[dict[str, Any]] = []
    for metric in COMPARED:
        pairs, labels = [], []
        for baseline in baselines:
            for method in ranks:
                seeds = None if method == baseline or baseline not in ranks else _paired_seeds(ranks[method], ranks[baseline])
                if seeds:
                    named = zip((method, baseline), seeds, strict=True)
                    pairs.append(tuple(np.stack([per_position(ranks[name][seed], metric) for seed in used]) for name, used in named))
                    count = len(set().union(*seeds) - {None})
                    labels.append({"arm": method, "baseline": baseline, "part": part, "metric": metric, "seeds": count})
        differences = paired_bootstraps(pairs)
        corrected = holm([difference.p for difference in differences])
        rows += [
            label | difference._asdict() | {"p_holm": p, "exceeds_noise": p < SIGNIFICANT}
            for label, difference, p in zip(labels, differences, corrected, strict=True)
        ]
    return rows


def _paired_seeds(method: Mapping[int | None, Ranks], baseline: Mapping[int | None, Ranks]) -> tuple[list[int | None], ...] | None:
    """Seeds of a method and of its baseline that are compared; None if they share none."""
    if None in method or None in baseline:
        return [*method], [*baseline]
    shared = [seed for seed in method if seed in baseline]
    return (shared, shared) if shared else None
