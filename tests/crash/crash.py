"""A coordinator that is killed again and again under load, and a client that holds it to its word.

Real `musterd`, real SQLite, real gRPC over TLS; light agents (bench/swarm.py) train nothing, but report
steps and checkpoints as fast as they are acknowledged, while tokens are created and agents enrolled.
Whatever was acknowledged is written into a ledger, and after each restart everything in it must be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from bench.coordinator import admit
from bench.swarm import Forge, LightAgent, Swarm, agent_name
from coordinator.journal import Journal, copy
from protos import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from protos.wire import PROTOCOL, SERVER_NAME, Identity, JoinToken, aio_channel
from tests.coordinator.harness import signing_request
from tests.processes import Musterd, init_home, start_musterd

MEMBERS = 3
LEASE = "60s"
RPC_TIMEOUT_S = 30.0
BACK_S = 120.0
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class ForgottenError(AssertionError):
    """Something that was acknowledged is not there any more."""


@dataclass(slots=True)
class Ledger:
    """What the coordinator has acknowledged to anybody."""

    tokens: set[str] = field(default_factory=set)
    agents: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)  # by job
    checkpoints: set[tuple[str, int]] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.tokens) + len(self.agents) + sum(self.steps.values()) + len(self.checkpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    kills: int
    acknowledged: int
    steps: int
    checkpoints: int
    return_s: list[float]
    """Of each agent at each restart that all came back from: from the ready line to its welcome."""


class Crash:
    """One coordinator, its fleet, and the ledger.  `run` does it all."""

    def __init__(self, directory: Path, *, jobs: int, seed: int) -> None:
        self._home = directory / "home"
        self._jobs = jobs
        self._random = random.Random(seed)
        self._ledger = Ledger()
        self._seen_steps: dict[str, int] = {}
        self._musterd: Musterd | None = None
        self._swarm = Swarm(lambda: self._address("main"))
        self._agents: list[LightAgent] = []
        self._identities: dict[str, Identity] = {}
        self._returns: list[float] = []
        self._serving_s = 0.0
        self._token: JoinToken | None = None

    def _address(self, port: str) -> str:
        assert self._musterd is not None
        return self._musterd.addresses[port]

    # ------------------------------------------------------------------------- the run

    async def run(self, kills: int, told: Callable[[str], None] = lambda _: None) -> Summary:
        """Kill and restart `kills` times.  Raise ForgottenError at the first broken promise."""
        size = self._jobs * MEMBERS + 2
        init_home(self._home)
        admit(self._home / "journal.db", size)
        self._musterd = await asyncio.to_thread(start_musterd, self._home, lease=LEASE)
        forge = Forge(self._home)
        identities = [forge.identity(agent_name(i), self._address("main")) for i in range(size)]
        self._agents = [LightAgent(identity, self._swarm) for identity in identities]
        self._identities = {identity.id: identity for identity in identities}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(agent.run()) for agent in self._agents]
                await self._begin()
                self._swarm.welcomed_s.clear()  # only returns are of interest
                load = (self._create_tokens, self._enrol, *(self._save(i) for i in identities))
                tasks += [group.create_task(self._again(what)) for what in load]
                for number in range(1, kills + 1):
                    await self._kill()
                    await self._hold_to_its_word()
                    told(f"kill {number}: {self._ledger.size} acknowledged, nothing forgotten")
                await self._all_back()
                await self._hold_to_its_word()
                for task in tasks:
                    task.cancel()
        finally:
            await asyncio.to_thread(self._musterd.stop)
        self._undisturbed()
        _require(bool(self._ledger.checkpoints), "no checkpoint was acknowledged, so none could be forgotten")
        return Summary(
            kills=kills,
            acknowledged=self._ledger.size,
            steps=sum(self._ledger.steps.values()),
            checkpoints=len(self._ledger.checkpoints),
            return_s=sorted(self._returns),
        )

    async def _begin(self) -> None:
        self._swarm.training = True
        async with self._admin() as stub:
            for number in range(self._jobs):
                elastic = {"min_nodes": MEMBERS, "max_nodes": MEMBERS, "last_call": "50ms"}
                spec = json.dumps({"name": f"job{number}", "elastic": elastic, "checkpoint": {"keep": 1000}})
                await stub.SubmitJob(admin_pb2.SubmitJobRequest(spec_json=spec), timeout=RPC_TIMEOUT_S)
        await self._until("all jobs train", lambda: len(self._steps()) == self._jobs)

    def _steps(self) -> dict[str, int]:
        """The newest step that was acknowledged, of every job that has one."""
        for agent in self._agents:
            if agent.rank == 0 and agent.step:
                known = self._ledger.steps.get(agent.job_id, 0)
                self._ledger.steps[agent.job_id] = max(known, agent.step)
        return self._ledger.steps

    async def _kill(self) -> None:
        """At a random moment: mostly of work, sometimes while everybody is still coming back."""
        if self._random.random() < 0.75:
            await self._all_back()
        await asyncio.sleep(self._random.uniform(0.0, 0.4))
        assert self._musterd is not None
        addresses = self._musterd.addresses
        self._swarm.welcomed_s.clear()
        await asyncio.to_thread(self._musterd.kill)
        self._musterd = await asyncio.to_thread(start_musterd, self._home, lease=LEASE, addresses=addresses)
        self._serving_s = asyncio.get_running_loop().time()

    async def _all_back(self) -> None:
        before = sum(self._steps().values())
        await self._until("everyone is back", lambda: self._swarm.open == len(self._agents))
        if len(self._swarm.welcomed_s) == len(self._agents):
            self._returns += [at - self._serving_s for at in self._swarm.welcomed_s.values()]
            self._swarm.welcomed_s.clear()
        await self._until("training goes on", lambda: sum(self._steps().values()) > before)

    async def _until(self, what: str, done: Callable[[], bool]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BACK_S):
                while not done():  # noqa: ASYNC110 (many agents change what is waited for)
                    await asyncio.sleep(0.01)
        assert done(), f"not within {BACK_S:g} s: {what}; {self._swarm.trouble}"

    # ------------------------------------------------------------------------- load

    async def _again(self, what: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled, whether or not somebody listens."""
        while True:
            try:
                await what()
            except grpc.aio.AioRpcError as error:
                if error.code() not in LOST:
                    raise
            await asyncio.sleep(0.02)

    async def _create_tokens(self) -> None:
        async with self._admin() as stub:
            while True:
                request = admin_pb2.CreateTokenRequest(ttl_s=86_400, uses=3)
                reply = await stub.CreateToken(request, timeout=RPC_TIMEOUT_S)
                self._ledger.tokens.add(reply.token_id)
                self._token = JoinToken.parse(reply.token)
                await asyncio.sleep(0.02)

    async def _enrol(self) -> None:
        token = self._token
        if token is None:
            return
        authority = (self._home / "authority.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(root_certificates=authority)
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        async with grpc.aio.secure_channel(self._address("enroll"), credentials, options=options) as channel:
            _, request = signing_request()
            reply = await agent_pb2_grpc.AgentServiceStub(channel).Enroll(
                agent_pb2.EnrollRequest(
                    protocol=PROTOCOL,
                    token_id=token.token_id,
                    secret=token.secret,
                    csr_pem=request,
                    name="box",
                ),
                timeout=RPC_TIMEOUT_S,
            )
            self._ledger.agents.add(reply.agent_id)
        await asyncio.sleep(0.2)

    def _save(self, identity: Identity) -> Callable[[], Awaitable[None]]:
        """Checkpoints of one shard, of the newest acknowledged step of this agent's job; another member vouches."""
        agent = next(one for one in self._agents if one.id == identity.id)

        async def vouch(report: agent_pb2.ReportShardRequest) -> None:
            other = next(one for one in self._agents if one.job_id == agent.job_id and one.rank == 1)
            word = agent_pb2.ReportShardRequest()
            word.CopyFrom(report)
            word.digest, word.bytes = "", 0
            async with aio_channel(self._identities[other.id], self._address("main")) as channel:
                await agent_pb2_grpc.AgentServiceStub(channel).ReportShard(word, timeout=RPC_TIMEOUT_S)

        async def save() -> None:
            if agent.rank != 0 or not agent.step:
                return
            async with aio_channel(identity, self._address("main")) as channel:
                stub = agent_pb2_grpc.AgentServiceStub(channel)
                job_id, step = agent.job_id, agent.step
                data = f"{job_id} {step}".encode()
                digest = hashlib.sha256(data).hexdigest()

                async def chunks() -> AsyncIterator[agent_pb2.PutBlobRequest]:
                    header = agent_pb2.PutBlobHeader(digest=digest, bytes=len(data))
                    yield agent_pb2.PutBlobRequest(header=header)
                    yield agent_pb2.PutBlobRequest(data=data)

                await stub.PutBlob(chunks(), timeout=RPC_TIMEOUT_S)
                report = agent_pb2.ReportShardRequest(
                    job_id=job_id,
                    generation=agent.generation,
                    step=step,
                    index=0,
                    count=1,
                    digest=digest,
                    bytes=len(data),
                    state_digest="ab" * 16,
                    header_json="{}",
                )
                await vouch(report)
                reply = await stub.ReportShard(report, timeout=RPC_TIMEOUT_S)
                if reply.committed:
                    self._ledger.checkpoints.add((job_id, step))

        return save

    # ------------------------------------------------------------------------- judgement

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[admin_pb2_grpc.AdminServiceAsyncStub]:
        identity = Identity.load(self._home / "admin.json")
        async with aio_channel(identity, self._address("main")) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    async def _hold_to_its_word(self) -> None:
        """Compare the ledger with what the coordinator says after its restart."""
        tokens, agents = set(self._ledger.tokens), set(self._ledger.agents)
        steps, checkpoints = dict(self._steps()), set(self._ledger.checkpoints)
        everything = admin_pb2.ListRequest(all=True)
        async with self._admin() as stub:
            found = {view["id"] for view in _views(await stub.ListTokens(everything, timeout=RPC_TIMEOUT_S))}
            _require(tokens <= found, f"tokens {sorted(tokens - found)} are forgotten")
            found = {view["id"] for view in _views(await stub.ListAgents(everything, timeout=RPC_TIMEOUT_S))}
            _require(agents <= found, f"agents {sorted(agents - found)} are forgotten")
            for job in _views(await stub.ListJobs(everything, timeout=RPC_TIMEOUT_S)):
                number = job["generation"]["number"]
                _require(number == 1, f"generation {number} of {job['name']} was formed because of a restart")
                await self._check_steps(stub, job["id"], steps.get(job["id"], 0))
                views = _views(
                    await stub.ListCheckpoints(admin_pb2.JobRef(job=job["id"]), timeout=RPC_TIMEOUT_S)
                )
                missing = {s for j, s in checkpoints if j == job["id"]} - {view["step"] for view in views}
                _require(not missing, f"checkpoints {sorted(missing)} of {job['name']} are forgotten")

    async def _check_steps(
        self, stub: admin_pb2_grpc.AdminServiceAsyncStub, job_id: str, acknowledged: int
    ) -> None:
        after = self._seen_steps.get(job_id, 0)
        request = admin_pb2.StepsRequest(job=job_id, after_step=after)
        async for reply in stub.Steps(request, timeout=RPC_TIMEOUT_S):
            for step in reply.steps:
                _require(step.step == after + 1, f"step {step.step} of {job_id} is logged after step {after}")
                after = step.step
        _require(
            after >= acknowledged,
            f"steps up to {acknowledged} of {job_id} were acknowledged; {after} are kept",
        )
        self._seen_steps[job_id] = after

    def _undisturbed(self) -> None:
        """The whole journal: nobody was lost and nothing formed again because of a restart."""
        copied = self._home.parent / "journal.db"
        copy(self._home / "journal.db", copied)
        with Journal(copied) as journal:
            disturbed = [
                stored.text
                for stored in journal.history(0)
                if stored.kind
                in ("AgentLost", "MemberLost", "CollectiveFailed", "StepsRolledBack", "StrikeCounted")
            ]
        _require(not disturbed, f"{len(disturbed)} disturbances, the first: {disturbed[:1]}")


def _views(views: admin_pb2.Views) -> Iterator[dict[str, object]]:
    return (json.loads(text) for text in views.json)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ForgottenError(otherwise)
