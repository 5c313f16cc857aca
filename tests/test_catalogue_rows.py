"""What people bring as a catalogue, continued: what is refused, counted, converted or told, with its numbers and its remedy."""

import importlib.util
import json
import re
from collections import Counter
from decimal import Decimal

import numpy as np
import pillow_heif
import pyarrow as pa
import pytest
import yaml
from drawn_shop import EVENTS, ITEMS, PICTURES, START, USERS, command, delimited, facts, problems, write
from PIL import Image, ImageDraw, features

import mmsid
from mmsid.artifacts import read_table
from mmsid.catalog import Catalog, PictureLimits, load_picture
from mmsid.catalog.proposal import config_text, propose
from mmsid.errors import CatalogError


def changed(rows, **changes) -> list[dict]:
    """Rows with new values: column -> function of the row."""
    return [row | {name: change(row) for name, change in changes.items()} for row in rows]


# Pictures


def test_pictures_that_cannot_be_fetched_have_reasons(drawn_shop, shop_server, tmp_path):
    wrong = {
        "ad3": (f"{shop_server.url}/images/gone.png", "picture_http_404", "HTTP 404"),
        "ad4": ("s3://bucket/a.png", "picture_driver", "s3fs"),
        "ad5": ("gopher://shop.example/a.png", "picture_scheme", "gopher"),
        "ad6": ("memory://no/such.png", "picture_missing", ""),
        "ad7": ("http:///a.png", "picture_bad_url", ""),
    }
    if importlib.util.find_spec("s3fs"):
        del wrong["ad4"]
    rows = changed(drawn_shop.rows, image=lambda row: [wrong[row["item_id"]][0]] if row["item_id"] in wrong else row["image"])
    items = write(tmp_path / "items.parquet", rows)
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items, pictures={"allow_private_hosts": True}))
    assert len(catalog.items) == ITEMS and sum(len(item.images) for item in catalog.items) == PICTURES - len(wrong)
    rows = read_table(tmp_path / "ingest" / "problems.parquet").to_pylist()
    found = {row["item_id"]: row for row in rows if row["code"].startswith("picture_")}
    for name, (url, code, detail) in wrong.items():
        assert (found[name]["code"], found[name]["file"]) == (code, str(items))
        assert url in found[name]["detail"] and detail in found[name]["detail"]
    assert found.keys() == wrong.keys()


def test_private_addresses_are_refused_by_default(drawn_shop, shop_server, tmp_path):
    rows = changed(drawn_shop.rows, image=lambda row: [f"{shop_server.url}/{name}" for name in row["image"]])
    items = write(tmp_path / "items.parquet", rows)
    with pytest.raises(
        CatalogError, match=r"21 of 21 pictures cannot be used, 21 of them as picture_private_address .*allow_private_hosts"
    ):
        mmsid.ingest(tmp_path / "ingest", drawn_shop.keys(tmp_path, items=items))


def test_a_catalogue_whose_pictures_are_missing_exits_with_1_examples_and_the_remedy(drawn_shop, tmp_path, capsys):
    def keys(lost):
        def image(row):
            return [f"photos/{name}" if int(row["item_id"][2:]) < lost else name for name in row["image"]]

        rows = changed(drawn_shop.rows, image=image)
        return drawn_shop.keys(tmp_path, items=write(tmp_path / f"{lost}.csv", delimited(rows)))

    with pytest.raises(SystemExit) as stop:
        command(tmp_path, keys(ITEMS))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "21 of 21 pictures cannot be used, 21 of them as picture_missing" in said
    assert "'photos/images/ad" in said and "correct the path or the image_root" in said and "ingest.max_problems" in said
    command(tmp_path, keys(7))  # ten of 21
    out = capsys.readouterr().out
    assert "picture_missing: 10" in out and "(photos" not in out and "row 1): photos/images/ad0_0.png" in out


def animated(size, **options):
    frames = [Image.new("RGB", size, (0, 80 * number, 99)) for number in range(3)]
    return frames[0], {"save_all": True, "append_images": frames[1:], **options}


def formats() -> dict[str, tuple[str, Image.Image, dict]]:
    """name -> format, picture, options of `save`."""
    picture = Image.new("RGB", (24, 16), "orange")
    ImageDraw.Draw(picture).rectangle((4, 4, 12, 10), "navy")
    alpha = picture.convert("RGBA")
    alpha.putalpha(128)
    deep = Image.fromarray((np.arange(24 * 16, dtype=np.uint16) * 160).reshape(16, 24))
    found = {
        "plain.jpg": ("JPEG", picture, {}),
        "cmyk.jpg": ("JPEG", picture.convert("CMYK"), {}),
        "gray.jpg": ("JPEG", picture.convert("L"), {}),
        "alpha.png": ("PNG", alpha, {}),
        "palette.png": ("PNG", picture.quantize(8), {"transparency": 0}),
        "deep.png": ("PNG", deep, {}),
        "a.gif": ("GIF", picture.quantize(8), {}),
        "moving.gif": ("GIF", *animated((24, 16))),
        "a.bmp": ("BMP", picture, {}),
        "a.tiff": ("TIFF", picture, {}),
        "deep.tif": ("TIFF", deep, {}),
        "a.webp": ("WEBP", picture, {}),
        "moving.webp": ("WEBP", *animated((24, 16))),
        "a.jp2": ("JPEG2000", picture, {}),
        "wrong_suffix.jpg": ("PNG", picture, {"format": "PNG"}),
    }
    return found | ({"a.avif": ("AVIF", picture, {})} if features.check("avif") else {})


