"""NVIDIA recsys-examples, `sid-gr-inference`: the item catalogue for `--catalog-jsonl`, one object per line.

`{"item_id": .., "token_ids": [..], "metadata": {"sid": "<a_3><b_17><c_201>"}}`. Token ids are those of the served model. The server
refuses two lines with one path, so items that share a Semantic ID are one line: `item_id` is the first, `metadata.item_ids` lists all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsid.disk import replacing
from mmsid.export.text_tokens import SidTokens
from mmsid.id_columns import id_array
from mmsid.sids.grouping import Groups, prefix_keys
from mmsid.sids.table import SidTable

FILE = "items.jsonl"


def write_item_constraints(path: Path, table: SidTable, tokens: SidTokens, ids: Sequence[np.ndarray]) -> int:
    """Write the catalogue in the order of the table. Returns the number of lines.

    Args:
        ids: per level, the token id of each code.
    """
    codes = tokens.codes
    groups = Groups.of(prefix_keys(codes + 1, [len(level) + 1 for level in tokens.levels]))  # + 1: a suffix may be -1
    item_ids = id_array(table.item_ids, table.integer_ids).to_pylist()
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for group in np.argsort(groups.order[groups.starts[:-1]], kind="stable"):
            rows = groups[int(group)]
            path_codes = [(level, code) for level, code in enumerate(codes[rows[0]].tolist()) if code >= 0]
            metadata = {"sid": "".join(tokens.levels[level][code] for level, code in path_codes)}
            if len(rows) > 1:
                metadata["item_ids"] = [item_ids[row] for row in rows]
            record = {
                "item_id": item_ids[rows[0]],
                "token_ids": [int(ids[level][code]) for level, code in path_codes],
                "metadata": metadata,
            }
            file.write(json.dumps(record) + "\n")
    return len(groups)
