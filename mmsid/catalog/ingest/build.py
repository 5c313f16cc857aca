"""Files of an ingested catalogue, made from the user's sources.

The rows pass through three steps, each with bounded memory: parts in the order of the sources, the order by content, the final files.
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.arrow_files import CHUNK_ROWS, reordered, write_arrow
from mmsid.catalog.canonical_order import break_ties
from mmsid.catalog.config import CatalogConfig
from mmsid.catalog.fields import FieldMapping, has_integer_ids, item_fields, resolve_mapping
from mmsid.catalog.histories import Histories
from mmsid.catalog.history_order import sorted_by_content
from mmsid.catalog.ingest.built import Built
from mmsid.catalog.ingest.index import RowIndex
from mmsid.catalog.ingest.merging import merged_groups
from mmsid.catalog.ingest.on_ray import inspected_on_ray
from mmsid.catalog.ingest.rows import PictureMemory, part_rows
from mmsid.catalog.ingest.writing import CatalogWriter
from mmsid.catalog.logs.item_ids import ROUNDED
from mmsid.catalog.logs.read import read_histories
from mmsid.catalog.picture_sources.downloads import Downloader
from mmsid.catalog.picture_sources.inspection import inspect_pictures
from mmsid.catalog.pictures import InspectedPicture
from mmsid.catalog.sources import OpenedTable, open_table
from mmsid.catalog.vectors import ItemVectors, concatenated, read_vectors
from mmsid.errors import CatalogError
from mmsid.progress import track
from mmsid.ray_pool import RayConfig

PARTS, MERGED, SCRATCH = "parts", "merged", "scratch"  # folders of unfinished work
_SILENT_ROWS = 10_000  # a table with fewer rows shows no progress bar
_LARGEST_SHARE = 0.5  # of the items that have one content, above which the catalogue is suspicious
_PICTURE_ROWS = 4_096  # rows of a part whose pictures are looked at: what an interruption can lose


def build(
    config: CatalogConfig,
    folder: Path,
    max_problems: float = 0.5,
    known: dict[str, InspectedPicture] | None = None,
    ray: RayConfig | None = None,
) -> Built:
    """Write the files of an ingested catalogue into `folder`. Finished parts that the folder holds already are kept.

    Args:
        max_problems: share of the rows, or of the pictures, that may be unusable.
        known: earlier results by picture reference. A picture is not read again if its size and time are unchanged.
        ray: look at the pictures on this Ray cluster; None: on this machine.

    Raises:
        CatalogError: a source is unusable, or too many of its rows or pictures are.
    """
    table = open_table(config.items, config_key="catalog.items")
    mapping = resolve_mapping(table, config.fields, "catalog.items")
    if mapping.image and not config.root.is_dir():
        raise CatalogError(f"catalog.image_root: {config.root} is not a folder; set it to the folder with the pictures of {table.name}")
    if ray is not None and mapping.image and not (folder / PARTS).exists():
        known = inspected_on_ray(config, table, mapping, ray)
    try:
        return _build(config, folder, table, mapping, max_problems, known or {})
    except CatalogError:
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # the user will change what they were made from
        raise


def _build(
    config: CatalogConfig,
    folder: Path,
    table: OpenedTable,
    mapping: FieldMapping,
    max_problems: float,
    known: dict[str, InspectedPicture],
) -> Built:
    built = Built(not_read=mapping.not_read)
    parts, files = _write_parts(config, table, mapping, folder / PARTS, known, built)
    built.notes += [*table.notes, *mapping.notes]  # of the table: complete when it was read
    index = RowIndex.read(parts)
    built.rows = len(index)
    if mapping.group_by is not None:
        parts = _merge_parts(parts, index, folder)
        index = RowIndex.read(parts)
        built.merged = built.rows - len(index)
    unusable = index.unusable()
    _refuse_unusable_rows(files, index, unusable, max_problems)
    usable = np.ones(len(index), dtype=bool)
    usable[list(unusable)] = False
    kept = np.flatnonzero(usable)
    vectors = _vectors(config, index, kept, built)
    order, histories = _ordered(config, index, kept, built, max_problems)
    writer = CatalogWriter(folder, files, mapping, built)
    position = np.full(len(index), -1, dtype=np.int64)
    position[order] = np.arange(len(order))
    in_order = None if vectors is None else vectors.take(np.searchsorted(kept, order))
    writer.write(reordered(parts, position, folder / SCRATCH), index.content_texts, order, in_order)
    writer.quarantine(index, unusable)
    writer.finish(histories, max_problems)
    _warn_of_repeated_content(index.content, order, built)
    for name in (PARTS, MERGED, SCRATCH):
        shutil.rmtree(folder / name, ignore_errors=True)
    return built


def _write_parts(
    config: CatalogConfig, table: OpenedTable, mapping: FieldMapping, folder: Path, known: dict[str, InspectedPicture], built: Built
) -> tuple[list[Path], list[Path]]:
    """Arrow files with the rows in the order of the sources, and the files of the sources. Parts that exist are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    root = config.root.absolute()
    cache = config.picture_cache
    number_of: dict[Path, int] = {}
    rows = _PICTURE_ROWS if mapping.image else CHUNK_ROWS
    paths = []
    batches = table.batches(mapping.columns, rows)
    if (table.num_rows or _SILENT_ROWS) >= _SILENT_ROWS:
        batches = track(batches, "ingest", total=table.num_rows, unit="rows", size=len)
    with Downloader(config.pictures, cache) as downloader:  # one for all parts: it counts their bytes together
        pictures = PictureMemory(
            partial(inspect_pictures, limits=config.pictures, root=config.root, cache=cache, known=known, downloader=downloader)
        )
        built.integer_ids = True
        for number, batch in enumerate(batches):
            built.integer_ids &= has_integer_ids(batch, mapping)
            path, file = folder / f"{number:06d}.arrow", number_of.setdefault(batch.file, len(number_of))
            if not path.exists():
                fields = item_fields(batch, mapping, config.clean_text)
                write_arrow(path, part_rows(fields, file, np.asarray(batch.numbers), pictures, root))
            paths.append(path)
    return paths, list(number_of)


