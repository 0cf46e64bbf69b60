"""A coordinator and its agents as child processes on this machine, for `muster local`.

Each is a process group of its own, so that Ctrl-C reaches only `muster`, and each dies with `muster`
whatever ends it: in good order on the way out, by the parent-death signal if `muster` is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import yaml

from coordinator.admin.errors import OperationFailed

START_LIMIT_S = 60.0
GOODBYE_S = 10.0

# The child asks for SIGKILL at its parent's death before it does anything else; a parent that died even
# earlier is noticed by the changed parent id.  Set in the child, as preexec_fn would fork after a channel exists.
_LAUNCHER = """\
import ctypes, importlib, os, signal, sys
parent, target = int(sys.argv[1]), sys.argv[2]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit(1)
module, _, name = target.partition(":")
sys.argv = [sys.argv[3], *sys.argv[4:]]
sys.exit(getattr(importlib.import_module(module), name)())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A running `muster-agent`."""

    name: str
    process: subprocess.Popen[bytes]


@dataclass(slots=True, kw_only=True)
class Fleet:
    """All in the directory `home`; a context manager that leaves no process behind."""

    home: Path
    environment: Mapping[str, str]
    lease: str = "5s"
    coordinator: subprocess.Popen[bytes] | None = None
    agents: dict[str, Agent] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _undisturbed():
            self.end(gently=error is None)

    @property
    def identity_path(self) -> Path:
        return self.home / "coordinator" / "admin.json"

    def log_path(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def start_coordinator(self) -> None:
        """Make its home, start it on free loopback ports, and wait until it serves.  Raise OperationFailed."""
        home = self.home / "coordinator"
        config = self.home / "coordinator.yaml"
        settings = {
            "listen": dict.fromkeys(("main", "enroll", "metrics"), "127.0.0.1:0"),
            "lease": self.lease,
            "blobs": {"reserve": "64MiB"},
        }
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        init = self._start(
            "init", "coordinator.daemon:main", "musterd", "init", "--address", "127.0.0.1:0", str(home)
        )
        try:
            status = init.wait(timeout=START_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            init.kill()
        if status != 0:
            raise OperationFailed(f"`musterd init` failed: {self.last_words('init')}")
        self.coordinator = self._start(
            "coordinator",
            "coordinator.daemon:main",
            "musterd",
            "serve",
            "--config",
            str(config),
            "--home",
            str(home),
        )
        served = home / "run" / "addresses.json"
        deadline = time.monotonic() + START_LIMIT_S
        while not served.exists():
            if self.coordinator.poll() is not None:
                raise OperationFailed(f"the coordinator ended at its start: {self.last_words('coordinator')}")
            if time.monotonic() > deadline:
                raise OperationFailed(
                    f"the coordinator does not serve after {START_LIMIT_S:g} s: {self.last_words('coordinator')}"
                )
            time.sleep(0.05)
        self.addresses = json.loads(served.read_text(encoding="utf-8"))

    def start_agent(self, name: str, token: str, *options: str, **environment: str) -> Agent:
        """Start an agent that joins with `token`; it is not waited for."""
        process = self._start(
            name,
            "agent.cli:main",
            "muster-agent",
            *("join", "--token", token, "--home", str(self.home / name), "--name", name, *options),
            self.addresses["enroll"],
            **environment,
        )
        self.agents[name] = Agent(name=name, process=process)
        return self.agents[name]

    def kill_agent(self, name: str) -> None:
        """SIGKILL the agent and nothing else: its workers must die by themselves."""
        agent = self.agents.pop(name)
        agent.process.kill()
        agent.process.wait()

    def last_words(self, name: str) -> str:
        """The end of a process's log, as one line."""
        with contextlib.suppress(OSError):
            lines = self.log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()
            return " / ".join(line.strip() for line in lines[-3:] if line.strip()) or "it said nothing"
        return "it left no log"

    def end(self, *, gently: bool) -> None:
        """End every process: agents, their workers, the coordinator.  `gently` asks them first."""
        processes = [agent.process for agent in self.agents.values()]
        processes += [self.coordinator] if self.coordinator is not None else []
        family: list[psutil.Process] = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
        if gently:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + GOODBYE_S
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.wait()
        for member in family:
            # psutil checks the start time as well, so a pid that was given to another is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=GOODBYE_S)
        self.agents.clear()
        self.coordinator = None

    def keep_logs(self, directory: Path) -> None:
        """Copy every process's log to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        for log in self.home.glob("*.log"):
            shutil.copyfile(log, directory / log.name)

    def _start(
        self, name: str, target: str, program: str, *arguments: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        with self.log_path(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, str(os.getpid()), target, program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                process_group=0,
            )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep a second Ctrl-C from interrupting the clean-up of the first."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
