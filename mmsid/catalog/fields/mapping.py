"""Which column of an items table feeds which field: the user's keys, presets of known formats, and common names of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.config import Fields
from mmsid.catalog.fields.categories import detected_separator
from mmsid.catalog.fields.cells import column_of, lists_of
from mmsid.catalog.fields.column_names import common_candidates
from mmsid.catalog.fields.presets import Preset, preset_of
from mmsid.catalog.fields.ragged import Ragged, stacked
from mmsid.errors import CatalogError

if TYPE_CHECKING:
    from mmsid.catalog.sources import OpenedTable

_SAMPLE_ROWS = 10_000
_LISTED = 12  # columns that a note lists


_SINGLE = ("item_id", "group_by")
_SEVERAL = ("title", "description", "image", "categories", "attributes")


@dataclass(frozen=True)
class FieldMapping:
    """Columns of the fields of an item.

    Attributes:
        item_id: column of the id. It may be absent from the table when `group_by` is set.
        group_by: column whose equal values mark the rows of one item, or None. A row without a value is an item of its own.
        title, description: columns whose texts are joined.
        image, categories, attributes: columns, as in `Fields`.
        category_roots, list_separator: as in `Fields`.
        separators: column -> separator of category paths or labels that are written as one text.
        preset: name of the recognised format, or None.
        not_read: columns of the table that no field reads.
        notes: what was recognised, one fact each, for people.
    """

    item_id: str
    group_by: str | None = None
    title: tuple[str, ...] = ()
    description: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    category_roots: tuple[str, ...] = ()
    separators: Mapping[str, str] = field(default_factory=dict)
    list_separator: str = "|"
    preset: str | None = None
    not_read: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Columns to read, without doubles."""
        ids = [self.item_id] if self.group_by is None else [self.group_by, self.item_id]
        return list(dict.fromkeys([*ids, *self.title, *self.description, *self.image, *self.categories, *self.attributes]))


def resolve_mapping(table: OpenedTable, fields: Fields, config_key: str) -> FieldMapping:
    """Decide which column of a table feeds which field.

    Columns that the user set must exist. Other fields come from the preset of a recognised format, else from the default column, else
    from the only column with a common name (`column_names.COMMON_NAMES`). Up to 10,000 rows are read to find the separator of category
    paths.

    Args:
        table: the items.
        fields: mapping of the configuration.
        config_key: key of the table in the configuration, for messages, as in "catalog.items".

    Raises:
        CatalogError: a column set by the user or the id column is absent, or several columns have a common name of one field.
    """
    resolver = _Resolver(table, fields, config_key)
    resolver.check_user_columns()
    resolver.apply_preset()
    resolver.find_default_columns()
    resolver.require_id()
    return resolver.mapping()


