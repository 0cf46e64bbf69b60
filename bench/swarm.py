"""Light agents: they keep real sessions over TLS, one connection each, answer as an agent would, and train
nothing.  So a few processes can be a fleet of thousands.

`python -m bench.swarm` is one such process: commands come as JSON lines on standard input, each is
answered by one JSON line on standard output.  Times are CLOCK_MONOTONIC, the same for all processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.patience import NobodyThere, Patience
from coordinator.identity import Authority, Role
from coordinator.turns import WholeTurns
from protos import agent_pb2, wire

SESSION = "/muster.v1.AgentService/Session"
CONNECTING_AT_ONCE = 64
"""Of one process, when a fleet is first brought up; after that each agent comes back when it likes."""
FORMING_S = 0.5
"""A group forms when all its members have met, so none of them confirms a plan before the last has heard it."""

# First byte of an encoded CoordinatorMessage: thousands of plans are told apart without decoding them.
_FIRST = {(field.number << 3) | 2: field.name for field in agent_pb2.CoordinatorMessage.DESCRIPTOR.fields}


def agent_name(index: int) -> str:
    """Id of the agent with this number."""
    return f"a{index:08d}"


class Forge:
    """Identities of any agent, signed with the coordinator's own key; all share one key of their own."""

    def __init__(self, home: Path) -> None:
        self._authority = Authority.load(home)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def identity(self, agent_id: str, address: str) -> wire.Identity:
        issued = self._authority.issue_client(
            self._key.public_key(), Role.AGENT, agent_id, dt.timedelta(days=1)
        )
        return wire.Identity(
            role="agent",
            id=agent_id,
            address=address,
            certificate_pem=issued.certificate_pem.decode(),
            key_pem=self._key_pem,
            authority_pem=self._authority.certificate_pem.decode(),
        )


@dataclass(slots=True)
class Heard:
    """Everyone who has heard of one generation."""

    members: int
    count: int = 0
    last_s: float = 0.0


class Swarm:
    """What the agents of one process share: where the coordinator is, and what they saw."""

    def __init__(self, address: Callable[[], str]) -> None:
        self.address = address
        self.training = False
        self.open = 0
        self.welcomed_s: dict[str, float] = {}
        self.plans: dict[tuple[str, int], Heard] = {}
        self.steps_acknowledged = 0
        self.beats = 0
        self.ack_s: deque[float] = deque(maxlen=100_000)
        self.trouble: Counter[str] = Counter()
        self._ports = itertools.count(1)
        self._decoded: tuple[bytes, agent_pb2.Plan, dict[str, int]] = (b"", agent_pb2.Plan(), {})

    def fresh_port(self) -> int:
        """Of a store that no generation has used, as far as anyone can tell."""
        return next(self._ports) % 60_000 + 1_024

    def plan(self, data: bytes) -> tuple[agent_pb2.Plan, dict[str, int]]:
        """The plan in an encoded message, and the rank of each member; one plan comes to thousands in the
        same words."""
        if self._decoded[0] != data:
            plan = agent_pb2.CoordinatorMessage.FromString(data).plan
            self._decoded = (data, plan, {member.agent_id: member.group_rank for member in plan.members})
        return self._decoded[1:]

    def heard(self, plan: agent_pb2.Plan, members: int) -> None:
        found = self.plans.setdefault((plan.job_id, plan.generation), Heard(members=members))
        found.count += 1
        found.last_s = time.monotonic()


