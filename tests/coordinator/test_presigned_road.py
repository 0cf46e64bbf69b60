"""A real coordinator, a real S3 server and the agent's own blob client: shards go up and come back without
passing through the coordinator, and the agent never has a key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from agent.blobs import BlobCache, BlobClient, Piece, ShardReports
from agent.errors import BlobError
from coordinator.access import caller
from coordinator.blob_service import BlobService
from coordinator.blobs import BlobRefusedError, DirectoryStore
from coordinator.core.model import AgentId, Refusal, State
from coordinator.identity import Principal, Role
from coordinator.metrics import Metrics
from coordinator.server import StartError
from coordinator.sweep import referenced
from coordinator.unreported import Unreported
from protos import admin_pb2, agent_pb2
from protos.wire import refusal_of
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, loopback_config, running_coordinator
from tests.coordinator.s3_server import BUCKET, KEY, REGION, S3Server, s3_server
from tests.coordinator.test_admin_service import JOB, Pair, put
from tests.coordinator.test_blobs_s3 import call


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@dataclass(kw_only=True)
class Road:
    """A coordinator on S3 with two members in a generation, and the first one's blob client."""

    c: RunningCoordinator
    pair: Pair
    server: S3Server
    client: BlobClient
    reports: ShardReports
    prefix: str

    async def store(self, data: bytes, index: int = 0, count: int = 1, step: int = 2) -> str:
        """Have a shard uploaded and reported as an agent does, when the other member has vouched for the state;
        returns its digest."""
        await self.pair.report(step, count, by=1)
        digest = hashlib.sha256(data).hexdigest()
        self.client.cache.path(digest).write_bytes(data)
        self.reports.add(self.report(digest, len(data), index, count, step))
        async with asyncio.timeout(RPC_TIMEOUT_S):
            await self.reports.idle()
        return digest

    def report(
        self, digest: str, size: int, index: int = 0, count: int = 1, step: int = 2
    ) -> agent_pb2.ReportShardRequest:
        return agent_pb2.ReportShardRequest(
            job_id=self.pair.job_id,
            generation=self.pair.generation,
            step=step,
            index=index,
            count=count,
            digest=digest,
            bytes=size,
            state_digest="ab",
            header_json="{}",
        )

    def transfers(self) -> list[tuple[str, str, int]]:
        """(method, path below the prefix, bytes) of what was asked by a presigned URL."""
        top = f"/{BUCKET}/{self.prefix}/"
        return [
            (method, path.removeprefix(top), size)
            for how, method, path, size in self.server.requests()
            if how == "query" and path.startswith(top)
        ]

    def through_the_coordinator(self) -> float:
        """Bytes of blobs that passed through the coordinator's own streams."""
        counted = self.c.coordinator.metrics.blob_bytes
        return sum(sample.value for sample in counted.collect()[0].samples if sample.name.endswith("_total"))


@pytest.fixture
async def road(server: S3Server, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Road]:
    prefix = tmp_path.name
    key = tmp_path / "key.json"
    key.write_text(
        json.dumps({"access_key_id": KEY.access_key_id, "secret_access_key": KEY.secret_access_key})
    )
    key.chmod(0o600)
    config = loopback_config(
        blobs={
            "store": f"s3://{BUCKET}/{prefix}",
            "reserve": 0,
            "retired_grace": 0,
            "s3": {
                "endpoint": server.url,
                "region": REGION,
                "credentials": str(key),
                **getattr(request, "param", {}),
            },
        }
    )
    async with running_coordinator(tmp_path, config=config) as c:
        pair = Pair(c)
        await pair.form({**JOB, "checkpoint": {"keep": 1}})
        await pair.progress(1, 5)
        (tmp_path / "agent").mkdir()
        stub = await c.agent(pair.identities[0])
        client = BlobClient(lambda: stub, BlobCache(tmp_path / "agent"))
        reports = ShardReports(lambda: stub, client, lambda _: None)
        yield Road(c=c, pair=pair, server=server, client=client, reports=reports, prefix=prefix)
        await reports.stop()


async def test_a_checkpoint_goes_up_and_comes_back_by_urls_alone(road: Road) -> None:
    shards = [os.urandom(9_000_000), b"second"]
    digests = [await road.store(data, index, 2) for index, data in enumerate(shards)]
    admin = await road.c.admin()
    manifest = json.loads((await admin.GetCheckpoint(admin_pb2.CheckpointRef(job="demo"))).manifest_json)
    assert [shard["digest"] for shard in manifest["shards"]] == digests
    verified = json.loads((await admin.VerifyCheckpoint(admin_pb2.CheckpointRef(job="demo"))).json)
    assert verified["problems"] == []

    for digest, data in zip(digests, shards, strict=True):
        road.client.cache.path(digest).unlink()
        assert (await road.client.fetch(Piece(digest=digest, bytes=len(data)))).read_bytes() == data
    peer = f"incoming/agent-{road.pair.identities[0].id}"
    assert road.transfers() == [
        ("PUT", f"{peer}/{digests[0]}", 9_000_000),
        ("PUT", f"{peer}/{digests[1]}", 6),
        ("GET", f"blobs/{digests[0][:2]}/{digests[0]}", 0),
        ("GET", f"blobs/{digests[1][:2]}/{digests[1]}", 0),
    ]
    assert road.through_the_coordinator() == 0


