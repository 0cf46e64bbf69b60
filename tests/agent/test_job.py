"""One job with two workers on one machine: what happens to one concerns the other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.blobs import BlobCache, BlobClient, ShardReports
from agent.elastic import Seat
from agent.home import Home
from agent.job import JobRun, WorkerSettings, step_timeout_s
from protos import agent_pb2
from tests.agent.conftest import WORKER, alive, eventually, member


class Pair:
    """A JobRun with two slots, and what it says to the coordinator."""

    def __init__(self, home: Home, heard: Path, fake: dict[str, Any]) -> None:
        self.said: list[agent_pb2.AgentMessage] = []
        self._news = asyncio.Condition()
        self._heard = heard

        async def no_room(_: int) -> None:
            raise AssertionError("no shard is fetched here")

        def nobody() -> Any:
            raise AssertionError("no blob is moved here")

        blobs = BlobClient(nobody, BlobCache(home.blobs))
        environment = {**os.environ, "MUSTER_STEP_TRACE": str(heard)}
        self.job = JobRun(
            agent_pb2.Assignment(job_id="j1", spec_json=json.dumps({"fake": fake})),
            agent_id="a1",
            home=home,
            settings=WorkerSettings(
                command=WORKER, environments=(environment, environment), advertise_host="127.0.0.1"
            ),
            blobs=blobs,
            reports=ShardReports(nobody, blobs, lambda _: None),
            send=self._send,
            connected=lambda: True,
            make_seat=lambda lobby, job: Seat(lobby, job, agent_id="a1", workers=2),
            rebuild_timeout_s=5.0,
            cache_bytes=1 << 30,
            make_room=no_room,
            objection=lambda _: "",
            authority="",
        )

    def _send(self, message: agent_pb2.AgentMessage) -> int:
        self.said.append(message)
        self._tell = asyncio.ensure_future(self._wake())
        return len(self.said)

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def says(self, kind: str, nth: int = 1) -> Any:
        """The nth message of this kind."""

        def found() -> list[Any]:
            return [getattr(m, kind) for m in self.said if m.WhichOneof("body") == kind]

        async with asyncio.timeout(30), self._news:
            await self._news.wait_for(lambda: len(found()) >= nth)
            return found()[nth - 1]

    def told(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._heard.read_text().splitlines()]
        return [line for line in lines if line["type"] == kind]

    def plan(self, generation: int, ready: agent_pb2.Ready) -> None:
        self.job.plan(
            agent_pb2.Plan(
                job_id="j1",
                generation=generation,
                members=[member("a1", 0, 2)],
                store_host=ready.store_host,
                store_port=ready.store_port,
                cut=agent_pb2.CUT_ABORT,
            )
        )

    @staticmethod
    def plan_of_two(generation: int, ready: agent_pb2.Ready) -> agent_pb2.Plan:
        """Behind a leader that holds the state."""
        return agent_pb2.Plan(
            job_id="j1",
            generation=generation,
            members=[member("a2", 0, holds_state=True), member("a1", 1, 2)],
            store_host=ready.store_host,
            store_port=ready.store_port,
            cut=agent_pb2.CUT_AFTER_STEP,
        )


@pytest.fixture
async def pair(home: Home, tmp_path: Path) -> AsyncIterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(**fake: Any) -> Pair:
        pairs.append(Pair(home, tmp_path / "heard", fake))
        pairs[-1].job.start()
        return pairs[-1]

    yield make
    for each in pairs:
        await each.job.stop("the test is over")
        await each._tell


async def test_each_worker_gets_its_rank_and_the_agent_confirms_once(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.plan(1, await both.says("ready"))
    formed = await both.says("formed")
    assert formed.generation == 1
    assert sorted((plan["slot"], plan["rank"], plan["world_size"]) for plan in both.told("plan")) == [
        (0, 0, 2),
        (1, 1, 2),
    ]
    assert sum(m.WhichOneof("body") == "formed" for m in both.said) == 1


async def test_steps_are_reported_by_one_worker_and_finished_by_both(pair: Callable[..., Pair]) -> None:
    both = pair(steps=1)
    both.plan(1, await both.says("ready"))
    progress = await both.says("progress")
    assert [record.step for record in progress.steps] == [1]
    both.job.acknowledged(1)
    assert (await both.says("finished")).step == 1


async def test_sibling_of_a_dead_worker_is_aborted_and_its_state_offered(pair: Callable[..., Pair]) -> None:
    both = pair()
    both.plan(1, await both.says("ready"))
    await both.says("formed")
    await both.says("ready", 2)
    first, second = sorted(both.told("plan"), key=lambda plan: plan["slot"])
    os.kill(second["pid"], signal.SIGKILL)
    failed = await both.says("failed")
    assert failed.kind == agent_pb2.FAILURE_KIND_KILLED
    ready = await both.says("ready", 3)
    assert ready.holds_state
    assert [(abort["slot"], abort["generation"]) for abort in both.told("abort")] == [(0, 1)]
    assert alive(first["pid"])
    both.plan(2, ready)
    await both.says("formed", 2)
    last = {plan["slot"]: plan["pid"] for plan in both.told("plan")}
    assert last[0] == first["pid"]
    assert last[1] != second["pid"]


async def test_released_leader_hands_in_its_steps_before_it_says_so(pair: Callable[..., Pair]) -> None:
    both = pair(steps=2, finish=False)
    both.plan(1, await both.says("ready"))
    await both.says("formed")  # by both workers, which has what is not acknowledged sent again
    await eventually(lambda: len(both.job.ledger) == 2)
    sent = sum(m.HasField("progress") for m in both.said)
    both.job.plan(agent_pb2.Plan(job_id="j1", generation=2, cut=agent_pb2.CUT_AFTER_STEP))
    both.job.acknowledged(1)
    progress = await both.says("progress", sent + 1)
    assert [record.step for record in progress.steps] == [2]
    assert not any(m.HasField("released") for m in both.said)
    both.job.acknowledged(2)
    assert (await both.says("released")).generation == 2


async def test_evaluations_come_again_with_steps_that_were_refused(pair: Callable[..., Pair]) -> None:
    both = pair(steps=2, finish=False)
    both.plan(1, await both.says("ready"))
    await eventually(lambda: len(both.job.ledger) == 2)
    both.job.ledger.evaluated(agent_pb2.Evaluation(step=2, loss=1.5))
    sent = sum(m.HasField("progress") for m in both.said)
    both.job.acknowledged(1)
    first = await both.says("progress", sent + 1)
    both.job.acknowledged(1)  # a peer's earlier step is missing: nothing of it was recorded
    again = await both.says("progress", sent + 2)
    for progress in (first, again):
        assert [step.step for step in progress.steps] == [2]
        assert [found.step for found in progress.evaluations] == [2]
    both.job.acknowledged(2)
    assert both.job.ledger.batch("j1", 1) is None


async def test_a_release_that_crossed_the_next_plan_is_not_taken_for_the_next_release(
    pair: Callable[..., Pair],
) -> None:
    """Found by simulation, seed 49: the agent said that it was out while its workers still trained, so that
    they took no last checkpoint, and the job waited for their shards."""
    both = pair()
    both.plan(1, await both.says("ready"))
    await both.says("formed")
    ready = await both.says("ready", 2)
    both.job.plan(agent_pb2.Plan(job_id="j1", generation=2, cut=agent_pb2.CUT_AFTER_STEP))
    both.plan(3, ready)  # before the workers can say that they are out
    assert (await both.says("formed", 2)).generation == 3
    both.job.plan(agent_pb2.Plan(job_id="j1", generation=4, cut=agent_pb2.CUT_AFTER_STEP))
    assert (await both.says("released")).generation == 4
    assert sorted(plan["slot"] for plan in both.told("plan") if plan["generation"] == 4) == [0, 1]


@pytest.mark.parametrize(
    ("value", "seconds"), [("250ms", 0.25), ("5s", 5.0), ("2m", 120.0), (7, 7.0), (None, 300.0)]
)
def test_step_timeout_is_read_from_the_job_file(value: object, seconds: float) -> None:
    spec = {"elastic": {"step_timeout": value}} if value is not None else {}
    assert step_timeout_s(spec) == seconds


async def test_steps_of_a_state_that_was_given_up_are_not_reported_as_the_new_ones(
    pair: Callable[..., Pair],
) -> None:
    """Found by simulation, seed 2062: the plan that gave the state up had never reached the agent."""
    both = pair(steps=9, finish=False)
    both.plan(1, await both.says("ready"))
    await both.says("progress")
    ready = await both.says("ready", 2)
    await eventually(lambda: len(both.job.ledger) == 9)
    joined = both.plan_of_two(3, ready)
    joined.lineage, joined.committed_step = 2, 4
    joined.members[1].holds_state = True
    both.job.plan(joined)
    assert len(both.job.ledger) == 0


async def test_steps_made_since_the_last_agreement_are_forgotten_by_who_was_given_up(
    pair: Callable[..., Pair],
) -> None:
    both = pair(steps=9, finish=False)
    both.plan(1, await both.says("ready"))
    await both.says("progress")
    await eventually(lambda: len(both.job.ledger) == 9)
    kept = both.plan_of_two(2, await both.says("ready", 2))
    kept.members[1].holds_state = True
    both.job.plan(kept)
    assert len(both.job.ledger) == 9, "a holder's steps are the job's"
    both.job.plan(both.plan_of_two(3, await both.says("ready", 2)))
    assert len(both.job.ledger) == 0
