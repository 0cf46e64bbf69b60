"""What both ends of the wire share beside the messages: limits, identities on disk, channels, refusals.

Knows gRPC and files; knows nothing of the coordinator, the agent or torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import agent_pb2
from protos.files import write_whole

PROTOCOL = agent_pb2.PROTOCOL_VERSION_1

SERVER_NAME = "coordinator.muster.internal"
"""The one DNS name in every server certificate.  The authority is private and pinned, and issues it
to the coordinator only, so clients check this name whatever address they dial."""

PEER_DOMAIN = "agent.muster.internal"
"""Below it every agent's certificate has a name under which it serves other agents."""

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
ERROR_DOMAIN = "muster"

# Keepalive below five minutes is refused unless the server lowers its minimum: both sides are set here.
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
CONNECT_S = 3.0
# A server has many peers.  gRPC's bandwidth probe enlarges each one's windows as long as that makes it faster, up
# to what fits in memory (three agents: 132 to 260 MiB).  Without it, what a stream may send before it is read is
# this much: at 100 ms and one stream 16 MiB/s were measured, more than a line of 100 Mbit/s takes.
STREAM_WINDOW_BYTES = 2 * 1024 * 1024
SERVER_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)

_TOKEN = re.compile(r"^muster1\.([0-9a-f]{64})\.([a-z0-9]{8})([A-Za-z0-9_-]{32,64})$")


class WireError(Exception):
    """Something at the edge between machines is wrong; the message says what and what to do."""


class MalformedToken(WireError):
    pass


class BadIdentityFile(WireError):
    pass


class BadAddress(WireError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """`muster1.<fingerprint>.<token_id><secret>`: pins the authority, names the token, proves the right."""

    fingerprint: str  # SHA-256 of the authority's certificate (DER), hex
    token_id: str
    secret: str

    @staticmethod
    def parse(text: str) -> JoinToken:
        """Raise MalformedToken unless `text` has the form that `muster token create` prints."""
        match = _TOKEN.fullmatch(text.strip())
        if match is None:
            raise MalformedToken(
                "token: not a join token; expected muster1.<64 hex digits>.<secret>, as printed by "
                "`muster token create`. Copy it whole, without line breaks"
            )
        return JoinToken(fingerprint=match[1], token_id=match[2], secret=match[3])

    def __str__(self) -> str:
        return f"muster1.{self.fingerprint}.{self.token_id}{self.secret}"

    def __repr__(self) -> str:
        return f"JoinToken(token_id={self.token_id!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A certificate, its key and the authority to trust: one 0600 JSON file."""

    role: str  # "agent", "admin" or "observer"
    id: str
    address: str  # host:port of the coordinator's main port
    certificate_pem: str
    key_pem: str
    authority_pem: str

    def __repr__(self) -> str:
        return f"Identity(role={self.role!r}, id={self.id!r}, address={self.address!r})"

    def save(self, path: Path) -> None:
        """Write atomically with mode 0600: readers see the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self)).encode())

    @staticmethod
    def load(path: Path) -> Identity:
        """Raise BadIdentityFile if the file is absent, readable by others, or malformed."""
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadIdentityFile(f"identity file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadIdentityFile(f"identity file {path}: not a Muster identity ({error.reason})") from error
        if mode & 0o077:
            raise BadIdentityFile(
                f"identity file {path}: mode is {mode & 0o777:04o} but it holds a private key; run chmod 600 {path}"
            )
        try:
            return Identity(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadIdentityFile(f"identity file {path}: not a Muster identity ({error})") from error


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` to (host, port).  Raise BadAddress."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 <= int(port) <= 65_535:
        raise BadAddress(
            f"address {text!r}: expected HOST:PORT with a port from 0 to 65535, e.g. gpu.example.org:7470"
        )
    return host.strip("[]"), int(port)


def peer_name(agent_id: str) -> str:
    """The DNS name in an agent's certificate."""
    return f"{agent_id}.{PEER_DOMAIN}"


def _options(name: str = SERVER_NAME, connect_s: float = CONNECT_S) -> list[tuple[str, int | str]]:
    return [
        *CHANNEL_OPTIONS,
        # How long a connection may take, too: TCP, TLS and HTTP/2 greet in four round trips, so 200 ms would
        # fail every first attempt on a link of 100 ms.
        ("grpc.min_reconnect_backoff_ms", int(1000 * connect_s)),
        ("grpc.ssl_target_name_override", name),
    ]


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=identity.authority_pem.encode(),
        private_key=identity.key_pem.encode(),
        certificate_chain=identity.certificate_pem.encode(),
    )


