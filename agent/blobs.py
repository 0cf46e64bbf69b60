"""Blobs on the volunteer's disk: fetched and verified by digest, uploaded beside training, bounded.

A blob is in the cache under its SHA-256 or not at all; what is on the way lies in a `.partial` file
from which a broken download resumes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import grpc
import grpc.aio
import structlog

from agent.errors import BlobError
from agent.presigned import Transfer, TransferBroken
from protos import agent_pb2, agent_pb2_grpc, wire

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 60.0
UPLOADS_AT_ONCE = 2
TRANSFERS_AT_ONCE = 8
PRESIGNED_TRIES = 5
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 15.0

Reply = TypeVar("Reply")
Stub = Callable[[], agent_pb2_grpc.AgentServiceStub]


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True)
class BlobCache:
    """`root/<digest>` for whole blobs.  The checks read the disk: call them in a thread."""

    root: Path
    _verified: dict[str, tuple[int, int]]

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified = {}

    def path(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise BlobError(f"blob digest {digest!r:.80}: expected 64 hex digits")
        return self.root / digest

    def holds(self, digest: str) -> bool:
        """Whether the blob is here and whole; a damaged one is removed with a warning that names it."""
        path = self.path(digest)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        seen = (stat.st_size, stat.st_mtime_ns)
        if self._verified.get(digest) == seen:
            return True
        found = _digest_of(path)
        if found == digest:
            self._verified[digest] = seen
            return True
        log.warning("blob.damaged", digest=digest, found=found, path=str(path), action="fetched again")
        path.unlink(missing_ok=True)
        self._verified.pop(digest, None)
        return False

    def recheck(self, digest: str) -> bool:
        """Like `holds`, trusting no earlier reading."""
        self._verified.pop(digest, None)
        return self.holds(digest)

    def trim(self, keep: Iterable[str], limit_bytes: int) -> int:
        """Remove what is not in `keep`, oldest first, until the rest fits; return the bytes removed."""
        kept = frozenset(keep)
        files = []
        for path in self.root.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            files.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(size for _, _, size in files) - limit_bytes
        removed = 0
        for _, path, size in sorted(files):
            if removed >= excess:
                break
            if path.name.removeprefix(".partial-") in kept or (
                path.name.startswith(".") and not path.name.startswith(".partial-")
            ):
                continue
            path.unlink(missing_ok=True)
            self._verified.pop(path.name, None)
            removed += size
        return removed


class BlobClient:
    """Moves blobs between the cache and the coordinator's store.  `stub` gives the current channel's.

    Where the coordinator hands out presigned URLs, the bytes go straight to and from its object store."""

    def __init__(self, stub: Stub, cache: BlobCache) -> None:
        self._stub = stub
        self.cache = cache
        self._fetching: dict[str, asyncio.Lock] = {}
        # Apart from the loop's own threads: a store that stalls must not hold up the rest of the agent.
        self._transfers = ThreadPoolExecutor(TRANSFERS_AT_ONCE, thread_name_prefix="transfer")

    async def fetch(self, digest: str) -> Path:
        """The blob's file, from the cache or the coordinator.

        Raise BlobError if its bytes are wrong twice or the disk refuses them; gRPC errors pass through,
        and what had been received is kept for the next attempt."""
        async with self._fetching.setdefault(digest, asyncio.Lock()):
            if await asyncio.to_thread(self.cache.holds, digest):
                return self.cache.path(digest)
            for _ in range(2):
                if await self._download(digest):
                    return self.cache.path(digest)
            raise BlobError(
                f"blob {digest}: the bytes received twice hash to something else; tell the operator"
            )

    async def _download(self, digest: str) -> bool:
        path = self.cache.path(digest)
        partial = path.with_name(f".partial-{digest}")
        try:
            file, hasher = await asyncio.to_thread(_open_partial, partial)
            try:
                if not await self._receive_presigned(digest, file, hasher):
                    await self._receive(digest, file, hasher)
                await asyncio.to_thread(_sync, file)
            finally:
                file.close()
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise BlobError(
                f"blob {digest}: cannot be written to {partial.parent}: {error.strerror}"
            ) from error
        if hasher.hexdigest() != digest:
            log.warning("blob.wrong_bytes", digest=digest, found=hasher.hexdigest())
            partial.unlink(missing_ok=True)
            return False
        os.replace(partial, path)
        return True

    async def _receive(self, digest: str, file: BinaryIO, hasher: Any) -> None:
        call = self._stub().GetBlob(agent_pb2.GetBlobRequest(digest=digest, offset=file.tell()))
        try:
            while True:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    chunk = await call.read()
                if chunk is grpc.aio.EOF:
                    break
                await asyncio.to_thread(_append, file, hasher, chunk.data)
        finally:
            call.cancel()

    async def _receive_presigned(self, digest: str, file: BinaryIO, hasher: Any) -> bool:
        """Whether this coordinator hands out URLs.  Raise TransferBroken when the store gives nothing."""
        take = functools.partial(_append, file, hasher)
        delay_s = FIRST_DELAY_S
        for left in reversed(range(PRESIGNED_TRIES)):
            request = agent_pb2.PresignGetRequest(digest=digest)
            where = await _unless_unknown(self._stub().PresignGet(request, timeout=CALL_TIMEOUT_S))
            if where is None or not where.url:
                return False
            if file.tell() >= where.bytes:
                break
            transfer = Transfer(where.url)
            try:
                await self._run(transfer, functools.partial(transfer.get, file.tell(), where.bytes, take))
                break
            except TransferBroken as error:
                if not left:
                    raise
                log.info("blob.waiting", digest=digest, why=str(error), delay_s=delay_s)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        return True

    async def _run(self, transfer: Transfer, work: Callable[[], None]) -> None:
        """Do a transfer in a thread; when nobody waits for it any more, end it before returning."""
        running = asyncio.get_running_loop().run_in_executor(self._transfers, work)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            transfer.abort()
            await asyncio.wait({running})
            running.exception()
            raise

    async def upload(self, digest: str) -> None:
        """Store the blob at the coordinator unless it is there.  Raise BlobError if it is not in the cache."""
        request = agent_pb2.FindBlobsRequest(digests=[digest])
        if not (await self._stub().FindBlobs(request, timeout=CALL_TIMEOUT_S)).missing:
            return
        try:
            size = self.cache.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise BlobError(f"blob {digest}: is not in {self.cache.root}") from error
        if await self._upload_presigned(digest, size):
            return
        call = self._stub().PutBlob(self._chunks(digest, size))
        try:
            await call
        finally:
            call.cancel()

    async def _upload_presigned(self, digest: str, size: int) -> bool:
        """Whether this coordinator hands out URLs.  Raise TransferBroken when the store takes nothing."""
        request = agent_pb2.PresignPutRequest(digest=digest, bytes=size)
        where = await _unless_unknown(self._stub().PresignPut(request, timeout=CALL_TIMEOUT_S))
        if where is None or not (where.received or where.url):
            return False
        if where.received:
            return True
        transfer = Transfer(where.url)
        try:
            await self._run(transfer, functools.partial(transfer.put, self.cache.path(digest), where.headers))
        except TransferBroken:
            if not await asyncio.to_thread(self.cache.recheck, digest):
                raise BlobError(f"blob {digest}: its file in the cache is damaged") from None
            raise
        return True

    async def _chunks(self, digest: str, size: int) -> AsyncIterator[agent_pb2.PutBlobRequest]:
        yield agent_pb2.PutBlobRequest(header=agent_pb2.PutBlobHeader(digest=digest, bytes=size))
        with await asyncio.to_thread(open, self.cache.path(digest), "rb") as file:
            while data := await asyncio.to_thread(file.read, wire.CHUNK_BYTES):
                yield agent_pb2.PutBlobRequest(data=data)


async def _unless_unknown(call: Awaitable[Reply]) -> Reply | None:
    """The reply, or None from a coordinator that is older than the call."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return None
        raise


