"""One job that this agent serves: its data, its workers, its place in the current generation.

Everything here runs on the event loop.  The short road of a plan is `plan` → `_hand_out` → control
socket, without a task switch; the elastic agent's thread hears of it through the lobby.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc.aio
import structlog

from agent import control
from agent.blobs import BlobClient, Checkpoint, Piece, ShardReports, dataset_pieces
from agent.confinement import Launch
from agent.errors import BlobError
from agent.home import Home, JobFiles, write_atomically
from agent.ledger import Ledger
from agent.lobby import Lobby
from agent.network import reachable
from agent.output import Output
from agent.workers import Cause, Exit, Worker
from protos import agent_pb2, wire

log = structlog.get_logger(__name__)

STOP_GRACE_S = 5.0
DEFAULT_STEP_TIMEOUT_S = 300.0  # the job file's own default
PONG_TIMEOUT_S = 30.0
FAREWELL_S = 1.0
PROGRESS_RETRY_S = 0.5
REFUSALS_ENDURED = 4
RESTORE_BYTES_PER_S = 5e6  # the slowest line on which a checkpoint is still waited for
STEADY_S = 5.0  # a worker that lived this long in a generation is not crash-looping
LONGEST_DELAY_S = 60.0
FETCHES_AT_ONCE = 4
CHECKPOINTS_KEPT = 2
REACH_S = 2.0  # a connection to a peer that takes longer counts as none
LONGEST_REACH_S = 5.0
REACH_PATIENCE_S = 30.0
MOST_WANTED = 8_192
MOST_UPLOAD_WEIGHT = 1_000

_CAUSES = {
    Cause.KILLED: agent_pb2.FAILURE_KIND_KILLED,
    Cause.PROGRAM: agent_pb2.FAILURE_KIND_PROGRAM,
    Cause.WEDGED: agent_pb2.FAILURE_KIND_WEDGED,
}
_KINDS = {
    "collective": agent_pb2.FAILURE_KIND_COLLECTIVE,
    "program": agent_pb2.FAILURE_KIND_PROGRAM,
    "diverged": agent_pb2.FAILURE_KIND_DIVERGED,
    "restore": agent_pb2.FAILURE_KIND_RESTORE,
}
# Means nothing once the generation is superseded; that a worker ended is true whatever was planned since.
_OF_A_GENERATION = frozenset({agent_pb2.FAILURE_KIND_COLLECTIVE, agent_pb2.FAILURE_KIND_RESTORE})
_DURATION = re.compile(r"^\s*([0-9.]+)\s*(ms|s|m|h|d)\s*$")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def step_timeout_s(spec: Mapping[str, Any]) -> float:
    """`elastic.step_timeout` of a job file that the coordinator has already checked."""
    value = spec.get("elastic", {}).get("step_timeout", DEFAULT_STEP_TIMEOUT_S)
    if isinstance(value, str) and (match := _DURATION.match(value)):
        return float(match[1]) * _UNITS[match[2]]
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How this machine runs workers."""

    command: tuple[str, ...]  # followed by --job FILE
    environments: tuple[Mapping[str, str], ...]  # the whole environment of each slot's worker
    advertise_host: str
    confined: bool = False


class ElasticSeat(Protocol):
    """The torch side of a job: `agent.elastic.Seat`, or a test's stand-in."""

    def fresh_port(self) -> int:
        """Open a store that no generation has used.  Called in a thread."""

    def run(self) -> None:
        """Until the lobby closes.  Called in a thread of its own."""


SeatMaker = Callable[[Lobby, "JobRun"], ElasticSeat]


@dataclass(slots=True)
class Slot:
    """What is known of the worker in one slot."""

    worker: Worker
    warm: bool = False
    planned: int = 0  # newest generation handed to it; 0 once it is released
    confirmed: int = 0  # newest generation that it formed, or that released it
    excused: int = 0  # generation in which it reported a failed collective: it waits for a plan
    formed: control.Formed | None = None
    formed_s: float = 0.0
    step: int | None = None  # of the training state it holds
    digest: str = ""  # of that state, while known
    finished: int = 0
    reported: bool = False  # its end has been told to the coordinator
    pinged_s: float | None = None
    pings: int = 0
    wants: tuple[str, ...] = ()  # shards of a dataset that does not fit the cache, in order of need


@dataclass(slots=True)
class Evidence:
    message: agent_pb2.AgentMessage
    mark: int = 0  # of the session that it was given to; 0: to none yet


@dataclass(slots=True)
class Speed:
    tokens_per_s: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_s = rate if not self.tokens_per_s else 0.9 * self.tokens_per_s + 0.1 * rate


