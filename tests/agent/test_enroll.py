from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from agent.enroll import enroll, renewal_due, validity
from agent.errors import RefusedByCoordinator, Unreachable, UntrustedCoordinator
from agent.home import Home
from protos import agent_pb2, wire
from tests.agent.fake_coordinator import Authority, FakeCoordinator

SECRET = "s" * 32


def token(authority: Authority) -> wire.JoinToken:
    return wire.JoinToken(fingerprint=authority.fingerprint, token_id="abcd1234", secret=SECRET)


async def test_token_is_exchanged_for_an_identity_whose_key_never_left(
    coordinator: FakeCoordinator, home: Home
) -> None:
    identity = await asyncio.to_thread(enroll, token(coordinator.authority), coordinator.address, "box")
    identity.save(home.identity)
    (request,) = coordinator.enrolled
    assert (request.token_id, request.secret, request.name) == ("abcd1234", SECRET, "box")
    assert b"PRIVATE" not in request.csr_pem
    assert identity.id == "a1"
    assert identity.address == coordinator.address
    assert identity.authority_pem.encode() == coordinator.authority.pem
    assert stat.S_IMODE(home.identity.stat().st_mode) == 0o600


async def test_coordinator_of_another_authority_never_sees_the_secret(coordinator: FakeCoordinator) -> None:
    with pytest.raises(UntrustedCoordinator, match="fingerprint"):
        await asyncio.to_thread(enroll, token(Authority()), coordinator.address, "box")
    assert coordinator.enrolled == []


@pytest.fixture
async def impostor() -> AsyncIterator[FakeCoordinator]:
    """Shows the right authority behind a leaf that another one signed."""
    theirs, ours = Authority(), Authority()
    theirs.chain = theirs.chain.removesuffix(theirs.pem) + ours.pem
    fake = FakeCoordinator(theirs)
    await fake.start()
    fake.authority = ours
    yield fake
    await fake.stop()


async def test_leaf_that_the_pinned_authority_did_not_sign_never_sees_the_secret(
    impostor: FakeCoordinator,
) -> None:
    with pytest.raises(UntrustedCoordinator, match="not signed by it"):
        await asyncio.to_thread(enroll, token(impostor.authority), impostor.address, "box")
    assert impostor.enrolled == []


async def test_refused_token_names_the_reason(coordinator: FakeCoordinator) -> None:
    coordinator.refuse_enrolment = agent_pb2.REFUSAL_TOKEN_EXPIRED
    with pytest.raises(RefusedByCoordinator, match=r"time is over.*TOKEN_EXPIRED") as caught:
        await asyncio.to_thread(enroll, token(coordinator.authority), coordinator.address, "box")
    assert caught.value.exit_code == 4
    assert SECRET not in str(caught.value)


def test_nobody_at_the_address_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1") as caught:
        enroll(token(Authority()), "127.0.0.1:1", "box")
    assert caught.value.exit_code == 3


async def test_server_without_tls_is_named_as_such() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unreachable, match="TLS"):
        await asyncio.to_thread(enroll, token(Authority()), f"127.0.0.1:{port}", "box")
    server.close()


def test_renewal_is_due_when_a_third_of_the_life_is_left() -> None:
    identity = Authority().identity("a1", "127.0.0.1:1", timedelta(hours=3))
    begin, end = validity(identity)
    third = (end - begin) / 3
    assert not renewal_due(identity, end - third - timedelta(seconds=1))
    assert renewal_due(identity, end - third)
