"""Simulated time, one source of chance, and the trace.  Knows nothing of what is simulated."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

TRACE_KEPT = 300


class Timer:
    """Something that will happen; `cancel` makes it not happen."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.args = args

    def cancel(self) -> None:
        self.call = None


class World:
    """Everything that happens, in order: by time, then by when it was asked for."""

    def __init__(self, seed: int, show: Callable[[str], None] | None = None) -> None:
        self.now_ms = 0
        self.events = 0
        self.random = random.Random(seed)
        self.trace: deque[str] = deque(maxlen=TRACE_KEPT)
        self._show = show
        self._hash = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[int, int, Timer]] = []
        self._asked = 0

    def after(self, delay_ms: int, call: Callable[..., None], *args: Any) -> Timer:
        return self.at(self.now_ms + delay_ms, call, *args)

    def at(self, at_ms: int, call: Callable[..., None], *args: Any) -> Timer:
        timer = Timer(call, args)
        self._asked += 1
        heapq.heappush(self._heap, (at_ms, self._asked, timer))
        return timer

    def run(self, until_ms: int) -> None:
        """Let time pass up to and including `until_ms`."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            at_ms, _, timer = heapq.heappop(heap)
            call = timer.call
            if call is None:
                continue
            self.now_ms = at_ms
            self.events += 1
            call(*timer.args)
        self.now_ms = until_ms

    def between(self, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        return least + int(self.random.random() * (most - least + 1))

    def jittered(self, delay_ms: int) -> int:
        """From half of `delay_ms` to all of it."""
        return int(delay_ms * (0.5 + 0.5 * self.random.random()))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def tell(self, line: str) -> None:
        """Add a line to the trace."""
        line = f"{self.now_ms / 1000:10.3f}  {line}"
        self.trace.append(line)
        self._hash.update(line.encode())
        if self._show is not None:
            self._show(line)

    def digest(self) -> str:
        """Of the whole trace and of every random number drawn: equal for equal runs."""
        hashed = self._hash.copy()
        hashed.update(repr((self.events, self.random.random())).encode())
        return hashed.hexdigest()
