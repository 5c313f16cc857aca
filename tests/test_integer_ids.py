"""Ids that are whole numbers in the user's table are whole numbers in the tables that mmsid writes, and texts inside of it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotate_stub import StubGenerator, caption_config
from annotate_stub import write_catalog as write_pictures

import mmsid
from mmsid import SidTable
from mmsid.annotate import caption
from mmsid.annotate.readers import read_captions
from mmsid.annotation_coverage import report_coverage
from mmsid.artifacts import read_manifest
from mmsid.catalog import CatalogConfig
from mmsid.id_columns import id_array
from mmsid.refine.outputs import write_moved

ITEMS, SIZES = 40, {"num_levels": 2, "codebook_size": 16}
IDS = [1000 + 7 * number for number in range(ITEMS)]
USERS = list(range(1, 25))


def write(folder: Path, ids=IDS, users=USERS) -> dict[str, str]:
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"item_id": ids, "title": [f"text {number}" for number in range(len(ids))]}), folder / "items.parquet")
    rows = [[ids[row] for row in rng.choice(len(ids), size=6, replace=False)] for _ in users]
    pq.write_table(pa.table({"user_id": users, "items": rows}), folder / "sequences.parquet")
    vectors = rng.normal(size=(len(ids), 8)).astype(np.float32)
    pq.write_table(pa.table({"item_id": ids, "vector": list(vectors)}), folder / "vectors.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("items", "sequences", "vectors")}


def type_of(path, column="item_id") -> pa.DataType:
    return pq.read_schema(path).field(column).type


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A catalogue of integer ids, its SID folders and its recommender."""
    folder = tmp_path_factory.mktemp("shop")
    catalog = write(folder)
    sids = mmsid.baselines(folder / "baselines", catalog, methods=["rq_kmeans"], **SIZES) / "rq_kmeans"
    small = {"schedule": {"epochs": 1}, "model": {"d_model": 16}, "classical_baselines": False}
    trained = mmsid.train_recommender(folder / "recommender", catalog, {"ours": sids}, **small)
    return folder, catalog, sids, trained / "recommender"


def test_semantic_ids_merge_with_the_table_of_items(shop):
    folder, catalog, sids, _ = shop
    merged = pd.read_parquet(catalog["items"]).merge(pd.read_parquet(sids / "sids.parquet"), on="item_id")
    assert len(merged) == ITEMS and type_of(sids / "sids.parquet") == pa.int64()
    table = SidTable.load(sids)
    assert sorted(table.item_ids) == sorted(map(str, IDS)) and table.integer_ids and table.sid(str(IDS[0]))
    table.align(table.item_ids[:3]).save(folder / "part.parquet")
    assert type_of(folder / "part.parquet") == pa.int64() and SidTable.load(folder / "part.parquet").item_ids == table.item_ids[:3]
    assert write_moved(folder, table, table, {"sid_reward": np.zeros(0)}, True) == 0


@pytest.mark.parametrize("from_file", [False, True])
def test_recommendations_merge_with_both_tables(shop, tmp_path, from_file):
    _, catalog, sids, recommender = shop
    users = {"users": catalog["sequences"]} if from_file else {}
    out = mmsid.write_recommendations(tmp_path / "out", catalog, recommender, sids, k=3, **users)
    found = pd.concat(map(pd.read_parquet, sorted((out / "recommendations").iterdir())))
    assert len(found.merge(pd.read_parquet(catalog["sequences"]), on="user_id")) == len(USERS)
    one = found[["user_id", "item_ids"]].explode("item_ids").astype({"item_ids": "int64"})
    assert len(one.merge(pd.read_parquet(catalog["items"]), left_on="item_ids", right_on="item_id")) == 3 * len(USERS)
    assert type_of(out / "recommendations/part-00000.parquet", "item_ids").value_type == pa.int64()


