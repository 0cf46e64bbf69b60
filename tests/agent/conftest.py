from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.daemon import Agent, Settings
from agent.home import Home
from protos import agent_pb2
from tests.agent.fake_coordinator import FakeCoordinator

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(root=tmp_path / "home")
    home.prepare()
    return home


class Volunteer:
    """An agent in this process, with fake workers, at the fake coordinator."""

    def __init__(self, home: Home, coordinator: FakeCoordinator, heard: Path) -> None:
        self.home = home
        self.coordinator = coordinator
        self._heard = heard
        self.agent: Agent | None = None
        self.task: asyncio.Task[None] | None = None

    async def start(self, **settings: Any) -> None:
        identity = self.coordinator.authority.identity("a1", self.coordinator.address)
        identity.save(self.home.identity)
        chosen = Settings(**{"worker_command": WORKER, "gpus": (), **settings})
        self.agent = Agent(self.home, identity, chosen)
        self.task = asyncio.create_task(self.agent.run())
        await self.coordinator.heard("heartbeat", timeout_s=60.0)

    def assign(self, fake: dict[str, Any] | None = None, job_id: str = "j1", **spec: Any) -> None:
        text = json.dumps({"name": "test", "fake": fake or {}, **spec})
        self.coordinator.say(assignment=agent_pb2.Assignment(job_id=job_id, name="test", spec_json=text))

    def plan(self, generation: int, ready: agent_pb2.Ready, **fields: Any) -> None:
        members = fields.pop("members", [member("a1", 0)])
        self.coordinator.say(
            plan=agent_pb2.Plan(
                job_id=ready.job_id,
                generation=generation,
                members=members,
                store_host=ready.store_host,
                store_port=ready.store_port,
                **{"cut": agent_pb2.CUT_ABORT, "committed_step": 0, **fields},
            )
        )

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What the workers heard."""
        if not self._heard.exists():
            return []
        lines = [json.loads(line) for line in self._heard.read_text().splitlines()]
        return [line for line in lines if line["type"] == kind]

    async def stop(self) -> None:
        if self.agent is not None and self.task is not None:
            self.agent.leave("the test is over")
            await asyncio.wait((self.task,), timeout=20)
            if not self.task.cancelled() and self.task.done():
                self.task.exception()


def member(
    agent_id: str, group_rank: int, worker_count: int = 1, *, holds_state: bool = False
) -> agent_pb2.Member:
    return agent_pb2.Member(
        agent_id=agent_id,
        group_rank=group_rank,
        first_rank=group_rank,
        worker_count=worker_count,
        host="127.0.0.1",
        holds_state=holds_state,
    )


@pytest.fixture
async def volunteer(
    home: Home, coordinator: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Volunteer]:
    monkeypatch.setenv("MUSTER_STEP_TRACE", str(tmp_path / "heard"))
    someone = Volunteer(home, coordinator, tmp_path / "heard")
    yield someone
    await someone.stop()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def eventually(
    condition: Callable[[], Any], why: str = "it did not happen", timeout_s: float = 20.0
) -> Any:
    """Wait for something that nobody announces (another process's end, a file)."""
    try:
        async with asyncio.timeout(timeout_s):
            while not (found := condition()):  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(why) from None
    return found