def test_every_format_of_pictures_is_read_and_counted(drawn_shop, tmp_path, capsys):
    pictures = formats()
    for name, (_, picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
    heic = pillow_heif.from_pillow(pictures["plain.jpg"][1])
    heic.save(tmp_path / "a.heic")
    names = [*pictures, "a.heic"]
    rows = [{"item_id": name, "title": f"thing {number}", "image": name} for number, name in enumerate(names)]
    catalog = drawn_shop.read(tmp_path, {"items": write(tmp_path / "items.csv", delimited(rows))})
    assert not catalog.problems
    said = re.search(r"^ingest: pictures: (.*)$", capsys.readouterr().err, re.M)[1]
    counts = {kind: int(count) for count, kind in (one.split() for one in said.split(", "))}
    assert counts == Counter([kind for kind, *_ in pictures.values()] + ["HEIF"])
    for item in catalog.items:
        assert load_picture(item.images[0], PictureLimits(), tmp_path).mode == "RGB"
    moving = write(tmp_path / "moving.csv", delimited([row for row in rows if "moving" in row["image"]]))
    with pytest.raises(CatalogError, match=r"2 of 2 .* as picture_animated .*set pictures.animated to first_frame"):
        mmsid.ingest(tmp_path / "strict", {"items": moving, "pictures": {"animated": "refuse"}})


# Logs


def test_repeated_events_stay_and_are_counted(drawn_shop, tmp_path):
    events = [*drawn_shop.events(), *drawn_shop.events()[:9]]
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, events=write(tmp_path / "log.parquet", events)))
    assert problems(catalog) == {"duplicate_event": 9, "repeated_item": 9}
    assert (len(catalog.histories), len(catalog.histories.rows)) == (USERS, EVENTS + 9)


def test_event_types_and_a_weight_column_weight_the_events(drawn_shop, tmp_path, capsys):
    events = [event | {"event_type": ("view", "buy")[at % 2], "weight": 0.5} for at, event in enumerate(drawn_shop.events())]
    keys = drawn_shop.keys(tmp_path, events=write(tmp_path / "log.parquet", events), event_types={"view": 1, "buy": 4})
    catalog = drawn_shop.read(tmp_path, keys)
    assert catalog.histories.weights.sum() == 0.5 * EVENTS / 2 * (1 + 4) and len(catalog.histories.rows) == EVENTS
    with pytest.raises(CatalogError, match=r"type 'buy' is not listed in catalog.event_types \(view\); list it with its weight, or with 0"):
        mmsid.ingest(tmp_path / "other", keys | {"event_types": {"view": 1}})


def test_a_user_with_one_event_stays(drawn_shop, tmp_path):
    events = [*drawn_shop.events(), {"user_id": "once", "item_id": "ad3", "timestamp": START}]
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, events=write(tmp_path / "log.parquet", events)))
    assert sorted(catalog.histories.lengths.tolist()) == [1, *[EVENTS // USERS] * USERS] and not problems(catalog)


# Categories and feeds


def test_taxonomy_ids_are_told(drawn_shop, tmp_path):
    items = write(tmp_path / "items.csv", delimited(changed(drawn_shop.rows, categories=lambda row: "2271")))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))
    assert {item.categories for item in catalog.items} == {("2271",)}
    assert any("taxonomy ids" in note for note in catalog.notes)


def test_names_with_a_slash_stay_whole_and_a_separator_can_be_switched_off(drawn_shop, tmp_path):
    rows = changed(drawn_shop.rows, categories=lambda row: ("TV/Video", "Pumps", "Audio/Hifi")[len(row["brand"]) % 3])
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=write(tmp_path / "items.csv", delimited(rows))))
    assert {len(item.categories) for item in catalog.items} == {1}
    rows = changed(drawn_shop.rows, categories=lambda row: " > ".join(row["categories"]))
    keys = drawn_shop.keys(tmp_path, items=write(tmp_path / "paths.csv", delimited(rows)), fields={"category_separator": ""})
    assert {len(item.categories) for item in Catalog.read(mmsid.ingest(tmp_path / "whole", keys)).items} == {1}


