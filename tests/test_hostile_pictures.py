"""Hostile pictures in the catalogue reader, the decoder, the isolated decoder and the caption job.

A usable picture is decoded upright in RGB. Any other has a fixed reason and keeps its row.
"""

import io
import json
import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from annotate_stub import StubGenerator, caption_config, rows_of
from PIL import Image

import mmsid
from mmsid.annotate.caption import run as caption
from mmsid.catalog import CatalogConfig, PictureLimits, isolated_decoding, load_picture, read_catalog
from mmsid.catalog.picture_decoding import REASONS, register_heif
from mmsid.catalog.pictures import inspect_picture
from mmsid.errors import PictureError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
RED = Image.new("RGB", (40, 30), (200, 0, 0))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(**tags) -> bytes:
    found = Image.Exif()
    for tag, value in tags.items():
        found[int(tag[1:], 16)] = value
    return found.tobytes()


def bomb(width: int, height: int) -> bytes:
    """A PNG of under 200 bytes that declares `width` x `height` one-bit pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed comment expands to 200 MB."""
    data = encoded(RED, "PNG")
    body = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return data[:33] + chunk + data[33:]


def late_text_bomb() -> bytes:
    """A PNG with such a comment behind its pixels, where Pillow reads it while decoding."""
    data = encoded(RED, "PNG")
    body = b"Comment\0\0" + zlib.compress(bytes(2_000_000), 9)
    return data[:-12] + struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body)) + data[-12:]


def frames(kind: str) -> bytes:
    return encoded(RED.copy(), kind, save_all=True, append_images=[NOISE.copy(), RED.copy()])  # save leaves settings in a picture


def tiff_bomb(side: int) -> bytes:
    data = encoded(Image.new("L", (40, 30)), "TIFF")
    for tag, value in ((256, 40), (257, 30)):
        entry = struct.pack("<HHII", tag, 4, 1, value)
        assert entry in data
        data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, side))
    return data


def odd_tiff() -> bytes:
    data = encoded(RED, "TIFF")
    entry = data.index(struct.pack("<HHI", 273, 4, 1))
    return data[:entry] + struct.pack("<HHI4s", 273, 2, 4, b"abc") + data[entry + 12 :]


def jpeg2000_bomb(side: int) -> bytes:
    data = encoded(RED, "JPEG2000")
    box = data.index(b"ihdr") + 4
    return data[:box] + struct.pack(">II", side, side) + data[box + 8 :]


def gif_bomb(side: int) -> bytes:
    data = encoded(RED, "GIF")
    return data[:6] + struct.pack("<HH", side, side) + data[10:]


def bmp_bomb(side: int) -> bytes:
    data = encoded(RED, "BMP")
    return data[:18] + struct.pack("<ii", side, side) + data[26:]


FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "JPEG2000": {"irreversible": False},
    "AVIF": {},
    "HEIF": {},
}
FORMATS = {kind: options for kind, options in FORMATS.items() if kind != "HEIF" or register_heif()}

