"""How often a peer may do something."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class Bucket:
    """A token bucket: `burst` at once, `per_s` in the long run."""

    def __init__(self, per_s: float, burst: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._monotonic = monotonic
        self._level = float(burst)
        self._read = monotonic()

    def take(self) -> bool:
        """Whether one more is allowed now."""
        read = self._monotonic()
        self._level = min(self._burst, self._level + (read - self._read) * self._per_s)
        self._read = read
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def charge(self, count: float) -> None:
        """Take `count` more for what was allowed, on credit of at most a burst."""
        self._level = max(-float(self._burst), self._level - count)


class Buckets:
    """One bucket for each peer; the peers longest unseen are forgotten."""

    MOST = 10_000

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, peer: str) -> bool:
        """Whether this peer may once more."""
        return self._of(peer).take()

    def charge(self, peer: str, count: float) -> None:
        """Let what this peer was allowed cost it `count` more."""
        self._of(peer).charge(count)

    def _of(self, peer: str) -> Bucket:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = Bucket(self._per_s, self._burst)
            if len(self._buckets) > self.MOST:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        return bucket
