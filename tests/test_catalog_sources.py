"""Tables of every format give the same rows; what was detected is said; damaged files are refused with place and remedy."""

import bz2
import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.catalog.columns import read_columns
from mmsid.catalog.sources import Batch, literal_cell, open_table
from mmsid.catalog.sources import json_lines as json_lines_module
from mmsid.catalog.subset import write_items
from mmsid.catalog.tables import Cells, read_table_rows, table_kind, table_pieces
from mmsid.errors import CatalogError

ROWS = [
    {"item_id": "a1", "title": "Möbel, „groß“", "tags": "red|green", "price": "12.50"},
    {"item_id": "b2", "title": 'a 5" pipe; two lines\nhere', "tags": "", "price": "7"},
    {"item_id": "c3", "title": "плед | Ωmega", "tags": "x", "price": ""},
]
WESTERN = [row | {"title": row["title"].replace("плед | Ωmega", "crème brûlée – 5 €")} for row in ROWS]


def csv_text(rows, separator=",", end="\r\n", **options) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator=end, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def feather(rows) -> bytes:
    buffer = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def arrow_stream(rows) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


FORMATS = {
    "items.parquet": parquet(ROWS),
    "items.feather": feather(ROWS),
    "items.arrow": arrow_stream(ROWS),
    "items.jsonl": json_lines(ROWS).encode(),
    "items.ndjson": ("\ufeff" + json_lines(ROWS).replace("\n", "\r\n\r\n")).encode(),
    "items.json": json.dumps(ROWS, indent=1).encode(),
    "mapping.json": json.dumps({row["item_id"]: {key: row[key] for key in row if key != "item_id"} for row in ROWS}).encode(),
    "lines.json": json_lines(ROWS).encode(),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "items.csv": csv_text(ROWS).encode(),
    "semicolons.csv": csv_text(ROWS, ";", "\n").encode(),
    "pipes.csv": csv_text(ROWS, "|").encode(),
    "tabs.csv": csv_text(ROWS, "\t").encode(),
    "items.tsv": csv_text(ROWS, "\t").encode(),
    "items.txt": csv_text(ROWS, "\t", quoting=csv.QUOTE_ALL).encode(),
    "excel.csv": ("sep=;\r\n" + csv_text(ROWS, ";")).encode(),
    "spark.csv": csv_text(ROWS, doublequote=False, escapechar="\\").encode(),
    "spark.csv.txt": csv_text(ROWS, "|", doublequote=False, escapechar="\\").encode(),
    "bom.csv": csv_text(ROWS).encode("utf-8-sig"),
    "unicode.txt": csv_text(ROWS, "\t").encode("utf-16"),
    "big.tsv": csv_text(ROWS, "\t").encode("utf-16-be"),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(source, selected=("item_id", "title", "tags", "price"), **options) -> list[dict]:
    found = []
    for batch in open_table(source, config_key="catalog.items").batches(selected, **options):
        rows = batch.rows()
        assert len(rows) == len(batch) == len(batch.numbers)
        assert all(batch.values(name) == [row[name] for row in rows] for name in selected if batch.column(name) is not None)
        found += rows
    return found


def refusal(source, selected=("item_id", "title")) -> str:
    with pytest.raises(CatalogError) as caught:
        rows_of(source, selected)
    assert ";" in str(caught.value), "an error ends with its remedy"
    return str(caught.value)


# Formats


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [None, gzip.compress, zstd])
def test_every_format_gives_the_same_rows_plain_and_compressed_under_any_name(tmp_path, name, packed):
    suffix = "" if packed is None else ".gz" if packed is gzip.compress else ".zst"
    data = FORMATS[name] if packed is None else packed(FORMATS[name])
    path = write(tmp_path, name + suffix, data)
    assert rows_of(path) == ROWS
    assert rows_of(path, rows=1) == ROWS
    table = open_table(path, config_key="catalog.items")
    assert set(table.columns) == set(ROWS[0]) and table.num_rows in (3, None)
    assert [len(batch) for batch in table.batches(["absent"])] and rows_of(path, ["tags"]) == [{"tags": row["tags"]} for row in ROWS]
    assert not [note for note in table.notes if "by its content" in note or "compressed" in note]
    if packed is not None:
        hidden = write(tmp_path, name, data)  # without the suffix of the compression
        assert rows_of(hidden) == ROWS
        assert any("compressed with" in note for note in open_table(hidden, config_key="catalog.items").notes)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("items.csv", "items.parquet"),
        ("items.jsonl", "items.parquet"),
        ("items.parquet", "items.jsonl"),
        ("items.csv", "items.jsonl"),
        ("items.jsonl", "items.json"),
        ("items.tsv", "items.feather"),
        ("noname", "items.parquet"),
    ],
)
def test_content_under_another_name_is_read_by_its_first_bytes(tmp_path, name, written):
    path = write(tmp_path, name, FORMATS[written])
    assert rows_of(path) == ROWS
    assert table_kind(path, "catalog.items") == f".{ {'feather': 'arrow'}.get(written.split('.')[1], written.split('.')[1]) }"
    if not {name.split(".")[-1], written.split(".")[-1]} <= {"json", "jsonl"}:
        assert "by its content" in open_table(path, config_key="catalog.items").notes[0]


