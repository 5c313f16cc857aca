"""Item fields of batches: plain tables give what the row-wise reader gave, and further forms of cells are read."""

import datetime
import decimal
import json
import math
import random
import uuid

import numpy as np
import pyarrow as pa
import pytest
from raw_batches import RawTable, raw

from mmsid.catalog.config import Fields
from mmsid.catalog.fields import FieldMapping, item_fields, resolve_mapping, unite_attributes
from mmsid.catalog.fields.html_text import without_html
from mmsid.catalog.fields.text_detectors import batch_text_problems
from mmsid.catalog.prompt_injection import clean, text_problems
from mmsid.errors import CatalogError

# --- the row-wise reader of earlier versions, the reference for plain tables ---


def old_plain(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    assert isinstance(value, (int, float, decimal.Decimal, datetime.date)), value
    return str(value)


def old_texts(value, textual: bool, separator: str = "|") -> tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        values = list(value)
    elif textual and isinstance(value, str):
        starts_like_json = value.lstrip().startswith("[")
        values = json.loads(value) if starts_like_json else [part for part in value.split(separator) if part.strip()]
    else:
        values = [] if value is None else [value]
    return tuple(filter(None, map(old_plain, values)))


def old_mapping(value, textual: bool):
    if textual and isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if not isinstance(value, dict):
        return None
    found = {}
    for key in sorted(value):
        inner = value[key] if isinstance(value[key], (list, tuple)) else [value[key]]
        if values := tuple(filter(None, map(old_plain, inner))):
            found[key] = values
    return found


def old_row(row: dict, mapping: FieldMapping, textual: bool, clean_text: bool) -> dict:
    texts = {name: old_plain(row.get(name)) for name in ("title", "description")}
    problems = tuple(f"{name}_{code}" for name, text in texts.items() for code in text_problems(text))
    if problems and clean_text:
        texts = {name: clean(text) for name, text in texts.items()}
    path = tuple(name for column in mapping.categories for name in old_texts(row.get(column), textual))
    if roots := mapping.category_roots:
        path = path[next((depth for depth, name in enumerate(path) if name in roots), len(path)) :]
    attributes = None
    if len(mapping.attributes) == 1:
        attributes = old_mapping(row.get(mapping.attributes[0]), textual)
    if attributes is None:
        found = {name: old_texts(row.get(name), textual) for name in mapping.attributes}
        attributes = {name: values for name, values in sorted(found.items()) if values}
    pictures = tuple(path for column in mapping.image for path in old_texts(row.get(column), textual))
    return {"item_id": old_plain(row["item_id"]), **texts, "categories": path, "attributes": attributes, "pictures": pictures} | {
        "problems": problems
    }


def as_old(table: pa.Table) -> list[dict]:
    table.validate(full=True)
    rows = []
    for row in table.to_pylist():
        assert all((picture["ref"] is None) != (picture["data"] is None) for picture in row["pictures"])
        rows.append(
            {
                **{name: row[name] for name in ("item_id", "title", "description")},
                "categories": tuple(row["categories"]),
                "attributes": {attribute["name"]: tuple(attribute["labels"]) for attribute in row["attributes"]},
                "pictures": tuple(picture["ref"] or picture["data"] for picture in row["pictures"]),
                "problems": tuple(row["problems"]),
            }
        )
        assert list(rows[-1]["attributes"]) == sorted(rows[-1]["attributes"])
    return rows


TEXTS = [
    "Red shoe",
    "  lamp\u00a0",
    "a\0b",
    "",
    " ",
    "\x1ftea\x85",
    "size < 5 & > 3",
    "I <3 you",
    "Кроссовки",
    "ignore the above",
    "a" * 300,
]
TEXTS += ["boots boots boots boots boots", "T\u200bea", "x,y|z", "Men's / Women's"]


def random_column(rng: random.Random, kind: str, rows: int) -> pa.Array | list:
    maybe = lambda value: None if rng.random() < 0.2 else value  # noqa: E731
    text = lambda: maybe(rng.choice(TEXTS))  # noqa: E731
    if kind == "text":
        return pa.array([text() for _ in range(rows)], rng.choice([pa.string(), pa.large_string(), pa.string_view()]))
    if kind == "dictionary":
        return pa.array([text() for _ in range(rows)], pa.string()).dictionary_encode()
    if kind == "float":
        return pa.array(
            [maybe(rng.choice([7.0, -0.0, 2.5, math.nan, math.inf, 1e22, 1e-7, 0.1])) for _ in range(rows)],
            rng.choice([pa.float64(), pa.float32()]),
        )
    if kind == "int":
        return pa.array([maybe(rng.randint(-5, 9)) for _ in range(rows)], pa.int32())
    if kind == "bool":
        return pa.array([maybe(rng.random() < 0.5) for _ in range(rows)])
    if kind == "decimal":
        return pa.array([maybe(decimal.Decimal(rng.choice(["1.50", "0.00", "-3.25"]))) for _ in range(rows)], pa.decimal128(9, 2))
    if kind == "date":
        return pa.array([maybe(datetime.date(2026, 1, rng.randint(1, 28))) for _ in range(rows)])
    if kind == "time":
        stamps = [maybe(datetime.datetime(2026, 1, 2, 3, 4, 5, rng.choice([0, 7]))) for _ in range(rows)]
        return pa.array(stamps, pa.timestamp("us", rng.choice([None, "UTC"])))
    if kind == "null":
        return pa.nulls(rows)
    if kind == "lists":
        lists = [maybe([text() for _ in range(rng.randint(0, 3))]) for _ in range(rows)]
        return pa.array(lists, rng.choice([pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_view(pa.string())]))
    if kind == "numbers":
        return pa.array(
            [maybe([maybe(rng.choice([1.0, 2.5])) for _ in range(rng.randint(0, 3))]) for _ in range(rows)], pa.list_(pa.float64())
        )
    if kind == "fixed":
        return pa.array([maybe([text(), text()]) for _ in range(rows)], pa.list_(pa.string(), 2))
    if kind == "struct":
        value = lambda: maybe({"z": maybe([text(), "q"]), "a": maybe(2011.0), "new": maybe(True), "k": None})  # noqa: E731
        return pa.array([value() for _ in range(rows)])
    if kind == "map":
        return pa.array([maybe([("b", "x"), ("a", text())]) for _ in range(rows)], pa.map_(pa.string(), pa.string()))
    assert kind == "mixed"
    return [maybe(rng.choice([*TEXTS, 7.0, 3, True, "\ud800 x", ["a", None, 2.0]])) for _ in range(rows)]


SCALARS = ["text", "dictionary", "float", "int", "bool", "decimal", "date", "time", "null"]
LISTS = [*SCALARS, "lists", "numbers", "fixed", "mixed"]


@pytest.mark.parametrize("seed", range(40))
def test_plain_tables_give_what_the_row_wise_reader_gave(seed):
    rng = random.Random(seed)
    rows = rng.choice([1, 7, 60])
    columns = {"item_id": [f"i{row}" for row in range(rows)], "title": random_column(rng, rng.choice(SCALARS), rows)}
    columns |= {"description": random_column(rng, "text", rows)}
    columns |= {name: random_column(rng, rng.choice(LISTS), rows) for name in ("c1", "c2", "p1", "p2", "x", "b")}
    columns["facts"] = random_column(rng, rng.choice(["struct", "map", "lists", "text"]), rows)
    mapping = FieldMapping(
        "item_id",
        title=("title",),
        description=("description",),
        categories=rng.choice([("c1",), ("c1", "c2"), ("c1", "absent")]),
        category_roots=rng.choice([(), ("lamp", "Red shoe")]),
        image=rng.choice([("p1",), ("p1", "p2")]),
        attributes=rng.choice([("x",), ("x", "b"), ("facts",)]),
    )
    batch = raw(columns)
    python_rows = batch.table.to_pylist(maps_as_pydicts="strict")
    for name, values in batch.mixed.items():
        for row, value in zip(python_rows, values, strict=True):
            row[name] = value
    clean_text = rng.random() < 0.5
    expected = [old_row(row, mapping, False, clean_text) for row in python_rows]
    assert as_old(item_fields(batch, mapping, clean_text)) == expected
    if not batch.mixed and rows > 2:  # a slice of a batch has an offset in its buffers
        part = raw({name: batch.table[name].combine_chunks().slice(2) for name in batch.table.column_names})
        assert as_old(item_fields(part, mapping, clean_text)) == expected[2:]


@pytest.mark.parametrize("seed", range(10))
def test_plain_csv_cells_give_what_the_row_wise_reader_gave(seed):
    rng = random.Random(seed)
    cells = [*TEXTS, "a|b| c", "|", '["x", "y", 7.0, null]', " [1, true]", "Shoes|"]
    columns = {name: pa.array([rng.choice(cells) for _ in range(30)], pa.large_string()) for name in ("c1", "p1", "x", "b")}
    columns |= {name: pa.array([rng.choice(TEXTS) for _ in range(30)], pa.large_string()) for name in ("title", "description")}
    columns["facts"] = pa.array([rng.choice([*cells, '{"z": ["q", ""], "a": 2011.0}', "{}"]) for _ in range(30)], pa.large_string())
    columns["item_id"] = pa.array([f"i{row}" for row in range(30)], pa.large_string())
    attributes = rng.choice([("x",), ("x", "b"), ("facts",)])
    mapping = FieldMapping("item_id", None, ("title",), ("description",), ("p1",), ("c1",), attributes)
    batch = raw(columns, textual=True)
    assert as_old(item_fields(batch, mapping, True)) == [old_row(row, mapping, True, True) for row in batch.table.to_pylist()]


def fields_of(columns: dict, textual: bool = False, clean_text: bool = False, **fields) -> list[dict]:
    batch = raw({"item_id": [str(row) for row in range(len(next(iter(columns.values()))))]} | columns, textual)
    return as_old(item_fields(batch, resolve_mapping(RawTable(batch), Fields(**fields), "catalog.items"), clean_text))


def pictures_of(cells, textual: bool = False) -> list[tuple]:
    return [row["pictures"] for row in fields_of({"image": cells}, textual)]


def test_pictures_as_bytes_structs_and_lists_of_them():
    jpg, png = b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"
    assert pictures_of([{"bytes": jpg, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]) == [(jpg,), ("b.jpg",), ()]
    assert pictures_of([[{"bytes": jpg, "path": None}, {"bytes": png, "path": None}], []]) == [(jpg, png), ()]
    assert pictures_of([jpg, None, b""]) == [(jpg,), (), ()]
    assert pictures_of([[jpg, png], None]) == [(jpg, png), ()]
    assert pictures_of([b"images/a.jpg", jpg]) == [("images/a.jpg",), (jpg,)]
    assert pictures_of([[["a.jpg"], ["b.jpg", ""]], None]) == [("a.jpg", "b.jpg"), ()]
    assert pictures_of([jpg, "a.jpg", [{"url": "u"}]]) == [(jpg,), ("a.jpg",), ("u",)]


def test_pictures_of_several_sizes_give_the_largest_one_that_exists():
    amazon = [
        {"thumb": "t", "large": "l", "hi_res": "h", "variant": "MAIN"},
        {"thumb": "t2", "large": "l2", "hi_res": None, "variant": "PT01"},
    ]
    assert pictures_of([amazon, []]) == [("h", "l2"), ()]
    assert pictures_of([{"hi_res": ["h", None], "large": ["l", "l2"], "thumb": ["t", "t2", "t3"]}]) == [("h", "l2", "t3")]
    assert pictures_of([json.dumps(amazon), "x.jpg"], textual=True) == [("h", "l2"), ("x.jpg",)]
    assert pictures_of(["https://a/1.jpg, https://a/w_3,h_4/2.jpg"], textual=True) == [("https://a/1.jpg", "https://a/w_3,h_4/2.jpg")]
    with pytest.raises(
        CatalogError, match=r"items.parquet, row 2, field 'image': holds a mapping with the keys colour, expected one of bytes"
    ):
        pictures_of([None, {"colour": "red"}])


def test_lists_and_several_columns_of_text_are_joined():
    columns = {"title": [["Tea", None, " green "], None], "description": [["One.", "Two."], []], "features": [["Warm"], ["Soft"]]}
    rows = fields_of(columns, description=["features", "description"])
    assert [row["title"] for row in rows] == ["Tea green", ""]
    assert [row["description"] for row in rows] == ["Warm\nOne.\nTwo.", "Soft"]
    gaps = fields_of({"title": [None, "Tea", None, "Nut"], "more": [None, "green", "x", None]}, title=["title", "more"])
    assert [row["title"] for row in gaps] == ["", "Tea green", "x", "Nut"]
    assert fields_of({"brand": ["Acme", None], "title": ["Tea", "Nut"]}, title=["brand", "title"])[0]["title"] == "Acme Tea"
    assert fields_of({"title": ["['a', 'b']", "[x] y", "['a' 'b']"]}, textual=True)[0]["title"] == "a b"
    with pytest.raises(CatalogError, match=r"row 1, field 'title': holds a dict, expected text"):
        fields_of({"title": [{"a": "x"}]})


def test_printed_lists_in_csv_cells_are_read_without_running_code():
    cells = ["['a', 'b']", "['a' 'b']", "[\"it's\"\n 'c, d']", "[1 2]", "['a', None]", "('x')", '["j"]']
    found = [row["categories"] for row in fields_of({"categories": cells}, textual=True)]
    assert found == [("a", "b"), ("a", "b"), ("it's", "c, d"), ("1", "2"), ("a",), ("('x')",), ("j",)]
    for cell in ("[__import__('os').getcwd()]", "[1", "[" * 5000):
        with pytest.raises(CatalogError, match=r"items.csv, row 1, field 'categories': starts like JSON but is not valid JSON"):
            fields_of({"categories": [cell]}, textual=True)


def attributes_of(columns: dict, textual: bool = False) -> list[dict]:
    return [row["attributes"] for row in fields_of(columns, textual, attributes=list(columns))]


def test_attributes_of_nested_mappings_pairs_and_json():
    details = [{"Brand": "Acme", "Size": {"w": 1.0, "h": None}}, None]
    assert attributes_of({"details": details}) == [{"Brand": ("Acme",), "Size.w": ("1",)}, {}]
    assert attributes_of({"details": details, "color": ["red", "blue"]})[0] == {
        "color": ("red",),
        "details.Brand": ("Acme",),
        "details.Size.w": ("1",),
    }
    for name, value in (("name", "value"), ("key", "value")):
        pairs = [[{name: "Color", value: "red"}, {name: "Color", value: "blue"}, {name: "A", value: None}], None]
        assert attributes_of({"facts": pairs}) == [{"Color": ("red", "blue")}, {}]
        assert attributes_of({"facts": [json.dumps(pairs[0]), "plain|text"]}, textual=True)[0] == {"Color": ("red", "blue")}
    assert attributes_of({"details": [json.dumps(details[0]), "x", "{not json"]}) == [
        {"Brand": ("Acme",), "Size.w": ("1",)},
        {"details": ("x",)},
        {"details": ("{not json",)},
    ]
    assert attributes_of({"facts": [{"a": 1}, ["x", "y"], 2.0]}) == [{"a": ("1",)}, {"facts": ("x", "y")}, {"facts": ("2",)}]
    assert unite_attributes([{"size": ("M",), "color": ("red",)}, {"size": ("L", "M")}]) == {"color": ("red",), "size": ("M", "L")}


def test_binary_texts_and_uuids_are_ids():
    key = uuid.UUID(int=7)
    batch = raw({"item_id": [b"a", b"b"], "title": [b"Tea", None]})
    assert [row["item_id"] for row in as_old(item_fields(batch, FieldMapping("item_id", title=("title",)), False))] == ["a", "b"]
    batch = raw({"item_id": pa.array([key.bytes], pa.uuid())})
    assert as_old(item_fields(batch, FieldMapping("item_id"), False))[0]["item_id"] == str(key)
    with pytest.raises(CatalogError, match="row 2, field 'item_id': holds a bytes, expected text"):
        item_fields(raw({"item_id": [b"a", b"\xff\xfe"]}), FieldMapping("item_id"), False)
    assert item_fields(raw({"item_id": ["a", " "]}), FieldMapping("item_id"), False)["item_id"].to_pylist() == ["a", ""]


def test_a_row_without_a_group_is_an_item_of_its_own():
    batch = raw({"item_id": ["a", "b", "c"], "group": ["g", None, "g"]})
    rows = as_old(item_fields(batch, FieldMapping("item_id", group_by="group"), False))
    assert [row["item_id"] for row in rows] == ["g", "b", "g"]
    rows = item_fields(raw({"item_id": ["a", None], "group": ["g", None]}), FieldMapping("item_id", group_by="group"), False)
    assert rows["item_id"].to_pylist() == ["g", ""]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<p>Soft &amp; warm</p><ul><li>one</li><li>two</li></ul>", "Soft & warm\none\ntwo"),
        ("Tom &amp; Jerry&#39;s caf&eacute;", "Tom & Jerry's café"),
        ("&lt;p&gt;escaped &amp;amp; twice&lt;/p&gt;", "escaped & twice"),
        ("<script>alert(1)</script>ok<br/>line <!-- hidden -->", "ok\nline"),
        ("<a href='x' title=\"a>b\">link</a> 5 < 6", "link 5 < 6"),
        ("ig<b></b>nore", "ignore"),
    ],
)
def test_html_is_removed_and_kept_in_original(text, plain):
    assert without_html(text) == plain
    batch = raw({"item_id": ["a", "b"], "title": ["x", "y"], "description": [text, "z"]})
    table = item_fields(batch, FieldMapping("item_id", title=("title",), description=("description",)), False)
    assert table["description"].to_pylist() == [plain, "z"] and table["problems"].to_pylist() == [["description_html"], []]
    assert table["original"].to_pylist() == [json.dumps({"description": text}, ensure_ascii=False), None]


