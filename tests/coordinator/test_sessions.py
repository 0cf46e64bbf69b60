"""What is queued for an agent goes out in order, and a peer that does not take it is cut off in time."""

from __future__ import annotations

import asyncio
from typing import Any

from coordinator.core.model import AgentId, SessionId
from coordinator.sessions import Acks, OpenSession
from protos import agent_pb2


class Peer:
    """A stream whose writes end when the peer has taken them."""

    def __init__(self, takes: int) -> None:
        self.taken: list[Any] = []
        self._takes = takes

    async def write(self, message: Any) -> None:
        if len(self.taken) == self._takes:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.taken.append(message)


async def test_a_peer_that_stops_reading_is_cut_off_after_the_write_timeout() -> None:
    session = OpenSession(AgentId("a1"), SessionId("s"), most_waiting=9, write_timeout_s=0.05)
    peer = Peer(takes=3)
    writing = session.write_to(peer)  # type: ignore[arg-type]
    for message in (b"1", b"2", b"3"):
        session.send(message)
    # The timer that the first write set up fires meanwhile, and finds nothing under way.
    done, _ = await asyncio.wait({writing}, timeout=0.2)
    assert not done
    session.send(b"4")
    done, _ = await asyncio.wait({writing}, timeout=20)
    assert done
    assert peer.taken == [b"1", b"2", b"3"]


async def test_each_write_has_the_whole_timeout() -> None:
    """A timer left over from an earlier write must not end a later one."""
    session = OpenSession(AgentId("a1"), SessionId("s"), most_waiting=9, write_timeout_s=0.4)
    peer = Peer(takes=1)
    writing = session.write_to(peer)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    session.send(b"1")
    await asyncio.sleep(0.3)
    began = loop.time()
    session.send(b"2")
    await asyncio.wait({writing}, timeout=20)
    assert loop.time() - began >= 0.4


class Written:
    """A stream whose other end reads everything; `all` is set when `count` messages have come."""

    def __init__(self, count: int) -> None:
        self.messages: list[agent_pb2.CoordinatorMessage] = []
        self.all = asyncio.Event()
        self._count = count

    async def write(self, message: agent_pb2.CoordinatorMessage) -> None:
        self.messages.append(message)
        if len(self.messages) >= self._count:
            self.all.set()


async def test_heartbeats_that_come_together_are_answered_once_and_everybody_is() -> None:
    acks, one, other = Acks(together_s=0), Written(2), Written(1)
    sessions = [OpenSession(AgentId(f"a{i}"), SessionId("s"), most_waiting=9) for i in range(2)]
    pairs = zip(sessions, (one, other), strict=True)
    writing = [session.write_to(to) for session, to in pairs]  # type: ignore[arg-type]
    for sequence in (1, 2):
        acks.owe(sessions[0], sequence)
    acks.owe(sessions[1], 7)
    async with asyncio.timeout(5):
        await other.all.wait()
        acks.owe(sessions[0], 3)
        await one.all.wait()
    assert [m.heartbeat_ack.sequence for m in one.messages] == [2, 3], "an answer is for those before it, too"
    assert [m.heartbeat_ack.sequence for m in other.messages] == [7]
    for session in sessions:
        session.end()
    await asyncio.gather(*writing)
