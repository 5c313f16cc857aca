"""Progress bars with rate and remaining time, and the closing line of a stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """True on rank 0 of `accelerate launch`, and in a single process. Only this process prints."""
    return int(os.environ.get("RANK", "0")) == 0


class _Rate(ProgressColumn):
    """Units per second over the whole task, which varies less than rich's moving window."""

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
    """Yield from `iterable` and show a progress bar: done/total, rate in `unit` per second, remaining time.

    Args:
        what: label at the left of the bar.
        total: length, if `iterable` has no `len`.
        size: number of units per element.
        note: a dict that the caller updates (loss, reward); shown at the right of the bar.
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
    # estimate over the last hour instead of rich's 30 seconds: units such as jobs take minutes
    with Progress(*columns, console=console, disable=not is_main_process(), refresh_per_second=2, speed_estimate_period=3600.0) as progress:
        task = progress.add_task(what, total=total, unit=unit, note="")
        for element in iterable:
            yield element
            text = " ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in (note or {}).items())
            progress.update(task, advance=size(element), note=text)


def show(text: str) -> None:
    """Print a result to standard output. Characters that its encoding lacks are written as backslash escapes, and never end a job."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def done(line: str) -> None:
    """Print the closing line of a stage: what was written, and where."""
    if is_main_process():
        console.print(line, markup=False, soft_wrap=True)