def _open_partial(partial: Path) -> tuple[BinaryIO, Any]:
    file = open(partial, "a+b")  # noqa: SIM115 - the caller closes it
    file.seek(0)
    return file, hashlib.file_digest(file, "sha256")


def _append(file: BinaryIO, hasher: Any, data: bytes) -> None:
    file.write(data)
    hasher.update(data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class ShardReports:
    """Uploads the shards that workers hand up and reports each, for as long as it takes.

    Only a refusal ends an attempt for good: the coordinator being away, or its disk full, is waited out."""

    def __init__(self, stub: Stub, blobs: BlobClient, drained: Callable[[str], None]) -> None:
        self._stub = stub
        self._blobs = blobs
        self._drained = drained
        self._outstanding: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    def outstanding(self, job_id: str) -> int:
        return self._outstanding[job_id]

    def add(self, report: agent_pb2.ReportShardRequest) -> None:
        self._outstanding[report.job_id] += 1
        task = asyncio.create_task(self._store(report))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def idle(self) -> None:
        """Wait until nothing is outstanding."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _store(self, report: agent_pb2.ReportShardRequest) -> None:
        delay_s = FIRST_DELAY_S
        about = {"job": report.job_id, "step": report.step, "index": report.index, "digest": report.digest}
        while True:
            try:
                async with self._slots:
                    await self._blobs.upload(report.digest)
                reply = await self._stub().ReportShard(report, timeout=CALL_TIMEOUT_S)
                log.info("shard.reported", **about, committed=reply.committed)
                break
            except grpc.aio.AioRpcError as error:
                refusal = wire.refusal_of(error)
                if refusal == agent_pb2.REFUSAL_DIGEST_MISMATCH:
                    if not await asyncio.to_thread(self._blobs.cache.recheck, report.digest):
                        log.error("shard.lost", **about, why="the file in the cache is damaged")  # noqa: TRY400
                        break
                elif refusal is not None and refusal not in (
                    agent_pb2.REFUSAL_RATE_LIMITED,
                    agent_pb2.REFUSAL_NO_SPACE,
                    agent_pb2.REFUSAL_UNKNOWN_BLOB,
                ):
                    log.warning("shard.refused", **about, why=error.details())
                    break
                log.info("shard.waiting", **about, why=error.details(), delay_s=delay_s)
            except BlobError as error:
                log.error("shard.lost", **about, why=str(error))  # noqa: TRY400 - the cause is in the message
                break
            except (TimeoutError, OSError) as error:
                log.info("shard.waiting", **about, why=str(error), delay_s=delay_s)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        self._outstanding[report.job_id] -= 1
        if not self._outstanding[report.job_id]:
            del self._outstanding[report.job_id]
            self._drained(report.job_id)


def dataset_digests(manifest_json: str) -> tuple[str, ...]:
    """The blobs that a `muster-dataset-1` manifest names.  Raise BlobError if it is malformed."""
    try:
        manifest = json.loads(manifest_json)
        digests = tuple(shard["digest"] for shards in manifest["splits"].values() for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BlobError(f"dataset manifest: malformed ({error!r}); prepare the dataset again") from error
    return digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the agent needs of a `muster-checkpoint-1` manifest."""

    step: int
    digests: tuple[str, ...]
    bytes: int

    @staticmethod
    def parse(manifest_json: str) -> Checkpoint:
        """Raise BlobError if it is malformed."""
        try:
            manifest = json.loads(manifest_json)
            shards = manifest["shards"]
            return Checkpoint(
                step=int(manifest["step"]),
                digests=tuple(shard["digest"] for shard in shards),
                bytes=sum(int(shard["bytes"]) for shard in shards),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BlobError(f"checkpoint manifest: malformed ({error!r})") from error
