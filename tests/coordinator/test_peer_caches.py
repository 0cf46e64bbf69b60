"""Agents fetch from each other's caches: a real coordinator names the sources and signs the tickets, and the
agent's own server and client move the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.blobs import BlobCache, Piece
from agent.peers import SERVED_AT_ONCE_TO_ONE, Lending, Pace
from coordinator.identity import Authority, Role
from protos import admin_pb2, agent_pb2, agent_pb2_grpc, ticket, wire
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    running_coordinator,
)
from tests.coordinator.lender import Lender, TrustingCache, lender, piece_of
from tests.coordinator.test_admin_service import Pair

DATA = os.urandom(3_000_000)
PIECE = piece_of(DATA)


@dataclass(kw_only=True)
class Circle:
    """A coordinator with a checkpoint of one shard, two members and a standby.  The coordinator's own copy of
    the shard is gone."""

    c: RunningCoordinator
    pair: Pair
    sessions: list[AgentSession]
    identities: list[wire.Identity]
    root: Path
    stack: contextlib.AsyncExitStack

    async def lender(
        self, number: int, cache: type[BlobCache] = BlobCache, lending: Lending | None = None
    ) -> Lender:
        return await self.stack.enter_async_context(
            lender(
                self.c,
                self.identities[number],
                self.root / f"agent{number}",
                self.sessions[number],
                lending,
                cache,
            )
        )

    def lose(self, piece: Piece) -> None:
        self.c.coordinator._store.remove(piece.digest)

    async def admin(self, call: str, request: Any) -> Any:
        return await getattr(await self.c.admin(), call)(request, timeout=RPC_TIMEOUT_S)

    async def ticket(self, asker: int = 2, piece: Piece = PIECE) -> agent_pb2.BlobTicket | None:
        stub = await self.c.agent(self.identities[asker])
        request = agent_pb2.FindSourcesRequest(digests=[piece.digest])
        found = await stub.FindSources(request, timeout=RPC_TIMEOUT_S)
        return found.blobs[0].ticket if found.blobs else None

    async def ask(
        self,
        server: Lender,
        by: wire.Identity,
        ticket: agent_pb2.BlobTicket | None,
        offset: int = 0,
        heard: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Fetch straight from an agent; `heard` is called after each chunk."""
        request = agent_pb2.GetPeerBlobRequest(ticket=ticket, offset=offset)
        address = f"127.0.0.1:{server.server._port}"
        got = bytearray()
        async with wire.peer_channel(by, server.identity.id, address) as channel:
            async for chunk in agent_pb2_grpc.PeerServiceStub(channel).GetBlob(
                request, timeout=RPC_TIMEOUT_S
            ):
                assert len(chunk.data) <= wire.CHUNK_BYTES
                got += chunk.data
                heard()
        return bytes(got)


@pytest.fixture
async def circle(tmp_path: Path) -> AsyncIterator[Circle]:
    async with running_coordinator(tmp_path) as c, contextlib.AsyncExitStack() as stack:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 5)
        assert await pair.checkpoint(5, [DATA]) == [True]
        identity = await c.enroll("three")
        session = AgentSession(await c.agent(identity))
        await session.hello()
        await session.hear("assignment")
        made = Circle(
            c=c,
            pair=pair,
            sessions=[*pair.sessions, session],
            identities=[*pair.identities, identity],
            root=tmp_path,
            stack=stack,
        )
        made.lose(PIECE)
        yield made


async def test_a_blob_that_the_store_has_lost_comes_from_another_agents_cache(circle: Circle) -> None:
    one, three = await circle.lender(0), await circle.lender(2)
    await one.say(one.put(DATA))
    moved: list[tuple[str, int]] = []
    path = await three.client.fetch(PIECE, lambda source, count: moved.append((source, count)))
    assert path.read_bytes() == DATA
    assert {source for source, count in moved if count} == {"agents"}
    assert sum(count for _, count in moved) == len(DATA)
    assert one.server.service.served_bytes == len(DATA)
    assert three.accused == []


