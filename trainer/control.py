"""The worker's end of the control socket: its messages, their codec, and the connection to the agent.

A Unix stream socket with one JSON object a line, at most 1 MiB, key `type`; docs/architecture.md says
what each message means.  Knows neither torch nor training.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

VERSION = 1
MAX_LINE_BYTES = 1024 * 1024
MAX_DETAIL_CHARS = 4096

Activity = Literal["idle", "forming", "computing", "reducing", "saving"]
FailureKind = Literal["collective", "program", "diverged", "restore"]


class BadMessage(Exception):
    """A line on the control socket is not a message of the protocol."""


# ------------------------------------------------------------------------------------ agent → worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Form this generation, or with `release` leave the old one at the cut and stay warm."""

    generation: int
    rank: int
    world_size: int
    group_rank: int
    group_world_size: int
    store_host: str
    store_port: int
    cut: Literal["after_step", "abort"]
    committed_step: int
    committed_digest: str
    source: Literal["memory", "checkpoint", "fresh"]
    checkpoint_step: int | None
    release: bool
    checkpoint_before_cut: bool
    timeout_s: float
    holders: list[int] = field(default_factory=list)
    """Ranks whose state counts, the others heal from one of them; empty: everybody's counts."""
    upload_weights: list[int] = field(default_factory=list)
    """Of each rank: it stores a part of each checkpoint in proportion to this, 1 or more; empty: equal parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """This generation is dead: drop the step in flight and wait for a plan."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Take a checkpoint after the current step."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Flush and leave the process with status 0."""


# ------------------------------------------------------------------------------------ worker → agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    pid: int
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """Model built (and compiled), data open; ready for a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """In the generation, state agreed."""

    generation: int
    step: int
    state_digest: str
    healed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The step is committed here.  `data_digest` is decimal: JSON numbers do not hold 64 bits everywhere."""

    generation: int
    step: int
    loss: float
    slices: int
    data_digest: str
    tokens: int
    lr: float
    grad_norm: float
    skipped: bool
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A shard of the checkpoint of `step` lies in the cache, fsynced.

    With an empty digest: this rank has none to write, and says what the state's digest is."""

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
    """The dataset's shards that are read next, in this order: fetch them, and keep these and no others."""

    digests: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    sequence: int
    activity: Activity
    since_s: float
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    generation: int
    kind: FailureKind
    detail: str
    step: int
    unreachable: list[int] = field(default_factory=list)
    """Ranks that could not be reached while the generation formed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    generation: int
    step: int


Down = Plan | Abort | Checkpoint | Ping | Stop
Up = Hello | Warm | Formed | Step | Evaluation | Shard | Wants | Pong | Failed | Released | Finished
Message = Down | Up

_TYPES: dict[str, type[Message]] = {
    cls.__name__.lower(): cls for cls in (*typing.get_args(Down), *typing.get_args(Up))
}
_FIELDS = {name: typing.get_type_hints(cls) for name, cls in _TYPES.items()}


def encode(message: Message) -> bytes:
    """One line, newline included."""
    body = {
        "type": type(message).__name__.lower(),
        **{part.name: getattr(message, part.name) for part in fields(message)},
    }
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Raise BadMessage unless `line` is one message with every field, each of its type.

    Keys that this version does not know are passed over, so that fields may be added.
    """
    try:
        body = json.loads(line)
        name = body.pop("type")
        cls, kinds = _TYPES[name], _FIELDS[name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadMessage(
            f"control line {line[:120]!r}: expected a JSON object whose type is one of {', '.join(sorted(_TYPES))}"
        ) from error
    required = {part.name for part in fields(cls)}
    values = {key: value for key, value in body.items() if key in required}
    for key, value in values.items():
        if not _fits(value, kinds[key]):
            raise BadMessage(f"control message {name}, field {key}: found {value!r}, expected {kinds[key]}")
    try:
        return cls(**values)
    except TypeError as error:
        raise BadMessage(f"control message {name}: {error}; every field is required") from error


def _fits(value: object, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is types.UnionType:
        return any(_fits(value, option) for option in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


# ---------------------------------------------------------------------------------------- connection


def _down(message: Message) -> Down:
    if not isinstance(message, Down):
        raise BadMessage(f"control message {type(message).__name__.lower()}: only workers send it")
    return message


def leave(status: int) -> typing.NoReturn:
    """End the process at once, output flushed.

    Not sys.exit: interpreter shutdown would free process groups whose threads may never end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class AgentLink:
    """The connection to the agent.  `send` may be called from any thread.

    Without its agent a worker has no place in the fleet: when the connection ends, so does the process.
    """

    def __init__(self, path: Path | str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._lock = threading.Lock()
        self.send(Hello(pid=os.getpid()))

    def send(self, message: Up) -> None:
        try:
            with self._lock:
                self._socket.sendall(encode(message))
        except OSError:
            leave(1)

    def listen(self, on_message: Callable[[Down], None]) -> None:
        """Hand every message to `on_message` on a thread of its own."""
        threading.Thread(target=self._read, args=(on_message,), name="agent-link", daemon=True).start()

    def _read(self, on_message: Callable[[Down], None]) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while line := lines.readline(MAX_LINE_BYTES + 1):
                    on_message(_down(decode(line)))
        except BadMessage as error:
            print(f"worker: {error}; leaving", file=sys.stderr)
        except OSError:
            pass
        leave(1)
