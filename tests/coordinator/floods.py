"""Peers that ask for too much, against a real musterd on loopback, bounded in number and time.

`python -m tests.coordinator.floods --connections 10000` is the long form; the suite runs a short one.  Every
attack runs while an honest agent heartbeats on one session, which must never end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
from cryptography.hazmat.primitives import serialization

from protos import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from protos.wire import MAX_MESSAGE_BYTES, SERVER_NAME, Identity, JoinToken, aio_channel, channel, refusal_of
from tests.coordinator.harness import AgentSession, signing_request
from tests.processes import Musterd, init_home, start_musterd

TIMEOUT_S = 60.0
LEASE = "6s"
PER_ADDRESS = 100
LIMITS: dict[str, Any] = {
    "handshake_timeout": "2s",
    "connections_per_address": PER_ADDRESS,
    "enrolments_per_s": 1,
    "enrolments_burst": 100,
    "session_queue": 64,
    "session_messages_per_s": 50,
    "session_burst": 500,
}
BLOBS: dict[str, Any] = {"reserve": 0, "chunk_timeout": "500ms", "slowest_upload": "1MiB"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The musterd under attack, and identities on it."""

    musterd: Musterd
    admin: Identity
    honest: Identity
    evil: Identity
    authority_pem: bytes
    channel: grpc.aio.Channel  # the evil agent's

    def address(self, port: str) -> tuple[str, int]:
        host, _, number = self.musterd.addresses[port].rpartition(":")
        return host, int(number)


def stranger(target_authority: bytes, address: str) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(root_certificates=target_authority)
    return grpc.aio.secure_channel(
        address, credentials, options=[("grpc.ssl_target_name_override", SERVER_NAME)]
    )


async def enrolled(musterd: Musterd, admin: Identity, authority: bytes, name: str) -> Identity:
    async with aio_channel(admin, musterd.addresses["main"]) as made:
        asked = admin_pb2.CreateTokenRequest(ttl_s=600, uses=1)
        reply = await admin_pb2_grpc.AdminServiceStub(made).CreateToken(asked, timeout=TIMEOUT_S)
    token = JoinToken.parse(reply.token)
    key, csr = signing_request()
    async with stranger(authority, musterd.addresses["enroll"]) as made:
        answer = await agent_pb2_grpc.AgentServiceStub(made).Enroll(
            agent_pb2.EnrollRequest(
                protocol=1, token_id=token.token_id, secret=token.secret, csr_pem=csr, name=name
            ),
            timeout=TIMEOUT_S,
        )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(
        role="agent",
        id=answer.agent_id,
        address=musterd.addresses["main"],
        certificate_pem=answer.certificate_pem.decode(),
        key_pem=key_pem.decode(),
        authority_pem=authority.decode(),
    )


@contextlib.asynccontextmanager
async def under_attack(directory: Path) -> AsyncIterator[Target]:
    home = directory / "home"
    init_home(home)
    musterd = start_musterd(home, lease=LEASE, limits=LIMITS, blobs=BLOBS)
    try:
        admin = Identity.load(home / "admin.json")
        authority = (home / "authority.pem").read_bytes()
        honest = await enrolled(musterd, admin, authority, "honest")
        evil = await enrolled(musterd, admin, authority, "evil")
        async with aio_channel(evil, musterd.addresses["main"]) as made:
            yield Target(
                musterd=musterd,
                admin=admin,
                honest=honest,
                evil=evil,
                authority_pem=authority,
                channel=made,
            )
    finally:
        musterd.stop()


# ------------------------------------------------------------------------------------- the attacks


async def silent_connections(target: Target, count: int) -> dict[str, int]:
    """Connections that say nothing: all are closed, those over the address's bound before their time."""
    addresses = [target.address("main"), target.address("enroll")]
    closed = 0

    async def one(number: int) -> None:
        nonlocal closed
        try:
            reader, writer = await asyncio.open_connection(*addresses[number % 2])
        except OSError:
            closed += 1  # not even accepted
            return
        with contextlib.suppress(OSError):
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read()
        closed += 1
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    await asyncio.gather(*(one(number) for number in range(count)))
    return {"opened": count, "closed": closed}


async def never_reads(target: Target, count: int) -> dict[str, int]:
    """Sessions that ask for answers and take none: ended, one after the other."""
    ended = 0

    async def ask(session: AgentSession) -> None:
        for sequence in range(1_000_000):
            await session.say(heartbeat=agent_pb2.Heartbeat(sequence=2**62 + sequence))

    async with aio_channel(target.admin, target.musterd.addresses["main"]) as operator:
        admin = admin_pb2_grpc.AdminServiceStub(operator)
        for number in range(count):
            async with aio_channel(target.evil, target.musterd.addresses["main"]) as made:
                session = AgentSession(agent_pb2_grpc.AgentServiceStub(made))
                await session.hello(f"evil-{number}")
                asking = asyncio.create_task(ask(session))
                async with asyncio.timeout(TIMEOUT_S):
                    while True:
                        view = await admin.GetAgent(admin_pb2.AgentRef(agent="evil"), timeout=TIMEOUT_S)
                        if not json.loads(view.json)["connected"]:
                            break
                        await asyncio.sleep(0.02)
                ended += 1
                asking.cancel()
                session.cut()
                await asyncio.gather(asking, return_exceptions=True)
    return {"sessions": count, "ended": ended}