def test_events_keep_the_type_of_user_ids(shop, tmp_path):
    _, catalog, sids, recommender = shop
    rows = pq.read_table(catalog["sequences"]).to_pylist()
    events = [(row["user_id"], item, place) for row in rows for place, item in enumerate(row["items"])]
    table = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*events))))
    pq.write_table(pa.table(table), tmp_path / "events.parquet")
    keys = {"items": catalog["items"], "vectors": catalog["vectors"], "events": str(tmp_path / "events.parquet")}
    folder = mmsid.ingest(tmp_path / "ingest", keys)
    out = mmsid.write_recommendations(tmp_path / "out", folder, recommender, sids, k=2)
    assert type_of(out / "recommendations/part-00000.parquet", "user_id") == pa.int64()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([f"{number}" for number in IDS], pa.string()),  # numbers written as texts stay texts
        (pa.array(IDS, pa.uint16()), pa.int64()),
        (pa.array(IDS, pa.int32()).dictionary_encode(), pa.int64()),
        (pa.array([2**63 + number for number in range(ITEMS)], pa.uint64()), pa.string()),  # no int64
        ([float(number) for number in IDS], pa.string()),
    ],
)
def test_the_type_of_the_column_decides(tmp_path, ids, expected):
    column = ids if isinstance(ids, pa.Array) else pa.array(ids)
    pq.write_table(pa.table({"item_id": column, "title": [f"text {number}" for number in range(ITEMS)]}), tmp_path / "items.parquet")
    out = mmsid.baselines(tmp_path / "out", tmp_path / "items.parquet", methods=["random"], **SIZES)
    assert type_of(out / "random" / "sids.parquet") == expected
    assert len(SidTable.load(out / "random")) == ITEMS


def test_csv_cells_are_texts_and_json_numbers_are_numbers(tmp_path):
    lines = [json.dumps({"item_id": number, "title": f"text {number}"}) for number in IDS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{number},text {number}\n" for number in IDS))
    (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, '{"item_id": "x", "title": "text"}']) + "\n")
    for name, integers in (("items.jsonl", True), ("items.csv", False), ("mixed.jsonl", False)):
        folder = mmsid.ingest(tmp_path / f"{name}.ingest", tmp_path / name)
        assert read_manifest(folder)["extra"]["integer_ids"] == integers == mmsid.Catalog.read(folder).integer_ids, name


def test_groups_are_ids(tmp_path):
    for groups, integers in (([5, 5, 6], True), (["a", "a", "b"], False)):
        pq.write_table(pa.table({"item_id": [1, 2, 3], "group": groups, "title": ["x", "y", "z"]}), tmp_path / "items.parquet")
        catalog = mmsid.Catalog.read({"items": tmp_path / "items.parquet", "fields": {"group_by": "group"}})
        assert catalog.integer_ids == integers and len(catalog.items) == 2


def test_annotations_merge_and_are_read_as_texts(tmp_path):
    write_pictures(tmp_path / "shop", items=6)
    rows = [json.loads(line) for line in (tmp_path / "shop" / "items.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "item_id": int(row["item_id"][1:])}) for row in rows]
    (tmp_path / "shop" / "items.jsonl").write_text("\n".join(lines) + "\n")
    config = caption_config(CatalogConfig(items=tmp_path / "shop" / "items.jsonl"), tmp_path / "captions")
    caption.run(config, StubGenerator())
    assert type_of(tmp_path / "captions/shards/part-00000.parquet") == pa.int64()
    captions = read_captions(tmp_path / "captions")
    assert captions.keys() == {str(number) for number in range(6)}
    assert report_coverage("captions", tmp_path / "captions", [*captions, "7"], captions).without_row == ("7",)


def test_quantized_vectors_keep_the_type_of_their_ids(shop, tmp_path):
    _, catalog, _, _ = shop
    out = mmsid.quantize_vectors(catalog["vectors"], tmp_path / "files", **SIZES)
    assert type_of(out / "sids.parquet") == pa.int64()
    values = np.random.default_rng(1).normal(size=(5, 4))
    for ids, expected in ((np.arange(5), pa.int64()), (["1", "2", "3", "4", "05"], pa.string())):
        out = mmsid.quantize_vectors(values, tmp_path / str(expected), ids=ids, num_levels=2, codebook_size=4)
        assert type_of(out / "sids.parquet") == expected


def test_ids_that_are_no_whole_numbers_stay_texts():
    assert id_array(["1", "007"], True).to_pylist() == ["1", "007"]
    assert id_array(["1", "x"], True).to_pylist() == ["1", "x"]
    assert id_array(["1", "-2", None], True).to_pylist() == [1, -2, None]
    assert id_array(["1"], False).to_pylist() == ["1"]
