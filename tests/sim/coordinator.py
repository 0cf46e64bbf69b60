"""The simulated shell: the real core behind a queue, a journal of encoded records, and sessions.

It does what `coordinator.loop` and `coordinator.agent_service` do: events are decided in batches, a
batch's durable records are committed at once, and only then its replies and pushes are let out.  It
dies when told to: before a commit, after it, or half-way through what it lets out; and whenever the
journal cannot be written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coordinator.clock import Clock
from coordinator.core import codec
from coordinator.core.evolve import evolve
from coordinator.core.model import (
    AgentId,
    CoordinatorStarted,
    Event,
    GoodbyeReceived,
    HeartbeatReceived,
    JobId,
    JobRolledBack,
    LeaseRenewed,
    ProgressAccepted,
    Push,
    PushGoAway,
    Refusal,
    Refused,
    Reply,
    SessionClosed,
    SessionId,
    SessionOpened,
    State,
    StepsRolledBack,
    StepsUnrecorded,
    Tick,
    Timing,
)
from coordinator.core.settle import next_deadline
from coordinator.core.step import Outcome, step
from coordinator.journal import StepRow
from coordinator.sweep import referenced
from coordinator.translate import progress
from protos import agent_pb2
from tests.sim.checks import Checks
from tests.sim.world import Timer, World

if TYPE_CHECKING:
    from tests.sim.session import Session

SNAPSHOT_RECORDS = 200
SWEEP_EVERY_MS = 5_000
GRACE_MS = 10_000
Released = Callable[[State, Reply], None]


@dataclass(slots=True, kw_only=True)
class Beat:
    """A heartbeat; `mark` is what the agent had sent before it."""

    step: int
    activity: str
    mark: int
    fetched_bytes: int = 0
    all_stored: bool = False


@dataclass(slots=True, kw_only=True)
class ProgressReport:
    message: agent_pb2.Progress


@dataclass(slots=True, kw_only=True)
class Welcome:
    pass


@dataclass(slots=True, kw_only=True)
class BeatAck:
    mark: int


@dataclass(slots=True, kw_only=True)
class ProgressAck:
    job_id: JobId
    step: int


@dataclass(slots=True, kw_only=True)
class GoAway:
    refusal: Refusal
    message: str


@dataclass(slots=True)
class Ticket:
    at_ms: int | None
    event: Event
    released: Released | None
    rows: tuple[StepRow, ...]
    outcome: Outcome | None = None
    lines: list[str] = field(default_factory=list)


def _only_renewed(ticket: Ticket) -> bool:
    outcome = ticket.outcome
    return outcome is not None and len(outcome.records) == 1 and type(outcome.records[0]) is LeaseRenewed


class Coordinator:
    """`submit` is its only way in while it is up."""

    def __init__(self, world: World, timing: Timing, checks: Checks, *, snapshots: bool, hasty: bool) -> None:
        self.world = world
        self.timing = timing
        self.checks = checks
        self.journal: list[str] = []
        self.step_log: dict[JobId, dict[int, StepRow]] = {}
        self.blobs: dict[str, int] = {}  # when they were stored last
        self.damaged: dict[str, None] = {}
        self.state = State(timing=timing)
        self.up = False
        self.frozen = False
        self.disk_full = False
        self.blobs_full = False
        self.crash_at: str | None = None
        """How to die at the next commit: "before", "after" or "partway"."""
        self.starts = 0
        self.sessions: dict[AgentId, Session] = {}
        self.open_sessions: dict[SessionId, Session] = {}
        self._hasty = hasty  # commits take no time, and quiet heartbeats cost little
        self._snapshots = snapshots
        self._snapshot: tuple[int, str] | None = None
        self._last_ms = 0
        self._epoch = 0
        self._queue: deque[Ticket] = deque()
        self._busy = False
        self._wake: Timer | None = None
        self._wake_ms = 0
        self._sweep_ms = 0
        self._clock = Clock(not_before_ms=0, largest_gap_ms=1, wall=self._seconds, monotonic=self._seconds)
        self._longest_wait_ms = min(1_000, timing.heartbeat_ms)

    def _seconds(self) -> float:
        return self.world.now_ms / 1000

    # ------------------------------------------------------------------------- living, dying

    def start(self) -> None:
        """Read back what is durable and go on."""
        if self.up:
            return
        self.starts += 1
        self.state = self._restore()
        self.checks.restarted(self.state, self.journal, self.step_log)
        self.up, self._busy = True, False
        self._clock = Clock(
            not_before_ms=self._last_ms,
            largest_gap_ms=2 * self._longest_wait_ms,
            wall=self._seconds,
            monotonic=self._seconds,
        )
        self.world.tell(f"coordinator starts with {len(self.journal)} records")
        self.submit(CoordinatorStarted(spread_ms=self.timing.lease_ms))

    def _restore(self) -> State:
        state, after = State(timing=self.timing), 0
        if self._snapshot is not None:
            after, text = self._snapshot
            state = codec.decode_state(text)
        for line in self.journal[after:]:
            evolve(state, codec.decode_record(line))
        return state

    def die(self, why: str) -> None:
        """The process is gone, with all that it had not committed."""
        if not self.up:
            return
        self.world.tell(f"coordinator dies: {why}")
        self.up, self.frozen, self.crash_at = False, False, None
        self._epoch += 1
        self._queue.clear()
        self._busy = False
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        self.sessions.clear()
        for session in list(self.open_sessions.values()):
            session.coordinator_died()
        self.open_sessions.clear()
        self.checks.fleet.coordinator_died()

    def freeze(self) -> None:
        if self.up:
            self.world.tell("coordinator is stopped")
            self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            self.world.tell("coordinator goes on")
            self.frozen = False
            if not self._queue:  # what waits at its sockets is read only after this
                self._queue.appendleft(Ticket(None, Tick(), None, ()))
            for ticket in self._queue:
                if ticket.at_ms is None:
                    ticket.at_ms = self._clock.now_ms()
            self._turn()

    # ------------------------------------------------------------------------- deciding

    def submit(
        self, event: Event, *, released: Released | None = None, rows: tuple[StepRow, ...] = ()
    ) -> None:
        """Have `event` decided; `released` is called when what came of it is durable.  Lost if it is down."""
        if not self.up:
            return
        at_ms = None if self.frozen else self._clock.now_ms()
        self._queue.append(Ticket(at_ms, event, released, rows))
        if not self._busy:
            self._turn()

    @property
    def listens(self) -> bool:
        return self.up and not self.frozen

    def _turn(self) -> None:
        if self.frozen or self._busy:
            return
        self._busy = True
        epoch, quiet = self._epoch, self._hasty and bool(self._queue)
        while self._queue:
            batch = list(self._queue)
            self._queue.clear()
            durable = False
            for ticket in batch:
                durable = self._apply(ticket) or durable
            if durable:
                delay_ms = 0 if self._hasty else self.world.between(0, 4)
                if delay_ms:
                    self.world.after(delay_ms, self._write, batch, epoch)
                    return
                self._commit(batch)
                if not self.up or self._epoch != epoch:
                    return
                quiet = False
            else:
                self._release(batch)
                if not self.up or self._epoch != epoch:
                    return
                quiet = quiet and all(map(_only_renewed, batch))
        self._busy = False
        self._sweep()
        if not (quiet and self._wake is not None and self.world.now_ms < self._wake_ms):
            self._sleep()  # else nothing is due earlier than before

    def _sweep(self) -> None:
        """Everything is recorded: blobs that nothing refers to go, once they are old."""
        now_ms = self.world.now_ms
        if now_ms < self._sweep_ms or not self.up:
            return
        self._sweep_ms = now_ms + SWEEP_EVERY_MS
        keep = referenced(self.state)
        for digest in [d for d, at_ms in self.blobs.items() if d not in keep and now_ms - at_ms > GRACE_MS]:
            del self.blobs[digest]

    def _write(self, batch: list[Ticket], epoch: int) -> None:
        if epoch != self._epoch:
            return
        if self.frozen:
            self.world.after(10, self._write, batch, epoch)
            return
        self._commit(batch)
        if self.up and self._epoch == epoch:
            self._busy = False
            self._turn()

    def _apply(self, ticket: Ticket) -> bool:
        at_ms = self._clock.now_ms() if ticket.at_ms is None else ticket.at_ms
        ticket.at_ms = at_ms
        outcome = ticket.outcome = step(self.state, at_ms, ticket.event)
        ticket.lines = [codec.encode_record(r) for r in outcome.records if codec.is_durable(r)]
        self.checks.decided(self.state, at_ms, ticket.event, outcome, ticket.lines)
        return bool(ticket.lines)

    def _commit(self, batch: list[Ticket]) -> None:
        if self.disk_full:
            self.die("the journal cannot be written, no space is left")
            return
        if self.crash_at == "before":
            self.die("killed before a commit")
            return
        for ticket in batch:
            assert ticket.outcome is not None
            self.journal += ticket.lines
            if ticket.lines and ticket.at_ms is not None:
                self._last_ms = ticket.at_ms
            self._keep_steps(ticket, ticket.outcome)
            self.checks.committed(self, ticket.event, ticket.outcome)
        if self.crash_at == "after":
            self.die("killed after a commit, before it answered")
            return
        self._release(batch)
        if self.up and self._snapshots:
            after = self._snapshot[0] if self._snapshot is not None else 0
            often = SNAPSHOT_RECORDS * (10 if self._hasty else 1)
            if len(self.journal) - after >= often and not self._queue:
                self._snapshot = (len(self.journal), codec.encode_state(self.state))

    def _keep_steps(self, ticket: Ticket, outcome: Outcome) -> None:
        for record in outcome.records:
            if isinstance(record, StepsUnrecorded):
                self.checks.unrecorded(record)
        if isinstance(outcome.reply, ProgressAccepted):
            new = range(outcome.reply.first_new_step, outcome.reply.last_step + 1)
            for row in ticket.rows:
                if row.step in new:
                    self.step_log.setdefault(JobId(row.job_id), {})[row.step] = row
                    self.checks.logged(self.step_log, row)
        for record in outcome.records:
            if isinstance(record, StepsRolledBack):
                log = self.step_log.get(record.job_id, {})
                for number in [n for n in log if n > record.to_step]:
                    del log[number]
                wanted = any(isinstance(r, JobRolledBack) for r in outcome.records)
                self.checks.rolled_back(self, record, wanted=wanted)

    def _release(self, batch: list[Ticket]) -> None:
        epoch = self._epoch
        partway = self.crash_at == "partway"
        for ticket in batch:
            outcome = ticket.outcome
            assert outcome is not None
            if partway and self.world.chance(0.5):
                break
            if ticket.released is not None:
                ticket.released(self.state, outcome.reply)
            for push in outcome.pushes:
                if partway and self.world.chance(0.3):
                    break
                self._deliver(push)
            if self._epoch != epoch:
                return
        if partway:
            self.die("killed half-way through its answers")

    def _deliver(self, push: Push) -> None:
        session = self.sessions.get(push.agent_id)
        if session is None:
            return
        if isinstance(push, PushGoAway):
            session.go_away(push.refusal, push.message)
        else:
            session.down(push)

    def _sleep(self) -> None:
        if not self.up:
            return
        deadline = next_deadline(self.state)
        now_ms = self._clock.now_ms()
        wait_ms = self._longest_wait_ms
        if deadline is not None:
            wait_ms = min(wait_ms, max(1, deadline - now_ms))
        wake_ms = self.world.now_ms + wait_ms
        if self._wake is not None and self._wake.call is not None:
            # Waking too early costs a little; too late would be wrong.
            if self.world.now_ms < self._wake_ms <= wake_ms:
                return
            self._wake.cancel()
        self._wake_ms = wake_ms
        self._wake = self.world.at(wake_ms, self._woken, self._epoch)

    def _woken(self, epoch: int) -> None:
        self._wake = None
        if epoch != self._epoch or not self.up:
            return
        if self.frozen or self._busy or self._queue:
            self._wake_ms = self.world.now_ms + 1
            self._wake = self.world.at(self._wake_ms, self._woken, epoch)
            return
        self.submit(Tick())

    # ------------------------------------------------------------------------- sessions

    def hello(self, session: Session, event: SessionOpened) -> None:
        """The first message of a session has come."""
        self.open_sessions[session.session_id] = session

        def opened(_: State, reply: Reply) -> None:
            if isinstance(reply, Refused):
                session.go_away(reply.refusal, reply.message)
                return
            before = self.sessions.get(event.agent_id)
            session.down(Welcome())
            self.sessions[event.agent_id] = session
            if before is not None:
                before.end()
            session.ready()

        self.submit(event, released=opened)

    def closed(self, session: Session) -> None:
        """The stream has ended, whoever ended it."""
        self.open_sessions.pop(session.session_id, None)
        if self.sessions.get(session.agent_id) is session:
            del self.sessions[session.agent_id]
        self.submit(SessionClosed(agent_id=session.agent_id, session_id=session.session_id))

    def take(self, session: Session, message: Any) -> None:
        """One message of an open session; `session.ready()` when the next may come."""
        match message:
            case Beat():
                event: Event = HeartbeatReceived(
                    agent_id=session.agent_id,
                    session_id=session.session_id,
                    step=message.step,
                    activity=message.activity,
                    tokens_per_s=0.0,
                    disk_free_bytes=0,
                    fetched_bytes=message.fetched_bytes,
                    all_stored=message.all_stored,
                )
                self.submit(event, released=lambda _, reply: self._beaten(session, message.mark, reply))
            case ProgressReport():
                self._progress(session, message.message)
            case _:
                self.submit(message, released=lambda _, reply: self._answered(session, message, reply))

    def _beaten(self, session: Session, mark: int, reply: Reply) -> None:
        session.down(BeatAck(mark=mark))
        self._answered(session, None, reply)

    def _answered(self, session: Session, event: Event | None, reply: Reply) -> None:
        if isinstance(reply, Refused):
            self.checks.refused(reply)
            if reply.refusal in {Refusal.BANNED, Refusal.UNKNOWN_AGENT}:
                session.go_away(reply.refusal, reply.message)
                return
        if isinstance(event, GoodbyeReceived):
            session.end()
            return
        session.ready()

    def _progress(self, session: Session, message: agent_pb2.Progress) -> None:
        event, rows, _ = progress(message, session.agent_id, self.world.now_ms)
        job_id = JobId(message.job_id)

        def acknowledge(state: State, reply: Reply) -> None:
            job = state.jobs.get(job_id)
            if job is not None:
                self.checks.acknowledged(job_id, job.committed_step)
                session.down(ProgressAck(job_id=job_id, step=job.committed_step))
            self._answered(session, event, reply)

        self.submit(event, released=acknowledge, rows=rows)
