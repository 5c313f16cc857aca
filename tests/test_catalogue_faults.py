"""Faults of reading catalogues that were found once, each as a kind: the numbers in the names are those of the list they come from."""

import csv
import gzip
import io
import json
import os
import re
import unicodedata
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from drawn_shop import EVENTS, ITEMS, USERS, command, delimited, facts, problems, write
from PIL import Image, PngImagePlugin

import mmsid
from mmsid.artifacts import read_table
from mmsid.cli import main
from mmsid.errors import CatalogError, ConfigError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def changed(rows, **changes) -> list[dict]:
    """Rows with new values: column -> function of the row."""
    return [row | {name: change(row) for name, change in changes.items()} for row in rows]


def refusal(shop, folder, **keys) -> str:
    with pytest.raises(CatalogError) as caught:
        mmsid.ingest(folder / "ingest", shop.keys(folder, **keys))
    assert ";" in str(caught.value), "an error ends with its remedy"
    return str(caught.value)


# 1: histories that do not join


@pytest.mark.parametrize(("separator", "name"), [(" ", "white space"), (",", "','"), (";", "';'"), ("\t", "tabs"), ("|", None)])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_1_histories_in_one_text_are_split_at_the_separator_that_makes_ids_known(drawn_shop, tmp_path, separator, name, suffix):
    users = changed(drawn_shop.users, **{key: lambda row, key=key: separator.join(map(str, row[key])) for key in ("items", "timestamps")})
    path = write(tmp_path / f"users.{suffix}", users if suffix == "parquet" else delimited(users))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, sequences=path))
    assert facts(catalog) == facts(drawn_shop.plain()) and not problems(catalog)
    assert name is None or any(f"the item ids are separated by {name}" in note for note in catalog.notes)


def numbered(shop, folder, ours, theirs):
    """Keys of the shop with numbers as ids, written in one way in the items and in another one in the log."""
    number = {row["item_id"]: int(row["item_id"][2:]) for row in shop.rows}
    items = write(folder / "items.csv", delimited(changed(shop.rows, item_id=lambda row: ours(number[row["item_id"]]))))
    events = changed(shop.events(), item_id=lambda row: theirs(number[row["item_id"]]))
    return {"items": items, "events": write(folder / "log.csv", delimited(events))}


@pytest.mark.parametrize(("ours", "theirs"), [("{}", "{}.0"), ("{}.0", "{}"), ("{}", "{:04d}"), ("{:04d}", "{:04d}")])
def test_1_ids_match_in_any_spelling_of_a_number(drawn_shop, tmp_path, ours, theirs):
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, **numbered(drawn_shop, tmp_path, ours.format, theirs.format)))
    assert (len(catalog.histories), len(catalog.histories.rows)) == (USERS, EVENTS) and not problems(catalog)
    assert sorted(catalog.content_hashes) == sorted(drawn_shop.plain().content_hashes)


def test_1_leading_zeros_of_item_ids_are_kept(drawn_shop, tmp_path):
    said = refusal(drawn_shop, tmp_path, **numbered(drawn_shop, tmp_path, "{:04d}".format, str))
    assert "none of 60 interactions is of an item" in said and "the ids differ in leading zeros, which are part of an item's id" in said
    assert re.search(r"unknown ids are '\d+', '\d+', '\d+', ids of items are '000\d', '000\d', '000\d'", said)


def test_1_a_log_of_another_catalogue_exits_with_1(drawn_shop, tmp_path, capsys):
    events = write(tmp_path / "log.csv", delimited(changed(drawn_shop.events(), item_id=lambda row: f"other-{row['item_id'][2:]}")))
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, drawn_shop.keys(tmp_path, events=events))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "likely cause: the file belongs to another catalogue" in said and "'ad0', 'ad1', 'ad2'" in said
    events = write(tmp_path / "log.csv", delimited(changed(drawn_shop.events(), item_id=lambda row: row["item_id"].upper())))
    assert "upper and lower case" in refusal(drawn_shop, tmp_path, events=events)


