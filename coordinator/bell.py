"""How streams learn that there is something new to read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class Bell:
    """Wakes everyone who waits for something new.  Take `next` first, then look, then wait for it."""

    _next: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def next(self) -> asyncio.Event:
        return self._next

    def ring(self) -> None:
        self._next.set()
        self._next = asyncio.Event()
