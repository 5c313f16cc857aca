"""Fuzzing of every reader of untrusted data: readers may raise mmsid's own errors only.

Each reader gets 100 inputs, and 10,000 in the slow suite. The inputs are the same in every run.
"""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmsid import stages
from mmsid.annotate.records import parse_caption, parse_interests
from mmsid.catalog import CatalogConfig, Fields, PictureLimits, load_picture, read_catalog
from mmsid.catalog.picture_decoding import REASONS
from mmsid.catalog.pictures import inspect_picture
from mmsid.config import load_yaml
from mmsid.errors import AnnotationError, MmsidError, PictureError
from mmsid.sids.exports import import_index_json, import_reference_sids
from mmsid.sids.table import SidTable
from mmsid.sids.trie import Trie

FAST, SLOW = 100, 10_000

# Parts of inputs

TEXT = st.text(max_size=12)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, files: list[bytes]) -> bytes:
    """A valid file with a few bytes changed, removed, repeated or inserted, or with its end removed."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "double", "insert", "end"]))
        length = draw(st.integers(1, 16))
        if kind == "set":
            data[start : start + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del data[start : start + length]
        elif kind == "double":
            data[start:start] = data[start : start + length]
        elif kind == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b'"', b"{", b"[", b"\n"]))
        else:
            del data[start:]
    return bytes(data)


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _feather(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.feather.write_feather(table, buffer)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a new file each time, because some file systems flush to disk when a file is overwritten."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# The catalogue reader

FIELDS = Fields(attributes=["material", "labels"], timestamps="timestamps")
ROW = {
    "item_id": "a", "title": "red shoe", "description": "x", "image": ["a.png"], "categories": ["wear", "shoe"],
    "material": "wool", "labels": ["new"],
}  # fmt: skip
USER = {"user_id": "u", "items": ["a", "b"], "timestamps": [1, 2]}
ITEMS_FILES = {
    "jsonl": "\n".join(json.dumps(ROW | {"item_id": name}) for name in "ab").encode(),
    "csv": b'item_id,title,image,categories\na,"red, shoe",a.png,wear|shoe\nb,lamp,"[""b.png""]",home\n',
    "parquet": _parquet(pa.Table.from_pylist([ROW, ROW | {"item_id": "b"}])),
    "feather": _feather(pa.Table.from_pylist([ROW, ROW | {"item_id": "b"}])),
    "json": json.dumps({name: ROW | {"item_id": name} for name in "ab"}, indent=1).encode(),
    "jsonl.gz": gzip.compress("\n".join(json.dumps(ROW | {"item_id": name}) for name in "ab").encode(), mtime=0),
    "tsv": "item_id\ttitle\tmaterial\tlabels\na\tlamp\twool\t['x' 'y']\nb\tl\u00e4mp\t\tNULL\n".encode("utf-16"),
    "txt": 'item_id;title;material;labels\na;"l\u00e4mp \\" x";;\nb;lamp;wool;new\n'.encode("cp1252"),
    "xml": b"<rss xmlns:g='http://base.google.com/ns/1.0'><item><g:item_id>a</g:item_id><title>x</title><material>w</material>"
    b"<labels>new</labels><labels>old</labels></item><item><item_id>b</item_id></item></rss>",
}
CELL = st.none() | NUMBERS | TEXT | st.lists(TEXT | st.none(), max_size=3) | st.dictionaries(TEXT, JSON, max_size=2)
ROWS = st.lists(
    st.dictionaries(st.sampled_from([*ROW, "other"]), CELL | st.sampled_from(["a", "b", "a.png"]), max_size=5).map(
        lambda row: {"item_id": "a"} | row
    ),
    max_size=3,
)
USERS = st.lists(
    st.dictionaries(st.sampled_from(list(USER)), CELL | st.lists(NUMBERS, max_size=3), max_size=3).map(USER.__or__), max_size=3
)


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


CATALOGUES = st.one_of(
    *(st.tuples(st.just(kind), damaged([whole]), st.none()) for kind, whole in ITEMS_FILES.items()),
    st.tuples(st.just("jsonl"), ROWS.map(_jsonl), st.none() | USERS.map(_jsonl)),
    st.tuples(
        st.sampled_from(sorted(ITEMS_FILES)),
        st.binary(max_size=60) | TEXT.map(lambda text: text.encode("utf-8", "replace")),
        st.none(),
    ),
    st.tuples(st.just("jsonl"), st.just(ITEMS_FILES["jsonl"]), damaged([_jsonl([USER])])),
)


def read_a_catalogue(folder: Path, value: tuple[str, bytes, bytes | None]) -> None:
    kind, items, sequences = value
    path = folder / f"items.{kind}"
    write(path, items)
    if sequences is not None:
        write(folder / "sequences.jsonl", sequences)
    columns = set(FIELDS.attributes) if kind != "csv" else set()
    fields = FIELDS.model_copy(update={"attributes": sorted(columns)})
    catalog = read_catalog(
        CatalogConfig(items=path, sequences=folder / "sequences.jsonl" if sequences is not None else None, fields=fields)
    )
    assert len({item.item_id for item in catalog.items}) == len(catalog.items) > 0
    assert all(item.title.isprintable() or item.title for item in catalog.items if item.title)
    json.dumps([[item.item_id, item.title, item.categories] for item in catalog.items], ensure_ascii=False).encode()


# The picture decoder

ALL_FORMATS = PictureLimits(formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"), max_pixels=1_000_000, animated="first_frame")


def _pictures() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for kind, picture, options in (
        ("JPEG", noise, {"exif": exif, "icc_profile": b"\0" * 40}),
        ("JPEG", noise, {"progressive": True}),
        ("JPEG", noise.convert("CMYK"), {}),
        ("PNG", noise.convert("RGBA"), {}),
        ("PNG", noise.quantize(8), {"transparency": 1}),
        ("PNG", Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16)), {}),
        ("WEBP", noise, {"lossless": True}),
        ("WEBP", noise, {"save_all": True, "append_images": [noise.rotate(90)]}),
        ("GIF", noise, {"save_all": True, "append_images": [noise.rotate(90)]}),
        ("BMP", noise, {}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def decode_a_picture(folder: Path, data: bytes) -> None:
    write(folder / "a.png", data)
    for limits in (ALL_FORMATS, PictureLimits()):
        inspected = inspect_picture("a.png", limits, folder)
        assert inspected.reason is None or inspected.reason in REASONS
        try:
            picture = load_picture("a.png", limits, folder)
        except PictureError as error:
            assert error.reason in REASONS and error.__cause__ is None
            assert str(error) == f"picture 'a.png': {REASONS[error.reason]}"
            continue
        assert inspected.reason is None, "a picture that the catalogue refuses is never decoded"
        assert picture.mode == "RGB" and len(picture.tobytes()) == 3 * picture.width * picture.height


# Outputs of language models

VALID_OUTPUTS = [
    b'{"caption": "a red striped running shoe by Velo, priced 49"}',
    b'```json\n{"descriptors": [{"descriptor": "trail running", "confidence": 0.9}], "summary": "For runs on trails."}\n```',
    b'{"descriptors": [{"descriptor": "a", "confidence": 1}, {"descriptor": "b", "confidence": 0}], "summary": "\\ud83d\\ude00 \\u0041"}',
]
KEYS = ["descriptors", "summary", "caption", "descriptor", "confidence"]
RECORDS = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.text(min_size=100, max_size=130),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)
OUTPUTS = (
    damaged(VALID_OUTPUTS).map(lambda data: data.decode("utf-8", "surrogateescape"))
    | RECORDS.map(json.dumps)
    | st.text(max_size=60)
    | st.builds(lambda mark, times: mark * times, st.sampled_from(["[", '{"a":', "```", '"', "1", "-", "\ufeff"]), st.integers(0, 30_000))
)


def parse_an_output(folder: Path, text: str) -> None:
    for parse in (parse_caption, parse_interests):
        try:
            record = parse(text)
        except AnnotationError as error:
            assert error.reason.replace("_", "").isalpha() and "\n" not in error.reason
            continue
        assert all(text.strip() and len(text) <= 600 for text in record.texts())
        json.dumps(record.model_dump(), allow_nan=False, ensure_ascii=False).encode()


# The configuration

RUN = b"""name: demo
catalog: {items: a.parquet, fields: {title: name, attributes: [a]}, pictures: {formats: [PNG]}, split: {valid_from: 0.7}}
caption: {model: demo, batch_size: 4, max_side: null}
assign: {tokenizer: t, collisions: relocate}
"""
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(["${HOME}", "${NOT_SET_ANYWHERE}", "${X:-1}", "demo", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXT | st.sampled_from(["items", "fields", "pictures", "formats", "max_bytes", "batch_size", "model", "image"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
CONFIGURATIONS = st.tuples(
    damaged([RUN])
    | st.binary(max_size=60)
    | TEXT.map(lambda text: text.encode("utf-8", "replace"))
    | st.dictionaries(st.sampled_from(["name", "runs", "seed", "catalog", "caption", "interests"]), VALUES, max_size=4).map(
        lambda data: yaml.safe_dump(data, allow_unicode=True).encode()
    ),
    st.lists(
        st.sampled_from(["caption.batch_size", "catalog.pictures.max_bytes", "name", "caption", "a.b", "", ".."]).flatmap(
            lambda key: TEXT.map(lambda value: f"{key}={value}")
        )
        | TEXT,
        max_size=2,
    ),
)


def load_a_configuration(folder: Path, value: tuple[bytes, list[str]]) -> None:
    data, overrides = value
    write(folder / "run.yaml", data)
    stages.stage_configs(load_yaml(folder / "run.yaml", overrides), source="run.yaml")


# SID files


def _sid_files() -> dict[str, list[bytes]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = SidTable.from_codes(["a", "b", "c"], np.array([[0, 1], [1, 0], [1, 0]]), (2, 2), suffix=np.array([-1, 0, 1]))
        table.save(Path(folder) / "sids.parquet")
        Trie.from_table(table).save(Path(folder) / "trie.safetensors")
        return {name: [(Path(folder) / name).read_bytes()] for name in ("sids.parquet", "trie.safetensors")}


SID_FILES = _sid_files()
INDEX = b'{"a": ["<a_0>", "<b_1>"], "b": ["<a_1>", "<b_0>", "<c_0>"], "c": ["<a_1>", "<b_0>", "<c_1>"]}'
CODES = st.lists(st.lists(st.integers(-2, 5) | st.none() | st.just(2**31 - 1), max_size=3) | st.none(), max_size=3)
COLUMNS = st.fixed_dictionaries(
    {},
    optional={
        "item_id": st.lists(TEXT | st.none(), max_size=3) | st.lists(st.integers(0, 3), max_size=3),
        "codes": CODES | st.lists(TEXT, max_size=3),
        "raw_codes": CODES,
        "suffix": st.lists(st.integers(-5, 5) | st.none(), max_size=3) | st.lists(TEXT, max_size=3),
        "margin": st.lists(st.floats(width=32) | st.none(), max_size=3),
    },
)
METADATA = st.fixed_dictionaries(
    {
        "mmsid_sids_version": st.sampled_from(["1", "1", "1", "2"]),
        "codebook_sizes": st.sampled_from(["2,2", "4,4,4", "2", "", "x", "0,-1", "9" * 30]),
    },
    optional={"num_levels": st.sampled_from(["2", "3", "1", "x"]), "has_suffix": st.sampled_from(["0", "1"])},
)


def _table(columns: dict[str, list[Any]], metadata: dict[str, str]) -> bytes:
    rows = max((len(column) for column in columns.values()), default=0)
    padded = {name: column + [None] * (rows - len(column)) for name, column in columns.items()}
    return _parquet(pa.table(padded).replace_schema_metadata(metadata))


SIDS = st.one_of(
    st.tuples(st.just("sids.parquet"), damaged(SID_FILES["sids.parquet"]) | st.builds(_table, COLUMNS, METADATA)),
    st.tuples(st.just("trie.safetensors"), damaged(SID_FILES["trie.safetensors"])),
    st.tuples(
        st.just("index.json"),
        damaged([INDEX])
        | st.dictionaries(TEXT, st.lists(TEXT | st.sampled_from(["<a_0>", "<b_1>"]), max_size=3) | JSON, max_size=3).map(
            lambda data: json.dumps(data).encode()
        ),
    ),
    st.tuples(
        st.just("reference.parquet"),
        st.lists(TEXT | st.sampled_from(["<a_1> <b_2>", "<a_0><b_0>"]) | st.none(), max_size=3).map(
            lambda sids: _parquet(pa.table({"item_id": [str(n) for n in range(len(sids))], "sid": pa.array(sids, pa.string())}))
        ),
    ),
)


def read_a_sid_file(folder: Path, value: tuple[str, bytes]) -> None:
    name, data = value
    path = folder / name
    write(path, data)
    if name == "trie.safetensors":
        trie = Trie.load(path)
        trie.allowed(torch.zeros(1, 1, dtype=torch.int64))
        return
    if name == "sids.parquet":
        table = SidTable.load(folder)
    elif name == "index.json":
        table = import_index_json(path)
    else:
        table = import_reference_sids(path, "sid")
    assert table.codes.shape == (len(table), table.num_levels) and (table.codes < table.codebook_sizes).all() and (table.codes >= 0).all()


READERS: dict[str, tuple[st.SearchStrategy, Callable[[Path, Any], None]]] = {
    "catalogue": (CATALOGUES, read_a_catalogue),
    "picture": (damaged(_pictures()) | st.binary(max_size=60), decode_a_picture),
    "model output": (OUTPUTS, parse_an_output),
    "configuration": (CONFIGURATIONS, load_a_configuration),
    "sids": (SIDS, read_a_sid_file),
}


def fuzz(reader: str, count: int, folder: Path) -> None:
    """Call the reader on `count` inputs. They do not depend on clock, seed or earlier failures."""
    strategy, read = READERS[reader]

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(value: Any) -> None:
        try:
            read(folder, value)
        except MmsidError as error:
            assert str(error)

    once()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF and palettes
def test_a_hundred_inputs(reader, tmp_path):
    fuzz(reader, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ten_thousand_inputs(reader, tmp_path):
    fuzz(reader, SLOW, tmp_path)
