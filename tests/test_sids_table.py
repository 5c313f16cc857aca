"""SID table, SID folder, trie and exports."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmsid.errors import ArtifactError
from mmsid.sids import SidTable, Trie, write_sid_folder
from mmsid.sids.exports import import_index_json, import_reference_sids


def make(suffix=None, codes=((0, 1), (2, 3), (0, 2), (2, 3))):
    codes = np.array(codes)
    return SidTable([f"i{row}" for row in range(len(codes))], codes, codes[::-1], suffix, np.arange(len(codes)), (3, 4), "t" * 4, "c" * 4)


@pytest.mark.parametrize("suffix", [None, np.array([-1, 1, -1, 0])])
def test_round_trip(tmp_path, suffix):
    table = make(suffix)
    table.save(tmp_path / "sids.parquet")
    loaded = SidTable.load(tmp_path / "sids.parquet")
    assert loaded.item_ids == table.item_ids and loaded.codebook_sizes == (3, 4)
    assert np.array_equal(loaded.codes, table.codes) and np.array_equal(loaded.raw_codes, table.raw_codes)
    assert (loaded.suffix is None) == (suffix is None) and (suffix is None or np.array_equal(loaded.suffix, suffix))
    assert loaded.margin.tolist() == [0, 1, 2, 3] and (loaded.tokenizer_sha256, loaded.catalog_sha256) == ("tttt", "cccc")
    rows = pq.read_table(tmp_path / "sids.parquet").to_pylist()
    assert rows[1] == {"item_id": "i1", "codes": [2, 3], "raw_codes": [0, 2], "suffix": None if suffix is None else 1, "margin": 1.0}
    assert rows[0]["suffix"] is None


def test_align():
    aligned = make().align(["i2", "i0"])
    assert aligned.codes.tolist() == [[0, 2], [0, 1]] and aligned.margin.tolist() == [2, 0]
    with pytest.raises(ArtifactError, match=r"1 of 2 items have no Semantic ID \(first: 'x'"):
        make().align(["i0", "x"])


def test_invalid_columns_are_refused_with_row_and_values():
    with pytest.raises(ArtifactError, match=r"codes of row 1 \(item 'i1'\): level 2 has code 4, its codebook has 4 codes"):
        make(codes=((0, 1), (2, 4)))
    with pytest.raises(ArtifactError, match=r"shape \(2, 3\), but there are 2 items and 2 codebook sizes"):
        make(codes=((0, 1, 1), (2, 3, 1)))
    with pytest.raises(ArtifactError, match="'a' is in row 0 and again in row 2"):
        SidTable.from_codes(["a", "b", "a"], np.zeros((3, 1)), (2,))


def rewrite(path, change):
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    rows = table.to_pylist()
    schema = table.schema
    change(rows, metadata)
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, metadata: rows[2].update(codes=[1]), "codes of row 2 has 1 levels, expected 2"),
        (lambda rows, metadata: rows[2].update(codes=None), "codes is null in 1 rows"),
        (lambda rows, metadata: rows[3].update(codes=[0, 9]), r"row 3 \(item 'i3'\): level 2 has code 9"),
        (lambda rows, metadata: rows[3].update(item_id="i0"), "'i0' is in row 0 and again in row 3"),
        (lambda rows, metadata: metadata.update({b"mmsid_sids_version": b"7"}), "version 7, this mmsid reads 1"),
        (lambda rows, metadata: metadata.pop(b"mmsid_sids_version"), "version none"),
        (lambda rows, metadata: metadata.update({b"num_levels": b"3"}), "num_levels 3 but codebook_sizes has 2"),
    ],
)
def test_load_names_file_row_and_values(tmp_path, change, message):
    path = tmp_path / "sids.parquet"
    make().save(path)
    rewrite(path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        SidTable.load(path)
    assert "sids.parquet" in str(caught.value)


def test_trie_by_hand():
    trie = Trie.from_table(make())  # (0,1) (2,3) (0,2) (2,3)
    assert trie.depth == 2 and [trie.num_nodes(depth) for depth in range(3)] == [1, 2, 3]
    codes, nodes = trie.children(0, 0)
    assert codes.tolist() == [0, 2] and nodes.tolist() == [0, 1]
    codes, nodes = trie.children(1, 0)
    assert codes.tolist() == [1, 2] and nodes.tolist() == [0, 1]
    assert trie.walk(torch.tensor([[2, 3], [0, 2], [0, 3], [1, 1]])).tolist() == [2, 1, -1, -1]
    assert trie.items_under(2, 2).tolist() == [1, 3] and sorted(trie.items_under(1, 0).tolist()) == [0, 2]
    assert trie.allowed(torch.zeros((1, 0), dtype=torch.int64)).tolist() == [[True, False, True]]
    assert trie.allowed(torch.tensor([[0], [2], [1]])).tolist() == [[False, True, True, False], [False] * 3 + [True], [False] * 4]


def test_trie_with_ragged_suffix(tmp_path):
    trie = Trie.from_table(make(np.array([-1, 1, -1, 0])))
    assert trie.depth == 3 and trie.num_nodes(3) == 2
    assert trie.allowed(torch.tensor([[0, 1], [2, 3]])).tolist() == [[False, False], [True, True]]
    assert trie.items_under(3, int(trie.walk(torch.tensor([[2, 3, 0]]))[0])).tolist() == [3]
    assert trie.items_under(2, int(trie.walk(torch.tensor([[0, 1]]))[0])).tolist() == [0]
    trie.save(tmp_path / "trie.safetensors")
    loaded = Trie.load(tmp_path / "trie.safetensors")
    assert loaded.walk(torch.tensor([[2, 3, 1]])).tolist() == trie.walk(torch.tensor([[2, 3, 1]])).tolist()
    plain = Trie.from_table(make(np.full(4, -1)))  # suffix policy without any collision
    assert plain.num_nodes(3) == 0 and not plain.allowed(torch.tensor([[0, 1]])).any()
    assert plain.step(2, torch.tensor([0]), torch.tensor([0])).tolist() == [-1]


def test_trie_contains_exactly_the_catalogue():
    codes = np.random.default_rng(0).integers(0, 6, size=(200, 3))
    trie = Trie.from_codes(codes, (6, 6, 6))
    space = torch.cartesian_prod(*[torch.arange(6)] * 3)
    found = trie.walk(space)
    present = {tuple(row) for row in codes.tolist()}
    assert {tuple(row) for row in space[found >= 0].tolist()} == present
    leaves = [trie.items_under(3, node) for node in range(trie.num_nodes(3))]
    assert sorted(torch.cat(leaves).tolist()) == list(range(200))
    assert all(len(np.unique(codes[leaf.numpy()], axis=0)) == 1 for leaf in leaves)
    with pytest.raises(ValueError, match="must be in"):
        Trie.from_codes(codes, (6, 6, 5))


def test_exports_and_back(tmp_path):
    table = make(np.array([-1, 1, -1, 0]))
    write_sid_folder(tmp_path / "sids", table, {"any": 1})
    assert sorted(path.name for path in (tmp_path / "sids").iterdir()) == [
        "index.json",
        "intrinsic.json",
        "sids.parquet",
        "trie.safetensors",
    ]
    index = json.loads((tmp_path / "sids" / "index.json").read_text())
    assert index == {
        "i0": ["<a_0>", "<b_1>"],
        "i1": ["<a_2>", "<b_3>", "<c_1>"],
        "i2": ["<a_0>", "<b_2>"],
        "i3": ["<a_2>", "<b_3>", "<c_0>"],
    }
    assert table.vocabulary() == ["<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>", "<b_3>", "<c_0>", "<c_1>"]
    back = import_index_json(tmp_path / "sids" / "index.json", codebook_sizes=(3, 4))
    assert np.array_equal(back.codes, table.codes) and np.array_equal(back.suffix, table.suffix) and back.item_ids == table.item_ids
    assert import_index_json(tmp_path / "sids" / "index.json").codebook_sizes == (4, 4)
    assert SidTable.load(tmp_path / "sids").codes.tolist() == table.codes.tolist()
    with pytest.raises(ArtifactError, match=r"sids\.parquet does not exist"):
        SidTable.load(tmp_path)


def test_import_reference_strings(tmp_path):
    import pyarrow as pa

    path = tmp_path / "reference.parquet"
    pq.write_table(
        pa.table({"item_id": ["x", "y"], "letter": ["<a_53> <b_82> <c_7>", "<a_1><b_2><c_255>"], "bad": ["<a_1>", "<b_1>"]}), path
    )
    table = import_reference_sids(path, "letter")
    assert table.codes.tolist() == [[53, 82, 7], [1, 2, 255]] and table.codebook_sizes == (256,) * 3
    assert table.sid_tokens()[0] == ["<a_53>", "<b_82>", "<c_7>"]
    with pytest.raises(ArtifactError, match="item 'y': token 1 is '<b_1>'"):
        import_reference_sids(path, "bad")
    with pytest.raises(ArtifactError, match="column 'none' missing"):
        import_reference_sids(path, "none")
    (tmp_path / "index.json").write_text('{"a": ["<a_1>", "<b_1>", "<c_1>"], "b": ["<a_1>"]}')
    with pytest.raises(ArtifactError, match="item 'b' has 1 tokens, another has 3"):
        import_index_json(tmp_path / "index.json")
