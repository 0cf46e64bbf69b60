"""Machines, and the agent's process on each: a model of agent/daemon.py, agent/session.py and agent/job.py.

Names follow those files, so that the model can be read beside them; the ledger is the real one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent import control
from agent.ledger import Ledger
from coordinator.core.model import (
    AgentFacts,
    AgentId,
    Cut,
    FailureKind,
    FinishedReceived,
    FormedReceived,
    Generation,
    GoodbyeReceived,
    JobId,
    LeaveAsked,
    PushAssignment,
    PushDrain,
    PushIdle,
    PushPlan,
    PushTakeCheckpoint,
    PushUnassign,
    Readiness,
    ReadyReceived,
    Refusal,
    Refused,
    ReleasedReceived,
    Reply,
    SessionId,
    SessionOpened,
    ShardReported,
    State,
    WorkerFailedReceived,
)
from protos import agent_pb2
from tests.sim.coordinator import Beat, BeatAck, GoAway, ProgressAck, ProgressReport, Welcome
from tests.sim.session import Session
from tests.sim.training import Worker
from tests.sim.world import Timer

if TYPE_CHECKING:
    from tests.sim.fleet import Fleet, Training

CONNECT_TIMEOUT_MS = 10_000
FIRST_DELAY_MS = 200
LONGEST_DELAY_MS = 5_000
PONG_TIMEOUT_MS = 30_000
PROGRESS_RETRY_MS = 500
REFUSALS_ENDURED = 4
STEADY_MS = 5_000
LONGEST_RESTART_MS = 60_000
REPORT_TIMEOUT_MS = 3_000
STORES_KEPT = 4
DRAIN_GRACE_MS = 15_000
UNASSIGN_PATIENCE_MS = 3_000
UPLOAD_PATIENCE_MS = 60_000
REACH_MS = 2_000
LONGEST_REACH_MS = 5_000
REACH_PATIENCE_MS = 30_000

LIE = "beef" * 8
_PASSING = frozenset({Refusal.RATE_LIMITED, Refusal.NO_SPACE, Refusal.UNKNOWN_BLOB})

_OF_A_GENERATION = frozenset({FailureKind.COLLECTIVE, FailureKind.RESTORE})


class Machine:
    """What outlives a process: a disk, a network card, and somebody who starts the agent again."""

    def __init__(self, fleet: Fleet, name: str, worker_count: int) -> None:
        self.fleet = fleet
        self.name = name
        self.worker_count = worker_count
        self.agent_id: AgentId | None = None  # the identity on its disk
        self.blobs: dict[str, None] = {}
        self.process: Process | None = None
        self.cut_up = 0
        self.cut_down = 0
        self.cut_data = 0
        self.slow_ms = 0
        self.prepare_fails = 0
        self.full = 0  # its disk, so many times over
        self.hangs = 0  # workers do not get warm, for so many reasons
        self.fetches = False  # while it hangs
        self.fetched_bytes = 0
        self.shunned = False  # nobody starts it again
        self.next_port = 0
        self.sessions: list[Session] = []  # also those that its agent gave up and the coordinator has not
        self._starting: Timer | None = None

    def latency_ms(self) -> int:
        fleet = self.fleet
        return fleet.world.between(*fleet.settings.latency_ms) + self.slow_ms

    def start(self, delay_ms: int = 0) -> None:
        """Somebody starts the agent, unless it runs."""
        if self._starting is not None:
            self._starting.cancel()
        self._starting = self.fleet.world.after(delay_ms, self._start)

    def _start(self) -> None:
        if (self.process is not None and self.process.alive) or self.shunned:
            return
        if self.agent_id is None:
            self.fleet.enroll(self)
            return
        self.process = Process(self.fleet, self, self.agent_id)
        self.process.connect()

    def cut(self, *, up: int, down: int, data: int) -> None:
        if not (up or down or data):
            return
        self.cut_up += up
        self.cut_down += down
        self.cut_data += data
        self.fleet.look_calm()
        if up or down:
            for session in self.sessions:
                session.link_changed()


class Process:
    """agent/daemon.py: one session, at most one job, and a way out."""

    def __init__(self, fleet: Fleet, machine: Machine, agent_id: AgentId) -> None:
        self.fleet = fleet
        self.world = fleet.world
        self.machine = machine
        self.agent_id = agent_id
        self.name = machine.name
        self.incarnation = fleet.next_incarnation()
        self.alive = True
        self.frozen = False
        self.lies_ready = False
        self.lies_formed = False
        self.lies_vouching = False  # of the state of a checkpoint, where it has no shard
        self.never_vouches = False  # as an agent of an older version
        self.session: Session | None = None
        self.connected = False
        self.job: JobRun | None = None
        self.leaving = ""
        self.restored: dict[tuple[str, int], str] = {}  # (job, step) -> state digest of what was fetched
        self.reports = ShardReports(self)
        self._sent = 0
        self._delay_ms = FIRST_DELAY_MS
        self._heard_ms = 0
        self._give_up: Timer | None = None
        self._connecting = False
        self._switching = False
        self._to_switch: list[tuple[JobId | None, int]] = []
        self._deferred: list[tuple[Any, tuple[Any, ...]]] = []

    # ------------------------------------------------------------------------- living

    def later(self, delay_ms: int, call: Any, *args: Any) -> Timer | None:
        if delay_ms == 0:
            self.due(call, args)
            return None
        return self.world.after(delay_ms, self.due, call, args)

    def timer(self, delay_ms: int, call: Any, *args: Any) -> Timer:
        return self.world.after(delay_ms, self.due, call, args)

    def due(self, call: Any, args: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._deferred.append((call, args))
            return
        call(*args)

    def freeze(self) -> None:
        if self.alive and not self.frozen:
            self.frozen = True
            if self.session is not None:
                self.session.agent_frozen()

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for call, args in deferred:
            self.due(call, args)

    def die(self, why: str, *, silent: bool = False) -> None:
        """The process and its workers are gone."""
        if not self.alive:
            return
        self.world.tell(f"{self.name} dies: {why}")
        self.alive = False
        if self.job is not None:
            for slot in self.job.slots.values():
                slot.worker.die()
        session, self.session = self.session, None
        if session is not None:
            session.agent_gone(silent=silent)

    def _exit(self, why: str) -> None:
        """It ends by itself."""
        if not self.alive:
            return
        if self.connected and self.session is not None:
            self.send(GoodbyeReceived(agent_id=self.agent_id, reason=why))
        self.die(why)
        self.fleet.exited(self.machine, why)

    # ------------------------------------------------------------------------- the session

    def connect(self) -> None:
        if self.session is not None or self._connecting:
            return
        self._connecting = True
        self._try(self.world.now_ms)

    def _try(self, since_ms: int) -> None:
        coordinator = self.fleet.coordinator
        if self.machine.cut_up or self.machine.cut_down or coordinator.frozen:
            if self.world.now_ms - since_ms >= CONNECT_TIMEOUT_MS:
                self._retry()
            else:
                self.timer(1_000, self._try, since_ms)
            return
        if not coordinator.up:
            self._retry()
            return
        self._connecting = False
        self.fleet.sessions += 1
        self.session = Session(self, coordinator, SessionId(f"session{self.fleet.sessions}"))
        open_still = [session for session in self.machine.sessions if session.coordinator_open]
        self.machine.sessions = [*open_still, self.session]
        self.session.hello(
            SessionOpened(
                agent_id=self.agent_id,
                session_id=self.session.session_id,
                incarnation=self.incarnation,
                facts=AgentFacts(hostname=self.name, worker_count=self.machine.worker_count),
                held_job=self.job.job_id if self.job is not None else None,
                held_generation=self.job.member_of if self.job is not None else 0,
                torchrun_job="",
            )
        )
        self.timer(CONNECT_TIMEOUT_MS, self._unwelcomed, self.session)

    def _unwelcomed(self, session: Session) -> None:
        if self.session is session and not self.connected:
            self._break(session)

    def _retry(self) -> None:
        self._connecting = False
        self.timer(self.world.jittered(self._delay_ms), self.connect)
        self._delay_ms = min(
            self._delay_ms * 2, max(1_000, min(LONGEST_DELAY_MS, self.fleet.timing.lease_ms // 4))
        )

    def _break(self, session: Session) -> None:
        session.agent_gone(silent=False)
        self.session_broke(session)

    def session_broke(self, session: Session) -> None:
        if self.session is not session:
            return
        self.session = None
        was, self.connected = self.connected, False
        if was:
            self._delay_ms = FIRST_DELAY_MS
            if self.leaving:
                self._patience(DRAIN_GRACE_MS)
        self._retry()

    def send(self, message: Any) -> int:
        """Queue for the open session; its mark, or 0 if none is open."""
        if not self.connected or self.session is None:
            return 0
        self._sent += 1
        self.session.up(message)
        return self._sent

    def _beat(self, session: Session) -> None:
        if self.session is not session:
            return
        if self.world.now_ms - self._heard_ms > self.fleet.timing.lease_ms:
            self._break(session)
            return
        job = self.job
        mark = self._sent
        session.up(
            Beat(
                step=job.step if job is not None else 0,
                activity="idle" if job is None else "busy",
                mark=mark,
                fetched_bytes=self.machine.fetched_bytes,
                all_stored=self.reports.all_stored,
            )
        )
        self.timer(self.fleet.timing.heartbeat_ms, self._beat, session)

    def received(self, session: Session, message: Any) -> None:
        if self.session is not session:
            return
        self._heard_ms = self.world.now_ms
        job = self.job
        match message:
            case BeatAck():
                if job is not None:
                    job.delivered(message.mark)
            case ProgressAck():
                if job is not None and job.job_id == message.job_id:
                    job.acknowledged(message.step)
            case PushPlan():
                if job is not None and job.job_id == message.job_id:
                    job.plan(message.generation, message.checkpoint_json, message.lineage)
                    if self.leaving and job.released:
                        self._patience(UNASSIGN_PATIENCE_MS + job.longest_cut_ms)
            case PushTakeCheckpoint():
                if job is not None and job.job_id == message.job_id:
                    job.take_checkpoint(message.generation)
            case PushAssignment():
                if not self.leaving:
                    self._switch(message.job_id, message.number)
            case PushUnassign():
                if job is not None and job.job_id == message.job_id:
                    self._unassigned()
            case PushIdle():
                if job is not None or self.leaving:
                    self._unassigned()
            case PushDrain():
                pass
            case Welcome():
                self._welcomed(session)
            case GoAway():
                self._sent_away(message)
            case _:
                raise AssertionError(f"{self.name} was sent {message}")

    def _welcomed(self, session: Session) -> None:
        self.connected = True
        self._delay_ms = FIRST_DELAY_MS
        self._sent = 0
        self._beat(session)
        if self.job is not None:
            self.job.resync()
        if self.leaving:
            self._ask_to_leave()

    def _sent_away(self, message: GoAway) -> None:
        self.connected = False
        if message.refusal is Refusal.DUPLICATE_IDENTITY or message.refusal is Refusal.BANNED:
            self.world.tell(f"{self.name} is sent away: {message.refusal.name}")
            self._exit(message.refusal.name)
            return
        raise AssertionError(f"{self.name} was refused: {message}")

    # ------------------------------------------------------------------------- leaving

    def drain(self, why: str) -> None:
        """Its owner wants it to end (SIGTERM)."""
        if self.leaving or not self.alive:
            return
        self.world.tell(f"{self.name} is leaving: {why}")
        self.leaving = why
        if self.job is None:
            self._exit(why)
        elif self.connected:
            self._ask_to_leave()
        else:
            self._patience(DRAIN_GRACE_MS)

    def _ask_to_leave(self) -> None:
        self.send(LeaveAsked(agent_id=self.agent_id, reason=self.leaving))
        if self.job is not None:
            self._patience(self.job.longest_cut_ms)

    def _patience(self, delay_ms: int) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
        self._give_up = self.timer(delay_ms, self._exit, "its patience ended")

    def _unassigned(self) -> None:
        if self.leaving:
            self._drop_job()
            self.reports.when_idle(UPLOAD_PATIENCE_MS, lambda: self._exit(self.leaving))
        else:
            self._switch(None)

    # ------------------------------------------------------------------------- the job

    def _switch(self, job_id: JobId | None, number: int = 0) -> None:
        """Assignments and the end of one are carried out one after another."""
        self._to_switch.append((job_id, number))
        if not self._switching:
            self._next_switch()

    def _next_switch(self) -> None:
        self._switching = False
        while self._to_switch:
            job_id, number = self._to_switch.pop(0)
            if job_id is not None and self.job is not None and self.job.job_id == job_id:
                self.job.assignment = number
                self.job.announce()
            elif self.job is not None:
                if job_id is not None:
                    self._to_switch.insert(0, (job_id, number))
                self._switching = True
                self.job.stopping = True
                self.timer(self.world.between(1, 200), self._stopped)
                return
            elif job_id is not None:
                self.job = JobRun(self, self.fleet.trainings[job_id], number)
                self.job.start()

    def _stopped(self) -> None:
        self._drop_job()
        self._next_switch()

    def _drop_job(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.stopping = True
            for slot in job.slots.values():
                slot.worker.die()


@dataclass(slots=True)
class Upload:
    report: ShardReported
    delay_ms: int = 200
    done: bool = False


class ShardReports:
    """agent/blobs.py: uploads the shards that workers hand up, for as long as it takes.  Not in the
    session, so that reports overtake what is said there; and a lost answer makes a report come twice."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._outstanding: dict[str, int] = {}
        self._waiting: list[Any] = []

    def outstanding(self, job_id: str) -> int:
        return self._outstanding.get(job_id, 0)

    @property
    def all_stored(self) -> bool:
        return not any(self._outstanding.values())

    def add(self, report: ShardReported) -> None:
        self._outstanding[report.job_id] = self.outstanding(report.job_id) + 1
        self._process.timer(self._process.world.between(10, 100), self._store, Upload(report))

    def when_idle(self, patience_ms: int, then: Any) -> None:
        self._process.timer(patience_ms, then)
        self._waiting.append(then)
        self._look()

    def _store(self, upload: Upload) -> None:
        if upload.done:
            return
        process, report = self._process, upload.report
        world, machine, coordinator = process.world, process.machine, process.fleet.coordinator
        if machine.cut_up or machine.cut_down or not coordinator.listens or coordinator.blobs_full:
            process.timer(world.jittered(upload.delay_ms), self._store, upload)
            upload.delay_ms = min(2 * upload.delay_ms, 30_000)
            return
        if report.digest:
            coordinator.blobs[report.digest] = world.now_ms
            coordinator.damaged.pop(report.digest, None)
        starts = coordinator.starts

        def arrived() -> None:
            stored = not report.digest or report.digest in coordinator.blobs
            if coordinator.up and coordinator.starts == starts and stored:
                coordinator.submit(report, released=answered)

        def answered(_: State, reply: Reply) -> None:
            if isinstance(reply, Refused):
                process.fleet.checks.refused(reply)
                if reply.refusal in _PASSING:
                    return  # it is sent again
            if not machine.cut_down:
                process.timer(machine.latency_ms(), self._done, upload)

        world.after(machine.latency_ms(), arrived)
        if world.chance(0.1):
            world.after(machine.latency_ms() + 20, arrived)
        process.timer(REPORT_TIMEOUT_MS, self._store, upload)

    def _done(self, upload: Upload) -> None:
        if upload.done:
            return
        upload.done = True
        job_id = upload.report.job_id
        self._outstanding[job_id] -= 1
        if self._outstanding[job_id] == 0:
            job = self._process.job
            if job is not None and job.job_id == job_id:
                job.shards_reported()
            self._look()

    def _look(self) -> None:
        if self.all_stored:
            waiting, self._waiting = self._waiting, []
            for then in waiting:
                self._process.later(0, then)


