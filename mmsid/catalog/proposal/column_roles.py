"""What the columns of an items table hold, and which of those without a field may become attributes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmsid.catalog.fields.presets import normal_name
from mmsid.catalog.proposal.samples import Sample
from mmsid.errors import CatalogError

_MOST_KEYS, _MOST_NUMBERS, _LONGEST_LABEL = 100, 50, 40
_NO_LABELS = re.compile(r"(^|_)(id|ids|uuid|link|url|uri|href|sku|gtin|mpn|ean|asin|width|height|timestamp|price)$")
_LEVELS = re.compile(r"^(.*?(?:cat|category|level|department|taxonomy).*?)_?(\d)$")
_NAMED_LEVELS = (
    ("master_category", "sub_category", "article_type"),
    ("department", "category", "subcategory"),
    ("category", "subcategory"),
)


@dataclass(frozen=True)
class ColumnFacts:
    """One column.

    Attributes:
        example: short text of a filled cell, '' if all are empty.
        filled: share of the rows with a value, between 0 and 1.
    """

    name: str
    example: str
    filled: float


def column_facts(sample: Sample, name: str) -> ColumnFacts:
    """Example and share of filled rows of a column, in the first rows."""
    filled, example = 0, ""
    for column in sample.columns.get(name, []):
        values = column.data if isinstance(column.data, list) else (column.data[index] for index in range(len(column.data)))
        for value in values:
            value = _short(value)
            if value:
                filled += 1
                example = example or value
    return ColumnFacts(name, example, filled / max(1, sample.rows))


def _short(value: Any) -> str:
    if isinstance(value, pa.Scalar):
        if not value.is_valid:
            return ""
        if pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
            data = value.as_buffer()
            return f"{data.size:,} bytes" if data is not None and data.size else ""
        value = value.as_py()
    if value is None or value != value or value in ("", [], {}, b""):
        return ""
    if isinstance(value, (list, dict, tuple)):
        value = json.dumps(value, default=_bytes_text, ensure_ascii=False)
    return " ".join(str(value).split())


def _bytes_text(value: Any) -> str:
    return f"{len(value):,} bytes" if isinstance(value, bytes) else str(value)


def reason_against_attribute(sample: Sample, name: str) -> str | None:
    """Why a column is not proposed as an attribute, or None when it holds labels."""
    if _NO_LABELS.search(normal_name(name)):
        return "ids, links or sizes"
    if (keys := _keys(sample, name)) is not None:
        return None if 0 < keys <= _MOST_KEYS else f"mappings with {keys} different keys"
    lists = sample.texts(name)
    labels = [label for texts in lists for label in texts]
    filled, distinct = sum(map(bool, lists)), set(labels)
    if filled < 0.02 * sample.rows or not labels:
        return "almost always empty"
    if len(distinct) == 1:
        return "one value in all rows"
    if sum("://" in label for label in labels) > len(labels) / 2:
        return "links"
    if sum(map(len, labels)) > _LONGEST_LABEL * len(labels):
        return "long texts"
    if all(_is_number(label) for label in distinct) and len(distinct) > _MOST_NUMBERS:
        return "numbers with many values"
    if len(distinct) > 0.7 * len(labels) and len(labels) > 20:
        return "almost every row has a value of its own"
    return None


def _keys(sample: Sample, name: str) -> int | None:
    """Number of different keys of a column of mappings, or None when it holds none."""
    found: set[str] = set()
    for column in sample.columns.get(name, []):
        if isinstance(column.data, pa.Array):
            kind = column.data.type
            if not (pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_large_string(kind)):
                return None
            values = column.data.to_pylist(maps_as_pydicts="lossy") if not pa.types.is_large_string(kind) else _written(column)
        else:
            values = column.data
        for value in values:
            if isinstance(value, dict):
                found.update(key for key, inner in value.items() if inner is not None)
    return len(found) or None


def _written(column: Any) -> list[Any]:
    values = []
    for index, text in enumerate(column.data.to_pylist()):
        if text and text.lstrip().startswith("{"):
            try:
                values.append(column.written(text, index))
            except CatalogError:
                continue
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def level_columns(columns: Sequence[str]) -> list[str]:
    """Columns that hold one level of the categories each, from root to leaf, as `cat_l1, cat_l2`; empty when there are none."""
    by_name = {normal_name(column): column for column in columns}
    for names in _NAMED_LEVELS:
        if all(name in by_name for name in names):
            return [by_name[name] for name in names]
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, column in by_name.items():
        if level := _LEVELS.match(name):
            groups.setdefault(level[1], []).append((int(level[2]), column))
    best = max(groups.values(), key=len, default=[])
    return [column for _, column in sorted(best)] if len(best) > 1 else []
