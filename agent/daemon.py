"""The volunteer's daemon: one session, at most one job at a time, and a way out that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import structlog

from agent.blobs import BlobCache, BlobClient, ShardReports
from agent.confinement import clean_environment, confines, hide
from agent.enroll import renew, renewal_due, validity
from agent.home import Home, StatusServer
from agent.job import ElasticSeat, JobRun, SeatMaker, Tasks, WorkerSettings
from agent.lobby import Lobby
from agent.network import address_of, interface_of, reaching_address
from agent.peers import Lending, PeerServer
from agent.session import Session
from protos import agent_pb2, agent_pb2_grpc, authorship, seal, wire

log = structlog.get_logger(__name__)

TRAINER = (sys.executable, "-m", "trainer.train")
UPLOAD_PATIENCE_S = 60.0
UNASSIGN_PATIENCE_S = 3.0
JOBS_KEPT = 10
BLOBS_TOLD = 4_096

# Measured to let a worker survive a peer's death on CUDA: errors surface as exceptions in our own
# thread, and nothing aborts the process or waits for a dump.
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "NCCL_NVLS_ENABLE": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the volunteer chose."""

    advertise: str = ""  # address at which peers reach this machine
    interface: str = ""  # or the interface that has it
    gpus: tuple[int, ...] | None = None  # cards to lend; None lends all
    labels: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 20 * 2**30
    lending: Lending = field(default_factory=Lending)  # of the cache, to other agents
    drain_grace_s: float = 15.0  # how long a leaving agent waits for an absent coordinator
    worker_command: tuple[str, ...] = TRAINER
    confine: str = "auto"  # or "off", or "require"


