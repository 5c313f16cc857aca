"""Reading of a mapping from items to Semantic IDs in any of the usual forms. A row that cannot be used is listed with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsid.errors import ArtifactError
from mmsid.inspection.checked_rows import Levels, checked_codes
from mmsid.inspection.code_cells import CodeCells, of_column, of_matrix
from mmsid.inspection.mapping_tables import read_code_table
from mmsid.sids.table import FILE_NAME, SidTable


@dataclass(frozen=True)
class Mapping:
    """A mapping that was read.

    Attributes:
        table: the items that can be used, in the order of the file.
        rows: number of rows in the file.
        problems: one entry per row that cannot be used: row (from 1), item_id (None if missing), reason, detail.
        notes: what was detected, one line per fact.
        sizes_given: whether the codebook sizes are known rather than taken from the largest code.
    """

    table: SidTable
    rows: int
    problems: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes_given: bool = False

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> number of rows, most frequent first."""
        return dict(Counter(problem["reason"] for problem in self.problems).most_common())


def read_mapping(
    path: str | Path,
    *,
    id_column: str | None = None,
    code_columns: Sequence[str] | None = None,
    codebook_sizes: Sequence[int] | None = None,
) -> Mapping:
    """Read a mapping.

    Forms: a SID folder of mmsid or its `sids.parquet`; an object `{"item": ["<a_1>", "<b_2>"], ...}` as JSON (MiniOneRec, LC-Rec, LETTER;
    lists of numbers and texts are read, too); a table (parquet, csv, jsonl, ...) with a column of ids and the codes in one column (lists
    or texts) or in one column per level; a matrix of codes as `.npy`, whose rows are the items 0 to N-1.

    Args:
        id_column: default: `item_id`, or the only column with a usual name of ids.
        code_columns: default: the column `codes` or one of a usual name, or numbered columns such as `code_0`, `code_1`.
        codebook_sizes: codes per level, or one number for all levels. Default: 1 + the largest code of any level. With it, levels whose
            codes are numbered through (256 to 511 at the second of two levels of 256) are recognised.

    Raises:
        ArtifactError: the file cannot be read, its columns are unclear, or no row can be used.
        CatalogError: a table is damaged.
    """
    path = Path(path)
    if path.is_dir() or (path.suffix == ".parquet" and path.is_file() and _is_sid_table(path)):
        table = SidTable.load(path)
        _refuse_empty(path, len(table))
        return Mapping(table, len(table), sizes_given=True)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; name a file of Semantic IDs, or a SID folder of mmsid")
    notes: list[str] = []
    integer_ids = False
    if path.suffix == ".npy":
        matrix = _matrix(path)
        ids, cells, unusable, integer_ids = pa.array(np.arange(len(matrix))).cast(pa.string()), of_matrix(matrix), {}, True
    else:
        found = _object(path) if path.suffix == ".json" else None
        if found is not None:
            ids, cells, unusable = found
        else:
            ids, cells, unusable, integer_ids = read_code_table(path, id_column, code_columns, notes)
    _refuse_empty(path, len(ids))
    levels, problems = checked_codes(ids, cells, unusable, codebook_sizes, str(path), notes)
    return _mapping(ids, levels, problems, notes, integer_ids, codebook_sizes is not None)


def _mapping(
    ids: pa.Array, levels: Levels, problems: list[dict[str, Any]], notes: list[str], integer_ids: bool, sizes_given: bool
) -> Mapping:
    kept = ids.take(pa.array(levels.rows)).to_pylist()
    table = SidTable.from_codes(kept, levels.codes, levels.sizes, suffix=levels.suffix, integer_ids=integer_ids)
    return Mapping(table, len(ids), problems, notes, sizes_given)


def _is_sid_table(path: Path) -> bool:
    try:
        return b"mmsid_sids_version" in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return path.name == FILE_NAME  # its own reader explains what is wrong


def _matrix(path: Path) -> np.ndarray:
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read as a matrix ({error}); write it by numpy.save, without pickle") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
        raise ArtifactError(f"{path} holds an array of shape {matrix.shape} and type {matrix.dtype}, expected codes (items, levels)")
    if matrix.dtype.kind == "f":
        whole = np.isfinite(matrix) & (matrix == np.floor(matrix))
        matrix = np.where(whole, matrix, -1)
    return matrix.astype(np.int64)


class _Pairs(list):
    """Members of a JSON object in the order of the file, repeated keys included."""


def _object(path: Path) -> tuple[pa.Array, CodeCells, dict[int, str]] | None:
    """Ids, codes and unusable rows of a JSON object of items; None if the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}); export it again") from error
    if not isinstance(found, _Pairs) or (found and all(isinstance(value, _Pairs) for _, value in found)):
        return None
    ids, values = pa.array([_text(key) for key, _ in found], pa.string()), [value for _, value in found]
    unusable: dict[int, str] = {}
    try:
        column = pa.array(values)
        if pa.types.is_nested(getattr(column.type, "value_type", pa.null())):
            raise pa.ArrowInvalid
        return ids, of_column(column), unusable
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError):
        pass
    plain: list[list[str | None] | None] = []
    for row, value in enumerate(values):
        entries = value if isinstance(value, list) and not isinstance(value, _Pairs) else [value]
        if any(isinstance(entry, (list, bool)) for entry in entries):
            unusable[row] = json.dumps(value, default=str)[:60]
            plain.append(None)
        elif value is None or value == "":
            plain.append(None)
        elif isinstance(value, str):
            plain.append(_single(value))
        else:
            plain.append([None if entry is None else _text(str(entry)) for entry in entries])
    return ids, of_column(pa.array(plain, pa.list_(pa.string()))), unusable


def _single(text: str) -> list[str]:
    """Codes in one text, for files that mix texts and lists."""
    cells = of_column(pa.array([_text(text)]))
    return cells.texts.to_pylist()


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no UTF-8


def _refuse_empty(path: Path, rows: int) -> None:
    if not rows:
        raise ArtifactError(f"{path}: the file contains no items; export it again")


def same_sizes(one: Mapping, other: Mapping) -> tuple[SidTable, SidTable]:
    """Both tables with common codebook sizes, where a size was only taken from the largest code."""
    from dataclasses import replace

    a, b = one.table, other.table
    if a.num_levels != b.num_levels or a.codebook_sizes == b.codebook_sizes or (one.sizes_given and other.sizes_given):
        return a, b
    largest = tuple(max(pair) for pair in zip(a.codebook_sizes, b.codebook_sizes, strict=True))
    if (one.sizes_given and a.codebook_sizes != largest) or (other.sizes_given and b.codebook_sizes != largest):
        return a, b  # the known sizes are too small for the other table
    return replace(a, codebook_sizes=largest), replace(b, codebook_sizes=largest)
