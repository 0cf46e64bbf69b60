"""What this agent serves to other agents from its cache, and to whom.

Nobody is served without a certificate of the same authority and a ticket of the coordinator for that
agent and that blob, nor who was banned, nor while the volunteer says no.  What is served was verified
since it last changed on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import grpc
import grpc.aio
import structlog
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent.blobs import BlobCache
from protos import agent_pb2, agent_pb2_grpc, ticket, wire

log = structlog.get_logger(__name__)

_AGENT_URI = re.compile(r"^muster://agent/([A-Za-z0-9._-]{1,64})$")
REQUEST_BYTES = 16 * 1024
SERVED_AT_ONCE = 8
SERVED_AT_ONCE_TO_ONE = 4
CALLS_PER_S = 50.0
CALLS_AT_ONCE = 200
MOST_PEERS = 10_000
STALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lending:
    """What the volunteer allows."""

    allowed: bool = True
    port: int = 0  # 0 lets the system choose
    bytes_per_s: int = 0  # of all that is served together; 0 is no bound


class Refused(Exception):
    def __init__(self, refusal: int, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


def agent_of(certificate_pem: bytes) -> str | None:
    """The agent that a certificate, which TLS has verified, names; None if it is no valid agent's."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    match = _AGENT_URI.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None or ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        return None
    # TLS has looked at the dates when the connection was made, which may be long ago.
    return match[1] if certificate.not_valid_after_utc.timestamp() > time.time() else None


def may_serve(identity: wire.Identity) -> bool:
    """Whether the certificate is good for serving: those of older coordinators are not until they are renewed."""
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem.encode())
    try:
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.SERVER_AUTH in purposes


class PeerService(agent_pb2_grpc.PeerServiceServicer):
    """The one call, and everything that is asked before it is answered."""

    def __init__(self, cache: BlobCache, authority_pem: str, lending: Lending) -> None:
        self.allowed = lending.allowed
        self.served_bytes = 0
        self._cache = cache
        self._authority_pem = authority_pem
        self._pace = Pace(lending.bytes_per_s)
        self._under_way: Counter[str] = Counter()
        self._revoked: set[str] = set()
        self._calls: dict[str, Allowance] = {}

    def revoke(self, agent_id: str) -> None:
        """Serve this agent nothing more, and break off what it is just getting."""
        if len(self._revoked) < MOST_PEERS:
            self._revoked.add(agent_id)

    async def GetBlob(  # noqa: N802
        self, request: agent_pb2.GetPeerBlobRequest, context: grpc.aio.ServicerContext
    ) -> None:
        try:
            peer = self._admit(request, context)
            with self._place(peer):
                file = await asyncio.to_thread(self._open, request.ticket.digest, request.offset)
                try:
                    await self._send(file, peer, context)
                finally:
                    file.close()
        except Refused as error:
            log.info("peer.refused", peer=context.peer(), why=str(error))
            await context.abort_with_status(wire.refusal_status(error.refusal, str(error)))
        except OSError as error:
            log.warning("peer.not_served", digest=request.ticket.digest, why=error.strerror or str(error))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the blob cannot be read here now")

    async def _send(self, file: BinaryIO, peer: str, context: grpc.aio.ServicerContext) -> None:
        while data := await asyncio.to_thread(file.read, wire.CHUNK_BYTES):
            await self._pace.wait(len(data))
            self._check_still(peer)
            # Whoever does not read must not keep others from being served.
            async with asyncio.timeout(STALL_TIMEOUT_S):
                await context.write(agent_pb2.BlobChunk(data=data))
            self.served_bytes += len(data)

    def _admit(self, request: agent_pb2.GetPeerBlobRequest, context: grpc.aio.ServicerContext) -> str:
        found = context.auth_context().get("x509_pem_cert", ())
        peer = agent_of(bytes(found[0])) if found else None
        if peer is None:
            raise Refused(agent_pb2.REFUSAL_WRONG_ROLE, "the client certificate is not that of an agent")
        if not self._called(peer):
            raise Refused(agent_pb2.REFUSAL_RATE_LIMITED, "too many calls; wait a second and retry")
        self._check_still(peer)
        problem = ticket.problem(request.ticket, self._authority_pem, peer, time.time())
        if problem:
            raise Refused(agent_pb2.REFUSAL_WRONG_ROLE, f"ticket: {problem}")
        return peer

    def _called(self, peer: str) -> bool:
        allowance = self._calls.pop(peer, None) or Allowance()
        self._calls[peer] = allowance  # the longest unseen come first
        if len(self._calls) > MOST_PEERS:
            del self._calls[next(iter(self._calls))]
        return allowance.take()

    def _check_still(self, peer: str) -> None:
        """Raise Refused if what was allowed a moment ago is not any more."""
        if not self.allowed:
            raise Refused(agent_pb2.REFUSAL_UNKNOWN_BLOB, "this agent's volunteer lends no blobs now")
        if peer in self._revoked:
            raise Refused(agent_pb2.REFUSAL_BANNED, f"agent {peer} was banned by the operator")

    @contextlib.contextmanager
    def _place(self, peer: str) -> Iterator[None]:
        if self._under_way[peer] >= SERVED_AT_ONCE_TO_ONE or self._under_way.total() >= SERVED_AT_ONCE:
            raise Refused(agent_pb2.REFUSAL_RATE_LIMITED, "as many blobs as may be are being served; retry")
        self._under_way[peer] += 1
        try:
            yield
        finally:
            self._under_way[peer] -= 1
            if not self._under_way[peer]:
                del self._under_way[peer]

    def _open(self, digest: str, offset: int) -> BinaryIO:
        path: Path = self._cache.path(digest)
        if not self._cache.holds(digest):
            raise Refused(agent_pb2.REFUSAL_UNKNOWN_BLOB, f"digest: no blob {digest} is in this cache")
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise Refused(
                agent_pb2.REFUSAL_UNKNOWN_BLOB, f"digest: no blob {digest} is in this cache"
            ) from None
        size = file.seek(0, 2)
        if offset > size:
            file.close()
            raise Refused(
                agent_pb2.REFUSAL_INVALID, f"offset: {offset}, but blob {digest} has only {size} bytes"
            )
        file.seek(offset)
        return file


