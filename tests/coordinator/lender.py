"""Agents that lend their caches, for tests: the agent's own server and client on loopback, over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from agent.blobs import BlobCache, BlobClient, Piece
from agent.peers import Lending, PeerServer
from protos import agent_pb2, agent_pb2_grpc, wire
from tests.coordinator.harness import AgentSession, RunningCoordinator


def piece_of(data: bytes) -> Piece:
    return Piece(digest=hashlib.sha256(data).hexdigest(), bytes=len(data))


class TrustingCache(BlobCache):
    """Never looks at what it has: the cache of an agent that lies, or whose disk does."""

    def holds(self, digest: str) -> bool:
        return self.path(digest).exists()


@dataclass(kw_only=True)
class Lender:
    """One agent: its cache, its server, its client, and what it says in its session."""

    identity: wire.Identity
    session: AgentSession | None
    server: PeerServer
    client: BlobClient
    accused: list[tuple[str, str]]
    beats: int = 0

    @property
    def cache(self) -> BlobCache:
        return self.client.cache

    def put(self, data: bytes, *, under: Piece | None = None) -> Piece:
        """Have bytes in the cache, if need be under the name of others."""
        piece = under or piece_of(data)
        self.cache.path(piece.digest).write_bytes(data)
        return piece

    async def say(self, *pieces: Piece) -> None:
        """Tell the coordinator that the cache holds these, and nothing else; returns when it has heard."""
        assert self.session is not None
        await self.session.say(
            cached=agent_pb2.Cached(
                whole=True,
                added=[bytes.fromhex(piece.digest) for piece in pieces],
                peer_port=self.server.port,
            )
        )
        await self.heard()

    async def heard(self) -> None:
        """Until the coordinator has taken all that was said."""
        assert self.session is not None
        self.beats += 1
        await self.session.say(heartbeat=agent_pb2.Heartbeat(sequence=self.beats))
        while (await self.session.hear("heartbeat_ack")).heartbeat_ack.sequence != self.beats:
            pass


@contextlib.asynccontextmanager
async def lender(
    c: RunningCoordinator,
    identity: wire.Identity,
    root: Path,
    session: AgentSession | None = None,
    lending: Lending | None = None,
    cache: type[BlobCache] = BlobCache,
) -> AsyncIterator[Lender]:
    await asyncio.to_thread(root.mkdir)
    accused: list[tuple[str, str]] = []
    held = cache(root)
    server = PeerServer(held, lambda: identity, lending or Lending())
    await server.start("127.0.0.1")
    async with wire.aio_channel(identity, c.main_address) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        client = BlobClient(
            lambda: stub,
            held,
            identity=lambda: identity,
            accuse=lambda agent_id, digest: accused.append((agent_id, digest)),
        )
        yield Lender(identity=identity, session=session, server=server, client=client, accused=accused)
    await server.stop()