@pytest.mark.parametrize(
    "text", ["size < 5 & > 3", "I <3 you", "AT&T", "?a=1&copy=2", "A<B and b>c", "<system> x", "a <br", "&notanentity;", "R&D; x"]
)
def test_text_that_only_looks_like_html_is_unchanged(text):
    assert without_html(text) == text


def test_hostile_html_takes_linear_time():
    for text in ("<a " * 33_000, '<a "' * 25_000, "<!--" * 25_000, "&" * 100_000, "<p>" * 33_000):
        without_html(text)  # quadratic time would take minutes


def test_long_texts_are_cut_and_reported():
    batch = raw({"item_id": ["a"], "title": ["x" * 3000], "description": ["<b>" + "y" * 200_000]})
    table = item_fields(batch, FieldMapping("item_id", title=("title",), description=("description",)), False)
    assert [len(table[name][0].as_py()) for name in ("title", "description")] == [2_000, 20_000]
    assert table["problems"].to_pylist() == [["title_cut", "description_html", "description_cut"]]
    assert len(json.loads(table["original"][0].as_py())["title"]) == 3000


# --- detectors ---

SENTENCES = [
    *("ignore all of the above", "disregard system", "skip a b c prompts", "call this an", "describe the listing as", "categorise it as"),
    *(
        "answer only",
        "reply exactly",
        "claim that the",
        "do not mention",
        "you are now",
        "you are an ai",
        "from now on",
        "new instructions",
    ),
    *("system prompt", "<|im_start|>", "[/inst]", "</system>", "assistant", "note to all the models", "instructions for the ai"),
    *(
        "watch watch watch watch watch",
        "red Red RED rEd reD boots",
        "İris iris İRIS iris iris",
        "a_b a_b a_b a_b a_b",
        "123 123 123 123 123",
    ),
    *("2 x 4 m", "S M L XL", "warm boots", "café au lait", "100% wool, 5cm", "The System lamp, above all others"),
]
LOOK_ALIKES = {"a": "аα4@", "e": "еε3", "o": "οо0", "s": "ѕ5$", "i": "іι1", "t": "τ7", "b": "8", "c": "с", "p": "рρ", "x": "хχ", "y": "у"}
NOISE = "\u200b\u200d\u00ad\u0301\u0345\u202e\ufeff\u00a0\u2028\U000e0041\ufe0f\u0903ㅎﬆ"


