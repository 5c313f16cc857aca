"""What people bring as a catalogue: each form of one small shop is read to the same items, pictures and histories as its plain form."""

import datetime
import gzip
import json
from pathlib import Path
from xml.sax.saxutils import escape

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_shop import EVENTS, ITEMS, PICTURES, START, USERS, delimited, facts, problems, write

FORMS = {}


def form(name, notes=(), found=(), not_read=(), same_times=True, **plain):
    """Register a form: a function that writes the shop into a folder and returns the keys that read it.

    Args:
        notes: texts that occur in the notes of the reading.
        found: problems of the reading, as (code, count).
        not_read: columns of the items that no field reads.
        same_times: the times are whole numbers, as in the plain form; otherwise they are equal, but floating-point numbers.
        plain: arguments of `Shop.plain`, the reading that this one equals.
    """

    def register(function):
        expected = ([notes] if isinstance(notes, str) else notes, dict(found), tuple(not_read), same_times)
        FORMS[name] = (function, *expected, plain)
        return function

    return register


def changed(shop, **changes) -> list[dict]:
    """Rows of the shop with new values: column -> function of the row. None removes the column."""
    rows = [row | {name: change(row) for name, change in changes.items() if change} for row in shop.rows]
    return [{name: value for name, value in row.items() if changes.get(name, True)} for row in rows]


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


# Rows of Hugging Face datasets


def dataset(shop) -> datasets.Dataset:
    text = datasets.Value("string")
    kinds = {name: text for name in ("item_id", "title", "description", "brand", "color")}
    kinds |= {"image": datasets.List(datasets.Image()), "categories": datasets.List(text)}
    rows = changed(shop, image=lambda row: [{"bytes": shop.picture(name), "path": Path(name).name} for name in row["image"]])
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))


@form("datasets: parquet with structs of bytes and path")
def _(shop, folder):
    dataset(shop).to_parquet(folder / "train.parquet")
    return {"items": folder / "train.parquet"}


@form("datasets: one picture per row, some without bytes", images=1)
def _(shop, folder):
    def image(row):
        name = next(iter(row["image"]), None)
        return name and {"bytes": None if row["item_id"] == "ad3" else shop.picture(name), "path": name}

    return {"items": write(folder / "train.parquet", changed(shop, image=image))}


@form("datasets: folder of save_to_disk", notes="a saved data set")
def _(shop, folder):
    dataset(shop).save_to_disk(folder / "saved", num_shards=2)
    return {"items": folder / "saved"}


@form("datasets: folder of save_to_disk with splits", notes="all splits: train, test")
def _(shop, folder):
    whole = dataset(shop)
    datasets.DatasetDict({"train": whole.select(range(15)), "test": whole.select(range(15, ITEMS))}).save_to_disk(folder / "saved")
    return {"items": folder / "saved"}


@form("datasets: hub id", notes="hf:shop/ads: all splits: train")
def _(shop, folder):
    return {"items": "hf:shop/ads"}  # `hub` answers


@pytest.fixture
def hub(monkeypatch, drawn_shop):
    def load_dataset(name, *, split, streaming):
        assert name == "shop/ads"
        return datasets.DatasetDict({"train": dataset(drawn_shop)}) if split is None else dataset(drawn_shop)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


# Pictures in cells


@form("pictures: lists of bytes")
def _(shop, folder):
    return {"items": write(folder / "items.parquet", changed(shop, image=lambda row: [shop.picture(name) for name in row["image"]]))}


@form("pictures: a bytes column", images=1)
def _(shop, folder):
    rows = changed(shop, image=lambda row: next((shop.picture(name) for name in row["image"]), None))
    return {"items": write(folder / "items.parquet", rows)}


@form("pictures: base64 text in jsonl")
def _(shop, folder):
    rows = changed(shop, image=lambda row: [shop.base64(name) for name in row["image"]])
    return {"items": write(folder / "items.jsonl", json_lines(rows))}


@form("pictures: base64 text in csv")
def _(shop, folder):
    rows = changed(shop, image=lambda row: [shop.base64(name) for name in row["image"]])
    return {"items": write(folder / "items.csv", delimited(rows))}


@form("pictures: data URLs")
def _(shop, folder):
    rows = changed(shop, image=lambda row: [f"data:image/png;base64,{shop.base64(name)}" for name in row["image"]])
    return {"items": write(folder / "items.csv", delimited(rows))}


@form("pictures: http URLs")
def _(shop, folder, server):
    rows = changed(shop, image=lambda row: [f"{server.url}/{name}" for name in row["image"]])
    return {"items": write(folder / "items.parquet", rows), "pictures": {"allow_private_hosts": True}}