@dataclass(slots=True)
class Slot:
    worker: Worker
    planned: int = 0
    confirmed: int = 0
    excused: int = 0
    formed: control.Formed | None = None
    formed_ms: int = 0
    step: int | None = None
    digest: str = ""
    finished: int = 0
    reported: bool = False


@dataclass(slots=True)
class Evidence:
    event: WorkerFailedReceived
    mark: int = 0


class JobRun:
    """agent/job.py: serves one assignment."""

    def __init__(self, process: Process, training: Training, assignment: int) -> None:
        self.process = process
        self.world = process.world
        self.fleet = process.fleet
        self.training = training
        self.job_id = JobId(training.job_id)
        self.generation = 0
        self.member_of = 0
        self.rebuild_timeout_ms = self.fleet.timing.rebuild_timeout_ms
        self.ledger = Ledger()
        self.slots: dict[int, Slot] = {}
        self.stopping = False
        self.assignment = assignment
        self.readied = False  # has it ever said so?
        self._plan: Generation | None = None
        self._leads = False
        self._backlog = 0
        self._began = 0
        self._released = 0
        self._released_told = 0
        self._refusals = 0
        self._finished_told = 0
        self._evidence: list[Evidence] = []
        self._progress: tuple[agent_pb2.Progress, int] | None = None
        self._deadline: Timer | None = None
        self._crashes = 0
        self._restoring = 0  # number of the restore under way
        self._warm = False
        self._announcing = False
        self._announce_wanted = False
        self._unused: list[int] = []
        self._stores: list[int] = []  # current and previous

    # ------------------------------------------------------------------------- preparing

    def start(self) -> None:
        self._after(self.world.between(50, 500), self._prepare, 1_000)

    def _after(self, delay_ms: int, call: Any, *args: Any) -> Timer:
        def unless_stopping() -> None:
            if not self.stopping:
                call(*args)

        return self.process.timer(delay_ms, unless_stopping)

    def _prepare(self, delay_ms: int) -> None:
        machine = self.process.machine
        if machine.prepare_fails > 0 or machine.full or not self.process.connected:
            if machine.prepare_fails > 0 or machine.full:
                machine.prepare_fails = max(0, machine.prepare_fails - 1)
                self._report(FailureKind.PREPARE, "no space is left for the data")
            self._after(self.world.jittered(delay_ms), self._prepare, min(2 * delay_ms, LONGEST_RESTART_MS))
            return
        for slot in range(machine.worker_count):
            self._spawn(slot)

    def _spawn(self, slot: int) -> None:
        machine = self.process.machine
        if machine.hangs:
            machine.fetched_bytes += machine.fetches
            self._after(1_000, self._spawn, slot)
            return
        worker = Worker(self, slot)
        self.slots[slot] = Slot(worker=worker)
        worker.later(self.world.between(*self.fleet.settings.warm_ms), worker.become_warm)

    def _replace(self, slot: int) -> None:
        self._crashes += 1
        delay_ms = 1
        if self._crashes > 1:
            longest_ms = min(LONGEST_RESTART_MS, 500 * 2 ** min(self._crashes - 2, 10))
            delay_ms = self.world.jittered(longest_ms)
        if not self.stopping:
            self._after(delay_ms, self._spawn, slot)

    def ended(self, worker: Worker, kind: FailureKind, detail: str) -> None:
        """A worker's process has ended."""
        slot = self.slots.get(worker.slot)
        if slot is None or slot.worker is not worker or self.stopping:
            return
        del self.slots[worker.slot]
        self._warm = False
        if not slot.reported:
            if not worker.warm and kind is FailureKind.PROGRAM:
                kind = FailureKind.PREPARE
            self._report(kind, detail)
        if slot.formed is not None and self.world.now_ms - slot.formed_ms > STEADY_MS:
            self._crashes = 0
        for sibling in self.slots.values():
            if sibling.planned:
                self._down(sibling, control.Abort(generation=sibling.planned))
        self._replace(worker.slot)
        self._check_released()

    def kill(self, worker: Worker, kind: FailureKind, detail: str) -> None:
        """The worker's process is gone, whoever killed it; the agent hears of it."""
        if worker.alive:
            self.world.tell(f"{worker} ends: {kind.value}")
            worker.die()
            self.process.timer(1, self.ended, worker, kind, detail)

    def _down(self, slot: Slot, *messages: control.Down) -> None:
        for message in messages:
            slot.worker.later(0, slot.worker.heard, message)

    def heard(self, worker: Worker, message: control.Up) -> None:
        slot = self.slots.get(worker.slot)
        if slot is None or slot.worker is not worker or self.stopping:
            return
        match message:
            case control.Step():
                self._stepped(slot, message)
            case control.Evaluation():
                self.ledger.evaluated(agent_pb2.Evaluation(step=message.step, loss=message.loss))
                self._send_progress()
            case control.Warm():
                self._check_warm()
            case control.Formed():
                self._formed(slot, message)
            case control.Shard():
                self._shard(message)
            case control.Failed():
                self._failed(slot, message)
            case control.Released():
                slot.confirmed = max(slot.confirmed, message.generation)
                if message.generation >= max(slot.planned, self._released):
                    slot.planned = 0
                self._check_released()
            case control.Finished():
                slot.finished = message.generation
                slot.step = message.step
                self._check_finished()
            case _:
                raise AssertionError(f"a worker said {message}")

    def _check_warm(self) -> None:
        if len(self.slots) == self.process.machine.worker_count and all(
            s.worker.warm for s in self.slots.values()
        ):
            self._warm = True
            self.announce()  # next_rendezvous

    def _formed(self, slot: Slot, message: control.Formed) -> None:
        slot.confirmed = max(slot.confirmed, message.generation)
        slot.formed = message
        slot.formed_ms = self.world.now_ms
        slot.step, slot.digest = message.step, message.state_digest
        if slot.worker.slot == min(self.slots):
            self.ledger.rewind(message.step)
            self._backlog = message.step
        self._send_formed()
        self._send_progress_anew()

    def _send_formed(self) -> None:
        formed = [slot.formed for slot in self.slots.values() if slot.formed is not None]
        if len(formed) < self.process.machine.worker_count or any(
            f.generation != self.generation for f in formed
        ):
            return
        self._cancel_deadline()
        step, digest = formed[0].step, formed[0].state_digest
        if self.process.lies_formed:
            step, digest = step + 7, LIE
        self.process.send(
            FormedReceived(
                agent_id=self.process.agent_id,
                job_id=self.job_id,
                generation=self.generation,
                step=step,
                state_digest=digest,
            )
        )

    def _stepped(self, slot: Slot, message: control.Step) -> None:
        if message.generation < self._began:
            return
        slot.step, slot.digest = message.step, ""
        if slot.worker.slot != min(self.slots):
            return
        self.ledger.add(
            agent_pb2.StepRecord(
                step=message.step,
                loss=message.loss,
                slices=message.slices,
                data_digest=int(message.data_digest),
                tokens=message.tokens,
                lr=message.lr,
                grad_norm=message.grad_norm,
                skipped=message.skipped,
                generation=message.generation,
                duration_s=message.duration_s,
            )
        )
        self._send_progress()

    def _shard(self, message: control.Shard) -> None:
        vouches = not message.digest
        if vouches and self.process.never_vouches:
            return
        lies = vouches and self.process.lies_vouching
        self.process.reports.add(
            ShardReported(
                agent_id=self.process.agent_id,
                job_id=self.job_id,
                generation=message.generation,
                step=message.step,
                index=message.index,
                count=message.count,
                digest=message.digest,
                bytes=message.bytes,
                state_digest=LIE if lies else message.state_digest,
                header_json=json.dumps(message.header, sort_keys=True, separators=(",", ":")),
            )
        )

    def _failed(self, slot: Slot, message: control.Failed) -> None:
        kind = FailureKind(message.kind)
        self._report(
            kind,
            message.detail,
            generation=message.generation,
            step=message.step,
            unreachable=self._agents_of(message.unreachable, message.generation),
        )
        match kind:
            case FailureKind.COLLECTIVE:
                slot.excused = max(slot.excused, message.generation)
            case FailureKind.RESTORE:
                pass
            case _:
                slot.reported = True
                self.process.timer(1_000, self.kill, slot.worker, FailureKind.PROGRAM, message.detail)

    def worker_frozen(self, worker: Worker, *, answers: bool) -> None:
        """The watch will find it.  `answers`: its listener lives, but it computes for ever."""
        step_ms = self.training.spec.step_timeout_ms
        patience_ms = step_ms if answers else min(step_ms, PONG_TIMEOUT_MS)
        self._after(
            patience_ms + self.world.between(0, max(1, patience_ms // 4)),
            self._wedged,
            worker,
            self.world.now_ms,
        )

    def _wedged(self, worker: Worker, since_ms: int) -> None:
        if worker.alive and worker.frozen and worker.warm:
            self.kill(worker, FailureKind.WEDGED, f"answered nothing since {since_ms}")

    # ------------------------------------------------------------------------- plans

    def plan(self, plan: Generation, checkpoint_json: str, lineage: int) -> None:
        if plan.number <= self.generation or self.stopping:
            return
        self.generation, self._plan = plan.number, plan
        self._evidence = [e for e in self._evidence if e.event.kind not in _OF_A_GENERATION]
        self._cancel_deadline()
        self._restoring += 1
        rank = next((m.first_rank for m in plan.members if m.agent_id == self.process.agent_id), None)
        self.fleet.truth.told(self, plan, rank is not None)
        if rank is None:
            self._forget_what_was_given_up(plan, lineage, member=False)
            self._release(plan)
            return
        self.member_of = plan.number
        self._released = self._released_told = self._finished_told = 0
        self._leads = plan.members[0].agent_id == self.process.agent_id
        if plan.from_checkpoint_step is not None and self._leads:
            self._restore(plan, rank, checkpoint_json, self._restoring, 200)
        else:
            self._hand_out(plan, rank)
        if self._warm and self._leads:
            self._take_store(plan)
        self._forget_what_was_given_up(plan, lineage, member=True)
        self.ledger.acknowledge(plan.committed_step)
        self._send_progress_anew()

    def _forget_what_was_given_up(self, plan: Generation, lineage: int, *, member: bool) -> None:
        if lineage > self._began:
            self._began = lineage
            self._backlog = 0
            self.ledger.rewind(plan.committed_step)
            self.ledger.forget_evaluations(0)
        elif member and not any(m.holds_state for m in plan.members if m.agent_id == self.process.agent_id):
            self.ledger.rewind(max(plan.committed_step, self._backlog))
            self.ledger.forget_evaluations(self._backlog)

    def _take_store(self, plan: Generation) -> None:
        if plan.store_port in self._unused:
            self._unused.remove(plan.store_port)
            self._stores = [plan.store_port, *self._stores][:2]
        self.announce()

    def has_store(self, port: int) -> bool:
        return self.process.alive and (port in self._unused or port in self._stores)

    def _source(self, plan: Generation) -> tuple[str, int | None]:
        if plan.fresh:
            return "fresh", None
        if plan.from_checkpoint_step is not None:
            return "checkpoint", plan.from_checkpoint_step
        return "memory", None

    def _worker_plan(self, plan: Generation, rank: int, holders: list[int], *, release: bool) -> control.Plan:
        source, step = self._source(plan)
        return control.Plan(
            generation=plan.number,
            rank=rank,
            world_size=plan.world_size,
            group_rank=0,
            group_world_size=len(plan.members),
            store_host=plan.store_host,
            store_port=plan.store_port,
            cut="abort" if plan.cut is Cut.ABORT else "after_step",
            committed_step=plan.committed_step,
            committed_digest=plan.committed_digest,
            source="memory" if release else source,
            checkpoint_step=step,
            release=release,
            checkpoint_before_cut=plan.checkpoint_before_cut,
            timeout_s=0.8 * self.rebuild_timeout_ms / 1000,
            holders=holders,
        )

    def _hand_out(self, plan: Generation, rank: int) -> None:
        holders = self.fleet.holder_ranks(plan)
        for index, slot in sorted(self.slots.items()):
            self._cut(slot, plan, self._worker_plan(plan, rank + index, holders, release=False))
            slot.planned = plan.number
        self._set_deadline(plan)

    def _cut(self, slot: Slot, plan: Generation, message: control.Plan) -> None:
        if plan.cut is Cut.ABORT and slot.planned:
            self._down(slot, control.Abort(generation=slot.planned), message)
        else:
            self._down(slot, message)

    def _release(self, plan: Generation) -> None:
        self._released = plan.number
        if plan.members and plan.cut is Cut.ABORT:
            for slot in self.slots.values():
                slot.step, slot.digest = None, ""
        for slot in self.slots.values():
            if slot.planned:
                self._cut(slot, plan, self._worker_plan(plan, 0, [], release=True))
        self._set_deadline(plan)
        self._check_released()

    def _check_released(self) -> None:
        if self._released_told == self._released or any(slot.planned for slot in self.slots.values()):
            return
        self._cancel_deadline()
        if self._settled and self.process.send(
            ReleasedReceived(agent_id=self.process.agent_id, job_id=self.job_id, generation=self._released)
        ):
            self._released_told = self._released
            self.member_of = 0
            self._leads = False
            self.announce()

    def _restore(self, plan: Generation, rank: int, checkpoint_json: str, number: int, delay_ms: int) -> None:
        """The leader brings the checkpoint into its cache before its workers hear of the plan."""
        if number != self._restoring or self.stopping:
            return
        machine, coordinator = self.process.machine, self.fleet.coordinator
        manifest = json.loads(checkpoint_json)
        step = plan.from_checkpoint_step
        assert step == manifest["step"], "the manifest is of another step than the plan says"
        digests = [shard["digest"] for shard in manifest["shards"]]
        missing = [digest for digest in digests if digest not in machine.blobs]
        if missing:
            if machine.cut_up or machine.cut_down or not coordinator.listens:
                later_ms = min(2 * delay_ms, LONGEST_RESTART_MS)
                self._after(
                    self.world.jittered(delay_ms),
                    self._restore,
                    plan,
                    rank,
                    checkpoint_json,
                    number,
                    later_ms,
                )
                return
            lost = [d for d in missing if d in coordinator.damaged or d not in coordinator.blobs]
            if lost:
                self.fleet.checks.unrestorable(lost)
                self._report(FailureKind.RESTORE, f"shard {lost[0]} is damaged", step=step)
                return
            if machine.full:
                self._report(FailureKind.RESTORE, "no space is left", step=step)
                return
        self.process.restored[self.job_id, step] = manifest["state_digest"]
        machine.blobs.update(dict.fromkeys(digests))
        self._after(self.world.between(5, 200) if missing else 1, self._restored, plan, rank, number)

    def _restored(self, plan: Generation, rank: int, number: int) -> None:
        if number == self._restoring:
            self._hand_out(plan, rank)

    def _set_deadline(self, plan: Generation) -> None:
        allowed_ms = self.rebuild_timeout_ms + min(1_000, self.rebuild_timeout_ms // 10)
        if plan.cut is Cut.AFTER_STEP:
            allowed_ms += self.training.spec.step_timeout_ms
        self._deadline = self._after(allowed_ms, self._overdue, plan.number)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _overdue(self, generation: int) -> None:
        for slot in list(self.slots.values()):
            if slot.planned and slot.confirmed < generation and slot.excused < generation:
                self.kill(slot.worker, FailureKind.WEDGED, f"did not confirm generation {generation} in time")

    # ------------------------------------------------------------------------- telling the coordinator

    def _agents_of(self, ranks: list[int], generation: int) -> tuple[AgentId, ...]:
        if self._plan is None or self._plan.number != generation or not ranks:
            return ()
        missed = set(ranks)
        return tuple(
            m.agent_id
            for m in self._plan.members
            if missed.intersection(range(m.first_rank, m.first_rank + m.worker_count))
        )

    def _report(
        self,
        kind: FailureKind,
        detail: str,
        *,
        generation: int | None = None,
        step: int = 0,
        unreachable: tuple[AgentId, ...] = (),
    ) -> None:
        event = WorkerFailedReceived(
            agent_id=self.process.agent_id,
            job_id=self.job_id,
            generation=self.member_of if generation is None else generation,
            kind=kind,
            detail=detail,
            step=step,
            unreachable=unreachable,
        )
        self._evidence.append(Evidence(event=event, mark=self.process.send(event)))
        del self._evidence[:-100]

    def delivered(self, mark: int) -> None:
        if self._evidence:
            self._evidence = [e for e in self._evidence if not 0 < e.mark <= mark]
        if self._progress is not None and 0 < self._progress[1] <= mark:
            self._refused_progress()

    def acknowledged(self, step: int) -> None:
        self.ledger.acknowledge(step)
        if self._progress is not None:
            sent = self._progress[0]
            if sent.steps and sent.steps[-1].step > step:
                self._refused_progress()
            else:
                self.ledger.heard(sent)
                self._refusals = 0
                self._send_progress_anew()
        self._check_released()
        self._check_finished()

    def _refused_progress(self) -> None:
        refused = self._progress

        def again() -> None:
            if self._progress is refused:
                self._refusals += 1
                self._send_progress_anew()
                self._check_released()
                self._check_finished()

        self._after(PROGRESS_RETRY_MS, again)

    def _send_progress(self) -> None:
        if not self.reports_steps or self._progress is not None or not self.process.connected:
            return
        progress = self.ledger.batch(self.job_id, self.generation)
        if progress is not None:
            self._progress = (progress, self.process.send(ProgressReport(message=progress)))

    def _send_progress_anew(self) -> None:
        self._progress = None
        self._send_progress()

    @property
    def reports_steps(self) -> bool:
        return self._leads or 0 < self.ledger.first_step <= self._backlog

    @property
    def _settled(self) -> bool:
        return not self.reports_steps or not len(self.ledger) or self._refusals >= REFUSALS_ENDURED

    def _check_finished(self) -> None:
        whole = len(self.slots) == self.process.machine.worker_count
        if (
            self._finished_told
            or not whole
            or any(slot.finished != self.member_of or not slot.finished for slot in self.slots.values())
        ):
            return
        if self._settled and self.process.reports.outstanding(self.job_id) == 0:
            self._finished_told = self.process.send(
                FinishedReceived(
                    agent_id=self.process.agent_id,
                    job_id=self.job_id,
                    generation=self.member_of,
                    step=max(slot.step or 0 for slot in self.slots.values()),
                )
            )

    def shards_reported(self) -> None:
        self._check_finished()

    def resync(self) -> None:
        for evidence in self._evidence:
            evidence.mark = self.process.send(evidence.event)
        self._send_formed()
        self._send_progress_anew()
        self._released_told = self._finished_told = 0
        self._check_released()
        self._check_finished()
        self.announce()

    def take_checkpoint(self, generation: int) -> None:
        for slot in self.slots.values():
            self._down(slot, control.TakeCheckpoint(generation=generation))

    # ------------------------------------------------------------------------- readiness

    def announce(self) -> None:
        self._announce_wanted = True
        if not self._announcing:
            self._announcing = True
            self._after(1, self._open_store)

    def _open_store(self) -> None:
        self._announcing = self._announce_wanted = False
        if self._warm and self.process.connected:
            self._announcing = True
            self._after(self.world.between(1, 5), self._reach_peers, self.world.now_ms, 500)

    def _reach_peers(self, since_ms: int, delay_ms: int) -> None:
        plan = self._plan
        if (
            plan is not None
            and self._released
            and plan.members
            and not self.fleet.reaches(self.process.machine, plan.store_host)
            and self.world.now_ms - since_ms < REACH_PATIENCE_MS
        ):
            later_ms = min(2 * delay_ms, LONGEST_REACH_MS)
            self._after(REACH_MS + self.world.jittered(delay_ms), self._reach_peers, since_ms, later_ms)
        else:
            self._announce()

    def _announce(self) -> None:
        self._announcing = False
        machine = self.process.machine
        machine.next_port += 1
        self._unused = [*self._unused, machine.next_port][-STORES_KEPT:]
        if self._warm:
            holding = [slot for slot in self.slots.values() if slot.step is not None]
            best = max(holding, key=lambda slot: slot.step or 0, default=None)
            readiness = Readiness(
                job_id=self.job_id,
                store_host=self.process.name,
                store_port=machine.next_port,
                step=(best.step or 0) if best else 0,
                holds_state=best is not None,
                state_digest=best.digest if best else "",
                assignment=self.assignment,
                generation=best.formed.generation if best is not None and best.formed is not None else 0,
            )
            if self.process.lies_ready:
                readiness = replace(readiness, holds_state=True, step=readiness.step + 5, state_digest=LIE)
            self.readied = True
            self.process.send(ReadyReceived(agent_id=self.process.agent_id, readiness=readiness))
        if self._announce_wanted:
            self.announce()

    # ------------------------------------------------------------------------- what others see

    @property
    def released(self) -> bool:
        return bool(self._released)

    @property
    def longest_cut_ms(self) -> int:
        return self.training.spec.step_timeout_ms + 2 * self.rebuild_timeout_ms

    @property
    def step(self) -> int:
        return max((slot.step or 0 for slot in self.slots.values()), default=0)
