"""The agent's end of the control socket, alone and against the worker's."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import stat
import typing
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import control
from trainer import control as worker

EXAMPLES: dict[object, object] = {
    int: 3,
    float: 0.5,
    str: "x",
    bool: True,
    dict[str, typing.Any]: {"a": 1},
    list[int]: [0, 2],
    list[str]: ["ab"],
}


def example(kind: type[typing.Any], /, **known: object) -> typing.Any:
    hints = typing.get_type_hints(kind)
    values = {
        field.name: known.get(field.name, EXAMPLES.get(hints[field.name]))
        for field in dataclasses.fields(kind)
    }
    return kind(**values)


LITERALS = {"activity": "computing", "kind": "collective", "cut": "abort", "source": "memory"}


@pytest.mark.parametrize("kind", typing.get_args(worker.Up), ids=lambda kind: kind.__name__)
def test_agent_reads_what_the_worker_writes(kind: type[typing.Any]) -> None:
    message = example(kind, **LITERALS)
    read = control.decode(worker.encode(message).rstrip())
    assert dataclasses.asdict(read) == dataclasses.asdict(message)
    assert read.type == kind.__name__.lower()


@pytest.mark.parametrize("kind", typing.get_args(control.Down), ids=lambda kind: kind.__name__)
def test_worker_reads_what_the_agent_writes(kind: type[typing.Any]) -> None:
    message = example(kind, **LITERALS, checkpoint_step=None, holders=[0, 2])
    read = worker.decode(control.encode(message).rstrip())
    assert dataclasses.asdict(read) == dataclasses.asdict(message)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no known type"),
        (b'{"type":"plan"}', "no known type"),
        (b'{"type":"formed","generation":"1","step":1,"state_digest":"","healed":false}', "'generation'"),
        (b'{"type":"formed","generation":1,"step":1,"state_digest":""}', "'healed'"),
        (b'{"type":"released","generation":true}', "'generation'"),
        (
            b'{"type":"failed","generation":1,"kind":"collective","detail":"","step":1,"unreachable":["1"]}',
            "'unreachable'",
        ),
    ],
)
def test_lines_that_are_no_message_are_refused(line: bytes, words: str) -> None:
    with pytest.raises(control.ControlError, match=words):
        control.decode(line)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[control.Connection, asyncio.Future[str]]]:
    """The agent's end listening at `tmp_path/w`, and the reason for which its connection ends."""
    gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    connection = control.Connection(lambda _: None, gone.set_result)
    server = await control.listen(tmp_path / "w", connection)
    yield connection, gone
    server.close()
    await gone


async def test_socket_is_private_and_serves_one_worker_only(
    served: tuple[control.Connection, asyncio.Future[str]], tmp_path: Path
) -> None:
    connection, gone = served
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o600
    reader, writer = await asyncio.open_unix_connection(tmp_path / "w")
    late, late_writer = await asyncio.open_unix_connection(tmp_path / "w")
    assert await late.read() == b""
    connection.send(control.Ping(sequence=1), control.Stop())
    assert await reader.readline() == b'{"type":"ping","sequence":1}\n'
    assert await reader.readline() == b'{"type":"stop"}\n'
    for end in (writer, late_writer):
        end.close()
        await end.wait_closed()
    assert await gone == ""


async def test_endless_line_ends_the_connection(
    served: tuple[control.Connection, asyncio.Future[str]], tmp_path: Path
) -> None:
    _, gone = served
    with socket.socket(socket.AF_UNIX) as peer:
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(peer, str(tmp_path / "w"))
        with pytest.raises(ConnectionError):
            await loop.sock_sendall(peer, b"x" * 8 * control.LINE_BYTES)
    assert "longer than" in await gone