def _merge_parts(parts: list[Path], index: RowIndex, folder: Path) -> list[Path]:
    """Parts in which every id occurs once. Rows without id are kept as they are."""
    shutil.rmtree(folder / MERGED, ignore_errors=True)
    (folder / MERGED).mkdir()
    without_id = np.asarray(pc.is_null(index.item_ids))
    position = np.where(without_id, -1, index.id_rank)  # rows without id come last in the order of ids
    paths = []

    def add(rows: pa.Table) -> None:
        paths.append(folder / MERGED / f"{len(paths):06d}.arrow")
        write_arrow(paths[-1], rows.combine_chunks())

    for rows in merged_groups(reordered(parts, position, folder / SCRATCH)):
        add(rows)
    lost = np.where(without_id, np.cumsum(without_id) - 1, -1)
    if without_id.any():
        for rows in reordered(parts, lost, folder / SCRATCH):
            add(rows)
    return paths


def _refuse_unusable_rows(files: list[Path], index: RowIndex, unusable: dict[int, str], max_problems: float) -> None:
    if len(unusable) <= max_problems * len(index):
        return
    counts = Counter(unusable.values())
    code, count = counts.most_common(1)[0]
    rows = [f"{files[index.file[row]]}, row {index.row[row]}" for row, found in unusable.items() if found == code][:3]
    causes = {
        "no_id": "the id column is empty; correct fields.item_id",
        "duplicate_id": "ids repeat; set fields.group_by if the rows are creatives or variants of one item, or correct fields.item_id",
    }
    twice = index.item_ids.take(pa.array([row for row, found in unusable.items() if found == "duplicate_id"], pa.int64()))
    if 2 * (pc.sum(pc.match_substring_regex(twice, ROUNDED)).as_py() or 0) > len(twice):
        causes["duplicate_id"] = f"ids like {twice[0].as_py()!r} were rounded by a spreadsheet; export them again as text"
    raise CatalogError(
        f"catalog.items: {len(unusable):,} of {len(index):,} rows cannot become items, {count:,} of them as {code} ({'; '.join(rows)}); "
        f"likely cause: {causes[code]}"
    )


def _warn_of_repeated_content(content: np.ndarray, order: np.ndarray, built: Built) -> None:
    """Warn if more than half of the items share one content. `content`: (R, 4), equal rows beside each other in the order (N,)."""
    begins = np.ones(len(order) + 1, dtype=bool)  # whether the content differs from the one before; the last entry is the end
    for start in range(0, len(order), CHUNK_ROWS):
        block = content[order[start : start + CHUNK_ROWS + 1]]
        begins[start + 1 : start + len(block)] = (block[1:] != block[:-1]).any(axis=1)
    largest = int(np.diff(np.flatnonzero(begins)).max(initial=0))
    if largest < 2 or largest <= _LARGEST_SHARE * len(order):
        return
    note = (
        f"{largest:,} of {len(order):,} items have the same text, pictures, categories and attributes, and will share one Semantic ID; "
        "correct catalog.fields if they should differ"
    )
    built.notes.append(note)
    warnings.warn(f"catalog.items: {note}", stacklevel=2)


def _vectors(config: CatalogConfig, index: RowIndex, kept: np.ndarray, built: Built) -> ItemVectors | None:
    """The vectors of the rows `kept`, the families beside each other. They become a part of the content of their items."""
    if not config.vectors:
        return None
    item_ids = index.item_ids.take(pa.array(kept)).to_pylist()
    vectors = concatenated([read_vectors(path, item_ids) for path in config.vectors])
    built.problems["vector_of_unknown_item"] += vectors.unknown
    index.add_vectors(kept, vectors)
    return vectors


def _ordered(
    config: CatalogConfig, index: RowIndex, kept: np.ndarray, built: Built, max_problems: float
) -> tuple[np.ndarray, Histories | None]:
    """Rows in canonical order, and the histories of users, whose entries are positions in this order."""
    is_kept = np.zeros(len(index), dtype=bool)
    is_kept[kept] = True
    order = index.content_order()
    order = order[is_kept[order]]
    if config.users_file is None:
        return order[: config.max_items], None
    number = np.full(len(index), -1, dtype=np.int64)  # of each row among those kept
    number[kept] = np.arange(len(kept))
    rank = np.empty(len(kept), dtype=np.int64)
    rank[number[order]] = np.arange(len(order))
    item_ids = index.item_ids.take(pa.array(kept))
    histories = read_histories(config, item_ids, rank, built.history_problems, built.notes, max_unknown=max_problems)
    built.integer_user_ids = histories.integer_user_ids
    ranks = index.id_rank[kept]
    order = kept[break_ties(number[order], index.content[kept], ranks, histories, lambda: index.content_texts(kept))]
    order = order[: config.max_items]
    place = np.full(len(kept), -1, dtype=np.int64)
    place[number[order]] = np.arange(len(order))
    everyone = pa.concat_arrays([histories.user_ids, histories.without_items])
    known = histories.mapped(place)
    histories = sorted_by_content(known, index.content_texts(order))[: config.max_users]
    histories.without_items = everyone.filter(pc.invert(pc.is_in(everyone, known.user_ids))).sort()
    built.history_problems["repeated_item"] += int(histories.repeated().sum())
    return order, histories