class Allowance:
    """A token bucket of calls."""

    def __init__(self) -> None:
        self._left = float(CALLS_AT_ONCE)
        self._seen_s = time.monotonic()

    def take(self) -> bool:
        now_s = time.monotonic()
        self._left = min(CALLS_AT_ONCE, self._left + (now_s - self._seen_s) * CALLS_PER_S)
        self._seen_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Pace:
    """Spreads bytes so that so many a second leave this machine, whoever they are for."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._monotonic = monotonic
        self._free_s = 0.0

    def delay_s(self, count: int) -> float:
        """How long to wait before so many bytes may go; they are counted as gone then."""
        if not self._bytes_per_s:
            return 0.0
        now_s = self._monotonic()
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + count / self._bytes_per_s
        return begin_s - now_s

    async def wait(self, count: int) -> None:
        delay_s = self.delay_s(count)
        if delay_s > 0:
            await asyncio.sleep(delay_s)


class PeerServer:
    """The port at which other agents are served."""

    def __init__(self, cache: BlobCache, identity: Callable[[], wire.Identity], lending: Lending) -> None:
        self.service = PeerService(cache, identity().authority_pem, lending)
        self._identity = identity
        self._shown = identity()
        self._wanted_port = lending.port
        self._server: grpc.aio.Server | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """What others are told: 0 while nothing is served."""
        return self._port if self.service.allowed and may_serve(self._identity()) else 0

    async def start(self, host: str) -> None:
        """Listen on this address, which peers reach, or on all if it is none of this machine's.

        An agent that cannot listen serves nobody and is none the worse for it."""
        options = [
            *((key, value) for key, value in wire.SERVER_OPTIONS if key != "grpc.max_receive_message_length"),
            ("grpc.max_receive_message_length", REQUEST_BYTES),
            ("grpc.max_concurrent_streams", SERVED_AT_ONCE_TO_ONE),
        ]
        server = grpc.aio.server(options=options)
        agent_pb2_grpc.add_PeerServiceServicer_to_server(self.service, server)
        # Asked for at each handshake: a renewed certificate takes effect without a restart.
        credentials = grpc.dynamic_ssl_server_credentials(
            _credentials(self._shown), self._renewed, require_client_authentication=True
        )
        shown = f"[{host}]" if ":" in host else host
        for address in (f"{shown}:{self._wanted_port}", f"[::]:{self._wanted_port}"):
            try:
                self._port = int(server.add_secure_port(address, credentials))
            except RuntimeError:
                continue
            break
        else:
            log.warning("peers.not_served", port=self._wanted_port, why="the port cannot be had")
            return
        await server.start()
        self._server = server

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        identity = self._identity()
        if identity is self._shown:
            return None
        self._shown = identity
        return _credentials(identity)

    async def stop(self) -> None:
        self.service.allowed = False
        if self._server is not None:
            await self._server.stop(0.2)


def _credentials(identity: wire.Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key_pem.encode(), (identity.certificate_pem + identity.authority_pem).encode())],
        root_certificates=identity.authority_pem.encode(),
    )
