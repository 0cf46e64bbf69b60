"""A coordinator for tests: a real grpc.aio server over real TLS with an authority of its own, which
records what it hears and says what the test tells it to."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos import agent_pb2, agent_pb2_grpc, authorship, seal, wire

LEASE_MS = 2_000
HEARTBEAT_MS = 100


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Authority:
    """Signs certificates; `chain` is what a server with it shows."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._build(name, name, self._key.public_key(), timedelta(days=1), ca=True)
        self.pem = _pem(self.certificate)
        server_key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wire.SERVER_NAME)])
        server = self._build(subject, name, server_key.public_key(), timedelta(days=1), dns=wire.SERVER_NAME)
        self.server_key = _key_pem(server_key)
        self._manifest_key = Ed25519PrivateKey.generate()
        signer = self._build(
            subject, name, self._manifest_key.public_key(), timedelta(days=1), uri=seal.SIGNER_URI
        )
        self._signers = [_der(signer), _der(self.certificate)]
        self.chain = _pem(server) + self.pem

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(_der(self.certificate)).hexdigest()

    def seal(self, manifest_json: str) -> str:
        """The manifest with this authority's signature."""
        return seal.signed(manifest_json, self._manifest_key, self._signers)

    def _build(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
        life: timedelta,
        *,
        ca: bool = False,
        dns: str = "",
        uri: str = "",
        agent_id: str = "",
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(seconds=1))
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if dns:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
        if uri:
            named = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
            builder = builder.add_extension(named, critical=False)
        if agent_id:
            names = [
                x509.UniformResourceIdentifier(f"muster://agent/{agent_id}"),
                x509.DNSName(wire.peer_name(agent_id)),
            ]
            purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
        return builder.sign(self._key, hashes.SHA256())

    @functools.cached_property
    def admin(self) -> wire.Identity:
        """Who signs jobs."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")])
        certificate = self._build(
            subject,
            self.certificate.subject,
            key.public_key(),
            timedelta(hours=1),
            uri="muster://admin/admin",
        )
        return wire.Identity(
            role="admin",
            id="admin",
            address="",
            certificate_pem=_pem(certificate).decode(),
            key_pem=_key_pem(key).decode(),
            authority_pem=self.pem.decode(),
        )

    def signed(self, assignment: agent_pb2.Assignment) -> agent_pb2.Assignment:
        """The same, with the admin's signature."""
        assignment.signature = authorship.sign(self.admin, assignment.spec_json, assignment.dataset_json)
        assignment.certificate_pem = self.admin.certificate_pem
        return assignment

    def sign(self, csr_pem: bytes, agent_id: str, life: timedelta) -> bytes:
        csr = x509.load_pem_x509_csr(csr_pem)
        assert csr.is_signature_valid
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, agent_id)])
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return _pem(self._build(subject, self.certificate.subject, key, life, agent_id=agent_id))

    def identity(self, agent_id: str, address: str, life: timedelta = timedelta(hours=1)) -> wire.Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
            .sign(key, hashes.SHA256())
        )
        return wire.Identity(
            role="agent",
            id=agent_id,
            address=address,
            certificate_pem=self.sign(_pem_of_csr(csr), agent_id, life).decode(),
            key_pem=_key_pem(key).decode(),
            authority_pem=self.pem.decode(),
        )


def _pem_of_csr(csr: x509.CertificateSigningRequest) -> bytes:
    return csr.public_bytes(serialization.Encoding.PEM)


@dataclass
class Conversation:
    """One session as the coordinator sees it."""

    hello: agent_pb2.Hello
    down: asyncio.Queue[agent_pb2.CoordinatorMessage | None]
    heard: list[agent_pb2.AgentMessage] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, **body: Any) -> None:
        self.down.put_nowait(agent_pb2.CoordinatorMessage(**body))

    def hang_up(self) -> None:
        self.down.put_nowait(None)


