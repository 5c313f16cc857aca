"""The story of the demo as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mmsid.demo.facts import TOP, Ad, Facts
from mmsid.sids.table import token


def story(facts: Facts) -> str:
    """What happened, for a person who has ten minutes."""
    return "\n".join(
        [
            "# What happened",
            "",
            f"{facts.known:,} ads and the logs of {facts.users:,} users were known; {facts.new:,} ads arrived later.",
            "",
            "## Refinement on the logs",
            "",
            refinement(facts),
            "",
            *[line for ad in facts.refined for line in _refined(ad)],
            "",
            "## What the Semantic IDs are worth",
            "",
            table_note(facts),
            "",
            "| Semantic IDs | HR@10 | NDCG@10 |",
            "|---|---|---|",
            *[f"| {name} | {figure(metrics['HR@10'])} | {figure(metrics['NDCG@10'])} |" for name, metrics in facts.rows],
            "",
            "## New ads",
            "",
            new_ads(facts),
            "",
            *[line for ad in facts.arrived for line in _arrived(ad)],
            "",
        ]
    )


def refinement(facts: Facts) -> str:
    """One sentence on what refinement did."""
    if not facts.accepted:
        return f"The acceptance gate refused the refined codes and the first ones stay: {'; '.join(facts.reasons)}."
    return f"The acceptance gate accepted the refined codes: {facts.moved:,} of {facts.known:,} ads moved. Three of them:"


def table_note(facts: Facts) -> str:
    """What the table compares, and how far it can be trusted."""
    seeds = (
        "one seed, so rows that are close may swap on another machine" if facts.seeds == 1 else f"mean ± deviation of {facts.seeds} seeds"
    )
    return (
        f"One recommender for all Semantic IDs, judged by the next item of every user among all known ads ({seeds}). "
        "The last row is the ranking of the model that drew the users."
    )


def new_ads(facts: Facts) -> str:
    """What became of the new ads."""
    low, high = facts.interval
    return (
        f"{facts.new:,} ads got Semantic IDs and were recommended at once; {facts.moved_later:,} published codes moved, and nothing was "
        f"trained. {facts.asked:,} users take a new ad next: {facts.answered:,} of them find it among their {TOP} best "
        f"({facts.answered / max(facts.asked, 1):.1%}, 95 % interval {low:.1%} to {high:.1%}; a random order would give "
        f"{facts.chance:.1%}, a recommender without new ads 0). {facts.reached:.0%} of all users see at least one new ad. Three of them:"
    )


def figure(value: Sequence[float]) -> str:
    """`mean ± deviation`, or the mean alone without a deviation."""
    mean, deviation = value
    return f"{mean:.3f} ± {deviation:.3f}" if deviation else f"{mean:.3f}"


def sid(codes: Sequence[int]) -> str:
    """A Semantic ID as its tokens: `<a_3> <b_14> <c_15>`."""
    return " ".join(token(level, code) for level, code in enumerate(codes))


def _refined(ad: Ad) -> list[str]:
    return [f"- **{ad.title}**: {ad.interests or ad.caption}", f"  - `{sid(ad.codes_before)}` -> `{sid(ad.codes)}`", *_alike(ad)]


def _arrived(ad: Ad) -> list[str]:
    return [f"- **{ad.title}**: {ad.caption}", f"  - `{sid(ad.codes)}`, among the best {TOP} of {ad.shown_to:,} users", *_alike(ad)]


def _alike(ad: Ad) -> list[str]:
    return [f"  - shares its first two codes with: {'; '.join(ad.alike)}"] if ad.alike else []
