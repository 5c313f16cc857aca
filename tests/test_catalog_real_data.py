"""Public data sets: their counts equal those in their READMEs, and product photos in other forms give the same items and Semantic IDs."""

import base64
import functools
import gzip
import json
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn_shop import FileServer, delimited, write
from test_catalog_remote_pictures import PUBLIC, FakeInternet, Server

import mmsid
from mmsid.artifacts import read_manifest, read_table
from mmsid.catalog import Catalog, SplitConfig, describe, load_picture, split_histories
from mmsid.catalog.ingest import build
from mmsid.catalog.picture_sources.downloads import Downloader

pytestmark = pytest.mark.real_data
MAPPED = {
    "fashion9k": {"categories": ["cat_l1", "cat_l2", "cat_l3"], "attributes": ["gender", "color", "season", "year", "usage"]},
    "ml_posters": {"attributes": ["genres", "year"], "timestamps": "timestamps"},
    "grocery": {"group_by": "class_id", "title": "class_name", "categories": ["cat_l1", "coarse_name", "class_name"]},
    "amazon_scientific": {"attributes": ["brand"]},
    "amazon_beauty": {  # one column contains the brand, if known, and then the category path
        "title": "name_generated",
        "categories": "attributes",
        "category_roots": ["Bath & Body", "Fragrance", "Hair Care", "Makeup", "Skin Care", "Tools & Accessories"],
        "attributes": ["attributes"],
    },
}


def folder_of(data_root: Path, name: str) -> Path:
    folder = data_root / name
    if not (folder / "items.parquet").is_file():
        pytest.skip(f"{folder} is absent: set MMSID_DATA to the folder that holds it")
    return folder


@pytest.mark.parametrize(
    ("name", "rows", "expected", "problems"),
    [
        ("fashion9k", 9583, {"items": 9583, "pictures": 9583, "items_with_text": 9583, "users": 0}, {}),
        ("ml_posters", 2305, {"items": 2305, "pictures": 2305, "users": 1540, "interactions": 155605}, {}),
        ("grocery", 5421, {"items": 81, "pictures": 5421, "items_with_categories": 81, "users": 0}, {}),
        (
            "amazon_scientific",
            4344,
            {"items": 4344, "pictures": 0, "users": 8317, "interactions": 58492},
            {"no_categories": 131, "no_description": 123, "description_html": 7, "description_instruction": 5}
            | {"description_stuffed": 25, "title_stuffed": 1},
        ),
        (
            "amazon_beauty",
            12101,
            {"items": 12101, "items_with_categories": 12101, "users": 22363, "interactions": 198502},
            {"no_title": 1, "title_stuffed": 4},
        ),
    ],
)
def test_counts_are_those_of_the_readme(data_root, tmp_path, name, rows, expected, problems):
    folder = folder_of(data_root, name)
    keys = {"items": folder / "items.parquet", "fields": MAPPED[name], "picture_cache": tmp_path / "pictures"}
    if (folder / "sequences.parquet").is_file():
        keys["sequences"] = folder / "sequences.parquet"
    ingested = mmsid.ingest(tmp_path / "ingest", keys)
    counts = read_manifest(ingested, "ingest")["counts"]
    assert counts["in"] == rows == counts["ok"] + counts["quarantined"] and counts["quarantined"] == 0
    assert counts["items"] + counts["merged"] == counts["ok"]
    catalog = Catalog.read(ingested)
    split = split_histories(catalog, SplitConfig())
    facts = describe(catalog, split)
    assert {key: facts[key] for key in expected} == expected
    recorded = read_table(ingested / "problems.parquet")
    assert Counter(recorded["code"].to_pylist()) == catalog.problems == Counter(problems)
    assert set(recorded["file"].to_pylist()) <= {str(folder / "items.parquet")} and not any(recorded["quarantined"].to_pylist())
    if name == "fashion9k":  # the README counts names, and two of them have several parents
        assert [len({item.categories[depth] for item in catalog.items}) for depth in range(3)] == [6, 30, 75]
    if name == "grocery":
        assert facts["categories_per_depth"][:2] == [3, 43]
    if name == "amazon_beauty":
        assert facts["categories_per_depth"][0] == 6
    if facts["users"]:
        assert facts["split"]["test_users"] == facts["users"] and facts["split"]["target_seen_before"] == 0
    if name == "ml_posters":
        by_time = split_histories(catalog, SplitConfig(method="time"))
        assert 0 < len(by_time.users("test")) < 1540
    limits = mmsid.catalog.PictureLimits()
    for item in catalog.items[:20]:
        for path in item.images[:2]:
            assert load_picture(path, limits, folder).mode == "RGB"


