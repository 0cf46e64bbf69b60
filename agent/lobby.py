"""Where the event loop and the thread that runs torch's elastic agent meet.

The loop says what is so (which workers are warm, which plan is newest, that it is over); the thread
waits until it matters.  Everything is a level, never an edge: a waiter that comes late misses nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from protos import agent_pb2


class LobbyClosed(Exception):
    """There is nothing more to wait for; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the thread already knows."""

    generation: int = 0
    pids: tuple[int, ...] = ()


class Lobby:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._plan: agent_pb2.Plan | None = None
        self._pids: tuple[int, ...] = ()
        self._closed: str | None = None

    # ---- from the loop

    def offer(self, plan: agent_pb2.Plan) -> None:
        """`plan` is the newest; an older one that nobody took is forgotten."""
        with self._changed:
            if self._plan is None or plan.generation > self._plan.generation:
                self._plan = plan
                self._changed.notify_all()

    def workers(self, pids: tuple[int, ...]) -> None:
        """These workers are warm, in the order of their slots; empty while any is missing."""
        with self._changed:
            self._pids = pids
            self._changed.notify_all()

    def close(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    # ---- from the thread

    @property
    def closed(self) -> str | None:
        return self._closed

    @property
    def pids(self) -> tuple[int, ...]:
        with self._changed:
            return self._pids

    def pending(self, generation: int) -> bool:
        """Whether there is a plan newer than `generation`."""
        with self._changed:
            return self._plan is not None and self._plan.generation > generation

    def wait_workers(self) -> tuple[int, ...]:
        """Block until all workers are warm.  Raise LobbyClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pids or self._closed is not None)
            if self._closed is not None:
                raise LobbyClosed(self._closed)
            return self._pids

    def wait_plan(self, seen: Seen, timeout_s: float | None = None) -> agent_pb2.Plan | None:
        """Block until there is a plan newer than `seen`; None if the workers are others by now or time
        is up.  Raise LobbyClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._news(seen), timeout_s)
            if self._closed is not None:
                raise LobbyClosed(self._closed)
            if self._plan is not None and self._plan.generation > seen.generation:
                return self._plan
            return None

    def wait_change(self, seen: Seen) -> None:
        """Block until something differs from `seen`."""
        with self._changed:
            self._changed.wait_for(lambda: self._news(seen))

    def _news(self, seen: Seen) -> bool:
        newer = self._plan is not None and self._plan.generation > seen.generation
        return self._closed is not None or newer or self._pids != seen.pids