class _Resolver:
    """The steps of `resolve_mapping`. `found` holds the columns of each field so far."""

    def __init__(self, table: OpenedTable, fields: Fields, config_key: str) -> None:
        self._table, self._fields, self._key = table, fields, config_key
        self._columns = tuple(table.columns)
        self._file = (
            table.files[0] if len(table.files) == 1 else f"{table.files[0]} and {len(table.files) - 1} more" if table.files else config_key
        )
        self.found: dict[str, tuple[str, ...]] = {}
        self._separators: dict[str, str] = {}
        self._preset: Preset | None = None
        self._notes: list[str] = []
        for name in (*_SINGLE, *_SEVERAL):
            if name in fields.model_fields_set:
                self.found[name] = _names(getattr(fields, name))

    def check_user_columns(self) -> None:
        for name, columns in self.found.items():
            if name == "item_id" and self.found.get("group_by"):
                continue  # the group names the item
            for column in columns:
                self._require(column, f"catalog.fields.{name}")

    def apply_preset(self) -> None:
        recognised = preset_of(self._columns)
        if recognised is None:
            return
        self._preset, names = recognised
        by_user, filled = set(self.found), []
        for name, candidates in self._preset.fields.items():
            if name in by_user or (name == "group_by" and "item_id" in by_user):
                continue
            columns = list(dict.fromkeys(names[candidate] for candidate in candidates if candidate in names))
            columns = columns if name in self._preset.several else columns[:1]
            if columns:
                self.found[name] = tuple(columns)
                filled.append(f"{name} from {', '.join(columns)}")
        for column, separator in self._preset.separators.items():
            if column in names:
                self._separators[names[column]] = separator
        self._notes.append(
            f"{self._file}: recognised as {self._preset.name}: {'; '.join(filled) or 'all fields are set by the configuration'}"
        )

    def find_default_columns(self) -> None:
        for name in ("item_id", "title", "description", "image", "categories"):
            if name in self.found:
                continue
            default = _names(getattr(self._fields, name))
            if all(column in self._columns for column in default):
                self.found[name] = default
            elif self._preset is None:
                self._find_common(name)

    def _find_common(self, name: str) -> None:
        taken = {column for columns in self.found.values() for column in columns}
        candidates = [column for column in common_candidates(name, self._columns) if column not in taken]
        if name == "item_id" and self.found.get("group_by"):
            candidates = candidates if len(candidates) == 1 else []  # only rows without a group need it
        if len(candidates) > 1:
            raise CatalogError(
                f"{self._file}: no column {getattr(self._fields, name)!r} (catalog.fields.{name}), and several columns may hold it: "
                f"{', '.join(candidates)}; set catalog.fields.{name} to one of them" + ("" if name == "item_id" else ", or to null")
            )
        if candidates:
            self.found[name] = tuple(candidates)
            self._notes.append(f"{self._file}: {name} is read from column {candidates[0]!r}")

    def require_id(self) -> None:
        if not self.found.get("group_by") and "item_id" not in self.found:
            self._require(self._fields.item_id, "catalog.fields.item_id")

    def mapping(self) -> FieldMapping:
        found = {name: self.found.get(name, ()) for name in _SEVERAL}
        group_by = next(iter(self.found.get("group_by", ())), None)
        item_id = next(iter(self.found.get("item_id", ())), self._fields.item_id)
        read = {item_id, group_by, *(column for columns in found.values() for column in columns)}
        mapping = FieldMapping(
            item_id=item_id,
            group_by=group_by,
            **found,
            category_roots=tuple(self._fields.category_roots),
            separators=self._separators,
            list_separator=self._fields.list_separator,
            preset=None if self._preset is None else self._preset.name,
            not_read=tuple(column for column in self._columns if column not in read),
        )
        separators = self._category_separators(mapping)
        return replace(mapping, separators={**separators, **mapping.separators}, notes=tuple(self._notes))

    def _category_separators(self, mapping: FieldMapping) -> dict[str, str]:
        if not mapping.categories or self._fields.category_separator == "":
            return {}
        if self._fields.category_separator is not None:
            return dict.fromkeys(mapping.categories, self._fields.category_separator)
        samples = self._samples(mapping)
        separators: dict[str, str] = {}
        for name, lists in samples.items():
            separator = detected_separator(lists, len(samples) > 1)
            if separator is not None:
                separators[name] = separator
                example = next(text for text in lists.values.to_pylist() if separator in text)
                self._notes.append(
                    f"{self._file}: column {name!r} holds category paths separated by {separator!r}, for example {example[:80]!r} "
                    "(set fields.category_separator to another text, or to '' to keep them whole)"
                )
            elif _are_numbers(lists.values):
                self._notes.append(f"{self._file}: column {name!r} holds category numbers (taxonomy ids); they are kept as names")
        return separators

    def _samples(self, mapping: FieldMapping) -> dict[str, Ragged]:
        """Values of the category columns in the first 10,000 rows."""
        found: dict[str, list[Ragged]] = {}
        left = _SAMPLE_ROWS
        for batch in self._table.batches(list(mapping.categories), rows=_SAMPLE_ROWS):
            for name in mapping.categories:
                if (column := column_of(batch, name)) is not None:
                    found.setdefault(name, []).append(lists_of(column, mapping.list_separator, first_path_only=True))
            left -= len(batch.numbers)
            if left <= 0:
                break
        return {name: stacked(parts) for name, parts in found.items()}

    def _require(self, column: str, key: str) -> None:
        if column not in self._columns:
            found = ", ".join(self._columns)
            raise CatalogError(f"{self._file}: no column {column!r} ({key}); found: {found}; correct the mapping or add the column")


def not_read_text(columns: Sequence[str]) -> str:
    """Note on the columns that no field reads, with the remedy."""
    more = f" and {len(columns) - _LISTED} more" if len(columns) > _LISTED else ""
    return f"not read: {', '.join(columns[:_LISTED])}{more} (map them under fields.attributes)"


def _names(mapped: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if mapped is None else (mapped,) if isinstance(mapped, str) else tuple(mapped)


def _are_numbers(values: pa.LargeStringArray) -> bool:
    return len(values) > 0 and pc.all(pc.match_substring_regex(values, r"^\d+$")).as_py()
