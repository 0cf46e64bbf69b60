"""The single writer: nothing is said before the journal has it, and nothing at all after it has failed."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.clock import Clock
from coordinator.core import codec
from coordinator.core.model import (
    Accepted,
    AgentFacts,
    AgentId,
    EnrollAsked,
    HeartbeatReceived,
    JobId,
    JobSpec,
    JobSubmitted,
    Push,
    PushAssignment,
    PushPlan,
    Readiness,
    ReadyReceived,
    Refused,
    Requirements,
    SessionId,
    SessionOpened,
    State,
    Timing,
    TokenAsked,
    TokenId,
)
from coordinator.journal import Entry, Journal, Snapshot
from coordinator.loop import Loop, LoopStoppedError, restore

TIMING = Timing.from_lease(10_000)


class GatedJournal:
    """A journal whose commit waits until it is let through, or fails."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.fails = False
        self.last_sequence = 0
        self.commits: list[list[Entry]] = []
        self.snapshots: list[Snapshot] = []

    def commit(self, entries: Sequence[Entry]) -> int:
        self.entered.set()
        assert self.gate.wait(20)
        if self.fails:
            raise sqlite3.OperationalError("disk I/O error")
        self.commits.append(list(entries))
        self.last_sequence += sum(len(entry.records) for entry in entries)
        return self.last_sequence

    def write_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)


class Running:
    """A loop on a journal double, and what it let out."""

    def __init__(self, journal: Any, snapshot_records: int = 1_000_000, longest_wait_ms: int = 1_000) -> None:
        self.pushed: list[Push] = []
        self.planned = asyncio.Event()
        self.died = asyncio.Event()
        self.loop = Loop(
            state=State(timing=TIMING),
            latest_step={},
            journal=journal,
            clock=Clock(not_before_ms=0, largest_gap_ms=10_000),
            observers=[],
            deliver=self._deliver,
            die=lambda _: self.died.set(),
            snapshot_records=snapshot_records,
            longest_wait_ms=longest_wait_ms,
        )
        self.loop.start()

    def _deliver(self, push: Push) -> None:
        self.pushed.append(push)
        if isinstance(push, PushPlan):
            self.planned.set()

    async def rest(self) -> None:
        """Until the loop has nothing to do: no thread is involved, so a few turns are enough."""
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def journal() -> AsyncIterator[GatedJournal]:
    made = GatedJournal()
    yield made
    made.gate.set()


def a_token(number: int) -> TokenAsked:
    return TokenAsked(
        token_id=TokenId(f"token{number:03}"), secret_sha256="ab" * 32, note="", expires_ms=2**50, uses=1
    )


def nobodys_heartbeat() -> HeartbeatReceived:
    return HeartbeatReceived(
        agent_id=AgentId("a1"),
        session_id=SessionId("s"),
        step=0,
        activity="",
        tokens_per_s=0.0,
        disk_free_bytes=0,
    )


async def in_thread(wait: Callable[[], Any]) -> None:
    await asyncio.to_thread(wait)


async def test_a_reply_comes_only_after_the_journals_commit(journal: GatedJournal) -> None:
    running = Running(journal)
    asked = asyncio.create_task(running.loop.submit(a_token(1)))
    await in_thread(journal.entered.wait)
    assert not asked.done()
    journal.gate.set()
    assert await asked == Accepted()
    assert len(journal.commits) == 1
    await running.loop.stop()


async def test_a_query_never_shows_what_is_not_committed(journal: GatedJournal) -> None:
    running = Running(journal)
    asked = asyncio.create_task(running.loop.submit(a_token(1)))
    await in_thread(journal.entered.wait)
    looked = asyncio.create_task(running.loop.query(lambda state, _: len(state.tokens)))
    await asyncio.sleep(0)
    assert not looked.done()
    journal.gate.set()
    assert (await asked, await looked) == (Accepted(), 1)
    await running.loop.stop()