@pytest.mark.parametrize("length", [0, 2])
def test_1_a_run_that_needs_users_is_refused_before_its_first_stage(drawn_shop, tmp_path, monkeypatch, length):
    from mmsid import stages

    monkeypatch.setattr(stages, "run_unless_finished", lambda stage, *_: pytest.fail(f"{stage} has begun"))
    users = [{name: value if name == "user_id" else value[:length] for name, value in user.items()} for user in drawn_shop.users]
    keys = drawn_shop.keys(tmp_path, sequences=write(tmp_path / "users.parquet", users))
    if not length:
        del keys["sequences"], keys["fields"]["timestamps"]
    data = {"name": "r", "runs": tmp_path / "runs", "catalog": keys, "baselines": {"methods": ["random"]}, "train_recommender": {}}
    with pytest.raises(ConfigError, match=rf"train_recommender: the catalogue has {USERS if length else 0} users, .* {length} items; give"):
        stages.run_stages(stages.stage_configs(data, source="r.yaml"))
    del data["train_recommender"]
    with pytest.raises(pytest.fail.Exception, match="baselines has begun"):
        stages.run_stages(stages.stage_configs(data, source="r.yaml"))


# 2: a catalogue without content


def test_2_blanks_around_headers_do_not_matter(drawn_shop, tmp_path):
    text = delimited(drawn_shop.rows)
    header, rest = text.split("\n", 1)
    items = write(tmp_path / "items.csv", header.replace(",", " , ") + " \n" + rest)
    assert facts(drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))) == facts(drawn_shop.plain())


def test_2_items_without_content_are_refused(drawn_shop, tmp_path):
    items = write(tmp_path / "items.csv", delimited([{"item_id": row["item_id"], "title": "", "price": 3} for row in drawn_shop.rows]))
    said = refusal(drawn_shop, tmp_path, items=items, fields={"attributes": None})
    assert "none of the 20 items" in said and "map the columns under catalog.fields" in said


def test_2_items_that_share_one_content_are_told(drawn_shop, tmp_path):
    rows = [{"item_id": row["item_id"], "title": "Lamp" if number < 15 else row["title"]} for number, row in enumerate(drawn_shop.rows)]
    keys = drawn_shop.keys(tmp_path, items=write(tmp_path / "items.csv", delimited(rows)), fields={"attributes": None})
    with pytest.warns(UserWarning, match="15 of 20 items have the same text, pictures, categories and attributes.*correct catalog.fields"):
        catalog = drawn_shop.read(tmp_path, keys)
    assert any("15 of 20 items have the same text" in note for note in catalog.notes)


# 3: the field's standard files


def test_3_amazon_reviews_2023(drawn_shop, tmp_path):
    rows = [
        {
            "parent_asin": row["item_id"],
            "title": row["title"],
            "features": [],
            "description": [row["description"]] if row["description"] else [],
            "images": [
                {"hi_res": name if at % 2 else None, "large": name, "thumb": "t.png", "variant": "MAIN"}
                for at, name in enumerate(row["image"])
            ],
            "categories": row["categories"],
            "store": row["brand"],
            "details": {"Color": row["color"], "Size": {"Width": "3 in"}},
        }
        for row in drawn_shop.rows
    ]
    items = write(tmp_path / "meta.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items, fields={"attributes": []}))
    assert facts(catalog) == facts(drawn_shop.plain(attributes=())) and not problems(catalog)
    assert any("recognised as Amazon reviews 2023" in note for note in catalog.notes)
    more = drawn_shop.read(tmp_path / "more", drawn_shop.keys(tmp_path, items=items, fields={"attributes": ["store", "details"]}))
    first = more.items[more.row_of["ad0"]]
    assert first.attributes == {"store": ("Acme",), "details.Color": ("red",), "details.Size.Width": ("3 in",)}


def test_3_amazon_reviews_2014(drawn_shop, tmp_path):
    rows = [
        {
            "asin": row["item_id"],
            "title": row["title"],
            "description": row["description"],
            "categories": [row["categories"]],
            "salesRank": {"Home": 3},
        }
        | ({"imUrl": row["image"][0]} if row["image"] else {})
        for row in drawn_shop.rows
    ]
    items = write(tmp_path / "meta.json", "".join(f"{row!r}\n" for row in rows))  # lines of Python, as published
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items, fields={"attributes": []}))
    assert facts(catalog) == facts(drawn_shop.plain(attributes=(), images=1)) and not problems(catalog)


def test_3_one_document_with_items_by_their_ids(drawn_shop, tmp_path):
    document = {row["item_id"]: {name: value for name, value in row.items() if name != "item_id"} for row in drawn_shop.rows}
    items = write(tmp_path / "item.json", json.dumps(document))
    assert facts(drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))) == facts(drawn_shop.plain())


