"""A real coordinator in this process, for tests: real gRPC over TLS on loopback, real SQLite."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator.config import CoordinatorConfig
from coordinator.identity import Authority, Role
from coordinator.server import Coordinator, exit_at_once
from protos import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from protos.wire import PROTOCOL, SERVER_NAME, Identity, JoinToken, aio_channel

RPC_TIMEOUT_S = 20.0


def signing_request() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A new key and a PKCS#10 request for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")]))
        .sign(key, hashes.SHA256())
    )
    return key, request.public_bytes(serialization.Encoding.PEM)


def make_home(home: Path, address: str = "127.0.0.1:1") -> Authority:
    """What `musterd init` makes, without the process."""
    home.mkdir(parents=True)
    authority = Authority.create()
    authority.save(home)
    authority.issue_operator(Role.ADMIN, "admin", address).save(home / "admin.json")
    return authority


def loopback_config(lease_ms: int = 10_000, **changes: Any) -> CoordinatorConfig:
    """A configuration on loopback with ports that the system chooses."""
    return CoordinatorConfig.model_validate(
        {
            "listen": {"main": "127.0.0.1:0", "enroll": "127.0.0.1:0", "metrics": "127.0.0.1:0"},
            "lease": lease_ms / 1000,
            "blobs": {"reserve": 0},
            **changes,
        }
    )


@dataclass(kw_only=True)
class RunningCoordinator:
    """A coordinator that serves, and what a test needs to talk to it."""

    coordinator: Coordinator
    authority: Authority
    admin_identity: Identity
    channels: contextlib.AsyncExitStack

    @property
    def home(self) -> Path:
        return self.coordinator.home

    @property
    def main_address(self) -> str:
        return self.coordinator.addresses.main

    @property
    def enroll_address(self) -> str:
        return self.coordinator.addresses.enroll

    async def channel(self, identity: Identity) -> grpc.aio.Channel:
        """A channel with this identity, closed with the coordinator."""
        return await self.channels.enter_async_context(aio_channel(identity, self.main_address))

    async def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(await self.channel(self.admin_identity))

    async def agent(self, identity: Identity) -> agent_pb2_grpc.AgentServiceAsyncStub:
        return agent_pb2_grpc.AgentServiceStub(await self.channel(identity))

    def identity(self, role: Role, name: str) -> Identity:
        """An identity that the coordinator's authority has signed."""
        return self.authority.issue_operator(role, name, self.main_address)

    async def create_token(self, ttl_s: int = 3600, uses: int = 100) -> str:
        """A join token, as `muster token create` prints it."""
        request = admin_pb2.CreateTokenRequest(ttl_s=ttl_s, uses=uses)
        reply = await (await self.admin()).CreateToken(request, timeout=RPC_TIMEOUT_S)
        return str(reply.token)

    async def enroll(self, name: str = "box", token: str | None = None) -> Identity:
        """Enrol an agent over the enrolment port, as `muster-agent join` does."""
        parsed = JoinToken.parse(token or await self.create_token())
        key, request = signing_request()
        async with self.enroll_stub() as stub:
            reply = await stub.Enroll(
                agent_pb2.EnrollRequest(
                    protocol=PROTOCOL,
                    token_id=parsed.token_id,
                    secret=parsed.secret,
                    csr_pem=request,
                    name=name,
                ),
                timeout=RPC_TIMEOUT_S,
            )
        return Identity(
            role="agent",
            id=reply.agent_id,
            address=self.main_address,
            certificate_pem=reply.certificate_pem.decode(),
            key_pem=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            authority_pem=reply.authority_pem.decode(),
        )

    @contextlib.asynccontextmanager
    async def enroll_stub(self) -> AsyncIterator[agent_pb2_grpc.AgentServiceAsyncStub]:
        credentials = grpc.ssl_channel_credentials(root_certificates=self.authority.certificate_pem)
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        async with grpc.aio.secure_channel(self.enroll_address, credentials, options=options) as channel:
            yield agent_pb2_grpc.AgentServiceStub(channel)


@contextlib.asynccontextmanager
async def running_coordinator(
    tmp_path: Path,
    *,
    lease_ms: int = 10_000,
    die: Callable[[str], None] = exit_at_once,
    config: CoordinatorConfig | None = None,
) -> AsyncIterator[RunningCoordinator]:
    """A coordinator at tmp_path/home, made if it is not there yet, so that a test can stop and start it."""
    home = tmp_path / "home"
    authority = Authority.load(home) if home.exists() else make_home(home)
    coordinator = Coordinator(home, config or loopback_config(lease_ms), die=die)
    await coordinator.start()
    async with contextlib.AsyncExitStack() as channels:
        running = RunningCoordinator(
            coordinator=coordinator,
            authority=authority,
            admin_identity=Identity.load(home / "admin.json"),
            channels=channels,
        )
        try:
            yield running
        finally:
            await channels.aclose()
            await coordinator.stop()


class AgentSession:
    """An agent's session as a conforming agent would hold it, driven by a test."""

    def __init__(self, stub: agent_pb2_grpc.AgentServiceAsyncStub) -> None:
        self.call = stub.Session()

    async def say(self, **body: Any) -> None:
        """Send one message: `say(heartbeat=Heartbeat(...))`."""
        await self.call.write(agent_pb2.AgentMessage(**body))

    async def hello(self, incarnation: str = "i1", **changes: Any) -> agent_pb2.Welcome:
        """Send Hello and return the Welcome."""
        await self.say(hello=a_hello(incarnation, **changes))
        return (await self.hear("welcome")).welcome

    async def hear(self, kind: str) -> agent_pb2.CoordinatorMessage:
        """The next message of this kind; others on the way are passed over."""
        async with asyncio.timeout(RPC_TIMEOUT_S):
            while True:
                message = await self.call.read()
                assert message is not grpc.aio.EOF, f"the session ended before {kind}"
                if message.WhichOneof("body") == kind:
                    return message

    async def ended(self) -> None:
        """Wait until the coordinator has ended the stream."""
        async with asyncio.timeout(RPC_TIMEOUT_S):
            while await self.call.read() is not grpc.aio.EOF:
                pass

    def cut(self) -> None:
        """Drop the stream, as a killed agent does."""
        self.call.cancel()


def a_hello(incarnation: str = "i1", **changes: Any) -> agent_pb2.Hello:
    """The Hello of a small CPU machine."""
    probe = agent_pb2.Probe(
        torch_version="2.13.0",
        backends=["gloo"],
        cpu_count=2,
        memory_bytes=8 << 30,
        disk_free_bytes=100 << 30,
        hostname="box",
        advertise_host="127.0.0.1",
        worker_count=1,
    )
    return agent_pb2.Hello(**{"protocol": PROTOCOL, "incarnation": incarnation, "probe": probe, **changes})
