"""What agents may ask: enrolment, renewal, the session, shards.  An agent speaks only about itself."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import grpc.aio
import structlog

from coordinator import names, translate
from coordinator.access import CallRefusedError, caller, calling_agent
from coordinator.blob_service import BlobService
from coordinator.blobs import BlobStore
from coordinator.caches import Caches
from coordinator.config import Limits
from coordinator.core.decide import decide
from coordinator.core.model import (
    AgentId,
    EnrollAsked,
    IdentityRenewed,
    JobId,
    Refusal,
    Refused,
    Reply,
    SessionClosed,
    SessionId,
    ShardAccepted,
    ShardReported,
    State,
)
from coordinator.identity import Authority, Role, requested_key
from coordinator.logs import LogBook
from coordinator.loop import Loop, LoopStoppedError
from coordinator.rates import Bucket
from coordinator.sessions import Acks, OpenSession, Sessions
from protos import agent_pb2, agent_pb2_grpc
from protos.wire import PROTOCOL

log = structlog.get_logger("coordinator.agents")


class SessionEndedError(Exception):
    """The coordinator ends a session; the agent is told why."""

    def __init__(self, refusal: Refusal, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.retry = retry


def _check_protocol(protocol: int, field: str) -> None:
    if protocol != PROTOCOL:
        raise CallRefusedError(
            Refusal.PROTOCOL_VERSION,
            f"{field}: this coordinator speaks protocol version {int(PROTOCOL)}, the agent {protocol}; "
            "upgrade the older of the two",
        )


class EnrollService(agent_pb2_grpc.AgentServiceServicer):
    """The enrolment port's one call."""

    def __init__(
        self,
        *,
        loop: Loop,
        authority: Authority,
        agent_ttl: dt.timedelta,
        main_port: Callable[[], int],
        guessed: Callable[[str], None],
    ) -> None:
        """`guessed` is told of a peer whose token was refused."""
        self._loop = loop
        self._authority = authority
        self._agent_ttl = agent_ttl
        self._main_port = main_port
        self._guessed = guessed

    async def Enroll(  # noqa: N802
        self, request: agent_pb2.EnrollRequest, context: grpc.aio.ServicerContext
    ) -> agent_pb2.EnrollReply:
        _check_protocol(request.protocol, "protocol")
        try:
            token_id, secret = translate.token_parts(request)
        except translate.MalformedError as error:
            raise CallRefusedError(Refusal.TOKEN_MALFORMED, str(error)) from None
        name = translate.name(request.name, "name")
        agent_id = AgentId(names.new_id("a", self._loop.state.agents))
        asked = EnrollAsked(
            token_id=token_id,
            secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
            agent_id=agent_id,
            name=name,
            certificate_serial="",
        )
        # Who has no token gets no certificate made: guessing must cost us less than the guesser.
        self._check(await self._loop.query(lambda state, now: decide(state, now, asked).reply), context)
        key = await asyncio.to_thread(requested_key, request.csr_pem)
        issued = await asyncio.to_thread(
            self._authority.issue_client, key, Role.AGENT, agent_id, self._agent_ttl
        )
        self._check(await self._loop.submit(replace(asked, certificate_serial=issued.serial)), context)
        log.info("agent enrolled", agent=agent_id, name=name, token=token_id, peer=context.peer())
        return agent_pb2.EnrollReply(
            agent_id=agent_id,
            certificate_pem=issued.certificate_pem,
            authority_pem=self._authority.certificate_pem,
            not_after_unix_s=issued.not_after_unix_s,
            port=self._main_port(),
        )

    def _check(self, reply: Reply, context: grpc.aio.ServicerContext) -> None:
        if isinstance(reply, Refused):
            log.warning("enrolment refused", peer=context.peer(), why=reply.refusal.name)
            self._guessed(context.peer())
            raise CallRefusedError(reply.refusal, reply.message)


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """The main port's calls for agents.  Every caller has passed `MainAccess`."""

    def __init__(
        self,
        *,
        loop: Loop,
        sessions: Sessions,
        authority: Authority,
        agent_ttl: dt.timedelta,
        blobs: BlobStore,
        blob_service: BlobService,
        report_refused: Callable[[str], None],
        caches: Caches,
        logs: LogBook,
        limits: Limits,
    ) -> None:
        """`report_refused` hears of a stored blob that is no shard, though an agent thought so."""
        self._loop = loop
        self._sessions = sessions
        self._caches = caches
        self._authority = authority
        self._agent_ttl = agent_ttl
        self._blobs = blobs
        self._blob_service = blob_service
        self._report_refused = report_refused
        self._logs = logs
        self._limits = limits
        self._acks = Acks()

    async def RenewIdentity(  # noqa: N802
        self, request: agent_pb2.RenewIdentityRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.RenewIdentityReply:
        agent_id = calling_agent()
        key = await asyncio.to_thread(requested_key, request.csr_pem)
        issued = await asyncio.to_thread(
            self._authority.issue_client, key, Role.AGENT, agent_id, self._agent_ttl
        )
        reply = await self._loop.submit(IdentityRenewed(agent_id=agent_id, certificate_serial=issued.serial))
        if isinstance(reply, Refused):
            raise CallRefusedError(reply.refusal, reply.message)
        return agent_pb2.RenewIdentityReply(
            certificate_pem=issued.certificate_pem, not_after_unix_s=issued.not_after_unix_s
        )

    async def FindBlobs(  # noqa: N802
        self, request: agent_pb2.FindBlobsRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.FindBlobsReply:
        return await self._blob_service.find(request)

    async def GetBlob(  # noqa: N802
        self, request: agent_pb2.GetBlobRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[agent_pb2.BlobChunk]:
        async for chunk in self._blob_service.get(request):
            yield chunk

    async def PutBlob(  # noqa: N802
        self, requests: AsyncIterator[agent_pb2.PutBlobRequest], _context: grpc.aio.ServicerContext
    ) -> agent_pb2.PutBlobReply:
        return await self._blob_service.put(requests)

    async def PresignPut(  # noqa: N802
        self, request: agent_pb2.PresignPutRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.PresignPutReply:
        return await self._blob_service.presign_put(request)

    async def PresignGet(  # noqa: N802
        self, request: agent_pb2.PresignGetRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.PresignGetReply:
        return await self._blob_service.presign_get(request)

    async def FindSources(  # noqa: N802
        self, request: agent_pb2.FindSourcesRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.FindSourcesReply:
        agent_id = calling_agent()
        digests = translate.wanted_sources(request)
        found = await self._loop.query(lambda state, _: self._caches.sources(state, agent_id, digests))
        return await asyncio.to_thread(self._caches.reply, agent_id, found)

    async def ReportShard(  # noqa: N802
        self, request: agent_pb2.ReportShardRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.ReportShardReply:
        event = translate.shard_report(request, calling_agent())
        if event.digest:
            await self._check_stored(event)
        reply = await self._loop.submit(event)
        if isinstance(reply, Refused):
            if event.digest and reply.refusal is not Refusal.RATE_LIMITED:  # then it is reported again
                self._report_refused(event.digest)
            raise CallRefusedError(reply.refusal, reply.message)
        return agent_pb2.ReportShardReply(committed=isinstance(reply, ShardAccepted) and reply.committed)

    async def _check_stored(self, event: ShardReported) -> None:
        await self._blob_service.take_in(event.digest, event.bytes)
        # Asking what is missing makes it wanted: a sweep that looked at the state before this is recorded must
        # not find it old.
        await asyncio.to_thread(self._blobs.missing, [event.digest])
        size = await asyncio.to_thread(self._blobs.size, event.digest)
        if size is None:
            raise CallRefusedError(
                Refusal.UNKNOWN_BLOB, f"digest: no blob {event.digest} is stored; put it first"
            )
        if size != event.bytes:
            raise CallRefusedError(
                Refusal.INVALID, f"bytes: found {event.bytes}, but blob {event.digest} has {size} bytes"
            )

    # ----------------------------------------------------------------------------- the session

    async def Session(  # noqa: N802
        self, requests: AsyncIterator[agent_pb2.AgentMessage], context: grpc.aio.ServicerContext
    ) -> None:
        agent_id = calling_agent()
        session = OpenSession(agent_id, SessionId(secrets.token_hex(8)), self._limits.session_queue)
        bound = log.bind(agent=agent_id, session=session.session_id)
        writing = session.write_to(context)
        reading = asyncio.create_task(self._read(session, requests, bound), name=f"reading {agent_id}")
        expiry = caller.get().not_after_unix_s - time.time()
        try:
            done, _ = await asyncio.wait(
                {writing, reading}, timeout=expiry, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                message = "the certificate of this connection has expired; reconnect with the renewed one"
                session.send(translate.go_away(None, message, retry=True))
            elif reading in done:
                self._say_why(session, reading, bound)
            # What waits for the agent, a GoAway at last, still goes out; the writer bounds how long that takes.
            await asyncio.wait({writing})
        finally:
            self._sessions.close(session)
            self._caches.closed(agent_id, session.session_id)
            self._loop.post(SessionClosed(agent_id=agent_id, session_id=session.session_id))
            bound.info("session closed")
            reading.cancel()
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    @staticmethod
    def _say_why(
        session: OpenSession, reading: asyncio.Task[None], bound: structlog.stdlib.BoundLogger
    ) -> None:
        error = reading.exception()
        match error:
            case None:
                session.end()
            case SessionEndedError():
                bound.warning("session ended", why=error.refusal.name, message=str(error))
                session.send(translate.go_away(error.refusal, str(error), retry=error.retry))
            case CallRefusedError():
                bound.warning("session refused", why=error.refusal.name, message=str(error))
                session.send(translate.go_away(error.refusal, str(error), retry=False))
            case translate.MalformedError():
                bound.warning("malformed message", message=str(error))
                session.send(translate.go_away(Refusal.INVALID, str(error), retry=False))
            case LoopStoppedError():
                session.send(translate.go_away(None, str(error), retry=True))
            case _:
                session.end()
                raise error

    async def _read(
        self,
        session: OpenSession,
        requests: AsyncIterator[agent_pb2.AgentMessage],
        bound: structlog.stdlib.BoundLogger,
    ) -> None:
        rate = Bucket(self._limits.session_messages_per_s, self._limits.session_burst)
        await self._open(session, requests)
        bound.info("session opened")
        async for message in requests:
            if not rate.take():
                raise SessionEndedError(
                    Refusal.RATE_LIMITED,
                    f"more than {self._limits.session_messages_per_s:g} messages a second; send less often",
                    retry=True,
                )
            await self._take(session, message, bound)

    async def _open(self, session: OpenSession, requests: AsyncIterator[agent_pb2.AgentMessage]) -> None:
        timeout_s = self._limits.hello_timeout / 1000
        try:
            async with asyncio.timeout(timeout_s):
                first = await anext(requests)
        except TimeoutError:
            raise SessionEndedError(
                Refusal.INVALID, f"hello: it did not come within {timeout_s:g} s", retry=True
            ) from None
        except StopAsyncIteration:
            raise translate.MalformedError("hello: missing; the session ended before it") from None
        if first.WhichOneof("body") != "hello":
            raise translate.MalformedError(
                f"hello: missing; the first message was {first.WhichOneof('body') or 'empty'}"
            )
        _check_protocol(first.hello.protocol, "hello.protocol")
        event = translate.hello(first.hello, session.agent_id, session.session_id)

        def welcome(state: State, reply: Reply) -> None:
            if not isinstance(reply, Refused):
                session.send(translate.welcome(session.agent_id, state.timing))
                self._sessions.open(session)
                self._caches.opened(session.agent_id, session.session_id)

        reply = await self._loop.submit(event, released=welcome)
        if isinstance(reply, Refused):
            raise CallRefusedError(reply.refusal, reply.message)

    async def _take(
        self, session: OpenSession, message: agent_pb2.AgentMessage, bound: structlog.stdlib.BoundLogger
    ) -> None:
        """Act on one message; returns when what it decides is recorded, so that order is kept and an
        agent never has more than one message in the queue."""
        agent_id = session.agent_id
        reply: Reply
        match message.WhichOneof("body"):
            case "heartbeat":
                beat = message.heartbeat
                reply = await self._loop.submit(translate.heartbeat(beat, agent_id, session.session_id))
                self._caches.fetching(agent_id, session.session_id, *translate.fetching(beat))
                self._acks.owe(session, beat.sequence)
            case "progress":
                reply = await self._progress(session, message.progress)
            case "logs":
                self._keep_lines(agent_id, message.logs)
                return
            case "cached":
                added, removed, port = translate.cached(message.cached)
                self._caches.heard(
                    agent_id,
                    session.session_id,
                    whole=message.cached.whole,
                    added=added,
                    removed=removed,
                    port=port,
                )
                return
            case _:
                reply = await self._loop.submit(translate.report(message, agent_id))
        if isinstance(reply, Refused):
            # Late messages, and steps that arrive before a peer's earlier ones, are normal: the fence exists
            # for them, and what is not acknowledged is sent again.
            bound.info(
                "report refused",
                kind=message.WhichOneof("body"),
                why=reply.refusal.name,
                message=reply.message,
            )
            if reply.refusal in {Refusal.BANNED, Refusal.UNKNOWN_AGENT}:
                raise CallRefusedError(reply.refusal, reply.message)

    async def _progress(self, session: OpenSession, message: agent_pb2.Progress) -> Reply:
        event, steps, evaluations = translate.progress(message, session.agent_id, self._loop.now_ms())

        def acknowledge(state: State, _reply: Reply) -> None:
            # Also when it was refused as late: what is recorded need not be sent again.
            job = state.jobs.get(JobId(message.job_id))
            if job is not None:
                session.send(
                    agent_pb2.CoordinatorMessage(
                        progress_ack=agent_pb2.ProgressAck(job_id=message.job_id, step=job.committed_step)
                    )
                )

        return await self._loop.submit(event, steps=steps, evaluations=evaluations, released=acknowledge)

    def _keep_lines(self, agent_id: AgentId, message: agent_pb2.LogLines) -> None:
        lines = translate.log_lines(message, agent_id, self._loop.now_ms())
        job = self._loop.state.jobs.get(JobId(message.job_id))
        if job is None:
            return
        members = () if job.generation is None else job.generation.members
        if agent_id in job.assigned or any(member.agent_id == agent_id for member in members):
            self._logs.add(lines)
