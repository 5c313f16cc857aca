"""One annotation job in several processes of `accelerate launch`: each takes every n-th shard, rank 0 sums the counts.

The processes synchronise before the first shard. At the end, rank 0 waits for one file per rank instead of a collective operation,
because a collective times out after half an hour and a shard can take longer.
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
    """The processes of a job; a single one without a launcher. Waiting has no time limit: the launcher ends all ranks when one dies.

    Attributes:
        index: of this process.
        count: of all processes.
    """

    def __init__(self, draft: Path) -> None:
        self._draft = draft
        self._state = None
        self.index, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            import torch
            from accelerate import PartialState  # the import takes a second, and a single process does not need it

            self._state = PartialState(cpu=not torch.cuda.is_available())
            self.index, self.count = self._state.process_index, self._state.num_processes

    def begin(self, clean_up: Callable[[], None]) -> None:
        """Synchronise; rank 0 calls `clean_up` and removes count files of an earlier run; synchronise again."""
        self._synchronise()
        if self.index == 0:
            for stale in self._draft.glob("rank-*.json"):
                stale.unlink()
            clean_up()
        self._synchronise()

    def gather(self, job_counts: JobCounts) -> bool:
        """On rank 0: add the counts of the other ranks to `job_counts` and return True. Elsewhere: write `job_counts` for rank 0."""
        if self.index > 0:
            write_json(self._counts_file(self.index), job_counts.to_dict())
            return False
        for index in range(1, self.count):
            while not self._counts_file(index).is_file():
                time.sleep(_POLL_SECONDS)
            job_counts.merge(read_json(self._counts_file(index)))
            self._counts_file(index).unlink()
        return True

    def _synchronise(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()

    def _counts_file(self, index: int) -> Path:
        return self._draft / f"rank-{index}.json"
