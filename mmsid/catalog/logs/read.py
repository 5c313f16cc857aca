"""Histories of users from the logs of a catalogue, whatever their form."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.histories import Histories
from mmsid.catalog.logs.columns import open_log
from mmsid.catalog.logs.events import read_events
from mmsid.catalog.logs.item_ids import MOST_UNKNOWN, ItemIds
from mmsid.catalog.logs.sequences import read_sequences
from mmsid.id_columns import holds_integers


def read_histories(
    config: CatalogConfig,
    item_ids: pa.Array,
    content_rank: np.ndarray,
    problems: Counter[str],
    notes: list[str],
    *,
    max_unknown: float = MOST_UNKNOWN,
) -> Histories:
    """Read the histories of `config.sequences` or `config.events`, with item rows that index `item_ids`.

    Args:
        item_ids: (N,) ids of all items of the items table, before `max_items` applies.
        content_rank: (N,) int64, position of each item in the order of content. It orders events of equal time.
        problems: receives the counts of what is dropped, merged or converted.
        notes: receives what was detected, one line per fact.
        max_unknown: largest share of interactions that may be of unknown items.

    Raises:
        CatalogError: the table is unreadable, a column is absent or holds other values than expected, a type is not listed in
            `config.event_types`, a weight is negative, or more than the share `max_unknown` of the interactions is of unknown items.
    """
    log, items = open_log(config, notes), ItemIds(item_ids)
    read = read_sequences if log.sequence is not None else read_events
    found = read(log, config, items, content_rank, problems, notes, max_unknown)
    found.integer_user_ids = holds_integers(log.columns.table[log.user].type)
    return found
