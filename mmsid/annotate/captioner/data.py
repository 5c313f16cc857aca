"""Pictures decoded once to a uint8 memory map, with the texts to be written and the labels to be read for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
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

CHUNK = 500  # cards drawn from one generator; fixed, so that a set is a prefix of every larger one with the same seed


class Targets(Section):
    """What is to be said about a catalogue's pictures.

    table: parquet, jsonl or csv with `item_id`, the columns of `fields`, and optionally caption, interests (JSON text) and boxes (JSON:
    element -> [x0, y0, x1, y1] in px of the original picture); null reads them from the catalogue's own item table.
    caption_column: null makes captions from the template. held_out_column: boolean; null splits by the hash of the picture's bytes, so
    that exact duplicates fall on one side.
    """

    table: Path | None = None
    caption_column: str | None = None
    interests_column: str | None = None
    boxes_column: str | None = None
    held_out_column: str | None = None
    held_out_share: float = 0.2


@dataclass
class PictureSet:
    """N pictures of side S with E boxed elements.

    pictures: uint8 (N, S, S, 3), usually a memory map. captions: the text per picture. interests: JSON text, or None where there is none.
    values: field -> N strings ("" where unknown). boxes: float32 (N, E, 4) in px of the resized picture, ends exclusive, NaN where
    there is none; None for photographs. held_out: bool (N,), never trained on. keys: what identifies a picture's content, N strings.
    item_ids: whose picture it is, N strings ("" for drawn cards, which belong to no catalogue).
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
        """Row numbers of one side of the split."""
        return np.flatnonzero(self.held_out == held_out)


def answer(text: str) -> str:
    """The record that the caption prompt asks for."""
    return json.dumps({"caption": text}, ensure_ascii=False)