async def test_events_that_wait_together_share_one_commit(journal: GatedJournal) -> None:
    running = Running(journal)
    first = asyncio.create_task(running.loop.submit(a_token(0)))
    await in_thread(journal.entered.wait)
    rest = [asyncio.create_task(running.loop.submit(a_token(number))) for number in range(1, 51)]
    await asyncio.sleep(0)
    journal.gate.set()
    await asyncio.gather(first, *rest)
    assert [len(entries) for entries in journal.commits] == [1, 50]
    await running.loop.stop()


async def test_when_the_commit_fails_the_process_ends_and_nothing_is_said(journal: GatedJournal) -> None:
    running = Running(journal)
    journal.fails = True
    said: list[object] = []
    asked = asyncio.create_task(running.loop.submit(a_token(1), released=lambda *_: said.append("released")))
    journal.gate.set()
    await running.died.wait()
    assert not asked.done()
    assert said == []
    assert running.pushed == []
    with pytest.raises(LoopStoppedError):
        await running.loop.submit(a_token(2))
    asked.cancel()


async def test_a_refusal_needs_no_journal(journal: GatedJournal) -> None:
    running = Running(journal)
    reply = await running.loop.submit(
        EnrollAsked(
            token_id=TokenId("nosuch00"),
            secret_sha256="",
            agent_id=AgentId("a1"),
            name="x",
            certificate_serial="1",
        )
    )
    assert isinstance(reply, Refused)
    assert not journal.entered.is_set()
    await running.loop.stop()


