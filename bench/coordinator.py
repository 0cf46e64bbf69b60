"""How many agents one core of a coordinator carries.

    python -m bench.coordinator [--json] [--sizes 100,1000,5000,10000] [--server-core 0]

A real `musterd` is pinned to one core; light agents (bench/swarm.py), one TLS connection each, run in
other processes on the other cores.  For each size of the fleet: what heartbeats cost, what a session
takes in memory, how soon every member has heard of a plan, how many durable decisions are made in a
second, and how soon everybody is back after a SIGKILL of the coordinator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from bench.processes import Park
from bench.report import Row, emit, progress
from bench.swarm import agent_name
from coordinator.core import codec
from coordinator.core.model import AgentAdmitted, AgentId, Token, TokenCreated, TokenId
from coordinator.journal import Entry, Journal, RecordRow
from protos import admin_pb2, admin_pb2_grpc, wire

HEARTBEAT_S = 5.0
MOST_MEMBERS = 1_000
JOBS = 100
"""Jobs that report a step at a time each, while durable decisions are counted."""
PLANS = 5
LIMIT_S = 180.0
"""Bringing a fleet up, or back, is given up after this."""

CPU_GOAL_PERCENT, PLAN_GOAL_MS, RETURN_GOAL_S, MEMORY_GOAL_KB, DECISIONS_GOAL = 50, 250, 60, 150, 2_000


class BenchError(Exception):
    """The fleet did not do what a measurement needs."""


class SwarmProcess:
    """One process of light agents."""

    def __init__(self, home: Path, cores: set[int], log: Path) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            with log.open("ab") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "bench.swarm", str(home)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        finally:
            os.sched_setaffinity(0, before)

    def tell(self, do: str, **body: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **body}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("a process of the load generator has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **body: Any) -> dict[str, Any]:
        self.tell(do, **body)
        return self.hear()

    def close(self) -> None:
        """End it; also when it does not listen any more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


