"""Report of stage `quantize` in Markdown: sizes and alternatives, what was read, collisions before and after, intrinsic metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmsid.catalog.vector_files import VectorFiles
from mmsid.quantize.sizes import FORMULA, Sizes, reason, sizes_table
from mmsid.sids import intrinsic_table
from mmsid.tokenizer.vector_space import VectorSpace, example_rows, problem_counts

REPORT = "report.md"


def quantize_report(
    method: str,
    sizes: Sizes,
    given: tuple[int | None, int | None],
    files: VectorFiles,
    space: VectorSpace,
    metrics: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The report as Markdown.

    Args:
        given: codebook size and number of levels as the user gave them, None for what was proposed.
        metrics: `intrinsic.json` of the SID folder.
        notes: what was noticed while the files were read.
    """
    published, raw, moved = metrics["published"], metrics["raw"], metrics["collisions"]
    lines = [
        f"# Semantic IDs of {published['items']:,} vectors ({method})",
        "",
        f"- {len(files):,} vectors of dimension {files.dim} were read: {len(space.values):,} have a Semantic ID, "
        f"{len(space.problems):,} are unusable.",
        *[
            f"- Unusable, {kind}: {count:,} ({example_rows(files, space.problems, kind)}); all are in problems.parquet."
            for kind, count in problem_counts(space.problems).items()
        ],
        *[f"- {note}." for note in notes],
        f"- Exact duplicates: {published['exact_duplicates']:,} vectors are equal to another one and share its SID.",
        f"- The codebooks were fitted on {metrics['fit_rows']:,} vectors.",
        "",
        "## Sizes",
        "",
        reason(sizes, *given),
        f"Expected to collide before collision handling, if codes were uniform: {FORMULA}.",
        "",
        sizes_table(sizes),
        "## Collisions",
        "",
        f"- Raw codes: {100 * raw['colliding_share']:.2f} % of the items share their SID, at most {raw['max_bucket']:,} items one SID "
        f"(uniform codes: {100 * metrics['random_colliding_share']:.2f} %).",
        f"- Published codes ({moved['policy']}): {100 * published['colliding_share']:.2f} %"
        + (", exact duplicates alone" if 0 < published["items_lost"] == published["exact_duplicates"] else "")
        + f"; {moved['moved']:,} items were moved, {moved['spilled']:,} of them to another prefix.",
        "",
        "## Intrinsic metrics",
        "",
        intrinsic_table({method: metrics}),
    ]
    if metrics["measured_items"] < published["items"]:
        lines += [f"R2 and nearest neighbours were measured on {metrics['measured_items']:,} items.", ""]
    return "\n".join(lines)
