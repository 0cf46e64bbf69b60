"""A short form of `python -m tests.coordinator.floods`, and the limits of it one by one."""

from __future__ import annotations

import asyncio
import select
import socket
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

from coordinator.access import host_of
from coordinator.usher import Usher, address_of, connections
from protos import agent_pb2, agent_pb2_grpc
from tests.coordinator import floods
from tests.coordinator.harness import RPC_TIMEOUT_S, loopback_config, running_coordinator


async def test_an_honest_agent_keeps_its_lease_through_every_flood(tmp_path: Path) -> None:
    async with floods.under_attack(tmp_path) as target, floods.honest_agent(target) as answered:
        process = psutil.Process(target.musterd.process.pid)
        before = process.memory_info().rss
        many = 2 * floods.PER_ADDRESS
        silent, unread, large, slow, guessed = await asyncio.gather(
            floods.silent_connections(target, many),
            floods.never_reads(target, 1),
            floods.oversized(target, 20),
            floods.slow_uploads(target, 30),
            floods.guesses(target, 150),
        )
        assert silent == {"opened": many, "closed": many}
        assert unread == {"sessions": 1, "ended": 1}
        assert large == {"RESOURCE_EXHAUSTED": 20}
        # Eight at a time: whoever came while they were under way was turned away, and none of them was stored.
        assert set(slow) == {"UNAVAILABLE", "REFUSAL_RATE_LIMITED"}
        assert guessed["REFUSAL_TOKEN_UNKNOWN"] <= 20, (
            "a wrong token counts as ten of a hundred, at one a second"
        )
        assert "enrolled" not in guessed
        assert answered() > 1
        assert await floods.losses(target) == []
        assert process.memory_info().rss - before < 150 * 2**20
        assert "connections closed" in target.musterd.log


def test_the_connections_of_an_address_that_have_said_least_are_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        usher = Usher(20, lambda: frozenset({port}))
        clients, accepted = [], []
        for _ in range(25):
            clients.append(socket.create_connection(("127.0.0.1", port)))
            accepted.append(server.accept()[0])
        try:
            for one, other in list(zip(clients, accepted, strict=True))[5:]:
                one.sendall(b"x")
                other.recv(1)
            assert usher.look() == {"127.0.0.1": 5}
            ended, _, _ = select.select(clients, [], [], 5)
            assert ended == clients[:5]
            for one in (*clients[:5], *accepted[:5]):
                one.close()
            assert usher.look() == {}
        finally:
            for one in (*clients, *accepted):
                one.close()


def test_addresses_are_read_from_the_kernels_table() -> None:
    assert address_of("0100007F") == "127.0.0.1"
    assert address_of("0000000000000000FFFF00000100007F") == "127.0.0.1"
    assert address_of("B80D01200000000000000000DEC0ADDE") == "2001:db8::/64"
    line = "1: 0100007F:1D2E 0200007F:D431 01 00000000:00000000 00:00000000 00000000 0 0 4242 1"
    assert connections([line], frozenset({7470})) == {"127.0.0.2": [4242]}
    assert connections([line], frozenset({7471})) == {}
    assert connections([line.replace(" 01 ", " 0A ")], frozenset({7470})) == {}


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:5555", "ipv4:10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5555", "2001:db8:1:2::/64"),
        ("ipv6:[::1]:5555", "::/64"),
        ("unix:", "unix:"),
    ],
)
def test_a_rate_is_kept_for_what_one_subscriber_has(peer: str, address: str) -> None:
    assert host_of(peer) == address


async def _drip(stub: agent_pb2_grpc.AgentServiceStub) -> grpc.aio.AioRpcError:
    """How an upload of one byte at a time ends."""
    call = stub.PutBlob(timeout=RPC_TIMEOUT_S)
    await call.write(agent_pb2.PutBlobRequest(header=agent_pb2.PutBlobHeader(digest="ab" * 32, bytes=1_000)))

    async def drip() -> None:
        while not call.done():
            await call.write(agent_pb2.PutBlobRequest(data=b"x"))
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    await asyncio.gather(dripping, return_exceptions=True)
    return error.value


async def test_an_upload_that_drips_is_dropped_though_something_always_comes(tmp_path: Path) -> None:
    config = loopback_config(
        blobs={"reserve": 0, "chunk_timeout": "400ms", "slowest_upload": "1GB"},
    )
    async with running_coordinator(tmp_path, config=config) as c:
        stub = await c.agent(await c.enroll())
        for _ in range(10):
            error = await _drip(stub)
            # grpc's own word, in place of the server's, when a write crosses the end of the call.
            if error.details() != "Internal error from Core":
                break
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "slower than" in (error.details() or "")
