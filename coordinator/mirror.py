"""The manifests of committed checkpoints, kept beside their shards as well as in the journal.

So the blobs alone are enough to restore from, without a coordinator (`muster checkpoint restore --from`).
A manifest is written after the journal's commit and removed after its checkpoint was retired: what is
missing or too many because the coordinator died in between is put right when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping

import structlog

from coordinator.blobs import DIGEST, BlobStore, BlobsUnavailableError
from coordinator.core.model import CheckpointRetired, Event, JobId, ManifestCommitted, Record, Reply, State
from coordinator.loop import Loop, LoopStoppedError

log = structlog.get_logger("coordinator.mirror")

RETRY_S = (1.0, 60.0)
"""How long to wait after a failure: at first, and at most."""

Manifests = Mapping[JobId, Mapping[int, str]]


def manifests_of(state: State, jobs: Mapping[JobId, None]) -> Manifests:
    """What is to be in the store of these jobs, by step."""
    found = (state.jobs[job_id] for job_id in jobs)
    return {job.job_id: {one.step: one.manifest_json for one in job.checkpoints} for job in found}


class Mirror:
    """An observer of the loop that learns whose manifests have changed, and a task that writes them."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._stale: dict[JobId, None] = {}
        self._news = asyncio.Event()
        self._written: dict[JobId, dict[int, str]] = {}
        self._failed = False
        self._task: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._foreign: frozenset[str] = frozenset()

    async def foreign(self) -> frozenset[str]:
        """Shards of jobs that this coordinator does not know, which it has no right to sweep: the store may
        be all that is left of another coordinator.  Waits until the store was looked through."""
        await self._looked.wait()
        return self._foreign

    def committed(self, record: Record) -> None:
        if isinstance(record, ManifestCommitted | CheckpointRetired):
            self._stale[record.job_id] = None
            self._news.set()

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None:
        pass

    def wrote(self, entries: int, seconds: float) -> None:
        pass

    def start(self, loop: Loop) -> None:
        self._task = asyncio.create_task(self._run(loop), name="mirror")

    async def stop(self, state: State) -> None:
        """Write what is still due, unless the store does not take it.  `state` is not changed any more."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._stale and not self._failed and self._looked.is_set():
            with contextlib.suppress(OSError, BlobsUnavailableError):
                await asyncio.to_thread(self._write, manifests_of(state, self._stale))

    async def _run(self, loop: Loop) -> None:
        delay_s, most_s = RETRY_S
        while True:
            try:
                if not self._looked.is_set():
                    jobs = await loop.query(lambda state, _: dict.fromkeys(state.jobs))
                    self._foreign = await asyncio.to_thread(self._look, jobs)
                    self._stale |= jobs
                    self._looked.set()
                await self._write_stale(loop)
            except LoopStoppedError:
                return  # `stop` writes the rest
            except (OSError, BlobsUnavailableError) as error:
                self._failed = True
                log.warning("manifests not mirrored", why=str(error), again_in_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, most_s)
            else:
                self._failed = False
                delay_s = RETRY_S[0]
                await self._news.wait()

    async def _write_stale(self, loop: Loop) -> None:
        self._news.clear()
        jobs, self._stale = self._stale, {}
        try:
            wanted = await loop.query(lambda state, _: manifests_of(state, jobs))
            await asyncio.to_thread(self._write, wanted)
        except BaseException:
            self._stale = jobs | self._stale
            raise

    def _look(self, jobs: Mapping[JobId, None]) -> frozenset[str]:
        """Learn what is in the store; returns the shards of jobs that are not ours.  Blocks."""
        foreign: dict[str, None] = {}
        spared: set[str] = set()
        for job_id, step in self._blobs.manifests():
            text = self._blobs.manifest(job_id, step)
            if text is None:
                continue
            if job_id in jobs:
                self._written.setdefault(JobId(job_id), {})[step] = text
                continue
            foreign[job_id] = None
            try:
                digests = [str(shard["digest"]) for shard in json.loads(text)["shards"]]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("manifest of an unknown job is damaged", job=job_id, step=step, why=str(error))
                continue
            spared.update(digest for digest in digests if DIGEST.fullmatch(digest))
        if foreign:
            log.warning(
                "checkpoints of jobs that this coordinator does not know are left alone",
                jobs=list(foreign),
                blobs=len(spared),
            )
        return frozenset(spared)

    def _write(self, wanted: Manifests) -> None:
        """Make the store's manifests of these jobs the wanted ones.  Blocks."""
        for job_id, manifests in wanted.items():
            written = self._written.setdefault(job_id, {})
            for step, text in manifests.items():
                if written.get(step) != text:
                    self._blobs.put_manifest(job_id, step, text)
                    written[step] = text
            for step in [step for step in written if step not in manifests]:
                self._blobs.remove_manifest(job_id, step)
                del written[step]
