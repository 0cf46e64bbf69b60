"""The committed steps of every worker, as they happen.

A fleet's workers write one JSON line per committed step to the file named by MUSTER_STEP_TRACE
(`trainer/trace.py`).  Here that file is a FIFO: lines shorter than PIPE_BUF (4,096 bytes) arrive whole however many workers write,
a reader thread takes them out at once, and whoever waits for a step is woken by it.  Times are
CLOCK_MONOTONIC, which all processes of one machine share.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One worker has applied one step."""

    step: int
    t_ns: int
    generation: int
    """Differs between two worlds of one fleet; need not count up by one."""
    world: int
    rank: int
    pid: int
    ppid: int
    """The worker's parent when it started."""
    loss: float | None = None
    """Mean loss of the step, where the worker knows it."""


class StepTrace:
    """Collects commits from the FIFO at `path` until closed."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path, 0o600)
        self.path = path
        # Open for reading and writing: a writer's open never blocks, and no end of file is seen
        # between two generations of workers.
        self._fd = os.open(path, os.O_RDWR)
        self._commits: list[Commit] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="step-trace", daemon=True)
        self._thread.start()

    def commits(self, start: int = 0) -> list[Commit]:
        """A copy of what has arrived, from the `start`-th on, in order of arrival."""
        with self._changed:
            return self._commits[start:]

    def __len__(self) -> int:
        with self._changed:
            return len(self._commits)

    def wait(
        self,
        done: Callable[[Iterable[Commit]], bool],
        timeout_s: float,
        *,
        start: int | None = None,
        alive: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Hand `done` each batch of new commits until it says True (and return True), or until
        `timeout_s` has passed or `alive` says False (and return False).

        `start` is the index of the first commit to hand over; by default those still to come.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            seen = len(self._commits) if start is None else start
            while True:
                fresh = self._commits[seen:]
                seen += len(fresh)
                if fresh and done(fresh):
                    return True
                left = deadline - time.monotonic()
                if left <= 0 or not alive():
                    return False
                # Half a second bounds only how late a dead fleet is noticed, never a measurement.
                self._changed.wait(min(left, 0.5))

    def close(self) -> None:
        """Stop reading and remove the FIFO.  Workers that still write get a broken pipe."""
        self._closed = True
        os.write(self._fd, b"\n")
        self._thread.join()
        os.close(self._fd)
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        rest = b""
        while not self._closed:
            *lines, rest = (rest + os.read(self._fd, 65536)).split(b"\n")
            fresh = [Commit(**json.loads(line)) for line in lines if line]
            if fresh:
                with self._changed:
                    self._commits += fresh
                    self._changed.notify_all()
