"""The figures of an audit as tables, which the terminal and the page show alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """One table.

    Attributes:
        title: heading. about: what the figures say, and what is good.
        columns: names. rows: cells as texts, the first one names the row.
    """

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.about, "", _row(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *(_row(row) for row in self.rows)]) + "\n"


def audit_tables(audit: Mapping[str, Any]) -> list[Figures]:
    """All tables for which the audit has figures."""
    tables = [_usage(audit), _paths(audit), *([_largest(audit)] if audit["shared_paths"]["largest"] else []), _tree(audit)]
    for key, table in (("popularity", _popularity), ("neighbours", _neighbours), ("churn", _churn)):
        if key in audit:
            tables.append(table(audit))
        if key == "neighbours" and "coengagement" in audit["intrinsic"]:
            tables.append(_coengagement(audit))
    if "categories" in audit["intrinsic"]:
        tables.append(_categories(audit))
    if audit["problems"]:
        tables.append(_problems(audit))
    return tables


def summary(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The most important figures, name and text."""
    figures, paths = audit["intrinsic"], _published(audit)
    return [
        ("items", f"{audit['counts']['ok']:,}"),
        ("codes in a Semantic ID", " × ".join(map(str, figures["codebook_sizes"])) + (" + suffix" if "with_suffix" in figures else "")),
        ("items that share a path", f"{paths['colliding_share']:.1%}"),
        ("largest group", f"{paths['max_bucket']:,}"),
        ("smallest perplexity", f"{figures['min_perplexity']:.1f}"),
        ("rows that cannot be used", f"{audit['counts']['quarantined']:,}"),
    ]


def audit_text(audit: Mapping[str, Any]) -> str:
    """The audit as Markdown."""
    counts = audit["counts"]
    lines = [f"{audit['file']}: {counts['in']:,} rows = {counts['ok']:,} usable + {counts['quarantined']:,} that cannot be used", ""]
    lines += [f"- {note}" for note in audit["notes"]] + ([""] if audit["notes"] else [])
    return "\n".join(lines) + "\n" + "\n".join(table.markdown() for table in audit_tables(audit))


def _published(audit: Mapping[str, Any]) -> Mapping[str, Any]:
    """Uniqueness of whole paths, suffix included."""
    return audit["intrinsic"].get("with_suffix", audit["intrinsic"]["published"])


def _usage(audit: Mapping[str, Any]) -> Figures:
    figures = audit["intrinsic"]
    rows = [
        [
            f"level {level + 1}",
            f"{round(one['utilisation'] * size):,} of {size:,}",
            f"{one['utilisation']:.1%}",
            f"{one['perplexity']:.1f}",
            f"{one['gini']:.2f}",
            f"{one['gini_floor']:.2f}",
            f"{one['conditional_entropy']:.2f}",
        ]
        for level, (one, size) in enumerate(zip(figures["levels"], figures["codebook_sizes"], strict=True))
    ]
    return Figures(
        "Code usage",
        "Perplexity is the effective number of codes: near the codebook size is even use, near 1 a collapse. A Gini below that of "
        f"random codes is noise. All paths together are worth {figures['effective_capacity']:,.0f} equally used ones.",
        ["level", "codes used", "share", "perplexity", "Gini", "Gini of random codes", "new information (nats)"],
        rows,
    )


def _paths(audit: Mapping[str, Any]) -> Figures:
    figures, paths = audit["intrinsic"], _published(audit)
    rows = [
        ["distinct paths", f"{paths['buckets']:,}"],
        ["items that share a path", f"{paths['colliding_share']:.2%}"],
        ["the same for random codes", f"{figures['random_colliding_share']:.2%}"],
        ["items without a path of their own", f"{paths['items_lost']:,}"],
        ["largest group", f"{paths['max_bucket']:,}"],
    ]
    if "exact_duplicates" in paths:
        rows.append(["items with the content of another", f"{paths['exact_duplicates']:,}"])
    if "with_suffix" in figures:
        rows.append(["items that share a path without the suffix", f"{figures['published']['colliding_share']:.2%}"])
    sizes = list(audit["shared_paths"]["sizes"].items())
    rows += [[f"groups of {size} items", f"{count:,}"] for size, count in sizes[:6]]
    if len(sizes) > 6:
        rows.append([f"groups of {sizes[6][0]} items and more", f"{sum(count for _, count in sizes[6:]):,}"])
    return Figures("Collisions", "Items with the same path cannot be told apart by a generative recommender.", ["", "figure"], rows)


def _largest(audit: Mapping[str, Any]) -> Figures:
    rows = [
        [group["sid"], f"{group['items']:,}", ", ".join(map(_short, group["examples"])) + _more(group)]
        for group in audit["shared_paths"]["largest"]
    ]
    return Figures("Largest groups", "Paths with the most items.", ["path", "items", "item ids"], rows)