def test_variants_of_a_feed_are_one_item_with_all_colours_and_sizes(drawn_shop, shop_server, tmp_path):
    rows = [
        {
            "id": f"v{number}",
            "title": "Coat" if number < 4 else f"Lamp {number}",
            "image_link": f"{shop_server.url}/images/ad{number + 2}_0.png",
            "price": "5 EUR",
            "color": ("red", "blue")[number % 2],
            "size": ("M", "L")[number // 2 % 2],
            "item_group_id": "coat" if number < 4 else "",
        }
        for number in range(6)
    ]
    keys = {"items": write(tmp_path / "feed.tsv", delimited(rows, "\t")), "pictures": {"allow_private_hosts": True}}
    catalog = drawn_shop.read(tmp_path, keys | {"picture_cache": tmp_path / "pictures"})
    assert sorted(catalog.item_ids) == ["coat", "v4", "v5"]
    coat = catalog.items[catalog.row_of["coat"]]
    assert {name: sorted(labels) for name, labels in coat.attributes.items()} == {"color": ["blue", "red"], "size": ["L", "M"]}
    assert len(coat.images) == 4 and len(catalog.items[catalog.row_of["v4"]].images) == 1


# Encodings and types


@pytest.mark.parametrize(
    ("encoding", "title", "note"),
    [
        ("cp1252", "Möbel für Café – 5 €", "encoding windows-1252"),
        ("utf-16", "Ωmega плед 椅子 🙂", "encoding utf-16"),
        ("utf-16-le", "Ωmega плед 椅子 🙂", "encoding utf-16-le"),
        ("utf-8-sig", "Ωmega плед 椅子 🙂", "separator ';'"),
    ],
)
def test_encodings_are_detected(drawn_shop, tmp_path, encoding, title, note):
    rows = changed(drawn_shop.rows, title=lambda row: f"{title} {row['title']}")
    plain = drawn_shop.read(tmp_path / "plain", drawn_shop.keys(tmp_path, items=write(tmp_path / "items.parquet", rows)))
    items = write(tmp_path / "items.csv", delimited(rows, ";").encode(encoding))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))
    assert facts(catalog) == facts(plain) and any(note in one for one in catalog.notes)


def test_integer_ids_and_decimals(drawn_shop, tmp_path):
    number = {row["item_id"]: int(row["item_id"][2:]) for row in drawn_shop.rows}
    table = pa.Table.from_pylist(changed(drawn_shop.rows, item_id=lambda row: number[row["item_id"]]))
    table = table.append_column("price", pa.array([Decimal("9.90")] * ITEMS)).append_column("year", pa.array([2026] * ITEMS))
    users = write(tmp_path / "users.parquet", [user | {"items": [number[item] for item in user["items"]]} for user in drawn_shop.users])
    items = write(tmp_path / "items.parquet", table)
    keys = drawn_shop.keys(tmp_path, items=items, sequences=users, fields={"attributes": ["price", "year"]})
    catalog = drawn_shop.read(tmp_path, keys)
    assert sorted(catalog.item_ids, key=int) == [str(value) for value in range(ITEMS)] and not problems(catalog)
    assert len(catalog.histories.rows) == EVENTS and catalog.items[0].attributes == {"price": ("9.90",), "year": ("2026",)}


# Texts and columns


def test_html_long_texts_and_scripts_of_the_world(drawn_shop, tmp_path):
    texts = {
        "ad2": ("<p>Soft &amp; <b>warm</b></p><ul><li>one</li></ul>", "Soft & warm\none"),
        "ad3": (" ".join(f"part{number}" for number in range(25_000)), None),
        "ad4": ("椅子 كرسي כיסא 🪑👩‍🚀", "椅子 كرسي כיסא 🪑👩‍🚀"),
        "ad5": ("size < 5 and > 3", "size < 5 and > 3"),
    }
    rows = changed(drawn_shop.rows, description=lambda row: texts.get(row["item_id"], [row["description"]])[0])
    items = write(tmp_path / "items.parquet", rows)
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))
    for name, (_, plain) in texts.items():
        item = catalog.items[catalog.row_of[name]]
        assert item.description == plain if plain else 10_000 < len(item.description) < 30_000
    assert problems(catalog) == {"description_html": 1, "description_cut": 1}
    original = dict(zip(*(catalog.items.table[name].to_pylist() for name in ("item_id", "original"))))
    assert json.loads(original["ad2"])["description"] == texts["ad2"][0] and original["ad4"] is None


def test_columns_that_nobody_reads_are_named_and_init_maps_them(drawn_shop, tmp_path, capsys):
    keys = drawn_shop.keys(tmp_path, fields={"attributes": None})
    command(tmp_path, keys)
    assert "not read      brand, color (map them under fields.attributes)" in capsys.readouterr().out
    proposal = propose([str(drawn_shop.folder / "items.parquet"), str(drawn_shop.folder / "sequences.parquet")], None)
    catalog = yaml.safe_load(config_text(proposal, "shop"))["catalog"]  # what `mmsid init` writes
    assert catalog["fields"]["attributes"] == ["brand", "color"]
    read = drawn_shop.read(tmp_path, catalog | {"image_root": drawn_shop.folder})
    assert facts(read) == facts(drawn_shop.plain())
