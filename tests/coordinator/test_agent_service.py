"""Enrolment and the session over real TLS: what is accepted, what is refused, and how sessions end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from coordinator.core.model import Presence
from protos import admin_pb2, agent_pb2
from protos.wire import Identity, JoinToken, refusal_of
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    a_hello,
    loopback_config,
    running_coordinator,
    signing_request,
)


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path) as running:
        yield running


async def enroll_refusal(c: RunningCoordinator, **changes: Any) -> int | None:
    token = JoinToken.parse(changes.pop("token", None) or await c.create_token())
    _, csr = signing_request()
    request = agent_pb2.EnrollRequest(
        **{
            "protocol": agent_pb2.PROTOCOL_VERSION_1,
            "token_id": token.token_id,
            "secret": token.secret,
            "csr_pem": csr,
            "name": "box",
            **changes,
        }
    )
    async with c.enroll_stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Enroll(request, timeout=RPC_TIMEOUT_S)
    return refusal_of(error.value)


async def test_an_enrolled_agent_gets_an_identity_that_opens_a_session(c: RunningCoordinator) -> None:
    identity = await c.enroll("box-1")
    welcome = await AgentSession(await c.agent(identity)).hello()
    assert welcome.agent_id == identity.id
    assert (welcome.lease_ms, welcome.heartbeat_interval_ms) == (10_000, 2_500)
    view = json.loads((await (await c.admin()).GetAgent(admin_pb2.AgentRef(agent="box-1"))).json)
    assert (view["id"], view["presence"], view["connected"]) == (identity.id, "ready", True)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"protocol": 0}, agent_pb2.REFUSAL_PROTOCOL_VERSION),
        ({"token_id": "UPPER"}, agent_pb2.REFUSAL_TOKEN_MALFORMED),
        ({"secret": "short"}, agent_pb2.REFUSAL_TOKEN_MALFORMED),
        ({"token_id": "zzzzzzzz"}, agent_pb2.REFUSAL_TOKEN_UNKNOWN),
        ({"secret": "x" * 43}, agent_pb2.REFUSAL_TOKEN_UNKNOWN),
        ({"csr_pem": b"nonsense"}, agent_pb2.REFUSAL_BAD_CSR),
        ({"name": "no spaces"}, agent_pb2.REFUSAL_INVALID),
    ],
)
async def test_a_bad_enrolment_is_refused_with_its_reason(
    c: RunningCoordinator, changes: dict[str, Any], refusal: int
) -> None:
    assert await enroll_refusal(c, **changes) == refusal


async def test_a_token_enrols_as_often_as_it_says(c: RunningCoordinator) -> None:
    token = await c.create_token(uses=2)
    assert (await c.enroll("one", token)).id != (await c.enroll("two", token)).id
    assert await enroll_refusal(c, token=token) == agent_pb2.REFUSAL_TOKEN_EXHAUSTED


async def test_a_revoked_token_enrols_nobody(c: RunningCoordinator) -> None:
    token = await c.create_token()
    admin = await c.admin()
    view = json.loads(
        (
            await admin.RevokeToken(
                admin_pb2.RevokeTokenRequest(token_id=JoinToken.parse(token).token_id[:4])
            )
        ).json
    )
    assert view["standing"] == "revoked"
    assert await enroll_refusal(c, token=token) == agent_pb2.REFUSAL_TOKEN_REVOKED


async def test_a_tokens_secret_is_in_no_file_of_the_home(c: RunningCoordinator) -> None:
    secret = JoinToken.parse(await c.create_token()).secret
    for path in c.home.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


async def test_enrolments_from_one_address_are_bounded(tmp_path: Path) -> None:
    config = loopback_config(limits={"enrolments_per_s": 0.001, "enrolments_burst": 2})
    async with running_coordinator(tmp_path, config=config) as c:
        await c.enroll()
        await c.enroll()
        assert await enroll_refusal(c) == agent_pb2.REFUSAL_RATE_LIMITED


# ------------------------------------------------------------------------------------- session


async def connected(c: RunningCoordinator, identity: Identity | None = None, **hello: Any) -> AgentSession:
    session = AgentSession(await c.agent(identity or await c.enroll()))
    await session.hello(**hello)
    return session


async def go_away(session: AgentSession) -> agent_pb2.GoAway:
    away = (await session.hear("go_away")).go_away
    await session.ended()
    return away


async def test_heartbeats_are_answered_with_their_number(c: RunningCoordinator) -> None:
    session = await connected(c)
    for sequence in (1, 2, 7):
        await session.say(heartbeat=agent_pb2.Heartbeat(sequence=sequence))
        assert (await session.hear("heartbeat_ack")).heartbeat_ack.sequence == sequence


async def test_heartbeats_are_not_journalled(c: RunningCoordinator) -> None:
    session = await connected(c)
    before = c.coordinator.journal.last_sequence
    for sequence in range(20):
        await session.say(heartbeat=agent_pb2.Heartbeat(sequence=sequence))
        await session.hear("heartbeat_ack")
    assert c.coordinator.journal.last_sequence == before


async def test_another_protocol_version_is_told_to_upgrade(c: RunningCoordinator) -> None:
    session = AgentSession(await c.agent(await c.enroll()))
    await session.say(hello=a_hello(protocol=0))
    away = await go_away(session)
    assert (away.reason, away.retry) == (agent_pb2.REFUSAL_PROTOCOL_VERSION, False)
    assert "upgrade" in away.message


async def test_a_session_that_does_not_begin_with_hello_is_ended(c: RunningCoordinator) -> None:
    session = AgentSession(await c.agent(await c.enroll()))
    await session.say(heartbeat=agent_pb2.Heartbeat())
    away = await go_away(session)
    assert away.reason == agent_pb2.REFUSAL_INVALID
    assert away.message.startswith("hello: missing")


async def test_a_silent_session_is_ended_at_the_hello_timeout(tmp_path: Path) -> None:
    config = loopback_config(limits={"hello_timeout": "50ms"})
    async with running_coordinator(tmp_path, config=config) as c:
        away = await go_away(AgentSession(await c.agent(await c.enroll())))
    assert "did not come within" in away.message
    assert away.retry


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"ready": agent_pb2.Ready(job_id="j", store_host="h", store_port=0)}, "ready.store_port"),
        ({"hello": agent_pb2.Hello()}, "hello"),
        ({"heartbeat": agent_pb2.Heartbeat(activity="x" * 33)}, "heartbeat.activity"),
        ({"logs": agent_pb2.LogLines(job_id="j", lines=["x"] * 201)}, "logs.lines"),
        ({}, "body"),
    ],
)
async def test_a_malformed_message_ends_the_session_and_names_the_field(
    c: RunningCoordinator, body: dict[str, Any], field: str
) -> None:
    session = await connected(c)
    await session.say(**body)
    away = await go_away(session)
    assert away.reason == agent_pb2.REFUSAL_INVALID
    assert away.message.startswith(f"{field}: ")


async def test_a_flooding_session_is_ended(tmp_path: Path) -> None:
    config = loopback_config(limits={"session_messages_per_s": 0.001, "session_burst": 5})
    async with running_coordinator(tmp_path, config=config) as c:
        session = await connected(c)
        for sequence in range(6):
            await session.say(heartbeat=agent_pb2.Heartbeat(sequence=sequence))
        assert (await go_away(session)).reason == agent_pb2.REFUSAL_RATE_LIMITED


async def test_a_late_message_about_a_job_that_is_gone_does_not_end_the_session(
    c: RunningCoordinator,
) -> None:
    session = await connected(c)
    await session.say(formed=agent_pb2.Formed(job_id="jgone", generation=3))
    await session.say(heartbeat=agent_pb2.Heartbeat(sequence=1))
    assert (await session.hear("heartbeat_ack")).heartbeat_ack.sequence == 1


async def presence(c: RunningCoordinator, identity: Identity, wanted: set[Presence]) -> Presence:
    """Wait until the agent's presence is one of these."""
    async with asyncio.timeout(RPC_TIMEOUT_S):
        while True:
            news = c.coordinator.loop.record_bell.next
            found = await c.coordinator.loop.query(lambda state, _: state.agents[identity.id].presence)  # type: ignore[index]
            if found in wanted:
                return found
            await news.wait()


