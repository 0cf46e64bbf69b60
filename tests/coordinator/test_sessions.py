"""What is queued for an agent goes out in order, and a peer that does not take it is cut off in time."""

from __future__ import annotations

import asyncio
from typing import Any

from coordinator.core.model import AgentId, SessionId
from coordinator.sessions import OpenSession


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
