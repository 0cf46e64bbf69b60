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

    def take(self, count: float = 1) -> bool:
        """Whether one more is allowed now.  It takes `count`, or all there is."""
        read = self._monotonic()
        self._level = min(self._burst, self._level + (read - self._read) * self._per_s)
        self._read = read
        if self._level < 1:
            return False
        self._level = max(0.0, self._level - count)
        return True


class Buckets:
    """One bucket for each peer; the peers longest unseen are forgotten."""

    MOST = 10_000

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, peer: str, count: float = 1) -> bool:
        """Whether this peer may once more, at the price of `count`."""
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = Bucket(self._per_s, self._burst)
            if len(self._buckets) > self.MOST:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(peer)
        return bucket.take(count)
