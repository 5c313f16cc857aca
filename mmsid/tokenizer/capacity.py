"""Check that a catalogue has no more distinct items than there are Semantic IDs."""

from __future__ import annotations

from mmsid.catalog import Catalog
from mmsid.errors import ConfigError


def check_capacity(stage: str, catalog: Catalog, num_levels: int, codebook_size: int) -> None:
    """Compare the number of distinct items with the number of Semantic IDs, K ** L. Items of equal content share a SID.

    Raises:
        ConfigError: there are more distinct items. The message gives sizes that are enough.
    """
    items, capacity = len(set(catalog.content_hashes)), codebook_size**num_levels
    if items <= capacity:
        return
    levels = num_levels
    while codebook_size**levels < items:
        levels += 1
    size = codebook_size
    while size**num_levels < items:
        size *= 2
    raise ConfigError(
        f"{stage}: the catalogue has {items:,} distinct items, but {num_levels} levels of {codebook_size:,} codes give only {capacity:,} "
        f"Semantic IDs; raise {stage}.codebook_size (to {size:,} or more) or {stage}.num_levels (to {levels} or more)"
    )
