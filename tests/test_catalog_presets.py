"""Which column feeds which field: the user's keys, presets of known formats, common names, separators of category paths."""

import pytest
from raw_batches import RawTable, raw

from mmsid.catalog.config import Fields
from mmsid.catalog.fields import FieldMapping, item_fields, resolve_mapping
from mmsid.errors import CatalogError


def resolved(columns: dict, textual: bool = True, **fields) -> FieldMapping:
    return resolve_mapping(RawTable(raw(columns, textual)), Fields(**fields), "catalog.items")


def rows_of(columns: dict, textual: bool = True, **fields) -> list[dict]:
    batch = raw(columns, textual)
    table = item_fields(batch, resolve_mapping(RawTable(batch), Fields(**fields), "catalog.items"), False)
    return [
        {
            **row,
            "attributes": {attribute["name"]: attribute["labels"] for attribute in row["attributes"]},
            "pictures": [picture["ref"] or picture["data"] for picture in row["pictures"]],
        }
        for row in table.to_pylist()
    ]


FEED = {
    "id": ["1", "2", "3"],
    "title": ["Shirt M", "Shirt L", "Lamp"],
    "description": ["<b>Soft</b>", "Soft", ""],
    "link": ["https://a/1", "https://a/2", "https://a/3"],
    "image link": ["https://a/1.jpg", "https://a/2.jpg", "https://a/3.jpg"],
    "additional image link": ["https://a/b.jpg,https://a/c.jpg", "", ""],
    "price": ["1 EUR", "1 EUR", "2 EUR"],
    "brand": ["Acme", "Acme", "Lux"],
    "google product category": ["212", "212", "604"],
    "product type": ["Apparel > Shirts", "Apparel > Shirts", "Home"],
    "item group id": ["g", "g", ""],
    "size": ["M", "L", ""],
}


def test_merchant_feed():
    mapping = resolved(FEED)
    assert mapping.preset == "Google Merchant Center feed" and mapping.group_by == "item group id"
    assert mapping.not_read == ("link", "price", "google product category")
    assert any("separated by '>'" in note and "fields.category_separator" in note for note in mapping.notes)
    rows = rows_of(FEED)
    assert [row["item_id"] for row in rows] == ["g", "g", "3"]
    assert rows[0]["pictures"] == ["https://a/1.jpg", "https://a/b.jpg", "https://a/c.jpg"] and rows[0]["description"] == "Soft"
    assert [row["categories"] for row in rows] == [["Apparel", "Shirts"], ["Apparel", "Shirts"], ["Home"]]
    assert rows[1]["attributes"] == {"brand": ["Acme"], "size": ["L"]} and rows[2]["attributes"] == {"brand": ["Lux"]}
    as_xml = {f"g:{name.replace(' ', '_')}": values for name, values in FEED.items()}
    assert [row["categories"] for row in rows_of(as_xml)] == [row["categories"] for row in rows]
    without_types = {name: values for name, values in FEED.items() if name != "product type"}
    assert rows_of(without_types)[0]["categories"] == ["212"] and any("taxonomy ids" in note for note in resolved(without_types).notes)


def test_a_preset_fills_only_keys_that_the_user_did_not_set():
    mapping = resolved(FEED, item_id="id", attributes=["price"], title=None)
    assert mapping.group_by is None and mapping.attributes == ("price",) and mapping.title == () and mapping.image
    assert resolved(FEED, group_by=None).group_by is None
    with pytest.raises(
        CatalogError, match=r"items.parquet: no column 'name' \(catalog.fields.title\); found: id, title, .*; correct the mapping"
    ):
        resolved(FEED, title="name")


def test_meta_catalogue():
    mapping = resolved(FEED | {"fb_product_category": ["a", "b", "c"]})
    assert mapping.preset == "Meta catalogue" and mapping.image == ("image link", "additional image link")


def test_shopify_export():
    columns = {
        "Handle": ["shirt", "shirt", "mug"],
        "Title": ["Shirt", "", "Mug"],
        "Body (HTML)": ["<p>Soft</p>", "", "Big"],
        "Vendor": ["Acme", "", "Acme"],
        "Type": ["Apparel", "", "Home"],
        "Tags": ["summer, cotton", "", ""],
        "Option1 Name": ["Size", "", "Title"],
        "Option1 Value": ["M", "L", "Default Title"],
        "Variant SKU": ["1", "2", "3"],
        "Image Src": ["https://a/1.jpg", "https://a/2.jpg", "https://a/3.jpg"],
    }
    rows = rows_of(columns)
    assert resolved(columns).preset == "Shopify product export"
    assert [row["item_id"] for row in rows] == ["shirt", "shirt", "mug"] and rows[0]["description"] == "Soft"
    assert rows[0]["attributes"]["Tags"] == ["summer", "cotton"] and rows[1]["attributes"] == {"Option1 Value": ["L"]}


def test_amazon_metadata_of_both_generations():
    columns = {
        "parent_asin": ["B1"],
        "title": ["Tea"],
        "description": [["One.", "Two."]],
        "features": [["Warm"]],
        "images": [[{"hi_res": None, "large": "https://a/l.jpg", "thumb": "https://a/t.jpg", "variant": "MAIN"}]],
        "categories": [["Grocery", "Tea"]],
        "details": [{"Brand": "Acme"}],
        "store": ["Acme"],
        "average_rating": [4.5],
    }
    (row,) = rows_of(columns, textual=False)
    assert (row["item_id"], row["description"], row["pictures"]) == ("B1", "Warm\nOne.\nTwo.", ["https://a/l.jpg"])
    assert row["categories"] == ["Grocery", "Tea"] and resolved(columns, False).not_read == ("details", "average_rating")
    old = {
        "asin": ["A1"],
        "title": ["Tea"],
        "imUrl": ["https://a/1.jpg"],
        "categories": [[["Grocery", "Tea"], ["Gifts"]]],
        "brand": ["Acme"],
    }
    (row,) = rows_of(old, textual=False)
    assert resolved(old, False).preset == "Amazon reviews 2014 or 2018"
    assert (row["item_id"], row["categories"], row["attributes"]) == ("A1", ["Grocery", "Tea"], {"brand": ["Acme"]})