async def test_a_dropped_session_is_noticed_at_once(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    session = await connected(c, identity)
    session.cut()
    # The lease is ten seconds, so it is the closed stream that is noticed, not its end.
    async with asyncio.timeout(2):
        assert await presence(c, identity, {Presence.SUSPECT, Presence.LOST}) is Presence.SUSPECT


async def test_an_agent_whose_lease_expires_is_lost(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path, lease_ms=1_000) as c:
        identity = await c.enroll()
        await connected(c, identity)
        assert await presence(c, identity, {Presence.LOST}) is Presence.LOST


async def test_the_same_process_reconnecting_replaces_its_old_session(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    old = await connected(c, identity)
    new = await connected(c, identity)
    await old.ended()
    await new.say(heartbeat=agent_pb2.Heartbeat(sequence=5))
    assert (await new.hear("heartbeat_ack")).heartbeat_ack.sequence == 5


async def test_a_second_process_with_one_identity_is_refused_while_the_first_lives(
    c: RunningCoordinator,
) -> None:
    identity = await c.enroll()
    first = await connected(c, identity)
    second = AgentSession(await c.agent(identity))
    await second.say(hello=a_hello("i2"))
    assert (await go_away(second)).reason == agent_pb2.REFUSAL_DUPLICATE_IDENTITY
    await first.say(heartbeat=agent_pb2.Heartbeat(sequence=1))
    await first.hear("heartbeat_ack")


async def test_a_goodbye_ends_in_absence_not_in_loss(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    session = await connected(c, identity)
    await session.say(goodbye=agent_pb2.Goodbye(reason="bedtime"))
    await session.call.done_writing()
    assert await presence(c, identity, {Presence.ABSENT, Presence.LOST}) is Presence.ABSENT


async def test_an_agent_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    config = loopback_config(
        limits={"session_queue": 8, "session_messages_per_s": 1e6, "session_burst": 1_000_000}
    )
    async with running_coordinator(tmp_path, config=config) as c:
        identity = await c.enroll()
        session = AgentSession(await c.agent(identity))
        await session.hello()
        open_session = c.coordinator.sessions.of(identity.id)  # type: ignore[arg-type]
        assert open_session is not None
        fat = agent_pb2.CoordinatorMessage(drain=agent_pb2.Drain(reason="x" * 1_000_000))
        async with asyncio.timeout(RPC_TIMEOUT_S):
            while c.coordinator.sessions.of(identity.id) is open_session:  # type: ignore[arg-type]
                open_session.send(fat)
                await asyncio.sleep(0)


async def test_a_stopping_coordinator_asks_agents_to_come_back(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        session = await connected(c)
        stopping = asyncio.create_task(c.coordinator.stop())
        away = await go_away(session)
        await stopping
        assert away.retry
        assert "come back" in away.message or "reconnect" in away.message
