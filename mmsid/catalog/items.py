"""Items of a catalogue: text, pictures, categories, attributes, and the hash of their content.

The content hash covers title, description, categories, attributes and the bytes of the pictures. Ids, paths and row numbers are not
part of it, so an order by content hash does not depend on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mmsid.catalog.config import CatalogConfig, Fields
from mmsid.catalog.pictures import InspectedPicture, inspect_picture
from mmsid.catalog.prompt_injection import clean, text_problems
from mmsid.catalog.tables import Cells, Table, read_table_rows
from mmsid.errors import CatalogError

_EMPTY_ROW: dict[str, Any] = {}  # replaces a row of the table whose content was read
_PICTURE_CACHE_SIZE = 10_000  # inspected pictures, of which several rows may use one


@dataclass(frozen=True, slots=True)
class Item:
    """One ad or product.

    Attributes:
        item_id: unique id in the catalogue.
        title, description: text, '' where missing.
        images: absolute paths of the creatives that passed the checks of path, size and header. Decoding such a file can still fail.
        categories: names from root to leaf, of any depth.
        attributes: name -> labels.
        content_sha256: hash of title, description, categories, attributes and picture bytes (64 hex digits).
        problems: codes of missing or refused parts. `no_title`, `no_description`, `no_categories` and `no_picture` are set where the
            table has such a column, `picture_<reason>` for each refused picture, and `title_<code>` or `description_<code>` for each
            code of `prompt_injection.text_problems`.
    """

    item_id: str
    title: str
    description: str
    images: tuple[Path, ...]
    categories: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    content_sha256: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Content:
    """Content of one row, or of several rows merged into one item."""

    title: str
    description: str
    categories: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    pictures: tuple[InspectedPicture, ...]
    text_problems: tuple[str, ...]

    def sha256(self) -> str:
        fields = [self.title, self.description, self.categories, sorted(self.attributes.items()), [p.sha256 for p in self.pictures]]
        return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode("utf-8")).hexdigest()


def read_items(config: CatalogConfig) -> list[Item]:
    """Read all items of `config.items`, in the order of the file.

    Raises:
        CatalogError: the table is unreadable or empty, a mapped column is absent, a cell has the wrong type, or an id is missing or
            occurs twice. Missing or bad pictures and texts do not raise. They are recorded in `Item.problems`.
    """
    fields = config.fields
    table = read_table_rows(config.items, _mapped_columns(fields), config_key="catalog.items")
    present = _check_columns(table, fields)
    if _names(fields.image) & present and not config.root.is_dir():
        raise CatalogError(f"catalog.image_root: {config.root} is not a folder; set it to the folder with the pictures of {table.path}")
    cells = Cells(table, fields.list_separator)
    rows = _Rows(table, cells, config, present)
    if fields.group_by is None:
        groups = _by_unique_id(table, cells, fields.item_id)
    else:
        groups = _by_group(table, cells, fields.group_by)
    return [_item(item_id, _merged([rows.pop(index) for index in group]), fields, present) for item_id, group in groups.items()]


def _mapped_columns(fields: Fields) -> list[str]:
    """Columns of the items table that `fields` refers to."""
    names = [fields.group_by or fields.item_id, fields.title, fields.description]
    names += [*sorted(_names(fields.image)), *sorted(_names(fields.categories)), *fields.attributes]
    return list(dict.fromkeys(name for name in names if name is not None))


def require_column(table: Table, column: str, config_key: str) -> None:
    """Raise CatalogError when the table has no column `column`, which the configuration sets as `config_key`."""
    if column not in table.columns:
        found = ", ".join(table.columns)
        raise CatalogError(f"{table.path}: no column {column!r} ({config_key}); found: {found}; correct the mapping or add the column")


def _names(mapped: str | Sequence[str] | None) -> set[str]:
    return set() if mapped is None else {mapped} if isinstance(mapped, str) else set(mapped)


def _check_columns(table: Table, fields: Fields) -> set[str]:
    """Columns of the table. Raises CatalogError when the id column or a column set by the user is absent."""
    id_field = "item_id" if fields.group_by is None else "group_by"
    require_column(table, getattr(fields, id_field), f"catalog.fields.{id_field}")
    for field in ("title", "description", "image", "categories"):
        if field in fields.model_fields_set:
            for column in sorted(_names(getattr(fields, field))):
                require_column(table, column, f"catalog.fields.{field}")
    for column in fields.attributes:
        require_column(table, column, "catalog.fields.attributes")
    return set(table.columns)


class _Rows:
    """Reads the content of each row once and frees the row, so that table and items are not in RAM at the same time.

    A cache avoids reading a picture again for the next rows that use it.
    """

    def __init__(self, table: Table, cells: Cells, config: CatalogConfig, present: set[str]) -> None:
        self._table, self._cells, self._config, self._present = table, cells, config, present
        self._picture = lru_cache(maxsize=_PICTURE_CACHE_SIZE)(partial(inspect_picture, limits=config.pictures, root=config.root))
        fields = config.fields
        self._title = fields.title if fields.title in present else None
        self._description = fields.description if fields.description in present else None
        self._images = self._columns(fields.image)
        self._categories = self._columns(fields.categories)

    def _columns(self, mapped: str | Sequence[str] | None) -> list[str]:
        names = [] if mapped is None else [mapped] if isinstance(mapped, str) else list(mapped)
        return [name for name in names if name in self._present]

    def pop(self, index: int) -> _Content:
        """Return the content of row `index` and empty the row in the table."""
        content = self._content(index)
        self._table.rows[index] = _EMPTY_ROW
        return content

    def _content(self, index: int) -> _Content:
        cells = self._cells
        paths = [path for column in self._images for path in cells.texts(index, column)]
        texts = {"title": cells.text(index, self._title), "description": cells.text(index, self._description)}
        problems = tuple(f"{name}_{code}" for name, text in texts.items() for code in text_problems(text))
        if problems and self._config.clean_text:
            texts = {name: clean(text) for name, text in texts.items()}
        return _Content(
            **texts,
            categories=self._path(index),
            attributes=self._attributes(index),
            pictures=tuple(self._picture(path) for path in paths),
            text_problems=problems,
        )

    def _path(self, index: int) -> tuple[str, ...]:
        path = tuple(name for column in self._categories for name in self._cells.texts(index, column))
        roots = self._config.fields.category_roots
        if not roots:
            return path
        return path[next((depth for depth, name in enumerate(path) if name in roots), len(path)) :]

    def _attributes(self, index: int) -> dict[str, tuple[str, ...]]:
        names = self._config.fields.attributes
        if len(names) == 1 and (mapping := self._cells.mapping(index, names[0])) is not None:
            return mapping
        found = {name: self._cells.texts(index, name) for name in names}
        return {name: values for name, values in found.items() if values}


def _by_unique_id(table: Table, cells: Cells, column: str) -> dict[str, list[int]]:
    rows = _by_group(table, cells, column)
    doubled = {item_id: found for item_id, found in rows.items() if len(found) > 1}
    if doubled:
        item_id, found = next(iter(doubled.items()))
        numbers = ", ".join(str(table.numbers[index]) for index in found[:5])
        raise CatalogError(
            f"{table.path}, {table.unit}s {numbers}: {column} {item_id!r} occurs {len(found)} times ({len(doubled)} ids occur repeatedly), "
            "ids must be unique; remove the extra rows, or set fields.group_by if they are creatives of one item"
        )
    return rows


def _by_group(table: Table, cells: Cells, column: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index in range(len(table.rows)):
        groups.setdefault(_id_of(table, cells, index, column), []).append(index)
    return groups


def _id_of(table: Table, cells: Cells, index: int, column: str) -> str:
    item_id = cells.text(index, column)
    if not item_id:
        raise CatalogError(f"{table.place(index)}, field {column!r}: empty, expected an id; fill it in or remove the row")
    return item_id


def _merged(rows: list[_Content]) -> _Content:
    """Merge the rows of one item. The rows are sorted by content, and each field comes from the first row that has it."""
    if len(rows) == 1:
        return rows[0]
    rows = sorted(rows, key=_Content.sha256)
    attributes: dict[str, tuple[str, ...]] = {}
    for row in rows:
        for name, values in row.attributes.items():
            attributes.setdefault(name, values)
    return _Content(
        title=_first(row.title for row in rows) or "",
        description=_first(row.description for row in rows) or "",
        categories=_first(row.categories for row in rows) or (),
        attributes=attributes,
        pictures=tuple(picture for row in rows for picture in row.pictures),
        text_problems=tuple(dict.fromkeys(code for row in rows for code in row.text_problems)),
    )


def _first(values: Iterable[Any]) -> Any:
    return next(filter(None, values), None)


def _item(item_id: str, content: _Content, fields: Fields, present: set[str]) -> Item:
    problems = [*content.text_problems, *(f"picture_{picture.reason}" for picture in content.pictures if picture.reason)]
    images = tuple(picture.path for picture in content.pictures if picture.path is not None)
    required = {
        "no_title": (fields.title, content.title),
        "no_description": (fields.description, content.description),
        "no_categories": (fields.categories, content.categories),
        "no_picture": (fields.image, images),
    }
    problems += [code for code, (mapped, value) in required.items() if not value and _names(mapped) & present]
    return Item(
        item_id, content.title, content.description, images, content.categories, content.attributes, content.sha256(), tuple(problems)
    )