@dataclass(slots=True)
class Tasks:
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def start(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", task=task.get_coro().__qualname__, exc_info=error)  # type: ignore[union-attr]

    async def stop(self) -> None:
        running = self.running - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@dataclass(slots=True, kw_only=True)
class Haul:
    """A dataset or checkpoint on its way into the cache."""

    what: str
    total: int
    done: int = 0
    sources: Counter[str] = field(default_factory=Counter)

    def moved(self, source: str, count: int) -> None:
        self.done += count
        if count > 0:
            self.sources[source] += count

    def status(self) -> dict[str, Any]:
        return {"what": self.what, "bytes": self.done, "of_bytes": self.total, "from": dict(self.sources)}


class JobRun:
    """Serves one assignment until `stop`.  Construct, `start`, then feed it what the coordinator says."""

    def __init__(
        self,
        assignment: agent_pb2.Assignment,
        *,
        agent_id: str,
        home: Home,
        settings: WorkerSettings,
        blobs: BlobClient,
        reports: ShardReports,
        send: Callable[[agent_pb2.AgentMessage], int],
        connected: Callable[[], bool],
        make_seat: SeatMaker,
        rebuild_timeout_s: float,
        cache_bytes: int,
        make_room: Callable[[int], Awaitable[None]],
        objection: Callable[[agent_pb2.Assignment], str],
        authority: str,
    ) -> None:
        """`make_room(n)` removes from the cache what nobody needs, so that n bytes more fit its bound.
        `objection` says why a job must not be run on this machine; "" if it may.  `authority` is the
        fingerprint of the one whose signature a checkpoint must bear."""
        self.job_id = assignment.job_id
        self.name = assignment.name
        self.generation = 0  # newest plan seen
        self.member_of = 0  # newest generation we were planned into
        self.rebuild_timeout_s = rebuild_timeout_s
        self.ledger = Ledger()
        self.lobby = Lobby()
        self.problem = ""
        self._assignment = assignment
        self._agent_id = agent_id
        self._authority = authority
        self._home = home
        self._settings = settings
        self._blobs = blobs
        self._reports = reports
        self._send = send
        self._connected = connected
        self._loop = asyncio.get_running_loop()
        self._make_seat = make_seat
        self._objection = objection
        self._files: JobFiles | None = None
        self._step_timeout_s = step_timeout_s(json.loads(assignment.spec_json or "{}"))
        self._slots: dict[int, Slot] = {}
        self._plan: agent_pb2.Plan | None = None
        self._member: agent_pb2.Member | None = None
        self._leads = False
        self._backlog = 0  # steps up to this one were made before the generation was formed
        self._began = 0  # newest generation that did not go on from memory
        self._released = 0  # generation whose plan released us, until the workers are out of the old one
        self._released_told = 0
        self._refusals = 0
        self._finished_told = 0
        self._evidence: list[Evidence] = []
        self._progress: tuple[agent_pb2.Progress, int] | None = None  # on its way, and its mark
        self._deadline: asyncio.TimerHandle | None = None
        self._output = Output(self.job_id, send)
        self._speed = Speed()
        self._crashes = 0
        self._stopping = False
        self._tasks = Tasks()
        self._restoring: asyncio.Task[None] | None = None
        self._seat: ElasticSeat | None = None
        self._thread: threading.Thread | None = None
        self._announce_wanted = asyncio.Event()
        self._checkpoints: dict[int, set[str]] = {}
        self._restored: set[str] = set()  # shards of the checkpoint that was restored here last, or is being
        self._dataset: dict[str, Piece] = {}
        self._cache_bytes = cache_bytes
        self._make_room = make_room
        self._windowed = False  # the dataset is larger than the cache: only what is read next is fetched
        self._wants_changed = asyncio.Event()
        self.haul: Haul | None = None

    # ------------------------------------------------------------------ preparing

    def start(self) -> None:
        self._tasks.start(self._prepare())

    async def _prepare(self) -> None:
        if objection := await asyncio.to_thread(self._objection, self._assignment):
            self.problem = f"job file: it is not run here: {objection}"
            log.error("job.refused", job=self.job_id, why=objection)
            self._report(agent_pb2.FAILURE_KIND_PREPARE, self.problem)
            return
        delay_s = 1.0
        while True:
            try:
                await self._fetch_data()
                break
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or "stalled"
                self.problem = f"data: {why}"
                if isinstance(error, grpc.aio.AioRpcError) and wire.refusal_of(error) is not None:
                    self._report(agent_pb2.FAILURE_KIND_PREPARE, self.problem)
            except (BlobError, OSError) as error:
                self.problem = str(error)
                self._report(agent_pb2.FAILURE_KIND_PREPARE, self.problem)
            log.warning("job.not_prepared", job=self.job_id, why=self.problem)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        self.problem = ""
        self._seat = await asyncio.to_thread(self._make_seat, self.lobby, self)
        self._thread = threading.Thread(target=self._run_seat, name=f"elastic-{self.job_id[:8]}", daemon=True)
        self._thread.start()
        self._tasks.start(self._announcements())
        self._tasks.start(self._watch())
        if self._windowed:
            log.info("job.data_window", job=self.job_id, bytes=self._window_bytes)
            self._tasks.start(self._fetch_ahead())
        for slot in range(len(self._settings.environments)):
            await self._spawn(slot)

    async def _fetch_data(self) -> None:
        self._files = await asyncio.to_thread(self._home.job, self.job_id)
        await asyncio.to_thread(write_atomically, self._files.spec, self._assignment.spec_json.encode())
        if not self._assignment.dataset_json:
            return
        pieces = dataset_pieces(self._assignment.dataset_json)
        self._dataset = {piece.digest: piece for piece in pieces}
        self._windowed = sum(piece.bytes for piece in pieces) > self._cache_bytes
        if not self._windowed:
            await self._fetch_all("dataset", pieces)
        manifest = self._files.data / "manifest.json"
        await asyncio.to_thread(write_atomically, manifest, self._assignment.dataset_json.encode())

    async def _fetch_all(self, what: str, pieces: tuple[Piece, ...], *, recheck: bool = False) -> None:
        free = asyncio.Semaphore(FETCHES_AT_ONCE)
        haul = self.haul = Haul(what=what, total=sum(piece.bytes for piece in pieces))

        async def fetch(piece: Piece) -> None:
            async with free:
                await self._blobs.fetch(piece, haul.moved, recheck=recheck)

        try:
            async with asyncio.TaskGroup() as group:
                for piece in pieces:
                    group.create_task(fetch(piece))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # what has come stays, and counts at the next attempt
        except asyncio.CancelledError:
            self.haul = None
            raise
        self.haul = None
        log.info("job.fetched", job=self.job_id, what=what, bytes=haul.total, sources=dict(haul.sources))

    async def _fetch_ahead(self) -> None:
        """Keep the next shards of a dataset that does not fit the cache coming, as the workers name them."""
        running: dict[str, asyncio.Task[None]] = {}

        async def make_room() -> None:
            await self._make_room(sum(self._dataset[digest].bytes for digest in running))

        fetched: set[str] = set()
        try:
            while True:
                self._wants_changed.clear()
                wanted = self._wanted()
                for digest in [digest for digest in running if digest not in wanted]:
                    running.pop(digest).cancel()
                fetched.intersection_update(wanted)
                missing = [digest for digest in wanted if digest not in fetched and digest not in running]
                for digest in missing[: FETCHES_AT_ONCE - len(running)]:
                    running[digest] = asyncio.create_task(self._fetch_shard(self._dataset[digest], make_room))
                change = asyncio.create_task(self._wants_changed.wait())
                try:
                    await asyncio.wait((change, *running.values()), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                for digest in [digest for digest, task in running.items() if task.done()]:
                    running.pop(digest).result()
                    fetched.add(digest)
        finally:
            for task in running.values():
                task.cancel()

    @property
    def _window_bytes(self) -> int:
        """How far ahead each worker may ask: together half of the cache, for the other half is for checkpoints."""
        return max(1, self._cache_bytes // 2 // len(self._settings.environments))

    def _wanted(self) -> dict[str, None]:
        """What the workers want, each one's next before any one's next but one."""
        rows = itertools.zip_longest(*(self._slots[slot].wants for slot in sorted(self._slots)))
        return {digest: None for row in rows for digest in row if digest in self._dataset}

    async def _fetch_shard(self, piece: Piece, make_room: Callable[[], Awaitable[None]]) -> None:
        """Until it is here: training waits for it."""
        delay_s = 0.2
        while True:
            try:
                await make_room()
                await self._blobs.fetch(piece)
            except (grpc.aio.AioRpcError, BlobError, OSError) as error:
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or "stalled"
                self.problem = f"data: {why}"
                log.warning("job.shard_waiting", job=self.job_id, digest=piece.digest, why=why)
            else:
                self.problem = ""
                return
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def _run_seat(self) -> None:
        assert self._seat is not None
        try:
            self._seat.run()
        except Exception as error:
            log.exception("elastic.failed", job=self.job_id)
            problem = f"elastic agent: {error}"
            self.call_soon(lambda: self._elastic_failed(problem))

    def _elastic_failed(self, problem: str) -> None:
        if not self._stopping:
            self.problem = problem
            self._report(agent_pb2.FAILURE_KIND_PREPARE, self.problem)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """From any thread; nothing happens once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    # ------------------------------------------------------------------ workers

    async def _spawn(self, slot: int) -> None:
        assert self._files is not None
        worker = Worker(slot, heard=self._heard, wrote=self._wrote, ended=self._ended)
        launch = Launch(files=self._files, blobs=self._home.blobs, confined=self._settings.confined)
        environment = {
            **launch.environment(self._settings.environments[slot]),
            "MUSTER_CACHE": str(self._files.cache),
            "MUSTER_DATA": str(self._files.data),
            "MUSTER_JOB_ID": self.job_id,
            "MUSTER_LOCAL_RANK": str(slot),
            "MUSTER_AUTHORITY": self._authority,
        }
        if self._windowed:
            environment["MUSTER_DATA_WINDOW"] = str(self._window_bytes)
        self._slots[slot] = Slot(worker=worker)
        try:
            await worker.start(
                launch.command((*self._settings.command, "--job", str(self._files.spec)), environment),
                environment,
                socket=self._home.run / f"w{slot}.sock",
                directory=self._files.root,
                log=self._files.log(slot),
            )
        except OSError as error:
            del self._slots[slot]
            self.problem = f"worker {slot} cannot be started: {error}"
            self._report(agent_pb2.FAILURE_KIND_PREPARE, self.problem)
            self._replace(slot)

    def _replace(self, slot: int) -> None:
        """Start another after a delay that grows while workers die young."""
        self._crashes += 1
        delay_s = 0.0
        if self._crashes > 1:
            delay_s = min(LONGEST_DELAY_S, 0.5 * 2 ** min(self._crashes - 2, 10)) * random.uniform(0.5, 1.0)

        async def later() -> None:
            await asyncio.sleep(delay_s)
            await self._spawn(slot)

        if not self._stopping:
            self._tasks.start(later())

    def _wrote(self, worker: Worker, line: str) -> None:
        self._output.write(f"[{worker.slot}] {line}" if len(self._settings.environments) > 1 else line)

    def _ended(self, worker: Worker, end: Exit) -> None:
        slot = self._slots.pop(worker.slot, None)
        self.lobby.workers(())
        log.info("worker.ended", job=self.job_id, slot=worker.slot, cause=end.cause.value, detail=end.detail)
        if slot is None or self._stopping or end.cause is Cause.STOPPED:
            return
        if not slot.reported:
            kind = _CAUSES[end.cause]
            if not slot.warm and end.cause is Cause.PROGRAM:
                kind = agent_pb2.FAILURE_KIND_PREPARE
            self._report(kind, end.detail)
        if slot.formed is not None and time.monotonic() - slot.formed_s > STEADY_S:
            self._crashes = 0
        for sibling in self._slots.values():
            if sibling.planned:
                sibling.worker.send(control.Abort(generation=sibling.planned))
        self._replace(worker.slot)
        self._check_released()

    def _heard(self, worker: Worker, message: control.Up) -> None:
        slot = self._slots.get(worker.slot)
        if slot is None or slot.worker is not worker:
            return
        match message:
            case control.Hello():
                pass
            case control.Warm():
                slot.warm = True
                self._check_warm()
            case control.Formed():
                self._formed(slot, message)
            case control.Step():
                self._stepped(slot, message)
            case control.Evaluation():
                self.ledger.evaluated(agent_pb2.Evaluation(step=message.step, loss=message.loss))
                self._send_progress()
            case control.Shard():
                self._shard(message)
            case control.Wants():
                slot.wants = tuple(message.digests[:MOST_WANTED])
                self._wants_changed.set()
            case control.Pong():
                self._ponged(slot, message)
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

    def _check_warm(self) -> None:
        if len(self._slots) == len(self._settings.environments) and all(
            slot.warm for slot in self._slots.values()
        ):
            self.lobby.workers(tuple(self._slots[i].worker.pid for i in sorted(self._slots)))

    def _formed(self, slot: Slot, message: control.Formed) -> None:
        slot.confirmed = max(slot.confirmed, message.generation)
        slot.formed = message
        slot.formed_s = time.monotonic()
        slot.step, slot.digest = message.step, message.state_digest
        if slot.worker.slot == min(self._slots):
            # What we did beyond this, with peers that have been given up, is not part of the job's history.
            self.ledger.rewind(message.step)
            self._backlog = message.step
        self._send_formed()
        self._send_progress_anew()

    def _send_formed(self) -> None:
        formed = [slot.formed for slot in self._slots.values() if slot.formed is not None]
        if len(formed) < len(self._settings.environments) or any(
            f.generation != self.generation for f in formed
        ):
            return
        self._cancel_deadline()
        self._tell(
            formed=agent_pb2.Formed(
                job_id=self.job_id,
                generation=self.generation,
                step=formed[0].step,
                state_digest=formed[0].state_digest,
                healed=any(f.healed for f in formed),
            )
        )

    def _stepped(self, slot: Slot, message: control.Step) -> None:
        if message.generation < self._began:
            return  # of a state that was given up meanwhile
        slot.step, slot.digest = message.step, ""
        if slot.worker.slot != min(self._slots):
            return
        world = sum(member.worker_count for member in self._plan.members) if self._plan is not None else 0
        self._speed.add(message.tokens * len(self._slots) / max(world, 1), message.duration_s)
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
        if message.digest:
            self._checkpoints.setdefault(message.step, set()).add(message.digest)
            self._blobs.cache.changed()
            self._forget_checkpoints()
        self._reports.add(
            agent_pb2.ReportShardRequest(
                job_id=self.job_id,
                generation=message.generation,
                step=message.step,
                index=message.index,
                count=message.count,
                digest=message.digest,
                bytes=message.bytes,
                state_digest=message.state_digest,
                header_json=json.dumps(message.header, sort_keys=True, separators=(",", ":")),
            )
        )

    def _forget_checkpoints(self) -> None:
        for step in sorted(self._checkpoints)[:-CHECKPOINTS_KEPT]:
            del self._checkpoints[step]

    def blobs_in_use(self) -> set[str]:
        """What the cache must not evict for this job."""
        data = self._wanted() if self._windowed else self._dataset
        return set(data).union(self._restored, *self._checkpoints.values())

    def _failed(self, slot: Slot, message: control.Failed) -> None:
        kind = _KINDS.get(message.kind, agent_pb2.FAILURE_KIND_PROGRAM)
        unreachable = self._agents_of(message.unreachable, message.generation)
        self._report(
            kind, message.detail, generation=message.generation, step=message.step, unreachable=unreachable
        )
        match message.kind:
            case "collective":
                slot.excused = max(slot.excused, message.generation)
            case "restore":
                pass  # its memory is as good as before; another plan will come
            case _:
                slot.reported = True
                # It is about to end by itself and may still be writing why.
                self._loop.call_later(FAREWELL_S, slot.worker.condemn, f"failed: {message.detail}")

    def _ponged(self, slot: Slot, message: control.Pong) -> None:
        if message.sequence == slot.pings:
            slot.pinged_s = None
        # Reducing means waiting for a peer: whoever is to blame, it is not this worker.
        if message.activity in {"computing", "saving"} and message.since_s > self._step_timeout_s:
            slot.worker.kill(
                f"{message.activity} for {message.since_s:.1f} s, longer than step_timeout {self._step_timeout_s:g} s"
            )

    async def _watch(self) -> None:
        """Ping workers; kill those that answer nothing or show no progress."""
        patience_s = min(self._step_timeout_s, PONG_TIMEOUT_S)
        while True:
            await asyncio.sleep(min(10.0, max(0.05, patience_s / 4)))
            self._output.flush()
            now_s = time.monotonic()
            for slot in list(self._slots.values()):
                if not slot.warm:
                    continue
                if slot.pinged_s is None:
                    slot.pinged_s = now_s
                    slot.pings += 1
                    slot.worker.send(control.Ping(sequence=slot.pings))
                elif now_s - slot.pinged_s > patience_s:
                    slot.worker.kill(f"answered no ping for {patience_s:g} s")

    # ------------------------------------------------------------------ plans

    def plan(self, plan: agent_pb2.Plan) -> None:
        """Hand a newer plan to the workers at once; an older or repeated one changes nothing."""
        if plan.generation <= self.generation:
            return
        self.generation = plan.generation
        self._plan = plan
        self._evidence = [e for e in self._evidence if e.message.failed.kind not in _OF_A_GENERATION]
        self._cancel_deadline()
        if self._restoring is not None:
            self._restoring.cancel()
            self.haul = None
        member = next((m for m in plan.members if m.agent_id == self._agent_id), None)
        if member is None:
            self._forget_what_was_given_up(plan, None)
            self._release(plan)
            return
        self._member = member
        self.member_of = plan.generation
        self._released = self._released_told = self._finished_told = 0
        self._leads = member.group_rank == 0
        checkpoint = None
        try:
            checkpoint = restored(plan, self._authority)
        except BlobError as error:
            self._report(agent_pb2.FAILURE_KIND_RESTORE, str(error), step=plan.committed_step)
        else:
            if checkpoint is not None and self._leads:
                self._restoring = self._tasks.start(self._restore(plan, member, checkpoint))
            else:
                self._hand_out(plan, member, checkpoint)
        if self.lobby.pids:  # otherwise it crossed our report of a worker's end, and another plan follows
            self.lobby.offer(plan)
        self._forget_what_was_given_up(plan, member)
        self.ledger.acknowledge(plan.committed_step)
        self._send_progress_anew()
        log.info(
            "job.plan", job=self.job_id, generation=plan.generation, rank=member.group_rank, why=plan.reason
        )

    def _forget_what_was_given_up(self, plan: agent_pb2.Plan, member: agent_pb2.Member | None) -> None:
        """Steps that no record is to be made of: whoever holds the state has done others in their place."""
        lineage = plan.generation if plan.from_checkpoint else plan.lineage
        if lineage > self._began:  # perhaps of a plan that never reached us
            self._began = lineage
            self._backlog = 0
            self.ledger.rewind(plan.committed_step)
            self.ledger.forget_evaluations(0)
        elif member is not None and not member.holds_state:
            # We were given up.  What we had agreed on before is everybody's; what we did then may be ours alone.
            self.ledger.rewind(max(plan.committed_step, self._backlog))
            self.ledger.forget_evaluations(self._backlog)

    def _hand_out(
        self, plan: agent_pb2.Plan, member: agent_pb2.Member, checkpoint: Checkpoint | None
    ) -> None:
        world_size = sum(m.worker_count for m in plan.members)
        source = "memory"
        if plan.from_checkpoint:
            source = "fresh" if checkpoint is None else "checkpoint"
        # The others wait while the leader fetches what it lacks.
        forming_s = self.rebuild_timeout_s + (checkpoint.bytes / RESTORE_BYTES_PER_S if checkpoint else 0.0)
        holders = [
            rank
            for m in plan.members
            if m.holds_state
            for rank in range(m.first_rank, m.first_rank + m.worker_count)
        ]
        weights = _upload_weights(plan.members)
        for index, slot in self._slots.items():
            message = control.Plan(
                generation=plan.generation,
                rank=member.first_rank + index,
                world_size=world_size,
                group_rank=member.group_rank,
                group_world_size=len(plan.members),
                store_host=plan.store_host,
                store_port=plan.store_port,
                cut="abort" if plan.cut == agent_pb2.CUT_ABORT else "after_step",
                committed_step=plan.committed_step,
                committed_digest=plan.committed_digest,
                source=source,
                checkpoint_step=checkpoint.step if checkpoint is not None else None,
                release=False,
                checkpoint_before_cut=plan.checkpoint_before_cut,
                # Less than our own deadline: a healthy worker that waits for a dead peer says so in time.
                timeout_s=0.8 * forming_s,
                holders=holders,
                upload_weights=weights,
            )
            self._cut(slot, plan, message)
            slot.planned = plan.generation
        self._set_deadline(plan, forming_s)

    def _cut(self, slot: Slot, plan: agent_pb2.Plan, message: control.Plan) -> None:
        if plan.cut == agent_pb2.CUT_ABORT and slot.planned:
            slot.worker.send(control.Abort(generation=slot.planned), message)
        else:
            slot.worker.send(message)

    def _release(self, plan: agent_pb2.Plan) -> None:
        self._released = plan.generation
        if plan.members and plan.cut == agent_pb2.CUT_ABORT:
            # We were given up: what the others do from here on is the job's history, whatever we hold.
            for slot in self._slots.values():
                slot.step, slot.digest = None, ""
        for slot in self._slots.values():
            if not slot.planned:
                continue
            message = control.Plan(
                generation=plan.generation,
                rank=0,
                world_size=0,
                group_rank=0,
                group_world_size=len(plan.members),
                store_host=plan.store_host,
                store_port=plan.store_port,
                cut="abort" if plan.cut == agent_pb2.CUT_ABORT else "after_step",
                committed_step=plan.committed_step,
                committed_digest=plan.committed_digest,
                source="memory",
                checkpoint_step=None,
                release=True,
                checkpoint_before_cut=plan.checkpoint_before_cut,
                timeout_s=0.8 * self.rebuild_timeout_s,
            )
            self._cut(slot, plan, message)
        self._set_deadline(plan, self.rebuild_timeout_s)
        self._check_released()
        log.info("job.released", job=self.job_id, generation=plan.generation, why=plan.reason)

    def _check_released(self) -> None:
        if self._released_told == self._released or any(slot.planned for slot in self._slots.values()):
            return
        self._cancel_deadline()
        if self._settled and self._tell(
            released=agent_pb2.Released(job_id=self.job_id, generation=self._released)
        ):
            self._released_told = self._released
            self.member_of = 0
            self._leads = False
            self.announce()

    async def _restore(self, plan: agent_pb2.Plan, member: agent_pb2.Member, checkpoint: Checkpoint) -> None:
        """The leader brings the checkpoint into its cache before its workers hear of the plan."""
        assert self._files is not None
        delay_s, step, first_try = 0.2, checkpoint.step, True
        self._restored = {piece.digest for piece in checkpoint.pieces}
        while True:
            try:
                await self._fetch_all(f"checkpoint {step}", checkpoint.pieces, recheck=first_try)
                await asyncio.to_thread(
                    write_atomically, self._files.manifest(step), plan.checkpoint_json.encode()
                )
                break
            except (BlobError, OSError) as error:
                if not isinstance(error, TimeoutError):
                    self._not_restored(step, str(error))
                    return
            except grpc.aio.AioRpcError as error:
                if wire.refusal_of(error) == agent_pb2.REFUSAL_UNKNOWN_BLOB:
                    self._not_restored(step, f"checkpoint of step {step}: {error.details()}")
                    return
                log.warning("restore.waiting", job=self.job_id, step=step, why=error.details())
            first_try = False
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        self._hand_out(plan, member, checkpoint)

    def _not_restored(self, step: int, detail: str) -> None:
        self.haul = None
        self._report(agent_pb2.FAILURE_KIND_RESTORE, detail, step=step)

    def _set_deadline(self, plan: agent_pb2.Plan, forming_s: float) -> None:
        """The coordinator's own deadline comes first, and its next plan sets ours anew: what is left to us
        is a worker that hangs while nobody else decides."""
        allowed_s = forming_s + min(1.0, 0.1 * forming_s)
        if plan.cut == agent_pb2.CUT_AFTER_STEP:
            allowed_s += self._step_timeout_s
        self._deadline = asyncio.get_running_loop().call_later(
            allowed_s, self._overdue, plan.generation, allowed_s
        )

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _overdue(self, generation: int, allowed_s: float) -> None:
        for slot in list(self._slots.values()):
            if slot.planned and slot.confirmed < generation and slot.excused < generation:
                slot.worker.kill(f"did not confirm generation {generation} within {allowed_s:g} s")

    # ------------------------------------------------------------------ telling the coordinator

    def _tell(self, **body: Any) -> int:
        return self._send(agent_pb2.AgentMessage(**body))

    def _agents_of(self, ranks: list[int], generation: int) -> list[str]:
        """The members of the newest plan that have these ranks."""
        if self._plan is None or self._plan.generation != generation or not ranks:
            return []
        missed = set(ranks)
        return [
            member.agent_id
            for member in self._plan.members
            if missed.intersection(range(member.first_rank, member.first_rank + member.worker_count))
        ]

    def _report(
        self,
        kind: int,
        detail: str,
        *,
        generation: int | None = None,
        step: int = 0,
        unreachable: Sequence[str] = (),
    ) -> None:
        message = agent_pb2.AgentMessage(
            failed=agent_pb2.WorkerFailed(
                job_id=self.job_id,
                generation=self.member_of if generation is None else generation,
                kind=kind,  # type: ignore[arg-type]
                detail=detail[:4096],
                step=step,
                unreachable=unreachable,
            )
        )
        self._evidence.append(Evidence(message=message, mark=self._send(message)))
        del self._evidence[:-100]

    def delivered(self, mark: int) -> None:
        """What was sent with a mark up to this one has arrived."""
        self._evidence = [e for e in self._evidence if not 0 < e.mark <= mark]
        if self._progress is not None and 0 < self._progress[1] <= mark:
            self._refused_progress()  # heard, and not acknowledged

    def acknowledged(self, step: int) -> None:
        """The coordinator has all steps up to `step`."""
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
        """Mostly a step that came before a peer's earlier one: try again shortly."""
        refused = self._progress

        def again() -> None:
            if self._progress is refused:
                self._refusals += 1
                self._send_progress_anew()
                self._check_released()
                self._check_finished()

        self._loop.call_later(PROGRESS_RETRY_S, again)

    def _send_progress(self) -> None:
        """One message at a time, so that fast steps travel in batches as large as the answer takes long."""
        if not self._reports_steps or self._progress is not None or not self._connected():
            return
        progress = self.ledger.batch(self.job_id, self.generation)
        if progress is not None:
            self._progress = (progress, self._tell(progress=progress))

    def _send_progress_anew(self) -> None:
        """Whoever heard the last message may not have kept it."""
        self._progress = None
        self._send_progress()

    @property
    def _reports_steps(self) -> bool:
        """The leader reports.  But it may have joined only now: then who knows steps from before says so."""
        return self._leads or 0 < self.ledger.first_step <= self._backlog

    @property
    def _settled(self) -> bool:
        """Whether the steps that only we may report are recorded: an agent that has finished or is released
        is not heard any more.  Steps that are refused again and again do not hold us up for ever."""
        return not self._reports_steps or not len(self.ledger) or self._refusals >= REFUSALS_ENDURED

    def _check_finished(self) -> None:
        whole = len(self._slots) == len(self._settings.environments)
        slots = self._slots.values()
        if (
            self._finished_told
            or not whole
            or any(slot.finished != self.member_of or not slot.finished for slot in slots)
        ):
            return
        if self._settled and self._reports.outstanding(self.job_id) == 0:
            step = max(slot.step or 0 for slot in slots)
            self._finished_told = self._tell(
                finished=agent_pb2.Finished(job_id=self.job_id, generation=self.member_of, step=step)
            )

    def shards_reported(self) -> None:
        """No shard of this job waits any more."""
        self._check_finished()

    def resync(self) -> None:
        """A new session: say again what is still true."""
        for evidence in self._evidence:
            evidence.mark = self._send(evidence.message)
        self._send_formed()
        self._send_progress_anew()
        self._released_told = self._finished_told = 0
        self._check_released()
        self._check_finished()
        self.announce()

    def assigned_again(self, assignment: agent_pb2.Assignment) -> None:
        """The coordinator wants to hear that we are ready, or has assigned us anew without our noticing."""
        self._assignment = assignment
        self.announce()

    def take_checkpoint(self, generation: int) -> None:
        for slot in self._slots.values():
            slot.worker.send(control.TakeCheckpoint(generation=generation))

    # ------------------------------------------------------------------ readiness

    def announce(self) -> None:
        """Open a fresh store and send Ready, if all workers are warm.  Each Ready names another store, so
        that one which crosses a plan on its way cannot make anybody use a store twice."""
        self._announce_wanted.set()

    async def _announcements(self) -> None:
        assert self._seat is not None
        while True:
            await self._announce_wanted.wait()
            self._announce_wanted.clear()
            if not self.lobby.pids or not self._connected():
                continue
            port = await asyncio.to_thread(self._seat.fresh_port)
            await self._reach_peers()
            if not self.lobby.pids:
                continue
            holding = [slot for slot in self._slots.values() if slot.step is not None]
            best = max(holding, key=lambda slot: slot.step or 0, default=None)
            self._tell(
                ready=agent_pb2.Ready(
                    job_id=self.job_id,
                    store_host=self._settings.advertise_host,
                    store_port=port,
                    step=(best.step or 0) if best else 0,
                    holds_state=best is not None,
                    state_digest=best.digest if best else "",
                    assignment=self._assignment.number,
                    generation=best.formed.generation if best is not None and best.formed is not None else 0,
                )
            )

    async def _reach_peers(self) -> None:
        """Let out of a generation: its leader's store has to be within reach before we ask to come in again.
        Otherwise every try would cost the others a pause, to find that they cannot reach us.  Not for ever:
        that leader may be gone, and the others may wait for us."""
        delay_s, until_s = 0.5, time.monotonic() + REACH_PATIENCE_S
        while (plan := self._plan) is not None and self._released and plan.members:
            if await reachable(plan.store_host, plan.store_port, REACH_S) or time.monotonic() > until_s:
                break
            self.problem = f"no connection to {plan.store_host}, where generation {plan.generation} is led"
            log.warning("job.unreachable", job=self.job_id, host=plan.store_host, port=plan.store_port)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_REACH_S)
        else:
            return
        self.problem = ""

    # ------------------------------------------------------------------ what others see

    @property
    def released(self) -> bool:
        """Whether the newest plan goes on without us."""
        return bool(self._released)

    @property
    def longest_cut_s(self) -> float:
        """How long leaving at a step boundary may take."""
        return self._step_timeout_s + 2 * self.rebuild_timeout_s

    @property
    def step(self) -> int:
        return max((slot.step or 0 for slot in self._slots.values()), default=0)

    @property
    def tokens_per_s(self) -> float:
        return self._speed.tokens_per_s if self.activity == "computing" else 0.0

    @property
    def activity(self) -> str:
        if self.haul is not None:
            return "fetching"
        if not self.lobby.pids:
            return "preparing"
        if not self.member_of:
            return "standby"
        if any(slot.confirmed < self.member_of for slot in self._slots.values()):
            return "forming"
        return "finished" if all(slot.finished for slot in self._slots.values()) else "computing"

    def status(self) -> dict[str, Any]:
        return {
            "job": self.job_id,
            "name": self.name,
            "generation": self.generation,
            "member": bool(self.member_of),
            "group_rank": self._member.group_rank if self._member is not None and self.member_of else None,
            "activity": self.activity,
            "step": self.step,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "unacknowledged_steps": len(self.ledger),
            "fetching": self.haul.status() if self.haul is not None else None,
            "shards_waiting": self._reports.outstanding(self.job_id),
            "problem": self.problem,
            "workers": [
                {"slot": i, "pid": slot.worker.pid, "warm": slot.warm, "step": slot.step}
                for i, slot in sorted(self._slots.items())
            ],
        }

    async def stop(self, reason: str, grace_s: float = STOP_GRACE_S) -> None:
        """Stop the workers (SIGKILL after `grace_s`) and end the elastic thread."""
        self._stopping = True
        self._cancel_deadline()
        self.lobby.close(reason)
        await self._tasks.stop()
        for slot in self._slots.values():
            if slot.planned and not slot.finished:
                slot.worker.send(control.Abort(generation=slot.planned))
        await asyncio.gather(*(slot.worker.stop(grace_s) for slot in list(self._slots.values())))
        self._output.flush()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 5.0)


def _upload_weights(members: Iterable[agent_pb2.Member]) -> list[int]:
    """Of each rank, by the members' weights; empty if the coordinator gave none.  The same on every agent."""
    weights: list[int] = []
    for member in members:
        if not 1 <= member.upload_weight <= MOST_UPLOAD_WEIGHT:
            return []
        each = max(1, member.upload_weight // max(1, member.worker_count))
        weights += [each] * member.worker_count
    return weights


def restored(plan: agent_pb2.Plan, authority: str) -> Checkpoint | None:
    """The checkpoint that the plan's leader restores, if any.  Raise BlobError if it is not one of this job
    that the authority vouches for."""
    if not plan.from_checkpoint or not plan.checkpoint_json:
        return None
    return Checkpoint.parse(plan.checkpoint_json, job_id=plan.job_id, authority=authority)
