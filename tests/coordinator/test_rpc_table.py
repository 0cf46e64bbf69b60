"""Every RPC of every service, tried with every kind of identity over real TLS.

The rows come from the service descriptors of `protos/`, the expected outcomes from the one table in
`coordinator/access.py`: an RPC that was added without a rule fails here.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib
import pkgutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2

import protos
from coordinator.access import ENROLL_RULES, MAIN_RULES, NOT_SERVED
from coordinator.identity import Authority, RevokedOperators, Role
from protos import admin_pb2, agent_pb2
from protos.wire import Identity, channel, enroll_channel, refusal_of
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, running_coordinator, signing_request

ALLOWED = "allowed"
NO_HANDSHAKE = "no TLS handshake"
NOT_THERE = "no such method"
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


def outcome(channel: grpc.Channel, name: str) -> str:
    """What an empty request, or a stream of none, meets: "allowed", the guard's refusal, or that it got nowhere."""
    method = METHODS[name]
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    endless = method.server_streaming and not method.client_streaming
    try:
        reply = kind(name)(
            iter(()) if method.client_streaming else b"", timeout=STREAM_S if endless else RPC_TIMEOUT_S
        )
        if method.server_streaming:
            list(reply)
    except grpc.RpcError as error:
        refusal, code = refusal_of(error), error.code()  # type: ignore[attr-defined]
        reason = "" if refusal is None else agent_pb2.Refusal.Name(refusal).removeprefix("REFUSAL_")
        match code:
            case _ if reason in BY_THE_GUARD:
                return reason
            case grpc.StatusCode.UNAVAILABLE:
                return NO_HANDSHAKE
            case grpc.StatusCode.UNIMPLEMENTED:
                return NOT_THERE
            case _ if reason or code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return ALLOWED
            case _:
                return f"{code.name}: {error.details()}"  # type: ignore[attr-defined]
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


def nobody(c: RunningCoordinator, address: str) -> grpc.Channel:
    """A channel of someone without a certificate."""
    return enroll_channel(c.authority.certificate_pem, address)


async def test_each_rpc_lets_in_exactly_the_identities_of_its_rule(c: RunningCoordinator) -> None:
    banned = await c.enroll("banned")
    ban = admin_pb2.AgentCommandRequest(agent=banned.id, kind=admin_pb2.AGENT_COMMAND_KIND_BAN)
    await (await c.admin()).CommandAgent(ban, timeout=RPC_TIMEOUT_S)
    RevokedOperators(c.home).add(Role.ADMIN, "former")
    # Backdating lets a certificate be issued that has expired already.
    expired = identity_that_ends(c, c.authority, dt.timedelta(seconds=-1))
    foreign = identity_that_ends(c, Authority.create(), dt.timedelta(hours=1))
    callers: dict[str, tuple[Identity | None, Role | None, str]] = {
        "no certificate": (None, None, ""),
        "expired": (expired, None, ""),
        "foreign authority": (foreign, None, ""),
        "agent": (await c.enroll("box"), Role.AGENT, ""),
        "banned agent": (banned, Role.AGENT, "BANNED"),
        "unknown agent": (c.identity(Role.AGENT, "a9999999"), Role.AGENT, "UNKNOWN_AGENT"),
        "admin": (c.admin_identity, Role.ADMIN, ""),
        "revoked admin": (c.identity(Role.ADMIN, "former"), Role.ADMIN, "BANNED"),
        "observer": (c.identity(Role.OBSERVER, "eve"), Role.OBSERVER, ""),
    }

    def row(identity: Identity | None) -> dict[str, str]:
        made = nobody(c, c.main_address) if identity is None else channel(identity, c.main_address)
        with made:
            return {name: outcome(made, name) for name in METHODS}

    wrong = []
    for who, (identity, role, why_not) in callers.items():
        for name, met in (await asyncio.to_thread(row, identity)).items():
            # What the handler says of an agent that was asked for is not the guard's word on the caller.
            found = ALLOWED if met == "UNKNOWN_AGENT" and role is not Role.AGENT else met
            wanted = expected(MAIN_RULES.get(name, frozenset()), role, why_not)
            if found != wanted and not (found == NOT_THERE and name in NOT_SERVED):
                wrong.append(f"{who} calling {name}: {found}, expected {wanted}")
    assert not wrong, "\n".join(wrong)


async def test_the_enrolment_port_serves_only_enroll_whoever_calls(c: RunningCoordinator) -> None:
    def row() -> dict[str, str]:
        with nobody(c, c.enroll_address) as made:
            return {name: outcome(made, name) for name in METHODS}

    for name, found in (await asyncio.to_thread(row)).items():
        if name in ENROLL_RULES:
            assert found == ALLOWED
        else:
            assert found == ("WRONG_ROLE" if "/muster.v1.AgentService/" in name else NOT_THERE), name
