from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from agent.blobs import BlobCache, BlobClient, Checkpoint, Piece, UploadMeter, dataset_pieces
from agent.errors import BlobError
from agent.home import Home
from protos import agent_pb2_grpc, wire
from tests.agent.fake_coordinator import FakeCoordinator

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()
PIECE = Piece(digest=DIGEST, bytes=len(DATA))


@pytest.fixture
async def blobs(coordinator: FakeCoordinator, home: Home) -> AsyncIterator[BlobClient]:
    identity = coordinator.authority.identity("a1", coordinator.address)
    async with wire.aio_channel(identity) as channel:
        yield BlobClient(lambda: agent_pb2_grpc.AgentServiceStub(channel), BlobCache(home.blobs))


def test_the_upload_rate_counts_time_once_and_forgets() -> None:
    now_s = 1000.0
    meter = UploadMeter(lambda: now_s)
    assert meter.bytes_per_s == 0
    with meter.counted(30_000_000):
        now_s += 1
        with meter.counted(10_000_000):  # beside it
            now_s += 3
    assert meter.bytes_per_s == 10_000_000
    with meter.counted(1000):  # says more of the latency than of the line
        now_s += 1
    assert meter.bytes_per_s == 10_000_000
    with meter.counted(20_000_000):
        now_s += 1
    assert meter.bytes_per_s == 15_000_000
    with contextlib.suppress(TimeoutError), meter.counted(50_000_000):
        now_s += 1
        raise TimeoutError
    assert meter.bytes_per_s == 15_000_000
    now_s += 3600
    assert meter.bytes_per_s == 0
    with meter.counted(4_000_000):
        now_s += 2
    assert meter.bytes_per_s == 2_000_000


async def test_blob_is_fetched_once_and_verified(blobs: BlobClient, coordinator: FakeCoordinator) -> None:
    coordinator.blobs[DIGEST] = DATA
    assert (await blobs.fetch(PIECE)).read_bytes() == DATA
    await blobs.fetch(PIECE)
    assert coordinator.gets == [(DIGEST, 0)]


async def test_broken_download_resumes_where_it_broke(
    blobs: BlobClient, coordinator: FakeCoordinator
) -> None:
    coordinator.blobs[DIGEST] = DATA
    coordinator.break_gets_after = 4000
    with pytest.raises(grpc.aio.AioRpcError):
        await blobs.fetch(PIECE)
    assert not blobs.cache.path(DIGEST).exists()
    assert (await blobs.fetch(PIECE)).read_bytes() == DATA
    assert coordinator.gets == [(DIGEST, 0), (DIGEST, 4000)]


async def test_bytes_that_hash_to_something_else_never_enter_the_cache(
    blobs: BlobClient, coordinator: FakeCoordinator
) -> None:
    coordinator.blobs[DIGEST] = DATA[:-1] + b"!"
    with pytest.raises(BlobError, match=DIGEST):
        await blobs.fetch(PIECE)
    assert list(blobs.cache.root.iterdir()) == []


async def test_damaged_blob_is_noticed_and_fetched_again(
    blobs: BlobClient, coordinator: FakeCoordinator
) -> None:
    coordinator.blobs[DIGEST] = DATA
    path = await blobs.fetch(PIECE)
    path.write_bytes(b"x" + DATA[1:])
    assert (await blobs.fetch(PIECE)).read_bytes() == DATA
    assert len(coordinator.gets) == 2


async def test_upload_sends_only_what_is_missing(blobs: BlobClient, coordinator: FakeCoordinator) -> None:
    blobs.cache.path(DIGEST).write_bytes(DATA)
    await blobs.upload(DIGEST)
    assert coordinator.blobs == {DIGEST: DATA}
    blobs.cache.path(DIGEST).unlink()
    await blobs.upload(DIGEST)


async def test_upload_of_an_absent_blob_names_it(blobs: BlobClient) -> None:
    with pytest.raises(BlobError, match=DIGEST):
        await blobs.upload(DIGEST)


def test_trim_removes_the_oldest_that_nobody_uses(home: Home) -> None:
    cache = BlobCache(home.blobs)
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]
    for age, digest in enumerate(digests):
        cache.path(digest).write_bytes(b"x" * 100)
        os.utime(cache.path(digest), (age, age))
    assert cache.trim({digests[0]}, 250) == 200
    assert sorted(path.name for path in home.blobs.iterdir()) == sorted([digests[0], digests[3]])
    assert cache.trim(digests, 0) == 0


def test_trim_spares_what_was_used_last_however_old_it_is(home: Home) -> None:
    changes: list[None] = []
    cache = BlobCache(home.blobs, lambda: changes.append(None))
    blobs = [bytes([n]) * 100 for n in range(3)]
    digests = [hashlib.sha256(data).hexdigest() for data in blobs]
    for age, (digest, data) in enumerate(zip(digests, blobs, strict=True)):
        cache.path(digest).write_bytes(data)
        os.utime(cache.path(digest), (age, age))
        cache.fetched(digest)
    changes.clear()
    assert cache.holds(digests[0])
    assert cache.trim((), 100) == 200
    assert cache.listing(10) == {digests[0]}
    assert len(changes) == 1
    assert cache.path(digests[0]).stat().st_mtime == 0, "who has verified it needs not do so again"


def test_trim_spares_what_a_worker_has_just_written_and_not_said_yet(home: Home) -> None:
    cache = BlobCache(home.blobs)
    written, fetched, old = (hashlib.sha256(bytes([n])).hexdigest() for n in range(3))
    for digest in (written, fetched, old):
        cache.path(digest).write_bytes(b"x" * 100)
    cache.fetched(fetched)
    os.utime(cache.path(old), (0, 0))
    assert cache.trim((), 0) == 200
    assert cache.listing(10) == {written}


def test_of_too_many_blobs_those_used_last_are_told_of(home: Home) -> None:
    cache = BlobCache(home.blobs)
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]
    for age, digest in enumerate(digests):
        cache.path(digest).touch()
        os.utime(cache.path(digest), (age, age))
    (home.blobs / f".partial-{digests[0]}").touch()
    assert cache.listing(2) == set(digests[2:])


def test_blob_names_that_are_not_digests_are_refused(home: Home) -> None:
    with pytest.raises(BlobError, match="64 hex digits"):
        BlobCache(home.blobs).path("../identity.json")


def test_malformed_manifests_are_refused() -> None:
    with pytest.raises(BlobError, match="malformed"):
        dataset_pieces('{"splits": [1]}')
    with pytest.raises(BlobError, match="malformed"):
        Checkpoint.of({"format": "muster-checkpoint-1", "job": "j1", "step": "x"}, "j1")


async def test_one_blob_is_uploaded_once_at_a_time(blobs: BlobClient, coordinator: FakeCoordinator) -> None:
    blobs.cache.path(DIGEST).write_bytes(DATA)
    await asyncio.gather(*(blobs.upload(DIGEST) for _ in range(3)))
    assert coordinator.blobs[DIGEST] == DATA
    assert coordinator.puts == [DIGEST]