async def oversized(target: Target, count: int) -> dict[str, int]:
    """Messages that are larger than any may be."""
    find = target.channel.unary_unary("/muster.v1.AgentService/FindBlobs")
    seen: Counter[str] = Counter()
    for _ in range(count):
        try:
            await find(b"\x00" * (MAX_MESSAGE_BYTES + 1), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            seen[error.code().name] += 1
    return dict(seen)


async def slow_uploads(target: Target, count: int) -> dict[str, int]:
    """Uploads that send a byte now and then: bounded in number, and dropped."""

    def dripping() -> Iterator[agent_pb2.PutBlobRequest]:
        header = agent_pb2.PutBlobHeader(digest="ab" * 32, bytes=1_000_000)
        yield agent_pb2.PutBlobRequest(header=header)
        while True:
            time.sleep(0.05)
            yield agent_pb2.PutBlobRequest(data=b"x")

    def one(stub: agent_pb2_grpc.AgentServiceStub) -> str:
        try:
            stub.PutBlob(dripping(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            refusal = refusal_of(error)
            return error.code().name if refusal is None else agent_pb2.Refusal.Name(refusal)  # type: ignore[attr-defined]
        return "stored"

    def all_at_once() -> Counter[str]:
        with (
            channel(target.evil, target.musterd.addresses["main"]) as made,
            ThreadPoolExecutor(count) as pool,
        ):
            return Counter(pool.map(one, [agent_pb2_grpc.AgentServiceStub(made)] * count))

    return dict(await asyncio.to_thread(all_at_once))


async def guesses(target: Target, count: int) -> dict[str, int]:
    """Enrolments with secrets that are none."""
    seen: Counter[str] = Counter()
    async with stranger(target.authority_pem, target.musterd.addresses["enroll"]) as made:
        stub = agent_pb2_grpc.AgentServiceStub(made)
        for number in range(count):
            request = agent_pb2.EnrollRequest(
                protocol=1, token_id="abcdefgh", secret=f"{number:040}", csr_pem=b"x", name="guess"
            )
            try:
                await stub.Enroll(request, timeout=TIMEOUT_S)
                seen["enrolled"] += 1
            except grpc.aio.AioRpcError as error:
                refusal = refusal_of(error)
                seen[error.code().name if refusal is None else agent_pb2.Refusal.Name(refusal)] += 1
    return dict(seen)


ATTACKS: dict[str, Callable[[Target, int], Awaitable[dict[str, int]]]] = {
    "silent connections": silent_connections,
    "sessions that never read": never_reads,
    "oversized messages": oversized,
    "slow uploads": slow_uploads,
    "enrolment guesses": guesses,
}


async def heartbeat_for_ever(identity: Identity) -> None:
    """An honest agent, alone in its process: one line on standard output for each answered heartbeat."""
    async with aio_channel(identity) as made:
        session = AgentSession(agent_pb2_grpc.AgentServiceStub(made))
        welcome = await session.hello("honest")
        for sequence in itertools.count(1):
            await session.say(heartbeat=agent_pb2.Heartbeat(sequence=sequence))
            assert (await session.hear("heartbeat_ack")).heartbeat_ack.sequence == sequence
            print(sequence, flush=True)
            await asyncio.sleep(welcome.heartbeat_interval_ms / 1000)


@contextlib.asynccontextmanager
async def honest_agent(target: Target) -> AsyncIterator[Callable[[], int]]:
    """Heartbeats on one session, from another process, for as long as the block runs; raises if they end before.
    What it gives says how many were answered."""
    identity = target.musterd.home / "honest.json"
    target.honest.save(identity)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.coordinator.floods",
        "--honest",
        str(identity),
        stdout=asyncio.subprocess.PIPE,
    )
    answered = 0
    lines = process.stdout
    assert lines is not None
    await lines.readline()  # it is connected

    async def count() -> None:
        nonlocal answered
        while line := await lines.readline():
            answered = int(line)

    counting = asyncio.create_task(count())
    try:
        yield lambda: answered
    finally:
        assert process.returncode is None, "the honest agent's session ended"
        process.kill()
        await process.wait()
        await counting


async def losses(target: Target) -> list[str]:
    """What the journal says of the honest agent that it should not."""
    async with aio_channel(target.admin, target.musterd.addresses["main"]) as made:
        watch = admin_pb2_grpc.AdminServiceStub(made).Watch(admin_pb2.WatchRequest(), timeout=TIMEOUT_S)
        return [
            event.text
            async for event in watch
            if event.kind in {"AgentSuspected", "AgentLost", "StandingChanged"}
            and target.honest.id in event.json
        ]


async def flood(connections: int) -> int:
    directory = Path(tempfile.mkdtemp(prefix="muster-flood-"))
    try:
        async with under_attack(directory) as target, honest_agent(target) as answered:
            counts = {"silent connections": connections, "sessions that never read": 3, "slow uploads": 100}
            process = psutil.Process(target.musterd.process.pid)
            print(f"musterd: {process.memory_info().rss / 2**20:.0f} MiB before", flush=True)
            for name, attack in ATTACKS.items():
                began, count = time.monotonic(), counts.get(name, 1_000)
                print(f"{name} × {count}: {await attack(target, count)}", end="", flush=True)
                print(
                    f" in {time.monotonic() - began:.1f} s; {process.memory_info().rss / 2**20:.0f} MiB, "
                    f"{process.num_fds()} descriptors, {answered()} honest heartbeats answered",
                    flush=True,
                )
            lost = await losses(target)
            print("honest agent: " + ("; ".join(lost) or "never suspected, never lost"))
            return 1 if lost else 0
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--honest", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.honest is not None:
        asyncio.run(heartbeat_for_ever(Identity.load(arguments.honest)))
    sys.exit(asyncio.run(flood(arguments.connections)))
