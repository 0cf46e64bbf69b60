"""Identities that change while they are used: bans, revocation, expiry, renewal, rates.  Who may call what at
all is in `test_rpc_table.py`."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.identity import RevokedOperators, Role, principal_of
from protos import admin_pb2, agent_pb2
from protos.wire import Identity, refusal_of
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    loopback_config,
    running_coordinator,
    signing_request,
)
from tests.coordinator.test_rpc_table import METHODS


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path) as running:
        yield running


async def call(channel: grpc.aio.Channel, name: str) -> int | None:
    """Call a method with an empty request; the refusal, or None for any other outcome."""
    method = METHODS[name]
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    request = b""
    argument = iter([request]) if method.client_streaming else request
    made = kind(name)(argument, timeout=RPC_TIMEOUT_S)
    try:
        if method.server_streaming:
            async for _ in made:
                pass
        else:
            await made
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    return None


async def test_a_ban_closes_the_open_session_and_every_later_call(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    session = AgentSession(await c.agent(identity))
    await session.hello()
    await (await c.admin()).CommandAgent(
        admin_pb2.AgentCommandRequest(
            agent=identity.id, kind=admin_pb2.AGENT_COMMAND_KIND_BAN, reason="miner"
        ),
        timeout=RPC_TIMEOUT_S,
    )
    away = (await session.hear("go_away")).go_away
    assert (away.reason, away.retry) == (agent_pb2.REFUSAL_BANNED, False)
    await session.ended()
    find = "/muster.v1.AgentService/FindBlobs"
    assert await call(await c.channel(identity), find) == agent_pb2.REFUSAL_BANNED


async def test_a_revoked_operator_is_refused_while_connected(c: RunningCoordinator) -> None:
    channel = await c.channel(c.identity(Role.OBSERVER, "eve"))
    assert await call(channel, "/muster.v1.AdminService/ListJobs") is None
    RevokedOperators(c.home).add(Role.OBSERVER, "eve")
    assert await call(channel, "/muster.v1.AdminService/ListJobs") == agent_pb2.REFUSAL_BANNED


async def test_health_is_served_to_whoever_has_an_identity(c: RunningCoordinator) -> None:
    stub = health_pb2_grpc.HealthStub(await c.channel(c.identity(Role.OBSERVER, "eve")))
    reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=RPC_TIMEOUT_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_caller_that_asks_too_often_is_told_to_wait(tmp_path: Path) -> None:
    config = loopback_config(limits={"calls_per_s": 0.001, "calls_burst": 3})
    async with running_coordinator(tmp_path, config=config) as c:
        channel = await c.channel(c.admin_identity)
        refusals = [await call(channel, "/muster.v1.AdminService/ListJobs") for _ in range(4)]
    assert refusals == [None, None, None, agent_pb2.REFUSAL_RATE_LIMITED]


async def test_renewing_keeps_the_identity_whatever_the_request_says(c: RunningCoordinator) -> None:
    identity = await c.enroll()
    _, request = signing_request()
    reply = await (await c.agent(identity)).RenewIdentity(
        agent_pb2.RenewIdentityRequest(csr_pem=request), timeout=RPC_TIMEOUT_S
    )
    principal = principal_of(reply.certificate_pem)
    assert principal is not None
    assert (principal.role, principal.id) == (Role.AGENT, identity.id)
    assert principal.not_after_unix_s == reply.not_after_unix_s


async def test_a_session_ends_when_its_certificate_expires(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        enrolled = await c.enroll()
        key, _ = signing_request()
        issued = c.authority.issue_client(key.public_key(), Role.AGENT, enrolled.id, dt.timedelta(seconds=3))
        short = Identity(
            role="agent",
            id=enrolled.id,
            address=c.main_address,
            certificate_pem=issued.certificate_pem.decode(),
            key_pem=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            authority_pem=enrolled.authority_pem,
        )
        session = AgentSession(await c.agent(short))
        await session.hello()
        away = (await session.hear("go_away")).go_away
        assert away.retry
        assert "expired" in away.message
