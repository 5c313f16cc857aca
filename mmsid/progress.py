"""What a person sees while a stage works: a bar with rate and time left, and a last line that says what was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """True for the process that may talk to the user (rank 0 under `accelerate launch`)."""
    return int(os.environ.get("RANK", "0")) == 0


class _Rate(ProgressColumn):
    """Units per second over the whole task: steadier than rich's moving window when batches are uneven."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        if not elapsed or not task.completed:
            return Text("", style="dim")
        return Text(f"{task.completed / elapsed:,.1f} {task.fields['unit']}/s", style="dim")


def track(
    iterable: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "items",
    note: dict[str, object] | None = None,
    size: Callable[[T], int] = lambda element: 1,
) -> Iterator[T]:
    """Yield from `iterable` while showing a bar: done/total, rate in `unit` per second, time left.

    Args:
        what: the stage's name, at the left of the bar.
        total: length when `iterable` has no `len`.
        size: how many units an element is.
        note: a dict that the caller fills as it goes (loss, reward); printed at the right of the bar.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # time left from the last hour, not rich's last half minute: units such as jobs take longer than that
    with Progress(*columns, console=console, disable=not is_main_process(), refresh_per_second=2, speed_estimate_period=3600.0) as progress:
        task = progress.add_task(what, total=total, unit=unit, note="")
        for element in iterable:
            yield element
            text = " ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in (note or {}).items())
            progress.update(task, advance=size(element), note=text)


def done(line: str) -> None:
    """The last line of a stage: what was written and where."""
    if is_main_process():
        console.print(line, markup=False, soft_wrap=True)
