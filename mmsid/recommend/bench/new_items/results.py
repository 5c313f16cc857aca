"""Results of the new-item benchmark: figures per method, group and draw, differences with their significance, and a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmsid._version import __version__
from mmsid.artifacts import is_complete, plain, read_json
from mmsid.recommend.bench.jobs import FIGURES
from mmsid.recommend.bench.new_items.config import METHODS, RETRAINED, Protocol
from mmsid.recommend.bench.new_items.jobs import method_ranks
from mmsid.recommend.bench.new_items.plan import Draw, NewItemPlan
from mmsid.recommend.bench.new_items.protocol import GROUPS, NewItemWorld
from mmsid.recommend.metrics import Ranks, grouped_bootstrap, per_position
from mmsid.recommend.result_rows import read_ranks

METRICS = ("HR@10", "HR@50", "NDCG@10")
CLAIMED = "hybrid/ours"
CONTENT_RETRIEVERS = ("tfidf", "minilm_cosine", "emb_cosine")


def entry_of(
    plan: NewItemPlan, protocol: Protocol, worlds: Callable[[Draw], NewItemWorld], failed: Mapping[str, str]
) -> dict[str, Any] | None:
    """The entry of one data set and protocol in new_items.json, from all finished jobs; None if there is none.

    Keys: protocol, its settings, numbers of items, `draws` (sizes of the groups, figures, tuned parameters and seconds per draw),
    `methods` (mean and standard deviation over draws; sd is null for one draw), `differences`, and `not_run`.

    Args:
        failed: label of a method and draw -> error of its job in this call.
    """
    draws, ranks, groups = [], {}, {}
    for draw in plan.draws(protocol):
        found = _ranks_of(plan, draw)
        if not found:
            continue
        world = worlds(draw)
        groups[draw.number] = world.groups()
        draws.append(_draw_row(plan, draw, world, groups[draw.number], found))
        for method, of_method in found.items():
            ranks.setdefault(method, {})[draw.number] = of_method
    if not draws:
        return None
    suite = plan.suite
    rule = {"share": suite.share} if protocol == "hidden" else {"fit_until": suite.fit_until}
    return {
        "protocol": protocol,
        **rule,
        "split": plain(plan.dataset.catalog.split),
        "catalog_sha256": plan.catalog_sha256,
        "package_version": __version__,
        "suite": plain(suite.model_dump(mode="json", include={"tokenizer", "model", "schedule"})),
        "groups": "new: next item new; rare: next item known, 1 to 3 train interactions; all: every test user",
        "draws": draws,
        "methods": _over_draws(draws, _ordered(ranks)),
        "differences": _differences(ranks, groups),
        "not_run": _not_run(plan, protocol, ranks, failed),
    }


def _ranks_of(plan: NewItemPlan, draw: Draw) -> dict[str, Ranks]:
    """Ranks of every finished method of a draw, in the order of the table."""
    folders = {method: plan.job(draw, method).folder for method in plan.methods(draw.protocol)}
    folders |= {name: plan.peer(draw, name).folder for name in plan.finished_peers(draw)}
    return {
        method: read_ranks(method_ranks(folders[method], method), "test").ranks
        for method in _ordered(folders)
        if is_complete(folders[method])
    }


def _draw_row(
    plan: NewItemPlan, draw: Draw, world: NewItemWorld, groups: Mapping[str, np.ndarray], found: Mapping[str, Ranks]
) -> dict[str, Any]:
    parameters, seconds = {}, {}
    for method in found:
        job = plan.peer(draw, method) if method not in METHODS else plan.job(draw, method)
        figures = read_json(job.folder / FIGURES)
        parameters[method] = figures["parameters"][method]
        seconds[method] = round(figures["seconds"] / len(job.methods), 1)
    return {
        "draw": draw.number,
        "items": len(world.new),
        "new_items": int(world.new.sum()),
        "users": {group: int(groups[group].sum()) for group in GROUPS},
        "methods": {method: {group: _figures(ranks, groups[group]) for group in GROUPS} for method, ranks in found.items()},
        "parameters": parameters,
        "seconds": seconds,
    }


def _figures(ranks: Ranks, member: np.ndarray) -> dict[str, float] | None:
    """Means over the users of a group; None if it is empty."""
    return {metric: float(per_position(ranks, metric)[member].mean()) for metric in METRICS} if member.any() else None


def _over_draws(draws: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for method in methods:
        for group in GROUPS:
            found = [row["methods"][method][group] for row in draws if method in row["methods"]]
            found = [figures for figures in found if figures is not None]
            of_metric = {metric: [figures[metric] for figures in found] for metric in METRICS} if found else {}
            table.setdefault(method, {})[group] = {
                metric: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
                for metric, values in of_metric.items()
            }
        table[method]["draws"] = sum(method in row["methods"] for row in draws)
    return table


def _differences(ranks: Mapping[str, Mapping[int, Ranks]], groups: Mapping[int, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """`hybrid/ours` against the best content retriever on `new` and against the classical hybrid on `all`.

    The best content retriever is the best of test, separately for each metric: the choice favours the baseline.
    """
    rows = []
    for group, rivals in (("new", CONTENT_RETRIEVERS), ("all", ("classical_hybrid",))):
        shared = [
            number
            for number in ranks.get(CLAIMED, {})
            if groups[number][group].any() and all(number in ranks[rival] for rival in rivals if rival in ranks)
        ]
        present = [rival for rival in rivals if rival in ranks]
        if not shared or not present:
            continue
        member = np.stack([groups[number][group] for number in shared])
        for metric in METRICS:
            values = {name: np.stack([per_position(ranks[name][number], metric) for number in shared]) for name in (CLAIMED, *present)}
            means = {name: float(np.mean([row[mask].mean() for row, mask in zip(values[name], member, strict=True)])) for name in present}
            best = max(means, key=lambda name: means[name])
            difference = grouped_bootstrap(values[CLAIMED], values[best], member)
            row = {"method": CLAIMED, "baseline": best, "group": group, "metric": metric, "draws": len(shared)}
            rows.append(row | difference._asdict())
    return rows


def _not_run(
    plan: NewItemPlan, protocol: Protocol, ranks: Mapping[str, Mapping[int, Ranks]], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    found = []
    for method in plan.methods(protocol):
        missing = [draw.number for draw in plan.draws(protocol) if draw.number not in ranks.get(method, {})]
        if missing:
            reasons = [failed[f"{method} {draw}"] for draw in plan.draws(protocol) if f"{method} {draw}" in failed]
            found.append({"method": method, "draws": missing, "reason": reasons[0] if reasons else "not requested in this call"})
    if protocol == "calendar":
        reason = "new items have no interactions before the point in time to retrain with"
        found += [{"method": method, "draws": [0], "reason": reason} for method in plan.suite.methods if method in RETRAINED]
    return found


def _ordered(methods: Mapping[str, Any]) -> list[str]:
    """Methods in the order of the table, those of the caller last but before the retrained ones."""
    place = {method: (method in RETRAINED, index) for index, method in enumerate(METHODS)}
    return sorted(methods, key=lambda method: (*place.get(method, (False, len(METHODS))), method))


def table_of(written: dict[str, Any]) -> str:
    """Markdown: one table per data set and protocol, then differences and methods that were not run."""
    lines = [
        "# New items",
        "",
        "Item-level ranking of the full catalogue (known and appended items) for test users, seen items masked. new: the user's next item "
        "had no interaction when everything was fitted. rare: it is known and has 1 to 3 train interactions. all: every test user. "
        "± is the standard deviation over draws. Bold: best of the methods that are not retrained with the new items' interactions.",
    ]
    for name, entry in written["datasets"].items():
        lines += ["", f"## {name}", "", _facts(entry), "", *_figure_table(entry["methods"])]
        lines += _difference_table(entry["differences"])
        if entry["not_run"]:
            lines += ["", "Not run:", "", *_not_run_lines(entry["not_run"])]
    return "\n".join(lines) + "\n"


def _facts(entry: dict[str, Any]) -> str:
    draws = entry["draws"]
    if entry["protocol"] == "hidden":
        rule = f"hidden: {entry['share']:.0%} of the items are hidden with all interactions, then appended"
    else:
        rule = f"calendar: fitted on the interactions before quantile {entry['fit_until']:g} of time"
    new = " / ".join(f"{draw['new_items']:,}" for draw in draws)
    users = [f"{group} " + " / ".join(f"{draw['users'][group]:,}" for draw in draws) for group in GROUPS]
    facts = f"{draws[0]['items']:,} items, new in each draw: {new}. Users by group: {', '.join(users)}"
    return f"Protocol {rule}. {facts}. mmsid {entry['package_version']}."


def _figure_table(methods: dict[str, Any]) -> list[str]:
    columns = [(group, metric) for group in GROUPS for metric in METRICS]
    best = {}
    for group, metric in columns:
        values = [row[group][metric]["mean"] for name, row in methods.items() if name not in RETRAINED and row[group]]
        best[group, metric] = max(values, default=0.0) or None  # nothing is bold if all are 0
    lines = [
        "| method | draws | " + " | ".join(f"{group} {metric}" for group, metric in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name, row in methods.items():
        cells = []
        for group, metric in columns:
            value = row[group].get(metric)
            text = "" if value is None else f"{value['mean']:.4f}" + ("" if value["sd"] is None else f" ± {value['sd']:.4f}")
            bold = value is not None and name not in RETRAINED and value["mean"] == best[group, metric]
            cells.append(f"**{text}**" if bold else text)
        lines.append(f"| {name} | {row['draws']} | {' | '.join(cells)} |")
    return lines


def _not_run_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per reason and set of draws."""
    methods: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        methods.setdefault((", ".join(map(str, row["draws"])), row["reason"]), []).append(row["method"])
    return [f"- draws {draws}, {reason}: {', '.join(names)}" for (draws, reason), names in methods.items()]


def _difference_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "Paired bootstrap over users and draws; the baseline on `new` is the content retriever that is best on test.", ""]
    lines += ["| method | baseline | group | metric | difference | 95 % interval | p |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        interval = f"{row['low']:+.4f} .. {row['high']:+.4f}"
        figures = f"{row['mean']:+.4f} | {interval} | {row['p']:.4f}"
        lines.append(f"| {row['method']} | {row['baseline']} | {row['group']} | {row['metric']} | {figures} |")
    return lines