def aio_channel(
    identity: Identity, address: str | None = None, *, connect_s: float = CONNECT_S
) -> grpc.aio.Channel:
    """An asyncio channel to the coordinator, mutually authenticated.  `connect_s`: how long a connection may
    take until TLS and HTTP/2 stand."""
    return grpc.aio.secure_channel(
        address or identity.address, _credentials(identity), options=_options(connect_s=connect_s)
    )


def peer_channel(identity: Identity, agent_id: str, address: str) -> grpc.aio.Channel:
    """An asyncio channel to another agent's PeerService; only that agent can answer it."""
    return grpc.aio.secure_channel(address, _credentials(identity), options=_options(peer_name(agent_id)))


def channel(identity: Identity, address: str | None = None) -> grpc.Channel:
    """A blocking channel to the coordinator, mutually authenticated."""
    return grpc.secure_channel(address or identity.address, _credentials(identity), options=_options())


def enroll_channel(authority_pem: bytes, address: str) -> grpc.Channel:
    """A channel to the enrolment port: the server is verified, the client is nobody yet."""
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(root_certificates=authority_pem), options=_options()
    )


_CODES: dict[int, int] = {
    agent_pb2.REFUSAL_PROTOCOL_VERSION: code_pb2.FAILED_PRECONDITION,
    agent_pb2.REFUSAL_TOKEN_MALFORMED: code_pb2.INVALID_ARGUMENT,
    agent_pb2.REFUSAL_TOKEN_UNKNOWN: code_pb2.UNAUTHENTICATED,
    agent_pb2.REFUSAL_TOKEN_EXPIRED: code_pb2.UNAUTHENTICATED,
    agent_pb2.REFUSAL_TOKEN_EXHAUSTED: code_pb2.UNAUTHENTICATED,
    agent_pb2.REFUSAL_TOKEN_REVOKED: code_pb2.UNAUTHENTICATED,
    agent_pb2.REFUSAL_BAD_CSR: code_pb2.INVALID_ARGUMENT,
    agent_pb2.REFUSAL_UNKNOWN_AGENT: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_BANNED: code_pb2.PERMISSION_DENIED,
    agent_pb2.REFUSAL_WRONG_ROLE: code_pb2.PERMISSION_DENIED,
    agent_pb2.REFUSAL_DUPLICATE_IDENTITY: code_pb2.ALREADY_EXISTS,
    agent_pb2.REFUSAL_STALE_GENERATION: code_pb2.FAILED_PRECONDITION,
    agent_pb2.REFUSAL_UNKNOWN_JOB: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_WRONG_PHASE: code_pb2.FAILED_PRECONDITION,
    agent_pb2.REFUSAL_INVALID: code_pb2.INVALID_ARGUMENT,
    agent_pb2.REFUSAL_NOT_A_MEMBER: code_pb2.FAILED_PRECONDITION,
    agent_pb2.REFUSAL_DIGEST_MISMATCH: code_pb2.DATA_LOSS,
    agent_pb2.REFUSAL_UNKNOWN_BLOB: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_NO_SPACE: code_pb2.RESOURCE_EXHAUSTED,
    agent_pb2.REFUSAL_TOO_LARGE: code_pb2.RESOURCE_EXHAUSTED,
    agent_pb2.REFUSAL_UNKNOWN_TOKEN: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_UNKNOWN_CHECKPOINT: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_RATE_LIMITED: code_pb2.RESOURCE_EXHAUSTED,
    agent_pb2.REFUSAL_UNKNOWN_DATASET: code_pb2.NOT_FOUND,
    agent_pb2.REFUSAL_NAME_TAKEN: code_pb2.ALREADY_EXISTS,
    agent_pb2.REFUSAL_CHECKPOINT_NEEDED: code_pb2.FAILED_PRECONDITION,
}


def refusal_status(refusal: int, message: str) -> grpc.Status:
    """The gRPC status of a refusal, for `context.abort_with_status`: its reason travels as ErrorInfo."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=agent_pb2.Refusal.Name(refusal), domain=ERROR_DOMAIN))
    return rpc_status.to_status(status_pb2.Status(code=_CODES[refusal], message=message, details=[detail]))


def refusal_of(error: grpc.RpcError) -> int | None:
    """The Refusal number that an RPC error carries, or None if it is not a refusal of ours."""
    if isinstance(error, grpc.aio.AioRpcError):
        metadata = dict(error.trailing_metadata() or ())
        raw = metadata.get("grpc-status-details-bin")
        status = status_pb2.Status.FromString(raw) if isinstance(raw, bytes) else None
    else:
        status = rpc_status.from_call(error)
    if status is None:
        return None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            try:
                return agent_pb2.Refusal.Value(info.reason)
            except ValueError:
                return None
    return None