@form("pictures: URLs of an object store")
def _(shop, folder):
    for name in (name for row in shop.rows for name in row["image"]):
        fsspec.filesystem("memory").pipe(f"/shop/{name}", shop.picture(name))
    rows = changed(shop, image=lambda row: [f"memory://shop/{name}" for name in row["image"]])
    return {"items": write(folder / "items.csv", delimited(rows))}


@form("pictures: Windows paths")
def _(shop, folder):
    rows = changed(shop, image=lambda row: [name.replace("/", "\\") for name in row["image"]])
    return {"items": write(folder / "items.csv", delimited(rows))}


# Logs


@form("events: one row per event", notes="seconds since 1970")
def _(shop, folder):
    return {"events": write(folder / "log.parquet", shop.events())}


@form("events: types that are filtered", found=[("event_of_weight_zero", USERS)])
def _(shop, folder):
    views = [{"user_id": user["user_id"], "item_id": "ad0", "timestamp": START, "event_type": "view"} for user in shop.users]
    rows = [*views, *(event | {"event_type": "buy"} for event in shop.events())]
    return {"events": write(folder / "log.csv", delimited(rows)), "event_types": {"buy": 1, "view": 0}}


@form("events: a weight column", found=[("event_of_weight_zero", USERS)])
def _(shop, folder):
    ignored = [{"user_id": user["user_id"], "item_id": "ad0", "timestamp": START, "weight": 0.0} for user in shop.users]
    return {"events": write(folder / "log.parquet", [*ignored, *(event | {"weight": 1.0} for event in shop.events())])}


@form("events: several files of several formats")
def _(shop, folder):
    events = shop.events()
    parts = [
        write(folder / "a.csv.gz", gzip.compress(delimited(events[:20]).encode())),
        write(folder / "b.jsonl", json_lines(events[20:50])),
    ]
    return {"events": [*parts, write(folder / "c.parquet", events[50:])]}


@form("events: a folder of parts", notes="3 .csv files")
def _(shop, folder):
    for part in range(3):
        write(folder / "log" / f"part-{part}.csv", delimited(shop.events()[part::3]))
    return {"events": folder / "log"}


@form("events: other names of the columns", notes="'customerId'")
def _(shop, folder):
    names = {"user_id": "customerId", "item_id": "productId", "timestamp": "ts"}
    return {"events": write(folder / "log.csv", delimited([{names[key]: row[key] for key in row} for row in shop.events()]))}


def instant(zone=datetime.UTC):
    return lambda time: datetime.datetime.fromtimestamp(time, zone)


TIMES = {
    "milliseconds": (lambda time: 1_000 * time, "milliseconds since 1970"),
    "microseconds": (lambda time: 1_000_000 * time, "microseconds since 1970"),
    "nanoseconds": (lambda time: 1_000_000_000 * time, "nanoseconds since 1970"),
    "decimals": (float, "seconds since 1970"),
    "ISO text": (lambda time: instant()(time).strftime("%Y-%m-%d %H:%M:%S"), ""),
    "ISO text with Z": (lambda time: instant()(time).strftime("%Y-%m-%dT%H:%M:%SZ"), ""),
    "ISO text with a zone": (lambda time: instant(datetime.timezone(datetime.timedelta(hours=5, minutes=30)))(time).isoformat(), ""),
    "timestamps": (lambda time: instant()(time).replace(tzinfo=None), ""),
    "timestamps with a zone": (instant(datetime.timezone(datetime.timedelta(hours=-3))), ""),
}
for _name, (_spell, _note) in TIMES.items():

    @form(f"times: {_name}", notes=_note, same_times=bool(_note) and _name != "decimals")
    def _(shop, folder, spell=_spell):
        return {"events": write(folder / "log.parquet", [row | {"timestamp": spell(row["timestamp"])} for row in shop.events()])}


@form("users: one user in two rows", notes="12 users have several rows; these are merged by time", found=[("user_in_several_rows", USERS)])
def _(shop, folder):
    halves = [{name: value if name == "user_id" else value[cut] for name, value in user.items()}
              for cut in (slice(2, None), slice(2)) for user in shop.users]  # fmt: skip
    return {"sequences": write(folder / "users.parquet", halves)}


@form("users: one user in two files", notes="merged by time", found=[("user_in_several_rows", USERS)])
def _(shop, folder):
    for part, cut in enumerate((slice(3, None), slice(3))):
        rows = [user | {"items": user["items"][cut], "timestamps": user["timestamps"][cut]} for user in shop.users]
        write(folder / "users" / f"{part}.parquet", rows)
    return {"sequences": folder / "users"}


