"""The audit: figures of one mapping, from the metrics that every SID folder of mmsid has, as JSON, tables or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsid.artifacts import write_text
from mmsid.catalog import CatalogConfig
from mmsid.errors import ArtifactError
from mmsid.inspection.evidence import Vectors, catalog_of, logs_of_catalog, logs_of_file, vectors_of_file
from mmsid.inspection.mapping import Mapping, read_mapping, same_sizes
from mmsid.sids.churn import churn_report
from mmsid.sids.distribution import chance_agreement
from mmsid.sids.intrinsic import intrinsic_metrics
from mmsid.sids.popularity import popularity_allocation
from mmsid.sids.semantics import nearest_neighbour_lcp
from mmsid.sids.table import SidTable
from mmsid.sids.tree_shape import shared_paths, tree_shape

SCHEMA_VERSION = 1
LISTED = 1_000  # unusable rows in the audit; all are counted
_SIMILARITIES = 1_000_000_000  # at most, for nearest neighbours


def inspect_sids(
    path: str | Path,
    *,
    id_column: str | None = None,
    code_columns: Sequence[str] | None = None,
    codebook_sizes: Sequence[int] | None = None,
    histories: str | Path | None = None,
    vectors: str | Path | None = None,
    catalog: CatalogConfig | None = None,
    against: str | Path | None = None,
    page: str | Path | None = None,
) -> dict[str, Any]:
    """Audit a mapping of items to Semantic IDs, of mmsid or of another project.

    Args:
        path, id_column, code_columns, codebook_sizes: as `read_mapping`.
        histories: table of histories or events: popularity, and agreement of items that follow each other.
        vectors: file of item vectors: agreement of nearest neighbours.
        catalog: categories, contents and histories, instead of `histories`.
        against: an older mapping of the same items, read in the same way: churn.
        page: HTML file to write.

    Returns:
        file, counts (in, ok, quarantined), problems (reason -> rows), problem_rows (the first 1,000), notes; intrinsic (as
        `intrinsic.json` of a SID folder, without retrieval), shared_paths, tree; popularity, neighbours, churn where there is
        evidence. Ready for JSON.
    Raises:
        ArtifactError, CatalogError: a file cannot be read, or does not belong to the others.
    """
    path = Path(path)
    if histories is not None and catalog is not None:
        raise ArtifactError("histories are given twice, by --histories and by the catalogue of --config; leave one out")
    mapping = read_mapping(path, id_column=id_column, code_columns=code_columns, codebook_sizes=codebook_sizes)
    table, notes, found, hashes, categories, logs = mapping.table, list(mapping.notes), None, None, None, None
    if catalog is not None:
        table, found, more = catalog_of(catalog, table)
        notes += more
        logs = logs_of_catalog(catalog, found, table)
        rows = [found.row_of[item_id] for item_id in table.item_ids]
        hashes = [found.content_hashes[row] for row in rows]
        of_all = [item.categories for item in found.items]  # in order: items are read from the disk in blocks
        categories = [of_all[row] for row in rows]
    elif histories is not None:
        logs = logs_of_file(Path(histories), table)
        notes += logs.notes
    pairs = logs.pairs if logs is not None and len(logs.pairs) else None
    audit: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "file": str(path),
        "counts": {"in": mapping.rows, "ok": len(mapping.table), "quarantined": len(mapping.problems)},
        "problems": mapping.reasons,
        "problem_rows": mapping.problems[:LISTED],
        "notes": notes,
        "intrinsic": intrinsic_metrics(
            table,
            categories if categories is not None and any(categories) else None,
            pairs,
            content_hashes=hashes,
            retrieval_pairs=0,
        ),
        "shared_paths": shared_paths(table),
        "tree": tree_shape(table),
    }
    if logs is not None and logs.counts.any():
        audit["popularity"] = popularity_allocation(table.full_codes(), logs.counts, table.codebook_sizes)
    if vectors is not None:
        given = vectors_of_file(Path(vectors), table)
        notes += given.notes
        audit["neighbours"] = _neighbours(table, given)
    if against is not None:
        older = read_mapping(against, id_column=id_column, code_columns=code_columns, codebook_sizes=codebook_sizes)
        audit["churn"] = _churn(older, Mapping(table, mapping.rows, sizes_given=mapping.sizes_given))
    if page is not None:
        from mmsid.inspection.page import render_page

        write_text(Path(page), render_page(audit, table, None if logs is None else logs.counts))
    return audit


def _neighbours(table: SidTable, vectors: Vectors) -> dict[str, Any]:
    """Mean length of the prefix that an item shares with its nearest neighbour, and its chance level."""
    codes = table.codes[vectors.rows]
    queries = max(100, min(2_000, _SIMILARITIES // len(codes)))
    return {
        "items": len(codes),
        "queries": min(queries, len(codes)),
        "shared_codes": nearest_neighbour_lcp(codes, vectors.values, max_queries=queries),
        "chance": float(chance_agreement(codes).sum()),
        "levels": table.num_levels,
    }


def _churn(older: Mapping, newer: Mapping) -> dict[str, Any]:
    before, after = same_sizes(older, newer)
    report = churn_report(before, after)
    if np.array_equal(before.raw_codes, before.codes) and np.array_equal(after.raw_codes, after.codes):
        del report["changed_raw"]  # mappings of other projects have no codes before collision handling
    return report
