"""STUB"""

from dataclasses import dataclass

import pyarrow as pa

from mmsid.catalog.prompt_injection import clean, text_problems
from mmsid.catalog.tables import Cells, require_column
from mmsid.errors import CatalogError


def _names(mapped):
    return () if mapped is None else (mapped,) if isinstance(mapped, str) else tuple(mapped)


@dataclass
class FieldMapping:
    fields: object
    columns: tuple
    item_id: str
    title: tuple
    description: tuple
    pictures: tuple
    categories: tuple
    attributes: tuple
    notes: list
    not_read: tuple
    preset: object = None
    groups: bool = False


def resolve_mapping(table, fields, config_key):
    present = set(table.columns)

    def req(column, key):
        if column not in present:
            raise CatalogError(
                f"{table.files[0]}: no column {column!r} ({key}); found: {', '.join(table.columns)}; correct the mapping or add the column"
            )

    idf = "item_id" if fields.group_by is None else "group_by"
    req(getattr(fields, idf), f"catalog.fields.{idf}")
    for f in ("title", "description", "image", "categories"):
        if f in fields.model_fields_set:
            for c in sorted(_names(getattr(fields, f))):
                req(c, f"catalog.fields.{f}")
    for c in fields.attributes:
        req(c, "catalog.fields.attributes")
    pick = lambda m: tuple(n for n in _names(m) if n in present)
    parts = [
        (getattr(fields, idf),),
        pick(fields.title),
        pick(fields.description),
        pick(fields.image),
        pick(fields.categories),
        tuple(fields.attributes),
    ]
    cols = tuple(dict.fromkeys(c for p in parts for c in p))
    return FieldMapping(fields, cols, parts[0][0], *parts[1:], [], tuple(c for c in table.columns if c not in cols))


def item_fields(batch, mapping, clean_text):
    cells, f = Cells(batch.rows, mapping.fields.list_separator), mapping.fields
    out = {k: [] for k in ("item_id", "title", "description", "categories", "attributes", "pictures", "problems", "original")}
    for i in range(len(batch)):
        texts = {n: cells.text(i, (getattr(mapping, n) or (None,))[0]) for n in ("title", "description")}
        pr = [f"{n}_{c}" for n, t in texts.items() for c in text_problems(t)]
        if pr and clean_text:
            texts = {n: clean(t) for n, t in texts.items()}
        path = tuple(n for c in mapping.categories for n in cells.texts(i, c))
        if f.category_roots:
            path = path[next((d for d, n in enumerate(path) if n in f.category_roots), len(path)) :]
        if len(mapping.attributes) == 1 and (m := cells.mapping(i, mapping.attributes[0])) is not None:
            at = m
        else:
            at = {n: cells.texts(i, n) for n in mapping.attributes}
            at = {n: v for n, v in at.items() if v}
        out["item_id"].append(cells.text(i, mapping.item_id))
        for n, t in texts.items():
            out[n].append(t)
        out["categories"].append(path)
        out["attributes"].append([{"name": n, "labels": at[n]} for n in sorted(at)])
        out["pictures"].append([{"ref": p, "data": None} for c in mapping.pictures for p in cells.texts(i, c)])
        out["problems"].append(pr)
        out["original"].append(None)
    L = pa.large_string()
    ty = {
        "item_id": L,
        "title": L,
        "description": L,
        "categories": pa.large_list(L),
        "attributes": pa.large_list(pa.struct([("name", L), ("labels", pa.large_list(L))])),
        "pictures": pa.large_list(pa.struct([("ref", L), ("data", pa.large_binary())])),
        "problems": pa.large_list(L),
        "original": L,
    }
    return pa.table({k: pa.array(v, ty[k]) for k, v in out.items()})
