"""Stage `report`: the HTML page of a run (`page.py`), and a summary in Markdown that is also printed. It reads finished stages only.

The summary lists the Semantic ID files, the intrinsic table, the verdict of the acceptance gate, the ranking table, and a few items with
picture, caption, interests and SID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from mmsid.artifacts import is_complete, on_main_process, read_json, read_table, writing
from mmsid.catalog import CatalogConfig, read_catalog
from mmsid.config import StageConfig
from mmsid.id_columns import with_text_ids
from mmsid.progress import done, show
from mmsid.report.charts import SINGLE_SEED_NOTE, seed_count
from mmsid.report.explore import reward_parts
from mmsid.report.page import write_run_page
from mmsid.report.run_folder import annotations, sid_folders
from mmsid.sids.folder import INTRINSIC
from mmsid.sids.intrinsic_table import intrinsic_table
from mmsid.sids.table import FILE_NAME, SidTable

EXAMPLES = 3  # items that the summary shows
MOVED = 5  # items moved by refinement that the summary shows


class ReportConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        catalog: catalogue of the run.
        run: folder of the run, which contains the stage folders.
    """

    catalog: CatalogConfig
    run: Path

    def inputs(self) -> dict[str, Path | None]:
        """The catalogue, and the finished stages that the summary is made from."""
        stages = {stage: self.run / stage for stage in ("assign", "refine", "train_recommender")}
        return {**self.catalog.inputs(), **{stage: folder if is_complete(folder) else None for stage, folder in stages.items()}}


@on_main_process
def run(config: ReportConfig) -> Path:
    """Write report.html and summary.md into `config.out`, and print the summary.

    Returns:
        `config.out`.

    Raises:
        ArtifactError: the run has no finished stage, or a stage is damaged.
    """
    folders = sid_folders(config.run)
    with writing(config.out, stage="report", config=config, inputs=config.inputs()) as draft:
        summary = "\n".join(
            [
                *_sid_tables(folders),
                *_single_seed(config.run),
                *_intrinsic(folders),
                *_gate(config),
                *_ranking(config.run),
                *_examples(config, folders),
            ]
        )
        (draft.path / "summary.md").write_text(summary, encoding="utf-8")
        write_run_page(config.run, config.catalog, draft.path / "report.html")
        draft.counts["methods"] = len(folders)
    console = Console()
    # rich would truncate tables in a narrow terminal, so those get the raw Markdown
    console.print(Markdown(summary)) if console.is_terminal and console.width >= 150 else show(summary)
    done(f"report: wrote {config.out / 'summary.md'}, and {config.out / 'report.html'} to open in a browser")
    return config.out


def _sid_tables(folders: dict[str, Path]) -> list[str]:
    return ["## Semantic IDs", "", *[f"- {name}: `{folder / FILE_NAME}`" for name, folder in folders.items()], ""]


def _single_seed(run: Path) -> list[str]:
    """The note on a single seed, when no figure of the run is a mean over seeds."""
    several = is_complete(run / "train_recommender") and seed_count(read_json(run / "train_recommender" / "metrics.json")["arms"]) > 1
    return [] if several else [SINGLE_SEED_NOTE, ""]


def _intrinsic(folders: dict[str, Path]) -> list[str]:
    metrics = {name: read_json(folder / INTRINSIC) for name, folder in folders.items()}
    return ["## Intrinsic metrics (held-out users of train; none of them is an objective)", "", intrinsic_table(metrics)] if metrics else []


def _gate(config: ReportConfig) -> list[str]:
    run = config.run
    if not is_complete(run / "refine"):
        return []
    gate: dict[str, Any] = read_json(run / "refine" / "gate.json")
    verdict = "The acceptance gate accepted the refined codes."
    if not gate["accepted"]:
        verdict = f"The acceptance gate refused the refined codes, the initial codes are kept: {'; '.join(gate['reasons'])}"
    lines = ["## Refinement", "", verdict, "", "| figure of the gate | before | after |", "|---|---|---|"]
    lines += [f"| {row['metric']} | {row['before']:.4g} | {row['after']:.4g} |" for row in gate["rows"]]
    return [*lines, "", *_moved(config)]


def _moved(config: ReportConfig) -> list[str]:
    """The items that gained most of the reward, and of what part of it; items with pictures before items without."""
    moved = with_text_ids(read_table(config.run / "refine" / "moved.parquet")).to_pylist()
    catalog = read_catalog(config.catalog)
    items = {row["item_id"]: catalog.items[catalog.row_of[row["item_id"]]] for row in moved}
    first = sorted(moved, key=lambda row: (not items[row["item_id"]].images, -row["reward_gained"], row["item_id"]))[:MOVED]
    lines = [f"{len(moved):,} items move. Those with the largest gain in reward:", ""] if first else []
    for row in first:
        item = items[row["item_id"]]
        lines += [
            f"- **{item.title or item.item_id}**: `{item.images[0] if item.images else 'no picture'}`",
            f"  - `{_sid(row['codes_before'])}` -> `{_sid(row['codes_after'])}`",
            f"  - sid_reward {row['reward_gained']:+.2f}; {reward_parts(row)}",
        ]
    return [*lines, ""] if first else []


def _ranking(run: Path) -> list[str]:
    if not is_complete(run / "train_recommender"):
        return []
    return ["## Ranking", "", (run / "train_recommender" / "ranking.md").read_text(encoding="utf-8")]


def _examples(config: ReportConfig, folders: dict[str, Path]) -> list[str]:
    """The first items in canonical order, items with pictures before items without."""
    if not folders:
        return []
    name, folder = list(folders.items())[-1]
    table = SidTable.load(folder)
    captions, interests = annotations(config.run)
    items = sorted(read_catalog(config.catalog).items, key=lambda item: not item.images)[:EXAMPLES]
    lines = [f"## Examples ({name})", ""]
    for item in items:
        mined = interests.get(item.item_id)
        lines += [
            f"- **{item.title or item.item_id}**: `{item.images[0] if item.images else 'no picture'}`",
            f"  - caption: {captions.get(item.item_id, 'none')}",
            f"  - interests: {mined.summary if mined else 'none'}",
            f"  - SID: `{_sid(table.codes[table.row_of[item.item_id]])}`",
        ]
    return [*lines, ""]


def _sid(codes: Sequence[int]) -> str:
    return " ".join(f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes))