async def test_nobody_is_served_without_a_ticket_of_its_own(circle: Circle) -> None:
    one = await circle.lender(0)
    await one.say(one.put(DATA))
    good = await circle.ticket(asker=2)
    assert good is not None
    three, two = circle.identities[2], circle.identities[1]
    assert await circle.ask(one, three, good) == DATA

    other = agent_pb2.BlobTicket()
    other.CopyFrom(good)
    other.digest = piece_of(b"another").digest
    stranger = Authority.create()
    old = ticket.issue(
        circle.c.authority.sign,
        agent_id=three.id,
        digest=PIECE.digest,
        now_unix_s=time.time() - ticket.TICKET_TTL_S - 1,
    )
    forged = ticket.issue(stranger.sign, agent_id=three.id, digest=PIECE.digest, now_unix_s=time.time())
    operator = circle.c.identity(Role.ADMIN, "admin")
    for by, shown, why in (
        (two, good, "the ticket is for agent"),
        (three, None, "the ticket is for agent ''"),
        (three, other, "not signed by"),
        (three, forged, "not signed by"),
        (three, old, "time is over"),
        (operator, good, "not that of an agent"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=why) as error:
            await circle.ask(one, by, shown)
        assert wire.refusal_of(error.value) == agent_pb2.REFUSAL_WRONG_ROLE


async def test_certificates_of_another_authority_serve_and_fetch_nothing(circle: Circle) -> None:
    one = await circle.lender(0)
    await one.say(one.put(DATA))
    good = await circle.ticket(asker=2)
    assert await circle.ask(one, circle.identities[2], good) == DATA
    stranger = Authority.create().issue_operator(Role.AGENT, circle.identities[2].id, "127.0.0.1:1")
    # A thief of the name: everything but the authority is as it should be.
    posing = wire.Identity(
        role="agent",
        id=stranger.id,
        address=stranger.address,
        certificate_pem=stranger.certificate_pem,
        key_pem=stranger.key_pem,
        authority_pem=circle.identities[2].authority_pem,
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await circle.ask(one, posing, good)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    # And one agent cannot stand in for another: the name in its certificate is its own.
    impostor = Lender(
        identity=circle.identities[1], session=None, server=one.server, client=one.client, accused=[]
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await circle.ask(impostor, circle.identities[2], good)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_agents_hear_only_of_blobs_of_the_job_that_they_serve(circle: Circle) -> None:
    one = await circle.lender(0)
    private = one.put(b"of no job at all")
    await one.say(one.put(DATA), private)
    assert await circle.ticket(asker=2) is not None
    assert await circle.ticket(asker=2, piece=private) is None
    assert await circle.ticket(asker=0) is None, "nobody is sent to itself"
    idle = await circle.c.enroll("idle")
    circle.identities.append(idle)
    assert await circle.ticket(asker=3) is None
    stub = await circle.c.agent(circle.identities[2])
    many = agent_pb2.FindSourcesRequest(digests=[PIECE.digest] * 65)
    with pytest.raises(grpc.aio.AioRpcError, match="at most 64"):
        await stub.FindSources(many, timeout=RPC_TIMEOUT_S)


async def test_nobody_is_sent_to_an_agent_that_lends_nothing_or_is_gone(
    circle: Circle, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await circle.lender(0)
    await one.say(one.put(DATA))
    assert await circle.ticket() is not None
    one.server.service.allowed = False
    await one.say(PIECE)
    assert await circle.ticket() is None
    one.server.service.allowed = True
    await one.say(PIECE)
    assert await circle.ticket() is not None
    await one.say()
    assert await circle.ticket() is None
    await one.say(PIECE)
    caches, forgotten = circle.c.coordinator.caches, asyncio.Event()
    forget = caches.closed

    def closed(*session: Any) -> None:
        forget(*session)
        forgotten.set()

    monkeypatch.setattr(caches, "closed", closed)
    circle.sessions[0].cut()
    async with asyncio.timeout(RPC_TIMEOUT_S):
        await forgotten.wait()
    assert await circle.ticket() is None


@pytest.mark.parametrize("no", ["volunteer", "operator"])
async def test_serving_stops_at_once_when_the_volunteer_or_the_operator_says_no(
    circle: Circle, no: str
) -> None:
    data = os.urandom(40 << 20)
    piece = piece_of(data)
    one = await circle.lender(0)
    one.put(data)
    good = ticket.issue(
        circle.c.authority.sign,
        agent_id=circle.identities[2].id,
        digest=piece.digest,
        now_unix_s=time.time(),
    )
    chunks = 0

    def heard() -> None:
        nonlocal chunks
        chunks += 1
        if no == "volunteer":
            one.server.service.allowed = False
        else:
            one.server.service.revoke(circle.identities[2].id)

    for expected in ("lends no blobs" if no == "volunteer" else "was banned",) * 2:
        with pytest.raises(grpc.aio.AioRpcError, match=expected):
            await circle.ask(one, circle.identities[2], good, heard=heard)
    assert 0 < chunks < 40


async def test_a_ban_is_told_to_every_agent(circle: Circle) -> None:
    banned = circle.identities[2].id
    command = admin_pb2.AgentCommandRequest(agent=banned, kind=admin_pb2.AGENT_COMMAND_KIND_BAN)
    await circle.admin("CommandAgent", command)
    for session in circle.sessions[:2]:
        assert (await session.hear("revoked")).revoked.agent_id == banned


async def test_wrong_bytes_are_reported_against_who_served_them_and_the_next_source_is_used(
    circle: Circle,
) -> None:
    liar, three = await circle.lender(0, TrustingCache), await circle.lender(2)
    await liar.say(liar.put(b"!" + DATA[1:], under=PIECE))
    await circle.pair.checkpoint(5, [DATA])  # the store has it again
    path = await three.client.fetch(PIECE)
    assert path.read_bytes() == DATA
    assert three.accused == [(liar.identity.id, PIECE.digest)]
    assert three.session is not None
    fault = agent_pb2.PeerFault(agent_id=liar.identity.id, digest=PIECE.digest)
    await three.session.say(peer_fault=fault)
    await three.heard()
    assert await circle.ticket(asker=2) is None, "the accuser is not sent there again"
    assert await circle.ticket(asker=1) is not None, "one word is not enough for the others"
    await circle.sessions[1].say(peer_fault=fault)
    two = await circle.lender(1)
    await two.heard()
    late = await circle.c.enroll("four")
    circle.identities.append(late)
    session = AgentSession(await circle.c.agent(late))
    await session.hello()
    await session.hear("assignment")
    assert await circle.ticket(asker=3) is None
    view = (await circle.admin("GetAgent", admin_pb2.AgentRef(agent=liar.identity.id))).json
    assert circle.identities[1].id in view
    assert circle.identities[2].id in view


async def test_more_bytes_than_the_manifest_says_are_not_taken(circle: Circle) -> None:
    liar, three = await circle.lender(0, TrustingCache), await circle.lender(2)
    await liar.say(liar.put(DATA + os.urandom(30 << 20), under=PIECE))
    await circle.pair.checkpoint(5, [DATA])
    assert (await three.client.fetch(PIECE)).read_bytes() == DATA
    assert three.accused == [(liar.identity.id, PIECE.digest)]
    assert liar.server.service.served_bytes < 20 << 20


async def test_a_download_that_broke_goes_on_at_the_next_source(circle: Circle) -> None:
    half, three = await circle.lender(0, TrustingCache), await circle.lender(2)
    await half.say(half.put(DATA[:2_000_000], under=PIECE))
    await circle.pair.checkpoint(5, [DATA])
    moved: dict[str, int] = {}

    def note(source: str, count: int) -> None:
        moved[source] = moved.get(source, 0) + count

    assert (await three.client.fetch(PIECE, note)).read_bytes() == DATA
    assert moved == {"cache": 0, "agents": 2_000_000, "store": 1_000_000}
    assert three.accused == []


async def test_nobody_is_accused_for_what_another_may_have_spoilt(circle: Circle) -> None:
    """A wrong beginning of one agent and a right end of another: the second serves all of it again."""
    spoilt, two, three = await circle.lender(0, TrustingCache), await circle.lender(1), await circle.lender(2)
    await spoilt.say(spoilt.put(b"!" * 2_000_000, under=PIECE))
    await two.say(two.put(DATA))
    named = three.client._sources

    async def spoilt_first(digest: str) -> list[agent_pb2.BlobSources]:
        return sorted(await named(digest), key=lambda found: found.sources[0].agent_id != spoilt.identity.id)

    three.client._sources = spoilt_first  # type: ignore[method-assign]
    assert (await three.client.fetch(PIECE)).read_bytes() == DATA
    assert three.accused == []
    assert spoilt.server.service.served_bytes == 2_000_000
    assert two.server.service.served_bytes == len(DATA) - 2_000_000 + len(DATA)


async def test_what_an_earlier_attempt_left_is_gone_on_with(circle: Circle) -> None:
    one, three = await circle.lender(0), await circle.lender(2)
    await one.say(one.put(DATA))
    three.cache.path(PIECE.digest).with_name(f".partial-{PIECE.digest}").write_bytes(DATA[:2_500_000])
    assert (await three.client.fetch(PIECE)).read_bytes() == DATA
    assert one.server.service.served_bytes == 500_000


async def test_a_damaged_blob_is_not_served_but_removed(circle: Circle) -> None:
    one, three = await circle.lender(0), await circle.lender(2)
    await one.say(one.put(b"!" + DATA[1:], under=PIECE))
    with pytest.raises(grpc.aio.AioRpcError, match="no blob"):
        await three.client.fetch(PIECE)
    assert three.accused == []
    assert not one.cache.path(PIECE.digest).exists()


async def test_an_agent_that_cannot_be_reached_costs_one_try(circle: Circle) -> None:
    one, three = await circle.lender(0), await circle.lender(2)
    other = b"another shard"
    await circle.pair.progress(6, 6)
    await circle.pair.checkpoint(6, [other])
    await one.say(one.put(DATA), one.put(other))
    await one.server._server.stop(None)  # type: ignore[union-attr]
    await circle.pair.checkpoint(5, [DATA])
    assert (await three.client.fetch(PIECE)).read_bytes() == DATA
    assert one.identity.id in three.client._unreachable
    assert await three.client._sources(piece_of(other).digest) == []


async def test_one_agent_gets_no_more_than_its_share_of_a_lender(circle: Circle) -> None:
    data = os.urandom(20 << 20)
    one = await circle.lender(0)
    one.put(data)
    good = ticket.issue(
        circle.c.authority.sign,
        agent_id=circle.identities[2].id,
        digest=piece_of(data).digest,
        now_unix_s=time.time(),
    )
    request = agent_pb2.GetPeerBlobRequest(ticket=good)
    address = f"127.0.0.1:{one.server.port}"
    async with (
        wire.peer_channel(circle.identities[2], one.identity.id, address) as channel,
        wire.peer_channel(circle.identities[2], one.identity.id, address) as another,
    ):
        calls = [
            agent_pb2_grpc.PeerServiceStub(channel).GetBlob(request) for _ in range(SERVED_AT_ONCE_TO_ONE)
        ]
        for call in calls:
            await call.read()  # and no more: it holds its place
        with pytest.raises(grpc.aio.AioRpcError, match="as many blobs") as error:
            await agent_pb2_grpc.PeerServiceStub(another).GetBlob(request).read()
        assert wire.refusal_of(error.value) == agent_pb2.REFUSAL_RATE_LIMITED
        for call in calls:
            call.cancel()


async def test_an_agent_that_is_only_busy_is_asked_again_when_nobody_else_has_the_blob(
    circle: Circle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.peers.SERVED_AT_ONCE", 1)
    shards = [os.urandom(2_000_000) for _ in range(4)]
    await circle.pair.progress(6, 6)
    assert (await circle.pair.checkpoint(6, shards))[-1]
    one, three = await circle.lender(0), await circle.lender(2)
    pieces = [one.put(data) for data in shards]
    await one.say(*pieces)
    for piece in pieces:
        circle.lose(piece)
    paths = await asyncio.gather(*(three.client.fetch(piece) for piece in pieces))
    assert [path.read_bytes() for path in paths] == shards
    assert one.server.service.served_bytes == sum(map(len, shards))


def test_bytes_are_spread_over_time_by_the_volunteers_bound() -> None:
    now = 100.0
    pace = Pace(1_000, monotonic=lambda: now)
    assert [pace.delay_s(500) for _ in range(3)] == [0.0, 0.5, 1.0]
    now = 110.0
    assert pace.delay_s(500) == 0.0
    assert Pace(0).delay_s(1 << 40) == 0.0


async def test_a_lender_serves_on_with_a_renewed_certificate(circle: Circle) -> None:
    one = await circle.lender(0)
    await one.say(one.put(DATA))
    good = await circle.ticket()
    assert await circle.ask(one, circle.identities[2], good) == DATA
    renewed = circle.c.authority.issue_operator(Role.AGENT, one.identity.id, one.identity.address)
    one.server._identity = lambda: renewed
    assert await circle.ask(one, circle.identities[2], good) == DATA
    assert one.server._shown is renewed
