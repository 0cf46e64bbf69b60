"""How long an agent waits for its welcome, and how long it stays away after an attempt that failed.

A coordinator that has just started has its whole fleet at the door, and serves them a few hundred a second.
Who leaves before it is served and comes again costs it a second handshake; with everybody doing so it serves
nobody (docs/benchmarks.md, "The coordinator").  So an agent waits long, and then longer, where somebody is
there; where nobody is, it gives up within seconds and comes back soon, since a link that is up again or a
coordinator that has started must be found quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

from protos import wire

Answer = TypeVar("Answer")

FIRST_WAIT_S = 60.0
LONGEST_WAIT_S = 240.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
"""Where nobody is there, so that nobody is burdened either."""
LONGEST_BUSY_PAUSE_S = 30.0
KNOCK_S = 3.0
"""TCP alone takes one round trip and no work of the process at the other end."""


class NobodyThere(Exception):
    """No connection can be had to the address."""


async def somebody_at(address: str) -> bool:
    """Whether the address takes connections."""
    host, port = wire.split_address(address)
    try:
        async with asyncio.timeout(KNOCK_S):
            _, writer = await asyncio.open_connection(host, port)
    except (TimeoutError, OSError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


class Patience:
    """One agent's.  Every attempt is `answer`, and then either `answered` or `pause_s`."""

    def __init__(
        self,
        *,
        first_wait_s: float = FIRST_WAIT_S,
        first_pause_s: float = FIRST_PAUSE_S,
        knock_s: float = KNOCK_S,
        knock: Callable[[str], Awaitable[bool]] = somebody_at,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """After `knock_s` without an answer, `knock` says whether to wait on.  `jitter` gives numbers from 0 to 1."""
        self._first_wait_s = first_wait_s
        self._first_pause_s = first_pause_s
        self._knock_s = knock_s
        self._jitter = jitter
        self.knock = knock
        self._longest_pause_s = LONGEST_PAUSE_S
        self._next_pause_s = first_pause_s
        self.wait_s = first_wait_s
        """How long the next attempt may take."""

    async def answer(
        self, greeting: Coroutine[Any, Any, Answer], channel: grpc.aio.Channel, address: str
    ) -> Answer:
        """What `greeting` over `channel` comes to.  Raise TimeoutError when it takes too long, NobodyThere as
        soon as it is known that it is in vain, and what `greeting` raises."""
        waiting = asyncio.create_task(greeting)
        try:
            knock_s = min(self._knock_s, self.wait_s)
            done, _ = await asyncio.wait({waiting}, timeout=knock_s)
            # A channel that stands may have come by a proxy, past which one cannot knock.
            stands = bool(done) or channel.get_state() is grpc.ChannelConnectivity.READY
            if not stands and not await self.knock(address):
                raise NobodyThere(f"nobody is there at {address}")
            async with asyncio.timeout(self.wait_s - knock_s):
                return await waiting
        except asyncio.CancelledError:
            # grpc.aio raises it from a call that was cancelled, too.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise TimeoutError("the attempt was given up") from None
        finally:
            waiting.cancel()

    def answered(self, lease_ms: int) -> None:
        """Begin anew: the coordinator has time for us.  Members with a short lease come back sooner."""
        self.wait_s, self._next_pause_s = self._first_wait_s, self._first_pause_s
        self._longest_pause_s = min(LONGEST_PAUSE_S, max(1.0, lease_ms / 4000))

    def pause_s(self, *, unanswered: bool) -> float:
        """How long to stay away now.  `unanswered`: somebody was there, and had no word for us."""
        longest_s = LONGEST_BUSY_PAUSE_S if unanswered else self._longest_pause_s
        pause_s = min(self._next_pause_s, longest_s)
        self._next_pause_s = 2 * pause_s
        self.wait_s = min(2 * self.wait_s, LONGEST_WAIT_S) if unanswered else self._first_wait_s
        return pause_s * (0.5 + 0.5 * self._jitter())
