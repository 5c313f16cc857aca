"""Final files of an ingested catalogue: `items.arrow`, `problems.parquet`, `histories/`, `vectors.npy`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmsid.catalog.fields import FieldMapping
from mmsid.catalog.histories import Histories
from mmsid.catalog.history_order import update_hash
from mmsid.catalog.ingest.built import Built
from mmsid.catalog.ingest.index import RowIndex
from mmsid.catalog.ingest.rows import PART_SCHEMA, with_problems
from mmsid.catalog.item_table import SCHEMA, lengths, texts
from mmsid.catalog.logs.item_ids import ROUNDED
from mmsid.catalog.picture_sources.reasons import REASONS
from mmsid.catalog.vectors import ItemVectors
from mmsid.errors import CatalogError

ITEMS, PROBLEMS, HISTORIES, VECTORS, PRESENT = "items.arrow", "problems.parquet", "histories", "vectors.npy", "vectors_present.npy"
_PROBLEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.large_string()),
        ("code", pa.large_string()),
        ("detail", pa.large_string()),
        ("file", pa.large_string()),
        ("row", pa.int64()),
        ("quarantined", pa.bool_()),
    ]
)
_EXAMPLES = 3


class CatalogWriter:
    """Writes the items in canonical order, chunk by chunk, and what is derived from them."""

    def __init__(self, folder: Path, files: Sequence[Path], mapping: FieldMapping, built: Built) -> None:
        self._folder, self._files, self._built = folder, [str(path) for path in files], built
        self._required = [("no_title", mapping.title), ("no_description", mapping.description), ("no_categories", mapping.categories)]
        self._required.append(("no_picture", mapping.image))
        self._digest = hashlib.sha256()
        self._problems = pq.ParquetWriter(folder / PROBLEMS, _PROBLEM_SCHEMA, compression="zstd", write_page_checksum=True)
        self._pictures = self._refused = 0
        self._examples: dict[str, list[str]] = {}
        self._reasons: Counter[str] = Counter()
        self._has_content = False

    def write(
        self,
        chunks: Iterable[pa.Table],
        hashes: Callable[[np.ndarray], list[str]],
        order: np.ndarray,
        vectors: ItemVectors | None,
    ) -> None:
        """Write all items.

        Args:
            chunks: rows with the columns `PART_SCHEMA` in canonical order, N together.
            hashes: content hashes (hex) of source rows.
            order: (N,) source row of each item.
            vectors: vectors of the N items, or None.
        """
        first = 0
        with pa.OSFile(str(self._folder / ITEMS), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
            for chunk in chunks:
                here = slice(first, first + chunk.num_rows)
                first += chunk.num_rows
                if vectors is not None:
                    content = pa.array(hashes(order[here]), pa.large_string())
                    chunk = chunk.set_column(PART_SCHEMA.get_field_index("content_sha256"), "content_sha256", content)
                file.write_table(self._item_rows(chunk, None if vectors is None else vectors.present[here]))
        if vectors is not None:
            np.save(self._folder / VECTORS, vectors.values)
            np.save(self._folder / PRESENT, vectors.present)
            self._built.vector_widths = vectors.widths
        self._built.items = len(order)

    def _item_rows(self, chunk: pa.Table, present: np.ndarray | None) -> pa.Table:
        """The final rows of a chunk, whose hashes, problems and pictures enter the counts."""
        missing = {
            "no_title": np.asarray(pc.equal(chunk["title"], "")),
            "no_description": np.asarray(pc.equal(chunk["description"], "")),
            "no_categories": lengths(chunk["categories"]) == 0,
            "no_picture": lengths(chunk["creatives"]) == 0,
        }
        has_content = ~(np.logical_and.reduce(list(missing.values())) & (lengths(chunk["attributes"]) == 0))
        has_content = has_content if present is None else has_content | present
        self._has_content |= bool(has_content.any())
        codes = [(code, missing[code]) for code, mapped in self._required if mapped]
        codes += [] if present is None else [("no_vector", ~present)]
        found = [(int(row), code) for code, rows in codes for row in np.flatnonzero(rows)]
        found.sort(key=lambda one: one[0])  # stable, so that the codes of a row keep their order
        rows = np.array([row for row, _ in found], dtype=np.int64)
        problems = with_problems(chunk["problems"], rows, [(code, "") for _, code in found])
        chunk = chunk.set_column(PART_SCHEMA.get_field_index("problems"), "problems", problems)
        self._count(chunk)
        lines = zip(texts(chunk["item_id"]), texts(chunk["content_sha256"]), strict=True)
        self._digest.update("".join(f"{item_id}\n{content}\n" for item_id, content in lines).encode())
        return chunk.select(SCHEMA.names).cast(SCHEMA).combine_chunks()

    def _count(self, chunk: pa.Table) -> None:
        creatives = chunk["creatives"].combine_chunks().flatten()
        self._built.formats.update(texts(pc.struct_field(creatives, "format")))
        self._pictures += int(lengths(chunk["picture_sha256"]).sum())
        row_of = np.repeat(np.arange(chunk.num_rows), lengths(chunk["problems"]))
        if not len(row_of):
            return
        values = chunk["problems"].combine_chunks().flatten()
        codes, details = (texts(pc.struct_field(values, name)) for name in ("code", "detail"))
        self._built.problems.update(codes)
        rows = chunk.take(pa.array(row_of))
        self._write_problems(texts(rows["item_id"]), codes, details, texts(rows["file"]), texts(rows["row"]), quarantined=False)
        for code, detail in zip(codes, details):
            if code.startswith("picture_"):
                self._refused += 1
                self._reasons[code] += 1
                examples = self._examples.setdefault(code, [])
                if len(examples) < _EXAMPLES:
                    examples.append(detail)

    def quarantine(self, index: RowIndex, unusable: dict[int, str]) -> None:
        """Record the rows that became no item."""
        rows = sorted(unusable)
        self._built.quarantined = len(rows)
        self._built.problems.update(unusable.values())
        ids = index.item_ids.take(pa.array(rows, pa.int64())).to_pylist()
        found = [unusable[row] for row in rows]
        details = ["rounded by a spreadsheet" if item_id and re.search(ROUNDED, item_id) else "" for item_id in ids]
        self._write_problems(ids, found, details, index.file[rows].tolist(), index.row[rows].tolist(), quarantined=True)

    def _write_problems(self, ids: list, codes: list, details: list, files: list, rows: list, *, quarantined: bool) -> None:
        columns = [ids, codes, details, [self._files[int(file)] for file in files], rows, [quarantined] * len(ids)]
        self._problems.write_table(
            pa.table([pa.array(values, kind) for values, kind in zip(columns, _PROBLEM_SCHEMA.types)], _PROBLEM_SCHEMA)
        )

    def finish(self, histories: Histories | None, max_problems: float) -> None:
        """Write the histories and complete the counts.

        Raises:
            CatalogError: no item has content, or more pictures than `max_problems` allows cannot be used.
        """
        self._problems.close()
        built = self._built
        if self._refused > max_problems * self._pictures:
            raise self._too_many_refused()
        if not self._has_content:
            raise CatalogError(
                f"catalog.items: none of the {built.items:,} items of {self._files[0]} has a text, a picture, a category or an attribute; "
                "map the columns under catalog.fields"
            )
        if histories is not None:
            histories.save(self._folder / HISTORIES)
            update_hash(self._digest, histories)
        built.catalog_sha256 = self._digest.hexdigest()
        for counts in (built.problems, built.history_problems):
            counts += Counter()  # adding an empty counter removes zero counts

    def _too_many_refused(self) -> CatalogError:
        code, count = self._reasons.most_common(1)[0]
        reason = code.removeprefix("picture_")
        shown = ", ".join(map(repr, self._examples[code]))
        return CatalogError(
            f"catalog.items: {self._refused:,} of {self._pictures:,} pictures cannot be used, {count:,} of them as {code} ({shown}); "
            f"{REASONS.get(reason, 'correct the image column')}; if the rest is enough, raise ingest.max_problems"
        )