@form("users: unknown items", found=[("unknown_item", USERS), ("user_without_items", 1)])
def _(shop, folder):
    rows = [user | {"items": ["gone", *user["items"]], "timestamps": [START, *user["timestamps"]]} for user in shop.users]
    unknown = {"user_id": "nobody", "items": [], "timestamps": []}
    return {"sequences": write(folder / "users.parquet", [*rows, unknown])}


# Categories


for _mark in (" > ", "/", "|", " » ", ">"):

    @form(f"categories: written with {_mark.strip()!r}{'' if _mark.strip() == _mark else ' between blanks'}",
          notes=f"holds category paths separated by {_mark.strip()!r}, for example")  # fmt: skip
    def _(shop, folder, mark=_mark):
        rows = changed(shop, categories=lambda row: mark.join(row["categories"]))
        return {"items": write(folder / "items.parquet", rows)}


@form("categories: a separator of one's own")
def _(shop, folder):
    rows = changed(shop, categories=lambda row: "::".join(row["categories"]))
    return {"items": write(folder / "items.parquet", rows), "fields": {"category_separator": "::"}}


# Feeds and exports of shops


def feed(shop, url) -> list[dict]:
    return [
        {
            "id": row["item_id"],
            "title": row["title"],
            "description": row["description"],
            "link": f"https://shop.example/{row['item_id']}",
            "image_link": next((f"{url}/{name}" for name in row["image"]), ""),
            "additional_image_link": ",".join(f"{url}/{name}" for name in row["image"][1:]),
            "price": "9.90 EUR",
            "brand": row["brand"],
            "color": row["color"],
            "product_type": " > ".join(row["categories"]),
            "item_group_id": "",
        }
        for row in shop.rows
    ]


def feed_keys(items, **fields) -> dict:
    return {"items": items, "pictures": {"allow_private_hosts": True}, "fields": {"attributes": None, **fields}}


@form("feed: Merchant Center tsv", notes="recognised as Google Merchant Center feed", not_read=["link", "price"])
def _(shop, folder, server):
    return feed_keys(write(folder / "feed.tsv", delimited(feed(shop, server.url), "\t")))


@form("feed: Merchant Center csv with spaces in its header", notes="recognised as Google Merchant Center feed", not_read=["link", "price"])
def _(shop, folder, server):
    rows = [{name.replace("_", " "): value for name, value in row.items()} for row in feed(shop, server.url)]
    return feed_keys(write(folder / "feed.csv", delimited(rows)))


@form("feed: Merchant Center xml", notes="recognised as Google Merchant Center feed", not_read=["link", "price"])
def _(shop, folder, server):
    def entry(row):
        fields = {name: value for name, value in row.items() if name != "additional_image_link"}
        more = [("additional_image_link", url) for url in row["additional_image_link"].split(",") if url]
        return "".join(f"<g:{name}>{escape(value)}</g:{name}>" for name, value in [*fields.items(), *more] if value)

    body = "".join(f"<item>{entry(row)}</item>" for row in feed(shop, server.url))
    text = f'<?xml version="1.0"?><rss version="2.0" xmlns:g="http://base.google.com/ns/1.0"><channel><title>Shop</title>{body}</channel></rss>'
    return feed_keys(write(folder / "feed.xml", text))


@form("feed: Meta catalogue csv", notes="recognised as Meta catalogue", not_read=["link", "price", "fb_product_category", "availability"])
def _(shop, folder, server):
    rows = [row | {"fb_product_category": "", "availability": "in stock"} for row in feed(shop, server.url)]
    return feed_keys(write(folder / "feed.csv", delimited(rows)))


@form(
    "export: Shopify products",
    notes="recognised as Shopify product export",
    not_read=["Vendor", "Option1 Name", "Option1 Value", "Variant SKU"],
    found=[("description_html", ITEMS)],
    attributes=(),
    images=1,
)
def _(shop, folder, server):
    rows = [
        {
            "Handle": row["item_id"],
            "Title": row["title"],
            "Body (HTML)": f"<p>{row['description']}</p>",
            "Vendor": row["brand"],
            "Product Category": " > ".join(row["categories"]),
            "Option1 Name": "Color",
            "Option1 Value": row["color"],
            "Variant SKU": f"sku-{row['item_id']}",
            "Image Src": f"{server.url}/{row['image'][0]}" if row["image"] else "",
        }
        for row in shop.rows
    ]
    return feed_keys(write(folder / "products_export.csv", delimited(rows)), attributes=[])


