"""SID table (`sids.parquet`): which item has which codes. It is the only link between tokenizers and recommenders."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmsid.artifacts import read_table, verify_file, write_table
from mmsid.errors import ArtifactError
from mmsid.id_columns import id_array, with_text_ids

SCHEMA_VERSION = 1
FILE_NAME = "sids.parquet"
LETTERS = string.ascii_lowercase
BEHAVIOUR, CONTENT = "behaviour", "content"  # values of `SidTable.source`


def token(level: int, code: int) -> str:
    """SID token of a code, for example `<a_12>`; level 0 is `a`."""
    return f"<{LETTERS[level]}_{code}>"


@dataclass
class SidTable:
    """Table of Semantic IDs, one row per item.

    Attributes:
        item_ids: N unique ids.
        codes: (N, L) int64, published codes (after collision handling).
        raw_codes: (N, L) int64, argmax of the head.
        suffix: (N,) int64 or None; number of an item within its colliding bucket, -1 if it needs none.
        margin: (N,) float32, smallest lead of a chosen code over the second-best code; NaN if unknown.
        codebook_sizes: L integers, codes per level.
        tokenizer_sha256, catalog_sha256: hashes of tokenizer and catalogue; empty if unknown (imported SIDs).
        source: (N,) strings, the reading that gave an item its codes: "behaviour" or "content"; None if unknown.
        integer_ids: whether the ids are whole numbers in the user's table. They are texts here and numbers in the file.
    Raises:
        ArtifactError: a column does not fit the others (names the row and both values).
    """

    item_ids: list[str]
    codes: np.ndarray
    raw_codes: np.ndarray
    suffix: np.ndarray | None
    margin: np.ndarray
    codebook_sizes: tuple[int, ...]
    tokenizer_sha256: str = ""
    catalog_sha256: str = ""
    source: np.ndarray | None = None
    integer_ids: bool = False

    def __post_init__(self) -> None:
        self.item_ids = list(self.item_ids)
        self.codes = np.ascontiguousarray(self.codes, dtype=np.int64)
        self.raw_codes = np.ascontiguousarray(self.raw_codes, dtype=np.int64)
        self.suffix = None if self.suffix is None else np.ascontiguousarray(self.suffix, dtype=np.int64)
        self.margin = np.ascontiguousarray(self.margin, dtype=np.float32)
        self.codebook_sizes = tuple(int(size) for size in self.codebook_sizes)
        self._validate()

    @classmethod
    def from_codes(cls, item_ids: Sequence[str], codes: np.ndarray, codebook_sizes: Sequence[int], **columns: object) -> SidTable:
        """Build a table from (N, L) codes. By default, raw codes equal `codes`, the margin is NaN, and there is no suffix."""
        columns = {"raw_codes": codes, "suffix": None, "margin": np.full(len(item_ids), np.nan, dtype=np.float32)} | columns
        return cls(list(item_ids), codes, codebook_sizes=tuple(codebook_sizes), **columns)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        return self.codes.shape[1]

    @property
    def row_of(self) -> dict[str, int]:
        """item_id -> row; computed at each call."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def full_codes(self) -> np.ndarray:
        """(N, L) codes, or (N, L + 1) with the suffix as last column (-1: no suffix)."""
        return self.codes if self.suffix is None else np.concatenate([self.codes, self.suffix[:, None]], axis=1)

    def sid(self, item_id: str) -> tuple[str, ...]:
        """SID tokens of one item, for example `("<a_12>", "<b_7>", "<c_201>")`.

        Raises:
            ArtifactError: the item has no SID.
        """
        (row,) = self.align([item_id]).sid_tokens()
        return tuple(row)

    def sid_tokens(self) -> list[list[str]]:
        """SID tokens of each item, in table order: one per level, and one more for an item with a suffix."""
        return [[token(level, code) for level, code in enumerate(row) if code >= 0] for row in self.full_codes().tolist()]

    def level_tokens(self) -> list[list[str]]:
        """SID tokens per level, indexed by code; a suffix is one more level."""
        sizes = list(self.codebook_sizes)
        if self.suffix is not None:
            sizes.append(max(int(self.suffix.max(initial=-1)) + 1, 1))
        return [[token(level, code) for code in range(size)] for level, size in enumerate(sizes)]

    def vocabulary(self) -> list[str]:
        """All SID tokens that a text tokenizer needs, unused codes included, so that the vocabulary does not grow."""
        return [text for level in self.level_tokens() for text in level]

    def align(self, item_ids: Sequence[str]) -> SidTable:
        """Select and reorder rows by `item_ids`.

        Raises:
            ArtifactError: an item has no SID.
        """
        row_of = self.row_of
        missing = [item_id for item_id in item_ids if item_id not in row_of]
        if missing:
            raise ArtifactError(
                f"{len(missing)} of {len(item_ids)} items have no Semantic ID (first: {missing[0]!r}; the table has {len(self)} items); "
                "assign SIDs for this catalogue first"
            )
        rows = np.array([row_of[item_id] for item_id in item_ids], dtype=np.int64)
        return replace(
            self,
            item_ids=list(item_ids),
            codes=self.codes[rows],
            raw_codes=self.raw_codes[rows],
            suffix=None if self.suffix is None else self.suffix[rows],
            margin=self.margin[rows],
            source=None if self.source is None else self.source[rows],
        )

    def save(self, path: Path) -> None:
        """Write the table as parquet; sizes, hashes and schema version are stored in the schema metadata."""
        columns = {
            "item_id": id_array(self.item_ids, self.integer_ids),
            "codes": _list_column(self.codes),
            "raw_codes": _list_column(self.raw_codes),
            "suffix": pa.nulls(len(self), pa.int32())
            if self.suffix is None
            else pa.array(self.suffix.astype(np.int32), mask=self.suffix < 0),
            "margin": pa.array(self.margin, pa.float32(), mask=np.isnan(self.margin)),
        }
        if self.source is not None:
            columns["source"] = pa.array(self.source.tolist(), pa.string())
        metadata = {
            "mmsid_sids_version": str(SCHEMA_VERSION),
            "num_levels": str(self.num_levels),
            "codebook_sizes": ",".join(map(str, self.codebook_sizes)),
            "has_suffix": str(int(self.suffix is not None)),
            "tokenizer_sha256": self.tokenizer_sha256,
            "catalog_sha256": self.catalog_sha256,
        }
        write_table(path, pa.table(columns), metadata)

    @classmethod
    def load(cls, path: str | Path) -> SidTable:
        """Read and validate a table: a SID folder, or its `sids.parquet`.

        Raises:
            ArtifactError: no table at this path, a file that was changed after the stage wrote it, another schema version, wrong
                number of levels, a code out of range, or a duplicate id. The message names the file, the row and both values.
        """
        path = Path(path)
        path = path if path.suffix == ".parquet" else path / FILE_NAME
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; run `mmsid assign` or `mmsid baselines`, or correct the path")
        verify_file(path)
        table = read_table(path)
        metadata = {
            key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in (table.schema.metadata or {}).items()
        }
        version = metadata.get("mmsid_sids_version")
        if version != str(SCHEMA_VERSION):
            found = "none" if version is None else version
            raise ArtifactError(f"{path}: SID table version {found}, this mmsid reads {SCHEMA_VERSION}; run `mmsid assign` again")
        missing = {"item_id", "codes", "raw_codes", "suffix", "margin"} - set(table.column_names)
        if missing:
            raise ArtifactError(f"{path}: columns {sorted(missing)} missing, found {table.column_names}; run `mmsid assign` again")
        try:
            sizes = tuple(int(size) for size in metadata["codebook_sizes"].split(","))
            num_levels = int(metadata["num_levels"])
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path}: schema metadata num_levels or codebook_sizes missing or unreadable; run `mmsid assign` again"
            ) from error
        if len(sizes) != num_levels:
            raise ArtifactError(
                f"{path}: metadata has num_levels {num_levels} but codebook_sizes has {len(sizes)} entries; run `mmsid assign` again"
            )
        integer_ids = pa.types.is_integer(table["item_id"].type)
        table = _cast(with_text_ids(table), path)
        suffix = None
        if metadata.get("has_suffix") == "1":
            suffix = np.asarray(table["suffix"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
        try:
            if table["item_id"].null_count:
                raise ArtifactError(f"item_id is null in {table['item_id'].null_count} rows; every row needs an id")
            return cls(
                item_ids=table["item_id"].to_pylist(),
                codes=_matrix(table["codes"], "codes", num_levels),
                raw_codes=_matrix(table["raw_codes"], "raw_codes", num_levels),
                suffix=suffix,
                margin=np.asarray(table["margin"].to_numpy(), dtype=np.float32),
                codebook_sizes=sizes,
                tokenizer_sha256=metadata.get("tokenizer_sha256", ""),
                catalog_sha256=metadata.get("catalog_sha256", ""),
                source=np.array(table["source"].to_pylist(), dtype=object) if "source" in table.column_names else None,
                integer_ids=integer_ids,
            )
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error

    def _validate(self) -> None:
        num_items, num_levels = len(self.item_ids), len(self.codebook_sizes)
        if num_levels == 0 or min(self.codebook_sizes) < 1:
            raise ArtifactError(f"codebook_sizes must be one positive integer per level, got {self.codebook_sizes}")
        for name, codes in (("codes", self.codes), ("raw_codes", self.raw_codes)):
            if codes.shape != (num_items, num_levels):
                raise ArtifactError(
                    f"{name} has shape {codes.shape}, but there are {num_items} items and {num_levels} codebook sizes; "
                    "every item needs one code per level"
                )
            outside = (codes < 0) | (codes >= np.array(self.codebook_sizes))
            if outside.any():
                row, level = (int(index) for index in np.argwhere(outside)[0])
                raise ArtifactError(
                    f"{name} of row {row} (item {self.item_ids[row]!r}): level {level + 1} has code {codes[row, level]}, "
                    f"its codebook has {self.codebook_sizes[level]} codes (0..{self.codebook_sizes[level] - 1}); "
                    f"{int(outside.any(axis=1).sum())} rows are out of range; assign again with the right codebook size"
                )
        for name, column in (("suffix", self.suffix), ("margin", self.margin), ("source", self.source)):
            if column is not None and column.shape != (num_items,):
                raise ArtifactError(f"{name} has shape {column.shape}, expected ({num_items},): one value per item")
        if self.suffix is not None and (self.suffix < -1).any():
            row = int(np.argmax(self.suffix < -1))
            raise ArtifactError(f"suffix of row {row} (item {self.item_ids[row]!r}) is {self.suffix[row]}, expected -1 (none) or more")
        if self.source is not None and (other := ~np.isin(self.source, (BEHAVIOUR, CONTENT))).any():
            row = int(np.argmax(other))
            raise ArtifactError(
                f"source of row {row} (item {self.item_ids[row]!r}) is {self.source[row]!r}, expected {BEHAVIOUR} or {CONTENT}"
            )
        if len(set(self.item_ids)) != num_items:
            first_row: dict[str, int] = {}
            for row, item_id in enumerate(self.item_ids):
                if item_id in first_row:
                    raise ArtifactError(f"item_id {item_id!r} is in row {first_row[item_id]} and again in row {row}; ids must be unique")
                first_row[item_id] = row


def _list_column(codes: np.ndarray) -> pa.Array:
    offsets = pa.array(np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(codes.ravel().astype(np.int32)))


_TYPES = {
    "item_id": pa.string(), "codes": pa.list_(pa.int64()), "raw_codes": pa.list_(pa.int64()), "suffix": pa.int64(), "margin": pa.float32(),
    "source": pa.string(),
}  # fmt: skip


def _cast(table: pa.Table, path: Path) -> pa.Table:
    """Cast the columns to the expected types. Strings are not accepted as numbers or lists."""
    columns = {}
    for name, expected in _TYPES.items():
        if name == "source" and name not in table.column_names:  # tables of other tools, and of methods with one reading, lack it
            continue
        found = table[name].type
        inner = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else found
        is_text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
        try:
            if is_text != (expected == pa.string()) and not pa.types.is_null(inner):
                raise pa.ArrowInvalid
            columns[name] = table[name].cast(expected)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ArtifactError(f"{path}: column {name!r} has type {found}, expected {expected}; run `mmsid assign` again") from error
    return pa.table(columns)


def _matrix(column: pa.ChunkedArray, name: str, num_levels: int) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty table returns no array
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.list_(pa.int32()))
    if array.null_count:
        raise ArtifactError(f"{name} is null in {array.null_count} rows; every item needs codes")
    lengths = np.diff(array.offsets.to_numpy())
    if (lengths != num_levels).any():
        row = int(np.argmax(lengths != num_levels))
        raise ArtifactError(f"{name} of row {row} has {lengths[row]} levels, expected {num_levels}; every item needs one code per level")
    values = array.flatten()
    if values.null_count:
        raise ArtifactError(f"{name} has {values.null_count} null codes; every level needs a code")
    return values.to_numpy(zero_copy_only=False).astype(np.int64).reshape(len(array), num_levels)
