"""Semantic IDs: SID table, collision handling, trie, intrinsic metrics and exports. Nothing here needs a model."""

from mmsid.sids.collisions import Resolution, add_suffix, relocate, resolve
from mmsid.sids.folder import write_sid_folder
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.intrinsic_table import intrinsic_table
from mmsid.sids.table import SidTable
from mmsid.sids.trie import Trie

__all__ = [
    "Resolution",
    "SidTable",
    "Trie",
    "add_suffix",
    "intrinsic_metrics",
    "intrinsic_table",
    "relocate",
    "resolve",
    "write_sid_folder",
]