# Files


def packed_csv(rows) -> bytes:
    return delimited(rows).encode()


FILES = {
    "items.tsv": lambda rows: delimited(rows, "\t").encode(),
    "items.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "items.jsonl.gz": lambda rows: gzip.compress(json_lines(rows).encode()),
    "items.csv.gz": lambda rows: gzip.compress(packed_csv(rows)),
    "items.csv.zst": lambda rows: zstd(packed_csv(rows)),
    "items.jsonl.zst": lambda rows: zstd(json_lines(rows).encode()),
    "semicolons.csv": lambda rows: delimited(rows, ";").encode(),
    "tabs.csv": lambda rows: delimited(rows, "\t").encode(),
    "byte_order_mark.csv": lambda rows: delimited(rows, ";").encode("utf-8-sig"),
    "unicode.txt": lambda rows: delimited(rows, "\t").encode("utf-16"),
}
SNIFFED = {
    "semicolons.csv": "separator ';'",
    "tabs.csv": "separator '\\t'",
    "byte_order_mark.csv": "separator ';'",
    "unicode.txt": "encoding utf-16",
}
for _name, _pack in FILES.items():

    @form(f"file: {_name}", notes=SNIFFED.get(_name, ()))
    def _(shop, folder, name=_name, pack=_pack):
        return {"items": write(folder / name, pack(shop.rows))}


@form("files: a folder of parquet parts", notes="4 .parquet files; not read: README.txt")
def _(shop, folder):
    for part in range(4):
        write(folder / "items" / f"part-{part}.parquet", shop.rows[part::4])
    write(folder / "items" / "README.txt", "notes")
    return {"items": folder / "items"}


@form("files: a folder of csv parts below folders", notes="2 .csv files")
def _(shop, folder):
    for part, name in enumerate(("de", "fr")):
        write(folder / "items" / f"country={name}" / "part.csv", delimited(shop.rows[part::2]))
    return {"items": folder / "items"}


@form("files: several patterns", notes="2 files")
def _(shop, folder):
    for part in range(4):
        write(folder / ("old" if part < 2 else "new") / f"{part}.csv.gz", gzip.compress(packed_csv(shop.rows[part::4])))
    return {"items": [str(folder / "old" / "*.csv.gz"), str(folder / "new" / "?.csv*")]}


# Types of columns


@form("types: dictionary, large_string, null and nested columns")
def _(shop, folder):
    table = pq.read_table(shop.folder / "items.parquet")
    new = {name: table[name].dictionary_encode() for name in ("brand", "color")}
    new |= {name: table[name].cast(pa.large_string()) for name in ("item_id", "title")}
    new["image"] = table["image"].cast(pa.large_list(pa.large_string()))
    new["categories"] = pa.array([[path] for path in table["categories"].to_pylist()])
    columns = {name: new.get(name, table[name]) for name in table.column_names} | {"empty": pa.nulls(ITEMS)}
    return {"items": write(folder / "items.parquet", pa.table(columns)), "fields": {"attributes": ["brand", "color", "empty"]}}


@form("types: a mapping of attributes")
def _(shop, folder):
    rows = changed(shop, facts=lambda row: {"brand": row["brand"], "color": row["color"]}, brand=None, color=None)
    return {"items": write(folder / "items.parquet", rows), "fields": {"attributes": ["facts"]}}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", FORMS)
def test_form(drawn_shop, shop_server, hub, tmp_path, name):
    function, notes, found, not_read, same_times, plain = FORMS[name]
    wants_server = "server" in function.__code__.co_varnames[: function.__code__.co_argcount]
    given = function(drawn_shop, tmp_path, *([shop_server] if wants_server else []))
    catalog = drawn_shop.read(tmp_path, drawn_shop.keys(tmp_path, **given))
    assert facts(catalog, same_times) == facts(drawn_shop.plain(**plain), same_times)
    assert problems(catalog) == found and tuple(catalog.not_read) == not_read
    said = "\n".join(catalog.notes)
    assert all(note in said for note in notes), said
    assert all(path.is_file() for item in catalog.items for path in item.images)


def test_the_plain_reading(drawn_shop):
    found = facts(drawn_shop.plain())
    assert [found[name] for name in ("items", "pictures", "users", "interactions")] == [ITEMS, PICTURES, USERS, EVENTS]
    assert len(set(found["contents"].values())) == ITEMS and not problems(drawn_shop.plain())
