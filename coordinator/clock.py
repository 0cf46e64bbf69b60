"""The coordinator's own time: it starts at the wall clock, and from then on only moves forward.

Setting the machine's clock does not move it, a restart never takes it back before a time that was
recorded, and it stands still while the process itself was stopped: an agent must not lose its lease
because the coordinator was suspended.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    def __init__(
        self,
        *,
        not_before_ms: int,
        largest_gap_ms: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Whoever owns the clock reads it at least every `largest_gap_ms`; a longer gap is a stop, and
        only `largest_gap_ms` of it count."""
        self._now = max(wall() * 1000, float(not_before_ms))
        self._largest_gap_ms = largest_gap_ms
        self._monotonic = monotonic
        self._read = monotonic()

    def now_ms(self) -> int:
        """Milliseconds, comparable over restarts of the coordinator."""
        read = self._monotonic()
        self._now += min((read - self._read) * 1000, self._largest_gap_ms)
        self._read = read
        return int(self._now)
