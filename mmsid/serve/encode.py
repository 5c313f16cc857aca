"""Command `mmsid encode`: caption, interests, Semantic ID and nearest ads of new ads, from a picture, a folder of pictures or a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mmsid.catalog import PictureLimits
from mmsid.catalog.picture_formats import picture_format
from mmsid.catalog.tables import Cells, Table, table_pieces
from mmsid.errors import CatalogError, ConfigError, MmsidError, PictureError
from mmsid.progress import done, show
from mmsid.serve.ads import Ad, read_ad
from mmsid.serve.engine import EncodedAd, Engine
from mmsid.serve.views import encoded_view

ROWS = 32  # ads that are held at once
COLUMNS = ("item_id", "title", "description", "caption", "image", "images", "categories", "attributes", "interests")
_LISTS = ("image", "images", "categories", "interests")


@dataclass(frozen=True)
class Given:
    """One ad as it was given: its place for messages, its record, the folder of its pictures, or the reason why it cannot be read."""

    place: str
    record: Mapping[str, Any]
    folder: Path | None
    reason: str | None = None


def run(
    bundle: Path, images: Sequence[Path], table: Path | None, texts: Mapping[str, Any], *, k: int, captions: bool, as_json: bool
) -> dict[str, int]:
    """Encode ads and print one block of text, or one JSON line, for each. -> counts, in = ok + quarantined.

    Args:
        images: picture files and folders of pictures.
        table: table of ads with the columns `COLUMNS`; relative paths of pictures start at its folder.
        texts: keys of the ad in `images`, if that is one file, or of an ad without picture.

    Raises:
        ArtifactError: the bundle cannot be used.
        CatalogError: a file does not exist or is no table.
        ConfigError: nothing to encode, or texts for several pictures.
    """
    total, given = _given(images, table, texts)
    engine = Engine(bundle, captions=captions)
    counts = {"in": 0, "ok": 0, "quarantined": 0}
    rows = iter(given)
    while piece := [one for _, one in zip(range(ROWS), rows)]:
        for one, found in zip(piece, _encoded(engine, piece), strict=True):
            counts["in"] += 1
            counts["ok" if isinstance(found, EncodedAd) else "quarantined"] += 1
            _print(engine, one, found, k, as_json)
    if not as_json:
        for note in engine.notes:
            done(f"encode: {note}")
    if total != 1:
        done(f"encode: {counts['in']:,} ads = {counts['ok']:,} ok + {counts['quarantined']:,} quarantined")
    return counts


def _encoded(engine: Engine, piece: Sequence[Given]) -> list[EncodedAd | str]:
    """Per ad, its encoding or the reason why it has none."""
    limits, found = PictureLimits(), {}
    ads: dict[int, Ad] = {}
    for at, one in enumerate(piece):
        try:
            if one.reason is not None:
                raise CatalogError(one.reason)
            ads[at] = read_ad(one.record, limits, one.place, clean_text=engine.clean_text, folder=one.folder)
        except (CatalogError, PictureError) as error:
            found[at] = str(error)
    try:
        found |= dict(zip(ads, engine.encode(list(ads.values())), strict=True))
    except MmsidError:  # one of them cannot be encoded: find out which
        for at, ad in ads.items():
            try:
                found[at] = engine.encode([ad])[0]
            except MmsidError as error:
                found[at] = str(error)
    return [found[at] for at in range(len(piece))]


def _given(images: Sequence[Path], table: Path | None, texts: Mapping[str, Any]) -> tuple[int, Iterator[Given]]:
    files = list(chain.from_iterable(_files(path) for path in images))
    if texts and (len(files) > 1 or table is not None or any(path.is_dir() for path in images)):
        raise ConfigError("encode: --title and other texts are those of one ad; give several ads as a table (--table)")
    if not (files or texts or table is not None):
        raise ConfigError("encode: nothing to encode; give --image FILE or FOLDER, --title TEXT, or --table FILE")
    alone = [Given("the ad", texts, None)] if texts and not files else []
    pictures = (Given(str(path), {"item_id": path.stem, **texts, "image": path.name}, path.parent) for path in files)
    if table is None:
        return len(files) + len(alone), chain(pictures, alone)
    rows, pieces = table_pieces(table, COLUMNS, ROWS, config_key="--table")
    return len(files) + rows, chain(pictures, chain.from_iterable(_rows(piece, table) for piece in pieces))


def _files(path: Path) -> list[Path]:
    """The file itself, or the picture files of a folder in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CatalogError(f"--image {path} does not exist; give a picture file or a folder of pictures")
    found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".") and _looks_like_picture(file)]
    if not found:
        raise CatalogError(f"--image {path} holds no picture files; give a folder with pictures")
    return found


def _looks_like_picture(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return picture_format(head) is not None or path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".heic")


def _rows(piece: Table, table: Path) -> Iterator[Given]:
    cells, folder = Cells(piece, "|"), table.absolute().parent
    if not set(COLUMNS) & set(piece.columns):
        raise CatalogError(f"{table}: none of the columns {', '.join(COLUMNS)} (found {', '.join(piece.columns)}); rename the columns")
    for index in range(len(piece.rows)):
        place = piece.place(index)
        try:
            yield Given(place, _record(piece, cells, index), folder)
        except CatalogError as error:
            yield Given(place, {}, None, str(error))


def _record(piece: Table, cells: Cells, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in COLUMNS:
        value = piece.rows[index].get(name)
        if value is None:
            continue
        if name == "attributes":
            found[name] = cells.mapping(index, name) or {}
        elif name in ("image", "images"):
            found.setdefault("images", []).extend([value] if isinstance(value, (bytes, dict)) else cells.texts(index, name))
        else:
            found[name] = cells.texts(index, name) if name in _LISTS else cells.text(index, name)
    return found


def _print(engine: Engine, given: Given, found: EncodedAd | str, k: int, as_json: bool) -> None:
    item_id = str(given.record.get("item_id", "") or "")
    if isinstance(found, str):
        if as_json:
            show(json.dumps({"item_id": item_id or None, "status": "quarantined", "reason": found}, ensure_ascii=False))
        else:
            show(f"{item_id or given.place}\n  quarantined  {found}\n")
        return
    view = encoded_view(engine, found, k)
    if as_json:
        show(json.dumps({"status": "ok", **view}, ensure_ascii=False))
        return
    lines = [f"{item_id or given.place}  {view['title']}".rstrip()]
    lines.append(f"  caption    {view['caption'] or '-'}")
    mined = ", ".join(f"{one['descriptor']} {one['confidence']:.2f}" for one in view["interests"])
    lines.append(f"  interests  {mined or '-'}" + (f" ({view['summary']})" if view["summary"] else ""))
    lines.append(f"  SID        {' '.join(view['sid'])}  (margin {view['margin']:.2f} nats)")
    for step in view["path"]:
        examples = ", ".join(one["title"] or one["item_id"] for one in step["examples"][:3])
        lines.append(f"    {step['token']:8} {step['items']:,} items{': ' if examples else ''}{examples}")
    for place, one in enumerate(view["nearest"]):
        name = "nearest" if place == 0 else ""
        lines.append(f"  {name:10} {one['similarity']:.3f}  {one['item_id']}  {one['title']}  {' '.join(one['sid'])}")
    lines += [f"  note       {note}" for note in found.texts.notes]
    show("\n".join(lines) + "\n")
