"""Blobs over gRPC, the same for agents and operators: find, get, put."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from coordinator import translate
from coordinator.access import CallRefusedError, caller
from coordinator.blobs import BlobStore
from coordinator.core.model import Refusal
from coordinator.metrics import Metrics
from protos import agent_pb2


class BlobService:
    """The three calls.  Disk and hash work is done in threads; transfers are bounded for each peer."""

    def __init__(
        self, store: BlobStore, *, transfers_per_peer: int, chunk_timeout_s: float, metrics: Metrics
    ) -> None:
        self._store = store
        self._transfers_per_peer = transfers_per_peer
        self._chunk_timeout_s = chunk_timeout_s
        self._metrics = metrics
        self._under_way: Counter[tuple[str, str]] = Counter()

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
        return agent_pb2.FindBlobsReply(missing=await asyncio.to_thread(self._store.missing, digests))

    async def get(self, request: agent_pb2.GetBlobRequest) -> AsyncIterator[agent_pb2.BlobChunk]:
        digest = translate.digest(request.digest)
        offset = translate.sequence(request.offset, "offset")
        with self._slot("download"):
            # Opening does not wait for the disk, and in a thread a cancelled call would lose what it opened.
            reader = self._store.read(digest, offset)
            try:
                while data := await asyncio.to_thread(reader.chunk):
                    yield agent_pb2.BlobChunk(data=data)
                    self._metrics.blob_bytes.labels("down").inc(len(data))
            finally:
                await asyncio.shield(asyncio.to_thread(reader.close))

    async def put(self, requests: AsyncIterator[agent_pb2.PutBlobRequest]) -> agent_pb2.PutBlobReply:
        with self._slot("upload"):
            first = await self._next(requests)
            if first is None:
                raise translate.MalformedError("header: missing; the upload had no message")
            digest, size = translate.blob_header(first)
            upload = self._store.upload(digest, size)
            if upload is None:
                return agent_pb2.PutBlobReply(existed=True)
            try:
                while (request := await self._next(requests)) is not None:
                    data = translate.blob_data(request)
                    await asyncio.to_thread(upload.write, data)
                    self._metrics.blob_bytes.labels("up").inc(len(data))
                await asyncio.to_thread(upload.finish)
            finally:
                await asyncio.shield(asyncio.to_thread(upload.discard))
        return agent_pb2.PutBlobReply(existed=False)

    async def _next(
        self, requests: AsyncIterator[agent_pb2.PutBlobRequest]
    ) -> agent_pb2.PutBlobRequest | None:
        try:
            async with asyncio.timeout(self._chunk_timeout_s):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise CallRefusedError(
                Refusal.INVALID, f"data: nothing came for {self._chunk_timeout_s:g} s; send the blob again"
            ) from None