async def test_a_failing_query_fails_its_caller_only(journal: GatedJournal) -> None:
    journal.gate.set()
    running = Running(journal)
    with pytest.raises(ZeroDivisionError):
        await running.loop.query(lambda _, __: 1 // 0)
    assert await running.loop.submit(a_token(1)) == Accepted()
    await running.loop.stop()


async def test_a_decision_that_breaks_an_assertion_ends_the_process(journal: GatedJournal) -> None:
    running = Running(journal)
    asked = asyncio.create_task(running.loop.submit("no event"))  # type: ignore[arg-type]
    await running.died.wait()
    assert not asked.done()
    asked.cancel()


async def test_snapshots_come_after_so_many_records_and_at_the_end(journal: GatedJournal) -> None:
    journal.gate.set()
    running = Running(journal, snapshot_records=3)
    for number in range(4):
        await running.loop.submit(a_token(number))
    await running.loop.stop()
    assert [snapshot.sequence for snapshot in journal.snapshots] == [3, 4]
    assert len(codec.decode_state(journal.snapshots[-1].body).tokens) == 4


async def test_what_is_queued_when_stopping_is_still_decided(journal: GatedJournal) -> None:
    running = Running(journal)
    asked = asyncio.create_task(running.loop.submit(a_token(1)))
    await in_thread(journal.entered.wait)
    late = asyncio.create_task(running.loop.submit(a_token(2)))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(running.loop.stop())
    await asyncio.sleep(0)
    journal.gate.set()
    await stopping
    assert (await asked, await late) == (Accepted(), Accepted())


async def test_the_folded_journal_is_the_state_whatever_snapshot_it_starts_from(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        running = Running(journal, snapshot_records=4)
        for number in range(10):
            await running.loop.submit(a_token(number))
        await running.loop.stop()
        expected = codec.encode_state(running.loop.state)
        assert journal.snapshot() is not None
        assert codec.encode_state(restore(journal, TIMING)) == expected
        assert len(restore(journal, TIMING, until=7).tokens) == 7
    raw = sqlite3.connect(tmp_path / "j.db")
    raw.execute("DELETE FROM snapshots")
    raw.commit()
    raw.close()
    with Journal(tmp_path / "j.db") as journal:
        assert codec.encode_state(restore(journal, TIMING)) == expected


async def test_an_event_is_judged_by_the_time_at_which_it_arrived(journal: GatedJournal) -> None:
    running = Running(journal)
    times: list[int] = []
    asked = asyncio.create_task(running.loop.submit(a_token(1)))
    await in_thread(journal.entered.wait)
    arrived = running.loop.now_ms()
    looked = asyncio.create_task(running.loop.query(lambda _, now_ms: times.append(now_ms)))
    await asyncio.sleep(0.05)
    journal.gate.set()
    await asyncio.gather(asked, looked)
    assert times[0] - arrived < 40
    await running.loop.stop()


async def test_a_heartbeat_of_nobody_is_refused_without_a_record(journal: GatedJournal) -> None:
    running = Running(journal)
    assert isinstance(await running.loop.submit(nobodys_heartbeat()), Refused)
    await running.loop.stop()


async def test_what_leaves_nothing_to_write_is_answered_at_once_by_a_loop_that_rests(
    journal: GatedJournal,
) -> None:
    running = Running(journal)
    await running.rest()
    with pytest.raises(StopIteration) as answered:
        running.loop.query(lambda state, _: len(state.tokens)).send(None)
    assert answered.value.value == 0
    asked = asyncio.create_task(running.loop.submit(a_token(1)))
    await in_thread(journal.entered.wait)
    looked = asyncio.create_task(running.loop.query(lambda state, _: len(state.tokens)))
    await running.rest()
    assert not looked.done()
    journal.gate.set()
    assert (await asked, await looked) == (Accepted(), 1)
    await running.loop.stop()


async def test_whoever_is_told_at_once_may_submit_from_there(journal: GatedJournal) -> None:
    """The second event must not be decided in the middle of the first one's release."""
    journal.gate.set()
    running = Running(journal)
    await running.rest()
    order: list[str] = []

    def told(_state: State, _reply: object) -> None:
        running.loop.post(a_token(1))
        order.append(f"{len(running.loop.state.tokens)} tokens")

    await running.loop.submit(nobodys_heartbeat(), released=told)
    assert await running.loop.query(lambda state, _: len(state.tokens)) == 1
    assert order == ["0 tokens"]
    await running.loop.stop()
    assert len(journal.commits) == 1


async def test_a_decision_at_once_that_breaks_an_assertion_ends_the_process(journal: GatedJournal) -> None:
    running = Running(journal)
    await running.rest()
    asked = asyncio.create_task(running.loop.submit("no event"))  # type: ignore[arg-type]
    await running.died.wait()
    assert not asked.done()
    assert journal.snapshots == []
    asked.cancel()


async def test_an_event_decided_at_once_that_makes_something_due_wakes_the_loop(
    journal: GatedJournal,
) -> None:
    """One of two agents is ready: the other is waited for until last call is over, not for the longest wait."""
    journal.gate.set()
    running = Running(journal, longest_wait_ms=3_600_000)
    loop = running.loop
    await loop.submit(replace(a_token(1), secret_sha256="ab" * 32, uses=2))
    spec = JobSpec(
        name="j", spec_json="{}", dataset_json="", launch="muster", min_nodes=1, max_nodes=2, priority=0,
        requires=Requirements(), max_failures=3, last_call_ms=50, min_generation_ms=0, step_timeout_ms=1_000,
        keep_checkpoints=1,
    )  # fmt: skip
    await loop.submit(JobSubmitted(job_id=JobId("j1"), spec=spec))
    for agent_id in (AgentId("a1"), AgentId("a2")):
        await loop.submit(
            EnrollAsked(
                token_id=TokenId("token001"), secret_sha256="ab" * 32, agent_id=agent_id, name="x",
                certificate_serial="1",
            )
        )  # fmt: skip
        await loop.submit(
            SessionOpened(
                agent_id=agent_id, session_id=SessionId(f"s{agent_id}"), incarnation="i", facts=AgentFacts(),
                held_job=None, held_generation=0, torchrun_job="",
            )
        )  # fmt: skip
    assert sum(isinstance(push, PushAssignment) for push in running.pushed) == 2
    await running.rest()
    ready = Readiness(
        job_id=JobId("j1"), store_host="10.0.0.1", store_port=1, holds_state=False, step=0, state_digest=""
    )
    commits = len(journal.commits)
    await loop.submit(ReadyReceived(agent_id=AgentId("a1"), readiness=ready))
    assert len(journal.commits) == commits, "it was to be decided at once"
    async with asyncio.timeout(20):
        await running.planned.wait()
    await loop.stop()