async def test_the_agent_holds_no_key_and_the_store_gives_nothing_without_one(road: Road) -> None:
    digest = await road.store(b"weights")
    assert KEY.secret_access_key not in os.environ.values()
    assert all(
        KEY.secret_access_key.encode() not in path.read_bytes()
        for path in road.client.cache.root.rglob("*")
        if path.is_file()
    )
    stub = await road.c.agent(road.pair.identities[0])
    got = await stub.PresignGet(agent_pb2.PresignGetRequest(digest=digest), timeout=RPC_TIMEOUT_S)
    asked = agent_pb2.PresignPutRequest(digest=hashlib.sha256(b"x").hexdigest(), bytes=1)
    sent = await stub.PresignPut(asked, timeout=RPC_TIMEOUT_S)
    for reply in (got, sent):
        assert KEY.secret_access_key not in str(reply)
        assert await asyncio.to_thread(call, "GET", reply.url.partition("?")[0]) == 403
        assert await asyncio.to_thread(call, "DELETE", reply.url) == 403


async def test_a_blob_that_is_stored_is_not_sent_again(road: Road) -> None:
    digest = await road.store(b"weights", step=2)
    await road.store(b"weights", step=3)
    assert [method for method, path, _ in road.transfers() if path.endswith(digest)] == ["PUT"]


async def test_a_report_after_a_lost_answer_takes_in_what_was_sent(road: Road) -> None:
    data = b"sent before the coordinator was restarted"
    digest = hashlib.sha256(data).hexdigest()
    road.client.cache.path(digest).write_bytes(data)
    await road.client.upload(digest)
    await road.store(data)
    assert [size for method, _, size in road.transfers() if method == "PUT"] == [len(data)]
    assert road.c.coordinator._store.size(digest) == len(data)


@pytest.mark.parametrize("road", [{"sha256_header": False}], indirect=True)
async def test_wrong_bytes_under_a_right_name_are_refused_and_the_right_ones_then_taken(road: Road) -> None:
    data, wrong = b"weights", b"WEIGHTS"
    digest = hashlib.sha256(data).hexdigest()
    stub = await road.c.agent(road.pair.identities[0])
    where = await stub.PresignPut(
        agent_pb2.PresignPutRequest(digest=digest, bytes=len(data)), timeout=RPC_TIMEOUT_S
    )
    assert await asyncio.to_thread(call, "PUT", where.url, wrong, where.headers) == 200
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ReportShard(road.report(digest, len(data)), timeout=RPC_TIMEOUT_S)
    assert refusal_of(error.value) == agent_pb2.REFUSAL_DIGEST_MISMATCH
    assert "hash to" in (error.value.details() or "")
    assert list(road.c.coordinator._store.stored()) == []
    agents = await road.c.coordinator.loop.query(lambda state, _: dict(state.agents))
    assert [agents[AgentId(one.id)].strikes for one in road.pair.identities] == [1, 0]
    await road.store(data)
    assert road.c.coordinator._store.verify(digest, len(data)) == ""


async def test_a_shard_that_never_came_is_unknown(road: Road) -> None:
    stub = await road.c.agent(road.pair.identities[0])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ReportShard(road.report("ab" * 32, 7), timeout=RPC_TIMEOUT_S)
    assert refusal_of(error.value) == agent_pb2.REFUSAL_UNKNOWN_BLOB


async def test_a_file_that_rotted_in_the_cache_is_named_and_not_sent_forever(road: Road) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    road.client.cache.path(digest).write_bytes(b"WEIGHTS")
    with pytest.raises(BlobError, match="damaged"):
        await road.client.upload(digest)
    assert list(road.c.coordinator._store.stored()) == []


async def test_a_damaged_object_never_enters_the_cache(road: Road) -> None:
    digest = await road.store(b"weights")
    road.client.cache.path(digest).unlink()
    store = road.c.coordinator._store
    upload = store._incoming.begin(  # type: ignore[attr-defined]
        hashlib.sha256(b"WEIGHTS").hexdigest(),
        7,
        lambda _, file: store._bucket.put(store.key(digest), file),  # type: ignore[attr-defined]
    )
    upload.write(b"WEIGHTS")
    await asyncio.to_thread(upload.finish)
    with pytest.raises(BlobError, match="twice hash to something else"):
        await road.client.fetch(Piece(digest=digest, bytes=7))
    assert list(road.client.cache.root.iterdir()) == []
    admin = await road.c.admin()
    verified = json.loads((await admin.VerifyCheckpoint(admin_pb2.CheckpointRef(job="demo"))).json)
    assert verified["sound"] is False


