"""Rows of one item, such as its creatives or variants, merged into one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from mmsid.catalog.fields import unite_attributes
from mmsid.catalog.ingest.rows import PART_SCHEMA
from mmsid.catalog.item import content_sha256


def merged_groups(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Merge neighbouring rows with equal `item_id`. The chunks have the columns `PART_SCHEMA`; a group may span two of them."""
    rest = PART_SCHEMA.empty_table()
    for chunk in chunks:
        rows = pa.concat_tables([rest, chunk])
        ids = rows["item_id"].to_pylist()
        start = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] != ids[-1]), -1) + 1  # the last group may go on
        rest = rows.slice(start)
        if start:
            yield _merged(rows.slice(0, start))
    if rest.num_rows:
        yield _merged(rest)


def _merged(rows: pa.Table) -> pa.Table:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        groups.setdefault(row["item_id"], []).append(row)
    return pa.Table.from_pylist([_one(group) for group in groups.values()], PART_SCHEMA)


def _one(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows are sorted by content. A text comes from the first row that has it, labels and pictures from all rows."""
    if len(rows) == 1:
        return rows[0]
    rows = sorted(rows, key=lambda row: (row["content_sha256"], row["file"], row["row"]))
    attributes = [*unite_attributes([{one["name"]: one["labels"] for one in row["attributes"]} for row in rows]).items()]
    texts = {name: next((row[name] for row in rows if row[name]), "") for name in ("title", "description")}
    categories = next((row["categories"] for row in rows if row["categories"]), [])
    pictures = [digest for row in rows for digest in row["picture_sha256"]]
    text_problems = dict.fromkeys(problem["code"] for row in rows for problem in row["problems"] if not _of_picture(problem))
    first = min(rows, key=lambda row: (row["file"], row["row"]))
    return {
        "item_id": first["item_id"],
        **texts,
        "categories": categories,
        "attributes": [{"name": name, "labels": list(found)} for name, found in attributes],
        "creatives": [creative for row in rows for creative in row["creatives"]],
        "content_sha256": content_sha256(*texts.values(), categories, attributes, pictures),
        "problems": [{"code": code, "detail": ""} for code in text_problems]
        + [problem for row in rows for problem in row["problems"] if _of_picture(problem)],
        "original": next((row["original"] for row in rows if row["original"]), None),
        "file": first["file"],
        "row": first["row"],
        "picture_sha256": pictures,
    }


def _of_picture(problem: dict[str, str]) -> bool:
    return problem["code"].startswith("picture_")
