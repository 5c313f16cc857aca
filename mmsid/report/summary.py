"""Stage `report`: one run on one HTML page to walk through, and its figures in Markdown, printed too. Reads finished folders only.

The Markdown shows where the Semantic IDs are, the intrinsic table and the ranking table of every arm, the verdict of the refinement
gate, and a few example items with picture, caption, interests and SID. The page is `mmsid.report.page`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.markdown import Markdown

from mmsid.annotate.readers import read_captions, read_interests
from mmsid.artifacts import is_complete, read_json, writing
from mmsid.catalog import CatalogConfig, Item, read_catalog
from mmsid.config import StageConfig
from mmsid.progress import done, is_main_process
from mmsid.report.explore import MOST_ITEMS
from mmsid.report.page import write_run_page
from mmsid.report.run_folder import sid_folders
from mmsid.sids.folder import INTRINSIC, TABLE, read_sid_folder
from mmsid.sids.intrinsic_table import intrinsic_table
from mmsid.sids.table import SidTable


class ReportConfig(StageConfig):
    """Configuration of the stage.

    Attributes:
        run: the folder that holds the run's stage folders.
        examples: how many items summary.md shows.
        most_items: how many items report.html shows, an even sample where the catalogue has more; 10,000 stay under 20 MB.
    """

    catalog: CatalogConfig
    run: Path
    examples: int = Field(default=3, ge=0)
    most_items: int = Field(default=MOST_ITEMS, gt=0, le=MOST_ITEMS)


def run(config: ReportConfig) -> Path:
    """Write report.html and summary.md into `config.out` and print the latter.

    Raises:
        ArtifactError: the run has no finished stage, or one is damaged.
    """
    arms = sid_folders(config.run)
    inputs = {stage: config.run / stage for stage in ("assign", "refine", "train_recommender") if is_complete(config.run / stage)}
    with writing(config.out, stage="report", config=config, inputs=inputs) as draft:
        page = "\n".join([*_where(arms), *_intrinsic(arms), *_gate(config.run), *_ranking(config.run), *_examples(config, arms)])
        (draft.path / "summary.md").write_text(page, encoding="utf-8")
        write_run_page(config.run, config.catalog, draft.path / "report.html", config.most_items)
        draft.counts["arms"] = len(arms)
    if is_main_process():
        console = Console()
        # A table wider than the terminal would be cut to ellipses: raw Markdown stays whole
        console.print(Markdown(page)) if console.is_terminal and console.width >= 150 else print(page)
    done(f"report: wrote {config.out / 'summary.md'}, and {config.out / 'report.html'} to open in a browser")
    return config.out


def _where(arms: dict[str, Path]) -> list[str]:
    return ["## Semantic IDs", "", *[f"- {arm}: `{folder / TABLE}`" for arm, folder in arms.items()], ""]


def _intrinsic(arms: dict[str, Path]) -> list[str]:
    metrics = {arm: read_json(folder / INTRINSIC) for arm, folder in arms.items()}
    return ["## Intrinsic figures (held-out users of train; no single one is a goal)", "", intrinsic_table(metrics)] if metrics else []


def _gate(run: Path) -> list[str]:
    if not is_complete(run / "refine"):
        return []
    gate: dict[str, Any] = read_json(run / "refine" / "gate.json")
    if gate["accepted"]:
        return ["## Refinement", "", "The gate accepted the refined codes.", ""]
    return ["## Refinement", "", f"The gate refused, the start was kept: {'; '.join(gate['reasons'])}", ""]


def _ranking(run: Path) -> list[str]:
    if not is_complete(run / "train_recommender"):
        return []
    return ["## Ranking", "", (run / "train_recommender" / "ranking.md").read_text(encoding="utf-8")]


def _examples(config: ReportConfig, arms: dict[str, Path]) -> list[str]:
    """The first items of the catalogue's own (content-hash) order that have a picture where any has."""
    if not arms or not config.examples:
        return []
    arm, folder = list(arms.items())[-1]
    table = read_sid_folder(folder)
    captions = read_captions(config.run / "caption") if is_complete(config.run / "caption") else {}
    interests = read_interests(config.run / "interests") if is_complete(config.run / "interests") else {}
    items = sorted(read_catalog(config.catalog).items, key=lambda item: not item.images)[: config.examples]
    lines = [f"## Examples ({arm})", ""]
    for item in items:
        mined = interests.get(item.item_id)
        lines += [
            f"- **{item.title or item.item_id}**: `{item.images[0] if item.images else 'no picture'}`",
            f"  - caption: {captions.get(item.item_id, 'none')}",
            f"  - interests: {mined.summary if mined else 'none'}",
            f"  - SID: `{_sid(table, item)}`",
        ]
    return [*lines, ""]


def _sid(table: SidTable, item: Item) -> str:
    codes = table.codes[table.item_ids.index(item.item_id)]
    return " ".join(f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes))
