"""A ban or a revocation takes effect on what is open: the order of events, as the coordinator recorded them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from coordinator.core.model import AgentId
from coordinator.identity import RevokedOperators, Role
from protos import admin_pb2, admin_pb2_grpc, agent_pb2
from protos.wire import Identity, refusal_of
from tests.coordinator.harness import RPC_TIMEOUT_S, AgentSession, RunningCoordinator, running_coordinator

JOB = {"name": "demo", "elastic": {"min_nodes": 3, "max_nodes": 3, "last_call": 0, "min_generation": 0}}
LEASE_MS = 60_000  # so that no lease ends meanwhile


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path, lease_ms=LEASE_MS) as running:
        yield running


async def member(c: RunningCoordinator, identity: Identity) -> AgentSession:
    """An agent that is assigned and ready."""
    session = AgentSession(await c.agent(identity))
    await session.hello()
    job_id = (await session.hear("assignment")).assignment.job_id
    await ready(session, job_id)
    return session


async def ready(session: AgentSession, job_id: str, port: int = 1) -> None:
    """Ready with a store at `port`: one that no plan has used yet."""
    message = agent_pb2.Ready(job_id=job_id, store_host="127.0.0.1", store_port=port, holds_state=port > 1)
    await session.say(ready=message)


async def formed(session: AgentSession) -> agent_pb2.Plan:
    plan = (await session.hear("plan")).plan
    await session.say(formed=agent_pb2.Formed(job_id=plan.job_id, generation=plan.generation))
    return plan


async def ban(c: RunningCoordinator, agent_id: str) -> None:
    request = admin_pb2.AgentCommandRequest(agent=agent_id, kind=admin_pb2.AGENT_COMMAND_KIND_BAN)
    await (await c.admin()).CommandAgent(request, timeout=RPC_TIMEOUT_S)


async def test_a_banned_member_is_out_of_the_next_generation_and_its_session_is_closed(
    c: RunningCoordinator,
) -> None:
    identities = [await c.enroll(name) for name in ("a", "b", "c")]
    await (await c.admin()).SubmitJob(admin_pb2.SubmitJobRequest(spec_json=json.dumps(JOB)))
    sessions = [await member(c, identity) for identity in identities]
    plans = [await formed(session) for session in sessions]
    assert [len(plan.members) for plan in plans] == [3, 3, 3]
    scale = admin_pb2.ScaleJobRequest(job="demo", min_nodes=2, max_nodes=3)
    await (await c.admin()).ScaleJob(scale, timeout=RPC_TIMEOUT_S)
    watch = (await c.admin()).Watch(admin_pb2.WatchRequest(follow=True), timeout=RPC_TIMEOUT_S)
    await ban(c, identities[1].id)

    away = (await sessions[1].hear("go_away")).go_away
    assert (away.reason, away.retry) == (agent_pb2.REFUSAL_BANNED, False)
    await sessions[1].ended()
    assert c.coordinator.sessions.of(AgentId(identities[1].id)) is None
    for survivor in (sessions[0], sessions[2]):
        await ready(survivor, plans[0].job_id, port=2)
    after = (await sessions[0].hear("plan")).plan
    assert {one.agent_id for one in after.members} == {identities[0].id, identities[2].id}

    seen: list[str] = []
    async for event in watch:
        record = json.loads(event.json)
        if event.kind == "StandingChanged" and record["standing"] == "banned":
            seen.append("banned")
        elif event.kind in {"MemberLost", "AgentLost"} and record["agent_id"] == identities[1].id:
            seen.append("lost")
        elif event.kind == "GenerationPlanned" and record["generation"]["number"] == after.generation:
            seen.append("planned")
            break
    watch.cancel()
    # In the order of the journal: nobody was asked to form with it after it was banned.
    assert seen[0] == "banned"
    assert seen[-1] == "planned"
    assert "lost" in seen


async def test_a_banned_agent_that_does_not_read_is_cut_off(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    session = AgentSession(await c.agent(identity))
    await session.hello()
    open_session = c.coordinator.sessions.of(AgentId(identity.id))
    assert open_session is not None
    fat = agent_pb2.CoordinatorMessage(drain=agent_pb2.Drain(reason="x" * 1_000_000))
    for _ in range(20):  # more than the windows of the connection hold: the GoAway waits behind them
        open_session.send(fat)
    await ban(c, identity.id)
    # The write's own timeout is ten seconds and the lease sixty: what ends it is the ban.
    async with asyncio.timeout(5):
        while c.coordinator.sessions.of(AgentId(identity.id)) is not None:  # noqa: ASYNC110 - nothing rings here
            await asyncio.sleep(0.01)


async def test_a_revoked_operators_open_stream_ends(c: RunningCoordinator) -> None:
    channel = await c.channel(c.identity(Role.OBSERVER, "eve"))
    watch = admin_pb2_grpc.AdminServiceStub(channel).Watch(
        admin_pb2.WatchRequest(follow=True), timeout=RPC_TIMEOUT_S
    )
    await c.create_token()
    assert (await watch.read()).kind == "TokenCreated"
    RevokedOperators(c.home).add(Role.OBSERVER, "eve")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await watch.read()
    assert refusal_of(error.value) == agent_pb2.REFUSAL_BANNED


async def test_an_identity_has_no_more_than_its_calls_under_way(c: RunningCoordinator) -> None:
    channel = await c.channel(c.identity(Role.OBSERVER, "eve"))
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    c.coordinator._access._most_calls = 3
    request = admin_pb2.WatchRequest(follow=True)
    watches = [stub.Watch(request, timeout=RPC_TIMEOUT_S) for _ in range(3)]
    await c.create_token()
    for watch in watches:
        await watch.read()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ListJobs(admin_pb2.ListRequest(), timeout=RPC_TIMEOUT_S)
    assert refusal_of(error.value) == agent_pb2.REFUSAL_RATE_LIMITED
    watches[0].cancel()
    async with asyncio.timeout(RPC_TIMEOUT_S):
        while len(c.coordinator._access._calls["observer/eve"]) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await stub.ListJobs(admin_pb2.ListRequest(), timeout=RPC_TIMEOUT_S)