class FakeCoordinator(agent_pb2_grpc.AgentServiceServicer):
    """`await coordinator.heard("ready")` gives the next message of that kind; `say(...)` answers."""

    def __init__(self, authority: Authority | None = None) -> None:
        self.authority = authority or Authority()
        self.life = timedelta(hours=1)
        self.enrolled: list[agent_pb2.EnrollRequest] = []
        self.renewed = 0
        self.refuse_enrolment = 0
        self.blobs: dict[str, bytes] = {}
        self.gets: list[tuple[str, int]] = []
        self.puts: list[str] = []
        self.break_gets_after: int | None = None
        self.hold_gets: asyncio.Event | None = None  # each download stops after 1,000 bytes until this is set
        self.refuse_blobs = 0
        self.shards: list[agent_pb2.ReportShardRequest] = []
        self.sessions: list[Conversation] = []
        self.messages: list[agent_pb2.AgentMessage] = []
        self.answer_progress = True
        self.answer_heartbeats = True
        self.greet: Callable[[agent_pb2.Hello], agent_pb2.CoordinatorMessage | None] | None = None
        self._news = asyncio.Condition()
        self._read: dict[str, int] = {}
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=wire.SERVER_OPTIONS)
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        credentials = grpc.ssl_server_credentials(
            [(self.authority.server_key, self.authority.chain)],
            root_certificates=self.authority.pem,
            require_client_auth=False,
        )
        self.port = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        await self._server.start()

    async def stop(self) -> None:
        for session in self.sessions:
            session.hang_up()
        if self._server is not None:
            await self._server.stop(0.2)
            self._server = None

    @property
    def session(self) -> Conversation:
        return self.sessions[-1]

    def say(self, **body: Any) -> None:
        """To the newest session; an assignment is signed by an admin first, as the coordinator's would be."""
        if "assignment" in body:
            body["assignment"] = self.authority.signed(body["assignment"])
        self.session.say(**body)

    async def _note(self, message: agent_pb2.AgentMessage) -> None:
        async with self._news:
            self.messages.append(message)
            self._news.notify_all()

    async def heard(
        self, kind: str, match: Callable[[Any], bool] = lambda _: True, timeout_s: float = 20.0
    ) -> Any:
        """The next message of this kind that `match` accepts, in order of arrival; each is given once."""

        def find() -> Any:
            for index in range(self._read.get(kind, 0), len(self.messages)):
                message = self.messages[index]
                if message.WhichOneof("body") == kind and match(getattr(message, kind)):
                    self._read[kind] = index + 1
                    return getattr(message, kind)
            return None

        return await self.until(
            find,
            timeout_s,
            f"no {kind} came; heard {[m.WhichOneof('body') for m in self.messages if not m.HasField('heartbeat')][-20:]}",
        )

    async def until(self, find: Callable[[], Any], timeout_s: float = 20.0, why: str = "") -> Any:
        async with self._news:
            try:
                async with asyncio.timeout(timeout_s):
                    while not (found := find()):
                        await self._news.wait()
            except TimeoutError:
                raise AssertionError(why or "it did not happen") from None
            return found

    def count(self, kind: str) -> int:
        return sum(message.WhichOneof("body") == kind for message in self.messages)

    # ---------------------------------------------------------------- the service

    # ruff: noqa: N802 - gRPC names the methods
    async def Enroll(self, request: Any, context: Any) -> Any:
        self.enrolled.append(request)
        if self.refuse_enrolment:
            await context.abort_with_status(
                wire.refusal_status(self.refuse_enrolment, "the token's time is over")
            )
        return agent_pb2.EnrollReply(
            agent_id="a1",
            certificate_pem=self.authority.sign(request.csr_pem, "a1", self.life),
            authority_pem=self.authority.pem,
            not_after_unix_s=0,
            port=self.port,
        )

    async def RenewIdentity(self, request: Any, context: Any) -> Any:
        self.renewed += 1
        certificate = self.authority.sign(request.csr_pem, "a1", timedelta(hours=1))
        async with self._news:
            self._news.notify_all()
        return agent_pb2.RenewIdentityReply(certificate_pem=certificate)

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        first = await anext(aiter(requests))
        greeting = self.greet(first.hello) if self.greet is not None else None
        if greeting is not None:
            yield greeting
            return
        conversation = Conversation(hello=first.hello, down=asyncio.Queue())
        async with self._news:
            self.sessions.append(conversation)
            self._news.notify_all()
        yield agent_pb2.CoordinatorMessage(
            welcome=agent_pb2.Welcome(
                agent_id="a1",
                heartbeat_interval_ms=HEARTBEAT_MS,
                lease_ms=LEASE_MS,
                rebuild_timeout_ms=5_000,
                grace_ms=1_000,
            )
        )
        listening = asyncio.create_task(self._listen(requests, conversation))
        try:
            while (message := await conversation.down.get()) is not None:
                yield message
        finally:
            listening.cancel()
            conversation.closed.set()
            async with self._news:
                self._news.notify_all()

    async def _listen(self, requests: AsyncIterator[Any], conversation: Conversation) -> None:
        async for message in requests:
            conversation.heard.append(message)
            match message.WhichOneof("body"):
                case "heartbeat" if self.answer_heartbeats:
                    ack = agent_pb2.HeartbeatAck(sequence=message.heartbeat.sequence)
                    conversation.say(heartbeat_ack=ack)
                case "progress" if self.answer_progress and message.progress.steps:
                    step = message.progress.steps[-1].step
                    conversation.say(
                        progress_ack=agent_pb2.ProgressAck(job_id=message.progress.job_id, step=step)
                    )
                case "goodbye":
                    await self._note(message)
                    conversation.hang_up()
                    continue
            await self._note(message)
        conversation.hang_up()

    async def FindBlobs(self, request: Any, context: Any) -> Any:
        if self.refuse_blobs:
            await context.abort_with_status(wire.refusal_status(self.refuse_blobs, "the disk is full"))
        return agent_pb2.FindBlobsReply(missing=[d for d in request.digests if d not in self.blobs])

    async def GetBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.gets.append((request.digest, request.offset))
        if request.digest not in self.blobs:
            await context.abort_with_status(
                wire.refusal_status(agent_pb2.REFUSAL_UNKNOWN_BLOB, f"no blob {request.digest}")
            )
        data = self.blobs[request.digest][request.offset :]
        sent = 0
        for begin in range(0, len(data), 1000):
            if self.break_gets_after is not None and sent >= self.break_gets_after:
                self.break_gets_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")
            yield agent_pb2.BlobChunk(data=data[begin : begin + 1000])
            sent += 1000
            if self.hold_gets is not None:
                await self.hold_gets.wait()

    async def FindSources(self, request: Any, context: Any) -> Any:
        return agent_pb2.FindSourcesReply()

    async def PresignGet(self, request: Any, context: Any) -> Any:
        return agent_pb2.PresignGetReply()

    async def PutBlob(self, requests: AsyncIterator[Any], context: Any) -> Any:
        header = (await anext(aiter(requests))).header
        self.puts.append(header.digest)
        data = b"".join([message.data async for message in requests])
        if hashlib.sha256(data).hexdigest() != header.digest or len(data) != header.bytes:
            await context.abort_with_status(
                wire.refusal_status(agent_pb2.REFUSAL_DIGEST_MISMATCH, "wrong bytes")
            )
        self.blobs[header.digest] = data
        return agent_pb2.PutBlobReply()

    async def ReportShard(self, request: Any, context: Any) -> Any:
        self.shards.append(request)
        async with self._news:
            self._news.notify_all()
        return agent_pb2.ReportShardReply(committed=True)
