"""How an agent comes back: patiently where somebody is there, soon where nobody is.  Real sockets and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from agent import patience
from agent.patience import Patience, somebody_at
from agent.session import Session
from protos import agent_pb2, wire
from tests.agent.fake_coordinator import Authority, FakeCoordinator

TIMEOUT_S = 20.0


class Nobody:
    """A delegate that says hello and notes when it was welcomed."""

    def __init__(self) -> None:
        self.is_welcome = asyncio.Event()

    def hello(self) -> agent_pb2.Hello:
        return agent_pb2.Hello(protocol=wire.PROTOCOL, incarnation="i1")

    def heartbeat(self) -> agent_pb2.Heartbeat:
        return agent_pb2.Heartbeat()

    def welcomed(self, welcome: agent_pb2.Welcome) -> None:
        self.is_welcome.set()

    def received(self, message: agent_pb2.CoordinatorMessage) -> None: ...
    def delivered(self, mark: int) -> None: ...
    def disconnected(self) -> None: ...


class Watched(Patience):
    """Says how long each attempt was ready to wait, and each pause."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"first_wait_s": 0.1, "first_pause_s": 0.001, "jitter": lambda: 1.0, **settings})
        self.waits: list[float] = []
        self.pauses: asyncio.Queue[tuple[float, bool]] = asyncio.Queue()

    async def answer(self, *arguments: Any) -> Any:
        self.waits.append(self.wait_s)
        return await super().answer(*arguments)

    def pause_s(self, *, unanswered: bool) -> float:
        pause_s = super().pause_s(unanswered=unanswered)
        self.pauses.put_nowait((pause_s, unanswered))
        return pause_s


class Slow(FakeCoordinator):
    """Welcomes nobody before `open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await self.open.wait()
        async for message in super().Session(requests, context):
            yield message


@contextlib.asynccontextmanager
async def reconnecting(
    identity: wire.Identity, watched: Patience, delegate: Nobody
) -> AsyncIterator[Session]:
    session = Session(lambda: identity, delegate, watched)
    running = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield session
    finally:
        await session.close("the test is over")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def mute() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def test_who_is_not_answered_waits_longer_and_comes_back_less_often(mute: str) -> None:
    watched = Watched()
    async with reconnecting(Authority().identity("a1", mute), watched, Nobody()):
        found = [await watched.pauses.get() for _ in range(4)]
    assert found == [(0.001, True), (0.002, True), (0.004, True), (0.008, True)]
    assert watched.waits[:4] == [0.1, 0.2, 0.4, 0.8]


async def test_a_late_answer_ends_the_patience() -> None:
    fake, watched, delegate = Slow(), Watched(), Nobody()
    await fake.start()
    try:
        async with reconnecting(fake.authority.identity("a1", fake.address), watched, delegate):
            assert [(await watched.pauses.get())[1] for _ in range(2)] == [True, True]
            fake.open.set()
            await delegate.is_welcome.wait()
            fake.session.hang_up()
            assert await watched.pauses.get() == (0.001, False)
            assert watched.wait_s == 0.1
    finally:
        fake.open.set()
        await fake.stop()


async def test_a_coordinator_that_is_down_is_found_as_soon_as_it_is_back() -> None:
    fake, watched, delegate = FakeCoordinator(), Watched(), Nobody()
    await fake.start()
    port = fake.port
    await fake.stop()
    async with reconnecting(fake.authority.identity("a1", f"127.0.0.1:{port}"), watched, delegate):
        assert [(await watched.pauses.get())[1] for _ in range(3)] == [False] * 3
        assert watched.wait_s == 0.1
        await fake.start(port)
        await delegate.is_welcome.wait()
    await fake.stop()


async def test_an_attempt_ends_early_when_nobody_is_there_any_more(mute: str) -> None:
    """As over a link that was cut: the handshake began, and now no connection can be had."""
    knocked: list[str] = []

    async def cut_off(address: str) -> bool:
        knocked.append(address)
        return False

    watched = Watched(first_wait_s=10 * TIMEOUT_S, knock_s=0.05, knock=cut_off)
    async with reconnecting(Authority().identity("a1", mute), watched, Nobody()):
        assert await watched.pauses.get() == (0.001, False)
    assert knocked == [mute]


def test_patience_and_pauses_are_bounded_and_begin_anew() -> None:
    found = Patience(jitter=lambda: 1.0)
    assert [found.pause_s(unanswered=True) for _ in range(10)][-1] == patience.LONGEST_BUSY_PAUSE_S
    assert found.wait_s == patience.LONGEST_WAIT_S
    assert found.pause_s(unanswered=False) == patience.LONGEST_PAUSE_S
    assert found.wait_s == patience.FIRST_WAIT_S
    found.answered(lease_ms=2_000)
    assert found.pause_s(unanswered=False) == patience.FIRST_PAUSE_S
    assert [found.pause_s(unanswered=False) for _ in range(10)][-1] == 1.0, "members with a short lease"
    assert Patience(jitter=lambda: 0.0).pause_s(unanswered=True) == patience.FIRST_PAUSE_S / 2


async def test_somebody_is_there_who_takes_connections(mute: str) -> None:
    assert await somebody_at(mute)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    assert not await somebody_at(address)
