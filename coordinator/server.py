"""One running coordinator: everything put together, started and stopped in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from coordinator.access import GUESS_COSTS, EnrollAccess, MainAccess, host_of
from coordinator.admin_service import AdminService
from coordinator.agent_service import AgentService, EnrollService
from coordinator.blob_service import BlobService
from coordinator.blobs import BlobStore, DirectoryStore
from coordinator.caches import Caches
from coordinator.clock import Clock
from coordinator.config import Blobs, CoordinatorConfig
from coordinator.core.model import AgentId, CoordinatorStarted, Push, SealAsked, State, WrongBytesSent
from coordinator.identity import Authority, RevokedOperators
from coordinator.journal import Journal
from coordinator.logs import LogBook, LogFile
from coordinator.loop import Loop, Observer, restore
from coordinator.metrics import Metrics
from coordinator.mirror import Mirror
from coordinator.presign import CredentialsError
from coordinator.rates import Buckets
from coordinator.sessions import Sessions
from coordinator.sweep import Sweeper
from coordinator.translate import Wording, go_away
from coordinator.unreported import Unreported
from coordinator.usher import Usher
from protos import admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from protos.wire import SERVER_OPTIONS, split_address

log = structlog.get_logger("coordinator.server")

STOP_GRACE_S = 1.0
_IN_LINE_S = 240
"""No less than an agent's longest patience (agent/patience.py)."""
_ENROLLING_S = 60
"""How long a connection to the enrolment port may last: a stranger needs it for one call."""


class StartError(Exception):
    """The coordinator cannot start; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running coordinator really listens."""

    main: str
    enroll: str
    metrics: str

    def write(self, home: Path) -> None:
        """run/addresses.json, all at once: whoever waits for the file finds it whole."""
        path = home / "run" / "addresses.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"main": self.main, "enroll": self.enroll, "metrics": self.metrics}) + "\n"
        )
        os.replace(temporary, path)


def exit_at_once(message: str) -> None:
    """What is in memory may be ahead of the journal: no handler, no flush of state, just the end."""
    log.critical("exiting", why=message)
    os._exit(1)


