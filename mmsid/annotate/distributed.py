"""The processes of `accelerate launch` sharing one annotation job: each takes every n-th shard, rank 0 adds the counts up.

They meet twice: before the first shard (until rank 0 has made the draft folder) and at the end, where rank 0 waits for a file of
each. A file, because a collective would give up after half an hour, and shards can take longer than that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from mmsid.annotate.job_counts import JobCounts
from mmsid.artifacts import read_json, write_json

_POLL_SECONDS = 0.2


class JobProcesses:
    """`index` of this process among `count`; one alone outside of a launcher.

    A rank that dies takes the others along: that is the launcher's promise, so waiting has no time limit of its own.
    """

    def __init__(self, draft: Path) -> None:
        self._draft = draft
        self._state = None
        self.index, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            import torch
            from accelerate import PartialState  # a second of imports, for those alone who were launched together

            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.index, self.count = self._state.process_index, self._state.num_processes

    def begin(self, tidy: Callable[[], None]) -> None:
        """Meet; rank 0 alone calls `tidy` and clears what an earlier run left of `gather`; meet again."""
        self._meet()
        if self.index == 0:
            for left in self._draft.glob("rank-*.json"):
                left.unlink()
            tidy()
        self._meet()

    def gather(self, tally: JobCounts) -> bool:
        """On rank 0: add the other ranks' tallies to `tally`, True. Elsewhere: leave `tally` for rank 0, False."""
        if self.index > 0:
            write_json(self._report(self.index), tally.plain())
            return False
        for index in range(1, self.count):
            while not self._report(index).is_file():
                time.sleep(_POLL_SECONDS)
            tally.merge(read_json(self._report(index)))
            self._report(index).unlink()
        return True

    def _meet(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()

    def _report(self, index: int) -> Path:
        return self._draft / f"rank-{index}.json"
