"""Blobs over gRPC: find, get and put for agents and operators, and presigned URLs for agents."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TypeVar

from coordinator import translate
from coordinator.access import CallRefusedError, caller
from coordinator.blobs import (
    BlobRefusedError,
    BlobStore,
    BlobsUnavailableError,
    BlobUpload,
    PresignedTransfers,
)
from coordinator.core.model import AgentId, Refusal
from coordinator.identity import Principal, Role
from coordinator.metrics import Metrics
from coordinator.unreported import Unreported
from protos import agent_pb2

CHECKS_AT_ONCE = 2
T = TypeVar("T")


class _UnderWay:
    """An upload whose messages are waited for, until its sender is known to have given it up."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.given_up = False
        self._limit: asyncio.Timeout | None = None

    def give_up(self) -> None:
        self.given_up = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(0)

    async def next(
        self, requests: AsyncIterator[agent_pb2.PutBlobRequest], most_s: float
    ) -> agent_pb2.PutBlobRequest | None:
        """The next message, None at the end.  Raise TimeoutError after `most_s`, or at once when given up."""
        try:
            async with asyncio.timeout(0 if self.given_up else most_s) as self._limit:
                return await anext(requests)
        except StopAsyncIteration:
            return None
        finally:
            self._limit = None


class BlobService:
    """The calls.  Disk and hash work is done in threads; transfers are bounded for each peer."""

    def __init__(
        self,
        store: BlobStore,
        *,
        transfers_per_peer: int,
        chunk_timeout_s: float,
        slowest_bytes_per_s: int,
        metrics: Metrics,
        unreported: Unreported,
        wrong_bytes: Callable[[AgentId, str], None],
    ) -> None:
        """`wrong_bytes` hears of an agent whose upload was not the blob with this digest."""
        self._store = store
        self._transfers_per_peer = transfers_per_peer
        self._chunk_timeout_s = chunk_timeout_s
        self._slowest_bytes_per_s = slowest_bytes_per_s
        self._metrics = metrics
        self._unreported = unreported
        self._wrong_bytes = wrong_bytes
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._uploads: dict[tuple[str, str], _UnderWay] = {}
        self._checks: dict[tuple[str, str, int], asyncio.Task[None]] = {}
        self._checking = asyncio.Semaphore(CHECKS_AT_ONCE)

    @contextlib.contextmanager
    def _slot(self, kind: str) -> Iterator[None]:
        key = (kind, caller.get().id)
        if self._under_way[key] >= self._transfers_per_peer:
            raise CallRefusedError(
                Refusal.RATE_LIMITED,
                f"{self._transfers_per_peer} {kind}s of this peer are under way already; wait for one to end",
            )
        self._under_way[key] += 1
        try:
            yield
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]

    async def find(self, request: agent_pb2.FindBlobsRequest) -> agent_pb2.FindBlobsReply:
        digests = translate.digests(request)
        if _agent() is not None:
            await self._end_stale(digests)
        missing = await asyncio.to_thread(self._store.missing, digests)
        received = await asyncio.to_thread(self._store.received, _peer(), missing)
        return agent_pb2.FindBlobsReply(missing=missing, received=received)

    async def _end_stale(self, digests: Iterable[str]) -> None:
        """An agent that asks about a blob is not sending it: its line broke, and we have not heard of that yet.
        What came is put aside, for it to go on with, and its place is free."""
        stale = [upload for digest in digests if (upload := self._uploads.get((_peer(), digest)))]
        for upload in stale:
            upload.give_up()
        for upload in stale:
            await upload.ended.wait()

    @contextlib.contextmanager
    def _uploading(self, peer: str, digest: str, upload: _UnderWay) -> Iterator[None]:
        key = (peer, digest)
        self._uploads[key] = upload
        try:
            yield
        finally:
            upload.ended.set()
            if self._uploads.get(key) is upload:
                del self._uploads[key]

    async def get(self, request: agent_pb2.GetBlobRequest) -> AsyncIterator[agent_pb2.BlobChunk]:
        digest = translate.digest(request.digest)
        offset = translate.sequence(request.offset, "offset")
        with self._slot("download"):
            reader = await _opened(lambda: self._store.read(digest, offset), lambda opened: opened.close())
            try:
                while data := await asyncio.to_thread(reader.chunk):
                    yield agent_pb2.BlobChunk(data=data)
                    self._metrics.blob_bytes.labels("down").inc(len(data))
            finally:
                await asyncio.shield(asyncio.to_thread(reader.close))

    async def put(self, requests: AsyncIterator[agent_pb2.PutBlobRequest]) -> agent_pb2.PutBlobReply:
        under_way = _UnderWay()
        with self._slot("upload"):
            first = await self._next(under_way, requests, self._chunk_timeout_s)
            if first is None:
                raise translate.MalformedError("header: missing; the upload had no message")
            digest, size, offset = translate.blob_header(first)
            with self._uploading(_peer(), digest, under_way):
                existed = await self._receive(under_way, requests, digest, size, offset)
        return agent_pb2.PutBlobReply(existed=existed)

    async def _receive(
        self,
        under_way: _UnderWay,
        requests: AsyncIterator[agent_pb2.PutBlobRequest],
        digest: str,
        size: int,
        offset: int,
    ) -> bool:
        """Whether the blob was there already."""
        peer, agent_id = _peer(), _agent()
        # Whoever submits a job uploads its data first, and may have much of it.
        lift = self._charge(agent_id, digest, size)
        upload: BlobUpload | None = None
        try:
            upload = await _opened(
                lambda: self._store.upload(digest, size, sender=peer, offset=offset), _suspend
            )
        finally:
            if upload is None:
                lift()
        if upload is None:
            return True
        end = time.monotonic() + self._chunk_timeout_s + size / self._slowest_bytes_per_s
        try:
            while (request := await self._next(under_way, requests, end - time.monotonic())) is not None:
                data = translate.blob_data(request)
                await asyncio.to_thread(self._write, upload, data)
            await asyncio.to_thread(upload.finish)
            if agent_id is not None:
                self._unreported.stored(agent_id, digest)
        except (BlobRefusedError, translate.MalformedError) as error:
            self._hold_against(caller.get(), digest, error)
            await asyncio.shield(asyncio.to_thread(upload.discard))
            lift()
            raise
        finally:
            # The line broke, or nothing came for too long: its sender goes on from here.
            await asyncio.shield(asyncio.to_thread(upload.suspend))
        return False

    def _charge(self, agent_id: AgentId | None, digest: str, size: int) -> Callable[[], None]:
        """Count an agent's upload; returns what takes that back, should nothing of it be kept."""
        if agent_id is None or not self._unreported.charge(agent_id, digest, size):
            return lambda: None
        return functools.partial(self._unreported.lift, agent_id, digest)

    def _write(self, upload: BlobUpload, data: bytes) -> None:
        """In the thread, both: what a cancelled call has begun to write is kept, and counts."""
        upload.write(data)
        self._metrics.blob_bytes.labels("up").inc(len(data))

    async def presign_put(self, request: agent_pb2.PresignPutRequest) -> agent_pb2.PresignPutReply:
        digest, size = translate.presign_put(request)
        presigned = self._store.presigned
        if presigned is None:
            return agent_pb2.PresignPutReply()
        if (_peer(), digest, size) in self._checks:
            return agent_pb2.PresignPutReply(received=True)
        found = await asyncio.to_thread(presigned.put, _peer(), digest, size)
        if found is None:
            return agent_pb2.PresignPutReply(received=True)
        return agent_pb2.PresignPutReply(url=found.url, headers=found.headers)

    async def presign_get(self, request: agent_pb2.PresignGetRequest) -> agent_pb2.PresignGetReply:
        digest = translate.digest(request.digest)
        presigned = self._store.presigned
        if presigned is None:
            return agent_pb2.PresignGetReply()
        found = await asyncio.to_thread(presigned.get, digest)
        return agent_pb2.PresignGetReply(url=found.url, bytes=found.size)

    async def take_in(self, digest: str, size: int) -> None:
        """Hash what the caller has sent by a presigned PUT, so that it is a blob or is refused.

        A call that ends before that leaves it running, and the next one waits for the same result."""
        if self._store.presigned is None:
            return
        key = (_peer(), digest, size)
        check = self._checks.get(key)
        if check is None:
            check = asyncio.create_task(self._take_in(self._store.presigned, *key), name=f"checking {digest}")
            self._checks[key] = check
            check.add_done_callback(lambda done: self._checked(key, done))
        await asyncio.shield(check)

    async def _take_in(self, presigned: PresignedTransfers, peer: str, digest: str, size: int) -> None:
        principal = caller.get()  # of the report that began this check
        async with self._checking:
            try:
                await asyncio.to_thread(presigned.take_in, peer, digest, size)
            except BlobRefusedError as error:
                self._hold_against(principal, digest, error)
                raise

    def _hold_against(self, sender: Principal, digest: str, error: Exception) -> None:
        wrong = isinstance(error, BlobRefusedError) and error.refusal is Refusal.DIGEST_MISMATCH
        if wrong and sender.role is Role.AGENT:
            self._wrong_bytes(AgentId(sender.id), digest)

    def _checked(self, key: tuple[str, str, int], done: asyncio.Task[None]) -> None:
        del self._checks[key]
        if not done.cancelled():
            done.exception()  # whoever still waits hears of it; nobody has to

    async def stop(self) -> None:
        """Give up the checks under way; what they were about is asked for again."""
        self._store.close()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)

    async def _next(
        self, under_way: _UnderWay, requests: AsyncIterator[agent_pb2.PutBlobRequest], left_s: float
    ) -> agent_pb2.PutBlobRequest | None:
        """The next message, None at the end.  `left_s` is what is left for the upload as a whole."""
        try:
            return await under_way.next(requests, min(self._chunk_timeout_s, left_s))
        except TimeoutError:
            why = (
                "its sender asked what is missing of it"
                if under_way.given_up
                else f"nothing came for {self._chunk_timeout_s:g} s"
                if left_s > self._chunk_timeout_s
                else f"slower than {self._slowest_bytes_per_s} bytes a second"
            )
            # No refusal: a line may be so slow, and the shard is still wanted.
            raise BlobsUnavailableError(f"data: {why}; go on where it broke off") from None


async def _opened(opened: Callable[[], T], drop: Callable[[T], object]) -> T:
    """Open something in a thread, for a store may be another machine.  What a cancelled call opened is dropped."""
    opening = asyncio.ensure_future(asyncio.to_thread(opened))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda done: done.exception() or drop(done.result()))
        raise


def _suspend(upload: BlobUpload | None) -> None:
    if upload is not None:
        upload.suspend()


def _agent() -> AgentId | None:
    principal = caller.get()
    return AgentId(principal.id) if principal.role is Role.AGENT else None


def _peer() -> str:
    principal = caller.get()
    return f"{principal.role.value}-{principal.id}"
