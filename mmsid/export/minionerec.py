"""MiniOneRec (github.com/AkaliKong/MiniOneRec): the files of one data set that `convert_dataset.py`, `sft.py` and `rl.py` read.

NAME.index.json: item number -> SID tokens. NAME.item.json: item number -> title and description. NAME.train.inter, .valid.inter and
.test.inter: user, history, next item, as tab-separated numbers. NAME.item2id and NAME.user2id: your ids and these numbers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmsid.catalog import Catalog, Split
from mmsid.disk import replacing
from mmsid.errors import ArtifactError, ConfigError
from mmsid.sids.table import SidTable

LEVELS = 3  # their title and description tasks join the first three tokens, and skip items with fewer
HISTORY = 10  # items of a history, as in their own preparation
_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"


def write_minionerec(folder: Path, name: str, table: SidTable, catalog: Catalog, split: Split) -> dict[str, int]:
    """Write the files of a data set. Items are numbered in the order of the catalogue, users in the order of their histories.

    Args:
        table: Semantic IDs of all items of the catalogue.

    Returns:
        Number of interactions per part.
    Raises:
        ArtifactError: the Semantic IDs have fewer than three levels, or an item has none.
        ConfigError: `name` has a dot, at which MiniOneRec cuts file names.
    """
    if "." in name or "/" in name:
        raise ConfigError(f"name is {name!r}, but MiniOneRec cuts file names at the first dot; give a name without dots and slashes")
    if table.num_levels < LEVELS:
        raise ArtifactError(
            f"the Semantic IDs have {table.num_levels} levels, MiniOneRec skips items with fewer than {LEVELS}; use more levels"
        )
    table = table.align(catalog.item_ids)
    sids = table.sid_tokens()
    if max(map(len, sids), default=0) > LEVELS:
        warnings.warn(
            f"MiniOneRec's tasks between titles and Semantic IDs join the first {LEVELS} tokens only, these Semantic IDs have up to "
            f"{max(map(len, sids))}; its sequence tasks read all of them",
            stacklevel=2,
        )
    folder = Path(folder)
    _write_object(folder / f"{name}.index.json", sids)
    _write_object(
        folder / f"{name}.item.json",
        ({"title": _line(item.title) or item.item_id, "description": _description(item.description or item.title) or item.item_id}
         for item in catalog.items),
    )  # fmt: skip
    _write_lines(folder / f"{name}.item2id", (f"{_line(item_id)}\t{row}\n" for row, item_id in enumerate(catalog.item_ids)))
    _write_lines(folder / f"{name}.user2id", (f"{_line(user.user_id)}\t{row}\n" for row, user in enumerate(catalog.histories)))
    counts = {}
    for part, pairs in (("train", _train(split)), ("valid", _targets(split, "valid")), ("test", _targets(split, "test"))):
        counts[part] = _write_lines(
            folder / f"{name}.{part}.inter", (f"{user}\t{' '.join(map(str, history))}\t{item}\n" for user, history, item in pairs), _HEADER
        )
    return counts


def _train(split: Split) -> Iterator[tuple[int, list[int], int]]:
    """Every train interaction with the interactions before it."""
    for user, rows in enumerate(split.train):
        items = rows.tolist()
        for at in range(1, len(items)):
            yield user, items[max(at - HISTORY, 0) : at], items[at]


def _targets(split: Split, part: str) -> Iterator[tuple[int, list[int], int]]:
    targets = split.valid if part == "valid" else split.test
    for user in split.users(part):  # type: ignore[arg-type]
        history = np.asarray(split.history(int(user), part))[-HISTORY:].tolist()  # type: ignore[arg-type]
        if history:
            yield int(user), history, int(targets[user])


def _line(text: str | None) -> str:
    """The text on one line: MiniOneRec keeps titles in tab-separated lines."""
    return " ".join((text or "").split())


def _description(text: str | None) -> str:
    """The text on one line. MiniOneRec evaluates a description that begins like a list as Python; this one no longer begins so."""
    line = _line(text)
    return f"Description: {line}" if line.startswith("['") else line


def _write_object(path: Path, values: Iterator | list) -> None:
    """{"0": value, "1": value, ...}, in ASCII, because MiniOneRec opens files in the encoding of the machine."""
    with replacing(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for row, value in enumerate(values):
            file.write(("{" if row == 0 else ",") + f'\n"{row}": {json.dumps(value)}')
        file.write("\n}\n")


def _write_lines(path: Path, lines: Iterator[str], header: str = "") -> int:
    count = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(header)
        for line in lines:
            file.write(line)
            count += 1
    return count
