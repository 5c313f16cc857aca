"""Vectors of the user's own: every list type is read into item order, several families are joined, and faults name row and item."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsid.catalog.vectors import read_vectors, several
from mmsid.errors import CatalogError


def write(folder: Path, ids, vectors, kind=None, name="vectors.parquet", **more) -> Path:
    pq.write_table(pa.table({"item_id": ids, "vector": pa.array(vectors, kind or pa.list_(pa.float32()))} | more), folder / name)
    return folder / name


def refusal(path, item_ids=("a", "b")) -> str:
    with pytest.raises(CatalogError) as caught:
        read_vectors(path, list(item_ids))
    return str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2), pa.list_(pa.float32(), 2), pa.list_(pa.int8())],
    ids=str,
)
def test_every_list_type_is_read_into_the_order_of_the_items(tmp_path, kind):
    number = np.float16 if pa.types.is_float16(kind.value_type) else int
    rows = [[number(1), number(2)], None, [number(3), number(4)], [number(0), number(0)]]
    found = read_vectors(write(tmp_path, ["b", "z", "c", "d"], rows, kind), ["a", "b", "c", "d"])
    assert found.values.dtype == np.float32
    assert found.values.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
    assert found.present.tolist() == [False, True, True, False]  # no row, two vectors, and a vector of zeros
    assert found.counts is None and found.unknown == 1
    assert found.summary() == "2 of 4 items (50.0 %) have a vector of dimension 2; 1 rows belong to no item of the catalogue"


def test_rows_in_any_order_over_several_row_groups_give_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsid.catalog.vectors._BATCH_ROWS", 7)
    rng = np.random.default_rng(0)
    ids, values = [f"i{n}" for n in range(50)], rng.normal(size=(50, 3)).astype(np.float32)
    order = rng.permutation(50)
    table = pa.table({"item_id": [ids[n] for n in order], "vector": list(values[order]), "interactions": order})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=11)
    found = read_vectors(tmp_path / "v.parquet", ids)
    assert np.array_equal(found.values, values) and found.present.all() and np.array_equal(found.counts, np.arange(50))


@pytest.mark.parametrize("ids", [pa.array([7, 8]), pa.array([7.0, 8.0]), pa.array([" 7", "8 "]), pa.array(["7", "8"]).dictionary_encode()])
def test_ids_are_compared_as_the_texts_that_the_catalogue_makes_of_them(tmp_path, ids):
    assert read_vectors(write(tmp_path, ids, [[1.0], [2.0]]), ["8", "7"]).values.tolist() == [[2], [1]]


def test_interactions_count_nothing_where_the_vector_is_absent(tmp_path):
    path = write(tmp_path, ["a", "b", "c"], [[1.0], [0.0], [2.0]], interactions=[3, 4, None])
    assert read_vectors(path, ["c", "b", "a", "d"]).counts.tolist() == [0, 0, 3, 0]


def test_several_families_have_equal_weight_and_zeros_where_one_is_lacking(tmp_path):
    one = write(tmp_path, ["a", "b"], [[3.0, 4.0], [0.0, 2e-30]], name="one.parquet", interactions=[1, 5])
    two = write(tmp_path, ["a"], [[1e30]], name="two.parquet", interactions=[2])
    found = several([one, two], ["a", "b", "c"])
    half = np.sqrt(0.5)
    assert np.allclose(found.values, [[0.6 * half, 0.8 * half, half], [0, half, 0], [0, 0, 0]], rtol=1e-6)
    assert np.allclose(np.linalg.norm(found.values, axis=1), [1, half, 0])
    assert found.present.tolist() == [True, True, False] and found.counts.tolist() == [2, 5, 0]
    assert np.allclose(several([one], ["a"]).values, [[0.6, 0.8]])
    with pytest.raises(CatalogError, match="no file is named"):
        several([], ["a"])


def test_faults_name_row_item_and_values(tmp_path):
    assert "none.parquet does not exist" in refusal(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    assert "cannot be read as parquet" in refusal(tmp_path / "torn.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "embedding": [[1.0]]}), tmp_path / "names.parquet")
    assert "'vector', found the columns item_id, embedding" in refusal(tmp_path / "names.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "vector": ["[1.0]"]}), tmp_path / "text.parquet")
    assert "holds string, expected a list of numbers" in refusal(tmp_path / "text.parquet")
    short = refusal(write(tmp_path, ["z", "a", "b"], [None, [1.0, 2.0], [1.0]]))
    assert "row 3, item_id 'b'" in short and "has 1 numbers" in short and "have 2" in short
    assert "row 1, item_id 'a': the vector is empty" in refusal(write(tmp_path, ["a"], [[]]))
    for value, kind in ((float("nan"), None), (float("inf"), None), (1e300, pa.list_(pa.float64())), (None, pa.list_(pa.int32()))):
        assert f"row 2, item_id 'b': the vector contains {value}" in refusal(write(tmp_path, ["a", "b"], [[1], [value]], kind))
    twice = refusal(write(tmp_path, ["a", "b", "a"], [[1.0]] * 3))
    assert "rows 1, 3" in twice and "'a' occurs 2 times" in twice
    assert "row 2, field 'item_id': empty" in refusal(write(tmp_path, ["a", None], [[1.0]] * 2))
    strangers = refusal(write(tmp_path, ["x", "y"], [[1.0]] * 2))
    assert "'x', 'y'" in strangers and "'a', 'b'" in strangers
    assert "no row has a vector" in refusal(write(tmp_path, ["a"], [None]))
    assert "interactions is -1" in refusal(write(tmp_path, ["a"], [[1.0]], interactions=[-1]))
