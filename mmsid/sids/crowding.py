"""Warning of a SID that holds a large share of the items, as it happens when items have no content that tells them apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

LARGEST_SHARE = 0.05
_FEWEST_ITEMS = 5  # below it a share says nothing


def crowding_warning(metrics: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A sentence for the methods of which one SID holds over 5 % of the items before collision handling, else None.

    Args:
        metrics: method name -> result of `intrinsic_metrics`.
    """
    crowded = []
    for name, figures in metrics.items():
        items, largest = figures["raw"]["items"], figures["raw"]["max_bucket"]
        if largest >= _FEWEST_ITEMS and largest > LARGEST_SHARE * items:
            crowded.append(f"{largest:,} of {items:,} items ({100 * largest / items:.0f} %) in {name}")
    if not crowded:
        return None
    return (
        f"before collision handling, one Semantic ID holds {', '.join(crowded)}: their contents are equal or hardly differ; look at "
        "`mmsid catalog` for items without text or pictures and for columns that are not read"
    )


def warn_of_crowding(stage: str, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Warn, and return the lines for the stage's table of metrics: empty if no SID is crowded."""
    warning = crowding_warning(metrics)
    if warning is None:
        return ""
    warnings.warn(f"{stage}: {warning}", stacklevel=3)
    return f"\nWarning: {warning}.\n"
