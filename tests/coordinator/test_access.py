"""Who may call what: the table holds for every method and every identity, over real TLS."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.access import ENROLL_RULES, MAIN_RULES
from coordinator.identity import Authority, RevokedOperators, Role, principal_of
from protos import admin_pb2, agent_pb2, agent_pb2_grpc
from protos.wire import Identity, aio_channel, refusal_of
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    loopback_config,
    running_coordinator,
    signing_request,
)


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path) as running:
        yield running


def methods() -> dict[str, Any]:
    """Every method of both services, by full name."""
    services = [
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    ]
    return {
        f"/{service.full_name}/{method.name}": method for service in services for method in service.methods
    }


def test_every_method_has_a_rule_and_every_rule_a_method() -> None:
    health = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}
    assert set(MAIN_RULES) - health == set(methods()) - ENROLL_RULES
    assert health <= set(MAIN_RULES)


async def call(channel: grpc.aio.Channel, name: str) -> int | None:
    """Call a method with an empty request; the refusal, or None for any other outcome."""
    method = methods()[name]
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


async def test_each_method_is_open_to_exactly_the_roles_of_its_rule(c: RunningCoordinator) -> None:
    identities = {
        Role.ADMIN: c.admin_identity,
        Role.OBSERVER: c.identity(Role.OBSERVER, "eve"),
        Role.AGENT: await c.enroll(),
    }
    for role, identity in identities.items():
        channel = await c.channel(identity)
        for name in methods():
            refusal = await call(channel, name)
            allowed = role in MAIN_RULES.get(name, ())
            assert (refusal != agent_pb2.REFUSAL_WRONG_ROLE) == allowed, (role, name, refusal)


async def test_enrolling_at_the_main_port_is_refused_even_with_a_certificate(c: RunningCoordinator) -> None:
    assert (
        await call(await c.channel(c.admin_identity), "/muster.v1.AgentService/Enroll")
        == agent_pb2.REFUSAL_WRONG_ROLE
    )


async def test_the_enrolment_port_serves_nothing_but_enroll(c: RunningCoordinator) -> None:
    async with c.enroll_stub() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.FindBlobs(agent_pb2.FindBlobsRequest(), timeout=RPC_TIMEOUT_S)
    assert refusal_of(error.value) == agent_pb2.REFUSAL_WRONG_ROLE


async def code_of(identity: Identity, address: str) -> grpc.StatusCode:
    async with aio_channel(identity, address) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.FindBlobs(agent_pb2.FindBlobsRequest(), timeout=RPC_TIMEOUT_S)
        return error.value.code()


async def test_a_certificate_of_another_authority_does_not_get_in(c: RunningCoordinator) -> None:
    stranger = Authority.create().issue_operator(Role.ADMIN, "admin", c.main_address)
    trusting = Identity(
        role=stranger.role,
        id=stranger.id,
        address=stranger.address,
        certificate_pem=stranger.certificate_pem,
        key_pem=stranger.key_pem,
        authority_pem=c.admin_identity.authority_pem,
    )
    assert await code_of(trusting, c.main_address) is grpc.StatusCode.UNAVAILABLE


async def test_nobody_gets_in_without_a_certificate(c: RunningCoordinator) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=c.authority.certificate_pem)
    options = [("grpc.ssl_target_name_override", "coordinator.muster.internal")]
    async with grpc.aio.secure_channel(c.main_address, credentials, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.AgentServiceStub(channel).FindBlobs(agent_pb2.FindBlobsRequest(), timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_agent_that_the_coordinator_does_not_know_is_refused_on_every_call(
    c: RunningCoordinator,
) -> None:
    channel = await c.channel(c.identity(Role.AGENT, "a9999999"))
    for name, roles in MAIN_RULES.items():
        if Role.AGENT in roles and name in methods():
            assert await call(channel, name) == agent_pb2.REFUSAL_UNKNOWN_AGENT, name


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
    channel = await c.channel(identity)
    for name, roles in MAIN_RULES.items():
        if Role.AGENT in roles and name in methods():
            assert await call(channel, name) == agent_pb2.REFUSAL_BANNED, name


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