# One set in several forms

ITEMS = 300


class Fashion:
    """The first 300 products of fashion9k, by id, and their plain reading."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder
        table = pq.read_table(folder / "items.parquet").sort_by("item_id").slice(0, ITEMS)
        self.rows = [
            {
                "item_id": row["item_id"],
                "title": row["title"],
                "image": row["image"],
                "categories": [row["cat_l1"], row["cat_l2"], row["cat_l3"]],
                "color": row["color"],
                "gender": row["gender"],
            }
            for row in table.to_pylist()
        ]
        self.plain = self.read(out, items=write(out / "items.parquet", self.rows), image_root=folder)
        self.sids = sids(self.plain, out)

    def read(self, out: Path, **keys) -> Catalog:
        fields = {"attributes": ["gender", "color"]} | keys.pop("fields", {})
        fields = {name: value for name, value in fields.items() if value is not None}
        return Catalog.read(mmsid.ingest(out / "ingest", {"picture_cache": out / "pictures", "fields": fields} | keys))

    def bytes_of(self, row: dict) -> bytes:
        return (self.folder / row["image"]).read_bytes()


def sids(catalog: Catalog, out: Path) -> dict[str, list[int]]:
    """Balanced RQ codes by item, of the pixels of its picture at 8 x 8."""
    limits = mmsid.catalog.PictureLimits()
    pixels = [np.asarray(load_picture(item.images[0], limits).resize((8, 8)), dtype=np.float32).ravel() for item in catalog.items]
    folder = mmsid.quantize_vectors(
        np.stack(pixels), out / "sids", ids=catalog.item_ids, method="balanced_rq", codebook_size=8, num_levels=4
    )
    table = mmsid.SidTable.load(folder)
    return dict(zip(table.item_ids, table.codes.tolist()))


@pytest.fixture(scope="module")
def fashion(data_root, tmp_path_factory):
    return Fashion(folder_of(data_root, "fashion9k"), tmp_path_factory.mktemp("fashion"))


def contents(catalog: Catalog) -> dict[str, str]:
    return dict(zip(catalog.item_ids, catalog.content_hashes))


def as_dataset(fashion, folder):
    rows = [row | {"image": {"bytes": fashion.bytes_of(row), "path": Path(row["image"]).name}} for row in fashion.rows]
    text = datasets.Value("string")
    kinds = dict.fromkeys(rows[0], text) | {"image": datasets.Image(), "categories": datasets.List(text)}
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).save_to_disk(folder / "saved")
    return {"items": folder / "saved"}


def as_feed(fashion, folder, server):
    rows = [
        {
            "id": row["item_id"],
            "title": row["title"],
            "link": f"https://shop.example/{row['item_id']}",
            "image_link": f"{server.url}/{row['image']}",
            "product_type": " > ".join(row["categories"]),
            "gender": row["gender"],
            "color": row["color"],
        }
        for row in fashion.rows
    ]
    return {
        "items": write(folder / "feed.tsv", delimited(rows, "\t")),
        "fields": {"attributes": None},
        "pictures": {"allow_private_hosts": True},
    }


def as_json_lines(fashion, folder):
    rows = [row | {"image": base64.b64encode(fashion.bytes_of(row)).decode()} for row in fashion.rows]
    return {"items": write(folder / "items.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))}


@pytest.mark.parametrize("form", [as_dataset, as_feed, as_json_lines])
def test_other_forms_give_the_same_contents_and_sids(fashion, tmp_path, form):
    server = FileServer(fashion.folder)
    catalog = fashion.read(tmp_path, **form(fashion, tmp_path, *([server] if form is as_feed else [])))
    server.close()
    assert contents(catalog) == contents(fashion.plain) and len(catalog.items) == ITEMS
    assert sum(len(item.images) for item in catalog.items) == ITEMS and catalog.problems == fashion.plain.problems
    assert sids(catalog, tmp_path) == fashion.sids
    assert len(set(map(tuple, fashion.sids.values()))) > 0.9 * ITEMS


# A server that fails in every way

FAULTS = {  # what the server does with so many of the pictures, and the reason under which they are recorded
    "late": (10, None),
    "too_late": (3, "timeout"),
    "gone": (6, "http_404"),
    "busy_at_first": (6, None),
    "busy": (4, "http_429"),
    "failing_at_first": (8, None),
    "failing": (3, "http_5xx"),
    "too_large": (3, "too_many_bytes"),
    "endless": (2, "too_many_bytes"),
    "of_another_type": (9, None),
    "a_page": (5, "html"),
    "moved": (4, None),
    "moved_to_link_local": (2, "private_address"),
    "moved_to_private": (2, "private_address"),
    "moved_to_a_private_name": (2, "private_address"),
}
LIMITS = {"request_seconds": 1.0, "max_bytes": 100_000, "connections": 16}


class FaultyServer(Server):
    """A server of pictures under `/FAULT/PATH`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.healed = folder, False
        self.server.handle_error = lambda *_: None  # clients go away

    def answer(self, handler) -> None:
        fault, _, path = handler.path[1:].partition("/")
        first = self.asked[handler.path] == 1
        picture = (self.folder / path).read_bytes()
        if self.healed or fault == "fine" or (fault in ("failing_at_first", "busy_at_first") and not first):
            self.send(handler, 200, picture, **{"Content-Type": "image/jpeg"})
        elif fault in ("late", "too_late"):
            time.sleep(0.3 if fault == "late" else 3)
            self.send(handler, 200, picture)
        elif fault == "gone":
            self.send(handler, 404, picture)
        elif fault in ("busy", "busy_at_first"):
            self.send(handler, 429, **{"Retry-After": "1" if fault == "busy_at_first" else "3600"})
        elif fault in ("failing", "failing_at_first"):
            self.send(handler, 500, picture)
        elif fault == "too_large":
            self.send(handler, 200, picture + bytes(LIMITS["max_bytes"]))
        elif fault == "endless":
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            while True:
                handler.wfile.write(bytes(50_000))
        elif fault == "of_another_type":
            self.send(handler, 200, picture, **{"Content-Type": "text/html; charset=utf-8"})
        elif fault == "a_page":
            self.send(handler, 200, b"<!doctype html><html><body>no such product</body></html>", **{"Content-Type": "image/jpeg"})
        else:
            hosts = {"moved": "cdn.test", "moved_to_link_local": "169.254.169.254", "moved_to_private": "10.0.0.8"}
            self.send(handler, 302, Location=f"http://{hosts.get(fault, 'intranet.test')}/fine/{path}")


