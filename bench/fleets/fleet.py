"""A fleet under test: a coordinator of some kind, and members that train one tiny model together."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.processes import Park, send
from bench.trace import Commit, StepTrace

REPOSITORY = Path(__file__).resolve().parents[2]


class FleetError(Exception):
    """The fleet did not do what a measurement needs (start, or come back to full strength)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every system trains, so that their figures can stand side by side."""

    world: int = 3
    min_world: int = 2
    step_delay_ms: int = 20
    """Each step sleeps so long beside its computing."""
    silence_s: float = 1.0
    """How long a system may wait before it takes silence for death, where it lets us choose."""
    device: str = "cpu"
    cards: int = 1
    """CUDA cards that members take turns in."""
    seed: int = 1
    confine: str = "auto"
    """Whether Muster's agents confine their workers (`muster-agent --confine`)."""


class Fleet(abc.ABC):
    """Members are known by the pid of the process that would be on a volunteer's machine: an agent,
    or the trainer itself where the system has no agent."""

    system: str
    limit_s: float = 20.0
    """A recovery that takes longer is given up."""
    start_limit_s: float = 120.0
    has_agents: bool = True
    """Whether a member outlives its worker and starts another."""
    note: str = ""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.home = Path(tempfile.mkdtemp(prefix="mbench-"))
        (self.home / "logs").mkdir()
        self.park = Park(self.home / "logs")
        self.trace = StepTrace(self.home / "steps")
        self.members: dict[int, subprocess.Popen[bytes]] = {}
        self.launched = 0
        self._started = False

    @staticmethod
    def unavailable() -> str:
        """Why this system cannot be measured here; empty if it can."""
        return ""

    @abc.abstractmethod
    def start_coordinator(self) -> None:
        """Start what the members ask, and return when it answers.  Also after `kill_coordinator`,
        then at the same address."""

    @abc.abstractmethod
    def kill_coordinator(self) -> None:
        """SIGKILL it and wait until it is gone."""

    @abc.abstractmethod
    def launch(self, index: int) -> subprocess.Popen[bytes]:
        """Start member number `index`, counted from 0 over the fleet's life."""

    def begin(self) -> None:  # noqa: B027 - most systems have nothing to do here
        """Called once, when the first members were started (to submit the job, say)."""

    def start(self, count: int) -> None:
        """Bring up the coordinator and `count` members, and wait until they step together."""
        self.start_coordinator()
        for _ in range(count):
            self.add()
        self.begin()
        self.steady(count)

    def add(self) -> int:
        """Start one more member; returns its pid at once."""
        process = self.launch(self.launched)
        self.launched += 1
        self.members[process.pid] = process
        return process.pid

    def owner(self, commit: Commit) -> int | None:
        """The member whose worker this commit comes from; None for one that was removed."""
        if commit.ppid in self.members:
            return commit.ppid
        return commit.pid if commit.pid in self.members else None

    def worker(self, member: int) -> int:
        """Pid of the member's newest worker that has committed a step."""
        for commit in reversed(self.trace.commits()):
            if self.owner(commit) == member:
                return commit.pid
        raise FleetError(f"{self.system}: member {member} has not committed a step")

    def signal(self, member: int, number: signal.Signals) -> None:
        """Send a signal to a member and its worker."""
        worker = self.worker(member)
        send(member, number)
        if worker != member:
            send(worker, number)

    def remove(self, member: int) -> None:
        """SIGKILL what is left of a member and forget it."""
        with contextlib.suppress(FleetError):
            self.signal(member, signal.SIGKILL)
        process = self.members.pop(member)
        process.kill()
        process.wait()

    def alive(self) -> bool:
        """Whether any member still runs."""
        return any(process.poll() is None for process in self.members.values())

    def steady(self, world: int, steps: int = 10) -> Commit:
        """Wait until every member has committed `steps` steps in one generation of `world` workers.

        Returns the newest commit.  Raises FleetError after `start_limit_s`.
        """
        counts: dict[tuple[int, int], int] = {}
        newest: list[Commit] = []

        def done(fresh: Iterable[Commit]) -> bool:
            for commit in fresh:
                member = self.owner(commit)
                if member is not None and commit.world == world:
                    key = (commit.generation, member)
                    counts[key] = counts.get(key, 0) + 1
                    newest[:] = [commit]
            generation = newest[0].generation if newest else None
            return sum(g == generation and n >= steps for (g, _), n in counts.items()) == world

        if not self.trace.wait(done, self.start_limit_s, alive=self.alive):
            state = f"no {steps} steps of {world} members within {self.start_limit_s:g} s"
            ended = "; every member has ended" if not self.alive() else ""
            raise FleetError(f"{self.system}: {state}{ended}; its output:\n{self._tails()}")
        return newest[0]

    def close(self, *, keep_home: bool = False) -> None:
        """Kill everything and remove the fleet's files."""
        self.park.close()
        self.trace.close()
        if not keep_home:
            shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _tails(self) -> str:
        logs = sorted(self.park.logs.glob("*.log"))
        return "\n".join(f"[{log.stem}]\n{self.park.log_tail(log.stem, 12)}" for log in logs)


def free_port() -> int:
    """A port that nobody listens on now.  For servers that must come back at the same port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], limit_s: float = 30.0) -> None:
    """Return when something accepts connections at the port.  Raises FleetError if `process` ends
    first or the limit passes."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise FleetError(f"nothing listens on 127.0.0.1:{port} (process status {process.poll()})")
