"""Churn report: what changed between two SID tables of one catalogue.

A retrained tokenizer may group the items in the same way under other code numbers. `best_renaming` finds, level by level, the
permutation of the new codes that agrees with the old table for most items (Hungarian algorithm).
The changes that remain after this renaming are real changes of the grouping.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmsid.errors import ArtifactError
from mmsid.sids.distribution import flip_rate, prefix_labels
from mmsid.sids.table import SidTable


def best_renaming(old: np.ndarray, new: np.ndarray, codebook_sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Return one permutation per level, (K_l,) int64: entry c is the code number that replaces the new code c.

    The permutation of a level maximises the number of items with equal codes in both tables. Codes that no item uses keep their number
    where possible.

    Args:
        old, new: (N, L) codes of the same items; N may be 0.
    """
    permutations = []
    for level, size in enumerate(codebook_sizes):
        agreeing = np.zeros((size, size), dtype=np.int64)
        np.add.at(agreeing, (new[:, level], old[:, level]), 1)
        # the identity term selects, among equally good permutations, the one that renames the fewest codes
        _, names = linear_sum_assignment(agreeing * (size + 1) + np.eye(size, dtype=np.int64), maximize=True)
        permutations.append(names.astype(np.int64))
    return permutations


def rename(codes: np.ndarray, permutations: list[np.ndarray]) -> np.ndarray:
    """Apply the permutations of `best_renaming` to (N, L) codes."""
    return np.stack([names[codes[:, level]] for level, names in enumerate(permutations)], axis=1)


def churn_report(old: SidTable, new: SidTable) -> dict[str, Any]:
    """Compare two tables by item id. The result is ready for JSON.

    Returns:
        items: number of old, new, shared, gone and added items.
        changed: share of shared items whose published code differs, per level and at any level.
        changed_prefix: share of shared items whose prefix of length l differs.
        changed_raw: `changed` of the raw codes, per level.
        changed_if_renamed: `changed` after `best_renaming` of the new codes. A value far below `changed` means that the codes were
            mostly renumbered.
        kept_together: per prefix length, the share of pairs of shared items with a common old prefix that also have a common new
            prefix (None without such a pair). It does not depend on code numbers.
        same_tokenizer: True if one tokenizer made both tables.
    Raises:
        ArtifactError: the tables have no item in common, or different codebook sizes.
    """
    if old.codebook_sizes != new.codebook_sizes:
        raise ArtifactError(
            f"churn: the old table has codebooks {old.codebook_sizes}, the new one {new.codebook_sizes}; codes of different codebooks "
            "cannot be compared; retrain with the old sizes, or publish a new vocabulary"
        )
    present = set(new.item_ids)
    shared = sorted(item_id for item_id in old.item_ids if item_id in present)
    if not shared:
        raise ArtifactError(
            f"churn: none of the {len(old)} old items is among the {len(new)} new ones; compare tables of the same catalogue"
        )
    before, after = old.align(shared), new.align(shared)
    changed = flip_rate(before.codes, after.codes)
    renamed = flip_rate(before.codes, rename(after.codes, best_renaming(before.codes, after.codes, new.codebook_sizes)))
    prefixes = np.logical_or.accumulate(before.codes != after.codes, axis=1).mean(axis=0)
    return {
        "items": {
            "old": len(old),
            "new": len(new),
            "shared": len(shared),
            "gone": len(old) - len(shared),
            "added": len(new) - len(shared),
        },
        "changed": {"levels": changed[:-1].tolist(), "any": float(changed[-1])},
        "changed_prefix": prefixes.tolist(),
        "changed_raw": flip_rate(before.raw_codes, after.raw_codes)[:-1].tolist(),
        "changed_if_renamed": {"levels": renamed[:-1].tolist(), "any": float(renamed[-1])},
        "kept_together": _kept_together(before.codes, after.codes),
        "same_tokenizer": bool(old.tokenizer_sha256) and old.tokenizer_sha256 == new.tokenizer_sha256,
    }


def churn_table(report: dict[str, Any]) -> str:
    """Format a churn report as Markdown, one row per level."""
    items = report["items"]
    lines = [
        f"{items['shared']:,} items in both tables, {items['added']:,} new, {items['gone']:,} gone; "
        f"{report['changed']['any']:.1%} of the shared items changed ({report['changed_if_renamed']['any']:.1%} under the best renaming).",
        "",
        "| level | code changed | if renamed | raw code changed | prefix changed | pairs still together |",
        "|---|---|---|---|---|---|",
    ]
    columns = [report["changed"]["levels"], report["changed_if_renamed"]["levels"], report["changed_raw"], report["changed_prefix"]]
    for level, (*shares, together) in enumerate(zip(*columns, report["kept_together"], strict=True)):
        cells = [f"{share:.1%}" for share in shares] + ["-" if together is None else f"{together:.1%}"]
        lines.append(f"| {level + 1} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _kept_together(old: np.ndarray, new: np.ndarray) -> list[float | None]:
    shares: list[float | None] = []
    for a, b in zip(prefix_labels(old).T, prefix_labels(new).T, strict=True):
        together = _pairs(np.bincount(a))
        shares.append(_pairs(np.unique(np.stack([a, b]), axis=1, return_counts=True)[1]) / together if together else None)
    return shares


def _pairs(counts: np.ndarray) -> int:
    """Number of pairs within groups of the given sizes."""
    return int((counts.astype(np.int64) * (counts - 1)).sum() // 2)
