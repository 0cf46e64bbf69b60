"""The single writer: events in, one after another; records to the journal; only then replies and pushes.

Whoever wants to change the state submits an event and waits.  Whoever wants to see it queries through
the same queue and so never sees a decision that could still be lost.  If the journal fails the
process ends, for what it would say from then on could not be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog

from coordinator.bell import Bell
from coordinator.clock import Clock
from coordinator.core import codec
from coordinator.core.evolve import evolve
from coordinator.core.model import (
    EvaluationRecorded,
    Event,
    JobId,
    LeaseRenewed,
    ProgressAccepted,
    Push,
    Record,
    Refused,
    Reply,
    State,
    StepsRolledBack,
    Tick,
    Timing,
)
from coordinator.core.settle import next_deadline
from coordinator.core.step import Outcome, Seal, no_seal, step
from coordinator.journal import (
    Entry,
    EvaluationRow,
    Journal,
    JournalError,
    RecordRow,
    Rollback,
    Snapshot,
    StepRow,
)

log = structlog.get_logger("coordinator.loop")
Answer = TypeVar("Answer")

MAX_BATCH = 512


class LoopStoppedError(Exception):
    """The coordinator is stopping: the event was not decided."""


class JournalWriter(Protocol):
    """What the loop needs of the journal."""

    @property
    def last_sequence(self) -> int: ...
    def commit(self, entries: Sequence[Entry]) -> int: ...
    def write_snapshot(self, snapshot: Snapshot) -> None: ...


@dataclass(slots=True)
class Ticket:
    """An event or query in the queue."""

    at_ms: int
    arrived: float  # monotonic seconds
    event: Event | None
    query: Callable[[State, int], Any] | None
    steps: tuple[StepRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    released: Callable[[State, Reply], None] | None
    future: asyncio.Future[Any] | None = None
    applied: bool = False
    entry: Entry | None = None
    """What the journal must keep of it, once it is applied."""
    done: bool = False
    answer: Any = None
    pushes: tuple[Push, ...] = ()
    records: tuple[Record, ...] = ()


class Observer(Protocol):
    """Told of everything that has become fact; must not block."""

    def committed(self, record: Record) -> None: ...
    def decided(self, event: Event, reply: Reply, waited_s: float) -> None: ...
    def wrote(self, entries: int, seconds: float) -> None: ...


def restore(journal: Journal, timing: Timing, until: int | None = None) -> State:
    """Fold the journal, up to record `until`: the newest snapshot and the records after it.

    Raise JournalError if it is damaged."""
    snapshot = journal.snapshot(until)
    where = "snapshot"
    try:
        if snapshot is None:
            state, after = State(timing=timing), 0
        else:
            state, after = codec.decode_state(snapshot.body), snapshot.sequence
            state.timing = timing
        for stored in journal.history(after, until):
            where = f"record {stored.sequence}"
            evolve(state, codec.decode_record(stored.body))
    except codec.CodecError as error:
        raise JournalError(
            f"journal {journal.path}: {where} is not what this musterd writes ({error}); was it written by a newer one?"
        ) from error
    return state


class Loop:
    """Owns the state.  Everything but `submit`, `post` and `query` is for the daemon."""

    def __init__(
        self,
        *,
        state: State,
        latest_step: Mapping[str, StepRow],
        journal: JournalWriter,
        clock: Clock,
        observers: Sequence[Observer],
        deliver: Callable[[Push], None],
        die: Callable[[str], None],
        snapshot_records: int,
        longest_wait_ms: int,
        seal: Seal = no_seal,
    ) -> None:
        """The clock is read at least every `longest_wait_ms`.  `die` ends the process; nothing is answered
        after it was called.  `seal` signs the manifests of checkpoints."""
        self.state = state
        self.record_bell = Bell()
        self.latest_step = dict(latest_step)
        self._journal = journal
        self._clock = clock
        self._observers = observers
        self._deliver = deliver
        self._die = die
        self._snapshot_records = snapshot_records
        self._longest_wait_ms = longest_wait_ms
        self._seal = seal
        self._snapshot_at = journal.last_sequence
        self._queue: deque[Ticket] = deque()
        self._arrived = asyncio.Event()
        self._resting = False
        """Nothing waits, nothing is being written, and whatever was decided has been released."""
        self._broken: Exception | None = None
        self._stopping = False
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._task: asyncio.Task[None] | None = None

    # ----------------------------------------------------------------------------- the way in

    def now_ms(self) -> int:
        """The coordinator's time."""
        return self._clock.now_ms()

    async def submit(
        self,
        event: Event,
        *,
        steps: tuple[StepRow, ...] = (),
        evaluations: tuple[EvaluationRow, ...] = (),
        released: Callable[[State, Reply], None] | None = None,
    ) -> Reply:
        """Have `event` decided and recorded.  The reply comes after the journal's commit.

        `steps` and `evaluations` belong to a ProgressReceived; those that are new are kept in the same
        transaction.  `released` is called right after the commit, before any push of this event goes
        out, with a state of which everything is recorded.  Raise LoopStoppedError."""
        reply: Reply = await self._done(
            self._take(event=event, steps=steps, evaluations=evaluations, released=released)
        )
        return reply

    def post(self, event: Event) -> None:
        """Have `event` decided; nobody waits for the reply.  Ignored when stopping."""
        with contextlib.suppress(LoopStoppedError):
            self._take(event=event)

    async def query(self, look: Callable[[State, int], Answer]) -> Answer:
        """`look(state, now_ms)` at a state of which everything is recorded.  `look` must not keep the state."""
        answer: Answer = await self._done(self._take(query=look))
        return answer

    @staticmethod
    async def _done(ticket: Ticket) -> Any:
        """The answer, once the ticket is released."""
        if not ticket.done:
            ticket.future = asyncio.get_running_loop().create_future()
            return await ticket.future
        if isinstance(ticket.answer, Exception):
            raise ticket.answer
        return ticket.answer

    def _take(
        self,
        *,
        event: Event | None = None,
        query: Callable[[State, int], Any] | None = None,
        steps: tuple[StepRow, ...] = (),
        evaluations: tuple[EvaluationRow, ...] = (),
        released: Callable[[State, Reply], None] | None = None,
    ) -> Ticket:
        """Queue it; or, if nothing else is on its way and it leaves nothing to write, have done with it."""
        if self._stopping:
            raise LoopStoppedError("the coordinator is stopping; try again in a few seconds")
        # The time of arrival counts: a heartbeat that waited for a slow disk was not late.
        ticket = Ticket(
            at_ms=self._clock.now_ms(),
            arrived=time.monotonic(),
            event=event,
            query=query,
            steps=steps,
            evaluations=evaluations,
            released=released,
        )
        if self._resting:
            self._resting = False  # also for whoever is told of it now and has something to say
            try:
                self._apply(ticket)
                if ticket.entry is None:
                    self._release(ticket)
                    # A renewed lease makes nothing due earlier; whatever else happened might.
                    if self._queue or not all(isinstance(record, LeaseRenewed) for record in ticket.records):
                        self._arrived.set()
                    else:
                        self._resting = True
                    return ticket
            except Exception as error:
                self._broken = error
        self._queue.append(ticket)
        self._arrived.set()
        return ticket

    # ----------------------------------------------------------------------------- running

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="coordinator loop")

    async def stop(self) -> None:
        """Decide what is queued, refuse what comes later, write a snapshot and end."""
        self._stopping = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._writer.shutdown()

    async def _run(self) -> None:
        try:
            while self._queue or not self._stopping:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]
                await self._decide(batch or [self._tick()])
                if not self._queue and not self._stopping:
                    await self._wait()
            await self._snapshot(due=1)
        except Exception as error:
            # Our own bug or a broken disk: the state in memory may be ahead of the journal.
            log.critical("coordinator cannot go on", error=str(error), exc_info=True)
            self._stopping = True
            self._die(f"the journal could not be written, or a decision failed: {error}")

    def _tick(self) -> Ticket:
        return Ticket(
            at_ms=self._clock.now_ms(),
            arrived=time.monotonic(),
            event=Tick(),
            query=None,
            steps=(),
            evaluations=(),
            released=None,
        )

    async def _wait(self) -> None:
        self._arrived.clear()
        deadline = next_deadline(self.state)
        wait_ms = self._longest_wait_ms
        if deadline is not None:
            wait_ms = min(wait_ms, max(1, deadline - self._clock.now_ms()))
        self._resting = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_ms / 1000):
                await self._arrived.wait()
        self._resting = False

    async def _decide(self, batch: list[Ticket]) -> None:
        if self._broken is not None:
            raise self._broken
        for ticket in batch:
            if not ticket.applied:
                self._apply(ticket)
        entries = [ticket.entry for ticket in batch if ticket.entry is not None]
        if entries:
            started = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(self._writer, self._journal.commit, entries)
            seconds = time.monotonic() - started
            for observer in self._observers:
                observer.wrote(len(entries), seconds)
            for entry in entries:
                if entry.steps:
                    self.latest_step[entry.steps[-1].job_id] = entry.steps[-1]
                for rollback in entry.rollbacks:
                    self.latest_step.pop(rollback.job_id, None)
        for ticket in batch:
            self._release(ticket)
        if entries:
            self.record_bell.ring()
            await self._snapshot(due=self._snapshot_records)

    def _apply(self, ticket: Ticket) -> None:
        ticket.applied = True
        if ticket.event is None:
            assert ticket.query is not None
            try:
                ticket.answer = ticket.query(self.state, ticket.at_ms)
            except Exception as error:
                ticket.answer = error
            return
        outcome = step(self.state, ticket.at_ms, ticket.event, self._seal)
        ticket.answer = outcome.reply
        ticket.records = outcome.records
        ticket.pushes = outcome.pushes
        durable = [record for record in outcome.records if codec.is_durable(record)]
        steps, evaluations = self._new_rows(ticket, outcome)
        if not durable and not evaluations:
            return
        ticket.entry = Entry(
            records=tuple(_row(record) for record in durable),
            steps=steps,
            evaluations=evaluations,
            rollbacks=tuple(
                Rollback(job_id=record.job_id, to_step=record.to_step)
                for record in durable
                if isinstance(record, StepsRolledBack)
            ),
        )

    def _new_rows(
        self, ticket: Ticket, outcome: Outcome
    ) -> tuple[tuple[StepRow, ...], tuple[EvaluationRow, ...]]:
        reply = outcome.reply
        if isinstance(reply, Refused):
            return (), ()
        steps: tuple[StepRow, ...] = ()
        if isinstance(reply, ProgressAccepted):
            new = range(reply.first_new_step, reply.last_step + 1)
            steps = tuple(row for row in ticket.steps if row.step in new)
        if not ticket.evaluations:
            return steps, ()
        recorded = {r.evaluation.step for r in outcome.records if isinstance(r, EvaluationRecorded)}
        committed = self.state.jobs[JobId(ticket.evaluations[0].job_id)].committed_step
        # One that is not finite is no matter of the core's, and shown all the same.
        return steps, tuple(
            row
            for row in ticket.evaluations
            if row.step in recorded or (row.loss is None and row.step <= committed)
        )

    def _release(self, ticket: Ticket) -> None:
        ticket.done = True
        if ticket.event is not None:
            waited_s = time.monotonic() - ticket.arrived
            for observer in self._observers:
                for record in ticket.records:
                    observer.committed(record)
                observer.decided(ticket.event, ticket.answer, waited_s)
        if ticket.released is not None:
            ticket.released(self.state, ticket.answer)
        for push in ticket.pushes:
            self._deliver(push)
        if ticket.future is not None and not ticket.future.done():
            if isinstance(ticket.answer, Exception):
                ticket.future.set_exception(ticket.answer)
            else:
                ticket.future.set_result(ticket.answer)

    async def _snapshot(self, due: int) -> None:
        sequence = self._journal.last_sequence
        if sequence - self._snapshot_at < due:
            return
        snapshot = Snapshot(sequence=sequence, body=codec.encode_state(self.state))
        await asyncio.get_running_loop().run_in_executor(self._writer, self._journal.write_snapshot, snapshot)
        self._snapshot_at = sequence


def _row(record: Record) -> RecordRow:
    return RecordRow(
        at_ms=record.at_ms,
        kind=type(record).__name__,
        job_id=str(getattr(record, "job_id", "") or ""),
        body=codec.encode_record(record),
        text=codec.describe(record),
    )
