"""Tables that were found, with the first rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmsid.catalog.fields.cells import Column, column_of, lists_of
from mmsid.catalog.sources import OpenedTable, Source, open_table
from mmsid.catalog.sources.contents import FORMAT_OF_SUFFIX, table_suffix
from mmsid.catalog.sources.locate import is_hub
from mmsid.errors import CatalogError

SAMPLE_ROWS = 2_000
_MOST_FILES = 500  # of a folder
_NOTES = (".txt", ".json", ".xml")  # often no tables


@dataclass
class Sample:
    """A table and its first rows.

    Attributes:
        source: as `catalog.items` names it.
        table: the opened table.
        columns: name -> cells of the first rows, from one file or several.
        rows: number of rows in `columns`.
    """

    source: Source | tuple[Source, ...]
    table: OpenedTable
    columns: dict[str, list[Column]] = field(default_factory=dict)
    rows: int = 0

    @classmethod
    def of(cls, source: Source | tuple[Source, ...]) -> Sample:
        """Open a table and read up to 2,000 rows. Raises CatalogError when it cannot be read."""
        sample = cls(source, open_table(source, config_key="mmsid init"))
        for batch in sample.table.batches(list(sample.table.columns), rows=SAMPLE_ROWS):
            for name in sample.table.columns:
                if (column := column_of(batch, name)) is not None:
                    sample.columns.setdefault(name, []).append(column)
            sample.rows += len(batch.numbers)
            if sample.rows >= SAMPLE_ROWS:
                break
        return sample

    def texts(self, name: str, separator: str = "|") -> list[list[str]]:
        """Non-empty texts of each row of a column. Empty for columns of mappings or bytes."""
        found: list[list[str]] = []
        for column in self.columns.get(name, []):
            try:
                found += lists_of(column, separator).to_list_array().to_pylist()
            except (CatalogError, pa.ArrowException):
                return []
        return found

    def values(self, name: str) -> list[Any]:
        """Raw values of a column, without bytes."""
        values: list[Any] = []
        for column in self.columns.get(name, []):
            values += column.data.to_pylist() if isinstance(column.data, pa.Array) else column.data
        return values


def all_texts(table: OpenedTable, name: str) -> list[str]:
    """Non-empty texts of a column in the whole table, one after the other."""
    found: list[str] = []
    for batch in table.batches([name]):
        if (column := column_of(batch, name)) is not None:
            found += lists_of(column, "\0").values.to_pylist()
    return found


def find_samples(sources: Sequence[str]) -> tuple[list[Sample], list[str]]:
    """The tables of some files, folders, patterns and hub ids, and what was not used, one line each.

    Files of a folder with the same columns are one table.

    Raises:
        CatalogError: a source that is not a folder cannot be read, or a folder holds too many tables.
    """
    samples: list[Sample] = []
    unused: list[str] = []
    for source in sources:
        path = Path(source)
        if is_hub(source) or not path.is_dir() or _is_one_table(path):
            samples.append(Sample.of(str(source) if is_hub(source) else path))
        else:
            found, notes = _tables_of_folder(path)
            samples += found
            unused += notes
    return samples, unused


def _is_one_table(folder: Path) -> bool:
    """Whether a folder is a data set on disk (`datasets.save_to_disk`)."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _tables_of_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and table_suffix(path) in FORMAT_OF_SUFFIX
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise CatalogError(f"{folder} holds no table (parquet, csv, tsv, jsonl, json, xml); name the file of the items")
    if len(files) > _MOST_FILES:
        raise CatalogError(f"{folder} holds {len(files):,} tables, too many to look at; name the folder or the file of the items")
    groups: dict[tuple[Any, ...], list[Path]] = {}
    unused = []
    for path in files:
        try:
            table = open_table(path, config_key="mmsid init")
        except CatalogError as error:
            unused.append(f"{path}: {error}")
            continue
        if len(table.columns) < 2 and table_suffix(path) in _NOTES:
            unused.append(f"{path}: no table")
            continue
        groups.setdefault((path.parent, frozenset(table.columns)), []).append(path)
    samples = []
    for (parent, _), paths in groups.items():
        whole = [path for path in files if path.parent == parent]
        source = paths[0] if len(paths) == 1 else parent if paths == whole else tuple(paths)
        samples.append(Sample.of(source))
    return samples, unused
