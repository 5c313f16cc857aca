"""SIDs in the shapes other projects read, and back: index.json (MiniOneRec, LC-Rec, LETTER), token list, code strings."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmsid.artifacts import read_json, read_table, write_json
from mmsid.errors import ArtifactError
from mmsid.sids.table import SidTable

LETTERS = string.ascii_lowercase
_TOKEN = re.compile(r"<([a-z])_([0-9]{1,9})>")


def token(level: int, code: int) -> str:
    """`<a_12>`: level 0 is a."""
    return f"<{LETTERS[level]}_{code}>"


def sid_tokens(table: SidTable) -> list[list[str]]:
    """Each item's tokens in table order: one per level, and one more where it carries a suffix."""
    return [[token(level, code) for level, code in enumerate(row) if code >= 0] for row in table.full_codes().tolist()]


def vocabulary(table: SidTable) -> list[str]:
    """Every token a text tokenizer needs: all codes of all levels, used or not, so that it need not grow with the catalogue."""
    sizes = list(table.codebook_sizes)
    if table.suffix is not None:
        sizes.append(int(table.suffix.max(initial=-1)) + 1)
    return [token(level, code) for level, size in enumerate(sizes) for code in range(size)]


def write_index_json(path: Path, table: SidTable) -> None:
    """`{"item": ["<a_12>", "<b_7>", "<c_201>"], ...}`."""
    write_json(path, dict(zip(table.item_ids, sid_tokens(table), strict=True)))


def write_tokens(path: Path, table: SidTable) -> None:
    """One token per line; `tokenizer.add_tokens(Path(path).read_text().split())` adds them to a Hugging Face tokenizer."""
    Path(path).write_text("\n".join(vocabulary(table)) + "\n", encoding="utf-8")


def import_index_json(path: Path, codebook_sizes: Sequence[int] | None = None) -> SidTable:
    """Read an index.json made by mmsid or by the projects named above.

    Where some items have one token more than the others, that token is the collision suffix. Without `codebook_sizes`
    every level gets the size 1 + the largest code of any level (published sets use one size for all).

    Raises:
        ArtifactError: not such a file; a token of another form or level; names the item.
    """
    index = read_json(path)
    if not isinstance(index, dict) or not all(isinstance(tokens, list) for tokens in index.values()):
        raise ArtifactError(f'{path}: expected an object {{"item": ["<a_12>", ...], ...}}')
    return _table(list(index), [list(map(str, tokens)) for tokens in index.values()], path, codebook_sizes)


def import_reference_sids(path: Path, column: str, codebook_sizes: Sequence[int] | None = None) -> SidTable:
    """One column of "<a_53> <b_82> <c_7>" strings, with `item_id` beside it, from a parquet file; else as `import_index_json`."""
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
        raise ArtifactError(f"{path}: no items")
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