def drawn_facts(number: int, seed: int, held_out: bool) -> Iterator[demo.CardFacts]:
    """The facts of a drawn set, without drawing: the first part of each chunk's generator stream."""
    for chunk in range(0, number, CHUNK):
        yield from _chunk_facts(seed, chunk // CHUNK, held_out)[: number - chunk]


def _chunk_facts(seed: int, chunk: int, held_out: bool) -> list[demo.CardFacts]:
    rng = np.random.default_rng([seed, int(held_out), chunk, 0])
    return [demo.random_facts(rng, held_out_triples=held_out) for _ in range(CHUNK)]


def _draw_chunk(task: tuple[int, int, bool, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, chunk, held_out, number = task
    rng = np.random.default_rng([seed, int(held_out), chunk, 1])
    cards = [draw_card(facts, rng) for facts in _chunk_facts(seed, chunk, held_out)[:number]]
    pictures = np.stack([np.asarray(card.image) for card in cards])
    boxes = np.array([list(card.boxes.values()) for card in cards], dtype=np.float32)
    return pictures, boxes


def draw_set(folder: Path, number: int, seed: int, held_out: bool = False, workers: int = 1) -> PictureSet:
    """`number` freshly drawn cards of training triples (or of held-out ones), kept in `folder` and reused when they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"drawn_{seed}_{'held' if held_out else 'train'}_{number}"
    pictures_path, boxes_path = stem.with_suffix(".pictures.npy"), stem.with_suffix(".boxes.npy")
    if not boxes_path.exists():
        size = np.asarray(draw_card(next(drawn_facts(1, seed, held_out)), np.random.default_rng(0)).image).shape
        pictures = np.lib.format.open_memmap(pictures_path, mode="w+", dtype=np.uint8, shape=(number, *size))
        boxes = np.empty((number, 5, 4), dtype=np.float32)
        tasks = [(seed, start // CHUNK, held_out, min(CHUNK, number - start)) for start in range(0, number, CHUNK)]
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None
        try:
            drawn = pool.map(_draw_chunk, tasks) if pool else map(_draw_chunk, tasks)
            for task, (some, their_boxes) in zip(tasks, track(drawn, "draw cards", total=len(tasks), unit="chunks"), strict=True):
                rows = slice(task[1] * CHUNK, task[1] * CHUNK + task[3])
                pictures[rows], boxes[rows] = some, their_boxes
        finally:
            if pool:
                pool.shutdown()
        pictures.flush()
        np.save(boxes_path, boxes)
    facts = list(drawn_facts(number, seed, held_out))
    fields = {name: [str(asdict(f)[name]) for f in facts] for name in demo.PICTURE_FIELDS}
    return PictureSet(
        pictures=np.load(pictures_path, mmap_mode="r"),
        captions=[demo.caption(f) for f in facts],
        interests=[json.dumps(demo.interests(f)) for f in facts],
        values=fields,
        boxes=np.load(boxes_path),
        elements=("product", "brand", "tens", "units", "headline"),
        held_out=np.full(number, held_out),
        keys=[f"{seed}/{held_out}/{row}" for row in range(number)],
        item_ids=[""] * number,
    )


def catalog_set(
    catalog: CatalogConfig, targets: Targets, fields: Sequence[str], caption_template: str, side: int, folder: Path, seed: int
) -> PictureSet:
    """Every creative of a catalogue, resized to `side` squared, with what its targets table says about its item.

    A list (genres) is spoken and learnt as its values joined by ", ". A picture that cannot be decoded and an item without targets are
    left out.

    Raises:
        CatalogError: a named column is absent, or nothing is left to train on.
    """
    items = read_catalog(catalog.model_copy(update={"sequences": None})).items  # in canonical order, cut to max_items
    table_path = targets.table or catalog.items
    id_column = catalog.fields.group_by or catalog.fields.item_id
    optional = [targets.caption_column, targets.interests_column, targets.boxes_column, targets.held_out_column]
    template = CaptionTemplate(caption_template)
    spoken = [] if targets.caption_column else template.fields
    needed = list(dict.fromkeys([id_column, *fields, *spoken, *[column for column in optional if column]]))
    table = read_table_rows(table_path, needed, config_key="train_captioner.targets.table")
    for column in needed:
        if column not in table.columns:
            raise CatalogError(
                f"{table_path} has no column {column!r}, which train_captioner.targets needs; its columns are "
                f"{', '.join(map(str, table.columns))}; correct `targets` or `fields`"
            )
    cells = Cells(table, catalog.fields.list_separator)
    row_of = {cells.text(index, id_column): index for index in range(len(table.rows))}
    chosen = [(path, row_of[item.item_id], item.item_id) for item in items if item.item_id in row_of for path in item.images]
    known = [(path, row, item_id) for path, row, item_id in chosen if all(cells.texts(row, field) for field in spoken)]
    pictures, decoded = _decode([path for path, _, _ in known], catalog.pictures, side, folder)
    if not decoded:
        raise CatalogError(
            f"{table_path}: none of its rows has a readable picture and the fields {list(fields)}; check `item_id` and `fields`"
        )
    kept = [(known[place][1], key) for place, key, _, _ in decoded]
    boxes, elements = None, ()
    if targets.boxes_column:
        found = [json.loads(cells.text(row, targets.boxes_column) or "{}") for row, _ in kept]
        elements = tuple(dict.fromkeys(element for each in found for element in each))
        nothing = [float("nan")] * 4
        boxes = np.array([[each.get(element, nothing) for element in elements] for each in found], dtype=np.float32)
        boxes *= np.array([[[side / width, side / height] * 2] for _, _, width, height in decoded], dtype=np.float32)
    values = {field: [", ".join(cells.texts(row, field)) for row, _ in kept] for field in dict.fromkeys([*fields, *spoken])}
    if targets.caption_column:
        captions = [cells.text(row, targets.caption_column) for row, _ in kept]
    else:
        captions = [template.write({field: values[field][place] for field in template.fields}) for place in range(len(kept))]
    interests = [cells.text(row, targets.interests_column) or None if targets.interests_column else None for row, _ in kept]
    if targets.held_out_column:
        held_out = np.array([cells.text(row, targets.held_out_column).lower() in ("true", "1") for row, _ in kept])
    else:
        held_out = np.array([int(sha256(f"{seed}/{key}")[:8], 16) / 2**32 < targets.held_out_share for _, key in kept])
    return PictureSet(
        pictures=pictures,
        captions=captions,
        interests=interests,
        values=values,
        boxes=boxes,
        elements=elements,
        held_out=held_out,
        keys=[key for _, key in kept],
        item_ids=[known[place][2] for place, _, _, _ in decoded],
    )


def _decode(paths: Sequence[Path], limits: PictureLimits, side: int, folder: Path) -> tuple[np.ndarray, list[tuple[int, str, int, int]]]:
    """Pictures resized to `side` squared, and per kept picture its place in `paths`, hash of its bytes, original width and height.

    What another rank or an earlier, interrupted run has decoded into `folder` is used again."""
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
            kept.append((place, file_sha256(path), picture.width, picture.height))
        pictures.flush()
        write_json(done, kept)
    kept = [tuple(each) for each in read_json(done)]
    return np.load(folder / "catalog.npy", mmap_mode="r")[: len(kept)], kept
