"""Token ids of SID tokens in a text tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from mmsid.errors import ArtifactError
from mmsid.sids.exports import token_ids
from mmsid.sids.table import SidTable

CODES = np.array([[0, 1], [0, 1], [0, 0], [1, 1]])
SUFFIX = np.array([0, 1, -1, -1])


class Words:
    """Stub of a Hugging Face text tokenizer with the only method that is used."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: 50 + index for index, word in enumerate(self.words)}


def table(suffix: np.ndarray | None = SUFFIX) -> SidTable:
    return SidTable.from_codes(["ant", "bee", "cat", "dog"], CODES, (2, 2), suffix=suffix)


def test_token_ids_of_a_text_tokenizer():
    assert token_ids(Words(table().vocabulary()), table()) == [[50, 51], [52, 53], [54, 55]]
    with pytest.raises(ArtifactError, match=r"lacks 2 SID tokens \(first: <c_0>\)"):
        token_ids(Words(table(None).vocabulary()), table())
