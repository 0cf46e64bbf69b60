"""What agents' caches hold, by their own word, and who may be sent to whom for a blob.

All of it is volatile: an agent says it anew in every session.  A false word costs whoever believes it a
try and nothing more, since every fetch is verified.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coordinator.core.model import (
    AgentId,
    Event,
    Job,
    Record,
    Reply,
    SessionId,
    Standing,
    StandingChanged,
    State,
)
from protos import agent_pb2, ticket

MOST_BLOBS = 4_096
"""Blobs that are remembered of one agent's cache."""
MOST_SOURCES = 8


@dataclass(slots=True, kw_only=True)
class Cache:
    """One agent's, as it was told in the session that is open."""

    session_id: SessionId
    port: int = 0
    blobs: set[str] = field(default_factory=set)
    fetched: tuple[int, int] = (0, 0)
    """Bytes that are there, and bytes in all, of what the agent is fetching."""


class Caches:
    """What is known; as an observer of the loop it also passes on who was banned."""

    def __init__(self, sign: Callable[[bytes], bytes], revoked: Callable[[AgentId], None]) -> None:
        """`sign` is the authority's; `revoked` tells every agent that one is to be served nothing more."""
        self._sign = sign
        self._revoked = revoked
        self._caches: dict[AgentId, Cache] = {}
        self._holders: defaultdict[str, set[AgentId]] = defaultdict(set)

    def committed(self, record: Record) -> None:
        if isinstance(record, StandingChanged) and record.standing is Standing.BANNED:
            self._revoked(record.agent_id)

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None:
        pass

    def wrote(self, entries: int, seconds: float) -> None:
        pass

    def opened(self, agent_id: AgentId, session_id: SessionId) -> None:
        """A session of the agent is open; what was said in one before is void."""
        self._forget(agent_id)
        self._caches[agent_id] = Cache(session_id=session_id)

    def closed(self, agent_id: AgentId, session_id: SessionId) -> None:
        found = self._caches.get(agent_id)
        if found is not None and found.session_id == session_id:
            self._forget(agent_id)

    def heard(
        self,
        agent_id: AgentId,
        session_id: SessionId,
        *,
        whole: bool,
        added: Sequence[str],
        removed: Sequence[str],
        port: int,
    ) -> None:
        """The agent's word about its cache."""
        cache = self._caches.get(agent_id)
        if cache is None or cache.session_id != session_id:
            return
        cache.port = port
        for digest in cache.blobs - set(added) if whole else removed:
            self._drop(agent_id, cache, digest)
        for digest in added:
            if len(cache.blobs) >= MOST_BLOBS:
                break
            cache.blobs.add(digest)
            self._holders[digest].add(agent_id)

    def fetching(self, agent_id: AgentId, session_id: SessionId, done: int, total: int) -> None:
        cache = self._caches.get(agent_id)
        if cache is not None and cache.session_id == session_id:
            cache.fetched = (done, total)

    def of(self, agent_id: AgentId) -> Cache | None:
        return self._caches.get(agent_id)

    def _forget(self, agent_id: AgentId) -> None:
        cache = self._caches.pop(agent_id, None)
        if cache is not None:
            for digest in list(cache.blobs):
                self._drop(agent_id, cache, digest)

    def _drop(self, agent_id: AgentId, cache: Cache, digest: str) -> None:
        cache.blobs.discard(digest)
        holders = self._holders.get(digest)
        if holders is not None:
            holders.discard(agent_id)
            if not holders:
                del self._holders[digest]

    def sources(
        self, state: State, agent_id: AgentId, digests: Sequence[str]
    ) -> list[tuple[str, list[agent_pb2.BlobSource]]]:
        """For each digest of the job that the agent serves, who else has it; digests that nobody has are left out."""
        job_id = state.agents[agent_id].job_id
        if job_id is None:
            return []
        named = blobs_of(state.jobs[job_id])
        known = (digest for digest in digests if any(digest in blobs for blobs in named))
        found = ((digest, self._serving(state, agent_id, digest)) for digest in known)
        return [(digest, sources) for digest, sources in found if sources]

    def _serving(self, state: State, agent_id: AgentId, digest: str) -> list[agent_pb2.BlobSource]:
        able = []
        for other in self._holders.get(digest, ()):
            agent = state.agents.get(other)
            if (
                other != agent_id
                and agent is not None
                and agent.standing is not Standing.BANNED
                and not agent.mistrusted
                and agent_id not in agent.accusers
                and self._caches[other].port
                and agent.facts.advertise_host
            ):
                able.append(agent)
        # Another order for each pair, so that many who restore at once do not all ask the same agent.
        able.sort(key=lambda agent: _order(agent_id, agent.agent_id, digest))
        return [
            agent_pb2.BlobSource(
                agent_id=agent.agent_id,
                host=agent.facts.advertise_host,
                port=self._caches[agent.agent_id].port,
            )
            for agent in able[:MOST_SOURCES]
        ]

    def reply(
        self, agent_id: AgentId, found: Sequence[tuple[str, list[agent_pb2.BlobSource]]]
    ) -> agent_pb2.FindSourcesReply:
        """The sources with a ticket for each digest.  Signs: call it in a thread."""
        now = time.time()
        return agent_pb2.FindSourcesReply(
            blobs=[
                agent_pb2.BlobSources(
                    ticket=ticket.issue(self._sign, agent_id=agent_id, digest=digest, now_unix_s=now),
                    sources=sources,
                )
                for digest, sources in found
            ]
        )


def _order(agent_id: str, source: str, digest: str) -> bytes:
    return hashlib.blake2b(f"{agent_id}/{source}/{digest}".encode(), digest_size=8).digest()


def blobs_of(job: Job) -> list[frozenset[str]]:
    """The shards of the job's dataset, and of each of its checkpoints."""
    named = [_shards_of_checkpoint(checkpoint.manifest_json) for checkpoint in job.checkpoints]
    if job.spec.dataset_json:
        named.append(_shards_of_dataset(job.spec.dataset_json))
    return named


@functools.lru_cache(maxsize=256)
def _shards_of_checkpoint(manifest_json: str) -> frozenset[str]:
    return frozenset(shard["digest"] for shard in json.loads(manifest_json)["shards"])


@functools.lru_cache(maxsize=64)
def _shards_of_dataset(dataset_json: str) -> frozenset[str]:
    splits = json.loads(dataset_json)["splits"]
    return frozenset(shard["digest"] for shards in splits.values() for shard in shards)
