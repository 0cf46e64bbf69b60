"""The line is cut in the middle of an upload: what was received is not sent again, and the shard arrives."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from agent.blobs import BlobCache, BlobClient, ShardReports
from protos import agent_pb2, agent_pb2_grpc, wire
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, loopback_config, running_coordinator
from tests.coordinator.lender import piece_of
from tests.coordinator.test_admin_service import Pair


class Relay:
    """A TCP relay to the coordinator that cuts a connection after so many bytes up.  The agent hears of it, and
    the coordinator if it is `heard`: not where a router has forgotten the connection."""

    def __init__(self, address: str, *, heard: bool) -> None:
        self._heard = heard
        self._host, self._port = wire.split_address(address)
        self.cut_after: int | None = None
        self.cuts = 0
        self.server: asyncio.Server | None = None
        self.connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        assert self.server is not None
        return f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        inner_reader, inner_writer = await asyncio.open_connection(self._host, self._port)
        pumps = (
            asyncio.create_task(self._pump(reader, inner_writer, up=True)),
            asyncio.create_task(self._pump(inner_reader, writer)),
        )
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if not self._heard and pumps[0].done() and pumps[0].result():
                writer.transport.abort()
                await asyncio.Event().wait()
        finally:
            for pump in pumps:
                pump.cancel()
            for each in (writer, inner_writer):
                each.transport.abort()
            await asyncio.gather(
                *pumps, writer.wait_closed(), inner_writer.wait_closed(), return_exceptions=True
            )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool = False
    ) -> bool:
        """Whether it ended by a cut."""
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
                passed += len(data)
                if up and self.cut_after is not None and passed >= self.cut_after:
                    self.cut_after = None
                    self.cuts += 1
                    return True
        return False


@contextlib.asynccontextmanager
async def relayed(c: RunningCoordinator, *, heard: bool) -> AsyncIterator[Relay]:
    relay = Relay(c.main_address, heard=heard)
    relay.server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay
    finally:
        relay.server.close()
        for connection in relay.connections:
            connection.cancel()
        await asyncio.gather(*relay.connections, return_exceptions=True)


def received(c: RunningCoordinator) -> float:
    """Bytes of blobs that came up through the coordinator's streams."""
    return sum(
        sample.value
        for sample in c.coordinator.metrics.blob_bytes.collect()[0].samples
        if sample.name.endswith("_total") and sample.labels["direction"] == "up"
    )


@pytest.mark.parametrize("heard", [True, False])
async def test_a_shard_whose_line_was_cut_goes_on_where_it_broke_off(tmp_path: Path, heard: bool) -> None:
    data = os.urandom(24 << 20)
    piece = piece_of(data)
    cache = BlobCache(tmp_path / "agent")
    cache.root.mkdir()
    cache.path(piece.digest).write_bytes(data)
    config = loopback_config(blobs={"reserve": 0, "transfers_per_peer": 1})
    async with running_coordinator(tmp_path, config=config) as c, relayed(c, heard=heard) as relay:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 5)
        async with wire.aio_channel(pair.identities[0], relay.address) as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            reports = ShardReports(lambda: stub, BlobClient(lambda: stub, cache), lambda _: None)
            relay.cut_after = 16 << 20
            report = agent_pb2.ReportShardRequest(
                job_id=pair.job_id,
                generation=pair.generation,
                step=5,
                index=0,
                count=1,
                digest=piece.digest,
                bytes=piece.bytes,
                state_digest="ab",
                header_json="{}",
            )
            reports.add(report)
            assert reports.waiting == {piece.digest}
            assert not reports.all_stored
            async with asyncio.timeout(60):
                await reports.idle()
            assert reports.waiting == set()
            assert reports.all_stored
        assert relay.cuts == 1
        assert received(c) == len(data), "no byte was taken twice"
        assert c.coordinator._store.verify(piece.digest, piece.bytes) == ""
        assert list((c.home / "blobs" / "incoming").iterdir()) == []


async def test_an_upload_that_stalls_is_dropped_and_gone_on_with(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    piece = piece_of(data)
    config = loopback_config(blobs={"reserve": 0, "chunk_timeout": "200ms"})
    async with running_coordinator(tmp_path, config=config) as c:
        identity = await c.enroll()
        stub = await c.agent(identity)

        async def stalls() -> AsyncIterator[agent_pb2.PutBlobRequest]:
            yield agent_pb2.PutBlobRequest(
                header=agent_pb2.PutBlobHeader(digest=piece.digest, bytes=piece.bytes)
            )
            yield agent_pb2.PutBlobRequest(data=data[: 1 << 20])
            await asyncio.Event().wait()

        with pytest.raises(grpc.aio.AioRpcError, match="go on where it broke off") as error:
            await stub.PutBlob(stalls(), timeout=RPC_TIMEOUT_S)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        cache = BlobCache(tmp_path / "agent")
        cache.root.mkdir()
        cache.path(piece.digest).write_bytes(data)
        await BlobClient(lambda: stub, cache).upload(piece.digest)
        assert received(c) == len(data)
        assert c.coordinator._store.verify(piece.digest, piece.bytes) == ""
