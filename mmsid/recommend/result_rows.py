"""What an evaluated arm leaves on disk, and the rows that a ranking table is made of: one place for stage and bench.

Ranks are the record: one row per user, from which every figure and every paired difference can be computed again. The ids of users
stay in these files (a run's folder) and never enter a table of results.
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
from mmsid.recommend.metrics import COVERAGE_CUTOFF, Difference, Ranks, holm, paired_bootstraps, per_position, summarise
from mmsid.sids.table import SidTable

COMPARED = ("NDCG@10", "HR@10")
SIGNIFICANT = 0.05


class ReadRanks(NamedTuple):
    """Ranks of one part as they were written, and the coverage that was measured with them."""

    ranks: Ranks
    coverage: float

    def summary(self) -> dict[str, float]:
        """All metrics by name, coverage included."""
        return summarise(self.ranks) | {f"coverage@{COVERAGE_CUTOFF}": self.coverage}


def write_ranks(path: Path, found: Mapping[Part, Evaluation], catalog: Catalog) -> None:
    """Columns user_id, part, above, tied; the coverage of each part stands in the schema's metadata."""
    columns: dict[str, list[Any]] = {"user_id": [], "part": [], "above": [], "tied": []}
    for part, evaluation in found.items():
        columns["user_id"] += [catalog.histories[user].user_id for user in evaluation.users]
        columns["part"] += [part] * len(evaluation.users)
        columns["above"] += evaluation.ranks.above.tolist()
        columns["tied"] += evaluation.ranks.tied.tolist()
    types = {"user_id": pa.string(), "part": pa.string(), "above": pa.int64(), "tied": pa.int64()}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    write_table(path, table, {f"coverage_{part}": repr(evaluation.coverage) for part, evaluation in found.items()})


def read_ranks(path: Path, part: Part) -> ReadRanks:
    """One part of what `write_ranks` wrote, users in the order of the split."""
    table = read_table(path)
    rows = np.array(table["part"].to_pylist()) == part
    coverage = float((table.schema.metadata or {})[f"coverage_{part}".encode()])
    return ReadRanks(Ranks(table["above"].to_numpy()[rows], table["tied"].to_numpy()[rows]), coverage)


def lost_to_collisions(table: SidTable) -> int:
    """Items minus distinct published SIDs."""
    return len(table) - len(np.unique(table.full_codes(), axis=0))


def best_achievable_row(path: Path) -> dict[str, Any]:
    """The best achievable figures, in expectation, as the demo catalogue's best_achievable.json gives them.

    Raises:
        ConfigError: the file holds no such figures.
    """
    truth = read_json(path)
    try:
        test, valid = ({name: {"mean": value, "std": 0.0} for name, value in truth[part]["expected"].items()} for part in ("test", "valid"))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"truth: {path} has no figures under test.expected; name the demo catalogue's file") from error
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
    """What every table says of its data: the catalogue's hash, items, users ranked, and how often a test item was seen before."""
    return {
        "catalog_sha256": catalog.sha256,
        "items": len(catalog.items),
        "valid_users": len(split.users("valid")),
        "test_users": len(split.users("test")),
        "target_seen_before": sum(bool(np.isin(split.test[user], split.before_test[user])) for user in split.users("test")),
    }


def difference_rows(ranks: Mapping[str, Mapping[int | None, Ranks]], baselines: Sequence[str], part: Part) -> list[dict[str, Any]]:
    """Every arm against every baseline on the metrics of `COMPARED`, by paired bootstrap over users and shared seeds.

    Args:
        ranks: arm -> seed -> ranks of this part; a deterministic arm has the one seed None and is paired with every seed of the
            other. Pairs of arms without a shared seed are left out.

    Returns:
        Rows arm, baseline, part, metric, seeds (how many were paired; 0 for two deterministic arms), the fields of `Difference`,
        `p_holm` (corrected by Holm over all comparisons of this part and metric), `exceeds_noise` (p_holm below 0.05).
    """
    rows: list[dict[str, Any]] = []
    for metric in COMPARED:
        pairs, labels = [], []
        for baseline in baselines:
            for arm in ranks:
                seeds = None if arm == baseline or baseline not in ranks else _paired_seeds(ranks[arm], ranks[baseline])
                if seeds:
                    named = zip((arm, baseline), seeds, strict=True)
                    pairs.append(tuple(np.stack([per_position(ranks[name][seed], metric) for seed in used]) for name, used in named))
                    labels.append(
                        {"arm": arm, "baseline": baseline, "part": part, "metric": metric, "seeds": len(set().union(*seeds) - {None})}
                    )
        found: list[Difference] = paired_bootstraps(pairs)
        corrected = holm([difference.p for difference in found])
        rows += [
            label | difference._asdict() | {"p_holm": p, "exceeds_noise": p < SIGNIFICANT}
            for label, difference, p in zip(labels, found, corrected, strict=True)
        ]
    return rows


def _paired_seeds(arm: Mapping[int | None, Ranks], baseline: Mapping[int | None, Ranks]) -> tuple[list[int | None], ...] | None:
    """The seeds of each of two arms that are compared with one another; None where none is shared."""
    if None in arm or None in baseline:
        return [*arm], [*baseline]
    shared = [seed for seed in arm if seed in baseline]
    return (shared, shared) if shared else None
