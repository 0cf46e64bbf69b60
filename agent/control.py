"""The agent's end of the control socket: its messages, and one connection to one worker.

Knows JSON lines and Unix sockets; knows nothing of jobs, plans on the wire or processes.  The
worker's end is `trainer/control.py`; a test holds the two against each other.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

VERSION = 1
LINE_BYTES = 1024 * 1024


class ControlError(Exception):
    """A line from the other end is not a message of this protocol; says which and why."""


# ------------------------------------------------------------------------------------- agent to worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Form this generation, or with `release` leave the old one at the cut and stay warm."""

    type: ClassVar[str] = "plan"
    generation: int
    rank: int
    world_size: int
    group_rank: int
    group_world_size: int
    store_host: str
    store_port: int
    cut: str  # "after_step" or "abort"
    committed_step: int
    committed_digest: str
    source: str  # "memory", "checkpoint" or "fresh"
    checkpoint_step: int | None
    release: bool
    checkpoint_before_cut: bool
    timeout_s: float
    holders: list[int] = field(default_factory=list)  # ranks whose state counts; empty: everybody's
    upload_weights: list[int] = field(default_factory=list)  # of each rank; empty: equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    type: ClassVar[str] = "abort"
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeCheckpoint:
    type: ClassVar[str] = "checkpoint"
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    type: ClassVar[str] = "ping"
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    type: ClassVar[str] = "stop"


Down = Plan | Abort | TakeCheckpoint | Ping | Stop


# ------------------------------------------------------------------------------------- worker to agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    type: ClassVar[str] = "hello"
    pid: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    type: ClassVar[str] = "warm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    type: ClassVar[str] = "formed"
    generation: int
    step: int
    state_digest: str
    healed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    type: ClassVar[str] = "step"
    generation: int
    step: int
    loss: float
    slices: int
    data_digest: str  # decimal
    tokens: float
    lr: float
    grad_norm: float
    skipped: bool
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    type: ClassVar[str] = "evaluation"
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    type: ClassVar[str] = "shard"
    generation: int
    step: int
    index: int
    count: int
    digest: str
    bytes: int
    state_digest: str
    header: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """The dataset's shards that the worker reads next, in this order; it needs no others."""

    type: ClassVar[str] = "wants"
    digests: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    type: ClassVar[str] = "pong"
    sequence: int
    activity: str
    since_s: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    type: ClassVar[str] = "failed"
    generation: int
    kind: str
    detail: str
    step: int
    unreachable: list[int] = field(default_factory=list)  # ranks that it could not reach while forming


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    type: ClassVar[str] = "released"
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    type: ClassVar[str] = "finished"
    generation: int
    step: int


Up = Hello | Warm | Formed | Step | Evaluation | Shard | Wants | Pong | Failed | Released | Finished
_UP: dict[str, type[Up]] = {
    kind.type: kind
    for kind in (Hello, Warm, Formed, Step, Evaluation, Shard, Wants, Pong, Failed, Released, Finished)
}
_HINTS = {name: get_type_hints(kind) for name, kind in _UP.items()}


def encode(message: Down) -> bytes:
    return json.dumps({"type": message.type, **asdict(message)}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Up:
    """Raise ControlError unless `line` is a message of the worker; keys this version lacks are ignored."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"control line is not JSON: {line[:80]!r}") from error
    kind = _UP.get(str(raw.get("type"))) if isinstance(raw, dict) else None
    if kind is None:
        raise ControlError(f"control line has no known type: {line[:80]!r}; known are {', '.join(_UP)}")
    values: dict[str, Any] = {}
    for part in fields(kind):
        if part.name not in raw and part.default_factory is not MISSING:
            continue
        value = raw.get(part.name)
        wanted = _HINTS[kind.type][part.name]
        match wanted:
            case _ if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
                try:
                    value = float(value)
                except OverflowError:
                    raise ControlError(
                        f"control message {kind.type!r}: field {part.name!r} is too large"
                    ) from None
            case _ if wanted is int and isinstance(value, int) and not isinstance(value, bool):
                pass
            case _ if wanted in (bool, str) and isinstance(value, wanted):
                pass
            case _ if wanted == dict[str, Any] and isinstance(value, dict):
                pass
            case _ if wanted == list[int] and isinstance(value, list):
                if not all(type(item) is int for item in value):
                    raise ControlError(f"control message {kind.type!r}: field {part.name!r} is {value!r:.80}")
            case _ if wanted == list[str] and _are_texts(value):
                pass
            case _:
                raise ControlError(f"control message {kind.type!r}: field {part.name!r} is {value!r:.80}")
        values[part.name] = value
    return kind(**values)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Connection(asyncio.Protocol):
    """One worker's connection.  `heard` gets every message; `gone`, once, how the worker broke the protocol,
    or nothing if the connection just ended.

    Reading and writing happen inside the event loop's own callbacks: between a plan's arrival and its
    bytes in the socket there is no task switch.
    """

    def __init__(self, heard: Callable[[Up], None], gone: Callable[[str], None]) -> None:
        self._heard = heard
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._broken = ""

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket")
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            self._break(f"control socket: connected by uid {uid}, expected {os.getuid()}")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while not self._broken and (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            try:
                self._heard(decode(line))
            except ControlError as error:
                self._break(str(error))
        if len(self._buffer) > LINE_BYTES:
            self._break(f"control line is longer than {LINE_BYTES} bytes")

    def _break(self, reason: str) -> None:
        self._broken = reason
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone(self._broken)

    def send(self, *messages: Down) -> None:
        """Write at once; a closed connection swallows it, since its end is reported through `gone`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(encode(message) for message in messages))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def listen(path: Path, connection: Connection) -> asyncio.AbstractServer:
    """A socket at `path`, mode 0600, which serves the first connection made to it and no other."""
    taken = False

    def accept() -> asyncio.BaseProtocol:
        nonlocal taken
        if taken:
            return _TurnedAway()
        taken = True
        return connection

    path.unlink(missing_ok=True)  # noqa: ASYNC240 - microseconds
    server = await asyncio.get_running_loop().create_unix_server(accept, path=str(path))
    path.chmod(0o600)  # noqa: ASYNC240
    return server


class _TurnedAway(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