REFUSED = {
    "zero bytes": (b"", "empty"),
    "text under a picture's name": (b"hello, I am no picture", "format"),
    "a page that is also a GIF": (b"GIF89a/*" + b"<script>" * 9, ("too_many_pixels", "truncated", "corrupt")),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "svg"),
    "SVG behind a declaration": (b'<?xml version="1.0"?>\n<!-- html -->\n<svg width="9"></svg>', "svg"),
    "a page": (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body><svg></svg>404</body></html>", "html"),
    "a page in UTF-16": ("<html><head></head></html>".encode("utf-16"), "html"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "lfs_pointer"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "format"),
    "JPEG 2000 signature": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "truncated"),
    "JPEG 2000 of 60,000 x 60,000": (jpeg2000_bomb(60_000), "too_many_pixels"),
    "TIFF of 60,000 x 60,000": (tiff_bomb(60_000), "too_many_pixels"),
    "TIFF with a text as offset of its pixels": (odd_tiff(), "corrupt"),
    "GIF canvas of 60,000 x 60,000": (gif_bomb(60_000), "too_many_pixels"),
    "BMP of 60,000 x 60,000": (bmp_bomb(60_000), "too_many_pixels"),
    "one-bit PNG of 60,000 x 60,000": (bomb(60_000, 60_000), "too_many_pixels"),
    "PNG of 2^31 x 1": (bomb(2**31 - 1, 1), "too_many_pixels"),
    "PNG of no width": (bomb(0, 5), ("format", "corrupt")),
    "JPEG header alone": (encoded(NOISE, "JPEG")[:20], ("truncated", "format")),
    **{
        f"{kind} cut at {at}/16": (
            encoded(NOISE, kind, **options)[: len(encoded(NOISE, kind, **options)) * at // 16],
            ("truncated", "corrupt", "format"),
        )
        for kind, options in FORMATS.items()
        for at in range(1, 16)
    },
    "progressive JPEG cut in its last scan": (encoded(NOISE, "JPEG", progressive=True)[:-9], "truncated"),
}
USABLE = {  # bytes, file name, size and middle pixel of the decoded picture
    "PNG under a JPEG's name": (encoded(RED, "PNG"), "a.jpg", (40, 30), (200, 0, 0)),
    "JPEG without any ending": (encoded(RED, "JPEG", quality=95), "picture", (40, 30), (200, 0, 0)),
    "CMYK": (encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG", quality=95), "a.jpg", (40, 30), (255, 0, 0)),
    "16-bit grey": (encoded(Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)), "PNG"), "a.png", (40, 30), (128, 128, 128)),
    "transparent": (encoded(Image.new("RGBA", (40, 30), (9, 9, 9, 0)), "PNG"), "a.png", (40, 30), (255, 255, 255)),
    "half transparent": (encoded(Image.new("LA", (40, 30), (0, 128)), "PNG"), "a.png", (40, 30), (127, 127, 127)),
    "palette with one transparent colour": (encoded(RED.quantize(2), "PNG", transparency=0), "a.png", (40, 30), None),
    "EXIF: rotated": (encoded(RED, "JPEG", exif=exif(x0112=6)), "a.jpg", (30, 40), None),
    "EXIF: an orientation that does not exist": (encoded(RED, "JPEG", exif=exif(x0112=99)), "a.jpg", (40, 30), None),
    "EXIF: other width and height": (encoded(RED, "JPEG", exif=exif(x0100=60_000, x0101=60_000)), "a.jpg", (40, 30), None),
    "EXIF: damaged": (encoded(RED, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40), "a.jpg", (40, 30), None),
    "EXIF: offset past the end": (encoded(RED, "JPEG", exif=b"Exif\0\0II*\0\xf0\xff\xff\x7f"), "a.jpg", (40, 30), None),
    "ICC: damaged": (encoded(RED, "JPEG", icc_profile=b"\xff" * 200), "a.jpg", (40, 30), None),
    "ICC: damaged in a PNG": (encoded(RED, "PNG", icc_profile=b"acsp" * 50), "a.png", (40, 30), (200, 0, 0)),
    "PNG with a comment of 200 MB": (text_bomb(), "a.png", (40, 30), (200, 0, 0)),
    "PNG with a comment of 2 MB behind its pixels": (late_text_bomb(), "a.png", (40, 30), (200, 0, 0)),
    "PNG with a colour profile of 2 MB": (encoded(RED, "PNG", icc_profile=bytes(2_000_000)), "a.png", (40, 30), (200, 0, 0)),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)), "TIFF"), "a.tif", (40, 30), (128, 128, 128)),
    "float TIFF": (encoded(Image.fromarray(np.full((30, 40), 0.5, np.float32)), "TIFF"), "a.tif", (40, 30), (127, 127, 127)),
    "CMYK TIFF": (encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "TIFF"), "a.tif", (40, 30), (255, 0, 0)),
    "compressed TIFF": (encoded(RED, "TIFF", compression="tiff_lzw"), "a.tif", (40, 30), (200, 0, 0)),
    "transparent GIF": (encoded(RED.quantize(2), "GIF", transparency=0), "a.gif", (40, 30), None),
    **{f"{kind}, several frames": (frames(kind), "a", (40, 30), None) for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF")},
    **{kind: (encoded(RED, kind, **options), "a", (40, 30), (200, 0, 0)) for kind, options in FORMATS.items()},
    "bytes behind the end": (encoded(RED, "PNG") + b"<?php system('id'); ?>" * 9, "a.png", (40, 30), (200, 0, 0)),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF


@pytest.fixture(params=[False, True], ids=["in this process", "isolated"])
def limits(request) -> PictureLimits:
    return PictureLimits(isolate=request.param)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_picture_has_a_fixed_reason_and_message(tmp_path, name, limits):
    data, reasons = REFUSED[name]
    reasons = (reasons,) if isinstance(reasons, str) else reasons
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(PictureError) as caught:
        load_picture("a.png", limits, tmp_path)
    assert caught.value.reason in reasons
    assert str(caught.value) == f"picture 'a.png': {REASONS[caught.value.reason]}"
    assert inspect_picture("a.png", limits, tmp_path).reason in reasons, "refused before anything is decoded"


@pytest.mark.parametrize("name", USABLE)
def test_a_usable_picture_is_decoded_upright_in_rgb(tmp_path, name, limits):
    data, file, size, colour = USABLE[name]
    (tmp_path / file).write_bytes(data)
    picture = load_picture(file, limits, tmp_path)
    assert (picture.mode, picture.size) == ("RGB", size)
    if colour is not None:
        assert np.abs(np.array(picture.getpixel((size[0] // 2, size[1] // 2))) - colour).max() <= 16  # JPEG and CMYK are lossy
    assert inspect_picture(file, limits, tmp_path).reason is None


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "outside_root"),
        ("inner/../../secret.png", "outside_root"),
        ("link.png", "outside_root"),
        ("folder_link/secret.png", "outside_root"),
        ("..%2fsecret.png", "missing"),
        ("..\\secret.png", "missing"),
        ("file:///etc/passwd", "outside_root"),
        ("file://localhost/etc/passwd", "outside_root"),
        ("file:%2e%2e/secret.png", "outside_root"),
        ("http://169.254.169.254/a.png", "not_downloaded"),
        ("local:///etc/passwd", "not_downloaded"),
        ("link.png?v=1", "missing"),
        ("folder_link%2fsecret.png", "missing"),
        ("folder_link\\secret.png", "missing"),
        ("folder_link/../../secret.png", "outside_root"),
        ("/etc/passwd", "outside_root"),
        ("/dev/zero", "outside_root"),
        ("loop.png", ("unreadable", "not_a_file", "missing")),
        ("dead_link.png", "missing"),
        ("a\0.png", "not_a_file"),
        (".", "not_a_file"),
        ("pipe.png", "not_a_file"),
        ("a" * 5_000, "base64"),
        ("a." * 2_500, ("unreadable", "not_a_file")),
    ],
)
def test_no_path_leads_out_of_the_root_or_hangs(tmp_path, path, reason, limits):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded(RED, "PNG"))
    for name, target in (("link.png", "../secret.png"), ("folder_link", ".."), ("loop.png", "loop.png"), ("dead_link.png", "nothing.png")):
        os.symlink(target, root / name)
    os.mkfifo(root / "pipe.png")
    with pytest.raises(PictureError) as caught:
        load_picture(path, limits, root)
    assert caught.value.reason in ((reason,) if isinstance(reason, str) else reason)


# Limits of the worker


def slow_jpeg(scans: int) -> bytes:
    """16 megapixels in 75 kB with `scans` empty scans. The decoder passes over the whole picture for each scan."""
    data = encoded(Image.new("L", (4_000, 4_000), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * scans + b"\xff\xd9"


def reason_of(path: Path, limits: PictureLimits) -> str:
    with pytest.raises(PictureError) as caught:
        load_picture(path, limits)
    return caught.value.reason


def test_a_picture_beyond_the_time_or_memory_limit_is_refused_and_the_next_is_decoded(tmp_path):
    (tmp_path / "slow.jpg").write_bytes(slow_jpeg(1_000))
    (tmp_path / "good.png").write_bytes(encoded(RED, "PNG"))
    (tmp_path / "large.png").write_bytes(encoded(Image.new("RGB", (5_000, 5_000)), "PNG", compress_level=1))
    tight = PictureLimits(isolate=True, max_seconds=1, max_memory=50_000_000)
    assert reason_of(tmp_path / "slow.jpg", tight) == "too_slow"
    assert load_picture(tmp_path / "good.png", tight).size == (40, 30)
    assert reason_of(tmp_path / "large.png", tight) == "too_much_memory"
    assert load_picture(tmp_path / "good.png", tight).size == (40, 30)
    assert load_picture(tmp_path / "large.png", PictureLimits(isolate=True)).size == (5_000, 5_000)


@pytest.mark.slow
def test_a_crash_refuses_one_picture_and_a_worker_killed_while_idle_refuses_none(tmp_path):
    limits = PictureLimits(isolate=True)
    (tmp_path / "good.png").write_bytes(encoded(RED, "PNG"))
    (tmp_path / "slow.jpg").write_bytes(slow_jpeg(1_000))
    with isolated_decoding._borrow_worker() as worker:
        process = worker.process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert load_picture(tmp_path / "good.png", limits).size == (40, 30)
    with isolated_decoding._borrow_worker() as worker:
        process = worker.process

    def crash() -> None:
        while process.poll() is None and isolated_decoding._idle_workers.qsize():  # until the slow picture uses it
            time.sleep(0.001)
        process.send_signal(signal.SIGSEGV)

    crasher = threading.Thread(target=crash)
    crasher.start()
    assert reason_of(tmp_path / "slow.jpg", limits) == "crashed"
    crasher.join()
    assert load_picture(tmp_path / "good.png", limits).size == (40, 30)


def test_a_forked_process_starts_its_own_workers(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(RED, "PNG"))
    load_picture(tmp_path / "good.png", PictureLimits(isolate=True))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes([isolated_decoding._idle_workers.qsize()]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\0" and isolated_decoding._idle_workers.qsize() > 0


# Rows


def test_every_hostile_picture_keeps_its_row_with_a_reason(tmp_path):
    """A catalogue of hostile pictures only has one caption row per creative, with a reason for each refusal."""
    (tmp_path / "images").mkdir()
    lines = []
    for number, (name, data) in enumerate([(name, case[0]) for name, case in (REFUSED | USABLE).items()]):
        (tmp_path / "images" / f"{number}.png").write_bytes(data)
        lines.append({"item_id": name, "title": name, "image": [f"images/{number}.png"]})
    lines.append({"item_id": "outside", "title": "x", "image": ["../../etc/passwd"]})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    catalog = CatalogConfig(items=tmp_path / "items.jsonl", pictures=PictureLimits(isolate=True))
    folder = mmsid.ingest(tmp_path / "ingest", catalog, max_problems=1.0)
    catalog = catalog.model_copy(update={"ingested": folder})
    config = caption_config(catalog, tmp_path / "caption", max_quarantined=1.0)
    rows = {row["item_id"]: row for row in rows_of(caption(config, StubGenerator()))}
    assert set(rows) == {*REFUSED, *USABLE, "outside"}
    assert all(rows[name]["status"] == "ok" for name in USABLE)
    assert all(rows[name]["reason"].removeprefix("picture_") in REASONS for name in [*REFUSED, "outside"])
    assert sum(read_catalog(config.catalog).problems[f"picture_{reason}"] for reason in REASONS) == len(REFUSED) + 1