def test_3_lists_of_names_with_values(drawn_shop, tmp_path):
    def pairs(row):
        return [{"name": name, "value": row[name]} for name in ("brand", "color")]

    items = write(tmp_path / "items.parquet", changed(drawn_shop.rows, facts=pairs))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items, fields={"attributes": ["facts"]}))
    assert facts(catalog) == facts(drawn_shop.plain())


def test_3_several_columns_for_one_text(drawn_shop, tmp_path):
    both = [row | {"title": row["title"].partition(", ")[0], "detail": row["title"].partition(", ")[2]} for row in drawn_shop.rows]
    joined = changed(both, title=lambda row: f"{row['title']} {row['detail']}")
    keys = drawn_shop.keys(tmp_path, items=write(tmp_path / "both.parquet", both), fields={"title": ["title", "detail"]})
    plain = drawn_shop.keys(tmp_path, items=write(tmp_path / "joined.parquet", joined))
    assert facts(drawn_shop.read(tmp_path / "both", keys)) == facts(drawn_shop.read(tmp_path / "joined", plain))


# 4: cells and escapes of csv files


def printed(values, comma) -> str:
    return "[" + ("," if comma else "").join(f" {value!r}" for value in values).strip() + "]"


@pytest.mark.parametrize("comma", [True, False])
def test_4_lists_as_pandas_and_numpy_print_them(drawn_shop, tmp_path, comma):
    cells = {name: lambda row, name=name: printed(row[name], comma) for name in ("image", "categories")}
    items = write(tmp_path / "items.csv", delimited(changed(drawn_shop.rows, **cells)))
    users = {name: lambda row, name=name: printed(row[name], comma) for name in ("items", "timestamps")}
    sequences = write(tmp_path / "users.csv", delimited(changed(drawn_shop.users, **users)))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items, sequences=sequences))
    assert facts(catalog) == facts(drawn_shop.plain()) and not problems(catalog)


@pytest.mark.parametrize(
    ("options", "before"),
    [({"doublequote": False, "escapechar": "\\", "quoting": csv.QUOTE_ALL}, ""), ({"separator": ";"}, "sep=;\n")],
    ids=["Spark", "Excel"],
)
def test_4_csv_dialects(drawn_shop, tmp_path, options, before):
    rows = changed(drawn_shop.rows, description=lambda row: f'A 5" pipe, "{row["color"]}"; two\nlines' if row["description"] else "")
    plain = drawn_shop.read(tmp_path / "plain", drawn_shop.keys(tmp_path, items=write(tmp_path / "items.parquet", rows)))
    items = write(tmp_path / "items.csv", before + delimited(rows, **options))
    assert facts(drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))) == facts(plain)


@pytest.mark.parametrize("null", ["\\N", "NULL", "nan", "<NA>"])
def test_4_texts_that_mean_nothing_are_missing_and_told(drawn_shop, tmp_path, null):
    rows = changed(drawn_shop.rows, description=lambda row: row["description"] or null, image=lambda row: row["image"] or null)
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=write(tmp_path / "items.csv", delimited(rows))))
    assert facts(catalog) == facts(drawn_shop.plain()) and not problems(catalog)
    assert any(null in note for note in catalog.notes)


def test_4_undecodable_bytes_name_row_column_and_encoding(drawn_shop, tmp_path):
    text = delimited(changed(drawn_shop.rows, title=lambda row: f"Möbel für {row['title']}")).encode()
    at = text.index("ü".encode(), len(text) // 2)
    row = text[:at].count(b"\n")
    said = refusal(drawn_shop, tmp_path, items=write(tmp_path / "items.csv", text[:at] + b"\xff" + text[at + 2 :]))
    assert f"{row}, field 'title'" in said and "UTF-8" in said


def test_4_ids_rounded_by_a_spreadsheet(drawn_shop, tmp_path):
    def items(least):
        rows = changed(drawn_shop.rows, item_id=lambda row: "1.23457E+12" if int(row["item_id"][2:]) >= least else row["item_id"])
        return write(tmp_path / f"{least}.csv", delimited(rows))

    said = refusal(drawn_shop, tmp_path, items=items(2), sequences=None, fields={"timestamps": None})
    assert "17 of 20 rows" in said and "ids like '1.23457E+12' were rounded by a spreadsheet; export them again as text" in said
    drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items(18)))
    rows = read_table(tmp_path / "ingest" / "problems.parquet").to_pylist()
    assert [row["detail"] for row in rows if row["code"] == "duplicate_id"] == ["rounded by a spreadsheet"]
    events = write(tmp_path / "log.csv", delimited(changed(drawn_shop.events(), item_id=lambda row: "1.23457E+12")))
    assert "rounded by a spreadsheet" in refusal(drawn_shop, tmp_path, events=events)


