"""Training data of the captioner: pictures in a uint8 memory map, with captions, interests and field values.

Sources are freshly drawn demo cards (`draw_set`) and the pictures of a catalogue (`catalog_set`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmsid.annotate.captioner.template import CaptionTemplate
from mmsid.artifacts import file_sha256, read_json, sha256, write_json
from mmsid.catalog.catalog import read_catalog
from mmsid.catalog.config import CatalogConfig, PictureLimits
from mmsid.catalog.demo import facts as demo
from mmsid.catalog.demo.cards import draw_card
from mmsid.catalog.pictures import load_picture
from mmsid.catalog.tables import Cells, read_table_rows
from mmsid.config import Section
from mmsid.errors import CatalogError, PictureError
from mmsid.progress import track

CHUNK = 500  # cards per random generator. A set is a prefix of every larger set of the same seed.
ELEMENTS = ("product", "brand", "tens", "units", "headline")  # boxed elements of a drawn card


class Targets(Section):
    """Training texts of a catalogue's pictures.

    Attributes:
        table: parquet, jsonl or csv with the item id, the fields, and the columns below. None: the items table of the catalogue.
        caption_column: captions. None: captions are written by the template.
        interests_column: interests records as JSON text. None: no interests are trained.
        held_out_share: share of the pictures that are held out, by a hash of their bytes, which keeps duplicates on one side.
    """

    table: Path | None = None
    caption_column: str | None = None
    interests_column: str | None = None
    held_out_share: float = 0.2


@dataclass
class PictureSet:
    """N pictures of S x S px with their texts.

    Attributes:
        pictures: uint8 (N, S, S, 3), usually a memory map.
        captions: one per picture.
        interests: JSON text, or None where a picture has none.
        values: field -> N strings, "" where unknown.
        boxes: float32 (N, E, 4), x0, y0, x1, y1 in px with exclusive ends, NaN where an element is absent. None for catalogues.
        elements: names of the E boxed elements.
        held_out: bool (N,), pictures that are not trained on.
        keys: identify the content of a picture. Equal pictures have equal keys.
        item_ids: item of each picture, "" for drawn cards.
    """

    pictures: np.ndarray
    captions: list[str]
    interests: list[str | None]
    values: dict[str, list[str]]
    boxes: np.ndarray | None
    elements: tuple[str, ...]
    held_out: np.ndarray
    keys: list[str]
    item_ids: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def rows(self, held_out: bool) -> np.ndarray:
        """Row numbers of the held-out or of the training pictures."""
        return np.flatnonzero(self.held_out == held_out)


def caption_record(caption: str) -> str:
    """The JSON record that the caption prompt requests."""
    return json.dumps({"caption": caption}, ensure_ascii=False)


def _drawn_facts(number: int, seed: int, held_out: bool) -> Iterator[demo.CardFacts]:
    """Facts of a drawn set, without its pictures."""
    for start in range(0, number, CHUNK):
        yield from _chunk_facts(seed, start // CHUNK, held_out)[: number - start]


def _chunk_facts(seed: int, chunk: int, held_out: bool) -> list[demo.CardFacts]:
    rng = np.random.default_rng([seed, int(held_out), chunk, 0])
    return [demo.random_facts(rng, held_out_triples=held_out) for _ in range(CHUNK)]


def draw_set(folder: Path, number: int, seed: int, held_out: bool = False) -> PictureSet:
    """`number` drawn cards of training combinations, or of held-out ones. Files that exist in `folder` are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"drawn_{seed}_{'held' if held_out else 'train'}_{number}"
    pictures_path, boxes_path = stem.with_suffix(".pictures.npy"), stem.with_suffix(".boxes.npy")
    if not boxes_path.exists():
        size = np.asarray(draw_card(next(_drawn_facts(1, seed, held_out)), np.random.default_rng(0)).image).shape
        pictures = np.lib.format.open_memmap(pictures_path, mode="w+", dtype=np.uint8, shape=(number, *size))
        boxes = np.empty((number, len(ELEMENTS), 4), dtype=np.float32)
        for start in track(range(0, number, CHUNK), "draw cards", unit="chunks"):
            chunk = start // CHUNK
            rng = np.random.default_rng([seed, int(held_out), chunk, 1])
            for row, facts in enumerate(_chunk_facts(seed, chunk, held_out)[: number - start], start):
                card = draw_card(facts, rng)
                pictures[row], boxes[row] = np.asarray(card.image), list(card.boxes.values())
        pictures.flush()
        np.save(boxes_path, boxes)
    facts = list(_drawn_facts(number, seed, held_out))
    return PictureSet(
        pictures=np.load(pictures_path, mmap_mode="r"),
        captions=[demo.caption(f) for f in facts],
        interests=[json.dumps(demo.interests(f)) for f in facts],
        values={name: [str(asdict(f)[name]) for f in facts] for name in demo.PICTURE_FIELDS},
        boxes=np.load(boxes_path),
        elements=ELEMENTS,
        held_out=np.full(number, held_out),
        keys=[f"{seed}/{held_out}/{row}" for row in range(number)],
        item_ids=[""] * number,
    )


