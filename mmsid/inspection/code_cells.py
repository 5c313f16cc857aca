"""Codes from cells of any form: lists of numbers or tokens, texts such as "<a_3><b_17>" or "3-17-201", one column per level."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.sids.trie import MAX_CODES

_MARKS = r"<\|?sid_(begin|start|end)\|?>"  # of OneRec and FlashRec, around the codes
_NUMBERED = re.compile(r"^['\"\s]*(\D*?(?:\d+\D+?)*?)(\d{1,18})(?:\.0+)?([^\d]*?)['\"\s]*$")
_SPACE = "\x1f"
_LONGEST = 100  # characters of a token


@dataclass(frozen=True)
class CodeCells:
    """Codes of R rows as they are written, end to end.

    Attributes:
        lengths: (R,) int64, codes of each row; -1 where the cell is missing.
        numbers: (V,) int64; -1 where a code is missing or holds no number, -2 where it is negative or too large.
        shapes: (V,) int64, what surrounds the number: index into `forms`.
        forms: for example "<a_…>"; "…" for plain numbers.
        texts: (V,) the codes as they are written, for messages.
    """

    lengths: np.ndarray
    numbers: np.ndarray
    shapes: np.ndarray
    forms: list[str]
    texts: pa.Array


def of_column(column: pa.ChunkedArray | pa.Array) -> CodeCells:
    """Codes of one column: lists, texts that hold several codes, or numbers (one level).

    Raises:
        TypeError: the column holds something else, such as lists of lists.
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):  # of no chunks, or of too many bytes
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        missing = column.is_null().to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return _of_values(np.where(missing, -1, lengths), column.filter(column.is_valid()).flatten())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return of_column(_split(column))
    if pa.types.is_null(kind):
        return _of_values(np.full(len(column), -1), pa.array([], pa.string()))
    return _of_values(np.where(column.is_null().to_numpy(zero_copy_only=False), -1, 1), column.drop_null())


def of_columns(columns: list[pa.Array]) -> CodeCells:
    """Codes of one column per level. A missing cell is a missing code."""
    texts = [_texts(column) for column in columns]
    rows = len(texts[0])
    order = np.arange(rows * len(texts)).reshape(len(texts), rows).T.ravel()
    return _of_values(np.full(rows, len(texts)), pa.concat_arrays(texts).take(pa.array(order)))


def of_matrix(matrix: np.ndarray) -> CodeCells:
    """Codes of an array (R, L) of numbers."""
    return _of_values(np.full(len(matrix), matrix.shape[1]), pa.array(np.ascontiguousarray(matrix).ravel()))


def _split(texts: pa.Array) -> pa.Array:
    """Texts -> lists of the codes in them. Brackets end a token; otherwise commas, semicolons, bars, slashes or white space; else - _ :."""
    texts = pc.replace_substring_regex(texts.cast(pa.string()), _MARKS, "")
    texts = pc.utf8_trim(texts, " []()\t\"'")
    sample = pc.drop_null(texts.slice(0, 10_000))

    def share(pattern: str) -> float:
        return float(pc.mean(pc.match_substring_regex(sample, pattern).cast(pa.float64())).as_py() or 0.0) if len(sample) else 0.0

    if share(r">") > 0.5:
        texts = pc.replace_substring_regex(texts, r">[\s,;|'\"]*", ">" + _SPACE)
    elif share(r"[,;|/\s]") > 0.5:
        texts = pc.replace_substring_regex(texts, r"[\s,;|/]+", _SPACE)
    else:
        texts = pc.replace_substring_regex(texts, r"[-_:]+", _SPACE)
    texts = pc.utf8_trim(texts, _SPACE)
    return pc.split_pattern(pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts), _SPACE)


def _texts(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        whole = pc.fill_null(pc.equal(column, pc.floor(column)), True)
        if pc.all(whole).as_py() is not False:
            column = column.cast(pa.int64(), safe=False)
    if pa.types.is_nested(column.type):
        raise TypeError(f"holds {column.type}")
    return column.cast(pa.string())


def _of_values(lengths: np.ndarray, values: pa.Array) -> CodeCells:
    lengths = np.asarray(lengths, dtype=np.int64)
    if pa.types.is_nested(values.type):
        raise TypeError(f"holds {values.type}")
    if pa.types.is_integer(values.type):
        numbers = _checked(pc.fill_null(values.cast(pa.int64()), -1).to_numpy(zero_copy_only=False))
        numbers = np.where(values.is_null().to_numpy(zero_copy_only=False), -1, numbers)
        return CodeCells(lengths, numbers, np.zeros(len(values), dtype=np.int64), ["…"], values)
    if pa.types.is_floating(values.type):
        found = pc.fill_null(values.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        whole = np.isfinite(found) & (found == np.floor(found))
        numbers = np.where(whole, _checked(np.where(whole, np.clip(found, -1, MAX_CODES), 0)), -1)
        return CodeCells(lengths, numbers, np.zeros(len(values), dtype=np.int64), ["…"], values)
    texts = _texts(values)
    encoded = pc.dictionary_encode(texts)
    found = [_parsed(text) for text in encoded.dictionary.to_pylist()]
    forms = {form: number for number, form in enumerate(dict.fromkeys(["…", *(form for _, form in found)]))}
    at = pc.fill_null(encoded.indices, len(found)).to_numpy(zero_copy_only=False)
    numbers = np.array([number for number, _ in found] + [-1], dtype=np.int64)
    shapes = np.array([forms[form] for _, form in found] + [0], dtype=np.int64)
    return CodeCells(lengths, numbers[at], shapes[at], list(forms), texts)


def _parsed(text: str) -> tuple[int, str]:
    """Number of a code and what surrounds it; -1 where there is no number, -2 where it is negative or too large."""
    match = _NUMBERED.match(text) if len(text) <= _LONGEST else None
    if match is None:
        return -1, "…"
    before, number, after = match.groups()
    if before.strip() == "-":
        return -2, "…"
    return (int(number) if int(number) < MAX_CODES else -2), f"{before}…{after}"


def _checked(numbers: np.ndarray) -> np.ndarray:
    return np.where((numbers < 0) | (numbers >= MAX_CODES), -2, numbers).astype(np.int64)
