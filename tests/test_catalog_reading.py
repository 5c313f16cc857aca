"""Reading a catalogue: all file formats give the same result, and errors name the remedy."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsid.catalog import CatalogConfig, describe, load_picture, read_catalog, split_histories, summary
from mmsid.catalog.config import Fields, SplitConfig
from mmsid.errors import CatalogError

ROWS = [
    {"item_id": "a", "title": "Red shoe", "image": ["one.png", "two.png"], "categories": ["Shoes", "Running"], "tags": ["red", "run"]},
    {"item_id": "b", "title": "Tea, green", "image": ["two.png"], "categories": ["Food"], "tags": ["tea"]},
    {"item_id": "c", "title": "", "image": [], "categories": [], "tags": []},
]
SEQUENCES = [
    {"user_id": "u", "items": ["a", "b", "a", "zzz"], "times": [1, 2, 3, 4]},
    {"user_id": "v", "items": ["zzz"], "times": [1]},
    {"user_id": "w", "items": ["c", "b"], "times": [9, 5]},
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as text:
            lines = csv.DictWriter(text, list(rows[0]))
            lines.writeheader()
            for row in rows:
                lines.writerow({name: "|".join(map(str, value)) if isinstance(value, list) else value for name, value in row.items()})
    return path


@pytest.fixture
def folder(tmp_path):
    for name, color in [("one.png", "red"), ("two.png", "blue")]:
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def config(folder: Path, kind: str = ".parquet", items=ROWS, sequences=SEQUENCES, fields: dict | None = None, **more) -> CatalogConfig:
    return CatalogConfig(
        items=write(folder / f"items{kind}", items),
        sequences=write(folder / f"sequences{kind}", sequences) if sequences else None,
        fields={"attributes": ["tags"], "timestamps": "times"} | (fields or {}) if items is ROWS else (fields or {}),
        **more,
    )


def refusal(config: CatalogConfig) -> str:
    with pytest.raises(CatalogError) as caught:
        read_catalog(config)
    assert ";" in str(caught.value), "an error ends with its remedy"
    return str(caught.value)


def test_parquet_jsonl_and_csv_give_the_same_catalogue(folder):
    found = [read_catalog(config(folder, kind)) for kind in (".parquet", ".jsonl", ".csv")]
    assert found[0].items == found[1].items == found[2].items
    assert found[0].sha256 == found[1].sha256 == found[2].sha256
    catalog = found[0]
    shoe = catalog.items[catalog.row_of["a"]]
    assert shoe.images == (folder / "one.png", folder / "two.png")
    assert shoe.categories == ("Shoes", "Running") and shoe.attributes == {"tags": ("red", "run")} and shoe.problems == ()
    assert catalog.items[catalog.row_of["c"]].problems == ("no_title", "no_categories", "no_picture")
    assert catalog.content_hashes == sorted(item.content_sha256 for item in catalog.items)


def test_interactions_with_unknown_items_are_dropped_and_counted(folder):
    catalog = read_catalog(config(folder))
    by_user = {user.user_id: user for user in catalog.histories}
    assert [catalog.items[row].item_id for row in by_user["u"].rows] == ["a", "b", "a"]
    assert by_user["u"].timestamps.tolist() == [1, 2, 3] and set(by_user) == {"u", "w"}
    assert [catalog.items[row].item_id for row in by_user["w"].rows] == ["b", "c"]  # sorted by its timestamps
    counted = {code: catalog.problems[code] for code in ("unknown_item", "user_without_items", "timestamps_out_of_order", "repeated_item")}
    assert counted == {"unknown_item": 2, "user_without_items": 1, "timestamps_out_of_order": 1, "repeated_item": 1}


def test_missing_pictures_are_recorded_as_problems_of_the_item(folder):
    Image.new("RGB", (8, 8)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-30])
    rows = [{"item_id": "a", "image": ["one.png", "none.png", "cut.jpg", "../up.png"]}, {"item_id": "b", "image": [None]}]
    rows.append({"item_id": "c", "image": ["one.png", "two.png"]})
    catalog = read_catalog(config(folder, items=rows, sequences=None))
    assert catalog.items[catalog.row_of["a"]].problems == ("picture_missing", "picture_truncated", "picture_outside_root")
    assert catalog.items[catalog.row_of["a"]].images == (folder / "one.png",)
    assert catalog.problems == {"picture_missing": 1, "picture_truncated": 1, "picture_outside_root": 1, "no_picture": 1}


def test_fields_are_mapped(folder):
    rows = [
        {"sku": 7, "name": "x", "front": "one.png", "back": "two.png", "top": "A", "leaf": None, "facts": {"year": 2011.0, "new": True}},
        {"sku": 8, "name": "y", "front": None, "back": "two.png", "top": "A", "leaf": "B", "facts": {"year": 2012.5, "new": None}},
    ]
    fields = {"item_id": "sku", "title": "name", "image": ["front", "back"], "categories": ["top", "leaf"], "attributes": ["facts"]}
    for kind in (".parquet", ".jsonl"):
        catalog = read_catalog(config(folder, kind, items=rows, sequences=None, fields=fields))
        seven, eight = (catalog.items[catalog.row_of[item_id]] for item_id in ("7", "8"))
        assert len(seven.images) == 2 and len(eight.images) == 1
        assert seven.categories == ("A",) and eight.categories == ("A", "B")
        assert seven.attributes == {"new": ("true",), "year": ("2011",)} and eight.attributes == {"year": ("2012.5",)}


def test_group_by_makes_one_item_of_several_rows(folder):
    rows = [
        {"row": 1, "kind": 3, "title": None, "image": "one.png", "categories": None},
        {"row": 2, "kind": 3, "title": "Tea", "image": "two.png", "categories": ["Food"]},
        {"row": 3, "kind": 4, "title": "Nut", "image": None, "categories": ["Food"]},
    ]
    forward = read_catalog(config(folder, items=rows, sequences=None, fields={"group_by": "kind"}))
    backward = read_catalog(config(folder, items=rows[::-1], sequences=None, fields={"group_by": "kind"}))
    tea = forward.items[forward.row_of["3"]]
    assert (tea.title, tea.categories, len(tea.images)) == ("Tea", ("Food",), 2)
    assert forward.items == backward.items and len(forward.items) == 2


def test_bad_tables_are_refused_by_file_row_field_and_remedy(folder):
    rows = [{"item_id": name, "title": "x"} for name in "aaaab"]
    doubled = refusal(config(folder, items=rows, sequences=None))
    assert "3 of 5 rows cannot become items, 3 of them as duplicate_id" in doubled and "group_by" in doubled
    assert "items.parquet, row 2" in doubled
    missing = refusal(config(folder, ".csv", items=[{"foo": "a", "bar": "x"}], sequences=None))
    assert "items.csv: no column 'item_id' (catalog.fields.item_id)" in missing and "foo, bar" in missing
    mapped = refusal(config(folder, items=[{"item_id": "a"}], sequences=None, fields={"title": "title"}))
    assert "no column 'title' (catalog.fields.title)" in mapped
    assert "catalog.fields.attributes" in refusal(
        config(folder, items=[{"item_id": "a"}], sequences=None, fields={"attributes": ["color"]})
    )
    rows = [{"item_id": name, "title": "x"} for name in ("a", " ", "")]
    assert "2 of 3 rows cannot become items, 2 of them as no_id" in refusal(config(folder, ".csv", items=rows, sequences=None))
    nested = refusal(config(folder, items=[{"item_id": "a", "title": {"x": {"y": 1}}}], sequences=None, fields={"title": "title"}))
    assert "row 1, field 'title': holds a dict" in nested


def test_rows_without_an_id_of_their_own_are_quarantined_and_the_order_of_rows_does_not_matter(folder):
    rows = [{"item_id": name, "title": title} for name, title in [("a", "x"), ("a", "y"), ("b", "z"), (None, "lost"), ("c", "c")]]
    forward, backward = (read_catalog(config(folder, items=order, sequences=None)) for order in (rows, rows[::-1]))
    assert forward.items == backward.items and sorted(forward.item_ids) == ["a", "b", "c"]
    assert forward.problems == backward.problems == {"duplicate_id": 1, "no_id": 1}


def test_a_catalogue_without_content_is_refused(folder):
    assert "none of the 2 items" in refusal(config(folder, items=[{"item_id": "a", "title": " "}, {"item_id": "b"}], sequences=None))


def test_empty_damaged_and_unsupported_files_are_refused(folder):
    for name, text, expected in [
        ("empty.csv", "", "holds no rows"),
        ("head.csv", "item_id,title\n", "holds no rows"),
        ("empty.jsonl", "\n\n", "holds no rows"),
        ("torn.jsonl", '{"item_id": "a"}\n\n{"item_id": \n', "line 3: not valid JSON"),
        ("list.jsonl", "[1]\n", "line 1: holds a list"),
        ("ragged.csv", "item_id,title\na,x\nb,x,y\n", "row 2: 3 cells, expected 2"),
        ("quote.csv", 'item_id,title\na,"x\n', "not valid csv"),
        ("twice.csv", "item_id,item_id\na,b\n", "column 'item_id' occurs twice"),
        ("torn.parquet", "PAR1 but not quite", "cannot be read as parquet"),
        ("items.pkl", "x", "ends in '.pkl'"),
        ("bad.csv", "item_id,tags\na,[1\n", "starts like JSON"),
    ]:
        (folder / name).write_text(text)
        fields = {"attributes": ["tags"]} if name == "bad.csv" else {}
        message = refusal(CatalogConfig(items=folder / name, fields=fields))
        assert expected in message and name in message
    (folder / "latin.csv").write_bytes("item_id\ncafé\n".encode() + "café\n".encode("latin-1"))
    assert "row 2, field 'item_id': 'caf�' cannot be decoded as UTF-8" in refusal(CatalogConfig(items=folder / "latin.csv"))
    pq.write_table(pa.table({"item_id": pa.array([], pa.string())}), folder / "empty.parquet")
    assert "holds no rows" in refusal(CatalogConfig(items=folder / "empty.parquet"))
    assert "does not exist" in refusal(CatalogConfig(items=folder / "none.csv"))
    assert "catalog.image_root" in refusal(config(folder, image_root=folder / "none"))


def test_bad_sequences_are_refused(folder):
    short = [{"user_id": "u", "items": ["a", "b"], "times": [1]}]
    assert "row 1: times holds 1 values, items 2" in refusal(config(folder, sequences=short))
    huge = [{"user_id": "u", "items": ["a"], "times": [10**30]}]
    assert "line 1, field 'times'" in refusal(config(folder, ".jsonl", sequences=huge))
    words = [{"user_id": "u", "items": ["a"], "times": ["noon"]}]
    assert "row 1, field 'times'" in refusal(config(folder, sequences=words))
    assert "no column 'events' (catalog.fields.sequence)" in refusal(config(folder, fields={"sequence": "events"}))
    assert "field 'user_id': empty" in refusal(config(folder, sequences=[{"user_id": None, "items": ["a"], "times": [1]}]))


def test_a_dumped_config_keeps_which_fields_the_user_set():
    fields = Fields(title="name")
    again = Fields.model_validate(fields.model_dump(mode="json"))
    assert again == fields and again.model_fields_set == {"title"}


def test_describe_and_summary_count_the_catalogue(folder):
    catalog = read_catalog(config(folder))
    facts = describe(catalog, split_histories(catalog, SplitConfig()))
    assert facts["items"] == 3 and facts["items_with_picture"] == 2 and facts["pictures"] == 3 and facts["items_with_text"] == 2
    assert facts["categories_per_depth"] == [2, 1] and facts["users"] == 2 and facts["interactions"] == 5
    assert facts["split"]["test_users"] == 1 and facts["split"]["target_seen_before"] == 1
    json.dumps(facts)
    text = summary(facts)
    assert "with picture  2 (66.7 %), 3 pictures" in text and "unknown_item 2" in text and len(text.splitlines()) == 9
    assert "warning       1 of 1 test targets cannot be ranked" in text


def test_pictures_of_items_can_be_loaded_when_the_image_root_is_relative(tmp_path, monkeypatch):
    (tmp_path / "shop").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "shop" / "a.png")
    (tmp_path / "shop" / "items.jsonl").write_text('{"item_id": "a", "image": "a.png"}\n')
    monkeypatch.chdir(tmp_path)
    config = CatalogConfig(items=Path("shop/items.jsonl"))
    (item,) = read_catalog(config).items
    assert load_picture(item.images[0], config.pictures, config.root).size == (4, 4)


def test_category_roots_drop_values_before_the_path(folder):
    rows = [
        {"item_id": "a", "title": "x", "facts": ["Acme", "Hair", "Shampoo"]},
        {"item_id": "b", "title": "y", "facts": ["Skin", "Hair"]},
        {"item_id": "c", "title": "z", "facts": ["Acme"]},
    ]
    mapped = {"categories": "facts", "category_roots": ["Hair", "Skin"], "attributes": ["facts"]}
    catalog = read_catalog(config(folder, items=rows, sequences=None, fields=mapped))
    found = {item.item_id: (item.categories, item.attributes["facts"]) for item in catalog.items}
    assert found["a"] == (("Hair", "Shampoo"), ("Acme", "Hair", "Shampoo"))  # the attributes keep the brand
    assert found["b"][0] == ("Skin", "Hair") and found["c"][0] == ()
    assert "no_categories" in catalog.items[catalog.row_of["c"]].problems