def _tree(audit: Mapping[str, Any]) -> Figures:
    rows = [
        [
            _first(depth + 1),
            f"{one['nodes']:,}",
            f"{one['largest_share']:.2%}",
            *(
                [f"{one['children']:.1f}", f"{one['max_children']:,}", f"{one['single_child']:.1%}"]
                if depth + 1 < len(audit["tree"])
                else "---"
            ),
        ]
        for depth, one in enumerate(audit["tree"])
    ]
    return Figures(
        "Prefix tree",
        "A prefix with a single child leaves the next code no choice: many of them mean that later levels carry little.",
        ["prefix", "prefixes", "items under the largest", "children (mean)", "children (most)", "with a single child"],
        rows,
    )


def _popularity(audit: Mapping[str, Any]) -> Figures:
    found = audit["popularity"]
    rows = [
        [
            f"level {level + 1}",
            f"{one['perplexity']:.1f}",
            f"{one['gini']:.2f}",
            f"{one['busiest_share']:.1%}",
            f"{one['busiest_share_of_items']:.1%}",
            f"{one['idle']:,}",
            "-" if one["correlation"] is None else f"{one['correlation']:.2f}",
            f"{idle:.1%}",
        ]
        for level, (one, idle) in enumerate(zip(found["levels"], found["idle_prefixes"], strict=False))
    ]
    head = found["head"]
    return Figures(
        "Popularity allocation",
        f"{found['interactions']:,} interactions; {found['items_without']:,} items have none. Items that share their path have "
        f"{found['shared_interactions']:.2%} of the interactions. The {head['items']:,} most popular items have "
        f"{head['interactions']:.1%}; {head['shared']:.1%} of these items share their path.",
        [
            "level",
            "perplexity of interactions",
            "Gini",
            "interactions on the busiest tenth",
            "items on the fullest tenth",
            "codes without interaction",
            "items and interactions (r)",
            "prefixes without interaction",
        ],
        rows,
    )


def _neighbours(audit: Mapping[str, Any]) -> Figures:
    found = audit["neighbours"]
    rows = [[f"{found['shared_codes']:.3f} of {found['levels']}", f"{found['chance']:.3f}", f"{found['items']:,}", f"{found['queries']:,}"]]
    return Figures(
        "Neighbourhood",
        "Codes, from the first on, that an item shares with its nearest neighbour by cosine. A collapse has both figures high.",
        ["shared codes (mean)", "by chance", "items with a vector", "items asked"],
        rows,
    )


def _coengagement(audit: Mapping[str, Any]) -> Figures:
    found = audit["intrinsic"]["coengagement"]
    rows = [
        [_first(level + 1), f"{agreement:.2%}", f"{chance:.2%}", "-" if lift is None else f"{lift:.1f}"]
        for level, (agreement, chance, lift) in enumerate(zip(found["agreement"], found["chance"], found["lift"], strict=True))
    ]
    return Figures(
        "Items that follow each other",
        f"Share of {found['pairs']:,} pairs of consecutive items that have a common prefix. A recommender can use the lift over chance.",
        ["common prefix", "of the pairs", "by chance", "lift"],
        rows,
    )


def _categories(audit: Mapping[str, Any]) -> Figures:
    rows = [
        [
            f"category level {one['depth']}",
            _first(one["level"]),
            *(f"{one[name]:.2f}" for name in ("v_measure", "v_measure_chance", "purity")),
        ]
        for one in audit["intrinsic"]["categories"]
    ]
    return Figures("Categories", "Agreement of prefixes with categories.", ["", "prefix", "V-measure", "by chance", "purity"], rows)


def _churn(audit: Mapping[str, Any]) -> Figures:
    found = audit["churn"]
    items = found["items"]
    columns = [found["changed"]["levels"], found["changed_if_renamed"]["levels"], found["changed_prefix"]]
    rows = [
        [f"level {level + 1}", *(f"{share:.1%}" for share in shares), "-" if together is None else f"{together:.1%}"]
        for level, (*shares, together) in enumerate(zip(*columns, found["kept_together"], strict=True))
    ]
    return Figures(
        "Churn",
        f"{items['shared']:,} items in both files, {items['added']:,} new, {items['gone']:,} gone. {found['changed']['any']:.1%} of the "
        f"shared items changed; {found['changed_if_renamed']['any']:.1%} if the codes are renamed in the best way.",
        ["level", "code changed", "if renamed", "prefix changed", "pairs still together"],
        rows,
    )


def _problems(audit: Mapping[str, Any]) -> Figures:
    examples: dict[str, list[str]] = {}
    for one in audit["problem_rows"]:
        named = f"row {one['row']}" + (f" ({_short(one['item_id'])})" if one["item_id"] is not None else "") + _short(one["detail"], 90)
        examples.setdefault(one["reason"], []).append(named)
    rows = [[reason, f"{count:,}", "; ".join(examples.get(reason, [])[:3])] for reason, count in audit["problems"].items()]
    return Figures("Rows that cannot be used", "They are left out of all figures above.", ["reason", "rows", "examples"], rows)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _first(codes: int) -> str:
    return "first code" if codes == 1 else f"first {codes} codes"


def _more(group: Mapping[str, Any]) -> str:
    return f" and {group['items'] - len(group['examples']):,} more" if group["items"] > len(group["examples"]) else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
