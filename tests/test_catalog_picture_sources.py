"""References to pictures: paths in any spelling, links, bytes, base64, data URLs, object stores; many pictures at once."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import fsspec
import pytest
from PIL import Image

import mmsid
from mmsid.catalog import PictureLimits, load_picture, pictures
from mmsid.catalog.picture_sources import inspection
from mmsid.catalog.picture_sources.inspection import inspect_pictures
from mmsid.catalog.picture_sources.reasons import REASONS
from mmsid.catalog.picture_sources.references import reference_kind
from mmsid.catalog.picture_sources.workers import PictureProcesses
from mmsid.catalog.pictures import InspectedPicture, inspect_picture
from mmsid.catalog.records import read_record as item_record
from mmsid.errors import CatalogError, PictureError

LIMITS = PictureLimits()
RED = Image.new("RGB", (40, 30), (200, 0, 0))


def encoded(kind: str = "PNG", colour: tuple[int, int, int] = (200, 0, 0), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded()
BASE64 = base64.b64encode(PNG).decode()


def inspected(references, root: Path, limits: PictureLimits = LIMITS, **options) -> list[InspectedPicture]:
    return list(inspect_pictures(references, limits, root, root.parent / "cache", **options))


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a b.png").write_bytes(PNG)
    (folder / "images" / unicodedata.normalize("NFC", "é.png")).write_bytes(PNG)
    (folder / "images" / unicodedata.normalize("NFD", "ü.png")).write_bytes(PNG)
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "images/a b.png",
        "images\\a b.png",
        "images/a%20b.png",
        "images%2Fa%20b.png",
        "images/a b.png?v=12",
        "images\\a%20b.png?v=12&w=3",
        " images/a b.png\n",
        unicodedata.normalize("NFD", "images/é.png"),
        unicodedata.normalize("NFC", "images/ü.png"),
        "images/%C3%A9.png",
    ],
)
def test_a_path_is_found_in_every_spelling(root, path):
    (found,) = inspected([path], root)
    assert (found.reason, found.format, found.width, found.height) == (None, "PNG", 40, 30)
    assert found.sha256 == hashlib.sha256(PNG).hexdigest() and found.num_bytes == len(PNG)
    assert found.path.read_bytes() == PNG and root in found.path.parents
    assert load_picture(path, LIMITS, root).size == (40, 30)
    assert bool(found.detail) == (path != "images/a b.png"), "a repaired path is named"


def test_absolute_paths_and_file_urls(root):
    (root / "images" / "c%20d.png").write_bytes(PNG)
    absolute = root / "images" / "a b.png"
    references = [str(absolute), f"file://{root}/images/a%20b.png", f"file://localhost{root}/images/a%20b.png", "images/c%20d.png"]
    assert [picture.reason for picture in inspected(references, root)] == [None] * 4
    assert inspected(["images/c%20d.png"], root)[0].path.name == "c%20d.png", "the plain path comes first"
    assert inspected(["file:///etc/passwd", f"{root.parent}/rootlike.png"], root)[1].reason == "outside_root"


# Links


def test_a_link_may_leave_the_root_only_to_a_listed_folder(root, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "p.png").write_bytes(PNG)
    (tmp_path / "private.png").write_bytes(PNG)
    os.symlink(tmp_path / "shared", root / "linked")
    os.symlink("../private.png", root / "private.png")
    os.symlink("images", root / "inside")
    references = ["linked/p.png", "private.png", "inside/a b.png", "linked/../../private.png", "../shared/p.png"]
    assert [one.reason for one in inspected(references, root)] == ["outside_root", "outside_root", None, "outside_root", "outside_root"]
    listed = PictureLimits(link_targets=(tmp_path / "shared",))
    assert [one.reason for one in inspected(references, root, listed)] == [None, "outside_root", None, "outside_root", "outside_root"]
    (refused,) = inspected(["linked/p.png"], root)
    assert "link" in refused.detail and "link_targets" in REASONS[refused.reason]


def test_the_root_may_be_a_link(root, tmp_path):
    os.symlink(root, tmp_path / "alias")
    for place in (tmp_path / "alias", root):
        assert [one.reason for one in inspected(["images/a b.png", str(root / "images/a b.png")], place)] == [None, None]
    assert inspected([str(tmp_path / "alias" / "images/a b.png")], tmp_path / "alias")[0].reason is None


def test_the_hugging_face_snapshot_layout_is_read(tmp_path):
    repository = tmp_path / "datasets--someone--ads"
    snapshot = repository / "snapshots" / "abc123"
    (snapshot / "images").mkdir(parents=True), (repository / "blobs").mkdir()
    (repository / "blobs" / "f00d").write_bytes(PNG)
    (repository / "token").write_bytes(PNG)
    os.symlink("../../../blobs/f00d", snapshot / "images" / "a.png")
    os.symlink("../../../token", snapshot / "images" / "b.png")
    os.symlink("/etc/passwd", snapshot / "images" / "c.png")
    assert [one.reason for one in inspected(["images/a.png", "images/b.png", "images/c.png"], snapshot)] == [None, *["outside_root"] * 2]
    assert inspected(["a.png"], snapshot / "images")[0].reason is None
    # a folder inside the root that only looks like the cache changes nothing
    root = tmp_path / "root" / "x"
    (root / "snapshots" / "r").mkdir(parents=True), (tmp_path / "root" / "blobs").mkdir()
    (tmp_path / "root" / "blobs" / "f00d").write_bytes(PNG)
    os.symlink("../../../blobs/f00d", root / "snapshots" / "r" / "a.png")
    assert inspected(["snapshots/r/a.png"], root)[0].reason == "outside_root"


def test_a_later_stage_may_read_from_root_and_cache(root, tmp_path):
    (stored,) = inspected([PNG], root)
    with pytest.raises(PictureError, match="outside the image_root"):
        load_picture(stored.path, LIMITS, root)
    assert load_picture(stored.path, LIMITS, (root, tmp_path / "cache")).size == (40, 30)
    assert load_picture("images/a b.png", LIMITS, (root, tmp_path / "cache")).size == (40, 30)


# Bytes and texts


def test_bytes_and_texts_become_files_named_by_their_content(root, tmp_path):
    lines = "\n".join(BASE64[at : at + 76] for at in range(0, len(BASE64), 76))
    urlsafe = base64.urlsafe_b64encode(encoded("JPEG", quality=95)).decode().rstrip("=")
    references = [PNG, BASE64, lines, f"data:image/png;base64,{BASE64}", f"DATA:;base64,{BASE64}", urlsafe]
    references.append("data:image/png," + "".join(f"%{byte:02x}" for byte in PNG))
    found = inspected(references, root)
    assert [one.reason for one in found] == [None] * len(references)
    digest = hashlib.sha256(PNG).hexdigest()
    for one in (found[0], *found[1:5], found[6]):
        assert one.sha256 == digest and one.path == tmp_path / "cache" / digest[:2] / digest and one.path.read_bytes() == PNG
    assert found[5].format == "JPEG"
    for reference in references:
        assert load_picture(reference, LIMITS, root).size == (40, 30)
    assert not list((tmp_path / "cache" / "unfinished").iterdir())


def test_texts_and_bytes_that_are_no_picture_have_a_reason(root):
    text = base64.b64encode(b"The quick brown fox jumps over the lazy dog. " * 9).decode()
    references = {
        f"data:text/plain;base64,{text}": "base64",
        text: "base64",
        "data:image/png;base64,!!!!": "base64",
        "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>": "svg",
        BASE64[: len(BASE64) // 2]: "truncated",
        BASE64 * 300_000: "too_many_bytes",
        b"": "empty",
        b"hello": "format",
        PNG[:-9]: "truncated",
        PNG + bytes(LIMITS.max_bytes): "too_many_bytes",
        "Zm9vYmFyZm9vYmFy/Zm9vYmFyZm9vYmFyZm9vYmFyZm9vYmFyZm9vYmFy": "missing",  # a path that could be base64
    }
    found = inspected(list(references), root)
    assert [one.reason for one in found] == list(references.values())
    assert all(one.path is None for one in found)
    with pytest.raises(PictureError) as caught:
        load_picture(text, LIMITS)
    assert len(str(caught.value)) < 500, "a long text is shortened in messages"


def test_a_file_whose_name_could_be_base64_is_a_path(root):
    name = "iVBORw0KGgoAAAANSUhEUgAAACgAAAAeCAIAAADRv8uKAAAA.png"
    (root / name).write_bytes(PNG)
    assert inspected([name], root)[0].path == root / name


# Object stores


def test_pictures_of_an_object_store(root, tmp_path):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a b.png", PNG)
    system.pipe("/bucket/large.png", bytes(101))
    small = PictureLimits(max_bytes=100)
    references = ["memory://bucket/a b.png", "memory://bucket/none.png", "s3://bucket/a.png", "nosuch://x/a.png"]
    found = inspected(references, root)
    assert [one.reason for one in found] == [None, "missing", "driver", "scheme"]
    assert found[0].path.read_bytes() == PNG
    assert "s3fs" in found[2].detail, "the missing package is named"
    assert inspected(["memory://bucket/large.png"], root, small)[0].reason == "too_many_bytes"
    system.rm("/bucket/a b.png")
    assert inspected(references[:1], root)[0].reason is None, "kept in the cache"


@pytest.mark.parametrize(
    "url",
    [
        "local:///etc/passwd",
        "simplecache::file:///etc/passwd",
        "zip://a.png::http://127.0.0.1/a.zip",
        "ftp://127.0.0.1/a.png",
        "sftp://127.0.0.1/a.png",
        "jar:file:///etc/passwd",
    ],
)
def test_urls_that_reach_local_files_or_hosts_are_refused(root, url):
    (found,) = inspected([url], root)
    assert found.reason in ("scheme", "missing") and found.path is None


# Many pictures


@pytest.fixture
def many(root) -> list[str]:
    """References to 300 files, some of them bad or given twice."""
    names = []
    for number in range(300):
        (root / f"{number}.png").write_bytes(encoded(colour=(number % 256, number // 256, 9)))
        names.append(f"{number}.png")
    (root / "7.png").write_bytes(b"<html>")
    (root / "8.png").write_bytes(PNG[:50])
    return [*names, "missing.png", "images\\a b.png", "../x.png", "a\0b", "3.png", "3.png", "\udcff.png", "images\\a b.png"]


def test_processes_give_the_results_of_one_after_the_other(root, many, monkeypatch):
    serial = inspected(many, root)
    assert serial == [inspect_picture(one, LIMITS, root) for one in many]
    monkeypatch.setattr(inspection, "PROCESSES_FROM", 100)
    monkeypatch.setattr(inspection, "usable_cpus", lambda: 2)
    used = []
    monkeypatch.setattr(PictureProcesses, "submit", lambda *args, f=PictureProcesses.submit: used.append(args) or f(*args))
    assert inspected([PNG, *many, BASE64], root)[1:-1] == serial
    assert used, "processes took part"


@pytest.mark.slow
def test_processes_work_in_a_script_without_a_main_guard(root, many, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from mmsid.catalog import PictureLimits\n"
        "from mmsid.catalog.picture_sources import inspection\n"
        "inspection.PROCESSES_FROM, inspection.usable_cpus = 100, lambda: 2\n"
        f"found = list(inspection.inspect_pictures({many!r}, PictureLimits(), Path({str(root)!r}), Path({str(tmp_path / 'cache')!r})))\n"
        "print(sum(one.reason is None for one in found))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(mmsid.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "302\n"), done.stderr


@pytest.mark.slow
def test_a_generator_that_is_not_read_to_its_end_leaves_no_process(root, many, monkeypatch):
    monkeypatch.setattr(inspection, "PROCESSES_FROM", 100)
    monkeypatch.setattr(inspection, "usable_cpus", lambda: 2)
    started = []
    monkeypatch.setattr(
        PictureProcesses, "__exit__", lambda self, *e, f=PictureProcesses.__exit__: (started.extend(self._running), f(self, *e))[1]
    )
    results = inspect_pictures(many, LIMITS, root, root.parent / "cache")
    next(results)
    results.close()
    assert started and all(one.process.poll() is not None for one in started)


def test_unchanged_files_are_not_read_again(root, many, monkeypatch):
    first = inspected(many, root)
    known = dict(zip(many, first))
    read = []
    read_file = pictures.read_file
    monkeypatch.setattr(pictures, "read_file", lambda *args: read.append(args[2]) or read_file(*args))
    assert inspected(many, root, known=known) == first
    assert set(read) == {"missing.png", "\udcff.png"}, "what could not be read is looked for again"
    (root / "5.png").write_bytes(encoded(colour=(1, 2, 3)))
    os.utime(root / "6.png", ns=(1, 1))
    (root / "missing.png").write_bytes(PNG)
    again = inspected(many, root, known=known)
    changed = {reference for reference, old, new in zip(many, first, again) if old != new}
    assert changed == {"5.png", "6.png", "missing.png"}
    assert again[5].sha256 != first[5].sha256 and again[6].sha256 == first[6].sha256


def test_a_known_picture_is_checked_for_confinement_again(root, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "p.png").write_bytes(PNG)
    os.symlink(tmp_path / "shared", root / "linked")
    found = inspected(["linked/p.png"], root, PictureLimits(link_targets=(tmp_path / "shared",)))
    assert found[0].reason is None
    assert inspected(["linked/p.png"], root, known={"linked/p.png": found[0]})[0].reason == "outside_root"


def test_isolated_headers_give_the_same_results(root):
    names = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        (root / f"a.{kind}").write_bytes(encoded(kind))
        (root / f"cut.{kind}").write_bytes(encoded(kind)[:-20])
        names += [f"a.{kind}", f"cut.{kind}"]
    plain = inspected(names, root)
    assert [one.reason for one in plain[::2]] == [None] * 6 and all(one.reason for one in plain[1::2])
    assert inspected(names, root, PictureLimits(isolate=True)) == plain


# Records of the Python API


def test_a_record_accepts_base64_and_data_urls_and_refuses_urls():
    for picture in (PNG, bytearray(PNG), BASE64, f"data:image/png;base64,{BASE64}", {"bytes": PNG, "path": None}):
        (found,) = item_record({"image": picture}, "row 1").pictures
        assert found.getpixel((3, 3)) == (200, 0, 0)
    for url in ("https://example.com/a.png", "s3://bucket/a.png", "//cdn.example.com/a.png"):
        with pytest.raises(PictureError, match=r"row 1, image is the URL .* not downloaded"):
            item_record({"image": url}, "row 1")
    with pytest.raises(PictureError, match=r"row 1, image.*base64"):
        item_record({"image": "data:image/png;base64,aGVsbG8="}, "row 1")
    with pytest.raises(CatalogError, match="row 1, image is a int"):
        item_record({"image": 5}, "row 1")


# Configuration


def test_new_keys_are_not_in_a_dump_at_their_defaults():
    dumped = json.loads(PictureLimits().model_dump_json())
    assert set(dumped) == {"formats", "max_bytes", "max_pixels", "animated", "isolate", "max_seconds", "max_memory"}
    changed = PictureLimits(allow_private_hosts=True, connections=4, link_targets=("x",), request_seconds=1, max_total_bytes=5)
    assert PictureLimits.model_validate_json(changed.model_dump_json()) == changed


def test_heic_without_its_package_names_the_extra(root, monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (root / "a.heic").write_bytes(heic)
    monkeypatch.setattr("mmsid.catalog.picture_decoding.register_heif", lambda: False)
    assert inspected(["a.heic"], root)[0].reason == "heif"
    assert "mmsid[heif]" in REASONS["heif"]


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("a.jpg", "path"),
        ("C:\\images\\a.jpg", "path"),
        ("/abs/a.jpg", "path"),
        ("ad::1/a.jpg", "path"),
        ("zip://a.png::http://host/a.zip", "store"),
        ("simplecache::s3://bucket/a.jpg", "store"),
        ("file:///a.jpg", "path"),
        ("HTTPS://host/a.jpg", "web"),
        ("//cdn.shopify.com/s/a.jpg", "web"),
        ("gs://bucket/a.jpg", "store"),
        ("data:image/png;base64,AAAA", "bytes"),
        ("data: prices.jpg", "path"),
        (BASE64, "bytes"),
        (b"", "bytes"),
        (Path("http:/x"), "path"),
    ],
)
def test_kinds_of_references(reference, kind):
    assert reference_kind(reference) == kind
