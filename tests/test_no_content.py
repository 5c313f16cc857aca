"""Items that nothing tells apart: an error without any content, warnings when most contents or Semantic IDs are equal."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmsid
from mmsid.artifacts import read_manifest
from mmsid.cli import main
from mmsid.errors import CatalogError
from mmsid.sids.crowding import crowding_warning


def write_items(path, titles, **columns):
    rows = {"item_id": [f"i{number}" for number in range(len(titles))], "title": titles, **columns}
    pq.write_table(pa.table(rows), path)
    return {"items": str(path)}


def test_a_catalogue_without_content_is_an_error(tmp_path, capsys):
    (tmp_path / "items.csv").write_text("item_id, label ,shelf\n1,red shoe,4\n2,blue shoe,7\n")
    with pytest.raises(CatalogError, match=r"none of the 2 items of .*items\.csv has a text, a picture, .*catalog\.fields"):
        mmsid.ingest(tmp_path / "ingest", tmp_path / "items.csv")
    (tmp_path / "run.yaml").write_text(f"name: run\nruns: {tmp_path}\ncatalog: {{items: {tmp_path / 'items.csv'}}}\nbaselines: {{}}\n")
    with pytest.raises(SystemExit) as caught:
        main(["run", str(tmp_path / "run.yaml")])
    assert caught.value.code == 1 and "has a text, a picture, a category or an attribute" in capsys.readouterr().err
    assert mmsid.Catalog.read({"items": tmp_path / "items.csv", "fields": {"title": "label"}}).items[0].title.endswith("shoe")


def test_a_header_with_blanks_is_read(tmp_path):
    (tmp_path / "items.csv").write_text("item_id, title\n1,red shoe\n2,blue shoe\n")
    assert {item.title for item in mmsid.Catalog.read(tmp_path / "items.csv").items} == {"red shoe", "blue shoe"}


@pytest.mark.parametrize(("equal", "warned"), [(5, False), (6, True)])
def test_one_content_of_more_than_half_of_the_items_is_a_warning(tmp_path, recwarn, capsys, equal, warned):
    source = write_items(tmp_path / "items.parquet", ["the same"] * equal + [f"text {number}" for number in range(10 - equal)])
    folder = mmsid.ingest(tmp_path / "ingest", source)
    text = "6 of 10 items have the same text"
    assert [text in str(one.message) for one in recwarn if "have the same" in str(one.message)] == [True] * warned
    assert (text in capsys.readouterr().err) == warned
    (tmp_path / "run.yaml").write_text(json.dumps({"name": "run", "runs": str(tmp_path), "catalog": source}))
    main(["catalog", "--config", str(tmp_path / "run.yaml")])
    assert (f"note          {text}" in capsys.readouterr().out) == warned
    assert len(read_manifest(folder)["extra"]["notes"]) == warned


def crowded_catalog(folder):
    """60 items, 50 of which have equal vectors and other titles."""
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    vectors[:50] = vectors[0]
    source = write_items(folder / "items.parquet", [f"text {number}" for number in range(60)])
    pq.write_table(pa.table({"item_id": [f"i{number}" for number in range(60)], "vector": list(vectors)}), folder / "vectors.parquet")
    return {**source, "vectors": str(folder / "vectors.parquet")}


def test_a_crowded_sid_is_a_warning_after_assign_and_baselines(tmp_path):
    catalog = crowded_catalog(tmp_path)
    sizes = {"num_levels": 2, "codebook_size": 16}
    words = r"baselines: before collision handling, one Semantic ID holds \d+ of 60 items \(\d+ %\) in rq_kmeans: .*`mmsid catalog`"
    with pytest.warns(UserWarning, match=words):
        folder = mmsid.baselines(tmp_path / "baselines", catalog, methods=["random", "rq_kmeans"], **sizes)
    assert "Warning: before collision handling" in (folder / "intrinsic.md").read_text()
    backbone = {"kind": "vectors"}
    tokenizer = mmsid.train_tokenizer(
        tmp_path / "tokenizer", catalog, steps=0, backbone=backbone, reconstruct="off", start={"mode": "random"}, **sizes
    )
    with pytest.warns(UserWarning, match=r"assign: before collision handling, one Semantic ID holds \d+ of 60 items"):
        folder = mmsid.assign(tmp_path / "sids", catalog, tokenizer)
    assert "Warning: before collision handling" in (folder / "intrinsic.md").read_text()


def test_a_share_of_few_items_is_no_warning():
    figures = {"raw": {"items": 20, "max_bucket": 2}}
    assert crowding_warning({"ours": figures}) is None
    assert "6 of 100 items" in crowding_warning({"ours": figures, "other": {"raw": {"items": 100, "max_bucket": 6}}})
    assert crowding_warning({"other": {"raw": {"items": 100, "max_bucket": 5}}}) is None
