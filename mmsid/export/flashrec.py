"""FlashRec (github.com/sohu-mptc/FlashRec): the vocabulary of existing Semantic IDs for `--sid-vocab-file`.

The file is an object whose keys are paths of codes, "3,17,201". The engine reads the keys only; the values here are the item ids of the
path, so that an application can look up what the engine returns. Every path has the same length. Its text tokenizer has the tokens
`<s_a_0>` ... level after level in consecutive ids, followed by `<|sid_begin|>` and `<|sid_end|>`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mmsid.disk import replacing
from mmsid.errors import ArtifactError
from mmsid.export.text_tokens import SidTokens, flashrec_token
from mmsid.id_columns import id_array
from mmsid.sids.grouping import Groups, prefix_keys
from mmsid.sids.table import SidTable

FILE = "sid_vocab.json"
BOUNDARY = ("<|sid_begin|>", "<|sid_end|>")


def flashrec_tokens(table: SidTable) -> SidTokens:
    """Tokens in the names of FlashRec. A last level of two codes gets a third one: FlashRec takes two for the boundary tokens."""
    return SidTokens.fixed_length(table, flashrec_token, BOUNDARY, least=3)


def write_vocabulary(path: Path, table: SidTable, tokens: SidTokens) -> int:
    """Write the vocabulary, one path per line. Returns the number of paths."""
    groups = Groups.of(prefix_keys(tokens.codes, [len(level) for level in tokens.levels]))
    ids = [json.dumps(one) for one in id_array(table.item_ids, table.integer_ids).to_pylist()]
    first = groups.order[groups.starts[:-1]]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for group, codes in enumerate(tokens.codes[first].tolist()):
            items = ", ".join([ids[row] for row in groups[group]])
            file.write(("{" if group == 0 else ",\n") + f'"{",".join(map(str, codes))}": [{items}]')
        file.write("}\n")
    return len(groups)


def serving_layout(ids: list[np.ndarray], boundary: tuple[int, int]) -> str:
    """The value of FlashRec's `--sid`, START:END/SIZE,SIZE,...: where the tokens are in the vocabulary.

    Raises:
        ArtifactError: the token ids are not consecutive, which FlashRec needs.
    """
    flat = np.concatenate(ids)
    if (np.diff(flat) != 1).any() or boundary != (int(flat[-1]) + 1, int(flat[-1]) + 2):
        at = int(np.argmax(np.diff(flat) != 1)) if (np.diff(flat) != 1).any() else len(flat) - 1
        raise ArtifactError(
            f"the SID tokens have no consecutive ids in this text tokenizer (after id {int(flat[at])}), FlashRec needs them in one block; "
            "start from a tokenizer without SID tokens"
        )
    return f"{int(flat[0])}:{int(flat[-1])}/{','.join(str(len(level)) for level in ids)}"
