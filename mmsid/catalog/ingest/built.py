"""What one ingest found in the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Built:
    """What was found in the sources.

    Attributes:
        rows: rows of the items table.
        items: items of the catalogue.
        quarantined: rows that became no item.
        merged: rows that became a part of another row's item.
        catalog_sha256: hash of item ids, content and histories. It does not depend on row order or user ids.
        problems: count of each code of problems of items.
        history_problems: count of each code of problems of histories.
        notes: facts on the sources for the user, one line each.
        not_read: columns that no field refers to.
        formats: count of usable pictures by format.
        vector_widths: dimension of each family of vectors.
        integer_ids: whether the ids of the items are whole numbers in the table of items.
        integer_user_ids: whether the ids of the users are whole numbers in the table of users.
    """

    rows: int = 0
    items: int = 0
    quarantined: int = 0
    merged: int = 0
    catalog_sha256: str = ""
    problems: Counter[str] = field(default_factory=Counter)
    history_problems: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    not_read: tuple[str, ...] = ()
    formats: Counter[str] = field(default_factory=Counter)
    vector_widths: tuple[int, ...] = ()
    integer_ids: bool = False
    integer_user_ids: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON data, with sorted counts."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Built:
        """The reverse of `to_json`. Other keys of `data` are ignored."""
        kinds = {"problems": Counter, "history_problems": Counter, "formats": Counter, "vector_widths": tuple, "not_read": tuple}
        found = {one.name: kinds.get(one.name, lambda value: value)(data[one.name]) for one in fields(cls) if one.name in data}
        return cls(**found)
