"""Exports for serving engines: allowed next tokens and the items of each SID."""

from __future__ import annotations

import numpy as np
import pytest

from mmsid.artifacts import read_json, read_tensors
from mmsid.errors import ArtifactError
from mmsid.sids.exports import token_ids, write_allowed_tokens, write_sid_items
from mmsid.sids.table import SidTable

CODES = np.array([[0, 1], [0, 1], [0, 0], [1, 1]])
SUFFIX = np.array([0, 1, -1, -1])
IDS = [[107, 105], [201, 200], [300, 301]]  # code 0 of the first two levels has the larger id


class Words:
    """Stub of a Hugging Face text tokenizer with the only method that is used."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: 50 + index for index, word in enumerate(self.words)}


def table(suffix: np.ndarray | None = SUFFIX) -> SidTable:
    return SidTable.from_codes(["ant", "bee", "cat", "dog"], CODES, (2, 2), suffix=suffix)


def test_allowed_tokens_as_json(tmp_path):
    write_allowed_tokens(tmp_path / "allowed.json", table(), IDS, end_token_id=9)
    expected = {
        "": [105, 107],
        "107": [200, 201],
        "107,200": [300, 301],
        "107,200,300": [9],
        "107,200,301": [9],
        "107,201": [9],
        "105": [200],
        "105,200": [9],
    }
    assert read_json(tmp_path / "allowed.json") == {"levels": 3, "end": 9, "allowed": expected}
    write_allowed_tokens(tmp_path / "no_end.json", table(None), IDS[:2])
    assert read_json(tmp_path / "no_end.json")["allowed"] == {"": [105, 107], "107": [200, 201], "105": [200]}


def test_allowed_tokens_as_tensors_equal_the_json(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (60, 3))
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    number = np.array([int((group[:row] == group[row]).sum()) for row in range(60)])
    suffix = np.where(np.bincount(group)[group] > 1, number, -1)
    many = SidTable.from_codes([str(row) for row in range(60)], codes, (5, 5, 5), suffix=suffix)
    ids = [(100 * level + rng.permutation(90)[:60]).tolist() for level in range(4)]
    write_allowed_tokens(tmp_path / "allowed.json", many, ids, end_token_id=9)
    write_allowed_tokens(tmp_path / "allowed.safetensors", many, ids)
    tensors = read_tensors(tmp_path / "allowed.safetensors")
    found, level = {}, {0: ""}
    for depth in range(5):
        below = {}
        for node, prefix in level.items():
            begin, end = tensors[f"offsets.{depth}"][node : node + 2].tolist() if depth < 4 else (0, 0)
            tokens = tensors[f"tokens.{depth}"][begin:end].tolist() if depth < 4 else []
            assert tokens == sorted(tokens)
            found[prefix] = sorted(tokens + [9] * int(tensors[f"ends.{depth}"][node]))
            below |= {begin + index: f"{prefix},{token}".removeprefix(",") for index, token in enumerate(tokens)}
        level = below
    assert found == read_json(tmp_path / "allowed.json")["allowed"]


def test_items_of_each_sid(tmp_path):
    write_sid_items(tmp_path / "sid2item.json", table())
    assert read_json(tmp_path / "sid2item.json") == {
        "<a_0><b_1><c_0>": ["ant"],
        "<a_0><b_1><c_1>": ["bee"],
        "<a_0><b_0>": ["cat"],
        "<a_1><b_1>": ["dog"],
    }
    write_sid_items(tmp_path / "buckets.json", table(None))
    assert read_json(tmp_path / "buckets.json")["<a_0><b_1>"] == ["ant", "bee"]


def test_token_ids_of_a_text_tokenizer():
    assert token_ids(Words(table().vocabulary()), table()) == [[50, 51], [52, 53], [54, 55]]
    with pytest.raises(ArtifactError, match=r"lacks 2 SID tokens \(first: <c_0>\)"):
        token_ids(Words(table(None).vocabulary()), table())


def test_export_errors(tmp_path):
    with pytest.raises(ArtifactError, match=r"given for \[2, 2\] codes per level, the SIDs have \[2, 2, 2\]"):
        write_allowed_tokens(tmp_path / "allowed.json", table(), IDS[:2])
    with pytest.raises(ArtifactError, match=r"written as \.json or \.safetensors"):
        write_allowed_tokens(tmp_path / "allowed.txt", table(), IDS)