def test_several_members_of_gzip_and_bzip2_are_read(tmp_path):
    lines = json_lines(ROWS).encode().splitlines(keepends=True)
    assert rows_of(write(tmp_path, "a.jsonl.gz", b"".join(map(gzip.compress, lines)))) == ROWS
    assert rows_of(write(tmp_path, "a.csv.bz2", bz2.compress(FORMATS["items.csv"]))) == ROWS
    cut = gzip.compress(json_lines(ROWS * 50).encode())[:-20]
    assert "cut.jsonl.gz cannot be read (OSError: Truncated" in refusal(write(tmp_path, "cut.jsonl.gz", cut))


# Text


@pytest.mark.parametrize(
    ("encoding", "rows", "note"),
    [
        ("cp1252", WESTERN, "encoding windows-1252"),
        ("cp1251", [{"item_id": f"a{i}", "title": "Шерстяной плед для дома, тёплый и мягкий"} for i in range(30)], "1251"),
        ("gb18030", [{"item_id": f"a{i}", "title": "纯棉四件套床上用品被套床单枕套秋冬加厚保暖"} for i in range(30)], "gb"),
        ("utf-16", ROWS, "encoding utf-16"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_other_encodings_are_detected_and_reported(tmp_path, encoding, rows, note, kind):
    texts = {
        "csv": csv_text(rows, ";"),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
    }
    path = write(tmp_path, f"items.{kind}", texts[kind].encode(encoding))
    selected = list(rows[0])
    assert rows_of(path, selected) == rows
    notes = open_table(path, config_key="catalog.items").notes
    assert len(notes) == 1 and note in notes[0] and (kind != "csv" or "separator ';'" in notes[0])


@pytest.mark.parametrize("late", [False, True])
def test_bytes_that_cannot_be_decoded_name_row_column_and_encoding(tmp_path, late):
    start = 'item_id,title\na,"café\nau lait"\n' + ("b,crème\n" * 150_000 if late else "b,crème\n")
    row = 150_002 if late else 3
    message = refusal(write(tmp_path, "items.csv", start.encode() + b"c,br\xfbl\xe9e\n"))
    assert f"items.csv, row {row}, field 'title': 'br\N{REPLACEMENT CHARACTER}l" in message and "UTF-8" in message
    lines = '{"item_id": "é"}\n' * row
    message = refusal(write(tmp_path, "items.jsonl", lines.encode() + b'\n{"item_id": "x", "title": "br\xfbl"}\n'))
    assert f"items.jsonl, line {row + 2}, field 'title'" in message and "UTF-8" in message
    message = refusal(write(tmp_path, "items.json", '[{"item_id": "é"}, {"title": "'.encode() + b'br\xfbl"}]'))
    assert "items.json, row 2, field 'title'" in message and "UTF-8" in message
    half = "\ufeffitem_id\ttitle\na\té\n".encode("utf-16-le") + b"\x00\xd8"  # half of a surrogate pair
    assert "utf-16" in refusal(write(tmp_path, "items.tsv", half))


def test_a_backslash_before_a_quote_decides_wherever_it_is(tmp_path):
    rows = [{"item_id": f"i{i}", "title": "plain, text"} for i in range(20_000)] + [{"item_id": "z", "title": 'a 5" pipe, "new"'}]
    spark = write(tmp_path, "spark.csv", csv_text(rows, doublequote=False, escapechar="\\").encode())
    table = open_table(spark, config_key="catalog.items")
    assert rows_of(spark, ["item_id", "title"]) == rows and 'written \\"' in table.notes[0]
    folder = [{"item_id": "a", "title": "C:\\"}, {"item_id": "b", "title": 'x "y\\"'}]
    assert rows_of(write(tmp_path, "plain.csv", csv_text(folder, quoting=csv.QUOTE_ALL).encode()), ["item_id", "title"]) == folder


def test_very_long_first_lines_of_json_files_are_recognised(tmp_path):
    rows = [{"item_id": f"i{i}", "title": "x" * 100_000} for i in range(2)]
    assert rows_of(write(tmp_path, "lines.json", json_lines(rows).encode()), ["item_id", "title"]) == rows
    mapping = {row["item_id"]: row for row in rows}
    assert rows_of(write(tmp_path, "mapping.json", json.dumps(mapping).encode()), ["item_id", "title"]) == rows


def test_headers_are_stripped_and_doubled_columns_are_refused(tmp_path):
    rows = [{" item_id ": "a", "title\t": "x"}]
    for name, data in [("a.csv", csv_text(rows).encode()), ("a.jsonl", json_lines(rows).encode()), ("a.parquet", parquet(rows))]:
        path = write(tmp_path, name, data)
        assert open_table(path, config_key="catalog.items").columns == ("item_id", "title")
        assert rows_of(path, ["title", "item_id"]) == [{"title": "x", "item_id": "a"}]
    doubled = [{"item_id": "a", " item_id": "b"}]
    for name, data in [
        ("b.csv", csv_text(doubled).encode()),
        ("b.jsonl", json_lines(doubled).encode()),
        ("b.json", json.dumps(doubled).encode()),
        ("b.parquet", parquet(doubled)),
        ("b.feather", feather(doubled)),
    ]:
        message = refusal(write(tmp_path, name, data))
        assert f"{name}: column 'item_id' occurs twice" in message
    unnamed = write(tmp_path, "c.csv", b",item_id,\n0,a,\n1,b,\n")  # an index of pandas, and an empty column of a spreadsheet
    table = open_table(unnamed, config_key="catalog.items")
    assert table.columns == ("item_id",) and "2 columns without a name not read" in table.notes[0]
    assert rows_of(unnamed, ["item_id"]) == [{"item_id": "a"}, {"item_id": "b"}]


@pytest.mark.parametrize("quotes", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_texts_that_stand_for_nothing_are_missing_in_csv_and_counted(tmp_path, quotes):
    values = ["\\N", "NULL", "nan", "<NA>", "None", "none", "", "NA", "Nan Goldin"]
    path = write(tmp_path, "a.csv", csv_text([{"item_id": "x", "title": value} for value in values], quoting=quotes).encode())
    table = open_table(path, config_key="catalog.items")
    for _ in range(2):  # notes of a second reading replace those of the first
        found = [batch.values("title") for batch in table.batches(["title"])]
    assert [value for part in found for value in part] == [None] * 5 + values[5:]
    assert table.notes == [f"{path}: 5 cells hold <NA>, NULL, None, \\N, nan: missing"]
    kept = write(tmp_path, "a.jsonl", b'{"item_id": "x", "title": "None"}\n')
    assert rows_of(kept, ["title"]) == [{"title": "None"}]


def test_files_without_quotes_are_read_as_by_the_csv_module(tmp_path):
    lines = ["item_id,title,n"] + [f"i{i},word {i} é,{i}" for i in range(3000)]
    plain = write(tmp_path, "a.csv", ("\n".join(lines[:1500]) + "\r\n\r\n" + "\n".join(lines[1500:])).encode())
    quoted = write(tmp_path, "b.csv", (plain.read_text() + '\n"last","x",1\n').encode())
    assert rows_of(plain, ["n", "item_id"]) == rows_of(quoted, ["n", "item_id"])[:-1]
    assert rows_of(plain, ["n", "item_id"])[2999] == {"n": "2999", "item_id": "i2999"}
    declared = write(tmp_path, "d.csv", ("sep=,\n\n" + plain.read_text()).encode("utf-16"))
    legacy = write(tmp_path, "e.csv", ("sep=,\r\n" + plain.read_text()).encode("cp1252"))
    assert rows_of(declared, ["title"]) == rows_of(legacy, ["title"]) == rows_of(plain, ["title"])
    ragged = write(tmp_path, "c.csv", ("\n".join(lines) + "\nx,y\n").encode())
    assert "c.csv, row 3001: 2 cells, expected 3" in refusal(ragged)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("ragged.tsv", "item_id\ttitle\na\tx\nb\tx\ty\n", "row 2: 3 cells, expected 2; quote cells that contain tabs"),
        ("open.csv", 'item_id,title\na,x\nb,"y\n', "row 2: not valid csv"),
        ("swallowed.csv", 'item_id,title\na,"x\nb,"y"\nc,"z\nd,"v"\n', "row 1: not valid csv"),
        ("torn.jsonl", '{"item_id": "a"}\n\n{"item_id": "b"\n', "line 3: not valid JSON"),
        ("two.jsonl", '{"item_id": "a"}{"item_id": "b"}\n\n', "line 1: not valid JSON"),
        ("list.jsonl", '{"item_id": "a"}\n["b"]\n', "line 2: holds a list"),
        ("torn.json", '[{"item_id": "a"}, {"item_id": "b"', "row 2: not valid JSON"),
        ("end.json", '[{"item_id": "a"}] trailing', "row 1: not valid JSON"),
        ("value.json", '[{"item_id": "a"}, 7]', "row 2: holds a int"),
        ("scalar.json", '{\n"item_id": {"x": 1},\n"title": 7}', "row 2: holds a int"),
        ("empty.json", "[]", "holds no rows"),
        ("empty.csv", "", "holds no rows"),
        ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        ("page.csv", "<!DOCTYPE html>\n<html><body>login</body></html>", "web page"),
        ("torn.xml", "<rss><channel><item><id>1</id></item><item><id>", "after row 1: not valid XML"),
        ("other.xml", "<?xml version='1.0'?><products><product/></products>", "no <item>"),
        ("text.parquet", "item_id,title\n", "cannot be read as parquet"),
    ],
)
def test_damaged_files_are_refused_with_place_and_remedy(tmp_path, name, text, expected):
    message = refusal(write(tmp_path, name, text.encode()))
    assert expected in message and name in message


def test_workbooks_and_archives_are_refused_with_the_remedy(tmp_path):
    workbook = b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml xl/workbook.xml"
    for name, data in [("a.xlsx", workbook), ("a.csv", workbook), ("old.xls", b"\xd0\xcf\x11\xe0" + b"\0" * 99)]:
        assert "save the sheet as CSV" in refusal(write(tmp_path, name, data))
    assert "unpack it" in refusal(write(tmp_path, "a.zip", b"PK\x03\x04" + b"\0" * 99))


# JSON


def test_columns_of_several_types_are_python_values_and_others_stay_arrow(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines_module, "_BLOCK", 64)  # a block holds a few lines
    rows = [
        {"item_id": 7, "title": "2020-01-01", "price": 1},
        {"item_id": 8, "title": "x", "price": "1,5"},
        {"item_id": 9007199254740993, "title": None, "price": None},
        {"item_id": 18446744073709551617, "title": "\ud800", "price": [1]},
        {"item_id": 10, "title": "2021-01-01T00:00:00Z", "more": {"a": 1}},
        {"item_id": 11, "title": "y", "more": {"b": ["2022-01-01"]}, "ratio": 1.5},
        {"item_id": 12, "title": "z", "ratio": 9007199254740993},
    ]
    path = write(tmp_path, "a.jsonl", json_lines(rows).encode())
    table = open_table(path, config_key="catalog.items")
    assert table.columns == ("item_id", "title", "price", "more", "ratio") and table.num_rows == 7
    found = [row for batch in table.batches(table.columns) for row in batch.rows()]
    assert [row["item_id"] for row in found] == [row["item_id"] for row in rows]
    assert [row["title"] for row in found] == ["2020-01-01", "x", None, "?", "2021-01-01T00:00:00Z", "y", "z"]
    assert [row.get("price") for row in found] == [1, "1,5", None, [1], None, None, None]
    assert [row.get("ratio") for row in found] == [None] * 5 + [1.5, 9007199254740993]
    assert [{key: value for key, value in (row.get("more") or {}).items() if value} for row in found[4:6]] == [
        {"a": 1},
        {"b": ["2022-01-01"]},
    ]
    monkeypatch.undo()
    (batch,) = open_table(path, config_key="catalog.items").batches(["price", "more"])
    assert batch.mixed["price"][:4] == [1, "1,5", None, [1]] and batch.column("price") is batch.mixed["price"]
    assert isinstance(batch.column("more"), pa.Array) and batch.column("absent") is None


def test_line_numbers_skip_no_blank_line_over_blocks(tmp_path, monkeypatch):
    text = "".join(f'{{"item_id": "i{i}"}}\n' + ("  \n\n" if i % 7 == 0 else "") for i in range(200))
    path = write(tmp_path, "a.jsonl", text.encode())
    expected = [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for size in (1 << 22, 50):
        monkeypatch.setattr(json_lines_module, "_BLOCK", size)
        batches = list(open_table(path, config_key="catalog.items").batches(["item_id"], rows=9))
        assert [number for batch in batches for number in batch.numbers] == expected
        assert max(map(len, batches)) <= 9
    assert batches[-1].place(len(batches[-1]) - 1) == f"{path}, line {expected[-1]}"


def test_objects_with_very_many_keys_stay_dictionaries(tmp_path):
    rows = [{"item_id": str(i), "details": {f"key {i}-{j}": j for j in range(5)}} for i in range(200)]
    path = write(tmp_path, "a.jsonl", json_lines(rows).encode())
    (batch,) = open_table(path, config_key="catalog.items").batches(["item_id", "details"])
    assert batch.mixed["details"] == [row["details"] for row in rows] and batch.table.column_names == ["item_id"]


def test_deep_nesting_is_refused_or_read_but_never_a_crash(tmp_path):
    deep = '{"item_id": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    assert "line 1: not valid JSON" in refusal(write(tmp_path, "a.jsonl", deep.encode()))
    assert "row 1: not valid JSON" in refusal(write(tmp_path, "a.json", f"[{deep}]".encode()))


def test_lines_of_python_literals_and_mappings_of_lists_are_read(tmp_path):
    old = write(tmp_path, "meta.json.gz", gzip.compress(b"{'asin': 'B1', 'categories': [['A', \"B's\"]]}\n{'asin': 'B2'}\n"))
    assert rows_of(old, ["asin", "categories"]) == [{"asin": "B1", "categories": [["A", "B's"]]}, {"asin": "B2", "categories": None}]
    histories = write(tmp_path, "inter.json", b'{"0": ["a", "b"], "1": []}')
    assert rows_of(histories, ["user_id", "items"]) == [{"user_id": "0", "items": ["a", "b"]}, {"user_id": "1", "items": []}]
    own = write(tmp_path, "own.json", b'{"0": {"item_id": "x"}, "1": {"item_id": "y"}}')
    assert rows_of(own, ["item_id"]) == [{"item_id": "x"}, {"item_id": "y"}]


def test_long_documents_are_decoded_piece_by_piece(tmp_path, monkeypatch):
    from mmsid.catalog.sources import json_documents

    rows = [{"item_id": f"i{i}", "title": "é\\ \ud83d\ude00" * (i % 9), "n": 10**i} for i in range(60)]
    monkeypatch.setattr(json_documents, "_CHUNK", 7)
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2)):
        assert rows_of(write(tmp_path, "a.json", text.encode("utf-8", "surrogatepass")), ["item_id", "n"]) == [
            {"item_id": row["item_id"], "n": row["n"]} for row in rows
        ]


# Feeds

RSS = """<?xml version="1.0"?>
<!DOCTYPE rss [<!ENTITY secret SYSTEM "file:///etc/hostname">]>
<rss version="2.0" xmlns:g="http://base.google.com/ns/1.0"><channel><title>Shop</title>
<item><title>plain</title><g:title>Ein &lt;b&gt;Hemd&lt;/b&gt;</g:title><g:id>1</g:id><link>https://a/1</link>
<g:additional_image_link>x.jpg</g:additional_image_link><g:additional_image_link>y.jpg</g:additional_image_link>
<g:shipping><g:country>DE</g:country><g:price>4 EUR</g:price></g:shipping></item>
<!-- comment --><item><g:id>2</g:id><description><![CDATA[<p>Hut & mehr</p>]]></description><g:brand>&secret;</g:brand></item>
</channel></rss>"""
ATOM = """<feed xmlns="http://www.w3.org/2005/Atom" xmlns:g="http://base.google.com/ns/1.0"><title>Shop</title>
<entry><g:id>1</g:id><title>Hemd</title><link href="https://a/1"/></entry><entry><g:id>2</g:id><summary>Hut</summary></entry></feed>"""


def test_product_feeds_are_read_with_repeated_elements_as_lists(tmp_path):
    path = write(tmp_path, "feed.xml", RSS.encode())
    table = open_table(path, config_key="catalog.items")
    assert table.num_rows == 2 and "additional_image_link" in table.notes[0]
    first, second = rows_of(path, table.columns, rows=1)
    assert first["title"] == "Ein <b>Hemd</b>" and first["additional_image_link"] == ["x.jpg", "y.jpg"]
    assert (first["shipping.country"], first["shipping.price"], first["link"]) == ("DE", "4 EUR", "https://a/1")
    assert second["description"] == "<p>Hut & mehr</p>" and second["additional_image_link"] is None
    assert second.get("brand") is None  # the file that the entity names was not read
    packed = write(tmp_path, "feed.xml.gz", gzip.compress(ATOM.encode("utf-16")))
    assert rows_of(packed, ["id", "title", "link", "summary"]) == [
        {"id": "1", "title": "Hemd", "link": "https://a/1", "summary": None},
        {"id": "2", "title": None, "link": None, "summary": "Hut"},
    ]


def test_a_feed_that_grows_by_its_entities_is_refused_or_stays_small(tmp_path):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<?xml version="1.0"?><!DOCTYPE rss [<!ENTITY e0 "0123456789">{entities}]><rss><item><id>&e11;</id><t>x</t></item></rss>'
    try:
        found = rows_of(write(tmp_path, "bomb.xml", bomb.encode()), ["id", "t"])
    except CatalogError:
        return
    assert found == [{"t": "x"}]


# Several files


def test_parts_may_differ_in_order_columns_and_format(tmp_path):
    one = write(tmp_path, "parts/part-0.parquet", parquet([{"item_id": "a", "title": "x", "price": 1}]))
    two = write(tmp_path, "parts/part-1.parquet", parquet([{"price": "2", "item_id": "b"}]))
    write(tmp_path, "parts/_SUCCESS", b"")
    write(tmp_path, "parts/README.txt", b"notes")
    expected = [{"item_id": "a", "title": "x", "price": 1}, {"item_id": "b", "price": "2"}]
    for source in (tmp_path / "parts", str(tmp_path / "parts" / "*.parquet"), [one, str(two)]):
        table = open_table(source, config_key="catalog.items")
        assert table.columns == ("item_id", "title", "price") and table.files == (one, two) and table.num_rows == 2
        assert rows_of(source, ["item_id", "title", "price"]) == expected
        assert f"{two}: has no column title" in table.notes
    assert "not read: README.txt" in open_table(tmp_path / "parts", config_key="catalog.items").notes[0]
    csvs = [write(tmp_path, f"{name}.csv.gz", gzip.compress(f"item_id,title\n{name},None\n".encode())) for name in "cd"]
    mixed = [tmp_path / "parts", str(tmp_path / "?.csv.gz")]
    batches = list(open_table(mixed, config_key="catalog.items").batches(["item_id"]))
    assert [batch.values("item_id") for batch in batches] == [["a"], ["b"], ["c"], ["d"]]
    assert [batch.textual for batch in batches] == [False, False, True, True]
    assert [batch.place(0) for batch in batches[1:3]] == [f"{two}, row 1", f"{csvs[0]}, row 1"]
    table = read_table_rows(mixed, ["item_id", "title"], config_key="catalog.items")
    assert [table.place(index) for index in (0, 1, 3)] == [f"{one}, row 1", f"{two}, row 1", f"{csvs[1]}, row 1"]
    columns = read_columns(mixed, ["price", "item_id"], config_key="catalog.events")
    assert columns.table["price"].to_pylist() == ["1", "2", None, None] and columns.place(3) == f"{csvs[1]}, row 1"
    nested = write(tmp_path, "hive/date=1/part.parquet", parquet([{"item_id": "h"}]))
    assert open_table(tmp_path / "hive", config_key="catalog.items").files == (nested,)


def test_sources_that_are_no_table_are_refused(tmp_path):
    write(tmp_path, "both/a.csv", b"item_id\na\n")
    write(tmp_path, "both/b.parquet", parquet(ROWS))
    write(tmp_path, "other/users.csv", b"user_id,items\nu,a\n")
    (tmp_path / "empty").mkdir()
    assert "several formats (1 .csv, 1 .parquet)" in refusal(tmp_path / "both")
    assert "holds no table" in refusal(tmp_path / "empty")
    assert "no file matches" in refusal(tmp_path / "*.parquet")
    assert "does not exist" in refusal(tmp_path / "none.csv")
    assert "no column in common" in refusal([tmp_path / "both" / "a.csv", tmp_path / "other"])
    write(tmp_path, "shop/items.csv", b"item_id,title,brand\na,x,y\n")
    write(tmp_path, "shop/log.csv", b"user_id,item_id,timestamp\nu,a,1\n")
    assert "only the columns item_id in common" in refusal(tmp_path / "shop")
    assert "holds no rows" in refusal([write(tmp_path, "1.csv", b"item_id\n"), write(tmp_path, "2.csv", b"")])
    half = [tmp_path / "1.csv", tmp_path / "both" / "a.csv"]
    assert rows_of(half, ["item_id"]) == [{"item_id": "a"}]
    assert f"{half[0]}: no rows" in open_table(half, config_key="catalog.items").notes


# Hugging Face

PICTURES = {"item_id": ["a", "b", "c"], "image": [{"bytes": b"png", "path": "a.png"}, {"bytes": b"jpg", "path": None}, None]}


def dataset(names=("a", "b", "c")) -> datasets.Dataset:
    rows = [index for index, name in enumerate(PICTURES["item_id"]) if name in names]
    given = {key: [values[row] for row in rows] for key, values in PICTURES.items()}
    return datasets.Dataset.from_dict(given, features=datasets.Features({"item_id": datasets.Value("string"), "image": datasets.Image()}))


def test_saved_data_sets_are_read_with_undecoded_pictures(tmp_path):
    dataset().save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": dataset("ab"), "test": dataset("c")}).save_to_disk(tmp_path / "splits")
    expected = [{"item_id": item_id, "image": image} for item_id, image in zip(*PICTURES.values(), strict=True)]
    assert rows_of(tmp_path / "one", ["item_id", "image"]) == expected
    assert rows_of(tmp_path / "splits", ["item_id", "image"]) == expected
    table = open_table(tmp_path / "splits", config_key="catalog.items")
    assert "all splits: train, test" in table.notes[0] and len(table.files) == 2 and table.num_rows == 3
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "does not exist" in refusal(tmp_path / "one") or "cannot be read" in refusal(tmp_path / "one")


def test_hub_data_sets_are_read_from_the_cache(monkeypatch, tmp_path):
    found = {"train": dataset("ab"), "test": dataset("c")}
    asked = []

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        return datasets.DatasetDict(found) if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row["item_id"] for row in rows_of("hf:shop/ads", ["item_id", "image"])] == ["a", "b", "c"]
    assert rows_of("hf:shop/ads:train", ["image"]) == [{"image": image} for image in PICTURES["image"][:2]]
    (batch, _) = open_table("hf:shop/ads", config_key="catalog.items").batches(["item_id"])
    assert batch.place(1) == "hf:shop/ads:train, row 2" and ("shop/ads", None, False) in asked
    assert "cannot be loaded (KeyError" in refusal("hf:shop/ads:valid") and "names no data set" in refusal("hf:")
    config = CatalogConfig(items=["hf:shop/ads", tmp_path / "more.csv"])
    assert config.items == ("hf:shop/ads", tmp_path / "more.csv") and config.root == tmp_path
    assert CatalogConfig(items="hf:shop/ads").input_files()["items"] is None


