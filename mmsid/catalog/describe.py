"""Summary statistics of a catalogue, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmsid.catalog.catalog import Catalog
from mmsid.catalog.fields import not_read_text
from mmsid.catalog.item import Item
from mmsid.catalog.item_table import ItemTable, lengths
from mmsid.catalog.splits import Split, seen_targets_warning


def describe(catalog: Catalog, split: Split | None = None) -> dict[str, Any]:
    """Counts of items, pictures, texts, categories, users and problems, as JSON-serialisable data.

    `target_seen_before` counts test users whose target occurs in their own history. Seen items are masked in evaluation, so no
    model can rank such a target.
    """
    facts: dict[str, Any] = {
        "items": len(catalog.items),
        **_content_counts(catalog.items),
        "users": len(catalog.histories),
        "interactions": len(catalog.histories.rows),
        "problems": dict(sorted(catalog.problems.items())),
        "not_read": list(catalog.not_read),
        "notes": list(catalog.notes),
        "sha256": catalog.sha256,
    }
    if catalog.vectors is not None:
        facts |= {"items_with_vector": int(catalog.vectors.present.sum()), "vector_widths": list(catalog.vectors.widths)}
    if catalog.histories.weights is not None:
        facts["weight"] = float(catalog.histories.weights.sum())
    if split is not None:
        facts["split"] = {
            "train_interactions": sum(map(len, split.train)),
            "valid_users": len(split.users("valid")),
            "test_users": len(split.users("test")),
            "held_out_users": int(split.held_out.sum()),
            "target_seen_before": int(split.target_seen_before("test").sum()),
        }
    return facts


def _content_counts(items: Sequence[Item]) -> dict[str, Any]:
    table = items.table if isinstance(items, ItemTable) else _table(items)
    pictures = lengths(table["creatives"])
    has_text = pc.or_(pc.not_equal(table["title"], ""), pc.not_equal(table["description"], ""))
    names = pc.struct_field(pc.list_flatten(table["attributes"]), "name")
    return {
        "distinct_contents": pc.count_distinct(table["content_sha256"]).as_py(),
        "items_with_picture": int(np.count_nonzero(pictures)),
        "pictures": int(pictures.sum()),
        "items_with_text": pc.sum(has_text).as_py() or 0,
        "items_with_categories": int(np.count_nonzero(lengths(table["categories"]))),
        "categories_per_depth": _categories_per_depth(table["categories"]),
        "attributes": sorted(pc.unique(names).to_pylist()),
    }


def _table(items: Sequence[Item]) -> pa.Table:
    """The columns that are counted, of items that are no `ItemTable`."""
    texts = {name: [getattr(item, name) for item in items] for name in ("title", "description", "content_sha256")}
    columns = {name: pa.array(values, pa.large_string()) for name, values in texts.items()}
    columns["creatives"] = pa.array([[str(path) for path in item.images] for item in items], pa.large_list(pa.large_string()))
    columns["categories"] = pa.array([list(item.categories) for item in items], pa.large_list(pa.large_string()))
    attributes = [[{"name": name} for name in item.attributes] for item in items]
    columns["attributes"] = pa.array(attributes, pa.large_list(pa.struct({"name": pa.large_string()})))
    return pa.table(columns)


def _categories_per_depth(column: pa.ChunkedArray) -> list[int]:
    """Number of distinct paths from the root, for each depth. `column`: list of names per item."""
    counts = lengths(column)
    first = np.cumsum(counts) - counts
    names = pc.list_flatten(column).combine_chunks().dictionary_encode() if counts.any() else None
    path, found = np.zeros(len(counts), dtype=np.int64), []
    for depth in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > depth)
        name = np.asarray(names.indices)[first[rows] + depth].astype(np.int64)
        distinct, path[rows] = np.unique(path[rows] * len(names.dictionary) + name, return_inverse=True)
        found.append(len(distinct))
    return found


def summary(facts: dict[str, Any]) -> str:
    """Text of the result of `describe`, one fact per line."""
    items = facts["items"]
    lines = [
        f"items         {items:,} ({facts['distinct_contents']:,} with distinct content)",
        f"with picture  {facts['items_with_picture']:,} ({_share(facts['items_with_picture'], items)}), {facts['pictures']:,} pictures",
        f"with text     {facts['items_with_text']:,} ({_share(facts['items_with_text'], items)})",
        f"categories    {facts['items_with_categories']:,} items ({_share(facts['items_with_categories'], items)}), "
        f"distinct per depth: {', '.join(map(str, facts['categories_per_depth'])) or 'none'}",
        f"attributes    {', '.join(facts['attributes'][:12]) or 'none'}{', …' if len(facts['attributes']) > 12 else ''}",
        f"users         {facts['users']:,} with {facts['interactions']:,} interactions",
    ]
    if "weight" in facts:
        lines[-1] += f" of total weight {facts['weight']:,.10g}"
    if "vector_widths" in facts:
        share, widths = _share(facts["items_with_vector"], items), " + ".join(map(str, facts["vector_widths"]))
        lines.insert(3, f"with vector   {facts['items_with_vector']:,} ({share}), dimension {widths}")
    if "split" in facts:
        split = facts["split"]
        lines.append(
            f"split         {split['train_interactions']:,} train interactions, {split['valid_users']:,} valid and "
            f"{split['test_users']:,} test users, {split['held_out_users']:,} users held out of train; "
            f"{split['target_seen_before']:,} test targets seen before"
        )
        if warning := seen_targets_warning(split["target_seen_before"], split["test_users"]):
            lines.append(f"warning       {warning}")
    problems = ", ".join(f"{code} {count:,}" for code, count in facts["problems"].items())
    lines.append(f"problems      {problems or 'none'}")
    if facts["not_read"]:
        lines.append(f"not read      {not_read_text(facts['not_read']).removeprefix('not read: ')}")
    lines += [f"note          {note}" for note in facts["notes"]]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"