class LightAgent:
    """One agent: `run` keeps its session until cancelled, reconnecting as agent/session.py does."""

    def __init__(self, identity: wire.Identity, swarm: Swarm) -> None:
        self.id = identity.id
        self._identity = identity
        self._swarm = swarm
        self._incarnation = f"i{random.getrandbits(48):012x}"
        self._call: Any = None
        self._writing = asyncio.Lock()  # gRPC ends a call in which two messages are written at once
        self._forming: asyncio.Task[None] | None = None
        self._patience = Patience()
        self._answered = False
        self._beat_sent_s = 0.0
        self.job_id = ""
        self.assignment = 0
        self.generation = 0
        self.rank: int | None = None
        self.step = 0  # the newest one acknowledged
        self.came = asyncio.Event()  # its first session is open
        self.silent = False  # after a failure that it shall not recover from

    async def run(self) -> None:
        while True:
            self._answered = False
            unanswered = True
            try:
                await self._attempt()
            except grpc.aio.AioRpcError as error:
                self._swarm.trouble[f"{error.code().name}: {(error.details() or '')[:60]}"] += 1
            except NobodyThere:
                self._swarm.trouble["nobody there"] += 1
                unanswered = False
            except TimeoutError:
                self._swarm.trouble["no answer in time"] += 1
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
            except asyncio.InvalidStateError:
                pass
            unanswered = (
                unanswered and not self._answered and await self._patience.knock(self._swarm.address())
            )
            await asyncio.sleep(self._patience.pause_s(unanswered=unanswered))

    async def _attempt(self) -> None:
        swarm = self._swarm
        address = swarm.address()
        async with wire.aio_channel(self._identity, address, connect_s=self._patience.wait_s) as channel:
            call = channel.stream_stream(
                SESSION, request_serializer=agent_pb2.AgentMessage.SerializeToString
            )()
            beating = None
            try:
                first = await self._patience.answer(self._greet(call), channel, address)
                self._answered = first is not grpc.aio.EOF
                if first is grpc.aio.EOF or _FIRST.get(first[0]) != "welcome":
                    swarm.trouble["no welcome"] += 1
                    return
                welcome = agent_pb2.CoordinatorMessage.FromString(first).welcome
                self._patience.answered(welcome.lease_ms)
                self._call = call
                swarm.open += 1
                swarm.welcomed_s[self.id] = time.monotonic()
                self.came.set()
                beating = asyncio.create_task(self._beat(call, welcome.heartbeat_interval_ms / 1000))
                while (data := await call.read()) is not grpc.aio.EOF:
                    await self._take(data)
            finally:
                call.cancel()
                if self._call is call:
                    self._call = None
                    swarm.open -= 1
                if beating is not None:
                    beating.cancel()

    async def _greet(self, call: Any) -> Any:
        await call.write(agent_pb2.AgentMessage(hello=self._hello()))
        return await call.read()

    def _hello(self) -> agent_pb2.Hello:
        probe = agent_pb2.Probe(
            torch_version="2.13.0",
            backends=["gloo"],
            cpu_count=2,
            memory_bytes=8 << 30,
            disk_free_bytes=100 << 30,
            hostname=self.id,
            advertise_host="10.0.0.1",
            worker_count=1,
        )
        held = None
        if self.job_id:
            held = agent_pb2.Membership(job_id=self.job_id, generation=self.generation)
        return agent_pb2.Hello(protocol=wire.PROTOCOL, incarnation=self._incarnation, probe=probe, held=held)

    async def _beat(self, call: Any, interval_s: float) -> None:
        await asyncio.sleep(random.uniform(0, interval_s))
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for sequence in itertools.count(1):
                self._beat_sent_s = time.monotonic()
                self._swarm.beats += 1
                beat = agent_pb2.Heartbeat(
                    sequence=sequence, disk_free_bytes=100 << 30, step=self.step, activity="computing"
                )
                async with self._writing:
                    await call.write(agent_pb2.AgentMessage(heartbeat=beat))
                await asyncio.sleep(interval_s)

    async def say(self, **body: Any) -> None:
        """One message in the open session, if there is one."""
        async with self._writing:
            if self._call is not None:
                await self._call.write(agent_pb2.AgentMessage(**body))

    # ------------------------------------------------------------------------- what it is told

    async def _take(self, data: bytes) -> None:
        swarm = self._swarm
        match _FIRST.get(data[0]):
            case "heartbeat_ack":
                swarm.ack_s.append(time.monotonic() - self._beat_sent_s)
            case "progress_ack":
                await self._acknowledged(agent_pb2.CoordinatorMessage.FromString(data).progress_ack)
            case "plan":
                plan, ranks = swarm.plan(data)
                swarm.heard(plan, len(ranks))
                await self._planned(plan, ranks.get(self.id))
            case "assignment":
                assignment = agent_pb2.CoordinatorMessage.FromString(data).assignment
                if assignment.number != self.assignment:
                    self.job_id, self.assignment = assignment.job_id, assignment.number
                    self.generation, self.rank, self.step, self.silent = 0, None, 0, False
                if not self.silent:
                    await self.ready()
            case "unassign":
                self.job_id, self.generation, self.rank = "", 0, None
            case "go_away":
                message = agent_pb2.CoordinatorMessage.FromString(data).go_away.message
                swarm.trouble[f"sent away: {message[:60]}"] += 1
            case _:
                pass

    async def ready(self) -> None:
        holds = self.rank is not None and self.generation > 0
        await self.say(
            ready=agent_pb2.Ready(
                job_id=self.job_id,
                store_host="10.0.0.1",
                store_port=self._swarm.fresh_port(),
                holds_state=holds,
                step=self.step if holds else 0,
                assignment=self.assignment,
            )
        )

    async def _planned(self, plan: agent_pb2.Plan, rank: int | None) -> None:
        if plan.job_id != self.job_id or plan.generation < self.generation or self.silent:
            return
        self.generation, self.rank = plan.generation, rank
        if rank is None:
            await self.say(released=agent_pb2.Released(job_id=self.job_id, generation=plan.generation))
            return
        self.step = max(self.step, plan.committed_step)
        if rank == 0:
            await self.ready()
        self._forming = asyncio.create_task(self._form(plan.generation))

    async def _form(self, generation: int) -> None:
        await asyncio.sleep(FORMING_S)
        if generation != self.generation:  # never cancelled instead: gRPC would end the call with the write
            return
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self.say(
                formed=agent_pb2.Formed(
                    job_id=self.job_id, generation=generation, step=self.step, state_digest="ab" * 16
                )
            )
            await self.train()

    async def fail(self) -> None:
        """Its worker was killed, and it does not come back to its job."""
        self.silent = True
        await self.say(
            failed=agent_pb2.WorkerFailed(
                job_id=self.job_id,
                generation=self.generation,
                kind=agent_pb2.FAILURE_KIND_KILLED,
                detail="killed by the benchmark",
            )
        )

    # ------------------------------------------------------------------------- steps

    async def train(self) -> None:
        """As the leader: report the next step, and when it is acknowledged the next."""
        if self.rank != 0 or not self._swarm.training:
            return
        step = agent_pb2.StepRecord(
            step=self.step + 1, loss=1.0, slices=4, data_digest=7, tokens=64.0, lr=0.1, grad_norm=1.0,
            generation=self.generation, duration_s=0.1,
        )  # fmt: skip
        await self.say(
            progress=agent_pb2.Progress(job_id=self.job_id, generation=self.generation, steps=[step])
        )

    async def _acknowledged(self, ack: agent_pb2.ProgressAck) -> None:
        if ack.job_id != self.job_id or ack.step <= self.step:
            return
        self._swarm.steps_acknowledged += ack.step - self.step
        self.step = ack.step
        await self.train()