# Cells and users of tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("['a' \"b c\"\n 'd']", ["a", "b c", "d"]),
        ("['a']", ["a"]),
        ("[1 2.5 nan]", [1, 2.5, None]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("{'Brand': 'X', 'n': None}", {"Brand": "X", "n": None}),
        ("('a', 'b')", ["a", "b"]),
        ("[]", []),
    ],
)
def test_cells_are_parsed_as_literals(text, expected):
    assert literal_cell(text) == expected


@pytest.mark.parametrize("text", ["[1", "[__import__('os').getcwd()]", "['a' 'b' ... 'z']", "[" * 5000, "{x}", "[a, b]"])
def test_cells_that_are_no_literals_are_refused(text):
    with pytest.raises(ValueError):
        literal_cell(text)


def test_cells_of_csv_written_by_pandas_and_numpy_make_lists(tmp_path):
    path = write(tmp_path, "a.csv", b"item_id,tags,facts\na,\"['x', 'y']\",{'k': 'v'}\nb,\"['x'\n 'y']\",NULL\nc,x|y,\nd,[x,\n")
    table = read_table_rows(path, ["tags", "facts"], config_key="catalog.items")
    cells = Cells(table, "|")
    assert [cells.texts(row, "tags") for row in range(3)] == [("x", "y")] * 3
    assert cells.mapping(0, "facts") == {"k": ("v",)} and cells.mapping(1, "facts") is None
    with pytest.raises(CatalogError, match=r"row 4, field 'tags': starts like JSON"):
        cells.texts(3, "tags")