def test_4_contents_under_another_name(drawn_shop, tmp_path):
    items = write(tmp_path / "items.csv", gzip.compress((drawn_shop.folder / "items.parquet").read_bytes()))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, items=items))
    assert facts(catalog) == facts(drawn_shop.plain()) and any("gzip" in note and "parquet" in note for note in catalog.notes)
    for name in ("items.parquet", "items.csv"):
        assert "git lfs pull" in refusal(drawn_shop, tmp_path, items=write(tmp_path / "lfs" / name, LFS))


# 6: linked pictures


def test_6_linked_pictures(drawn_shop, tmp_path):
    shop = tmp_path / "shop"
    items = write(shop / "items.parquet", drawn_shop.rows)
    (shop / "images").symlink_to(drawn_shop.folder / "images")
    keys = {"items": items, "image_root": shop}
    said = refusal(drawn_shop, tmp_path, **keys)
    assert "21 of them as picture_outside_root" in said and "pictures.link_targets" in said
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, **keys, pictures={"link_targets": [str(drawn_shop.folder)]}))
    assert facts(catalog) == facts(drawn_shop.plain())
    rows = changed(drawn_shop.rows, image=lambda row: [f"../shop/../../{name}" for name in row["image"]])
    said = refusal(
        drawn_shop, tmp_path, items=write(shop / "up.parquet", rows), image_root=shop, pictures={"link_targets": [str(drawn_shop.folder)]}
    )
    assert "21 of them as picture_outside_root" in said


def test_6_snapshots_of_the_hugging_face_cache(drawn_shop, tmp_path):
    snapshot = tmp_path / "datasets--shop--ads" / "snapshots" / "0a1b"
    for number, path in enumerate([Path("items.parquet"), *(Path(name) for row in drawn_shop.rows for name in row["image"])]):
        blob = write(tmp_path / "datasets--shop--ads" / "blobs" / f"{number:040x}", (drawn_shop.folder / path).read_bytes())
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
    keys = drawn_shop.keys(tmp_path, items=snapshot / "items.parquet")
    del keys["image_root"]
    assert facts(drawn_shop.read(tmp_path, keys)) == facts(drawn_shop.plain())


# 12: ids and groups


def test_12_bytes_and_uuids_are_ids_and_text(drawn_shop, tmp_path):
    ids = {row["item_id"]: uuid.UUID(int=number) for number, row in enumerate(drawn_shop.rows)}
    table = pa.Table.from_pylist(drawn_shop.rows)
    values = {
        "uuid": pa.array([value.bytes for value in ids.values()], pa.uuid()),
        "bytes": pa.array([str(value).encode() for value in ids.values()], pa.binary()),
    }
    for name, column in values.items():
        items = table.set_column(0, "item_id", column).set_column(1, "title", table["title"].cast(pa.binary()))
        events = changed(drawn_shop.events(), item_id=lambda row: str(ids[row["item_id"]]))
        keys = drawn_shop.keys(tmp_path, items=write(tmp_path / f"{name}.parquet", items), events=write(tmp_path / "log.parquet", events))
        catalog = drawn_shop.read(tmp_path / name, keys)
        assert sorted(catalog.item_ids) == sorted(map(str, ids.values())) and len(catalog.histories.rows) == EVENTS
        assert sorted(catalog.content_hashes) == sorted(drawn_shop.plain().content_hashes)


def test_12_rows_without_a_group_are_items_of_their_own(drawn_shop, tmp_path):
    rows = changed(drawn_shop.rows, group=lambda row: "g" if row["item_id"] in ("ad2", "ad5") else "")
    keys = drawn_shop.keys(tmp_path, items=write(tmp_path / "items.csv", delimited(rows)), fields={"group_by": "group"})
    events = changed(drawn_shop.events(), item_id=lambda row: "g" if row["item_id"] in ("ad2", "ad5") else row["item_id"])
    del keys["sequences"], keys["fields"]["timestamps"]
    catalog = drawn_shop.read(tmp_path, keys | {"events": write(tmp_path / "log.csv", delimited(events))})
    assert len(catalog.items) == ITEMS - 1 and len(catalog.histories.rows) == EVENTS
    group = catalog.items[catalog.row_of["g"]]
    assert (
        sorted(group.attributes["color"]) == sorted({drawn_shop.rows[2]["color"], drawn_shop.rows[5]["color"]}) and len(group.images) == 2
    )
    plain = facts(drawn_shop.plain())["contents"]
    assert {name: hashed for name, hashed in facts(catalog)["contents"].items() if name != "g"} == {
        name: hashed for name, hashed in plain.items() if name not in ("ad2", "ad5")
    }


