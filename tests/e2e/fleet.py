"""A whole fleet of real processes on this machine: `musterd`, `muster-agent`s and their workers.

Everything is waited for by an event: a line of a process, a record of the coordinator's watch stream,
a committed step.  Nothing sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil
import yaml

from bench.processes import Park
from protos import admin_pb2, admin_pb2_grpc, agent_pb2
from protos.wire import Identity, channel

BIN = Path(sys.executable).parent
LIMIT_S = 240.0
CALL_S = 60.0
"""Of one call: a busy machine's coordinator takes its time."""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class AgentProcess:
    name: str
    home: Path
    process: subprocess.Popen[bytes]

    def workers(self) -> list[int]:
        """PIDs of its workers, or none if it is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                child.pid
                for child in psutil.Process(self.process.pid).children(recursive=True)
                if "trainer.train" in " ".join(child.cmdline())
            ]
        return []

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Fleet:
    root: Path
    lease: str = "2s"
    blobs: dict[str, Any] = field(default_factory=dict)
    """The section `blobs` of coordinator.yaml."""
    timing: dict[str, str] = field(default_factory=dict)
    """The section `timing`."""
    host: str = "127.0.0.1"
    """Where the coordinator listens."""
    inside: tuple[str, ...] = ()
    """What the coordinator's command is given to, such as `ip netns exec NAME`."""
    variables: dict[str, str] = field(default_factory=dict)
    """Added to every process's environment."""
    agents: dict[str, AgentProcess] = field(default_factory=dict)
    coordinator: subprocess.Popen[bytes] | None = None
    addresses: dict[str, str] = field(default_factory=dict)
    events: list[admin_pb2.Event] = field(default_factory=list)
    park: Park = field(init=False)

    def __post_init__(self) -> None:
        self.park = Park(self.root)

    @property
    def home(self) -> Path:
        return self.root / "coordinator"

    def __enter__(self) -> Self:
        subprocess.run(
            [BIN / "musterd", "init", self.home], check=True, env=environment(), capture_output=True
        )
        self.start_coordinator(ports=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.park.close()
        if error is not None:
            for log in sorted(self.root.glob("*.log")):
                sys.stderr.write(f"----- {log.name}\n{log.read_text(errors='replace')[-4000:]}\n")

    # ------------------------------------------------------------------ processes

    def start_coordinator(self, ports: dict[str, str] | None) -> None:
        """Start `musterd serve`, on free ports or, at a restart, on those it had."""
        ports = ports or dict.fromkeys(("main", "enroll", "metrics"), f"{self.host}:0")
        config = self.root / "coordinator.yaml"
        settings = {"listen": ports, "lease": self.lease, "blobs": self.blobs, "timing": self.timing}
        config.write_text(yaml.safe_dump(settings))
        ready = self.home / "run" / "addresses.json"
        ready.unlink(missing_ok=True)
        argv = [str(BIN / "musterd"), "serve", "--config", str(config), "--home", str(self.home)]
        self.coordinator = self.park.start("coordinator", [*self.inside, *argv], self._environment())
        wait_until(ready.exists, "musterd to serve", process=self.coordinator)
        self.addresses = json.loads(ready.read_text())

    def kill_coordinator(self) -> None:
        assert self.coordinator is not None
        self.coordinator.kill()
        self.coordinator.wait()

    def start_agent(self, name: str, *arguments: str, inside: tuple[str, ...] = ()) -> AgentProcess:
        """Start an agent, or start it again: then it keeps the identity and the cache in its home."""
        token = (
            self.admin().CreateToken(admin_pb2.CreateTokenRequest(ttl_s=3600, uses=1), timeout=CALL_S).token
        )
        return self.launch(name, token, *arguments, inside=inside)

    def launch(self, name: str, token: str, *arguments: str, inside: tuple[str, ...] = ()) -> AgentProcess:
        """`start_agent` with a token, for when the coordinator may be away."""
        home = self.root / name
        argv = [str(BIN / "muster-agent"), "join", "--token", token, "--home", str(home), "--name", name]
        argv += [*arguments, self.addresses["enroll"]]
        process = self.park.start(name, [*inside, *argv], self._environment())
        self.agents[name] = AgentProcess(name=name, home=home, process=process)
        return self.agents[name]

    def _environment(self) -> dict[str, str]:
        return {**environment(), **self.variables}

    # ------------------------------------------------------------------ the operator's side

    def admin(self) -> admin_pb2_grpc.AdminServiceStub:
        identity = Identity.load(self.home / "admin.json")
        return admin_pb2_grpc.AdminServiceStub(channel(identity, self.addresses["main"]))

    def muster(self, *arguments: str, check: bool = True) -> Any:
        """Run the `muster` command and return its JSON."""
        identity = self.root / "admin.json"
        loaded = json.loads((self.home / "admin.json").read_text())
        loaded["address"] = self.addresses["main"]
        Identity(**loaded).save(identity)
        done = subprocess.run(
            [BIN / "muster", "--identity", identity, *arguments, "-o", "json"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"muster {arguments}: exit {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def submit(self, config: dict[str, Any]) -> str:
        path = self.root / "job.yaml"
        path.write_text(yaml.safe_dump(config))
        job: str = self.muster("job", "submit", str(path))["job_id"]
        return job

    def job(self, job: str) -> dict[str, Any]:
        views: list[dict[str, Any]] = []

        def asked(stub: admin_pb2_grpc.AdminServiceStub, limit_s: float) -> bool:
            reference = admin_pb2.JobRef(job=job)
            reply = stub.GetJob(reference, timeout=min(limit_s, CALL_S), wait_for_ready=True)
            views.append(json.loads(reply.json))
            return True

        self._through_restarts(asked)
        return views[-1]

    def steps(self, job: str) -> list[agent_pb2.StepRecord]:
        """The committed step log as it is now."""
        return [
            step
            for reply in self.admin().Steps(admin_pb2.StepsRequest(job=job), timeout=CALL_S)
            for step in reply.steps
        ]

    def wait_step(self, job: str, step: int) -> None:
        """Until `step` is in the committed log."""

        def arrived(stub: admin_pb2_grpc.AdminServiceStub, limit_s: float) -> bool:
            stream = stub.Steps(admin_pb2.StepsRequest(job=job, follow=True), timeout=limit_s)
            for reply in stream:
                if reply.steps and reply.steps[-1].step >= step:
                    stream.cancel()
                    return True
            return False

        if not self._through_restarts(arrived):
            raise AssertionError(f"job {job} ended before step {step}: {self.job(job)}")

    def wait_event(
        self, accept: Callable[[str, dict[str, Any]], bool], what: str, job: str = "", after: int = 0
    ) -> admin_pb2.Event:
        """Until the watch stream has a record that `accept(kind, fields)` takes."""
        found: list[admin_pb2.Event] = []

        def arrived(stub: admin_pb2_grpc.AdminServiceStub, limit_s: float) -> bool:
            stream = stub.Watch(
                admin_pb2.WatchRequest(job=job, follow=True, after_sequence=after), timeout=limit_s
            )
            for event in stream:
                if accept(event.kind, json.loads(event.json)):
                    found.append(event)
                    stream.cancel()
                    return True
            return False

        if not self._through_restarts(arrived):
            raise AssertionError(f"the watch stream ended before {what}")
        return found[0]

    def wait_generation(self, job: str, members: int, after: int = 0) -> int:
        """Until a generation greater than `after` with so many members has formed everywhere."""

        def look() -> int | None:
            generation = self.job(job).get("generation")
            if generation is None or generation["number"] <= after or len(generation["members"]) != members:
                return None
            return generation["number"] if all(m["formed"] for m in generation["members"]) else None

        deadline = time.monotonic() + LIMIT_S
        seen: queue.Queue[None] = queue.Queue()
        stream = self.admin().Watch(admin_pb2.WatchRequest(job=job, follow=True), timeout=LIMIT_S)

        def pump() -> None:
            with contextlib.suppress(grpc.RpcError):
                for _ in stream:
                    seen.put(None)
            seen.put(None)

        threading.Thread(target=pump, daemon=True).start()
        try:
            while (number := look()) is None:
                seen.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"no generation of {members} after {after}: {self.job(job)}") from None
        finally:
            stream.cancel()
        return number

    def wait_end(self, job: str) -> dict[str, Any]:
        """Until the job is COMPLETED, FAILED or CANCELLED; its view."""
        ended = {"COMPLETED", "FAILED", "CANCELLED"}
        self.wait_event(
            lambda kind, record: kind == "JobPhaseChanged" and record["phase"] in ended,
            "the job's end",
            job=job,
        )
        return self.job(job)

    def _through_restarts(self, attempt: Callable[[admin_pb2_grpc.AdminServiceStub, float], bool]) -> bool:
        """Run `attempt`, again if the coordinator went away under it."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"not within {LIMIT_S} s")
            try:
                return attempt(self.admin(), left)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


def wait_until(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """For the few things without an event of their own: a file of another process, say."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"process ended with {process.returncode} while waiting for {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {LIMIT_S} s: {what}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP the processes, SIGCONT them afterwards."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
