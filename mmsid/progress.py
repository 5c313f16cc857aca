"""Progress bars with rate and remaining time, and the closing line of a stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def is_main_process() -> bool:
    """True on rank 0 of `accelerate launch`, and in a single process. Only this process prints."""
    return int(os.environ.get("RANK", "0")) == 0


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
    from mmsid.progress_bar import with_bar  # rich takes long to import

    yield from with_bar(iterable, what, total, unit, {} if note is None else note, size, not is_main_process())


def show(text: str) -> None:
    """Print a result to standard output. Characters that its encoding lacks are written as backslash escapes, and never end a job."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def done(line: str) -> None:
    """Print the closing line of a stage: what was written, and where."""
    if is_main_process():
        from mmsid.progress_bar import console

        console.print(line, markup=False, soft_wrap=True)
