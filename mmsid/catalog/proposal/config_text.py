"""Text of the proposal: the table for people, and the commented YAML of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmsid.catalog.proposal.propose import Proposal

_ITEMS_PER_CODE = 37  # of the shipped configurations
_VLM = "Qwen/Qwen2.5-VL-3B-Instruct"


def proposal_table(proposal: Proposal) -> str:
    """Table `column, role, example, filled`, then the log and what is not used."""
    rows = [("column", "role", "example", "filled")]
    rows += [(name, role, _cut(facts.example, 50), f"{100 * facts.filled:.0f} %") for name, role, facts in proposal.columns]
    if proposal.roles is not None:
        roles = proposal.roles
        named = (
            ("user_id", roles.user),
            ("sequence", roles.sequence),
            ("event_item", roles.item),
            ("time", roles.time),
            ("event_type", roles.type),
        )
        rows += [(column, f"{role} of the log", "", "") for role, column in named if column is not None]
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows]
    facts = [
        f"items   {_shown(proposal.items)}: {proposal.num_items:,} items"
        + (f", {proposal.mapping.preset}" if proposal.mapping.preset else "")
    ]
    if proposal.logs is not None:
        facts.append(f"logs    {_shown(proposal.logs)}: {100 * proposal.overlap:.0f} % of the item ids are among the items")
    facts += [f"note    {note}" for note in proposal.notes]
    facts += [f"unused  {line}" for line in proposal.unused]
    return "\n".join([*lines, "", *facts])


def config_text(proposal: Proposal, name: str) -> str:
    """Commented YAML with all stages that the catalogue has the data for."""
    mapping, facts = proposal.mapping, {column: (role, each) for column, role, each in proposal.columns}
    lines = [
        "# Written by `mmsid init`. Look at the catalogue with `mmsid catalog --config FILE`, then run it with `mmsid run FILE`.",
        f"name: {_value(name)}",
        "catalog:",
        f"  items: {_source(proposal.items)}",
    ]
    if proposal.image_root is not None:
        lines.append(f"  image_root: {_value(str(proposal.image_root))}   # picture paths start here")
    roles = proposal.roles
    if roles is not None:
        lines.append(f"  {'sequences' if roles.sequence else 'events'}: {_source(proposal.logs)}")
        if roles.type is not None and roles.types:
            types = ", ".join(f"{_value(kind)}: 1" for kind in roles.types)
            lines.append(f"  event_types: {{{types}}}   # weight of each type; 0 leaves its events out of the histories")
    lines.append("  fields:")
    ids = ["group_by"] if mapping.group_by is not None else []
    if mapping.group_by is None or mapping.item_id in facts:
        ids.append("item_id")
    for field in (*ids, "title", "description", "image", "categories", "attributes"):
        value = getattr(mapping, field)
        if not value:
            continue
        columns = [value] if isinstance(value, str) else list(value)
        single = len(columns) == 1 and field != "attributes"
        text = _value(columns[0]) if single else f"[{', '.join(map(_value, columns))}]"
        example = _cut(next((facts[column][1].example for column in columns if column in facts), ""), 40)
        lines.append(f"    {field}: {text}" + (f"   # for example {example}" if example else ""))
    if roles is not None:
        named = {"user_id": roles.user, "sequence": roles.sequence, "event_item": roles.item}
        named |= {"timestamps" if roles.sequence else "event_time": roles.time, "event_type": roles.type, "event_weight": roles.weight}
        lines += [f"    {field}: {_value(column)}" for field, column in named.items() if column is not None]
    unread = [column for column, (role, _) in facts.items() if role == "-"]
    if unread:
        lines.append(f"    # not read: {', '.join(unread)}")
    return "\n".join([*lines, "", *_stages(proposal)]) + "\n"


def _stages(proposal: Proposal) -> list[str]:
    mapping = proposal.mapping
    has_text = any((mapping.title, mapping.description, mapping.categories, mapping.attributes))
    size = 2 ** min(8, max(3, round(math.log2(max(1, proposal.num_items) / _ITEMS_PER_CODE))))
    lines = []
    if mapping.image:
        section = f"caption: {{model: {_VLM}}}"
        lines.append(
            f"{section}   # the model reads the pictures; needs a GPU"
            if not has_text
            else f"# {section}   # reads the pictures; needs a GPU"
        )
    lines += [
        "train_tokenizer:",
        f"  codebook_size: {size}   # about {max(1, round(proposal.num_items / size)):,} items per code and level",
        "  num_levels: 3",
        "assign:",
        f"baselines: {{num_levels: 3, codebook_size: {size}}}",
    ]
    if proposal.roles is not None:
        lines.append("train_recommender: {seeds: [0]}   # HR@K and NDCG@K of the Semantic IDs")
    else:
        lines.append("# train_recommender:   # needs catalog.sequences or catalog.events")
    return [*lines, "report:"]


def _source(source: Any) -> str:
    return f"[{', '.join(map(_source, source))}]" if isinstance(source, tuple) else _value(str(source))


def _shown(source: Any) -> str:
    return ", ".join(map(str, source)) if isinstance(source, tuple) else str(source)


def _value(text: str | Path) -> str:
    """A YAML scalar: JSON strings are valid YAML, and plain words need no quotes."""
    text = str(text)
    plain = text.replace("_", "a").replace("/", "a").replace("-", "a").replace(".", "a")
    is_word = (
        plain.isascii()
        and plain.isalnum()
        and text[0].isalpha()
        and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    )
    return text if is_word else json.dumps(text, ensure_ascii=False)


def _cut(text: str, length: int) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= length else text[: length - 3] + "..."
