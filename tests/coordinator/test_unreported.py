"""What one agent sends without reporting it is bounded, and what it reports is not counted."""

from __future__ import annotations

import os
from pathlib import Path

import grpc.aio
import pytest

from coordinator.blobs import BlobRefusedError
from coordinator.core.model import AgentId, JobId, Shard, ShardRecorded, State
from coordinator.metrics import Metrics
from coordinator.unreported import LEAST_BYTES, Unreported
from protos import agent_pb2
from tests.coordinator.harness import RPC_TIMEOUT_S, loopback_config, running_coordinator
from tests.coordinator.test_admin_service import Pair, digest_of, put

BLOBS = {"reserve": 0, "unreported_per_agent": "3MiB", "retired_grace": "0s"}


def blob() -> bytes:
    return os.urandom(LEAST_BYTES)


def figure(metrics: Metrics, name: str) -> float:
    found = metrics.registry.get_sample_value(name)
    assert found is not None
    return found


async def test_an_agent_that_reports_nothing_cannot_fill_the_store(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path, config=loopback_config(blobs=BLOBS)) as c:
        metrics = c.coordinator.metrics
        greedy = await c.agent(await c.enroll("greedy"))
        first = blob()
        for data in (first, blob(), blob()):
            await put(greedy, data)
        await put(greedy, first)  # it is there already, and that makes no room
        more = blob()
        for _ in range(2):
            with pytest.raises(
                grpc.aio.AioRpcError, match=r"blobs\.unreported_per_agent allows 3145728"
            ) as error:
                await put(greedy, more)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert c.coordinator._store.size(digest_of(more)) is None
        assert figure(metrics, "muster_uploads_over_quota_total") == 2
        assert figure(metrics, "muster_unreported_bytes") == 3 * LEAST_BYTES
        # Neither another agent nor whoever brings a job's data is in its way.
        await put(await c.agent(await c.enroll("other")), more)
        for _ in range(4):
            await put(await c.admin(), blob())


async def test_what_is_reported_or_swept_counts_no_more(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path, config=loopback_config(blobs=BLOBS)) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 5)
        stub = await c.agent(pair.identities[0])

        async def report(step: int, index: int, digest: str, generation: int) -> None:
            await stub.ReportShard(
                agent_pb2.ReportShardRequest(
                    job_id=pair.job_id,
                    generation=generation,
                    step=step,
                    index=index,
                    count=8,
                    digest=digest,
                    bytes=LEAST_BYTES,
                    state_digest="ab",
                    header_json="{}",
                ),
                timeout=RPC_TIMEOUT_S,
            )

        for index in range(7):
            data = blob()
            await put(stub, data)
            await report(5, index, digest_of(data), pair.generation)
        assert figure(c.coordinator.metrics, "muster_unreported_bytes") == 0
        # A shard that comes too late is reported in vain: the next sweep takes it, and it does not count either.
        late = [blob() for _ in range(3)]
        for index, data in enumerate(late):
            await put(stub, data)
            with pytest.raises(grpc.aio.AioRpcError):
                await report(5, index, digest_of(data), pair.generation + 7)
        with pytest.raises(grpc.aio.AioRpcError, match="unreported_per_agent"):
            await put(stub, blob())
        assert await c.coordinator._sweeper.sweep(c.coordinator.loop) == 3
        assert figure(c.coordinator.metrics, "muster_unreported_bytes") == 0
        await put(stub, blob())


A1, A2 = AgentId("a1"), AgentId("a2")


class Bench:
    """The account alone, with a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.account = Unreported(
            most_bytes=4 * LEAST_BYTES,
            discarded_after_s=100.0,
            metrics=Metrics(State, lambda: 0, lambda: 0),
            now=lambda: self.now_s,
        )

    def may_send(self, agent_id: AgentId, digest: str, size: int) -> bool:
        try:
            self.account.charge(agent_id, digest, size)
        except BlobRefusedError:
            return False
        return True


def test_one_blob_may_be_as_large_as_it_likes_but_alone() -> None:
    bench = Bench()
    assert bench.may_send(A1, "a", 9 * LEAST_BYTES)
    assert not bench.may_send(A1, "b", 1)
    assert bench.may_send(A1, "a", 9 * LEAST_BYTES), "to go on with it is always allowed"
    bench.account.lift(A1, "a")
    assert all(bench.may_send(A1, digest, 1) for digest in "bcde")
    assert not bench.may_send(A1, "f", 1), "many small ones are not free"
    assert not bench.may_send(A1, "b", 2 * LEAST_BYTES), "nor is one that was announced smaller"


def test_what_a_broken_upload_left_counts_until_it_would_be_discarded() -> None:
    bench = Bench()
    assert bench.may_send(A1, "broken", 3 * LEAST_BYTES)
    assert bench.may_send(A1, "whole", LEAST_BYTES)
    bench.account.stored(A1, "whole")
    bench.now_s = 100.0
    bench.account.swept([])
    assert not bench.may_send(A1, "more", LEAST_BYTES)
    bench.now_s = 101.0
    bench.account.swept([])
    assert bench.may_send(A1, "more", 3 * LEAST_BYTES)
    assert not bench.may_send(A1, "and more", 1), "what is stored counts until it is swept"
    bench.account.swept(["whole"])
    assert bench.may_send(A1, "and more", 1)


def test_a_shard_that_two_agents_sent_counts_for_neither_once_one_of_them_reported_it() -> None:
    bench = Bench()
    for agent_id in (A1, A2):
        assert bench.may_send(agent_id, "shard", 4 * LEAST_BYTES)
        assert not bench.may_send(agent_id, "next", 1)
    bench.account.committed(
        ShardRecorded(
            at_ms=0,
            job_id=JobId("j"),
            generation=1,
            step=1,
            count=1,
            shard=Shard(index=0, digest="shard", bytes=4 * LEAST_BYTES),
            state_digest="",
            header_json="{}",
        )
    )
    assert bench.may_send(A1, "next", 4 * LEAST_BYTES)
    assert bench.may_send(A2, "next", 4 * LEAST_BYTES)
