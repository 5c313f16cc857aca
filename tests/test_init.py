"""`mmsid init`: it tells what tables and columns are, and its configurations run."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.cli import main
from mmsid.config import load_yaml
from mmsid.stages import stage_configs


def init(*arguments: object) -> None:
    main(["init", *map(str, arguments)])


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder as a shop has it: items with columns of its own names, pictures, a log, a second log of other items, notes."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shop"
    (folder / "photos").mkdir(parents=True)
    rows = ["Product ID;Product Title;Photo;Category;Colour;Price;Country"]
    for row in range(40):
        Image.new("RGB", (8, 8), (row, 0, 0)).save(folder / "photos" / f"{row}.png")
        rows.append(
            f"p{row};Shirt number {row};{row}.png;Apparel > {'Shirts' if row % 2 else 'Tops'};{'red' if row % 3 else 'blue'};{row}.99;DE"
        )
    (folder / "products.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    events = [
        {"customer_id": f"u{user}", "product_id": f"p{(user + step) % 40}", "ts": 100 * step, "event": "view"}
        for user in range(12)
        for step in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(events), folder / "clicks.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"user_id": "u", "item_id": f"z{at}", "timestamp": at} for at in range(9)]), folder / "other_market.parquet"
    )
    (folder / "README.txt").write_text("Notes about the data.\n")
    return folder


def test_a_folder_of_items_pictures_and_logs(shop, capsys):
    init("shop", "--out", "c.yaml")
    said = capsys.readouterr().out
    roles = dict(re.findall(r"^(Product ID|Product Title|Photo|Category|Colour|Price|Country)  +(\S+)", said, re.M))
    read = {"Product ID": "item_id", "Product Title": "title", "Photo": "image", "Category": "categories", "Colour": "attributes"}
    assert roles == read | {"Price": "-", "Country": "-"}
    assert "100 %" in said and "Shirt number 0" in said and "40 of the first 40 pictures were found below" in said
    assert "unused  column Price: ids, links or sizes" in said and "unused  column Country: one value in all rows" in said
    assert "other_market.parquet: a log of which 0 % of the item ids are among the items (for example not 'z0')" in said
    data = load_yaml("c.yaml")
    assert data["catalog"]["events"].endswith("clicks.parquet") and data["catalog"]["event_types"] == {"view": 1}
    assert list(stage_configs(data, source="c.yaml")) == ["ingest", "train_tokenizer", "assign", "baselines", "train_recommender", "report"]
    main(["catalog", "--config", "c.yaml"])
    described = capsys.readouterr().out
    assert "items         40" in described and "with picture  40" in described and "users         12 with 60 interactions" in described
    catalog = read_catalog(CatalogConfig.model_validate(data["catalog"]))
    assert catalog.items[catalog.row_of["p3"]].attributes == {"Colour": ("blue",)}


def test_items_alone_give_a_configuration_without_a_recommender(shop, capsys):
    init("shop/products.csv", "--out", "c.yaml")
    assert "train_recommender" not in load_yaml("c.yaml") and "needs catalog.sequences" in (shop.parent / "c.yaml").read_text()
    init("shop/products.csv", "--events", "shop/clicks.parquet", "--out", "d.yaml")
    assert load_yaml("d.yaml")["catalog"]["events"] == "shop/clicks.parquet"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        init("shop/products.csv", "--out", "c.yaml")
    assert "c.yaml exists; remove it, or name another file with --out" in capsys.readouterr().err


def test_sequences_mappings_and_levels_of_categories(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    items = [
        {
            "code_no": f"i{row}",
            "name": f"Tea {row}",
            "cat_l1": "Food",
            "cat_l2": f"Tea {row % 4}",
            "facts": {"Brand": f"b{row % 3}", "Organic": True},
        }
        for row in range(30)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    users = [
        {"user_id": f"u{user}", "items": [f"i{(user + step) % 30}" for step in range(4)], "timestamps": [1, 2, 3, 4]} for user in range(8)
    ]
    (tmp_path / "users.jsonl").write_text("\n".join(map(json.dumps, users)))
    init("items.jsonl", "users.jsonl")
    data = load_yaml("items.yaml")
    assert data["catalog"]["fields"] == {
        "item_id": "code_no", "title": "name", "categories": ["cat_l1", "cat_l2"], "attributes": ["facts"], "user_id": "user_id",
        "sequence": "items", "timestamps": "timestamps",
    }  # fmt: skip
    catalog = read_catalog(CatalogConfig.model_validate(data["catalog"]))
    assert len(catalog.histories) == 8 and catalog.items[catalog.row_of["i1"]].attributes == {"Brand": ("b1",), "Organic": ("true",)}


def test_rows_of_one_id_are_creatives_of_one_item(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"sku": f"s{row // 2}", "title": f"Lamp {row // 2}", "img": f"https://shop.example/{row}.jpg"} for row in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ads.parquet")
    init("ads.parquet")
    assert load_yaml("ads.yaml")["catalog"]["fields"]["group_by"] == "sku"
    assert "sku 's0' occurs 2 times: rows of one id are read as creatives of one item" in capsys.readouterr().out


def test_a_feed_is_recognised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    header = "id\ttitle\tdescription\tlink\timage_link\tprice\tbrand\titem_group_id\tproduct_type"
    rows = [
        f"{row}\tShirt {row}\t<b>Soft</b>\thttps://a/{row}\thttps://a/{row}.jpg\t{row} EUR\tb{row % 2}\tg{row // 2}\tA > B{row % 3}"
        for row in range(30)
    ]
    (tmp_path / "feed.tsv").write_text("\n".join([header, *rows]))
    init("feed.tsv")
    fields = load_yaml("feed.yaml")["catalog"]["fields"]
    assert fields["group_by"] == "item_group_id" and fields["image"] == "image_link" and fields["attributes"] == ["brand"]
    assert "Google Merchant Center feed" in capsys.readouterr().out
    stage_configs(load_yaml("feed.yaml"), source="feed.yaml")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"colour": "red", "size": "M"}] * 3, "no id column can be told; found: colour, size"),
        ([{"user_id": "u", "item_id": "a", "timestamp": 1}], "no table of items was found"),
    ],
)
def test_what_cannot_be_told_ends_with_the_reason(rows, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(SystemExit) as ended:
        init("t.parquet")
    assert ended.value.code == 1 and message in capsys.readouterr().err and not (tmp_path / "t.yaml").exists()
