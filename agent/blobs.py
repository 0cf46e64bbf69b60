"""Blobs on the volunteer's disk: fetched and verified by digest, uploaded beside training, bounded.

A blob is in the cache under its SHA-256 or not at all; what is on the way lies in a `.partial` file
from which a broken download resumes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from weakref import WeakValueDictionary

import grpc
import grpc.aio
import structlog

from agent.errors import BlobError
from agent.presigned import Transfer, TransferBroken
from protos import agent_pb2, agent_pb2_grpc, seal, wire

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 30.0
STALL_TIMEOUT_S = 60.0
PEER_CONNECT_TIMEOUT_S = 5.0
PEER_STALL_TIMEOUT_S = 15.0
SPARED_S = 600.0
UNREACHABLE_S = 60.0  # an agent that did not answer is left alone for so long
SOURCES_ASKED = 8
BUSY_TRIES = 40
LONGEST_BUSY_DELAY_S = 5.0
UPLOADS_AT_ONCE = 2
TRANSFERS_AT_ONCE = 8
MEASURED_FROM_BYTES = 1 << 20  # less says more of the latency than of the line
UPLOAD_RATE_GOOD_S = 3600.0
PRESIGNED_TRIES = 5
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 15.0

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN_BYTES = {"uint16": 2, "uint32": 4}
Reply = TypeVar("Reply")
Stub = Callable[[], agent_pb2_grpc.AgentServiceStub]


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BlobCache:
    """`root/<digest>` for whole blobs.  The checks read the disk: call them in a thread."""

    def __init__(self, root: Path, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called whenever a blob was fetched or removed, from any thread."""
        self.root = root
        self.changed = changed
        self._verified: dict[str, tuple[int, int]] = {}
        self._fetched: set[str] = set()

    def path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
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
        if self._verified.get(digest) != seen:
            found = _digest_of(path)
            if found == digest:
                self._verified[digest] = seen
        if self._verified.get(digest) == seen:
            # The time of use, for `trim`; file systems keep it loosely or not at all.
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
            return True
        log.warning("blob.damaged", digest=digest, found=found, path=str(path), action="fetched again")
        path.unlink(missing_ok=True)
        self._verified.pop(digest, None)
        self.changed()
        return False

    def recheck(self, digest: str) -> bool:
        """Like `holds`, trusting no earlier reading."""
        self._verified.pop(digest, None)
        return self.holds(digest)

    def fetched(self, digest: str) -> None:
        """The blob was put here by us, who need no time to say what it is for."""
        self._fetched.add(digest)
        self.changed()

    def listing(self, most: int) -> set[str]:
        """The blobs that are here by name, and of too many those that were used last."""
        found = []
        for path in self.root.iterdir():
            if _DIGEST.fullmatch(path.name):
                try:
                    found.append((_last_used(path.stat()), path.name))
                except FileNotFoundError:
                    continue
        return {name for _, name in sorted(found)[-most:]}

    def trim(self, keep: Iterable[str], limit_bytes: int) -> int:
        """Remove what is not in `keep`, least recently used first, until the rest fits; return the bytes removed.

        Spared is also what was not fetched and is young: a worker has just written or found it, and is about
        to say so."""
        kept = frozenset(keep)
        young_ns = time.time_ns() - int(SPARED_S * 1e9)
        files = []
        for path in self.root.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            files.append((_last_used(stat), path, stat.st_size))
        excess = sum(size for _, _, size in files) - limit_bytes
        removed = 0
        for used_ns, path, size in sorted(files):
            if removed >= excess:
                break
            if used_ns > young_ns and path.name not in self._fetched and _DIGEST.fullmatch(path.name):
                continue
            if path.name.removeprefix(".partial-") in kept or (
                path.name.startswith(".") and not path.name.startswith(".partial-")
            ):
                continue
            path.unlink(missing_ok=True)
            self._verified.pop(path.name, None)
            self._fetched.discard(path.name)
            removed += size
        if removed:
            self.changed()
        return removed


