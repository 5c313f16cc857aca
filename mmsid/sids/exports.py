"""SID exports: index.json (the format of MiniOneRec, LC-Rec and LETTER), token list, code strings, and the imports of these formats.

For serving engines it also writes the allowed next tokens of every prefix and the items of every SID.
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
import torch
import torch.nn.functional as F

from mmsid.artifacts import read_json, read_table, write_json, write_tensors
from mmsid.disk import replacing
from mmsid.errors import ArtifactError
from mmsid.sids.table import LETTERS, SidTable, token
from mmsid.sids.trie import Trie

_BLOCK_ITEMS = 65_536
_TOKEN = re.compile(r"<([a-z])_([0-9]{1,9})>")


def token_ids(text_tokenizer: Any, table: SidTable) -> list[list[int]]:
    """Token id of each code, per level, in a Hugging Face text tokenizer to which the tokens of `write_tokens` were added.

    Raises:
        ArtifactError: a SID token is missing from the vocabulary.
    """
    known = text_tokenizer.get_vocab()
    missing = [text for text in table.vocabulary() if text not in known]
    if missing:
        raise ArtifactError(f"the text tokenizer lacks {len(missing)} SID tokens (first: {missing[0]}); add tokens.txt to it first")
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


def write_tokens(path: Path, table: SidTable) -> None:
    """Write the vocabulary, one token per line.

    `tokenizer.add_tokens(Path(path).read_text().split())` adds the tokens to a Hugging Face tokenizer.
    """
    Path(path).write_text("\n".join(table.vocabulary()) + "\n", encoding="utf-8")


def write_allowed_tokens(path: Path, table: SidTable, ids: Sequence[Sequence[int]], end_token_id: int | None = None) -> None:
    """Write the allowed next tokens of every SID prefix, in token ids of a serving engine (for logits processors of SGLang or vLLM).

    `.json`: `{"levels": D, "end": E, "allowed": {"": [..], "17": [..], "17,301": [..]}}`. Keys are prefixes of token ids joined by
    commas; lists ascend. With `end_token_id`, a whole SID is a key as well and allows the end token; without it, stop after a whole
    SID. A prefix that is no key belongs to no item: allow the end token only.

    `.safetensors`, for large catalogues: the trie in compressed sparse rows. Node 0 of depth 0 is the empty prefix. Node i of depth d
    may be followed by `tokens.d[offsets.d[i] : offsets.d[i + 1]]`, ascending; the index in `tokens.d` is the node number at depth
    d + 1. `ends.d[i]` is 1 where node i is a whole SID.

    Args:
        ids: per level, the token id of each code (`token_ids`).

    Raises:
        ArtifactError: unsupported file ending, or `ids` does not cover every code.
    """
    trie, path = Trie.from_table(table), Path(path)
    if len(ids) != trie.depth or any(len(level) < size for level, size in zip(ids, trie.sizes.tolist())):
        raise ArtifactError(
            f"token ids are given for {[len(level) for level in ids]} codes per level, the SIDs have {trie.sizes.tolist()}; give the id of "
            "every code"
        )
    if path.suffix == ".json":
        allowed: dict[str, list[int]] = {}
        for sid in table.full_codes().tolist():
            tokens = [ids[level][code] for level, code in enumerate(sid) if code >= 0]
            following = tokens if end_token_id is None else [*tokens, end_token_id]
            for length, next_token in enumerate(following):
                allowed.setdefault(",".join(map(str, tokens[:length])), []).append(next_token)
        sorted_lists = {prefix: sorted(set(next_tokens)) for prefix, next_tokens in allowed.items()}
        write_json(path, {"levels": trie.depth, "end": end_token_id, "allowed": sorted_lists})
    elif path.suffix == ".safetensors":
        write_tensors(path, _allowed_tensors(trie, ids))
    else:
        raise ArtifactError(f"{path}: allowed tokens are written as .json or .safetensors; change the file ending")


def _allowed_tensors(trie: Trie, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """The trie as compressed sparse rows of token ids instead of codes, children in ascending order of token ids."""
    tensors = {}
    order = torch.zeros(1, dtype=torch.int64)  # output node number -> node number in the trie, at the current depth
    for depth in range(trie.depth):
        first, code = trie.child_offsets[depth], trie.child_codes[depth]
        count = first.diff()[order]
        offsets = F.pad(count.cumsum(0), (1, 0))
        parent = torch.repeat_interleave(torch.arange(len(order)), count)
        child = first[order][parent] + torch.arange(len(parent)) - offsets[parent]
        token_of = torch.as_tensor(list(ids[depth]), dtype=torch.int64)[code[child]]
        ascending = torch.from_numpy(np.lexsort((token_of.numpy(), parent.numpy())))
        items = trie.item_end[depth] - trie.item_start[depth]
        below = torch.zeros_like(items)
        below.index_add_(0, order[parent], (trie.item_end[depth + 1] - trie.item_start[depth + 1])[child])
        tensors |= {
            f"offsets.{depth}": offsets,
            f"tokens.{depth}": token_of[ascending],
            f"ends.{depth}": (items > below)[order].to(torch.uint8),
        }
        order = child[ascending]
    return tensors | {f"ends.{trie.depth}": torch.ones(len(order), dtype=torch.uint8)}


def write_sid_items(path: Path, table: SidTable) -> None:
    """Write the items of each SID, in table order: `{"<a_12><b_7><c_201>": ["item", ...], ...}` (sid2item of FlashRec)."""
    items: dict[str, list[str]] = {}
    for item_id, tokens in zip(table.item_ids, table.sid_tokens(), strict=True):
        items.setdefault("".join(tokens), []).append(item_id)
    write_json(path, items)


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
