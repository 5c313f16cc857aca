"""Churn: what changed between two SID tables of one catalogue, and the names under which least changes.

Codes are names: a retrained tokenizer that groups the same items together under other numbers has changed nothing but its
vocabulary, yet every consumer of the old codes would have to start again. `best_renaming` finds, level by level, the permutation
of the new codes that agrees with the old table for most items (Hungarian); what then still differs is real churn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmsid.errors import ArtifactError
from mmsid.sids.distribution import flip_rate, prefix_labels
from mmsid.sids.table import SidTable


def best_renaming(old: np.ndarray, new: np.ndarray, codebook_sizes: tuple[int, ...]) -> list[np.ndarray]:
    """One permutation per level, (K_l,) int64: entry c is the old name that the new code c should bear.

    Args:
        old, new: (N, L) codes of the same items; N may be 0.

    The permutation of a level maximises the number of items whose code is the same; codes that no item decides keep their
    own number where they can.
    """
    permutations = []
    for level, size in enumerate(codebook_sizes):
        agreeing = np.zeros((size, size), dtype=np.int64)
        np.add.at(agreeing, (new[:, level], old[:, level]), 1)
        # among equally good permutations, the one that renames least
        _, names = linear_sum_assignment(agreeing * (size + 1) + np.eye(size, dtype=np.int64), maximize=True)
        permutations.append(names.astype(np.int64))
    return permutations


def rename(codes: np.ndarray, permutations: list[np.ndarray]) -> np.ndarray:
    """(N, L) codes under their new names."""
    return np.stack([names[codes[:, level]] for level, names in enumerate(permutations)], axis=1)


def churn_report(old: SidTable, new: SidTable) -> dict[str, Any]:
    """What changed from one table to the next, by item id; ready for JSON.

    Returns:
        items: old, new, shared, gone, added.
        changed: share of the shared items whose published code differs, per level and at any level; changed_prefix: whose
            prefix of length l differs. changed_raw: per level, raw codes.
        changed_if_renamed: `changed` under the best renaming of the new codes: far below `changed`, most of it is only names.
        kept_together: per prefix length, of the pairs of shared items that had the prefix in common, the share that still has
            (None where there was no such pair); it does not depend on names at all.
        same_tokenizer: both were made by one tokenizer.
    Raises:
        ArtifactError: no item in common, or other codebooks.
    """
    if old.codebook_sizes != new.codebook_sizes:
        raise ArtifactError(
            f"churn: the old table has codebooks {old.codebook_sizes}, the new one {new.codebook_sizes}; codes of different codebooks "
            "cannot be compared: retrain with the old sizes, or publish a new vocabulary"
        )
    present = set(new.item_ids)
    shared = sorted(item_id for item_id in old.item_ids if item_id in present)
    if not shared:
        raise ArtifactError(f"churn: none of the {len(old)} old items is among the {len(new)} new ones; are these of one catalogue?")
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
    """The report as Markdown: one row per level."""
    items = report["items"]
    lines = [
        f"{items['shared']:,} items in both tables, {items['added']:,} new, {items['gone']:,} gone; "
        f"{report['changed']['any']:.1%} of the shared ones changed ({report['changed_if_renamed']['any']:.1%} under the best renaming).",
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
    """Pairs within groups of these sizes."""
    return int((counts.astype(np.int64) * (counts - 1)).sum() // 2)
