"""Python values of table cells as texts and lists, for the cells that are not plain Arrow values.

These are cells of columns with several JSON types, and texts of csv cells that hold a list or a mapping.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Callable
from typing import Any

from mmsid.catalog.sources import literal_cell
from mmsid.errors import CatalogError

Refuse = Callable[[str], CatalogError]  # name of a Python type -> the error of a cell that holds it

_NAME_KEYS = ("name", "title", "label", "value")  # keys of the text in a list of mappings


def plain_text(value: Any, refuse: Refuse) -> str:
    """A scalar as text without surrounding white space, '' for None and NaN. Raises the error of `refuse` for other values."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise refuse("bytes") from None
    if isinstance(value, str):
        return writable(value).strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, uuid.UUID)):
        return str(value)
    raise refuse(type(value).__name__)


def writable(text: str) -> str:
    """`text` without lone surrogates and NUL characters, which later stages cannot write."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def flat_texts(value: Any, refuse: Refuse) -> list[str]:
    """Non-empty texts of a scalar or of a list. Inner lists are flattened. Of a mapping in a list the name is taken."""
    if not isinstance(value, (list, tuple)):
        text = plain_text(value, refuse)
        return [text] if text else []
    found: list[str] = []
    for inner in value:
        if isinstance(inner, dict):
            key = next((key for key in _NAME_KEYS if isinstance(inner.get(key), str)), None)
            if key is None:
                raise refuse("dict")
            inner = inner[key]
        found += flat_texts(inner, refuse)
    return found


def first_path(value: Any) -> Any:
    """The first list that is not empty of a list of lists, or `value` itself."""
    if isinstance(value, (list, tuple)) and any(isinstance(inner, (list, tuple)) for inner in value):
        return first_path(next((inner for inner in value if inner), []))
    return value


def flat_mapping(value: Any, refuse: Refuse, prefix: str = "") -> dict[str, list[str]] | None:
    """Name -> labels of a mapping, or of a list of `{"name": ..., "value": ...}`. None for other values.

    Inner mappings give dotted names.
    """
    if isinstance(value, dict):
        found: dict[str, list[str]] = {}
        for key, inner in value.items():
            name = prefix + writable(str(key))
            nested = flat_mapping(inner, refuse, f"{name}.")
            for each, labels in ({name: flat_texts(inner, refuse)} if nested is None else nested).items():
                found.setdefault(each, []).extend(labels)
        return found
    if isinstance(value, (list, tuple)) and value and all(isinstance(inner, dict) for inner in value):
        found = {}
        for inner in value:
            pair = name_and_value_keys(inner)
            mapping = inner if pair is None else {plain_text(inner[pair[0]], refuse): inner[pair[1]]}
            for name, labels in (flat_mapping(mapping, refuse, prefix) or {}).items():
                found.setdefault(name, []).extend(labels)
        return found
    return None


def name_and_value_keys(keys: Any) -> tuple[str, str] | None:
    """The keys of the name and of the value in a mapping like `{"name": "Color", "value": "red"}`, or None."""
    for name, value in (
        ("name", "value"),
        ("key", "value"),
        ("name", "values"),
        ("key", "values"),
        ("attribute", "value"),
        ("label", "value"),
    ):
        if name in keys and value in keys:
            return name, value
    return None


def written_value(text: str, error: Callable[[str], CatalogError]) -> Any:
    """The list or mapping that a csv cell holds as JSON or as printed by Python, pandas or numpy.

    Raises:
        CatalogError: the text is none of these; `error` makes it from the message of the parser.
    """
    try:
        return literal_cell(text)
    except ValueError as problem:
        raise error(str(problem)) from problem
