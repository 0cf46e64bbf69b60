"""A line of JSON per step committed by this process, in the file (or FIFO) named by MUSTER_STEP_TRACE.

For benchmarks, which need to know to the millisecond when a step was committed where.  Lines are below
PIPE_BUF, so many processes may share one FIFO.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

ENVIRONMENT = "MUSTER_STEP_TRACE"


class StepTrace:
    """Writes nothing, at no cost, unless the environment names a file."""

    def __init__(self) -> None:
        path = os.environ.get(ENVIRONMENT)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if path else None
        # Read at once: a process whose parent was killed has another.
        self._pid, self._parent = os.getpid(), os.getppid()

    def committed(
        self, *, step: int, generation: int, world: int, rank: int, loss: float | None = None
    ) -> None:
        """To be called when the optimizer has applied `step`.  `t_ns` is CLOCK_MONOTONIC, which all
        processes of a machine share.  Training never fails because of its trace."""
        if self._fd is None:
            return
        line = {
            "step": step,
            "t_ns": time.monotonic_ns(),
            "generation": generation,
            "world": world,
            "rank": rank,
            "pid": self._pid,
            "ppid": self._parent,
            "loss": loss,
        }
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(line).encode() + b"\n")
