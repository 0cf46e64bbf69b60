"""Starts a fleet's processes and sees to it that none outlives the benchmark.

Every process is started in its own session and carries a random mark in its environment, which its
descendants inherit.  At the end all processes with that mark, and no others, are killed: workers that
sit in sessions of their own and those whose parent was killed by the benchmark too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

MARK = "MUSTER_BENCH_MARK"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Park:
    """The processes of one fleet.  Use as a context manager, or call `close`."""

    def __init__(self, logs: Path) -> None:
        """Output of the processes goes to files in `logs`, which must exist."""
        self.logs = logs
        self._mark = secrets.token_hex(16)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `argv` with `env` added to this process's environment; its output, both streams,
        goes to `logs/name.log`."""
        with open(self.logs / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {}), MARK: self._mark},
                start_new_session=True,
                # If the benchmark itself is killed, close() never runs.
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - calls one C function bound above
            )
        self._started.append(process)
        return process

    def log_tail(self, name: str, lines: int = 20) -> str:
        """The last lines of a process's output, for an error message."""
        text = (self.logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def marked(self) -> list[psutil.Process]:
        """Every living process that descends from one started here."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def close(self) -> None:
        """Kill everything started here and its descendants, and wait until they are gone."""
        deadline = time.monotonic() + 10
        # A process may be forking while it is looked for, so look until nothing is found.
        # Agents let nobody but root read their environment, and give none of it to their workers, which die
        # with them: what was started here is killed as such.
        for started in self._started:
            started.kill()
        while (found := self.marked()) and time.monotonic() < deadline:
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for started in self._started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(timeout=1)
            time.sleep(0.01)
        # What was killed a moment ago has no environment left to be found by, and is not gone yet.
        for started in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(timeout=max(0.0, deadline - time.monotonic()))
        if left := self.marked():
            raise RuntimeError(
                f"processes {[p.pid for p in left]} survived SIGKILL; they are stuck in the kernel"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def threads(pid: int) -> list[int]:
    """Of a process, which has to be there."""
    return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process of ours; one that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
