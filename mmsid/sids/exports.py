"""index.json, the mapping that MiniOneRec, LC-Rec and LETTER read, and the imports of published SIDs.

Exports for one consumer, with what it needs beside the mapping, are in `mmsid.export`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.artifacts import read_json, read_table
from mmsid.disk import replacing
from mmsid.errors import ArtifactError
from mmsid.sids.table import LETTERS, SidTable, token

_BLOCK_ITEMS = 65_536
_TOKEN = re.compile(r"<([a-z])_([0-9]{1,9})>")


def token_ids(text_tokenizer: Any, table: SidTable) -> list[list[int]]:
    """Token id of each code, per level, in a Hugging Face text tokenizer to which the tokens of `table.vocabulary()` were added.

    Raises:
        ArtifactError: a SID token is missing from the vocabulary.
    """
    known = text_tokenizer.get_vocab()
    missing = [text for text in table.vocabulary() if text not in known]
    if missing:
        raise ArtifactError(
            f"the text tokenizer lacks {len(missing)} SID tokens (first: {missing[0]}); add them by `mmsid export --format huggingface`"
        )
    return [[known[text] for text in level] for level in table.level_tokens()]


def write_index_json(path: Path, table: SidTable) -> None:
    """Write index.json: `{"item": ["<a_12>", "<b_7>", "<c_201>"], ...}`, in blocks of items."""
    tokens = [pa.array([f'"{text}"' for text in level]) for level in table.level_tokens()]
    codes = table.full_codes()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for start in range(0, len(table), _BLOCK_ITEMS):
            block = codes[start : start + _BLOCK_ITEMS]
            ids = pa.array([json.dumps(item_id, ensure_ascii=False) for item_id in table.item_ids[start : start + _BLOCK_ITEMS]])
            levels = [level.take(pa.array(column, mask=column < 0)) for level, column in zip(tokens, block.T, strict=True)]
            lists = pc.binary_join_element_wise(*levels, ",\n  ", null_handling="skip")
            entries = pc.binary_join_element_wise(" ", ids, ": [\n  ", lists, "\n ]", "")
            file.write((b",\n" if start else b"{\n") + ",\n".join(entries.to_pylist()).encode())
        file.write(b"\n}\n" if len(table) else b"{}\n")


def import_index_json(path: Path, codebook_sizes: Sequence[int] | None = None) -> SidTable:
    """Read an index.json written by mmsid, MiniOneRec, LC-Rec or LETTER.

    If some items have one token more than the others, that token is the collision suffix. Without `codebook_sizes`, every level gets
    the size 1 + the largest code of any level.

    Raises:
        ArtifactError: wrong file format, or a token of another form or level (the message names the item).
    """
    index = read_json(path)
    if not isinstance(index, dict) or not all(isinstance(tokens, list) for tokens in index.values()):
        raise ArtifactError(f'{path}: expected an object {{"item": ["<a_12>", ...], ...}}')
    return _table(list(index), [list(map(str, tokens)) for tokens in index.values()], path, codebook_sizes)


def import_reference_sids(path: Path, column: str, codebook_sizes: Sequence[int] | None = None) -> SidTable:
    """Read SIDs from a parquet file with an `item_id` column and a `column` of strings like "<a_53> <b_82> <c_7>".

    Suffix, `codebook_sizes` and errors are those of `import_index_json`.
    """
    table = read_table(path)
    for name in ("item_id", column):
        if name not in table.column_names:
            raise ArtifactError(f"{path}: column {name!r} missing, found {table.column_names}")
    return _table(
        [str(item_id) for item_id in table["item_id"].to_pylist()],
        [_split(text) for text in table[column].to_pylist()],
        path,
        codebook_sizes,
    )


def _split(text: str | None) -> list[str]:
    return [part if part.endswith(">") else part + ">" for part in (text or "").replace(" ", "").split(">") if part]


def _table(item_ids: list[str], sids: list[list[str]], path: Path, codebook_sizes: Sequence[int] | None) -> SidTable:
    if not item_ids:
        raise ArtifactError(f"{path}: the file contains no items; export it again")
    lengths = np.array([len(tokens) for tokens in sids])
    depth, least = int(lengths.max()), int(lengths.min())
    if least == 0 or depth - least > 1:
        row = int(lengths.argmin())
        raise ArtifactError(
            f"{path}: item {item_ids[row]!r} has {least} tokens, another has {depth}; every item needs the same number of levels "
            "(one more for a collision suffix)"
        )
    codes = np.full((len(sids), depth), -1, dtype=np.int64)
    for row, tokens in enumerate(sids):
        for level, text in enumerate(tokens):
            match = _TOKEN.fullmatch(text)
            if match is None or match[1] != LETTERS[level]:
                raise ArtifactError(
                    f"{path}: item {item_ids[row]!r}: token {level + 1} is {text!r}, expected the form {token(level, 12)!r}"
                )
            codes[row, level] = int(match[2])
    suffix = codes[:, least] if depth > least else None
    codes = codes[:, :least]
    return SidTable.from_codes(item_ids, codes, codebook_sizes or (int(codes.max()) + 1,) * least, suffix=suffix)
