"""A job whose program crashes wherever it runs, with a real coordinator and real agents: it ends at its bound with
the program's last words, and not before; what is not the program's doing does not count."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.enroll import enroll
from agent.home import Home, ask
from protos import admin_pb2, admin_pb2_grpc, authorship
from protos.wire import Identity, JoinToken, channel
from tests.processes import STOP_S, Musterd, init_home, start_musterd


@pytest.fixture
def musterd(tmp_path: Path) -> Iterator[Musterd]:
    init_home(tmp_path / "home")
    running = start_musterd(tmp_path / "home", lease="5s")
    yield running
    running.stop()


@contextlib.contextmanager
def agents(musterd: Musterd, stub: Any, names: str) -> Iterator[dict[str, Home]]:
    """Enrolled agents with fake workers, each a process of its own."""
    homes, processes = {}, []
    for name in names:
        home = homes[name] = Home(root=musterd.home.parent / name)
        home.prepare()
        token = stub.CreateToken(admin_pb2.CreateTokenRequest(ttl_s=600, uses=1), timeout=STOP_S).token
        enroll(JoinToken.parse(token), musterd.addresses["enroll"], name).save(home.identity)
        command = [sys.executable, "-m", "tests.agent.agent_process", str(home.root)]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    try:
        yield homes
    finally:
        for process in processes:
            process.kill()
            process.wait(STOP_S)


def submit(admin: Identity, stub: Any, fake: dict[str, Any], max_failures: int) -> str:
    elastic = {"min_nodes": 2, "max_nodes": 2, "last_call": 0, "max_failures": max_failures}
    text = authorship.canonical({"name": "looping", "elastic": elastic, "model": {"fake": fake}})
    request = admin_pb2.SubmitJobRequest(
        spec_json=text,
        signature=authorship.sign(admin, text, ""),
        certificate_pem=admin.certificate_pem,
    )
    job_id: str = stub.SubmitJob(request, timeout=STOP_S).job_id
    return job_id


def test_a_crash_looping_job_ends_at_its_bound_with_its_last_error_and_not_before(musterd: Musterd) -> None:
    admin = Identity.load(musterd.home / "admin.json")
    with channel(admin, musterd.addresses["main"]) as made:
        stub = admin_pb2_grpc.AdminServiceStub(made)
        job_id = submit(admin, stub, {"fail": "program"}, max_failures=2)
        counted, planned = 0, 0
        with agents(musterd, stub, "ab"):
            for event in stub.Watch(admin_pb2.WatchRequest(job=job_id, follow=True), timeout=120):
                record = json.loads(event.json)
                planned += event.kind == "GenerationPlanned" and bool(record["generation"]["members"])
                counted += event.kind == "FailureCounted" and record["failure"] == "program"
                if event.kind == "JobPhaseChanged" and record["phase"] == "FAILED":
                    break
        view = json.loads(stub.GetJob(admin_pb2.JobRef(job=job_id), timeout=STOP_S).json)
    # One generation's crash counts once, however many members crash by it.
    assert view["failures"] == 2
    assert planned >= 2, "it was tried again after the first"
    assert counted >= 2
    assert "as told" in view["last_failure"]
    assert record["why"] == "max_failures"


def test_workers_that_are_killed_from_outside_do_not_end_the_job(musterd: Musterd) -> None:
    admin = Identity.load(musterd.home / "admin.json")
    with channel(admin, musterd.addresses["main"]) as made:
        stub = admin_pb2_grpc.AdminServiceStub(made)
        job_id = submit(admin, stub, {}, max_failures=0)
        strikes = 0
        with agents(musterd, stub, "ab") as homes:
            for event in stub.Watch(admin_pb2.WatchRequest(job=job_id, follow=True), timeout=120):
                record = json.loads(event.json)
                if event.kind == "JobPhaseChanged" and record["phase"] == "RUNNING":
                    if strikes == 2:
                        break
                    strikes += 1
                    os.kill(ask(homes["a"], "status")["job"]["workers"][0]["pid"], signal.SIGKILL)
            flapping = json.loads(stub.GetAgent(admin_pb2.AgentRef(agent="a"), timeout=STOP_S).json)
        view = json.loads(stub.GetJob(admin_pb2.JobRef(job=job_id), timeout=STOP_S).json)
    assert (view["phase"], view["failures"]) == ("RUNNING", 0)
    assert flapping["strikes"] == 2, "it costs the agent, not the job"