# ------------------------------------------------------------------------------- the process


async def _serve(home: Path) -> None:
    addresses = home / "run" / "addresses.json"
    known = ""

    def address() -> str:
        nonlocal known
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(addresses.read_text())["main"]
        return known

    forge, swarm = Forge(home), Swarm(address)
    agents: dict[int, LightAgent] = {}
    tasks: list[asyncio.Task[None]] = []

    async def open_sessions(first: int, count: int) -> dict[str, Any]:
        gate = asyncio.Semaphore(CONNECTING_AT_ONCE)

        async def bring_up(index: int) -> None:
            async with gate:
                made = LightAgent(forge.identity(agent_name(index), ""), swarm)
                agents[index] = made
                tasks.append(asyncio.create_task(made.run()))
                await made.came.wait()

        await asyncio.gather(*(bring_up(index) for index in range(first, first + count)))
        return {"open": swarm.open}

    async def obey(command: dict[str, Any]) -> dict[str, Any]:
        match command.pop("do"):
            case "open":
                return await open_sessions(**command)
            case "mark":  # forget what was measured up to now
                swarm.ack_s.clear()
                swarm.trouble.clear()
                swarm.welcomed_s.clear()
                swarm.beats = swarm.steps_acknowledged = 0
                return {}
            case "status":
                return {
                    "open": swarm.open,
                    "welcomed": len(swarm.welcomed_s),
                    "welcomed_last_s": max(swarm.welcomed_s.values(), default=0.0),
                    "beats": swarm.beats,
                    "steps": swarm.steps_acknowledged,
                    "trouble": dict(swarm.trouble),
                    "members": sum(one.rank is not None for one in agents.values()),
                    "leaders": sum(one.rank == 0 for one in agents.values()),
                }
            case "acks":
                return {"ack_s": sorted(swarm.ack_s)[:: max(1, len(swarm.ack_s) // 1_000)]}
            case "plans":
                return {
                    "plans": [
                        [job, number, heard.members, heard.count, heard.last_s]
                        for (job, number), heard in swarm.plans.items()
                    ]
                }
            case "members":
                # Whoever has failed is in no generation, though nobody told it.
                inside = (i for i, one in agents.items() if one.rank is not None and not one.silent)
                return {"members": sorted(inside)}
            case "fail":
                sent_s = time.monotonic()
                await agents[command["agent"]].fail()
                return {"sent_s": sent_s}
            case "train":
                swarm.training = command["on"]
                for one in agents.values():
                    await one.train()
                return {"at_s": time.monotonic()}
            case other:
                raise ValueError(f"unknown command {other}")

    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        answer = await obey(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=WholeTurns) as runner:
        runner.run(_serve(Path(sys.argv[1])))