@pytest.mark.parametrize("name", ["items.parquet", "items.jsonl", "items.csv", "items.json"])
def test_pieces_have_the_asked_number_of_rows(tmp_path, name):
    rows = [{"item_id": f"i{i}", "n": str(i)} for i in range(1000)]
    files = {"items.parquet": parquet(rows), "items.jsonl": json_lines(rows), "items.csv": csv_text(rows), "items.json": json.dumps(rows)}
    data = files[name]
    path = write(tmp_path, name, data if isinstance(data, bytes) else data.encode())
    total, pieces = table_pieces(path, ["n"], 300, config_key="users")
    pieces = list(pieces)
    assert total == 1000 and [len(piece.rows) for piece in pieces] == [300, 300, 300, 100]
    assert [row["n"] for piece in pieces for row in piece.rows] == [row["n"] for row in rows]
    assert pieces[2].place(0).endswith("601")


def test_a_configuration_with_several_sources_names_every_file(tmp_path):
    names = [write(tmp_path, f"shop/{name}.csv", f"item_id,title\n{name},x\n".encode()) for name in "ab"]
    users = write(tmp_path, "users.jsonl", b'{"user_id": "u", "items": ["a", "b"]}\n')
    config = CatalogConfig(items=[str(name) for name in names], sequences=str(users))
    assert config.items == tuple(names) and config.root == tmp_path / "shop" and config.users_file == users
    assert config.input_files() == {"items": names[0], "items 2": names[1], "sequences": users, "events": None}
    again = CatalogConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert CatalogConfig(items=[names[0]]).items == names[0] == CatalogConfig(items=str(names[0])).items
    folder = CatalogConfig(items=tmp_path / "shop")
    assert folder.root == tmp_path / "shop" and list(folder.item_files().values()) == names
    assert CatalogConfig(items=f"{tmp_path}/shop/*.csv").root == tmp_path / "shop"
    assert CatalogConfig(items=tmp_path / "none.csv").input_files()["items"] == tmp_path / "none.csv"
    catalogs = [read_catalog(one) for one in (config, CatalogConfig(items=folder.items, sequences=users))]
    assert catalogs[0].sha256 == catalogs[1].sha256 and len(catalogs[0].items) == 2 and len(catalogs[0].histories) == 1


