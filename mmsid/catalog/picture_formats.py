"""Format of a picture file by its first bytes, and the search for its end mark. Nothing is decoded here."""

from __future__ import annotations

import re

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"MM\0\x2a": "TIFF",
    b"II\x2a\0": "TIFF",
    b"MM\0\x2b": "TIFF",  # BigTIFF
    b"II\x2b\0": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG2000",  # codestream without a container
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body|script|title|meta)\b", re.IGNORECASE)
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_LOOKED_AT = 2_000  # bytes at the start of a file in which the tags of web pages and drawings are searched


def picture_format(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes announce, or None if no supported format begins like this."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = _brands(data)
        return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else None
    name = next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)
    if name == "BMP" and int.from_bytes(data[14:18], "little") not in _BMP_HEADER_SIZES:  # BM alone begins many texts
        return None
    return name


def _brands(data: bytes) -> set[bytes]:
    size = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, size, 4))}


def other_content(data: bytes) -> str:
    """Code of a file that is no picture: `empty`, `html`, `svg`, `lfs_pointer`, or `format` for anything else."""
    if not data:
        return "empty"
    if data.startswith(_LFS_POINTER):
        return "lfs_pointer"
    start = data[:_LOOKED_AT]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        start = start.decode("utf-16", "replace").encode()
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        html, svg = _HTML.search(text), _SVG.search(text)
        if svg and not (html and html.start() < svg.start()):
            return "svg"
        if html:
            return "html"
    return "format"


def is_truncated(data: bytes) -> bool:
    """Whether the end of a picture file is missing, by the end mark or the sizes that its container declares.

    A TIFF file has no end mark. `tiff_is_truncated` looks at its directory instead.
    """
    check = _CHECKS.get(picture_format(data) or "")
    return check is not None and check(data)


def tiff_is_truncated(tags: dict[int, object], size: int) -> bool:
    """Whether a strip or tile of a TIFF file ends behind its `size` in bytes. `tags` is the first directory."""
    for offsets, counts in ((273, 279), (324, 325)):
        if offsets in tags and counts in tags:
            ends = [at + count for at, count in zip(_numbers(tags[offsets]), _numbers(tags[counts]))]
            return max(ends, default=0) > size
    return False


def _numbers(value: object) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _jpeg_is_truncated(data: bytes) -> bool:
    return data.rfind(b"\xff\xd9") < _jpeg_scan_start(data)


def _jpeg_scan_start(data: bytes) -> int:
    """Offset of the first scan. An end mark before it belongs to an embedded thumbnail."""
    offset = 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xDA:
            return offset
        if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker == 0x01:  # fill byte, or a marker without a length
            offset += 1 if marker == 0xFF else 2
        else:
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return len(data)


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Kind, start and end of each complete chunk of a PNG file."""
    chunks, offset = [], 8
    while offset + 12 <= len(data):
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        if end > len(data):
            break
        chunks.append((data[offset + 4 : offset + 8], offset, end))
        offset = end
    return chunks


def png_without_comments(data: bytes) -> bytes:
    """The PNG file without texts and colour profile, which do not change the decoded picture and may be too large for Pillow."""
    dropped = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
    return data[:8] + b"".join(data[start:end] for kind, start, end in png_chunks(data) if kind not in dropped)


def _png_is_truncated(data: bytes) -> bool:
    offset = 8
    while offset + 12 <= len(data):
        if data[offset + 4 : offset + 8] == b"IEND":
            return False
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
    return True


def _webp_is_truncated(data: bytes) -> bool:
    return len(data) < int.from_bytes(data[4:8], "little") + 8


def _gif_is_truncated(data: bytes) -> bool:
    """Whether a block is cut, or the file ends before its first frame. Some writers leave out the final mark."""
    if len(data) < 13:
        return True
    offset = 13 + _gif_palette(data[10])
    frames = 0
    while offset < len(data) and data[offset] != 0x3B:
        if data[offset] == 0x21:  # extension: label, blocks
            offset += 2
        elif data[offset] == 0x2C and offset + 10 <= len(data):  # frame: descriptor, palette, code size, blocks
            offset += 11 + _gif_palette(data[offset + 9])
            frames += 1
        else:
            return data[offset] == 0x2C or not frames  # unknown bytes behind the frames do not matter
        while offset < len(data) and data[offset]:
            offset += 1 + data[offset]
        if offset >= len(data):
            return True
        offset += 1
    return not frames


def _gif_palette(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _bmp_is_truncated(data: bytes) -> bool:
    def number(at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "little", signed=size == 4)

    if len(data) < 26:
        return True
    if number(14) == 12:  # OS/2
        width, height, bits, compression = number(18, 2), number(20, 2), number(24, 2), 0
    else:
        width, height, bits, compression = number(18), number(22), number(28, 2), number(30)
    start = number(10)
    if compression in (1, 2):  # run lengths: the size is declared, or unknown
        return len(data) < start + number(34)
    return len(data) < start + (width * bits + 31) // 32 * 4 * abs(height)


def _jpeg2000_is_truncated(data: bytes) -> bool:
    if data.startswith(b"\0\0\0\x0c"):
        boxes, complete = _boxes(data)
        if not complete or b"jp2c" not in boxes:
            return True
        data = data[boxes[b"jp2c"][0] : boxes[b"jp2c"][1]]
    return data.rfind(b"\xff\xd9") <= data.find(b"\xff\x93")  # the end mark cannot occur inside packets


def _heif_is_truncated(data: bytes) -> bool:
    boxes, complete = _boxes(data)
    return not complete or b"meta" not in boxes or (b"mdat" not in boxes and b"idat" not in data)


def _boxes(data: bytes) -> tuple[dict[bytes, tuple[int, int]], bool]:
    """Kind -> (start, end) of the top boxes of an ISO media file, and whether the last one is complete."""
    boxes: dict[bytes, tuple[int, int]] = {}
    offset = 0
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        end = offset + size if size else len(data)  # 0: to the end of the file
        if 0 < size < 8:
            return boxes, bool(boxes)  # no box: bytes behind the end
        if end > len(data):
            return boxes, False
        boxes.setdefault(data[offset + 4 : offset + 8], (offset, end))
        offset = end
    return boxes, True


_CHECKS = {
    "JPEG": _jpeg_is_truncated,
    "PNG": _png_is_truncated,
    "WEBP": _webp_is_truncated,
    "GIF": _gif_is_truncated,
    "BMP": _bmp_is_truncated,
    "JPEG2000": _jpeg2000_is_truncated,
    "AVIF": _heif_is_truncated,
    "HEIF": _heif_is_truncated,
}
