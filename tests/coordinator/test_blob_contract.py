"""What every blob store promises: a blob exists or it does not, and whatever goes wrong, nothing half-written
stays.  The same tests run on the directory and on a bucket of a real S3 server; what is promised to whoever
reads over the network is tested on the coordinator's streams before either, and on another agent's cache."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import obstore
import pytest
from obstore.store import S3Store as Outsider

from agent.blobs import BlobCache, BlobClient
from agent.errors import BlobError
from coordinator.blobs import SUSPENDED_PER_SENDER, BlobRefusedError, BlobStore, BlobUpload, DirectoryStore
from coordinator.blobs_s3 import Bucket, Place, S3Store
from coordinator.core.model import Refusal
from protos import agent_pb2, agent_pb2_grpc, ticket, wire
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, running_coordinator
from tests.coordinator.lender import Lender, lender, piece_of
from tests.coordinator.s3_server import BUCKET, KEY, REGION, S3Server, s3_server

LIMITS = {"max_bytes": 64 << 20, "reserve_bytes": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@dataclass(kw_only=True)
class Kind:
    """One kind of store, and how a test reaches behind it."""

    open: Callable[..., BlobStore]
    damage: Callable[[str, bytes | None], None]
    """Give a blob other bytes, or delete it."""
    everything: Callable[[], list[str]]
    """Names of all files or objects there are, blobs or not."""


def directory(root: Path) -> Kind:
    def opened(**changes: Any) -> BlobStore:
        return DirectoryStore(root, **{**LIMITS, **changes})

    def damage(digest: str, data: bytes | None) -> None:
        path = root / digest[:2] / digest
        path.unlink() if data is None else path.write_bytes(data)

    def everything() -> list[str]:
        return sorted(path.name for path in root.rglob("*") if path.is_file())

    return Kind(open=opened, damage=damage, everything=everything)


def s3(url: str, root: Path) -> Kind:
    prefix = secrets.token_hex(4)
    outsider = Outsider(
        BUCKET,
        prefix=prefix,
        endpoint=url,
        region=REGION,
        access_key_id=KEY.access_key_id,
        secret_access_key=KEY.secret_access_key,
        client_options={"allow_http": True},
    )
    place = Place(
        bucket=BUCKET, prefix=prefix, endpoint=url, agents_endpoint=url, region=REGION, credentials=KEY
    )

    def opened(**changes: Any) -> BlobStore:
        limits = {**LIMITS, "url_expiry_s": 60, "staged_bytes_per_peer": 1 << 20, **changes}
        return S3Store(Bucket(place), incoming=root, **limits)

    def damage(digest: str, data: bytes | None) -> None:
        key = f"blobs/{digest[:2]}/{digest}"
        obstore.delete(outsider, key) if data is None else obstore.put(outsider, key, data)

    def everything() -> list[str]:
        objects = [found["path"] for page in obstore.list(outsider) for found in page]
        return sorted([*(key.rpartition("/")[2] for key in objects), *(path.name for path in root.iterdir())])

    return Kind(open=opened, damage=damage, everything=everything)


@pytest.fixture(params=["directory", "s3"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "directory":
        return directory(tmp_path)
    return s3(request.getfixturevalue("server").url, tmp_path)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(blobs: BlobStore, data: bytes, digest: str | None = None, size: int | None = None) -> bool:
    """Whether it was new."""
    upload = blobs.upload(digest or digest_of(data), len(data) if size is None else size)
    if upload is None:
        return False
    try:
        for start in range(0, len(data), 1 << 20):
            upload.write(data[start : start + (1 << 20)])
        upload.finish()
    finally:
        upload.discard()
    return True


def read(blobs: BlobStore, digest: str, offset: int = 0) -> bytes:
    reader = blobs.read(digest, offset)
    chunks = []
    while chunk := reader.chunk():
        assert len(chunk) <= 1 << 20
        chunks.append(chunk)
    reader.close()
    assert reader.chunk() == b""
    return b"".join(chunks)


def test_a_blob_is_read_back_whole_and_from_an_offset(kind: Kind) -> None:
    blobs, data = kind.open(), os.urandom((9 << 20) + 123)
    assert blobs.size(digest_of(data)) is None
    assert put(blobs, data)
    assert blobs.size(digest_of(data)) == len(data)
    for offset in (0, 1, (8 << 20) + 7, len(data)):
        assert read(blobs, digest_of(data), offset) == data[offset:]
    assert kind.everything() == [digest_of(data)]


def test_the_empty_blob_is_a_blob(kind: Kind) -> None:
    blobs = kind.open()
    assert put(blobs, b"")
    assert blobs.size(digest_of(b"")) == 0
    assert read(blobs, digest_of(b"")) == b""
    assert blobs.verify(digest_of(b""), 0) == ""


def test_a_stored_blob_is_not_taken_again(kind: Kind) -> None:
    assert put(kind.open(), b"abc")
    assert not put(kind.open(), b"abc")


def test_missing_names_what_is_not_stored_in_the_order_asked(kind: Kind) -> None:
    blobs = kind.open()
    names = [digest_of(bytes([n])) for n in range(40)]
    for n in (3, 17):
        put(blobs, bytes([n]))
    assert blobs.missing(names) == [name for n, name in enumerate(names) if n not in {3, 17}]
    assert blobs.missing([]) == []


@pytest.mark.parametrize(
    ("data", "digest", "size", "refusal"),
    [
        (b"abc", digest_of(b"other"), 3, Refusal.DIGEST_MISMATCH),
        (b"abc", digest_of(b"abc"), 4, Refusal.INVALID),
        (b"abcd", digest_of(b"abc"), 3, Refusal.INVALID),
        (b"", digest_of(b"abc"), 1 << 40, Refusal.TOO_LARGE),
    ],
    ids=["wrong digest", "truncated", "too long", "over the bound"],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(
    kind: Kind, data: bytes, digest: str, size: int, refusal: Refusal
) -> None:
    blobs = kind.open()
    with pytest.raises(BlobRefusedError) as refused:
        put(blobs, data, digest, size)
    assert refused.value.refusal is refusal
    assert kind.everything() == []
    assert blobs.missing([digest]) == [digest]


def test_an_upload_is_no_blob_before_its_end_and_nothing_after_it_was_dropped(kind: Kind) -> None:
    blobs = kind.open()
    upload = blobs.upload(digest_of(b"abc"), 3)
    assert upload is not None
    upload.write(b"abc")
    assert blobs.size(digest_of(b"abc")) is None
    assert list(blobs.stored()) == []
    upload.discard()
    upload.finish()
    assert kind.everything() == []


def test_what_a_killed_process_left_is_removed_at_the_next_start(kind: Kind) -> None:
    upload = kind.open().upload(digest_of(b"abc"), 3)
    assert upload is not None
    upload.write(b"ab")
    assert len(kind.everything()) == 1
    kind.open()
    assert kind.everything() == []
    upload.discard()


def test_uploads_never_touch_the_reserve_of_the_coordinators_disk(kind: Kind) -> None:
    with pytest.raises(BlobRefusedError, match="in reserve") as refused:
        kind.open(reserve_bytes=1 << 62).upload(digest_of(b"abc"), 3)
    assert refused.value.refusal is Refusal.NO_SPACE


def begin(blobs: BlobStore, data: bytes, sender: str, *, sent: int, offset: int = 0) -> BlobUpload:
    """An upload of which bytes from an offset up to another have come."""
    upload = blobs.upload(digest_of(data), len(data), sender=sender, offset=offset)
    assert upload is not None
    upload.write(data[offset:sent])
    return upload


def test_an_upload_that_broke_goes_on_where_it_ended_also_after_a_restart(kind: Kind) -> None:
    data = os.urandom(3_000)
    digest = digest_of(data)
    begin(kind.open(), data, "agent-a", sent=1_000).suspend()
    blobs = kind.open()
    assert blobs.received("agent-a", [digest, digest_of(b"other")]) == {digest: 1_000}
    begin(blobs, data, "agent-a", sent=2_000, offset=1_000).suspend()
    assert blobs.received("agent-a", [digest]) == {digest: 2_000}
    assert blobs.missing([digest]) == [digest], "it is no blob yet"
    upload = begin(blobs, data, "agent-a", sent=3_000, offset=1_500)  # also before the end of what is kept
    upload.finish()
    assert read(blobs, digest) == data
    assert kind.everything() == [digest]


def test_nobody_goes_on_with_what_another_sent(kind: Kind) -> None:
    blobs, data = kind.open(), b"abcdef"
    begin(blobs, data, "agent-a", sent=3).suspend()
    assert blobs.received("agent-b", [digest_of(data)]) == {}
    for offset, sender in ((3, "agent-b"), (4, "agent-a")):
        with pytest.raises(BlobRefusedError, match="ask again what is missing") as refused:
            blobs.upload(digest_of(data), len(data), sender=sender, offset=offset)
        assert refused.value.refusal is Refusal.UNKNOWN_BLOB
    begin(blobs, data, "agent-a", sent=3).discard()  # from the start, and given up for good
    assert blobs.received("agent-a", [digest_of(data)]) == {}
    assert kind.everything() == []


def test_a_wrong_beginning_does_not_outlive_the_digest(kind: Kind) -> None:
    blobs, data = kind.open(), b"abcdef"
    upload = blobs.upload(digest_of(data), len(data), sender="agent-a")
    assert upload is not None
    upload.write(b"xyz")
    upload.suspend()
    upload = begin(blobs, data, "agent-a", sent=6, offset=3)
    with pytest.raises(BlobRefusedError) as refused:
        upload.finish()
    assert refused.value.refusal is Refusal.DIGEST_MISMATCH
    upload.discard()
    assert kind.everything() == []


def test_what_is_kept_of_broken_uploads_is_bounded_and_goes_in_time(kind: Kind) -> None:
    later = 0.0
    blobs = kind.open(now=lambda: time.time() + later)
    pieces = [bytes([n]) * 10 for n in range(SUSPENDED_PER_SENDER + 2)]
    for data in pieces:
        begin(blobs, data, "agent-a", sent=5).suspend()
    digests = [digest_of(data) for data in pieces]
    assert len(blobs.received("agent-a", digests)) == SUSPENDED_PER_SENDER
    begin(blobs, b"another's", "agent-b", sent=5).suspend()
    assert len(blobs.received("agent-a", digests)) == SUSPENDED_PER_SENDER
    assert blobs.discard_unfinished(100) == 0
    later = 200.0
    assert blobs.discard_unfinished(100) == SUSPENDED_PER_SENDER + 1
    assert kind.everything() == []


def test_the_same_blob_from_many_at_once_is_stored_once(kind: Kind) -> None:
    blobs, data = kind.open(), os.urandom(50_000)
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def one() -> None:
        try:
            upload = blobs.upload(digest_of(data), len(data))
            assert upload is not None
            together.wait()
            upload.write(data)
            upload.finish()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert kind.everything() == [digest_of(data)]
    assert blobs.verify(digest_of(data), len(data)) == ""


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(b"abd", "damaged"), (b"ab", "2 bytes instead of 3"), (None, "missing")],
    ids=["flipped", "truncated", "deleted"],
)
def test_verify_says_what_is_wrong_with_a_stored_blob(kind: Kind, damage: bytes | None, problem: str) -> None:
    blobs = kind.open()
    put(blobs, b"abc")
    assert blobs.verify(digest_of(b"abc"), 3) == ""
    kind.damage(digest_of(b"abc"), damage)
    assert problem in blobs.verify(digest_of(b"abc"), 3)


def test_a_truncated_blob_is_replaced_by_the_next_upload(kind: Kind) -> None:
    blobs = kind.open()
    put(blobs, b"abc")
    kind.damage(digest_of(b"abc"), b"ab")
    assert put(blobs, b"abc")
    assert read(blobs, digest_of(b"abc")) == b"abc"


def test_reading_what_is_not_there_is_refused(kind: Kind) -> None:
    blobs = kind.open()
    with pytest.raises(BlobRefusedError) as refused:
        blobs.read(digest_of(b"abc"), 0)
    assert refused.value.refusal is Refusal.UNKNOWN_BLOB
    put(blobs, b"abc")
    with pytest.raises(BlobRefusedError, match="only 3 bytes") as refused:
        blobs.read(digest_of(b"abc"), 4)
    assert refused.value.refusal is Refusal.INVALID


def test_the_sweeper_sees_every_blob_with_its_age_and_removes_it(kind: Kind) -> None:
    for data in (b"one", b"two"):
        put(kind.open(), data)
    blobs = kind.open()
    assert {digest: age_s < 60 for digest, _, age_s in blobs.stored()} == {
        digest_of(b"one"): True,
        digest_of(b"two"): True,
    }
    blobs.remove(digest_of(b"one"))
    blobs.remove(digest_of(b"one"))
    assert [digest for digest, *_ in blobs.stored()] == [digest_of(b"two")]
    assert blobs.missing([digest_of(b"one")]) == [digest_of(b"one")]


def test_a_blob_that_was_asked_for_is_young_again(kind: Kind) -> None:
    later = 0.0
    blobs = kind.open(now=lambda: time.time() + later)
    for data in (b"asked", b"not asked"):
        put(blobs, data)
    later = 10_000.0
    blobs.missing([digest_of(b"asked")])
    later = 10_100.0
    ages = {digest: age_s for digest, _, age_s in blobs.stored()}
    assert 90 < ages[digest_of(b"asked")] < 200
    assert ages[digest_of(b"not asked")] > 10_000


def test_manifests_lie_beside_the_blobs_and_are_none(kind: Kind) -> None:
    blobs = kind.open()
    assert list(blobs.manifests()) == []
    assert blobs.manifest("j1", 7) is None
    put(blobs, b"abc")
    for job_id, step in (("j1", 7), ("j1", 20), ("j2", 7)):
        blobs.put_manifest(job_id, step, f"{job_id} é {step}")
    blobs.put_manifest("j1", 7, "another generation's")
    assert sorted(kind.open().manifests()) == [("j1", 7), ("j1", 20), ("j2", 7)]
    assert [blobs.manifest("j1", step) for step in (7, 20)] == ["another generation's", "j1 é 20"]
    assert [digest for digest, *_ in blobs.stored()] == [digest_of(b"abc")]
    for _ in range(2):
        blobs.remove_manifest("j1", 7)
    assert sorted(blobs.manifests()) == [("j1", 20), ("j2", 7)]


def test_a_manifest_that_could_not_be_written_leaves_the_old_one(kind: Kind) -> None:
    kind.open().put_manifest("j1", 7, "old")
    with pytest.raises(UnicodeEncodeError):
        kind.open().put_manifest("j1", 7, "\ud800")
    assert kind.everything() == ["7.json"]
    assert kind.open().manifest("j1", 7) == "old"


@pytest.mark.parametrize("job_id", ["..", "a/b", "", ".hidden"])
def test_a_manifests_job_leads_nowhere_else(kind: Kind, job_id: str) -> None:
    with pytest.raises(AssertionError):
        kind.open().put_manifest(job_id, 7, "x")


# ------------------------------------------------------------------------- read over the network


@dataclass(kw_only=True)
class Shelf:
    """Somewhere that an agent reads blobs from, over real TLS."""

    put: Callable[[bytes], None]
    damage: Callable[[str, bytes | None], None]
    ask: Callable[[str, int], AsyncIterator[agent_pb2.BlobChunk]]
    client: BlobClient

    async def read(self, digest: str, offset: int = 0) -> bytes:
        got = bytearray()
        async for chunk in self.ask(digest, offset):
            assert 0 < len(chunk.data) <= 1 << 20
            got += chunk.data
        return bytes(got)


@pytest.fixture(params=["directory", "s3", "agent"])
async def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shelf]:
    async with running_coordinator(tmp_path) as c:
        reader = await c.enroll("reader")
        if request.param == "agent":
            async with (
                lender(c, await c.enroll("lender"), tmp_path / "lender") as one,
                lender(c, reader, tmp_path / "reader") as other,
            ):
                yield shelf_of_an_agent(c, one, other)
            return
        (tmp_path / "incoming").mkdir()
        kind = (
            directory(c.home / "blobs")
            if request.param == "directory"
            else s3(request.getfixturevalue("server").url, tmp_path / "incoming")
        )
        store = kind.open()
        c.coordinator._blob_service._store = store  # type: ignore[union-attr]
        store.presigned = (
            None  # read through the coordinator, as operators do; agents' URLs: test_presigned_road
        )
        stub = await c.agent(reader)
        (tmp_path / "reader").mkdir()
        yield Shelf(
            put=lambda data: assert_new(put(store, data)),
            damage=kind.damage,
            ask=lambda digest, offset: stub.GetBlob(
                agent_pb2.GetBlobRequest(digest=digest, offset=offset), timeout=RPC_TIMEOUT_S
            ),
            client=BlobClient(lambda: stub, BlobCache(tmp_path / "reader")),
        )


def assert_new(new: bool) -> None:
    assert new


def shelf_of_an_agent(c: RunningCoordinator, one: Lender, other: Lender) -> Shelf:
    def ticketed(digest: str) -> agent_pb2.BlobTicket:
        return ticket.issue(
            c.authority.sign, agent_id=other.identity.id, digest=digest, now_unix_s=time.time()
        )

    async def ask(digest: str, offset: int) -> AsyncIterator[agent_pb2.BlobChunk]:
        request = agent_pb2.GetPeerBlobRequest(ticket=ticketed(digest), offset=offset)
        address = f"127.0.0.1:{one.server.port}"
        async with wire.peer_channel(other.identity, one.identity.id, address) as channel:
            async for chunk in agent_pb2_grpc.PeerServiceStub(channel).GetBlob(
                request, timeout=RPC_TIMEOUT_S
            ):
                yield chunk

    async def sources(digest: str) -> list[agent_pb2.BlobSources]:
        source = agent_pb2.BlobSource(agent_id=one.identity.id, host="127.0.0.1", port=one.server.port)
        return [agent_pb2.BlobSources(ticket=ticketed(digest), sources=[source])]

    def damage(digest: str, data: bytes | None) -> None:
        path = one.cache.path(digest)
        path.unlink() if data is None else path.write_bytes(data)

    other.client._sources = sources  # type: ignore[method-assign]
    return Shelf(put=lambda data: one.put(data) and None, damage=damage, ask=ask, client=other.client)


async def test_over_the_network_a_blob_is_read_whole_and_from_an_offset(shelf: Shelf) -> None:
    data = os.urandom((2 << 20) + 123)
    shelf.put(data)
    for offset in (0, 1, (1 << 20) + 7, len(data)):
        assert await shelf.read(digest_of(data), offset) == data[offset:]
    shelf.put(b"")
    assert await shelf.read(digest_of(b"")) == b""


async def test_over_the_network_what_is_not_there_is_refused_by_its_reason(shelf: Shelf) -> None:
    shelf.put(b"abc")
    for digest, offset, refusal in (
        (digest_of(b"other"), 0, agent_pb2.REFUSAL_UNKNOWN_BLOB),
        (digest_of(b"abc"), 4, agent_pb2.REFUSAL_INVALID),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await shelf.read(digest, offset)
        assert wire.refusal_of(refused.value) == refusal


async def test_over_the_network_many_read_at_once(shelf: Shelf) -> None:
    data = os.urandom(100_000)
    shelf.put(data)
    assert await asyncio.gather(*(shelf.read(digest_of(data)) for _ in range(3))) == [data] * 3


async def test_over_the_network_an_agent_fetches_what_it_lacks_and_verifies_it(shelf: Shelf) -> None:
    data = os.urandom(3 << 20)
    shelf.put(data)
    client, piece = shelf.client, piece_of(data)
    client.cache.path(piece.digest).with_name(f".partial-{piece.digest}").write_bytes(data[: 1 << 20])
    moved: list[tuple[str, int]] = []
    assert (await client.fetch(piece, lambda *of: moved.append(of))).read_bytes() == data
    assert moved[0] == ("cache", 1 << 20)
    assert sum(count for _, count in moved) == len(data)


@pytest.mark.parametrize("harm", [b"abd", b"ab", None], ids=["flipped", "truncated", "deleted"])
async def test_over_the_network_a_damaged_blob_never_enters_a_cache(shelf: Shelf, harm: bytes | None) -> None:
    shelf.put(b"abc")
    shelf.damage(digest_of(b"abc"), harm)
    with pytest.raises((BlobError, grpc.aio.AioRpcError), match=digest_of(b"abc")):
        await shelf.client.fetch(piece_of(b"abc"))
    assert list(shelf.client.cache.root.iterdir()) == []