class Fleet:
    """A coordinator on one core and `size` agents around it.  Use as a context manager."""

    def __init__(self, size: int, server_core: int, processes: int, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.size = size
        self._server_cores = {server_core}
        self._other_cores = os.sched_getaffinity(0) - self._server_cores or self._server_cores
        self._stack = contextlib.ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mbench-")))
        self.home = directory / "home"
        (directory / "logs").mkdir()
        self._park = self._stack.enter_context(Park(directory / "logs"))
        self._config = directory / "coordinator.yaml"
        listen = dict.fromkeys(("main", "enroll", "metrics"), "127.0.0.1:0")
        settings = {
            "listen": listen,
            "lease": 4 * heartbeat_s,
            # All agents of the benchmark come from one address.
            "limits": {"connections": 16_384, "connections_per_address": 16_384},
            "timing": {"heartbeat": heartbeat_s, "quarantine_base": "1ms", "quarantine_max": "1ms"},
        }
        self._config.write_text(yaml.safe_dump(settings))
        subprocess.run(
            [sys.executable, "-m", "coordinator.daemon", "init", str(self.home)],
            check=True,
            capture_output=True,
        )
        admit(self.home / "journal.db", size)
        self.started_s = self.start()
        # What the coordinator takes without sessions, all the same for every one of them.
        self.rss_before = self.rss
        log = directory / "logs" / "swarm.log"
        self._swarms = [SwarmProcess(self.home, self._other_cores, log) for _ in range(processes)]
        for swarm in self._swarms:
            self._stack.callback(swarm.close)

    def start(self) -> float:
        """Start the coordinator on its core; returns seconds until it serves."""
        (self.home / "run" / "addresses.json").unlink(missing_ok=True)
        before, began = os.sched_getaffinity(0), time.monotonic()
        os.sched_setaffinity(0, self._server_cores)
        try:
            argv = ["serve", "--config", str(self._config), "--home", str(self.home)]
            self._musterd = self._park.start("musterd", [sys.executable, "-m", "coordinator.daemon", *argv])
        finally:
            os.sched_setaffinity(0, before)
        self._process = psutil.Process(self._musterd.pid)
        while not (self.home / "run" / "addresses.json").exists():
            if self._musterd.poll() is not None or time.monotonic() - began > LIMIT_S:
                raise BenchError(f"musterd does not serve:\n{self._park.log_tail('musterd')}")
            time.sleep(0.01)
        return time.monotonic() - began

    def kill(self) -> None:
        self._musterd.kill()
        self._musterd.wait()

    @property
    def rss(self) -> int:
        return int(self._process.memory_info().rss)

    def cpu_s(self) -> float:
        """Processor seconds of the coordinator up to now."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def open_sessions(self) -> float:
        """Bring all agents up; returns seconds."""
        began = time.monotonic()
        share = -(-self.size // len(self._swarms))
        for place, swarm in enumerate(self._swarms):
            first = place * share
            swarm.tell("open", first=first, count=max(0, min(share, self.size - first)))
        for swarm in self._swarms:
            swarm.hear()
        return time.monotonic() - began

    def ask(self, do: str, **body: Any) -> list[dict[str, Any]]:
        """The same of every process."""
        return [swarm.ask(do, **body) for swarm in self._swarms]

    def total(self, key: str) -> int:
        return sum(answer[key] for answer in self.ask("status"))

    def wait_until(self, what: str, done: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > deadline:
                trouble = [answer["trouble"] for answer in self.ask("status")]
                raise BenchError(f"not within {limit_s:g} s: {what}; {trouble}")
            time.sleep(0.02)

    def owner(self, index: int) -> SwarmProcess:
        return self._swarms[index // -(-self.size // len(self._swarms))]

    @contextlib.contextmanager
    def admin(self) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
        address = json.loads((self.home / "run" / "addresses.json").read_text())["main"]
        with wire.channel(wire.Identity.load(self.home / "admin.json"), address) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    def submit(self, name: str, least: int, most: int) -> str:
        elastic = {"min_nodes": least, "max_nodes": most, "last_call": "100ms", "min_generation": 0}
        job = {"name": name, "elastic": elastic}
        request = admin_pb2.SubmitJobRequest(spec_json=json.dumps(job))
        with self.admin() as stub:
            return str(stub.SubmitJob(request, timeout=60).job_id)

    def phase(self, job_id: str) -> str:
        with self.admin() as stub:
            view = json.loads(stub.GetJob(admin_pb2.JobRef(job=job_id), timeout=60).json)
        return str(view["phase"])

    def cancel(self, job_id: str) -> None:
        with self.admin() as stub:
            stub.CommandJob(
                admin_pb2.JobCommandRequest(job=job_id, kind=admin_pb2.JOB_COMMAND_KIND_CANCEL), timeout=60
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def admit(path: Path, size: int) -> None:
    """A journal that knows `size` agents, none of which has come yet."""
    now_ms = int(time.time() * 1000)
    token = Token(
        token_id=TokenId("bench000"), secret_sha256="0" * 64, note="", created_ms=now_ms, expires_ms=now_ms,
        uses_left=size,
    )  # fmt: skip
    records: list[TokenCreated | AgentAdmitted] = [
        TokenCreated(at_ms=now_ms, token=token),
        *(
            AgentAdmitted(
                at_ms=now_ms, agent_id=AgentId(agent_name(i)), token_id=token.token_id, name=f"box{i}",
                certificate_serial="1",
            )
            for i in range(size)
        ),
    ]  # fmt: skip
    rows = tuple(
        RecordRow(at_ms=now_ms, kind=type(r).__name__, job_id="", body=codec.encode_record(r), text="")
        for r in records
    )
    with Journal(path) as journal:
        journal.commit([Entry(records=rows)])


# ---------------------------------------------------------------------------------- measurements


def heartbeats(fleet: Fleet, seconds: float) -> list[Row]:
    """Everyone heartbeats and nothing else happens."""
    fleet.ask("mark")
    samples: list[float | None] = []
    parts = 5
    for _ in range(parts):
        cpu, at = fleet.cpu_s(), time.monotonic()
        time.sleep(seconds / parts)
        samples.append(100 * (fleet.cpu_s() - cpu) / (time.monotonic() - at))
    ack_ms = sorted(1000 * s for answer in fleet.ask("acks") for s in answer["ack_s"])
    status = fleet.ask("status")
    beats = sum(answer["beats"] for answer in status)
    note = f"{beats / seconds:.0f} heartbeats a second"
    if trouble := {k: v for answer in status for k, v in answer["trouble"].items()}:
        note += f"; trouble: {trouble}"
    return [
        _row(fleet, samples, "heartbeat_cpu", "%", CPU_GOAL_PERCENT if fleet.size == 5_000 else None, note),
        _row(
            fleet, [statistics.median(ack_ms)], "heartbeat_ack_ms", "ms", None,
            f"99 % within {ack_ms[len(ack_ms) * 99 // 100]:.1f} ms",
        ),
    ]  # fmt: skip


def memory(fleet: Fleet) -> Row:
    kb = (fleet.rss - fleet.rss_before) / 1000 / fleet.size
    note = f"{fleet.rss / 1e6:.0f} MB in all, {fleet.rss_before / 1e6:.0f} MB before the first session"
    return _row(fleet, [kb], "memory_kb_per_session", "kB", MEMORY_GOAL_KB, note)


def plans(fleet: Fleet, repeats: int = PLANS) -> Row:
    """A member's worker is killed: from its report to the moment when every member of the next generation
    has heard of its plan."""
    members = min(fleet.size, MOST_MEMBERS)
    fleet.ask("mark")
    job_id = fleet.submit("wide", max(1, members - repeats), members)
    fleet.wait_until("the first generation", lambda: fleet.total("members") >= members)
    samples: list[float | None] = []
    for _ in range(repeats):
        fleet.wait_until("everyone has confirmed", lambda: fleet.phase(job_id) == "RUNNING")
        time.sleep(0.2)
        newest = max(number for _, number, *_ in _plans(fleet, job_id))
        inside = [i for answer in fleet.ask("members") for i in answer["members"]]
        victim = random.choice(inside)
        sent_s = fleet.owner(victim).ask("fail", agent=victim)["sent_s"]
        heard: list[tuple[int, float]] = []

        def all_heard(after: int = newest, heard: list[tuple[int, float]] = heard) -> bool:
            found = [
                (count, members, at) for _, n, members, count, at in _plans(fleet, job_id) if n == after + 1
            ]
            heard[:] = [(count, at) for count, _, at in found]
            return bool(found) and sum(count for count, *_ in found) >= int(found[0][1])

        fleet.wait_until("a plan at all members", all_heard)
        samples.append(1000 * (max(at for _, at in heard) - sent_s))
    fleet.cancel(job_id)
    fleet.wait_until("the job to end", lambda: fleet.total("members") == 0)
    goal = PLAN_GOAL_MS if members == MOST_MEMBERS else None
    return _row(fleet, samples, "plan_heard_ms", "ms", goal, f"{members} members")


def _plans(fleet: Fleet, job_id: str) -> list[tuple[str, int, int, int, float]]:
    return [tuple(p) for answer in fleet.ask("plans") for p in answer["plans"] if p[0] == job_id]


def decisions(fleet: Fleet, seconds: float) -> list[Row]:
    """As many jobs as there are agents for, each of which reports one step, waits until that is durable,
    and reports the next."""
    jobs = min(JOBS, fleet.size)
    ids = [fleet.submit(f"job{i}", 1, 1) for i in range(jobs)]
    fleet.wait_until("all jobs run", lambda: fleet.total("leaders") >= jobs)
    fleet.ask("train", on=True)
    time.sleep(1)
    samples: list[float | None] = []
    cpu: list[float | None] = []
    for _ in range(5):
        steps, at, used = fleet.total("steps"), time.monotonic(), fleet.cpu_s()
        time.sleep(seconds / 5)
        span = time.monotonic() - at
        cpu.append(100 * (fleet.cpu_s() - used) / span)
        samples.append((fleet.total("steps") - steps) / span)
    fleet.ask("train", on=False)
    for job_id in ids:
        fleet.cancel(job_id)
    fleet.wait_until("the jobs to end", lambda: fleet.total("leaders") == 0)
    note = f"{jobs} jobs, one step at a time each, beside {fleet.size} heartbeating sessions"
    return [
        _row(fleet, samples, "decisions_per_s", "1/s", DECISIONS_GOAL, note),
        _row(fleet, cpu, "decisions_cpu", "%", None, "of the core, meanwhile"),
    ]


def restart(fleet: Fleet) -> list[Row]:
    """SIGKILL and start again at once: from the kill to the last welcome."""
    fleet.ask("mark")
    began = time.monotonic()
    fleet.kill()
    serving_s = fleet.start()
    back: list[dict[str, Any]] = []

    def all_back() -> bool:
        back[:] = fleet.ask("status")
        return sum(a["open"] for a in back) >= fleet.size and sum(a["welcomed"] for a in back) >= fleet.size

    limit = ""
    try:
        fleet.wait_until("everyone is back", all_back)
    except BenchError as error:
        limit = str(error)
    last_s: float | None = max(a["welcomed_last_s"] for a in back) - began
    trouble: dict[str, int] = {}
    for answer in back:
        for what, count in answer["trouble"].items():
            trouble[what] = trouble.get(what, 0) + count
    lost = _lost(fleet)
    note = f"{lost} leases expired; failed attempts: {sum(trouble.values())}{'; ' + limit if limit else ''}"
    progress(f"  {trouble}")
    return [
        _row(fleet, [serving_s], "start_s", "s", None, "from exec to the first connection accepted"),
        _row(fleet, [None if limit else last_s], "return_s", "s", RETURN_GOAL_S, note),
    ]


def _lost(fleet: Fleet) -> int:
    with contextlib.closing(Journal(fleet.home / "journal.db")) as journal:
        return sum(1 for record in journal.history(0) if record.kind == "AgentLost")


def _row(
    fleet: Fleet, samples: list[float | None], metric: str, unit: str, goal: float | None, note: str
) -> Row:
    return Row.of(
        samples,
        case=f"{fleet.size} sessions",
        system="muster",
        metric=metric,
        unit=unit,
        goal=goal,
        note=note,
    )


def measure(size: int, server_core: int, processes: int, seconds: float) -> list[Row]:
    """All figures for one size of the fleet."""
    rows: list[Row] = []
    with Fleet(size, server_core, processes) as fleet:
        progress(f"{size} sessions: musterd serves after {fleet.started_s:.1f} s")
        cpu = fleet.cpu_s()
        opened_s = fleet.open_sessions()
        cpu_ms = 1000 * (fleet.cpu_s() - cpu) / size
        progress(f"  all open after {opened_s:.1f} s, {cpu_ms:.2f} ms of the core each")
        rows.append(_row(fleet, [cpu_ms], "open_cpu_ms", "ms", None, "of the core, to open one session"))
        time.sleep(HEARTBEAT_S)
        parts: tuple[Callable[[], list[Row]], ...] = (
            lambda: [*heartbeats(fleet, seconds), memory(fleet)],
            lambda: [plans(fleet)],
            lambda: decisions(fleet, seconds / 2),
            lambda: restart(fleet),
        )
        for part in parts:
            found = part()
            for row in found:
                progress(f"  {row.metric}: {row.median} {row.unit} ({row.note})")
            rows += found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.coordinator", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--sizes", default="100,1000,5000,10000", help="sessions, one fleet after another")
    parser.add_argument("--server-core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--processes", type=int, default=2, help="of the load generator")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long heartbeats are watched")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < max(sizes) + 500:
        parser.error(f"--sizes: {max(sizes)} sessions need as many descriptors; `ulimit -Hn` is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows: list[Row] = []
    for size in sizes:
        rows += measure(size, args.server_core, args.processes, args.seconds)
    emit(rows, as_json=args.json)


if __name__ == "__main__":
    main()
