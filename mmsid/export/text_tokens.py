"""SID tokens in the vocabulary of a Hugging Face text tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsid.errors import ArtifactError
from mmsid.sids.table import LETTERS, SidTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SidTokens:
    """Tokens of a SID table, and the fixed-length codes that they spell.

    Attributes:
        levels: per level, the token of each code. A suffix is one more level.
        codes: (N, len(levels)) int64; -1 where an item has no token at the last level.
        further: tokens that follow the codes in the vocabulary, such as marks of begin and end.
    """

    levels: tuple[tuple[str, ...], ...]
    codes: np.ndarray
    further: tuple[str, ...] = ()

    @classmethod
    def of(cls, table: SidTable) -> SidTokens:
        """The tokens `<a_12>` of mmsid, MiniOneRec, LC-Rec and LETTER. Items without suffix have one token less."""
        return cls(tuple(tuple(level) for level in table.level_tokens()), table.full_codes())

    @classmethod
    def fixed_length(cls, table: SidTable, form: Callable[[int, int], str], further: Sequence[str] = (), least: int = 1) -> SidTokens:
        """Tokens for consumers that decode a fixed number of codes: an item without suffix gets the suffix 0, which is free.

        Args:
            form: level and code -> token. least: tokens that the last level has at least.
        """
        codes = table.full_codes()
        sizes = [*table.codebook_sizes, int(codes[:, -1].max(initial=0)) + 1][: codes.shape[1]]
        sizes[-1] = max(sizes[-1], least)
        levels = tuple(tuple(form(level, code) for code in range(size)) for level, size in enumerate(sizes))
        return cls(levels, np.maximum(codes, 0), tuple(further))

    @property
    def vocabulary(self) -> list[str]:
        """All tokens in the order in which they are added: level after level, then `further`."""
        return [text for level in self.levels for text in level] + list(self.further)

    def consecutive_ids(self, first: int = 0) -> list[np.ndarray]:
        """Token ids when the codes of all levels are numbered one after another from `first`: per level (K,) int64."""
        starts = first + np.cumsum([0, *(len(level) for level in self.levels)])
        return [np.arange(start, start + len(level)) for start, level in zip(starts, self.levels)]

    def ids_in(self, text_tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
        """Token ids in a text tokenizer that has all tokens: per level (K,) int64."""
        known = text_tokenizer.get_vocab()
        return [np.array([known[text] for text in level], dtype=np.int64) for level in self.levels]


def flashrec_token(level: int, code: int) -> str:
    """Token of a code in OneRec and FlashRec, for example `<s_a_12>`; level 0 is `a`."""
    return f"<s_{LETTERS[level]}_{code}>"


def load_text_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A text tokenizer of a folder or a hub name. Code of the source is never run.

    Raises:
        ArtifactError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{source}: no Hugging Face text tokenizer can be loaded ({_first_line(error)}); correct the path") from error


def add_sid_tokens(text_tokenizer: Any, tokens: SidTokens) -> int:
    """Add the tokens that the tokenizer lacks, as whole and unnormalized tokens that are no special tokens. Returns their number.

    Raises:
        ArtifactError: the tokenizer splits a token nevertheless.
    """
    from transformers import AddedToken

    known = text_tokenizer.get_vocab()
    missing = [text for text in tokens.vocabulary if text not in known]
    text_tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in missing])
    for level in tokens.levels:
        found = text_tokenizer.encode(level[-1], add_special_tokens=False)
        if len(found) != 1:
            raise ArtifactError(
                f"the text tokenizer reads {level[-1]!r} as {len(found)} tokens, expected 1; use a tokenizer that supports added tokens"
            )
    return len(missing)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
