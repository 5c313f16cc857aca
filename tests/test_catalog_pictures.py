"""Pictures: any file gives a fixed reason code or an upright 8-bit RGB picture."""

import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydantic import ValidationError

from mmsid.catalog import PictureLimits, load_picture
from mmsid.catalog.picture_decoding import REASONS
from mmsid.catalog.pictures import inspect_picture
from mmsid.errors import PictureError

LIMITS = PictureLimits()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    """A picture of noise, so that a truncated file loses some of it."""
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def refused(path: str | Path, root: Path | None = None, limits: PictureLimits = LIMITS) -> str:
    """Reason for which a picture is refused. The message must contain the file name and the text of the reason."""
    with pytest.raises(PictureError) as caught:
        load_picture(path, limits, root)
    assert Path(str(path)).name in str(caught.value) and REASONS[caught.value.reason] in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    """A tiny PNG that declares `width` x `height` one-bit pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [60_000, 12_000, 6_000])  # above Pillow's error limit, above its warning limit, above our limit only
@pytest.mark.parametrize("policy", ["error", "ignore"])
def test_a_bomb_is_refused_by_its_header(tmp_path, side, policy):
    warnings.simplefilter(policy, Image.DecompressionBombWarning)  # pytest restores the filters
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(side, side))
    assert bomb.stat().st_size < 200
    assert refused(bomb) == "too_many_pixels"
    assert inspect_picture("bomb.png", LIMITS, tmp_path).reason == "too_many_pixels"


def test_max_pixels_cannot_exceed_pillows_limit():
    with pytest.raises(ValidationError):
        PictureLimits(max_pixels=200_000_000)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("sixteenths", [1, 4, 8, 12, 15])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind, sixteenths):
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    photo().save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * sixteenths // 16])
    assert refused(cut) in ("truncated", "corrupt", "format")
    assert inspect_picture(cut.name, LIMITS, tmp_path).path is None
    assert load_picture(whole, LIMITS).size == (40, 30)


def test_a_thumbnail_does_not_hide_that_a_jpeg_was_cut(tmp_path):
    small = io.BytesIO()
    photo(8, 8).save(small, "JPEG")
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0" + small.getvalue())
    data = (tmp_path / "a.jpg").read_bytes()
    assert inspect_picture("a.jpg", LIMITS, tmp_path).reason is None
    (tmp_path / "a.jpg").write_bytes(data[:-40])
    assert b"\xff\xd9" in data[:-40] and inspect_picture("a.jpg", LIMITS, tmp_path).reason == "truncated"
    assert refused(tmp_path / "a.jpg") == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_damage_inside_is_found_when_decoding(tmp_path):
    photo().save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    assert refused(tmp_path / "a.png") == "corrupt"


def test_paths_stay_below_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True), outside.mkdir()
    photo().save(outside / "a.png"), photo().save(root / "inner" / "a.png")
    os.symlink(outside / "a.png", root / "link.png")
    os.symlink(outside, root / "folder")
    os.symlink(root / "inner" / "a.png", root / "good.png")
    (tmp_path / "rootlike").mkdir(), photo().save(tmp_path / "rootlike" / "a.png")
    for path in ["../outside/a.png", str(outside / "a.png"), "link.png", "folder/a.png", "inner/../../outside/a.png", "../rootlike/a.png"]:
        assert refused(path, root) == "outside_root", path
    for path in ["inner/a.png", "inner/../inner/a.png", "good.png", str(root / "inner" / "a.png")]:
        assert load_picture(path, LIMITS, root).size == (40, 30)
    for path in ["..%2foutside%2fa.png", "none.png"]:
        assert refused(path, root) == "missing", path
    assert refused("file:///etc/passwd", root) == "outside_root"
    assert refused("http://host/a.png", root) == "not_downloaded"
    assert refused("inner", root) == "not_a_file"
    assert inspect_picture("a\0b.png", LIMITS, root).reason == "not_a_file"
    assert inspect_picture("x" * 5000, LIMITS, root).reason == "base64"
    assert inspect_picture("x." * 2500, LIMITS, root).reason in ("unreadable", "not_a_file")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path / "pipe.png") == "not_a_file"


def test_bytes_formats_and_names(tmp_path):
    photo().save(tmp_path / "big.png")
    assert refused(tmp_path / "big.png", limits=PictureLimits(max_bytes=100)) == "too_many_bytes"
    photo().save(tmp_path / "really_bmp.jpg", format="BMP")
    assert refused(tmp_path / "really_bmp.jpg", limits=PictureLimits(formats=("JPEG", "PNG"))) == "format"
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert refused(tmp_path / "text.jpg") == "format"
    assert refused(tmp_path / "empty.jpg") == "empty"
    assert load_picture(tmp_path / "really_bmp.jpg", LIMITS).size == (40, 30)
    photo().save(tmp_path / "really_png.jpg", format="PNG")  # the content decides, not the name
    assert load_picture(tmp_path / "really_png.jpg", LIMITS).size == (40, 30)
    with pytest.raises(ValidationError):
        PictureLimits(formats=("JPEG", "EPS"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_read_unless_the_configuration_refuses_it(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    path = tmp_path / f"moving.{kind.lower()}"
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, **options)
    assert refused(path, limits=PictureLimits(animated="refuse")) == "animated"
    first = load_picture(path, LIMITS)
    assert first.mode == "RGB" and np.abs(np.array(first.getpixel((4, 4))) - (255, 0, 0)).max() <= 3
    frames[0].save(path, **options)
    assert load_picture(path, PictureLimits(animated="refuse")).size == (16, 16)


def test_every_colour_model_becomes_rgb_on_white(tmp_path):
    def loaded(picture: Image.Image, name: str, **options) -> tuple[int, ...]:
        picture.save(tmp_path / name, **options)
        found = load_picture(tmp_path / name, LIMITS)
        assert found.mode == "RGB"
        return found.getpixel((1, 1))

    assert loaded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "clear.png") == (255, 255, 255)
    assert loaded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "half.png") == (127, 127, 127)
    assert loaded(Image.new("LA", (4, 4), (0, 0)), "grey_clear.png") == (255, 255, 255)
    assert loaded(Image.new("L", (4, 4), 77), "grey.png") == (77, 77, 77)
    assert loaded(Image.new("L", (4, 4), 77), "keyed.png", transparency=77) == (255, 255, 255)
    palette = Image.new("RGB", (4, 4), "lime").quantize(4)
    assert loaded(palette, "palette.png") == (0, 255, 0)
    assert loaded(palette, "palette_clear.png", transparency=palette.getpixel((1, 1))) == (255, 255, 255)
    assert loaded(Image.new("1", (4, 4), 1), "bit.png") == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert loaded(deep, "deep.png") == (128, 128, 128)
    red, green, blue = loaded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "print.jpg", quality=95)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_orientation_is_applied_and_damaged_exif_is_ignored(tmp_path):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste((255, 0, 0), (0, 0, 20, 20))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise: left becomes top
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = load_picture(tmp_path / "turned.jpg", LIMITS)
    assert found.size == (20, 40)
    assert found.getpixel((10, 5))[1] < 30 and found.getpixel((10, 35))[1] > 225
    picture.save(tmp_path / "damaged.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert load_picture(tmp_path / "damaged.jpg", LIMITS).size == (40, 20)


def test_a_jpeg_with_a_preview_frame_is_one_picture(tmp_path):
    photo().save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[photo(8, 8)])
    assert load_picture("phone.jpg", LIMITS, tmp_path).size == (40, 30)
    assert inspect_picture("phone.jpg", LIMITS, tmp_path).reason is None


def test_the_hash_is_of_the_bytes(tmp_path):
    photo().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data)
    for name in ("a.png", "b.png"):
        assert inspect_picture(name, LIMITS, tmp_path).sha256 == hashlib.sha256(data).hexdigest()
    assert inspect_picture("../a.png", LIMITS, tmp_path / "none").sha256 == hashlib.sha256(b"outside_root").hexdigest()