def test_recbole_and_movielens():
    columns = {
        "item_id:token": ["1"],
        "movie_title:token_seq": ["Toy Story"],
        "release_year:token": ["1995"],
        "class:token_seq": ["Animation Comedy"],
    }
    (row,) = rows_of(columns)
    assert (row["item_id"], row["title"]) == ("1", "Toy Story")
    assert row["attributes"] == {"class:token_seq": ["Animation", "Comedy"], "release_year:token": ["1995"]}
    (row,) = rows_of({"movieId": ["1"], "title": ["Toy Story (1995)"], "genres": ["Animation|Comedy"]})
    assert (row["item_id"], row["attributes"]) == ("1", {"genres": ["Animation", "Comedy"]})


def test_common_names_are_matched_whatever_their_case_and_separators():
    for names in (
        ("Item ID", "Product Title", "Image URL", "Product Category"),
        ("itemId", "productTitle", "imageUrl", "product-category"),
    ):
        columns = dict(zip(names, (["1"], ["Tea"], ["a.jpg"], ["Food"]), strict=True)) | {"colour": ["red"]}
        (row,) = rows_of(columns)
        assert (row["item_id"], row["title"], row["pictures"], row["categories"]) == ("1", "Tea", ["a.jpg"], ["Food"])
        mapping = resolved(columns)
        assert f"items.parquet: title is read from column {names[1]!r}" in mapping.notes and mapping.not_read == ("colour",)
    assert resolved({"sku": ["1"], "id": ["2"]}).item_id == "sku"  # the more specific name
    assert resolved({"item_id": ["1"], "product_id": ["2"], "title": ["a"], "name": ["b"]}).not_read == ("product_id", "name")


def test_ambiguous_common_names_and_a_missing_id_are_refused_with_the_candidates():
    with pytest.raises(
        CatalogError, match=r"no column 'item_id'.*several columns may hold it: sku, asin; set catalog.fields.item_id to one of them"
    ):
        resolved({"sku": ["1"], "asin": ["2"]})
    with pytest.raises(CatalogError, match=r"several columns may hold it: img, photo; set catalog.fields.image to one of them, or to null"):
        resolved({"item_id": ["1"], "img": ["2"], "photo": ["3"]})
    assert resolved({"item_id": ["1"], "img": ["2"], "photo": ["3"]}, image=None).image == ()
    with pytest.raises(CatalogError, match=r"no column 'item_id' \(catalog.fields.item_id\); found: colour"):
        resolved({"colour": ["1"]})


def categories_of(cells, textual: bool = False, **fields) -> list[list[str]]:
    columns = {"item_id": [str(row) for row in range(len(cells))], "categories": cells}
    return [row["categories"] for row in rows_of(columns, textual, **fields)]


@pytest.mark.parametrize(
    ("cells", "paths"),
    [
        (["Apparel > Clothing > Shirts", "Home", "Apparel > Shoes"], [["Apparel", "Clothing", "Shirts"], ["Home"], ["Apparel", "Shoes"]]),
        (["A/B/C", "A/B/D", "A/E/F"], [["A", "B", "C"], ["A", "B", "D"], ["A", "E", "F"]]),
        (["Food/Tea", "Food/Nuts", "Home/Lamps", "Home/Rugs"], [["Food", "Tea"], ["Food", "Nuts"], ["Home", "Lamps"], ["Home", "Rugs"]]),
        (["A|B|C", "A|B|D", "A|E|F"], [["A", "B", "C"], ["A", "B", "D"], ["A", "E", "F"]]),
        (["A » B", "A » C"], [["A", "B"], ["A", "C"]]),
        ([["A > B", "C > D"], ["E"]], [["A", "B"], ["E"]]),  # the first of several paths
        (
            ["Women's Shoes / Bags", "TV/Video", "Audio/Hi-Fi", "Lamps"],
            [["Women's Shoes / Bags"], ["TV/Video"], ["Audio/Hi-Fi"], ["Lamps"]],
        ),
        (["Shoes / Bags", "Tops / Shirts", "Skirts / Dresses"], [["Shoes / Bags"], ["Tops / Shirts"], ["Skirts / Dresses"]]),
        ([["TV/Video", "Cables"], ["TV/Video"]], [["TV/Video", "Cables"], ["TV/Video"]]),
        (["Rock & Roll", "Pop"], [["Rock & Roll"], ["Pop"]]),
    ],
)
def test_the_separator_of_category_paths_is_detected(cells, paths):
    assert categories_of(cells) == paths


def test_the_separator_of_category_paths_can_be_set():
    assert categories_of(["A > B"], category_separator="") == [["A > B"]]
    assert categories_of(["A - B", "C"], category_separator=" - ") == [["A", "B"], ["C"]]
    assert categories_of(["A > B|A > C"], textual=True) == [["A", "B"]]
    columns = {"item_id": ["1", "2"], "top": ["TV/Video", "TV/Video"], "leaf": ["Cables", "Screens"]}
    assert rows_of(columns, False, categories=["top", "leaf"])[0]["categories"] == ["TV/Video", "Cables"]
