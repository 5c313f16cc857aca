"""Batches and opened tables made of Python rows, as `mmsid.catalog.sources` gives them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa


@dataclass
class RawBatch:
    table: pa.Table
    mixed: dict[str, list[Any]] = field(default_factory=dict)
    textual: bool = False
    file: Path = Path("items.parquet")

    @property
    def numbers(self) -> range:
        return range(1, 1 + (self.table.num_rows if self.table.num_columns else len(next(iter(self.mixed.values())))))

    def place(self, index: int) -> str:
        return f"{self.file}, row {self.numbers[index]}"

    def column(self, name: str) -> pa.Array | list[Any] | None:
        if name in self.mixed:
            return self.mixed[name]
        return self.table[name].combine_chunks() if name in self.table.column_names else None


@dataclass
class RawTable:
    batch: RawBatch
    files: tuple[Path, ...] = (Path("items.parquet"),)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.batch.table.column_names, *self.batch.mixed)

    def batches(self, selected, rows=65_536):
        yield self.batch


def raw(columns: dict[str, Any], textual: bool = False) -> RawBatch:
    """A batch of columns. Lists that Arrow refuses become mixed columns."""
    arrays, mixed = {}, {}
    for name, values in columns.items():
        try:
            arrays[name] = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
            mixed[name] = values
    return RawBatch(pa.table(arrays), mixed, textual, Path("items.csv" if textual else "items.parquet"))
