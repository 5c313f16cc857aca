"""Rows of one batch as items: fields, pictures that were looked at, content hash."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.item import content_sha256
from mmsid.catalog.item_table import CREATIVE, PROBLEM, SCHEMA, lengths, lists, nested, pairs, texts
from mmsid.catalog.pictures import InspectedPicture

PART_SCHEMA = SCHEMA.append(pa.field("picture_sha256", pa.large_list(pa.large_string())))
_LONGEST_DETAIL = 300
_REMEMBERED = 20_000  # pictures that the following rows may use again

Inspect = Callable[[Sequence[str | bytes]], Iterable[InspectedPicture]]


class PictureMemory:
    """Looks at pictures once, also when several rows of a batch or of neighbouring batches use them.

    Args:
        inspect: results for picture references, in order (`picture_sources.inspect_pictures`).
    """

    def __init__(self, inspect: Inspect) -> None:
        self._inspect = inspect
        self._seen: OrderedDict[str | bytes, InspectedPicture] = OrderedDict()

    def inspected(self, references: Sequence[str | bytes]) -> list[InspectedPicture]:
        """The result for each reference."""
        new = [one for one in dict.fromkeys(references) if one not in self._seen]
        found = {one: self._seen[one] for one in dict.fromkeys(references) if one in self._seen}
        found |= zip(new, self._inspect(new), strict=True)
        self._seen.update((one, found[one]) for one in new if isinstance(one, str))  # bytes are large, and rarely repeated
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return [found[one] for one in references]


def part_rows(fields: pa.Table, file: int, numbers: np.ndarray, pictures: PictureMemory, root: Path) -> pa.Table:
    """Rows with the columns `PART_SCHEMA`.

    Args:
        fields: (R,) rows of `fields.item_fields`.
        file: number of the source file.
        numbers: (R,) row numbers in the file.
        pictures: looks at the pictures of the rows.
        root: absolute folder of the pictures. Paths below it are stored relative to it.
    """
    num_rows = fields.num_rows
    row_of = np.repeat(np.arange(num_rows), lengths(fields["pictures"]))
    references = _references(fields["pictures"])
    inspected = pictures.inspected(references)
    hashes = lists(pa.array([picture.sha256 for picture in inspected], pa.large_string()), row_of, num_rows)
    content = map(
        content_sha256,
        texts(fields["title"]),
        texts(fields["description"]),
        nested(fields["categories"], texts),
        nested(fields["attributes"], pairs),
        nested(hashes, texts),
    )
    columns = {name: fields[name] for name in ("item_id", "title", "description", "categories", "attributes", "original")}
    columns["content_sha256"] = pa.array(list(content), pa.large_string())
    columns["problems"] = _problems(fields["problems"], references, inspected, row_of)
    columns["creatives"] = _creatives(inspected, row_of, num_rows, f"{root}{os.sep}")
    columns["picture_sha256"] = hashes
    columns["file"] = pa.array(np.full(num_rows, file, dtype=np.int32))
    columns["row"] = pa.array(np.asarray(numbers, dtype=np.int64))
    return pa.table([columns[name] for name in PART_SCHEMA.names], schema=PART_SCHEMA).combine_chunks()


def with_problems(problems: pa.ChunkedArray, row_of: np.ndarray, found: Sequence[tuple[str, str]]) -> pa.Array:
    """A column of problems (R,) with further problems (code, detail) at the ends of the lists of the rows `row_of`, which do not fall."""
    if not len(found):
        return problems
    old_rows = np.repeat(np.arange(len(problems)), lengths(problems))
    values = problems.combine_chunks().flatten() if len(old_rows) else pa.array([], PROBLEM)
    new = pa.array([{"code": code, "detail": detail} for code, detail in found], PROBLEM)
    rows = np.concatenate([old_rows, row_of])
    order = np.argsort(rows, kind="stable")
    return lists(pa.concat_arrays([values, new]).take(pa.array(order)), rows[order], len(problems))


def _references(column: pa.ChunkedArray) -> list[str | bytes]:
    values = column.combine_chunks().flatten()
    if not len(values):
        return []
    data = pc.struct_field(values, "data").to_pylist()
    return [ref if given is None else given for ref, given in zip(texts(pc.struct_field(values, "ref")), data, strict=True)]


def _problems(
    of_text: pa.ChunkedArray, references: Sequence[str | bytes], inspected: Sequence[InspectedPicture], row_of: np.ndarray
) -> pa.Array:
    refused = [at for at, picture in enumerate(inspected) if picture.reason is not None]
    found = [(f"picture_{inspected[at].reason}", _detail(references[at], inspected[at])) for at in refused]
    entries = of_text.combine_chunks().flatten() if len(of_text) else pa.array([], pa.large_string())
    values = pa.StructArray.from_arrays([entries, pa.array([""] * len(entries), pa.large_string())], fields=list(PROBLEM))
    problems = lists(values, np.repeat(np.arange(len(of_text)), lengths(of_text)), len(of_text))
    return with_problems(pa.chunked_array([problems]), row_of[refused], found)


def _detail(reference: str | bytes, picture: InspectedPicture) -> str:
    name = f"{len(reference):,} bytes" if isinstance(reference, bytes) else reference[:_LONGEST_DETAIL]
    return f"{name}: {picture.detail}" if picture.detail else name


def _creatives(inspected: Sequence[InspectedPicture], row_of: np.ndarray, num_rows: int, root: str) -> pa.Array:
    usable = [at for at, picture in enumerate(inspected) if picture.path is not None]
    found = [
        {
            "path": str(picture.path).removeprefix(root),
            "sha256": picture.sha256,
            "format": picture.format,
            "width": picture.width,
            "height": picture.height,
            "num_bytes": picture.num_bytes,
            "mtime_ns": picture.mtime_ns,
        }
        for picture in (inspected[at] for at in usable)
    ]
    return lists(pa.array(found, CREATIVE), row_of[usable], num_rows)