@pytest.mark.parametrize(
    "name", ["items.parquet", "items.csv", "spark.csv", "unicode.txt", "items.jsonl", "mapping.json", "mixed.jsonl", "both"]
)
def test_a_written_subset_has_the_same_items(tmp_path, name):
    rows = [{"item_id": 1, "facts": {"a": 1}, "price": 2}, {"item_id": 2, "facts": {"b": ["x", "y"]}, "price": "3"}, {"item_id": 3}]
    source = [
        write(tmp_path, one, (FORMATS | {"mixed.jsonl": json_lines(rows).encode()})[one])
        for one in (["mixed.jsonl", "items.csv"] if name == "both" else [name])
    ]
    fields = {"attributes": ["facts"]} if "mixed" in name else {"attributes": ["price"]} if name == "both" else {"attributes": ["tags"]}
    config = CatalogConfig(items=source, fields=fields, max_items=2)
    whole = {item.item_id: item for item in read_catalog(config.model_copy(update={"max_items": None})).items}
    chosen = sorted(whole)[::2]
    written = write_items(config, chosen, tmp_path / "subset")
    found = read_catalog(written)
    assert {item.item_id: item for item in found.items} == {item_id: whole[item_id] for item_id in chosen}
    assert written.root == config.root and written.max_items is None


def test_a_batch_gives_rows_slices_and_selections():
    table = pa.table({"a": [1, 2, 3]})
    batch = Batch(table, {"b": [1, "x", None]}, False, Path("f"), range(4, 7))
    assert batch.slice(1, 2).rows() == [{"a": 2, "b": "x"}, {"a": 3, "b": None}] and batch.slice(1, 2).place(0) == "f, row 5"
    assert batch.take([2, 0]).rows() == [{"a": 3, "b": None}, {"a": 1, "b": 1}] and list(batch.take([2]).numbers) == [6]
