"""Opening of tables: one source or several, in any format, as batches of Arrow columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from mmsid.catalog.sources.batch import ROWS, Batch, TableFile
from mmsid.catalog.sources.columnar import ArrowFile, ParquetFile
from mmsid.catalog.sources.contents import ARROW, DELIMITED, FEED, JSON, JSON_LINES, PARQUET, Contents, recognise
from mmsid.catalog.sources.delimited import DelimitedFile
from mmsid.catalog.sources.feeds import FeedFile
from mmsid.catalog.sources.hub import HubSplit, open_hub
from mmsid.catalog.sources.json_documents import JsonDocumentFile
from mmsid.catalog.sources.json_lines import JsonLinesFile
from mmsid.catalog.sources.locate import Source, is_hub, locate, shown, sources_of
from mmsid.errors import CatalogError

_READERS = {
    PARQUET: ParquetFile,
    ARROW: ArrowFile,
    JSON_LINES: JsonLinesFile,
    JSON: JsonDocumentFile,
    DELIMITED: DelimitedFile,
    FEED: FeedFile,
}
_DAMAGES = (OSError, pa.ArrowException, ValueError, KeyError, EOFError, RecursionError, csv.Error)  # of readers, on damaged files


class OpenedTable:
    """A table whose files were recognised and whose columns are known.

    Attributes:
        name: the source as the configuration names it.
        columns: names in the headers without surrounding white space. Files may have different columns in any order: this is their union.
        files: the local files that are read. For a hub data set, the files in its cache.
        num_rows: number of rows, or None where it is only known after reading.
    """

    def __init__(self, name: str, tables: Sequence[TableFile], facts: Sequence[str], config_key: str) -> None:
        self.name, self._tables, self._facts, self._config_key = name, list(tables), list(facts), config_key
        self.columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
        self.files = tuple(file for table in tables for file in (table.files if isinstance(table, HubSplit) else (table.path,)))
        counts = [table.num_rows for table in tables]
        self.num_rows: int | None = None if None in counts else sum(counts)

    @property
    def notes(self) -> list[str]:
        """What was detected, one line per fact. Facts about cells are known after `batches`."""
        notes = list(self._facts)
        for table in self._tables:
            if table.notes:
                notes.append(f"{table.path}: {', '.join(table.notes)}")
            if lacking := [name for name in self.columns if name not in set(table.columns)]:
                rest = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
                notes.append(f"{table.path}: has no column {', '.join(lacking[:5])}{rest}")
        return notes

    def batches(self, selected: Sequence[str], rows: int = ROWS) -> Iterator[Batch]:
        """Batches of at most `rows` rows of one file each, with the `selected` columns that exist, in bounded memory.

        Raises:
            CatalogError: a file is damaged, or a row cannot be read. The message names the file, the row and the remedy.
        """
        wanted = list(dict.fromkeys(selected))
        found = 0
        for table in self._tables:
            try:
                for batch in table.batches(wanted, rows):
                    found += len(batch)
                    yield batch
            except _DAMAGES as error:
                raise _damaged(table.path, table.format, error) from error
        if not found:
            raise _no_rows(self.name, self._config_key)


def open_table(source: Source | Sequence[Source], *, config_key: str) -> OpenedTable:
    """Open a table: a file, a folder of parts, a pattern, a saved data set, `hf:OWNER/NAME[:SPLIT]`, or several of these.

    Formats and compressions are recognised by the first bytes of each file. JSON files and feeds are read once to find all columns.

    Args:
        source: one source or several.
        config_key: key that names the source, for messages.

    Raises:
        CatalogError: a file is missing, damaged, without rows or no table, a column occurs twice, or two files share no column.
    """
    tables: list[TableFile] = []
    facts: list[str] = []
    for one in sources_of(source):
        if is_hub(one):
            splits, fact = open_hub(str(one), config_key)
            tables += splits
            facts += [f"{one}: {fact}"] if fact else []
            continue
        located = locate(one, config_key)
        facts += located.notes
        first = len(tables)
        for path in located.files:
            contents = recognise(path, config_key)
            if contents.surprise:
                facts.append(f"{path}: {contents.surprise}")
            tables.append(_opened(contents))
        _refuse_other_tables([table for table in tables[first:] if not table.empty], config_key, least=0.5)
    name = shown(source)
    if all(table.empty for table in tables):
        raise _no_rows(name, config_key)
    facts += [f"{table.path}: no rows" for table in tables if table.empty]
    tables = [table for table in tables if not table.empty]
    _refuse_other_tables(tables, config_key, least=0.0)
    return OpenedTable(name, tables, facts, config_key)


def _refuse_other_tables(tables: Sequence[TableFile], config_key: str, least: float) -> None:
    """Raise CatalogError when a file has hardly a column of the first file, and so belongs to another table.

    Args:
        least: share of the columns of the file with fewer columns that both must have. One column is needed in any case.
    """
    for other in tables[1:]:
        first = tables[0]
        common = set(other.columns) & set(first.columns)
        if not common or len(common) < least * min(len(first.columns), len(other.columns)):
            found = f"only the columns {', '.join(sorted(common))} in common" if common else "no column in common"
            raise CatalogError(
                f"{config_key}: {first.path} and {other.path} have {found} ({', '.join(first.columns)} and {', '.join(other.columns)}); "
                "name the files of one table"
            )


def _opened(contents: Contents) -> TableFile:
    try:
        return _READERS[contents.format](contents)
    except _DAMAGES as error:
        raise _damaged(contents.path, contents.format, error) from error


def _damaged(path: Path, kind: str, error: Exception) -> CatalogError:
    reason = str(error).strip().partition("\n")[0][:200]
    return CatalogError(f"{path} cannot be read as {kind} ({type(error).__name__}: {reason}); write the file again")


def _no_rows(name: str, config_key: str) -> CatalogError:
    return CatalogError(f"{config_key}: {name} holds no rows; expected at least one, write the table again")