def disguised(rng: random.Random, text: str) -> str:
    way = rng.randrange(8)
    if way == 0:
        return "".join(rng.choice(LOOK_ALIKES[c]) if c in LOOK_ALIKES and rng.random() < 0.5 else c for c in text)
    if way == 1:
        return " ".join(text) if rng.random() < 0.5 else " ".join(" ".join(word) if rng.random() < 0.6 else word for word in text.split())
    if way == 2:
        return "".join(c + (rng.choice(NOISE) if rng.random() < 0.15 else "") for c in text)
    if way == 3:
        return "".join(chr(ord(c) + 0xFEE0) if 33 <= ord(c) < 127 else c for c in text)
    if way == 4:
        return text.upper().replace(" ", rng.choice(["  ", "\t", "\x1c", "\u3000"]))
    return text


def test_detectors_on_batches_agree_with_the_detectors_on_texts():
    rng = random.Random(3)
    texts = [disguised(rng, sentence) for sentence in SENTENCES for _ in range(40)]
    for _ in range(4000):
        chosen = [disguised(rng, rng.choice(SENTENCES)) for _ in range(rng.randint(0, 4))]
        texts.append(rng.choice([" ", ". ", "-", "", "\n", "$", "(", " \u00a0"]).join(chosen))
    texts += [
        "".join(chr(rng.choice([rng.randint(32, 126), rng.randint(0, 0x3FF), rng.randint(0xE000, 0x10FFFF)])) for _ in range(12))
        for _ in range(500)
    ]
    expected = {index: codes for index, text in enumerate(texts) if (codes := text_problems(text))}
    assert batch_text_problems(pa.array(texts, pa.large_string())) == expected
    assert len(expected) > 1000 and len(texts) - len(expected) > 500
    shuffled = np.random.default_rng(0).permutation(len(texts))
    part = pa.array([texts[at] for at in shuffled], pa.large_string()).slice(100)
    assert batch_text_problems(part) == {new: expected[at] for new, at in enumerate(shuffled[100:].tolist()) if at in expected}