# 13: reasons of pictures


def png(**options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "teal").save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_13_reasons_of_pictures_name_their_cause(drawn_shop, tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 3_000_000, zip=True)
    files = {
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "picture_html"),
        "empty.png": (b"", "picture_empty"),
        "lfs.png": (LFS, "picture_lfs_pointer"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture_svg"),
        "cut.png": (png()[:-20], "picture_truncated"),
        "notes.png": (b"just some text", "picture_format"),
        "long_text.png": (png(pnginfo=text), None),
        "long_profile.png": (png(icc_profile=os.urandom(1_200_000)), None),
        "with blank.png": (png(), None),
        unicodedata.normalize("NFD", "é.png"): (png(), None),
        "versioned.png": (png(), None),
        "a.png": (png(), None),
        "b.png": (png(), None),
    }
    for name, (data, _) in files.items():
        write(tmp_path / name, data)
    written = {"with blank.png": "with%20blank.png", unicodedata.normalize("NFD", "é.png"): "é.png", "versioned.png": "versioned.png?v=12"}
    written |= {"base64": "data:image/png;base64,bm8gcGljdHVyZQ=="}
    files["base64"] = (b"", "picture_base64")
    rows = [{"item_id": name, "title": f"thing {at}", "image": written.get(name, name)} for at, name in enumerate(files)]
    items = write(tmp_path / "items.parquet", rows)
    catalog = drawn_shop.read(tmp_path, {"items": items, "picture_cache": tmp_path / "pictures"})
    found = {
        row["item_id"]: row["code"]
        for row in read_table(tmp_path / "ingest" / "problems.parquet").to_pylist()
        if row["code"] != "no_picture"
    }
    assert found == {name: code for name, (_, code) in files.items() if code}
    assert all(len(catalog.items[catalog.row_of[name]].images) == (code is None) for name, (_, code) in files.items())


# 14: what the log cannot tell


def test_14_repeats_that_cannot_be_ranked_are_told_and_can_be_left_out(drawn_shop, tmp_path, capsys):
    events = [
        event | {"item_id": "ad3"} if at % 5 in (0, 4) else event for at, event in enumerate(drawn_shop.events())
    ]  # each user ends as it began
    keys = drawn_shop.keys(tmp_path, events=write(tmp_path / "log.parquet", events))
    command(tmp_path, keys)
    assert "12 of 12" in (said := capsys.readouterr().out) and "catalog.split.repeats" in said
    command(tmp_path, keys | {"split": {"repeats": "first"}})
    assert "catalog.split.repeats" not in capsys.readouterr().out


def test_14_seconds_and_milliseconds_in_one_column(drawn_shop, tmp_path):
    events = changed(drawn_shop.events(), timestamp=lambda row: row["timestamp"] * (1000 if row["user_id"] == "u3" else 1))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, events=write(tmp_path / "log.parquet", events)))
    assert facts(catalog, same_times=False) == facts(drawn_shop.plain(), same_times=False)
    assert problems(catalog) == {"timestamp_of_other_unit": 5} and any("5 of 60 values in another unit" in note for note in catalog.notes)


def test_14_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"mmsid {mmsid.__version__}\n"


@pytest.mark.parametrize("format", ["feather", "stream"])
def test_an_arrow_file_with_damaged_offsets_is_refused(tmp_path, format):
    """Arrow does not check the offsets of a file, and reading past the end of a buffer would end the process."""
    table, path = pa.table({"item_id": ["a", "b", "c"], "title": ["lamp", "chair", "table"]}), tmp_path / "items.arrow"
    opened = pa.ipc.new_file if format == "feather" else pa.ipc.new_stream
    with opened(path, table.schema) as file:
        file.write_table(table)
    offsets = np.array([0, 4, 9, 14], np.int32).tobytes()
    damaged = np.array([0, 4, 2_000_000_000, 14], np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, damaged))
    with pytest.raises(CatalogError, match=r"items\.arrow"):
        mmsid.ingest(tmp_path / "ingest", {"items": path})
