"""Reader of XML product feeds: Google Merchant feeds as RSS 2.0 or Atom, and other RSS feeds.

An `item` or `entry` is a row, its elements are columns under their names without namespace. Elements that occur several times in an
item make a list column. Elements inside elements have dotted names, for example `shipping.price`. Entities are not expanded and
nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from mmsid.catalog.sources.batch import Batch
from mmsid.catalog.sources.contents import Contents
from mmsid.errors import CatalogError

_GOOGLE = "{http://base.google.com/ns/1.0}"
_ROWS = 4096


class FeedFile:
    """An RSS or Atom feed. `TableFile` describes the attributes. The whole file is parsed once when it is opened."""

    format = "xml"

    def __init__(self, contents: Contents) -> None:
        self.path, self._contents = contents.path, contents
        self._repeated: set[str] = set()
        self.num_rows, names = 0, {}
        for row in self._rows():
            self.num_rows += 1
            names.update(dict.fromkeys(row))
            self._repeated.update(name for name, values in row.items() if len(values) > 1)
        self.columns = tuple(names)
        self.empty = not self.num_rows
        self.notes = [f"lists: {', '.join(name for name in names if name in self._repeated)}"] if self._repeated else []
        if self.empty:
            raise CatalogError(f"{self.path}: no <item> (RSS) and no <entry> (Atom) found; name a product feed, or save the table as csv")

    def batches(self, selected: Sequence[str], rows: int) -> Iterator[Batch]:
        """Batches of at most `rows` rows with the `selected` columns that exist."""
        kept, size, first = [name for name in selected if name in self.columns], min(rows, _ROWS), 1
        waiting: list[dict[str, list[str]]] = []
        for row in self._rows():
            waiting.append(row)
            if len(waiting) == size:
                yield self._batch(waiting, kept, first)
                first, waiting = first + size, []
        if waiting:
            yield self._batch(waiting, kept, first)

    def _batch(self, rows: list[dict[str, list[str]]], kept: list[str], first: int) -> Batch:
        columns = {}
        for name in kept:
            if name in self._repeated:
                columns[name] = pa.array([row.get(name) for row in rows], pa.large_list(pa.large_string()))
            else:
                columns[name] = pa.array([row[name][0] if name in row else None for row in rows], pa.large_string())
        return Batch(pa.table(columns), {}, False, self.path, range(first, first + len(rows)))

    def _rows(self) -> Iterator[dict[str, list[str]]]:
        from lxml import etree

        number = 0
        with self._contents.open() as stream:
            try:
                tags = ("{*}item", "{*}entry")
                for _, item in etree.iterparse(stream, tag=tags, resolve_entities=False, no_network=True, load_dtd=False):
                    number += 1
                    yield _row(item)
                    item.clear()
                    while item.getprevious() is not None:
                        del item.getparent()[0]
            except etree.XMLSyntaxError as error:
                raise CatalogError(f"{self.path}, after row {number}: not valid XML ({error.msg}); write the feed again") from error


def _row(item: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    google: dict[str, list[str]] = {}
    for child in item:
        if isinstance(child.tag, str):  # neither a comment nor an entity
            _collect(child, "", google if child.tag.startswith(_GOOGLE) else found)
    return found | google


def _collect(element: Any, prefix: str, found: dict[str, list[str]]) -> None:
    name = prefix + element.tag.rpartition("}")[2]
    inner = [child for child in element if isinstance(child.tag, str)]
    for child in inner:
        _collect(child, f"{name}.", found)
    text = (element.text or "").strip() or ("" if inner else element.get("href", "").strip())
    if text:
        found.setdefault(name, []).append(text)