def cards_of_environment(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The cards that CUDA_VISIBLE_DEVICES leaves; None if it is not set or names cards otherwise than by index."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(int(name) for name in names) if all(name.isdigit() for name in names) else None


def worker_environments(
    base: Mapping[str, str], gpus: Sequence[agent_pb2.Gpu], interface: str | None
) -> tuple[dict[str, str], ...]:
    """One environment for each worker: one per lent card, or a single one on CPU."""
    environment = {**clean_environment(base), **NCCL_ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
    if interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    if not gpus:
        return ({**environment, "CUDA_VISIBLE_DEVICES": ""},)
    # NVML numbers cards by bus, CUDA by speed unless told otherwise.
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return tuple({**environment, "CUDA_VISIBLE_DEVICES": str(gpu.index)} for gpu in gpus)


class Agent:
    """Runs until drained, told to leave, or refused."""

    def __init__(
        self, home: Home, identity: wire.Identity, settings: Settings, make_seat: SeatMaker | None = None
    ) -> None:
        self._home = home
        self._identity = identity
        self._settings = settings
        self._make_seat = make_seat or self._torch_seat
        self._incarnation = secrets.token_hex(8)
        self._probe = agent_pb2.Probe()
        self._welcome = agent_pb2.Welcome()
        self._session = Session(lambda: self._identity, self)
        self._channels = [wire.aio_channel(identity)]
        self._cache_changed = asyncio.Event()
        self._cached: set[str] = set()
        cache = BlobCache(home.blobs, self._note_cache_change)
        self._peers = PeerServer(cache, lambda: self._identity, settings.lending)
        self._blobs = BlobClient(self._stub, cache, identity=lambda: self._identity, accuse=self._accuse)
        self._reports = ShardReports(self._stub, self._blobs, self._shards_reported)
        self._job: JobRun | None = None
        self._switching = asyncio.Lock()
        self._tasks = Tasks()
        self._idle: agent_pb2.Idle | None = None
        self._draining = ""
        self._leaving = ""
        self._give_up: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._disk_free = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def _stub(self) -> agent_pb2_grpc.AgentServiceStub:
        return agent_pb2_grpc.AgentServiceStub(self._channels[-1])

    def _torch_seat(self, lobby: Lobby, job: JobRun) -> ElasticSeat:
        from agent.elastic import Seat

        return Seat(lobby, job, agent_id=self._identity.id, workers=self._probe.worker_count)

    # ------------------------------------------------------------------ the run

    async def run(self) -> None:
        """Raise RefusedByCoordinator or BadInput; return when the agent has left."""
        loop = asyncio.get_running_loop()
        self._probe = await self._look_around()
        self._disk_free = self._probe.disk_free_bytes
        status = StatusServer(self._home.status_socket, self._answer)
        await status.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        self._loop = loop
        await self._peers.start(self._workers.advertise_host)
        for chore in (self._renew_identity(), self._watch_disk(), self._tell_of_cache()):
            self._tasks.start(chore)
        session = asyncio.create_task(self._session.run())
        gone = asyncio.create_task(self._gone.wait())
        log.info(
            "agent.started",
            agent=self._identity.id,
            coordinator=self._identity.address,
            home=str(self._home.root),
        )
        try:
            await asyncio.wait((session, gone), return_when=asyncio.FIRST_COMPLETED)
            if session.done():
                session.result()  # raises what ended it
        finally:
            gone.cancel()
            await self._stop_job("the agent stops")
            await self._session.close(self._leaving or "the agent stops")
            session.cancel()
            await asyncio.gather(session, return_exceptions=True)
            await self._reports.stop()
            await self._tasks.stop()
            await self._peers.stop()
            await status.stop()
            for channel in self._channels:
                await channel.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            log.info("agent.stopped", agent=self._identity.id, reason=self._leaving)

    async def _look_around(self) -> agent_pb2.Probe:
        from agent.probe import probe

        settings = self._settings
        if settings.interface:
            host = settings.advertise or address_of(settings.interface)
        else:
            host = settings.advertise or await asyncio.to_thread(reaching_address, self._identity.address)
        gpus = cards_of_environment(os.environ) if settings.gpus is None else settings.gpus
        found = await asyncio.to_thread(
            probe, home=self._home.root, advertise_host=host, gpus=gpus, labels=settings.labels
        )
        interface = settings.interface or None
        if interface is None:
            interface = await asyncio.to_thread(interface_of, host)
        self._workers = WorkerSettings(
            command=settings.worker_command,
            environments=worker_environments(os.environ, found.gpus, interface),
            advertise_host=host,
            confined=confines(settings.confine),
        )
        if not self._workers.confined:
            log.warning("workers.not_confined", confine=settings.confine)
        return found

    async def _renew_identity(self) -> None:
        delay_s = 1.0
        while True:
            if not renewal_due(self._identity):
                begin, end = validity(self._identity)
                left_s = ((end - datetime.now(UTC)) - (end - begin) / 3).total_seconds()
                await asyncio.sleep(min(3600.0, max(0.1, left_s)))
                continue
            try:
                identity = await renew(
                    self._identity, lambda request: self._stub().RenewIdentity(request, timeout=15)
                )
                await asyncio.to_thread(identity.save, self._home.identity)
            except (grpc.aio.AioRpcError, OSError, ValueError) as error:
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                log.warning("identity.not_renewed", why=why, expires=validity(self._identity)[1].isoformat())
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 300.0)
                continue
            delay_s = 1.0
            # The open session goes on under the connection it has; new ones use the new certificate.
            self._identity = identity
            self._channels.append(wire.aio_channel(identity))
            if len(self._channels) > 2:
                await self._channels.pop(0).close()
            self._cache_changed.set()  # the new certificate may be good for serving where the old one was not
            log.info("identity.renewed", expires=validity(identity)[1].isoformat())

    async def _watch_disk(self) -> None:
        while True:
            await self.trim_cache()
            await asyncio.to_thread(self._forget_jobs)
            self._disk_free = (await asyncio.to_thread(shutil.disk_usage, self._home.root)).free
            await asyncio.sleep(15.0)

    async def trim_cache(self, room: int = 0) -> None:
        """Bring the cache within its bound, with so many bytes to spare, but for what the job needs and what is
        stored nowhere else yet."""
        in_use = self._reports.waiting | (self._job.blobs_in_use() if self._job is not None else set())
        limit = max(0, self._settings.cache_bytes - room)
        removed = await asyncio.to_thread(self._blobs.cache.trim, in_use, limit)
        if removed:
            log.info("cache.trimmed", bytes=removed)

    # ------------------------------------------------------------------ what other agents may fetch here

    def _note_cache_change(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody is told any more
                self._loop.call_soon_threadsafe(self._cache_changed.set)

    async def _tell_of_cache(self) -> None:
        while True:
            await self._cache_changed.wait()
            self._cache_changed.clear()
            held = await asyncio.to_thread(self._blobs.cache.listing, BLOBS_TOLD)
            self._say_cached(held, whole=False)

    def _say_cached(self, held: set[str], *, whole: bool) -> None:
        added = held if whole else held - self._cached
        removed = set() if whole else self._cached - held
        message = agent_pb2.Cached(
            whole=whole,
            added=[bytes.fromhex(digest) for digest in sorted(added)],
            removed=[bytes.fromhex(digest) for digest in sorted(removed)],
            peer_port=self._peers.port,
        )
        if self._session.send(agent_pb2.AgentMessage(cached=message)):
            self._cached = held

    def _accuse(self, agent_id: str, digest: str) -> None:
        self._session.send(
            agent_pb2.AgentMessage(peer_fault=agent_pb2.PeerFault(agent_id=agent_id, digest=digest))
        )

    def lend(self, allowed: bool) -> None:
        """The volunteer's word, from now on: other agents may fetch from this cache, or not."""
        self._peers.service.allowed = allowed
        log.info("cache.lent" if allowed else "cache.not_lent")
        self._cache_changed.set()

    def _forget_jobs(self) -> None:
        """Old jobs' logs and manifests; in a thread."""
        current = self._job.job_id if self._job is not None else ""
        folders = sorted((self._home.root / "jobs").iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in folders[:-JOBS_KEPT]:
            if folder.name != current:
                shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------ leaving

    def _signalled(self, number: signal.Signals) -> None:
        if self._leaving:
            log.info("agent.stops_now", signal=number.name)
            self._gone.set()
        else:
            self.drain(f"its owner stopped it ({signal.Signals(number).name})")

    def drain(self, reason: str) -> None:
        """Finish the step, leave the job, end the agent; again: nothing more."""
        if self._leaving:
            return
        self._leaving = reason
        log.info("agent.leaving", reason=reason)
        if self._job is None:
            self._gone.set()
        elif self._session.connected:
            self._ask_to_leave()
        else:
            self._patience(self._settings.drain_grace_s)

    def leave(self, reason: str) -> None:
        """Say goodbye and end the agent now; the step in flight is lost to this machine."""
        self._leaving = self._leaving or reason
        self._gone.set()

    def _ask_to_leave(self) -> None:
        self._session.send(agent_pb2.AgentMessage(leaving=agent_pb2.Leaving(reason=self._leaving[:256])))
        if self._job is not None:
            self._patience(self._job.longest_cut_s)

    def _patience(self, seconds: float) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
        self._give_up = asyncio.get_running_loop().call_later(seconds, self._gone.set)

    async def _depart(self) -> None:
        """The job let us go: hand up what is still in hand, then end."""
        await self._stop_job("leaving")
        try:
            async with asyncio.timeout(UPLOAD_PATIENCE_S):
                await self._reports.idle()
        except TimeoutError:
            log.warning("agent.shards_not_uploaded", reason="they stay in the cache")
        self._gone.set()

    # ------------------------------------------------------------------ the job

    async def _assign(self, assignment: agent_pb2.Assignment) -> None:
        async with self._switching:
            if self._job is not None and self._job.job_id == assignment.job_id:
                self._job.assigned_again(assignment)
                return
            await self._drop_job("another job was assigned")
            self._idle = None
            self._job = JobRun(
                assignment,
                agent_id=self._identity.id,
                home=self._home,
                settings=self._workers,
                blobs=self._blobs,
                reports=self._reports,
                send=self._session.send,
                connected=lambda: self._session.connected,
                make_seat=self._make_seat,
                rebuild_timeout_s=self._welcome.rebuild_timeout_ms / 1000,
                cache_bytes=self._settings.cache_bytes,
                make_room=self.trim_cache,
                objection=self._objection,
                authority=seal.fingerprint_of(self._identity.authority_pem.encode()),
            )
            log.info("job.assigned", job=assignment.job_id, name=assignment.name)
            self._job.start()

    def _objection(self, assignment: agent_pb2.Assignment) -> str:
        """Why this job must not be run; "" if an admin of our authority signed it and it names no path outside."""
        return authorship.problem(
            authority_pem=self._identity.authority_pem,
            certificate_pem=assignment.certificate_pem,
            signature=assignment.signature,
            spec_json=assignment.spec_json,
            dataset_json=assignment.dataset_json,
        ) or authorship.escape(json.loads(assignment.spec_json))

    async def _stop_job(self, reason: str) -> None:
        async with self._switching:
            await self._drop_job(reason)

    async def _drop_job(self, reason: str) -> None:
        if self._job is not None:
            job = self._job
            log.info("job.stopped", job=job.job_id, reason=reason)
            await job.stop(reason)
            self._job = None

    def _shards_reported(self, job_id: str) -> None:
        if self._job is not None and self._job.job_id == job_id:
            self._job.shards_reported()

    # ------------------------------------------------------------------ session delegate

    def hello(self) -> agent_pb2.Hello:
        job = self._job
        held = agent_pb2.Membership(job_id=job.job_id, generation=job.member_of) if job is not None else None
        return agent_pb2.Hello(
            protocol=wire.PROTOCOL,
            incarnation=self._incarnation,
            probe=self._probe,
            held=held,
            weighs_uploads=True,
        )

    def heartbeat(self) -> agent_pb2.Heartbeat:
        job = self._job
        haul = job.haul if job is not None else None
        return agent_pb2.Heartbeat(
            disk_free_bytes=self._disk_free,
            step=job.step if job is not None else 0,
            activity=job.activity if job is not None else "idle",
            tokens_per_s=job.tokens_per_s if job is not None else 0.0,
            transfer_bytes=min(haul.done, haul.total) if haul is not None else 0,
            transfer_total=haul.total if haul is not None else 0,
            all_stored=self._reports.all_stored,
        )

    def welcomed(self, welcome: agent_pb2.Welcome) -> None:
        self._welcome = welcome
        log.info("session.open", agent=welcome.agent_id)
        self._cached = set()
        self._say_cached(set(), whole=True)
        self._cache_changed.set()
        if self._job is not None:
            self._job.rebuild_timeout_s = welcome.rebuild_timeout_ms / 1000
            self._job.resync()
        if self._leaving:
            self._ask_to_leave()

    def disconnected(self) -> None:
        if self._leaving:
            self._patience(self._settings.drain_grace_s)

    def delivered(self, mark: int) -> None:
        if self._job is not None:
            self._job.delivered(mark)

    def received(self, message: agent_pb2.CoordinatorMessage) -> None:
        kind = message.WhichOneof("body")
        job = self._job
        match kind:
            case "plan":
                if job is not None and job.job_id == message.plan.job_id:
                    job.plan(message.plan)
                    if self._leaving and job.released:
                        self._patience(UNASSIGN_PATIENCE_S + job.longest_cut_s)
            case "progress_ack":
                if job is not None and job.job_id == message.progress_ack.job_id:
                    job.acknowledged(message.progress_ack.step)
            case "take_checkpoint":
                if job is not None and job.job_id == message.take_checkpoint.job_id:
                    job.take_checkpoint(message.take_checkpoint.generation)
            case "assignment":
                if not self._leaving:
                    self._tasks.start(self._assign(message.assignment))
            case "unassign":
                if job is not None and job.job_id == message.unassign.job_id:
                    self._unassigned(message.unassign.reason)
            case "idle":
                self._idle = message.idle
                if job is not None or self._leaving:
                    self._unassigned(message.idle.reason)
            case "revoked":
                self._peers.service.revoke(message.revoked.agent_id)
            case "drain":
                self._draining = message.drain.reason or "the operator asked for it"
            case _:
                log.warning("session.unknown_message", kind=kind)

    def _unassigned(self, reason: str) -> None:
        self._tasks.start(self._depart() if self._leaving else self._stop_job(reason))

    # ------------------------------------------------------------------ the owner's questions

    def _answer(self, command: str) -> dict[str, Any]:
        match command:
            case "status":
                return self.status()
            case "drain":
                self.drain("its owner drained it")
                return {"leaving": self._leaving}
            case "leave":
                self.leave("its owner said so")
                return {"leaving": self._leaving}
            case "lend" | "keep":
                self.lend(command == "lend")
                return {"lends_cache": command == "lend"}
            case _:
                return {
                    "error": f"command {command!r} is unknown; known are status, drain, leave, lend, keep"
                }

    def status(self) -> dict[str, Any]:
        return {
            "agent": self._identity.id,
            "coordinator": self._identity.address,
            "connected": self._session.connected,
            "problem": self._session.last_error,
            "leaving": self._leaving,
            "draining": self._draining,
            "advertise": self._probe.advertise_host,
            "workers": self._probe.worker_count,
            "gpus": [gpu.name for gpu in self._probe.gpus],
            "torch": self._probe.torch_version,
            "disk_free_bytes": self._disk_free,
            "lends_cache": self._peers.service.allowed,
            "peer_port": self._peers.port,
            "served_bytes": self._peers.service.served_bytes,
            "certificate_expires": validity(self._identity)[1].isoformat(),
            "job": self._job.status() if self._job is not None else None,
            "idle": None
            if self._idle is None
            else {"reason": self._idle.reason, "unmet": [*self._idle.unmet]},
        }


def run(home: Home, identity: wire.Identity, settings: Settings) -> None:
    """Run the agent on this thread, which must be the main one.  Raise AgentError."""
    hide()
    # The event loop carries plans and heartbeats: it must not wait 5 ms for a busy thread's turn to end.
    sys.setswitchinterval(0.0005)

    async def main() -> None:
        with home.locked():
            await Agent(home, identity, settings).run()

    asyncio.run(main())