async def test_an_interrupted_download_resumes_where_it_broke(road: Road) -> None:
    data = os.urandom(3_000_000)
    digest = await road.store(data)
    path = road.client.cache.path(digest)
    path.unlink()
    path.with_name(f".partial-{digest}").write_bytes(data[:2_000_000])
    received: list[int] = []
    metered = road.client._run

    async def run(transfer, work):
        received.append(work.args[0])
        await metered(transfer, work)

    road.client._run = run  # type: ignore[method-assign]
    assert (await road.client.fetch(Piece(digest=digest, bytes=len(data)))).read_bytes() == data
    assert received == [2_000_000]


async def test_operators_reach_the_blobs_through_the_coordinator(road: Road) -> None:
    data = os.urandom(3_000_000)
    admin = await road.c.admin()
    assert not (await put(admin, data)).existed
    assert (await put(admin, data)).existed
    digest = hashlib.sha256(data).hexdigest()
    chunks = [
        chunk.data
        async for chunk in admin.GetBlob(
            agent_pb2.GetBlobRequest(digest=digest, offset=5), timeout=RPC_TIMEOUT_S
        )
    ]
    assert b"".join(chunks) == data[5:]
    assert road.through_the_coordinator() == 2 * len(data) - 5


async def test_a_sweep_of_the_bucket_takes_retired_shards_and_nothing_that_is_referred_to(road: Road) -> None:
    old = await road.store(b"old one", step=2)
    new = await road.store(b"new one", step=3)
    await put(await road.c.admin(), b"a dataset on its way")
    c = road.c.coordinator
    keep = await c.loop.query(lambda state, _: referenced(state))
    assert keep == {new}
    assert await c._sweeper.sweep(c.loop) == 1
    stored = {digest for digest, *_ in c._store.stored()}
    assert stored == {new, hashlib.sha256(b"a dataset on its way").hexdigest()}
    assert old not in stored


async def test_a_store_that_goes_away_is_a_wait_and_not_a_refusal(tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"access_key_id": "k", "secret_access_key": "s"}))
    key.chmod(0o600)
    blobs = {"store": f"s3://{BUCKET}", "reserve": 0, "s3": {"credentials": str(key)}}
    with s3_server(tmp_path) as server:
        blobs["s3"]["endpoint"] = server.url  # type: ignore[index]
        with pytest.raises(StartError, match="cannot be written with the key 'k'"):
            async with running_coordinator(tmp_path, config=loopback_config(blobs=blobs)):
                pass
        key.write_text(
            json.dumps({"access_key_id": KEY.access_key_id, "secret_access_key": KEY.secret_access_key})
        )
        config = loopback_config(blobs=blobs)
        stack = running_coordinator(tmp_path, config=config)
        c = await stack.__aenter__()
    try:
        stub = await c.agent(await c.enroll())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.FindBlobs(agent_pb2.FindBlobsRequest(digests=["ab" * 32]), timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "try again later" in (error.value.details() or "")
    finally:
        await stack.__aexit__(None, None, None)


class SlowChecks:
    """Presigned transfers whose check waits for the test."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, str, int]] = []
        self.go_on = threading.Event()
        self.wrong = False
        self.held_against: list[str] = []

    def take_in(self, peer: str, digest: str, size: int) -> None:
        self.begun.append((peer, digest, size))
        assert self.go_on.wait(RPC_TIMEOUT_S)
        if self.wrong:
            raise BlobRefusedError(Refusal.DIGEST_MISMATCH, "other bytes")


@pytest.fixture
def slow(tmp_path: Path) -> tuple[SlowChecks, BlobService]:
    checks = SlowChecks()
    store = DirectoryStore(tmp_path / "blobs", max_bytes=1, reserve_bytes=0)
    store.presigned = checks  # type: ignore[assignment]
    metrics = Metrics(State, lambda: 0, lambda: 0)
    caller.set(Principal(role=Role.AGENT, id="a1", not_after_unix_s=2**40))
    service = BlobService(
        store,
        transfers_per_peer=1,
        chunk_timeout_s=1.0,
        slowest_bytes_per_s=1,
        metrics=metrics,
        unreported=Unreported(most_bytes=1, discarded_after_s=1.0, metrics=metrics),
        wrong_bytes=lambda agent_id, _: checks.held_against.append(agent_id),
    )
    return checks, service


@pytest.mark.parametrize("wrong", [False, True])
async def test_a_check_that_outlasts_its_report_is_finished_and_not_begun_again(
    slow: tuple[SlowChecks, BlobService], wrong: bool
) -> None:
    checks, service = slow
    checks.wrong = wrong
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await service.take_in("ab" * 32, 7)
    asked = agent_pb2.PresignPutRequest(digest="ab" * 32, bytes=7)
    assert (await service.presign_put(asked)).received
    again = asyncio.create_task(service.take_in("ab" * 32, 7))
    await asyncio.sleep(0)
    checks.go_on.set()
    if wrong:
        with pytest.raises(BlobRefusedError):
            await again
    else:
        await again
    assert checks.begun == [("agent-a1", "ab" * 32, 7)]
    assert checks.held_against == (["a1"] if wrong else []), "once for one upload"
    await service.stop()