def catalog_set(
    catalog: CatalogConfig, targets: Targets, fields: Sequence[str], caption_template: str, side: int, folder: Path, seed: int
) -> PictureSet:
    """Every creative of a catalogue, resized to `side` x `side` px, with the texts of its item.

    The values of a list (genres) are joined by ", ". Pictures that cannot be decoded and items without targets are left out.

    Args:
        folder: receives the decoded pictures. Pictures that an earlier call left there are used again.
        seed: of the split into training and held-out pictures.

    Raises:
        CatalogError: a column is absent, or no picture is left to train on.
    """
    items = read_catalog(catalog.without_users()).items  # in canonical order, cut to max_items
    source = targets.table or catalog.items
    id_column = catalog.fields.group_by or catalog.fields.item_id
    template = CaptionTemplate(caption_template)
    template_fields = [] if targets.caption_column else template.fields
    optional = [column for column in (targets.caption_column, targets.interests_column) if column]
    columns = list(dict.fromkeys([id_column, *fields, *template_fields, *optional]))
    table = read_table_rows(source, columns, config_key="train_captioner.targets.table")
    for column in columns:
        if column not in table.columns:
            raise CatalogError(
                f"{table.path} has no column {column!r}, which train_captioner.targets needs; its columns are "
                f"{', '.join(map(str, table.columns))}; correct `targets` or `fields`"
            )
    cells = Cells(table, catalog.fields.list_separator)
    row_of = {cells.text(index, id_column): index for index in range(len(table.rows))}
    listed = [(path, row_of[item.item_id], item.item_id) for item in items if item.item_id in row_of for path in item.images]
    labelled = [entry for entry in listed if all(cells.texts(entry[1], field) for field in template_fields)]
    pictures, decoded = _decode([path for path, _, _ in labelled], catalog.pictures, side, folder)
    if not decoded:
        raise CatalogError(f"{table.path}: no row has a readable picture and the fields {list(fields)}; check `item_id` and `fields`")
    rows, keys = [labelled[place][1] for place, _ in decoded], [key for _, key in decoded]
    values = {field: [", ".join(cells.texts(row, field)) for row in rows] for field in dict.fromkeys([*fields, *template_fields])}
    if targets.caption_column:
        captions = [cells.text(row, targets.caption_column) for row in rows]
    else:
        captions = [template.write({field: values[field][place] for field in template.fields}) for place in range(len(rows))]
    return PictureSet(
        pictures=pictures,
        captions=captions,
        interests=[cells.text(row, targets.interests_column) or None if targets.interests_column else None for row in rows],
        values=values,
        boxes=None,
        elements=(),
        held_out=np.array([int(sha256(f"{seed}/{key}")[:8], 16) / 2**32 < targets.held_out_share for key in keys]),
        keys=keys,
        item_ids=[labelled[place][2] for place, _ in decoded],
    )


def _decode(paths: Sequence[Path], limits: PictureLimits, side: int, folder: Path) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Pictures resized to `side` x `side` px, and for each its position in `paths` and the hash of its bytes.

    Pictures that another rank or an interrupted run decoded into `folder` are used again.
    """
    done = folder / "catalog.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pictures = np.lib.format.open_memmap(folder / "catalog.npy", mode="w+", dtype=np.uint8, shape=(max(1, len(paths)), side, side, 3))
        kept = []
        for place, path in enumerate(track(paths, "decode pictures", unit="pictures")):
            try:
                picture = load_picture(path, limits)
            except PictureError:
                continue
            pictures[len(kept)] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
            kept.append((place, file_sha256(path)))
        pictures.flush()
        write_json(done, kept)
    kept = [tuple(entry) for entry in read_json(done)]
    return np.load(folder / "catalog.npy", mmap_mode="r")[: len(kept)], kept
