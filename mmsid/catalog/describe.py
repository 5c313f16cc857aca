"""Summary statistics of a catalogue, as data and as text."""

from __future__ import annotations

from typing import Any

from mmsid.catalog.catalog import Catalog
from mmsid.catalog.fields import not_read_text
from mmsid.catalog.splits import Split, seen_targets_warning


def describe(catalog: Catalog, split: Split | None = None) -> dict[str, Any]:
    """Counts of items, pictures, texts, categories, users and problems, as JSON-serialisable data.

    `target_seen_before` counts test users whose target occurs in their own history. Seen items are masked in evaluation, so no
    model can rank such a target.
    """
    facts: dict[str, Any] = {
        "items": len(catalog.items),
        "distinct_contents": len(set(catalog.content_hashes)),
        **_content_counts(catalog),
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


def _content_counts(catalog: Catalog) -> dict[str, Any]:
    items, pictures, text, attributes = 0, 0, 0, set()
    depths: list[set[tuple[str, ...]]] = []
    with_categories = 0
    for item in catalog.items:
        items += bool(item.images)
        pictures += len(item.images)
        text += bool(item.title or item.description)
        with_categories += bool(item.categories)
        attributes.update(item.attributes)
        depths += [set() for _ in range(len(item.categories) - len(depths))]
        for depth in range(len(item.categories)):
            depths[depth].add(item.categories[: depth + 1])
    return {
        "items_with_picture": items,
        "pictures": pictures,
        "items_with_text": text,
        "items_with_categories": with_categories,
        "categories_per_depth": [len(names) for names in depths],
        "attributes": sorted(attributes),
    }


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
