"""Tables of Semantic IDs of other projects: which columns hold the ids and the codes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.sources.opened import open_table
from mmsid.errors import ArtifactError
from mmsid.id_columns import holds_integers
from mmsid.inspection.code_cells import CodeCells, of_column, of_columns

ID_NAMES = ("item_id", "itemid", "item", "id", "iid", "pid", "asin", "parent_asin", "sku", "product_id", "ad_id", "video_id", "movie_id")
CODE_NAMES = ("codes", "code", "semantic_id", "semantic_ids", "sid", "sids", "sid_tokens", "tokens", "token_ids", "indices", "index")
_NUMBERED = re.compile(r"^(.*?)[_\- ]?(\d+)$")


def read_code_table(
    path: Path, id_column: str | None, code_columns: Sequence[str] | None, notes: list[str]
) -> tuple[pa.Array, CodeCells, dict[int, str], bool]:
    """Ids (text, null where missing), codes, unusable rows (row -> cell) of a table, and whether its ids are whole numbers.

    Raises:
        ArtifactError: a column is absent, unclear, or holds something that is no code.
        CatalogError: the file is damaged or no table.
    """
    table = open_table(path, config_key="mmsid inspect")
    ids_name = _id_column(path, table.columns, id_column)
    names = _code_columns(path, [name for name in table.columns if name != ids_name], code_columns)
    parts: dict[str, list[pa.Array]] = {name: [] for name in (ids_name, *names)}
    for batch in table.batches(list(parts)):
        for name, chunks in parts.items():
            column = batch.column(name)
            if isinstance(column, list) or column is None:
                column = pa.array([None if one is None else str(one) for one in batch.values(name)], pa.string())
            chunks.append(column)
    notes += table.notes
    notes.append(f"ids are read from the column {ids_name!r}, codes from {', '.join(map(repr, names))}")
    ids = _joined(parts[ids_name])
    integer_ids = holds_integers(ids.type)
    try:
        ids = pc.utf8_trim_whitespace(ids.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"{path}: column {ids_name!r} holds {ids.type}, expected ids; name another with --id-column") from error
    try:
        cells = of_column(_joined(parts[names[0]])) if len(names) == 1 else of_columns([_joined(parts[name]) for name in names])
    except (TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"{path}: column {', '.join(names)} {error}, expected codes; name others with --code-columns") from error
    return pc.if_else(pc.equal(ids, ""), pa.scalar(None, pa.string()), ids), cells, {}, integer_ids


def _joined(chunks: list[pa.Array]) -> pa.Array:
    kinds = {chunk.type for chunk in chunks}
    if len(kinds) > 1:
        chunks = [chunk if pa.types.is_string(chunk.type) else chunk.cast(pa.string()) for chunk in chunks]
    return pa.concat_arrays(chunks)


def _id_column(path: Path, columns: Sequence[str], given: str | None) -> str:
    if given is not None:
        return _present(path, columns, given, "--id-column")
    for name in ID_NAMES:
        found = [column for column in columns if column.lower() == name]
        if found:
            return found[0]
    raise ArtifactError(f"{path}: no column has a usual name of ids, found {', '.join(columns)}; name it with --id-column")


def _code_columns(path: Path, columns: Sequence[str], given: Sequence[str] | None) -> list[str]:
    if given:
        return [_present(path, columns, name, "--code-columns") for name in given]
    for name in CODE_NAMES:
        if found := [column for column in columns if column.lower() == name]:
            return found[:1]
    families: dict[str, list[tuple[int, str]]] = {}
    for column in columns:
        if match := _NUMBERED.match(column):
            families.setdefault(match[1].lower(), []).append((int(match[2]), column))
    several = {stem: sorted(members) for stem, members in families.items() if len(members) > 1}
    if len(several) == 1:
        return [column for _, column in next(iter(several.values()))]
    unclear = f"{len(several)} families of numbered columns" if several else "no column of a usual name"
    raise ArtifactError(f"{path}: {unclear} for codes, found {', '.join(columns)}; name them in order with --code-columns a,b,c")


def _present(path: Path, columns: Sequence[str], name: str, option: str) -> str:
    if name not in columns:
        raise ArtifactError(f"{path}: {option} names {name!r}, the file has {', '.join(columns)}; name a column of the file")
    return name