def test_a_faulty_server_gives_the_same_contents_or_named_reasons(fashion, tmp_path, monkeypatch, capsys):
    server = FaultyServer(fashion.folder)
    internet = FakeInternet(server.port, {"shop.test": [[PUBLIC]], "cdn.test": [[PUBLIC]], "intranet.test": [["192.168.1.9"]]})
    options = {"resolver": internet.resolver, "connector": internet.connector, "first_wait": 0.05}
    monkeypatch.setattr(build, "Downloader", functools.partial(Downloader, **options))
    faults = [fault for fault, (count, _) in FAULTS.items() for _ in range(count)]
    fault_of = dict(zip((row["item_id"] for row in fashion.rows[::3]), faults))
    rows = [row | {"image": f"http://shop.test/{fault_of.get(row['item_id'], 'fine')}/{row['image']}"} for row in fashion.rows]
    keys = {"items": write(tmp_path / "items.parquet", rows), "pictures": LIMITS}
    catalog = fashion.read(tmp_path, **keys)
    passing = sum(FAULTS[fault][1] in ("timeout", "http_429", "http_5xx") for fault in fault_of.values())
    assert f"{passing} downloads failed for reasons that may pass; `mmsid ingest --redo` asks for them again" in capsys.readouterr().err
    problems = [row for row in read_table(tmp_path / "ingest" / "problems.parquet").to_pylist() if row["code"] != "no_picture"]
    expected = {item: f"picture_{FAULTS[fault][1]}" for item, fault in fault_of.items() if FAULTS[fault][1]}
    assert {row["item_id"]: row["code"] for row in problems} == expected and len(problems) == len(expected)
    assert all(row["file"] == str(keys["items"]) and "http://shop.test/" in row["detail"] for row in problems)
    assert catalog.problems == {"no_picture": len(expected), **Counter(expected.values())}
    plain, found = contents(fashion.plain), contents(catalog)
    assert {item for item in plain if found[item] == plain[item]} == plain.keys() - expected.keys()
    assert set(internet.connected) == {PUBLIC} and {"169.254.169.254", "10.0.0.8", "intranet.test"} <= set(internet.resolved)

    lost = [row for row in rows if row["item_id"] in expected]
    server.healed = True
    server.asked.clear()
    again = fashion.read(tmp_path / "again", **keys, picture_cache=tmp_path / "pictures")
    assert contents(again) == plain and not again.problems and sids(again, tmp_path) == fashion.sids
    assert sorted(server.asked) == sorted(row["image"].removeprefix("http://shop.test") for row in lost), (
        "only failures are asked for again"
    )
    server.server.shutdown()
    server.server.server_close()