def _last_used(stat: os.stat_result) -> int:
    return max(stat.st_atime_ns, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A blob as a manifest names it: what is fetched is bounded and verified by this."""

    digest: str
    bytes: int


Moved = Callable[[str, int], None]
"""Hears of bytes that are here now, and from where: "cache", "agents" or "store"; negative if they were wrong."""


def _nobody_listens(source: str, count: int) -> None:
    pass


class UploadMeter:
    """How fast this machine uploads: bytes over the time in which any were on their way, recent mean."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate = 0.0
        self._measured_s = 0.0
        self._under_way = 0
        self._since_s = 0.0
        self._sent = 0

    @property
    def bytes_per_s(self) -> int:
        """0 if nothing, or too little to tell, was sent of late."""
        return int(self._rate) if self._clock() - self._measured_s < UPLOAD_RATE_GOOD_S else 0

    @contextlib.contextmanager
    def counted(self, size: int) -> Iterator[None]:
        """Around an upload of `size` bytes; one that fails counts as time alone."""
        if not self._under_way:
            self._since_s, self._sent = self._clock(), 0
        self._under_way += 1
        try:
            yield
            self._sent += size
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._settle()

    def _settle(self) -> None:
        elapsed_s = self._clock() - self._since_s
        if self._sent < MEASURED_FROM_BYTES or elapsed_s <= 0:
            return
        rate = self._sent / elapsed_s
        known = self.bytes_per_s
        self._rate = (known + rate) / 2 if known else rate
        self._measured_s = self._clock()


class BlobClient:
    """Moves blobs between the cache, other agents' caches and the coordinator's store.

    `stub` gives the current channel's, `identity` the certificate to show to other agents; without one
    nobody but the store is asked.  `accuse` hears of an agent that served wrong bytes, with the digest.
    Where the coordinator hands out presigned URLs, the bytes go straight to and from its object store."""

    def __init__(
        self,
        stub: Stub,
        cache: BlobCache,
        *,
        identity: Callable[[], wire.Identity] | None = None,
        accuse: Callable[[str, str], None] = lambda agent_id, digest: None,
    ) -> None:
        self._stub = stub
        self.cache = cache
        self._identity = identity
        self._accuse = accuse
        # A lock lives as long as somebody holds it or waits for it.
        self._fetching: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._uploading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unreachable: dict[str, float] = {}
        self._liars: set[str] = set()
        self._busy: set[str] = set()  # blobs that an agent has, which could not serve one more just now
        self.uploads = UploadMeter()
        # Apart from the loop's own threads: a store that stalls must not hold up the rest of the agent.
        self._transfers = ThreadPoolExecutor(TRANSFERS_AT_ONCE, thread_name_prefix="transfer")

    async def fetch(self, piece: Piece, moved: Moved = _nobody_listens, *, recheck: bool = False) -> Path:
        """The blob's file: from the cache, else from other agents, else from the store.

        With `recheck` no earlier reading of the cache is trusted.  Raise BlobError if the store's bytes are
        wrong twice or the disk refuses them; gRPC errors of the store pass through, and what had been
        received is kept for the next attempt."""
        digest = piece.digest
        async with self._fetching.setdefault(digest, asyncio.Lock()):
            look = self.cache.recheck if recheck else self.cache.holds
            if await asyncio.to_thread(look, digest):
                moved("cache", piece.bytes)
                return self.cache.path(digest)
            path = self.cache.path(digest)
            try:
                partial = await asyncio.to_thread(Partial, path.with_name(f".partial-{digest}"), piece.bytes)
                try:
                    moved("cache", partial.size)
                    await self._receive(piece, partial, moved)
                    await asyncio.to_thread(partial.keep, path)
                finally:
                    partial.close()
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                raise BlobError(
                    f"blob {digest}: cannot be written to {path.parent}: {error.strerror}"
                ) from error
            self.cache.fetched(digest)
            return path

    async def _receive(self, piece: Piece, partial: Partial, moved: Moved) -> None:
        """Return when the partial file is the blob: each source goes on where the one before broke off."""
        delay_s = FIRST_DELAY_S
        for left in reversed(range(BUSY_TRIES)):
            self._busy.discard(piece.digest)
            for source in await self._sources(piece.digest):
                if await self._receive_whole(_FromAgent(self, source), piece, partial, moved):
                    return
            try:
                for _ in range(2):
                    if await self._receive_whole(_FromStore(self), piece, partial, moved):
                        return
            except grpc.aio.AioRpcError as error:
                lost = wire.refusal_of(error) == agent_pb2.REFUSAL_UNKNOWN_BLOB
                if not (lost and left and piece.digest in self._busy):
                    raise
                # The store has lost it, and who has it serves others just now.
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, LONGEST_BUSY_DELAY_S)
            else:
                raise BlobError(
                    f"blob {piece.digest}: the bytes received twice hash to something else; tell the operator"
                )

    async def _receive_whole(
        self, source: _FromAgent | _FromStore, piece: Piece, partial: Partial, moved: Moved
    ) -> bool:
        """Whether this source made the partial file the blob; wrong bytes are dropped.

        When several have contributed nobody can say whose bytes were wrong: then it is asked for all."""
        while True:
            partial.givers.add(source.name)
            if not await source.give(piece, partial, moved):
                return False
            if partial.digest == piece.digest:
                return True
            log.warning(
                "blob.wrong_bytes", digest=piece.digest, found=partial.digest, of=sorted(partial.givers)
            )
            alone = partial.givers == {source.name}
            moved(source.kind, -partial.size)
            await asyncio.to_thread(partial.reset)
            if alone:
                source.lied(piece.digest)
                return False

    async def _sources(self, digest: str) -> list[agent_pb2.BlobSources]:
        """Each other agent that has the blob, with the ticket; none if the coordinator cannot be asked."""
        if self._identity is None:
            return []
        request = agent_pb2.FindSourcesRequest(digests=[digest])
        try:
            reply = await self._stub().FindSources(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.info("blob.no_sources", digest=digest, why=error.details())
            return []
        now_s = time.monotonic()
        return [
            agent_pb2.BlobSources(ticket=found.ticket, sources=[source])
            for found in reply.blobs
            if found.ticket.digest == digest
            for source in found.sources[:SOURCES_ASKED]
            if source.agent_id not in self._liars
            and self._unreachable.get(source.agent_id, -UNREACHABLE_S) + UNREACHABLE_S <= now_s
        ]

    async def receive_from_agent(
        self, found: agent_pb2.BlobSources, piece: Piece, partial: Partial, moved: Moved
    ) -> bool:
        """Whether there are as many bytes as there should be now."""
        assert self._identity is not None
        source = found.sources[0]
        host = f"[{source.host}]" if ":" in source.host else source.host
        before = partial.size
        request = agent_pb2.GetPeerBlobRequest(ticket=found.ticket, offset=partial.size)
        about = {"digest": piece.digest, "agent": source.agent_id, "address": f"{host}:{source.port}"}
        try:
            async with wire.peer_channel(
                self._identity(), source.agent_id, f"{host}:{source.port}"
            ) as channel:
                call = agent_pb2_grpc.PeerServiceStub(channel).GetBlob(request)
                try:
                    patience_s = PEER_CONNECT_TIMEOUT_S
                    while True:
                        async with asyncio.timeout(patience_s):
                            chunk = await call.read()
                        if chunk is grpc.aio.EOF:
                            break
                        patience_s = PEER_STALL_TIMEOUT_S
                        await asyncio.to_thread(partial.append, chunk.data)
                        moved("agents", len(chunk.data))
                        if partial.size > piece.bytes:
                            break
                finally:
                    call.cancel()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            why = error.details() if isinstance(error, grpc.aio.AioRpcError) else "it is silent"
            log.info("blob.agent_gave_up", **about, bytes=partial.size - before, why=why)
            refusal = wire.refusal_of(error) if isinstance(error, grpc.aio.AioRpcError) else None
            if refusal == agent_pb2.REFUSAL_RATE_LIMITED:
                self._busy.add(piece.digest)
            elif refusal is None and partial.size == before:
                self._unreachable[source.agent_id] = time.monotonic()
        else:
            log.info("blob.from_agent", **about, bytes=partial.size - before)
        return partial.size >= piece.bytes

    def lied(self, agent_id: str, digest: str) -> None:
        log.warning("blob.agent_served_wrong_bytes", agent=agent_id, digest=digest)
        self._liars.add(agent_id)
        self._accuse(agent_id, digest)

    async def receive_from_store(self, piece: Piece, partial: Partial, moved: Moved) -> None:
        """All that is missing; raise gRPC errors, TransferBroken or TimeoutError."""
        if not await self._receive_presigned(piece.digest, partial, moved):
            await self._receive_streamed(piece, partial, moved)

    async def _receive_streamed(self, piece: Piece, partial: Partial, moved: Moved) -> None:
        call = self._stub().GetBlob(agent_pb2.GetBlobRequest(digest=piece.digest, offset=partial.size))
        try:
            while True:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    chunk = await call.read()
                if chunk is grpc.aio.EOF:
                    break
                await asyncio.to_thread(partial.append, chunk.data)
                moved("store", len(chunk.data))
                if partial.size > piece.bytes:
                    break
        finally:
            call.cancel()

    async def _receive_presigned(self, digest: str, partial: Partial, moved: Moved) -> bool:
        """Whether this coordinator hands out URLs.  Raise TransferBroken when the store gives nothing."""

        def take(data: bytes) -> None:
            partial.append(data)
            moved("store", len(data))

        delay_s = FIRST_DELAY_S
        for left in reversed(range(PRESIGNED_TRIES)):
            request = agent_pb2.PresignGetRequest(digest=digest)
            where = await _unless_unknown(self._stub().PresignGet(request, timeout=CALL_TIMEOUT_S))
            if where is None or not where.url:
                return False
            if partial.size >= where.bytes:
                break
            transfer = Transfer(where.url)
            try:
                await self._run(transfer, functools.partial(transfer.get, partial.size, where.bytes, take))
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
        """Store the blob at the coordinator unless it is there.  Raise BlobError if it is not in the cache.

        One upload of a blob at a time: to the coordinator, asking for it says that the one before is over."""
        async with self._uploading.setdefault(digest, asyncio.Lock()):
            await self._upload(digest)

    async def _upload(self, digest: str) -> None:
        request = agent_pb2.FindBlobsRequest(digests=[digest])
        found = await self._stub().FindBlobs(request, timeout=CALL_TIMEOUT_S)
        if not found.missing:
            return
        try:
            size = self.cache.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise BlobError(f"blob {digest}: is not in {self.cache.root}") from error
        if await self._upload_presigned(digest, size):
            return
        offset = min(found.received.get(digest, 0), size)
        if offset:
            log.info("blob.upload_goes_on", digest=digest, offset=offset, bytes=size)
        with self.uploads.counted(size - offset):
            call = self._stub().PutBlob(self._chunks(digest, size, offset))
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
            with self.uploads.counted(size):
                await self._run(
                    transfer, functools.partial(transfer.put, self.cache.path(digest), where.headers)
                )
        except TransferBroken:
            if not await asyncio.to_thread(self.cache.recheck, digest):
                raise BlobError(f"blob {digest}: its file in the cache is damaged") from None
            raise
        return True

    async def _chunks(self, digest: str, size: int, offset: int) -> AsyncIterator[agent_pb2.PutBlobRequest]:
        yield agent_pb2.PutBlobRequest(
            header=agent_pb2.PutBlobHeader(digest=digest, bytes=size, offset=offset)
        )
        with await asyncio.to_thread(open, self.cache.path(digest), "rb") as file:
            file.seek(offset)
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


class _FromAgent:
    kind = "agents"

    def __init__(self, client: BlobClient, found: agent_pb2.BlobSources) -> None:
        self.name = found.sources[0].agent_id
        self._client = client
        self._found = found

    async def give(self, piece: Piece, partial: Partial, moved: Moved) -> bool:
        return await self._client.receive_from_agent(self._found, piece, partial, moved)

    def lied(self, digest: str) -> None:
        self._client.lied(self.name, digest)


class _FromStore:
    kind = "store"
    name = "the store"

    def __init__(self, client: BlobClient) -> None:
        self._client = client

    async def give(self, piece: Piece, partial: Partial, moved: Moved) -> bool:
        await self._client.receive_from_store(piece, partial, moved)
        return True

    def lied(self, digest: str) -> None:
        """The warning said it; the caller tries once more, then gives up."""


class Partial:
    """What has come of a blob, in a file that a later attempt goes on with.  All methods block."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Read what an earlier attempt left; more than the blob can have is dropped."""
        self._path = path
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115 - closed by `close`
        self.givers: set[str] = set()
        """Who has contributed.  What an earlier attempt left has a giver that nobody knows any more."""
        self._file.seek(0)
        self._hash = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()
        if self.size > most_bytes:
            self.reset()
        elif self.size:
            self.givers.add("an earlier attempt")

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def reset(self) -> None:
        """Begin again."""
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.size = 0
        self.givers = set()

    def keep(self, path: Path) -> None:
        """The blob is whole: give it its name, also after a power cut."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._path, path)

    def close(self) -> None:
        self._file.close()
        if not self.size:
            self._path.unlink(missing_ok=True)


class ShardReports:
    """Uploads the shards that workers hand up and reports each, for as long as it takes; and tells what
    workers without a shard say of the state.

    Only a refusal ends an attempt for good: the coordinator being away, or its disk full, is waited out."""

    def __init__(self, stub: Stub, blobs: BlobClient, drained: Callable[[str], None]) -> None:
        self._stub = stub
        self._blobs = blobs
        self._drained = drained
        self._outstanding: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    def outstanding(self, job_id: str) -> int:
        return self._outstanding[job_id]

    @property
    def all_stored(self) -> bool:
        """Whether nothing is outstanding, of any job."""
        return not self._outstanding

    @property
    def waiting(self) -> set[str]:
        """Digests of what is not stored yet: no copy but ours may be anywhere."""
        return set(self._waiting).difference(("",))

    def add(self, report: agent_pb2.ReportShardRequest) -> None:
        self._waiting[report.digest] += 1
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
                if report.digest:
                    async with self._slots:
                        await self._blobs.upload(report.digest)
                report.upload_bytes_per_s = self._blobs.uploads.bytes_per_s
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
        self._waiting -= Counter((report.digest,))
        self._outstanding[report.job_id] -= 1
        if not self._outstanding[report.job_id]:
            del self._outstanding[report.job_id]
            self._drained(report.job_id)


def dataset_pieces(manifest_json: str) -> tuple[Piece, ...]:
    """The shards that a `muster-dataset-1` manifest names.  Raise BlobError if it is malformed."""
    try:
        manifest = json.loads(manifest_json)
        token_bytes = _TOKEN_BYTES[manifest["dtype"]]
        named = {
            shard["digest"]: int(shard["tokens"]) * token_bytes
            for shards in manifest["splits"].values()
            for shard in shards
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BlobError(f"dataset manifest: malformed ({error!r}); prepare the dataset again") from error
    return tuple(Piece(digest=digest, bytes=size) for digest, size in named.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the agent needs of a `muster-checkpoint-1` manifest that the coordinator signed."""

    step: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    @staticmethod
    def parse(manifest_json: str, *, job_id: str, authority: str) -> Checkpoint:
        """Raise BlobError unless the authority (its fingerprint) vouches for it, and it is of this job."""
        try:
            return Checkpoint.of(seal.verified(manifest_json, authority).manifest(), job_id)
        except seal.SealError as error:
            raise BlobError(f"checkpoint manifest: {error}") from error

    @staticmethod
    def of(manifest: Mapping[str, Any], job_id: str) -> Checkpoint:
        """Raise BlobError if it is malformed, or of another job."""
        try:
            if (manifest["format"], manifest["job"]) != ("muster-checkpoint-1", job_id):
                raise BlobError(
                    f"checkpoint manifest: a {manifest['format']!r} of job {manifest['job']!r}; expected a "
                    f"muster-checkpoint-1 of job {job_id}"
                )
            return Checkpoint(
                step=int(manifest["step"]),
                pieces=tuple(
                    Piece(digest=shard["digest"], bytes=int(shard["bytes"])) for shard in manifest["shards"]
                ),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BlobError(f"checkpoint manifest: malformed ({error!r})") from error
