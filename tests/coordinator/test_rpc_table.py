"""Every RPC of every service, tried with every kind of identity over real TLS.

The rows come from the service descriptors of `protos/`, the expected outcomes from the one table in
`coordinator/access.py`: an RPC that was added without a rule fails here.
"""

from __future__ import annotations

import datetime as dt
import importlib
import pkgutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2

import protos
from coordinator.access import ENROLL_RULES, MAIN_RULES
from coordinator.identity import Authority, RevokedOperators, Role
from protos import admin_pb2, agent_pb2
from protos.wire import SERVER_NAME, Identity, refusal_of
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, running_coordinator, signing_request

ALLOWED = "allowed"
NO_HANDSHAKE = "no TLS handshake"
BY_THE_GUARD = {"WRONG_ROLE", "BANNED", "UNKNOWN_AGENT", "RATE_LIMITED"}
STREAM_S = 0.5
"""How long a stream that was let in is looked at: a call that is refused ends at once."""


def methods() -> dict[str, Any]:
    """Every method of every service that the packages define, by full name."""
    modules = [
        importlib.import_module(f"protos.{found.name}")
        for found in pkgutil.iter_modules(protos.__path__)
        if found.name.endswith("_pb2")
    ]
    services = [
        service
        for module in (*modules, health_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return {
        f"/{service.full_name}/{method.name}": method for service in services for method in service.methods
    }


METHODS = methods()


async def outcome(channel: grpc.aio.Channel, name: str) -> str:
    """What an empty request meets: "allowed", the guard's refusal, or that TLS did not come about."""
    method = METHODS[name]
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    endless = method.server_streaming and not method.client_streaming
    call = kind(name)(
        iter([b""]) if method.client_streaming else b"", timeout=STREAM_S if endless else RPC_TIMEOUT_S
    )
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        refusal = refusal_of(error)
        reason = agent_pb2.Refusal.Name(refusal).removeprefix("REFUSAL_") if refusal is not None else ""
        if reason in BY_THE_GUARD:
            return reason
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return NO_HANDSHAKE
        if reason or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return ALLOWED
        return f"{error.code().name}: {error.details()}"
    return ALLOWED


def expected(roles: frozenset[Role], role: Role | None, why_not: str = "") -> str:
    """`role` is None for whoever TLS keeps out; `why_not` is what the guard has against this identity."""
    if role is None:
        return NO_HANDSHAKE
    if role not in roles:
        return "WRONG_ROLE"
    return why_not or ALLOWED


def identity_that_ends(c: RunningCoordinator, authority: Authority, ttl: dt.timedelta) -> Identity:
    """An agent's identity, signed by `authority`, of an agent that the coordinator knows."""
    key, _ = signing_request()
    issued = authority.issue_client(key.public_key(), Role.AGENT, "a0000001", ttl)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(
        role="agent",
        id="a0000001",
        address=c.main_address,
        certificate_pem=issued.certificate_pem.decode(),
        key_pem=key_pem.decode(),
        authority_pem=c.authority.certificate_pem.decode(),
    )


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path) as running:
        yield running


def nobody(c: RunningCoordinator, address: str) -> grpc.aio.Channel:
    """A channel of someone without a certificate."""
    credentials = grpc.ssl_channel_credentials(root_certificates=c.authority.certificate_pem)
    options = [("grpc.ssl_target_name_override", SERVER_NAME)]
    return grpc.aio.secure_channel(address, credentials, options=options)


async def test_each_rpc_lets_in_exactly_the_identities_of_its_rule(c: RunningCoordinator) -> None:
    banned = await c.enroll("banned")
    ban = admin_pb2.AgentCommandRequest(agent=banned.id, kind=admin_pb2.AGENT_COMMAND_KIND_BAN)
    await (await c.admin()).CommandAgent(ban, timeout=RPC_TIMEOUT_S)
    revoked = c.identity(Role.ADMIN, "former")
    RevokedOperators(c.home).add(Role.ADMIN, "former")
    # Backdating lets a certificate be issued that has expired already.
    expired = identity_that_ends(c, c.authority, dt.timedelta(seconds=-1))
    foreign = identity_that_ends(c, Authority.create(), dt.timedelta(hours=1))
    callers: dict[str, tuple[grpc.aio.Channel, Role | None, str]] = {
        "no certificate": (nobody(c, c.main_address), None, ""),
        "expired": (await c.channel(expired), None, ""),
        "foreign authority": (await c.channel(foreign), None, ""),
        "agent": (await c.channel(await c.enroll("box")), Role.AGENT, ""),
        "banned agent": (await c.channel(banned), Role.AGENT, "BANNED"),
        "unknown agent": (
            await c.channel(c.identity(Role.AGENT, "a9999999")),
            Role.AGENT,
            "UNKNOWN_AGENT",
        ),
        "admin": (await c.channel(c.admin_identity), Role.ADMIN, ""),
        "revoked admin": (await c.channel(revoked), Role.ADMIN, "BANNED"),
        "observer": (await c.channel(c.identity(Role.OBSERVER, "eve")), Role.OBSERVER, ""),
    }
    wrong = []
    for who, (channel, role, why_not) in callers.items():
        for name in METHODS:
            found = await outcome(channel, name)
            wanted = expected(MAIN_RULES.get(name, frozenset()), role, why_not)
            if found == "UNKNOWN_AGENT" and role is not Role.AGENT:
                found = ALLOWED  # the handler's word about the agent that was asked for, not the guard's
            if found != wanted:
                wrong.append(f"{who} calling {name}: {found}, expected {wanted}")
    await callers["no certificate"][0].close()
    assert not wrong, "\n".join(wrong)


async def test_the_enrolment_port_serves_only_enroll_whoever_calls(c: RunningCoordinator) -> None:
    agent_methods = [name for name in METHODS if "/muster.v1.AgentService/" in name]
    async with nobody(c, c.enroll_address) as channel:
        found = {name: await outcome(channel, name) for name in agent_methods}
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary("/muster.v1.AdminService/ListJobs")(b"", timeout=RPC_TIMEOUT_S)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert found == {name: ALLOWED if name in ENROLL_RULES else "WRONG_ROLE" for name in agent_methods}
