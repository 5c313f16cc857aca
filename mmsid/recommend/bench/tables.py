"""Markdown table of the results of a bench."""

from __future__ import annotations

from typing import Any

from mmsid.recommend.result_tables import difference_table, method_table


def bench_table(written: dict[str, Any]) -> str:
    """Format bench results as Markdown: rules, methods by family and NDCG@10, methods that were not run, and differences."""
    dataset, rows = written["dataset"], written["arms"]
    suite, compute = dataset["suite"], dataset["compute"]
    lines = [
        f"# {dataset['name']}",
        "",
        f"{dataset['items']:,} items, {dataset['valid_users']:,} valid and {dataset['test_users']:,} test users, split "
        f"{dataset['split']['method']}; mmsid {suite['package_version']}, suite {suite['name']}.",
        f"Every trained method uses the same recommender, with {len(suite['trials'])} trials at seed {suite['seeds'][0]} and the best on "
        f"{suite['selected_by']}. Methods within {suite['within']:.0%} of the best on valid, claimed methods and baselines have "
        f"{len(suite['seeds'])} seeds of tokenizer and recommender (published SIDs: of the recommender only). "
        "± is the standard deviation over seeds. Bold: best of its family.",
        f"Compute: {compute['core_minutes_of_all_jobs']:.0f} core minutes in all, {compute['processes']} processes of one thread, budget "
        f"{compute['budget_minutes']:g} minutes per call.",
        "",
        method_table(rows, best_first=True),
    ]
    intrinsic = [row for row in rows if "intrinsic" in row]
    if intrinsic:
        lines += [
            "## The Semantic IDs",
            "",
            "| method | perplexity per level | codes per level | level-1 co-engagement lift | V-measure, finest category | seconds "
            "| trial |",
            "|---|---|---|---|---|---|---|",
            *[_intrinsic(row) for row in intrinsic],
            "",
        ]
    if dataset["not_run"]:
        lines += ["## Not run", "", *[_missing(entry) for entry in dataset["not_run"]], ""]
    part = "test" if any(row["part"] == "test" for row in written["differences"]) else "valid"
    differences = difference_table(written["differences"], part)
    return "\n".join(lines) + (f"## Differences\n{differences}" if differences else "")


def _intrinsic(row: dict[str, Any]) -> str:
    found = row["intrinsic"]
    perplexity = " / ".join(f"{level:.0f}" for level in found["perplexity"])
    sizes = " / ".join(map(str, found["codebook_sizes"]))
    lift = "" if found["level_1_lift"] is None else f"{found['level_1_lift']:.1f}"
    v_measure = " / ".join(f"{level:.3f}" for level in found["v_measure"] or ())
    trial = ", ".join(f"{key} {value}" for part in row["trial"].values() for key, value in part.items()) or "default"
    return f"| {row['arm']} | {perplexity} | {sizes} | {lift} | {v_measure} | {row['sid_seconds']:.0f} | {trial} |"


def _missing(entry: dict[str, Any]) -> str:
    seeds = f" (seeds {', '.join(map(str, entry['seeds']))})" if "seeds" in entry else ""
    return f"- {entry['arm']}{seeds}: {entry['reason']}"
