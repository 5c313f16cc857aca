"""Progress bar of `mmsid.progress.track`, and the console for messages. Separate because rich takes long to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    """Units per second over the whole task, which varies less than rich's moving window."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        if not elapsed or not task.completed:
            return Text("", style="dim")
        return Text(f"{task.completed / elapsed:,.1f} {task.fields['unit']}/s", style="dim")


def with_bar(
    iterable: Iterable[T], what: str, total: int | None, unit: str, note: dict[str, object], size: Callable[[T], int], hidden: bool
) -> Iterator[T]:
    """Yield from `iterable` with a progress bar, which `hidden` turns off. See `mmsid.progress.track`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # estimate over the last hour instead of rich's 30 seconds: units such as jobs take minutes
    with Progress(*columns, console=console, disable=hidden, refresh_per_second=2, speed_estimate_period=3600.0) as progress:
        task = progress.add_task(what, total=total, unit=unit, note="")
        for element in iterable:
            yield element
            text = " ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in note.items())
            progress.update(task, advance=size(element), note=text)
