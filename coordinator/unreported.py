"""What agents have sent and nothing refers to: bounded for each, so that none fills the store alone.

A blob counts from the beginning of its upload until a checkpoint has it as a shard or the sweep has taken
it, whoever reports it; what an upload that broke off has left counts as the whole blob, until it would be
discarded.  Honest agents report each shard as soon as it is stored, so they have a few under way.  Only in
memory: a restart of the coordinator forgives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from coordinator.blobs import BlobRefusedError
from coordinator.core.model import AgentId, Event, Record, Refusal, Reply, ShardRecorded
from coordinator.metrics import Metrics

LEAST_BYTES = 2**20
"""A small blob counts as much as this, so that there are not too many to remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    bytes: int
    since_s: float
    whole: bool = False  # stored, not under way


class Unreported:
    """An observer of the loop that learns which blobs are shards.  On the loop's thread only."""

    def __init__(
        self,
        *,
        most_bytes: int,
        discarded_after_s: float,
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_bytes = most_bytes
        self._discarded_after_s = discarded_after_s
        self._metrics = metrics
        self._now = now
        self._charges: dict[AgentId, dict[str, Charge]] = {}
        self._bytes: dict[AgentId, int] = {}
        self._senders: dict[str, dict[AgentId, None]] = {}

    def charge(self, agent_id: AgentId, digest: str, size: int) -> bool:
        """Count a blob whose upload begins; whether it was not counted before.  Raise BlobRefusedError."""
        charges = self._charges.get(agent_id, {})
        counted = charges.get(digest)
        before = counted.bytes if counted is not None else 0
        after = max(before, size, LEAST_BYTES)
        held = self._bytes.get(agent_id, 0) - before
        if after > before and held and held + after > self._most_bytes:
            self._metrics.uploads_over_quota.inc()
            raise BlobRefusedError(
                Refusal.RATE_LIMITED,
                f"blob of {size} bytes: this agent has sent {held} bytes in {len(charges)} blobs that it did not "
                f"report as shards, and blobs.unreported_per_agent allows {self._most_bytes}; report them, or wait until "
                "the coordinator has removed them",
            )
        self._put(
            agent_id,
            digest,
            replace(counted, bytes=after)
            if counted is not None
            else Charge(bytes=after, since_s=self._now()),
        )
        return counted is None

    def stored(self, agent_id: AgentId, digest: str) -> None:
        """The upload has ended well: the blob is there until it is swept."""
        counted = self._charges.get(agent_id, {}).get(digest)
        if counted is not None:
            self._put(agent_id, digest, replace(counted, whole=True))

    def lift(self, agent_id: AgentId, digest: str) -> None:
        """Nothing of the upload was kept."""
        counted = self._charges.get(agent_id, {}).pop(digest, None)
        if counted is None:
            return
        self._bytes[agent_id] -= counted.bytes
        self._metrics.unreported_bytes.dec(counted.bytes)
        if not self._charges[agent_id]:
            del self._charges[agent_id], self._bytes[agent_id]
        senders = self._senders[digest]
        del senders[agent_id]
        if not senders:
            del self._senders[digest]

    def swept(self, removed: Iterable[str]) -> None:
        """The sweep has taken these blobs, and what broken uploads had left for too long."""
        for digest in removed:
            self._forget(digest)
        end_s = self._now() - self._discarded_after_s
        old = [
            (agent_id, digest)
            for agent_id, charges in self._charges.items()
            for digest, counted in charges.items()
            if not counted.whole and counted.since_s < end_s
        ]
        for agent_id, digest in old:
            self.lift(agent_id, digest)

    def committed(self, record: Record) -> None:
        if isinstance(record, ShardRecorded):
            self._forget(record.shard.digest)

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None:
        pass

    def wrote(self, entries: int, seconds: float) -> None:
        pass

    def _put(self, agent_id: AgentId, digest: str, charge: Charge) -> None:
        charges = self._charges.setdefault(agent_id, {})
        before = charges[digest].bytes if digest in charges else 0
        charges[digest] = charge
        self._bytes[agent_id] = self._bytes.get(agent_id, 0) + charge.bytes - before
        self._metrics.unreported_bytes.inc(charge.bytes - before)
        self._senders.setdefault(digest, {})[agent_id] = None

    def _forget(self, digest: str) -> None:
        for agent_id in list(self._senders.get(digest, ())):
            self.lift(agent_id, digest)
