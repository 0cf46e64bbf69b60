"""The agent as a process: signals, orphans, the status socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.errors import AgentError, BadInput
from agent.home import Home, ask
from protos import agent_pb2
from tests.agent.conftest import alive, eventually, member
from tests.agent.fake_coordinator import FakeCoordinator


@pytest.fixture
async def process(
    coordinator: FakeCoordinator, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """An agent with a job whose plan its worker has confirmed."""
    monkeypatch.setenv("MUSTER_STEP_TRACE", str(tmp_path / "heard"))
    coordinator.authority.identity("a1", coordinator.address).save(home.identity)
    command = [sys.executable, "-m", "tests.agent.agent_process", str(home.root)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:  # noqa: ASYNC220 - a millisecond
        await coordinator.until(lambda: coordinator.sessions, 60.0, "no session was opened")
        coordinator.say(assignment=agent_pb2.Assignment(job_id="j1", spec_json=json.dumps({"name": "test"})))
        ready = await coordinator.heard("ready")
        plan = agent_pb2.Plan(
            job_id="j1",
            generation=1,
            members=[member("a1", 0)],
            store_host=ready.store_host,
            store_port=ready.store_port,
            cut=agent_pb2.CUT_ABORT,
        )
        coordinator.say(plan=plan)
        await coordinator.heard("formed")
        yield child
        child.kill()


def worker_pid(home: Home) -> int:
    return int(ask(home, "status")["job"]["workers"][0]["pid"])


async def test_killing_the_agent_ends_its_workers(process: subprocess.Popen[bytes], home: Home) -> None:
    pid = await asyncio.to_thread(worker_pid, home)
    process.kill()
    await eventually(lambda: not alive(pid), "the worker outlived its agent")


async def test_sigterm_drains_and_exits_with_0(
    process: subprocess.Popen[bytes], home: Home, coordinator: FakeCoordinator
) -> None:
    pid = await asyncio.to_thread(worker_pid, home)
    process.terminate()
    await coordinator.heard("leaving")
    coordinator.say(unassign=agent_pb2.Unassign(job_id="j1", reason="drained"))
    await coordinator.heard("goodbye")
    assert await asyncio.to_thread(process.wait, 20) == 0
    assert not alive(pid)


async def test_second_sigterm_stops_at_once(
    process: subprocess.Popen[bytes], home: Home, coordinator: FakeCoordinator
) -> None:
    pid = await asyncio.to_thread(worker_pid, home)
    process.terminate()
    await coordinator.heard("leaving")
    process.terminate()
    await coordinator.heard("goodbye")
    assert await asyncio.to_thread(process.wait, 20) == 0
    assert not alive(pid)


async def test_status_tells_what_the_agent_does_and_leave_ends_it(
    process: subprocess.Popen[bytes], home: Home, coordinator: FakeCoordinator
) -> None:
    status = await asyncio.to_thread(ask, home, "status")
    assert status["agent"] == "a1"
    assert status["connected"]
    assert status["job"]["generation"] == 1
    assert status["job"]["activity"] == "computing"
    assert "unknown" in (await asyncio.to_thread(ask, home, "nonsense"))["error"]
    await asyncio.to_thread(ask, home, "leave")
    await coordinator.heard("goodbye")
    assert await asyncio.to_thread(process.wait, 20) == 0
    with pytest.raises(AgentError, match="no agent answers"):
        await asyncio.to_thread(ask, home, "status")


async def test_frozen_worker_dies_with_its_agent_s_group_too(
    process: subprocess.Popen[bytes], home: Home
) -> None:
    pid = await asyncio.to_thread(worker_pid, home)
    os.kill(pid, signal.SIGSTOP)
    ask_drain = await asyncio.to_thread(ask, home, "leave")
    assert ask_drain["leaving"]
    assert await asyncio.to_thread(process.wait, 30) == 0
    assert not alive(pid)


async def test_home_serves_one_agent_at_a_time(process: subprocess.Popen[bytes], home: Home) -> None:
    assert process.poll() is None
    with pytest.raises(BadInput, match="another muster-agent is running"), home.locked():
        pass
