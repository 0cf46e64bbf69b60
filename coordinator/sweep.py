"""Mark and sweep: blobs that no checkpoint, no unfinished checkpoint and no live job refers to are deleted.

Shards of checkpoints go soon after their checkpoint was retired; blobs of which nothing is known (a
dataset that is being uploaded, say) are given much longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from coordinator import translate
from coordinator.blobs import BlobStore, BlobsUnavailableError
from coordinator.config import Blobs
from coordinator.core import codec
from coordinator.core.model import ENDED, Event, Record, Reply, ShardRecorded, State
from coordinator.journal import PAGE_ROWS, Journal
from coordinator.loop import Loop, LoopStoppedError

log = structlog.get_logger("coordinator.sweep")
MOST_BETWEEN_SWEEPS_S = 3_600.0


def referenced(state: State) -> set[str]:
    """Every blob that must stay, whatever its age."""
    found: set[str] = set()
    for job in state.jobs.values():
        for checkpoint in job.checkpoints:
            found.update(shard["digest"] for shard in json.loads(checkpoint.manifest_json)["shards"])
        for pending in job.pending:
            found.update(shard.digest for shard in pending.shards)
        if job.phase not in ENDED and job.spec.dataset_json:
            found.update(translate.dataset_digests(job.spec.dataset_json))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreferenced:
    """A blob that nothing refers to."""

    digest: str
    bytes: int
    age_s: float  # since it was stored or last wanted
    grace_s: float

    @property
    def old(self) -> bool:
        """Whether the sweep takes it."""
        return self.age_s > self.grace_s


class Sweeper:
    """An observer of the loop that learns which blobs are shards, and a task that sweeps."""

    def __init__(
        self,
        blobs: BlobStore,
        settings: Blobs,
        spared: Callable[[], Awaitable[frozenset[str]]],
        swept: Callable[[list[str]], None] = lambda removed: None,
    ) -> None:
        """`spared` names blobs that stay whatever the state says; `swept` hears of those that were removed."""
        self._swept = swept
        self._blobs = blobs
        self._spared = spared
        self._settings = settings
        self._shards: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def committed(self, record: Record) -> None:
        if isinstance(record, ShardRecorded):
            self._shards.add(record.shard.digest)

    def refused(self, digest: str) -> None:
        """It was reported as a shard in vain: if nothing else refers to it, it goes as soon as a retired one."""
        self._shards.add(digest)

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None:
        pass

    def wrote(self, entries: int, seconds: float) -> None:
        pass

    def learn(self, journal: Journal) -> None:
        """Find the shards of all checkpoints there ever were.  Blocks."""
        after = 0
        while rows := journal.records(after, kind=ShardRecorded.__name__):
            for row in rows:
                record = codec.decode_record(row.body)
                assert isinstance(record, ShardRecorded)
                self._shards.add(record.shard.digest)
            after = rows[-1].sequence
            if len(rows) < PAGE_ROWS:
                return

    def start(self, loop: Loop, journal: Journal) -> None:
        self._task = asyncio.create_task(self._run(loop, journal), name="sweep")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, loop: Loop, journal: Journal) -> None:
        await asyncio.to_thread(self.learn, journal)
        pause_s = min(MOST_BETWEEN_SWEEPS_S, max(1.0, self._settings.retired_grace / 2000))
        while True:
            await asyncio.sleep(pause_s)
            try:
                removed = await self.sweep(loop)
            except LoopStoppedError:
                return
            except (OSError, BlobsUnavailableError) as error:
                log.warning("sweep failed", error=str(error))
            else:
                if removed:
                    log.info("blobs removed", count=removed)

    async def sweep(self, loop: Loop) -> int:
        """Delete what may go now; returns how many blobs that were.

        A blob that is referred to again after the look at the state was touched then, and is young."""
        unfinished = await asyncio.to_thread(
            self._blobs.discard_unfinished, self._settings.orphan_grace / 1000
        )
        return unfinished + sum(one.old for one in await self.collect(loop, dry_run=False))

    async def collect(self, loop: Loop, *, dry_run: bool) -> list[Unreferenced]:
        """Every blob that nothing refers to; those that are old enough are gone now, unless `dry_run`."""
        spared = await self._spared()
        keep = await loop.query(lambda state, _: referenced(state))
        found = await asyncio.to_thread(self._collect, keep | spared, dry_run)
        if not dry_run:
            self._swept([one.digest for one in found if one.old])
        return found

    def _collect(self, keep: set[str], dry_run: bool) -> list[Unreferenced]:
        found = []
        for digest, size, age_s in self._blobs.stored():
            if digest in keep:
                continue
            grace_ms = self._settings.retired_grace if digest in self._shards else self._settings.orphan_grace
            one = Unreferenced(digest=digest, bytes=size, age_s=age_s, grace_s=grace_ms / 1000)
            found.append(one)
            if one.old and not dry_run:
                self._blobs.remove(digest)
                self._shards.discard(digest)
        return found