class Coordinator:
    """`start`, then `stop`.  One for each home at a time."""

    def __init__(
        self, home: Path, config: CoordinatorConfig, *, die: Callable[[str], None] = exit_at_once
    ) -> None:
        """Open the home; raise StartError, IdentityError or JournalError."""
        self.home = home
        self.config = config
        self._authority = Authority.load(home)
        self._signer = self._authority.manifest_signer(home)
        self._run = home / "run"
        self._run.mkdir(mode=0o700, exist_ok=True)
        self._lock = _lock(self._run / "lock")
        (self._run / "addresses.json").unlink(missing_ok=True)  # of a process that was killed
        self._die = die
        blobs = config.blobs
        self.journal = Journal(home / "journal.db")
        try:
            self._store = _blob_store(home, blobs)
            self.logs = LogBook(LogFile(home / "logs.db", config.logs.lines_per_job))
            self._state = restore(self.journal, config.budget())
        except BaseException:
            self.journal.close()
            self._lock.close()
            raise
        self.sessions = Sessions()
        self.caches = Caches(self._authority.sign, self._tell_revoked)
        self._wording = Wording()
        self.metrics = Metrics(lambda: self._state, lambda: len(self.sessions), lambda: self.logs.dropped)
        self._mirror = Mirror(self._store)
        self._unreported = Unreported(
            most_bytes=blobs.unreported_per_agent,
            discarded_after_s=blobs.orphan_grace / 1000,
            metrics=self.metrics,
        )
        self._sweeper = Sweeper(self._store, blobs, self._mirror.foreign, self._unreported.swept)
        self._access = MainAccess(
            state=lambda: self._state,
            revoked=RevokedOperators(home),
            rates=Buckets(config.limits.calls_per_s, config.limits.calls_burst),
            most_calls=config.limits.open_calls,
            refused=self._count_refusal,
        )
        self._usher = Usher(config.limits.connections_per_address, self._ports)
        self.loop = self._make_loop(self._state)
        self._blob_service: BlobService | None = None
        self._main: grpc.aio.Server | None = None
        self._enroll: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self.addresses = Addresses(main="", enroll="", metrics="")

    def _make_loop(self, state: State) -> Loop:
        # A stopped process must not cost an agent its lease: no gap counts for more than two heartbeats.
        wait_ms = min(1_000, state.timing.heartbeat_ms)
        observers: list[Observer] = [
            self.metrics,
            self._sweeper,
            self._unreported,
            self._mirror,
            self.caches,
            self._access,
        ]
        return Loop(
            state=state,
            latest_step={
                job_id: rows[-1] for job_id in state.jobs if (rows := self.journal.latest_steps(job_id, 1))
            },
            journal=self.journal,
            clock=Clock(not_before_ms=self.journal.last_ms, largest_gap_ms=2 * wait_ms),
            observers=observers,
            deliver=self._deliver,
            die=self._die,
            snapshot_records=self.config.journal.snapshot_records,
            longest_wait_ms=wait_ms,
            seal=self._signer.seal,
        )

    def _deliver(self, message: Push) -> None:
        session = self.sessions.of(message.agent_id)
        if session is not None and (wire := self._wording.of(message, self._state)) is not None:
            session.send(wire)

    def _tell_revoked(self, agent_id: AgentId) -> None:
        revoked = agent_pb2.Revoked(agent_id=agent_id)
        self.sessions.send_all(agent_pb2.CoordinatorMessage(revoked=revoked))

    async def start(self) -> Addresses:
        """Listen on all ports; returns where.  Raise StartError if an address cannot be had."""
        self.loop.start()
        self.logs.start()
        await self.loop.submit(CoordinatorStarted(spread_ms=self._state.timing.lease_ms))
        await self.loop.submit(SealAsked())
        self._mirror.start(self.loop)
        self._sweeper.start(self.loop, self.journal)
        self._access.start()
        self._usher.start()
        key, chain = self._authority.server_credentials(self.home)
        self._main, main_port = self._main_server(key, chain)
        self._enroll, enroll_port = self._enroll_server(key, chain)
        listen = self.config.listen
        metrics_host, metrics_port = split_address(listen.metrics)
        try:
            metrics_port = self.metrics.serve(metrics_host, metrics_port)
        except OSError as error:
            raise StartError(f"listen.metrics: {listen.metrics} cannot be had ({error.strerror})") from error
        self.addresses = Addresses(
            main=_shown(listen.main, main_port),
            enroll=_shown(listen.enroll, enroll_port),
            metrics=_shown(listen.metrics, metrics_port),
        )
        await self._main.start()
        await self._enroll.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self.addresses.write(self.home)
        return self.addresses

    def _options(self) -> list[tuple[str, int | str]]:
        limits = self.config.limits
        return [
            *SERVER_OPTIONS,
            ("grpc.max_concurrent_streams", 256),
            ("grpc.server_handshake_timeout_ms", limits.handshake_timeout),
            ("grpc.max_allowed_incoming_connections", limits.connections),
            # Calls that are not begun yet wait in line.  By default gRPC drops them at random beyond a thousand,
            # and all after half a minute: a fleet that comes back shakes hands for nothing then.
            ("grpc.server.max_pending_requests", limits.connections),
            ("grpc.server.max_pending_requests_hard_limit", limits.connections),
            ("grpc.server_max_unrequested_time_in_server", _IN_LINE_S),
        ]

    def _main_server(self, key: bytes, chain: bytes) -> tuple[grpc.aio.Server, int]:
        config = self.config
        limits = config.limits
        server = grpc.aio.server(interceptors=[self._access], options=self._options())
        self._blob_service = blob_service = BlobService(
            self._store,
            transfers_per_peer=config.blobs.transfers_per_peer,
            chunk_timeout_s=config.blobs.chunk_timeout / 1000,
            slowest_bytes_per_s=config.blobs.slowest_upload,
            metrics=self.metrics,
            unreported=self._unreported,
            wrong_bytes=self._wrong_bytes_sent,
        )
        agents = AgentService(
            loop=self.loop,
            sessions=self.sessions,
            authority=self._authority,
            agent_ttl=dt.timedelta(milliseconds=config.certificates.agent_ttl),
            blobs=self._store,
            blob_service=blob_service,
            report_refused=self._sweeper.refused,
            caches=self.caches,
            logs=self.logs,
            limits=limits,
        )
        admin = AdminService(
            loop=self.loop,
            journal=self.journal,
            blobs=self._store,
            blob_service=blob_service,
            caches=self.caches,
            logs=self.logs,
            sweeper=self._sweeper,
            fingerprint=self._authority.fingerprint,
            authority_pem=self._authority.certificate_pem.decode(),
            enroll_port=lambda: split_address(self.addresses.enroll)[1],
        )
        agent_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        credentials = grpc.ssl_server_credentials(
            [(key, chain)], root_certificates=self._authority.certificate_pem, require_client_auth=True
        )
        return server, _bind(server, "listen.main", config.listen.main, credentials)

    def _enroll_server(self, key: bytes, chain: bytes) -> tuple[grpc.aio.Server, int]:
        config = self.config
        rates = Buckets(config.limits.enrolments_per_s, config.limits.enrolments_burst)
        server = grpc.aio.server(
            interceptors=[EnrollAccess(rates=rates, refused=self._count_refusal)],
            options=[
                *self._options(),
                ("grpc.max_connection_idle_ms", _ENROLLING_S * 1000 // 4),
                ("grpc.max_connection_age_ms", _ENROLLING_S * 1000),
                ("grpc.max_connection_age_grace_ms", 1_000),
            ],
        )

        def guessed(peer: str) -> None:
            rates.charge(host_of(peer), GUESS_COSTS - 1)

        service = EnrollService(
            loop=self.loop,
            authority=self._authority,
            agent_ttl=dt.timedelta(milliseconds=config.certificates.agent_ttl),
            main_port=lambda: split_address(self.addresses.main)[1],
            guessed=guessed,
        )
        agent_pb2_grpc.add_AgentServiceServicer_to_server(service, server)
        return server, _bind(
            server, "listen.enroll", config.listen.enroll, grpc.ssl_server_credentials([(key, chain)])
        )

    def _ports(self) -> frozenset[int]:
        return frozenset(split_address(one)[1] for one in (self.addresses.main, self.addresses.enroll) if one)

    def _count_refusal(self, reason: str) -> None:
        self.metrics.refusals.labels(reason).inc()

    def _wrong_bytes_sent(self, agent_id: AgentId, digest: str) -> None:
        log.warning("wrong bytes", agent=agent_id, digest=digest, action="refused and held against it")
        self.loop.post(WrongBytesSent(agent_id=agent_id, digest=digest))

    async def stop(self) -> None:
        """Say goodbye to everyone, decide what is queued, leave nothing open."""
        (self._run / "addresses.json").unlink(missing_ok=True)
        await self._health.enter_graceful_shutdown()
        # The loop stops first: that sessions end now says nothing about their agents.
        await self.loop.stop()
        self.sessions.send_all(
            go_away(
                None, "the coordinator is stopping; training goes on, reconnect when it is back", retry=True
            )
        )
        for server in (self._enroll, self._main):
            if server is not None:
                await server.stop(STOP_GRACE_S)
        await self._access.stop()
        await self._usher.stop()
        await self._sweeper.stop()
        await self._mirror.stop(self._state)
        if self._blob_service is not None:
            await self._blob_service.stop()
        await self.logs.stop()
        await asyncio.to_thread(self.metrics.stop)
        self.journal.close()
        self._lock.close()


def _blob_store(home: Path, settings: Blobs) -> BlobStore:
    """The store that the configuration names; raise StartError if it cannot be used."""
    found = settings.bucket()
    if found is None:
        return DirectoryStore(home / "blobs", max_bytes=settings.max_bytes, reserve_bytes=settings.reserve)
    try:
        from coordinator import blobs_s3
    except ImportError:
        raise StartError(
            f"blobs.store: {settings.store} needs obstore; run pip install 'muster-train[s3]'"
        ) from None
    try:
        return blobs_s3.open_store(settings, *found, home=home, environment=os.environ)
    except (blobs_s3.BucketError, CredentialsError) as error:
        raise StartError(str(error)) from None


def _lock(path: Path) -> TextIO:
    """Hold the home for this process; raise StartError if another has it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise StartError(
            f"home {path.parent.parent}: another musterd (process {holder}) serves it; stop that one first"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _bind(server: grpc.aio.Server, field: str, address: str, credentials: grpc.ServerCredentials) -> int:
    with contextlib.suppress(RuntimeError):
        port = server.add_secure_port(address, credentials)
        if port:
            return int(port)
    raise StartError(f"{field}: {address} cannot be had; is something else listening there?")


def _shown(configured: str, port: int) -> str:
    """An address as a local client can dial it."""
    host, _ = split_address(configured)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
