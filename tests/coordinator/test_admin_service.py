"""Operators' calls, and a whole generation as two agents live it, over real TLS."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from coordinator.sweep import referenced
from protos import admin_pb2, agent_pb2
from protos.wire import CHUNK_BYTES, Identity, refusal_of
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    loopback_config,
    running_coordinator,
)

JOB = {"name": "demo", "elastic": {"min_nodes": 2, "max_nodes": 2, "last_call": 0}, "train": {"steps": 50}}


@pytest.fixture
async def c(tmp_path: Path) -> AsyncIterator[RunningCoordinator]:
    async with running_coordinator(tmp_path) as running:
        yield running


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def submit(c: RunningCoordinator, job: dict[str, Any] | None = None, dataset: str = "") -> str:
    request = admin_pb2.SubmitJobRequest(spec_json=json.dumps(job or JOB), dataset_json=dataset)
    reply = await (await c.admin()).SubmitJob(request, timeout=RPC_TIMEOUT_S)
    return str(reply.job_id)


async def job_view(c: RunningCoordinator, job: str) -> dict[str, Any]:
    view: dict[str, Any] = json.loads((await (await c.admin()).GetJob(admin_pb2.JobRef(job=job))).json)
    return view


async def until(holds: Callable[[], bool]) -> None:
    """Look again and again until it holds: a directory does not call back."""
    async with asyncio.timeout(RPC_TIMEOUT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def refusal(call: Any) -> tuple[int | None, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return refusal_of(error.value), error.value.details() or ""


async def put(
    stub: Any, data: bytes, *, digest: str | None = None, size: int | None = None
) -> agent_pb2.PutBlobReply:
    header = agent_pb2.PutBlobHeader(
        digest=digest or digest_of(data), bytes=len(data) if size is None else size
    )
    messages = [agent_pb2.PutBlobRequest(header=header)]
    messages += [
        agent_pb2.PutBlobRequest(data=data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)
    ]
    return await stub.PutBlob(iter(messages), timeout=RPC_TIMEOUT_S)


# ------------------------------------------------------------------------------------- jobs


async def test_a_submitted_job_waits_for_agents_and_says_so(c: RunningCoordinator) -> None:
    job_id = await submit(c)
    assert job_id[0] == "j"
    assert len(job_id) == 9
    view = await job_view(c, "demo")
    assert (view["id"], view["phase"], view["steps_total"]) == (job_id, "QUEUED", 50)
    assert view["waiting"]["why"] == "no_agent"
    assert "no agent" in view["waiting"]["text"]
    assert view["spec"] == JOB


@pytest.mark.parametrize(
    ("request_", "wanted", "says"),
    [
        ({"spec_json": "{"}, agent_pb2.REFUSAL_INVALID, "spec_json: not JSON"),
        ({"spec_json": '{"nmae": "x"}'}, agent_pb2.REFUSAL_INVALID, "did you mean 'name'?"),
        (
            {"spec_json": '{"name": "x"}', "dataset_json": "{}"},
            agent_pb2.REFUSAL_INVALID,
            "dataset_json.format",
        ),
        (
            {
                "spec_json": '{"name": "x"}',
                "dataset_json": json.dumps(
                    {"format": "muster-dataset-1", "splits": {"train": [{"digest": "ab" * 32, "tokens": 5}]}}
                ),
            },
            agent_pb2.REFUSAL_UNKNOWN_DATASET,
            "1 of its 1 blobs are not stored",
        ),
    ],
)
async def test_a_bad_submission_is_refused_and_leaves_no_job(
    c: RunningCoordinator, request_: dict[str, str], wanted: int, says: str
) -> None:
    admin = await c.admin()
    found, message = await refusal(admin.SubmitJob(admin_pb2.SubmitJobRequest(**request_)))
    assert found == wanted
    assert says in message
    assert list((await admin.ListJobs(admin_pb2.ListRequest(all=True))).json) == []


async def test_a_name_of_a_live_job_is_taken(c: RunningCoordinator) -> None:
    await submit(c)
    found, _ = await refusal(submit(c))
    assert found == agent_pb2.REFUSAL_NAME_TAKEN


async def test_commands_resolve_prefixes_and_answer_with_the_view(c: RunningCoordinator) -> None:
    job_id = await submit(c)
    admin = await c.admin()
    scaled = json.loads(
        (await admin.ScaleJob(admin_pb2.ScaleJobRequest(job=job_id[:5], min_nodes=1, max_nodes=7))).json
    )
    assert (scaled["min_nodes"], scaled["max_nodes"]) == (1, 7)
    cancel = admin_pb2.JobCommandRequest(job="demo", kind=admin_pb2.JOB_COMMAND_KIND_CANCEL)
    assert json.loads((await admin.CommandJob(cancel)).json)["phase"] == "CANCELLED"
    found, _ = await refusal(admin.CommandJob(cancel))
    assert found == agent_pb2.REFUSAL_WRONG_PHASE
    found, message = await refusal(admin.GetJob(admin_pb2.JobRef(job="nosuch")))
    assert found == agent_pb2.REFUSAL_UNKNOWN_JOB
    assert "muster job list" in message
    assert list((await admin.ListJobs(admin_pb2.ListRequest())).json) == []
    assert len((await admin.ListJobs(admin_pb2.ListRequest(all=True))).json) == 1


async def test_tokens_are_listed_without_their_secrets(c: RunningCoordinator) -> None:
    token = await c.create_token()
    admin = await c.admin()
    (view,) = [json.loads(text) for text in (await admin.ListTokens(admin_pb2.ListRequest())).json]
    assert view["standing"] == "usable"
    assert view["uses_left"] == 100
    assert token.split(".")[2][8:] not in json.dumps(view)
    found, _ = await refusal(admin.RevokeToken(admin_pb2.RevokeTokenRequest(token_id="zzz")))
    assert found == agent_pb2.REFUSAL_UNKNOWN_TOKEN
    found, _ = await refusal(admin.CreateToken(admin_pb2.CreateTokenRequest(ttl_s=1, uses=1)))
    assert found == agent_pb2.REFUSAL_INVALID


async def test_a_quarantine_is_shown_with_its_reason_until_released(c: RunningCoordinator) -> None:
    identity = await c.enroll("box")
    await AgentSession(await c.agent(identity)).hello()
    admin = await c.admin()
    command = admin_pb2.AgentCommandRequest(
        agent="box", kind=admin_pb2.AGENT_COMMAND_KIND_QUARANTINE, reason="too hot", seconds=3600
    )
    view = json.loads((await admin.CommandAgent(command)).json)
    assert (view["standing"], view["standing_detail"]) == ("quarantined", "too hot")
    left_ms = view["quarantined_until_unix_ms"] - c.coordinator.loop.now_ms()
    assert 3_590_000 < left_ms <= 3_600_000
    command.kind = admin_pb2.AGENT_COMMAND_KIND_RELEASE
    assert json.loads((await admin.CommandAgent(command)).json)["standing"] == "eligible"


# ------------------------------------------------------------------------------------- training


class Pair:
    """Two agents in one generation of one job."""

    def __init__(self, c: RunningCoordinator) -> None:
        self.c = c
        self.job_id = ""
        self.identities: list[Identity] = []
        self.sessions: list[AgentSession] = []
        self.generation = 0

    async def form(self, job: dict[str, Any] | None = None) -> None:
        """Submit the job, enrol, get ready, form."""
        self.job_id = await submit(self.c, job)
        for name in ("one", "two"):
            identity = await self.c.enroll(name)
            session = AgentSession(await self.c.agent(identity))
            await session.hello()
            assignment = (await session.hear("assignment")).assignment
            assert assignment.job_id == self.job_id
            assert json.loads(assignment.spec_json) == (job or JOB)
            self.identities.append(identity)
            self.sessions.append(session)
        for port, session in enumerate(self.sessions, 20_000):
            await session.say(
                ready=agent_pb2.Ready(job_id=self.job_id, store_host="127.0.0.1", store_port=port)
            )
        for session in self.sessions:
            plan = (await session.hear("plan")).plan
            assert [member.agent_id for member in plan.members] == [one.id for one in self.identities]
            assert plan.from_checkpoint
            assert plan.checkpoint_json == ""
            self.generation = plan.generation
        for session in self.sessions:
            await session.say(formed=agent_pb2.Formed(job_id=self.job_id, generation=self.generation))

    async def progress(self, first: int, last: int, *, by: int = 0, loss: float = 2.0) -> int:
        """Report steps; returns what is acknowledged."""
        records = [
            agent_pb2.StepRecord(
                step=step,
                loss=loss,
                slices=4,
                data_digest=step,
                tokens=64,
                lr=0.1,
                generation=self.generation,
            )
            for step in range(first, last + 1)
        ]
        evaluations = [agent_pb2.Evaluation(step=last, loss=1.5)]
        await self.sessions[by].say(
            progress=agent_pb2.Progress(
                job_id=self.job_id, generation=self.generation, steps=records, evaluations=evaluations
            )
        )
        return int((await self.sessions[by].hear("progress_ack")).progress_ack.step)

    async def checkpoint(self, step: int, shards: list[bytes]) -> list[bool]:
        """Store the shards and report them; whether each report committed the manifest."""
        committed = []
        if len(shards) == 1:
            await self.report(step, 1, by=1)
        for index, data in enumerate(shards):
            await put(await self.c.agent(self.identities[index % 2]), data)
            committed.append(await self.report(step, len(shards), index, data, by=index % 2))
        return committed

    async def report(self, step: int, count: int, index: int = 0, data: bytes = b"", *, by: int) -> bool:
        """A shard, or without data a word for the state; whether it committed the manifest."""
        stub = await self.c.agent(self.identities[by])
        reply = await stub.ReportShard(
            agent_pb2.ReportShardRequest(
                job_id=self.job_id,
                generation=self.generation,
                step=step,
                index=index,
                count=count,
                digest=digest_of(data) if data else "",
                bytes=len(data),
                state_digest="ab",
                header_json="{}",
            ),
            timeout=RPC_TIMEOUT_S,
        )
        return reply.committed


@pytest.fixture
async def pair(c: RunningCoordinator) -> Pair:
    made = Pair(c)
    await made.form()
    return made


async def steps_of(c: RunningCoordinator, job: str, after: int = 0) -> list[agent_pb2.StepRecord]:
    call = (await c.admin()).Steps(admin_pb2.StepsRequest(job=job, after_step=after), timeout=RPC_TIMEOUT_S)
    return [step async for reply in call for step in reply.steps]


async def test_a_generation_forms_and_its_steps_are_acknowledged_and_kept_once(pair: Pair) -> None:
    c = pair.c
    assert await pair.progress(1, 3) == 3
    assert await pair.progress(2, 5, by=1) == 5
    assert await pair.progress(1, 5) == 5
    found = await steps_of(c, "demo")
    assert [step.step for step in found] == [1, 2, 3, 4, 5]
    assert [step.data_digest for step in found] == [1, 2, 3, 4, 5]
    assert [step.step for step in await steps_of(c, "demo", after=3)] == [4, 5]
    view = await job_view(c, "demo")
    assert (view["phase"], view["committed_step"], view["loss"]) == ("RUNNING", 5, 2.0)
    assert [member["name"] for member in view["generation"]["members"]] == ["one", "two"]
    assert all(member["formed"] for member in view["generation"]["members"])


async def test_steps_that_arrive_before_a_peers_earlier_ones_do_not_end_the_session(pair: Pair) -> None:
    assert await pair.progress(1, 1) == 1
    assert await pair.progress(4, 4, by=1) == 1
    assert await pair.progress(2, 4) == 4


async def test_a_loss_that_is_not_a_number_is_kept_as_such(pair: Pair) -> None:
    await pair.progress(1, 1, loss=math.nan)
    assert math.isnan((await steps_of(pair.c, "demo"))[0].loss)
    assert (await job_view(pair.c, "demo"))["loss"] is None


async def test_following_steps_sees_each_once_and_ends_with_the_job(pair: Pair) -> None:
    call = (await pair.c.admin()).Steps(
        admin_pb2.StepsRequest(job="demo", follow=True), timeout=RPC_TIMEOUT_S
    )
    seen: list[int] = []
    evaluations: list[int] = []

    async def follow() -> None:
        async for reply in call:
            seen.extend(step.step for step in reply.steps)
            evaluations.extend(one.step for one in reply.evaluations)

    following = asyncio.create_task(follow())
    await pair.progress(1, 2)
    await pair.progress(3, 4)
    await (await pair.c.admin()).CommandJob(
        admin_pb2.JobCommandRequest(job="demo", kind=admin_pb2.JOB_COMMAND_KIND_CANCEL)
    )
    async with asyncio.timeout(RPC_TIMEOUT_S):
        await following
    assert seen == [1, 2, 3, 4]
    assert evaluations == [2, 4]


async def test_watching_resumes_after_a_sequence_number_and_filters_by_job(pair: Pair) -> None:
    await pair.progress(1, 1)
    admin = await pair.c.admin()

    async def watch(after: int = 0, job: str = "") -> list[admin_pb2.Event]:
        return [event async for event in admin.Watch(admin_pb2.WatchRequest(after_sequence=after, job=job))]

    everything = await watch()
    assert [event.sequence for event in everything] == list(range(1, len(everything) + 1))
    assert await watch(after=everything[4].sequence) == everything[5:]
    of_job = await watch(job="demo")
    assert {"JobAdmitted", "GenerationPlanned", "StepsCommitted"} <= {event.kind for event in of_job}
    assert "TokenCreated" not in {event.kind for event in of_job}
    assert all(event.text and json.loads(event.json)["kind"] == event.kind for event in everything)


async def test_a_follower_of_events_hears_what_comes(pair: Pair) -> None:
    after = pair.c.coordinator.journal.last_sequence
    call = (await pair.c.admin()).Watch(
        admin_pb2.WatchRequest(job="demo", after_sequence=after, follow=True), timeout=RPC_TIMEOUT_S
    )
    await pair.progress(1, 1)
    async for event in call:
        if event.kind == "StepsCommitted":
            break
    call.cancel()


async def test_logs_are_kept_in_order_and_only_of_agents_that_serve_the_job(pair: Pair) -> None:
    c = pair.c
    outsider = AgentSession(await c.agent(await c.enroll("outsider")))
    await outsider.hello()
    await (await c.admin()).CommandAgent(
        admin_pb2.AgentCommandRequest(agent="outsider", kind=admin_pb2.AGENT_COMMAND_KIND_QUARANTINE)
    )
    forged = agent_pb2.LogLines(job_id=pair.job_id, lines=["forged"])
    await outsider.say(logs=forged)
    await outsider.say(heartbeat=agent_pb2.Heartbeat(sequence=1))
    await outsider.hear("heartbeat_ack")
    call = (await c.admin()).Logs(admin_pb2.LogsRequest(job="demo", follow=True), timeout=RPC_TIMEOUT_S)
    await pair.sessions[0].say(logs=agent_pb2.LogLines(job_id=pair.job_id, lines=["first", "second\x1b[2J"]))
    lines = []
    async for line in call:
        lines.append((line.sequence, line.agent_id, line.line))
        if len(lines) == 2:
            break
    call.cancel()
    assert lines == [(1, pair.identities[0].id, "first"), (2, pair.identities[0].id, "second [2J")]
    tail = (await c.admin()).Logs(admin_pb2.LogsRequest(job="demo", tail=1))
    assert [line.line async for line in tail] == ["second [2J"]


async def test_a_checkpoint_exists_once_all_its_shards_are_stored(pair: Pair) -> None:
    c, admin = pair.c, await pair.c.admin()
    await pair.progress(1, 2)
    shards = [os.urandom(3_000_000), b"second"]
    assert await pair.checkpoint(2, shards) == [False, True]
    manifest = json.loads((await admin.GetCheckpoint(admin_pb2.CheckpointRef(job="demo"))).manifest_json)
    assert [shard["digest"] for shard in manifest["shards"]] == [digest_of(data) for data in shards]
    (listed,) = [
        json.loads(text) for text in (await admin.ListCheckpoints(admin_pb2.JobRef(job="demo"))).json
    ]
    assert (listed["step"], listed["shards"], listed["bytes"]) == (2, 2, 3_000_006)
    verified = json.loads((await admin.VerifyCheckpoint(admin_pb2.CheckpointRef(job="demo", step=2))).json)
    assert verified["sound"] is True
    store = c.home / "blobs"
    (store / digest_of(b"second")[:2] / digest_of(b"second")).write_bytes(b"sEcond")
    verified = json.loads((await admin.VerifyCheckpoint(admin_pb2.CheckpointRef(job="demo", step=2))).json)
    assert verified["sound"] is False
    assert verified["problems"][0]["index"] == 1
    (listed,) = [
        json.loads(text) for text in (await admin.ListCheckpoints(admin_pb2.JobRef(job="demo"))).json
    ]
    assert f"shard 1 ({digest_of(b'second')}): damaged" in listed["damaged"] == verified["damaged"]
    # Who computes the same state again sends the shard again.
    assert await pair.checkpoint(2, shards) == [False, True]
    assert (store / digest_of(b"second")[:2] / digest_of(b"second")).read_bytes() == b"second"
    verified = json.loads((await admin.VerifyCheckpoint(admin_pb2.CheckpointRef(job="demo", step=2))).json)
    assert (verified["sound"], verified["damaged"]) == (True, None)
    found, message = await refusal(admin.GetCheckpoint(admin_pb2.CheckpointRef(job="demo", step=7)))
    assert found == agent_pb2.REFUSAL_UNKNOWN_CHECKPOINT
    assert "it has: 2" in message


async def test_a_shard_that_is_not_stored_as_said_is_refused(pair: Pair) -> None:
    stub = await pair.c.agent(pair.identities[0])
    await put(stub, b"shard")
    report = agent_pb2.ReportShardRequest(
        job_id=pair.job_id,
        generation=pair.generation,
        step=1,
        index=0,
        count=1,
        digest=digest_of(b"absent"),
        bytes=6,
        header_json="{}",
    )
    assert (await refusal(stub.ReportShard(report)))[0] == agent_pb2.REFUSAL_UNKNOWN_BLOB
    report.digest = digest_of(b"shard")
    found, message = await refusal(stub.ReportShard(report))
    assert (found, message.startswith("bytes: found 6")) == (agent_pb2.REFUSAL_INVALID, True)


async def test_a_shard_that_is_reported_long_after_its_upload_is_not_swept(pair: Pair) -> None:
    """Neither by a sweep that looked at the state before the report."""
    stub = await pair.c.agent(pair.identities[0])
    await put(stub, b"shard")
    digest = digest_of(b"shard")
    os.utime(pair.c.home / "blobs" / digest[:2] / digest, (0, 0))
    report = agent_pb2.ReportShardRequest(
        job_id=pair.job_id,
        generation=pair.generation,
        step=1,
        index=0,
        count=2,
        digest=digest,
        bytes=5,
        header_json="{}",
    )
    await stub.ReportShard(report, timeout=RPC_TIMEOUT_S)
    (found,) = pair.c.coordinator._sweeper._collect(set(), dry_run=False)
    assert not found.old


async def test_a_dead_member_is_replaced_in_a_new_generation(c: RunningCoordinator) -> None:
    pair = Pair(c)
    await pair.form({**JOB, "elastic": {"min_nodes": 1, "max_nodes": 2, "last_call": "10m"}})
    await pair.progress(1, 2)
    for port, session in enumerate(pair.sessions, 30_000):
        await session.say(
            ready=agent_pb2.Ready(
                job_id=pair.job_id, store_host="127.0.0.1", store_port=port, step=2, holds_state=True
            )
        )
        await session.say(heartbeat=agent_pb2.Heartbeat(sequence=1))
        await session.hear("heartbeat_ack")
    pair.sessions[1].cut()
    failed = agent_pb2.WorkerFailed(
        job_id=pair.job_id,
        generation=pair.generation,
        kind=agent_pb2.FAILURE_KIND_COLLECTIVE,
        detail="peer gone",
    )
    await pair.sessions[0].say(failed=failed)
    plan = (await pair.sessions[0].hear("plan")).plan
    assert plan.generation > pair.generation
    assert [member.agent_id for member in plan.members] == [pair.identities[0].id]
    assert (plan.cut, plan.committed_step, plan.from_checkpoint) == (agent_pb2.CUT_ABORT, 2, False)


# ------------------------------------------------------------------------------------- blobs


async def test_blobs_travel_both_ways_and_resume_from_an_offset(c: RunningCoordinator) -> None:
    admin, data = await c.admin(), os.urandom(2_500_000)
    assert not (await put(admin, data)).existed
    assert (await put(admin, data)).existed
    agent = await c.agent(await c.enroll())
    for offset in (0, 1, 2_000_000, len(data)):
        got = [
            chunk.data
            async for chunk in agent.GetBlob(agent_pb2.GetBlobRequest(digest=digest_of(data), offset=offset))
        ]
        assert b"".join(got) == data[offset:]
        assert all(len(chunk) <= CHUNK_BYTES for chunk in got)
    missing = await agent.FindBlobs(
        agent_pb2.FindBlobsRequest(digests=[digest_of(data), digest_of(b"other")])
    )
    assert list(missing.missing) == [digest_of(b"other")]


@pytest.mark.parametrize(
    ("data", "digest", "size", "wanted"),
    [
        (b"abc", digest_of(b"abd"), 3, agent_pb2.REFUSAL_DIGEST_MISMATCH),
        (b"ab", digest_of(b"abc"), 3, agent_pb2.REFUSAL_INVALID),
        (b"abcd", digest_of(b"abc"), 3, agent_pb2.REFUSAL_INVALID),
        (b"", digest_of(b"abc"), 1 << 50, agent_pb2.REFUSAL_TOO_LARGE),
        (b"abc", "../etc/passwd", 3, agent_pb2.REFUSAL_INVALID),
    ],
    ids=["wrong digest", "truncated", "too long", "too large", "no digest"],
)
async def test_a_bad_upload_is_refused_and_leaves_nothing(
    c: RunningCoordinator, data: bytes, digest: str, size: int, wanted: int
) -> None:
    agent = await c.agent(await c.enroll())
    found, _ = await refusal(put(agent, data, digest=digest, size=size))
    assert found == wanted
    assert [path for path in (c.home / "blobs").rglob("*") if path.is_file()] == []


async def test_an_agent_that_uploads_wrong_bytes_is_quarantined_at_the_usual_bound(
    c: RunningCoordinator,
) -> None:
    identity = await c.enroll("liar")
    wrong = {"data": b"abc", "digest": digest_of(b"abd"), "size": 3}
    for strikes, standing in ((1, "eligible"), (2, "eligible"), (3, "quarantined"), (3, "quarantined")):
        found, _ = await refusal(put(await c.agent(identity), **wrong))
        assert found == agent_pb2.REFUSAL_DIGEST_MISMATCH
        view = json.loads((await (await c.admin()).GetAgent(admin_pb2.AgentRef(agent="liar"))).json)
        assert (view["strikes"], view["standing"]) == (strikes, standing)
    assert f"other bytes than those of blob {digest_of(b'abd')}" in view["standing_detail"]
    # An operator's slip is nobody's strike, and a truncated upload is a broken line.
    await refusal(put(await c.admin(), **wrong))
    honest = await c.enroll("honest")
    await refusal(put(await c.agent(honest), b"ab", digest=digest_of(b"abc"), size=3))
    view = json.loads((await (await c.admin()).GetAgent(admin_pb2.AgentRef(agent="honest"))).json)
    assert view["strikes"] == 0


async def test_an_upload_that_is_dropped_leaves_nothing(c: RunningCoordinator) -> None:
    agent = await c.agent(await c.enroll())
    incoming = c.home / "blobs" / "incoming"
    for _ in range(5):  # it is cancelled at one moment or another of the upload
        call = agent.PutBlob()
        await call.write(agent_pb2.PutBlobRequest(header=agent_pb2.PutBlobHeader(digest="ab" * 32, bytes=10)))
        await call.write(agent_pb2.PutBlobRequest(data=b"half"))
        await until(lambda: under_way(incoming) == 1)
        call.cancel()
        await until(lambda: under_way(incoming) == 0)
    assert len(list(incoming.iterdir())) <= 1


def under_way(incoming: Path) -> int:
    """Uploads, but for what of a broken one its sender may go on with."""
    return sum(not path.name.startswith("suspended-") for path in incoming.iterdir())


async def test_uploads_of_one_peer_are_bounded_and_stalled_ones_dropped(tmp_path: Path) -> None:
    config = loopback_config(blobs={"reserve": 0, "transfers_per_peer": 1, "chunk_timeout": "300ms"})
    async with running_coordinator(tmp_path, config=config) as c:
        agent = await c.agent(await c.enroll())
        stalled = agent.PutBlob()
        await stalled.write(
            agent_pb2.PutBlobRequest(header=agent_pb2.PutBlobHeader(digest="ab" * 32, bytes=10))
        )
        incoming = c.home / "blobs" / "incoming"
        await until(lambda: len(list(incoming.iterdir())) == 1)
        assert (await refusal(put(agent, b"abc")))[0] == agent_pb2.REFUSAL_RATE_LIMITED
        with pytest.raises(grpc.aio.AioRpcError, match=r"nothing came for 0\.3 s"):
            await stalled
        assert not (await put(agent, b"abc")).existed


async def test_a_sweep_removes_retired_shards_and_nothing_that_is_referred_to(tmp_path: Path) -> None:
    config = loopback_config(blobs={"reserve": 0, "retired_grace": 0, "orphan_grace": "1h"})
    async with running_coordinator(tmp_path, config=config) as c:
        pair = Pair(c)
        await pair.form({**JOB, "checkpoint": {"keep": 1}})
        await put(await c.admin(), b"a dataset on its way")
        await pair.progress(1, 3)
        assert (await pair.checkpoint(1, [b"old one"]))[-1]
        assert (await pair.checkpoint(2, [b"new one"]))[-1]
        assert await pair.checkpoint(3, [b"pending", b"x"]) == [False, True]
        keep = await c.coordinator.loop.query(lambda state, _: referenced(state))
        await c.coordinator._sweeper.sweep(c.coordinator.loop)
        stored = {digest for digest, *_ in c.coordinator._store.stored()}
        assert stored == keep | {digest_of(b"a dataset on its way")}
        assert digest_of(b"old one") not in stored


async def test_an_operator_pins_deletes_and_sweeps(tmp_path: Path) -> None:
    config = loopback_config(blobs={"reserve": 0, "retired_grace": 0, "orphan_grace": "1h"})
    async with running_coordinator(tmp_path, config=config) as c:
        await c.coordinator._sweeper.stop()  # which would come first on a busy machine
        pair, admin = Pair(c), await c.admin()
        await pair.form({**JOB, "checkpoint": {"keep": 2, "every_steps": 1, "keep_best": 1}})
        await put(admin, b"a dataset on its way")

        async def command(kind: str, step: int) -> dict[str, Any]:
            request = admin_pb2.CheckpointCommandRequest(
                job="demo", step=step, kind=f"CHECKPOINT_COMMAND_KIND_{kind}"
            )
            view: dict[str, Any] = json.loads((await admin.CommandCheckpoint(request)).json)
            return view

        async def collect(*, dry_run: bool) -> dict[str, Any]:
            view: dict[str, Any] = json.loads(
                (await admin.CollectGarbage(admin_pb2.CollectGarbageRequest(dry_run=dry_run))).json
            )
            return view

        for step in (1, 2, 3):
            await pair.progress(step, step)
            assert (await pair.checkpoint(step, [b"state %d" % step]))[-1]
            if step == 1:
                assert (await command("PIN", 1))["pinned_by"] == "admin"
        listed = (await admin.ListCheckpoints(admin_pb2.JobRef(job="demo"))).json
        kept = {view["step"]: view["kept"] for view in map(json.loads, listed)}
        assert kept == {1: ["pinned"], 2: ["last"], 3: ["last", "best"]}
        assert json.loads(listed[2])["evaluation_loss"] == 1.5
        found, message = await refusal(command("DELETE", 1))
        assert found == agent_pb2.REFUSAL_CHECKPOINT_NEEDED
        assert "pinned by admin" in message
        found, message = await refusal(command("DELETE", 0))  # the newest
        assert found == agent_pb2.REFUSAL_CHECKPOINT_NEEDED
        assert "would be restored from" in message
        assert (await command("DELETE", 2))["step"] == 2

        dry = await collect(dry_run=True)
        assert (dry["blobs"], dry["bytes"], dry["young_blobs"]) == (1, len(b"state 2"), 1)
        assert dry["found"][0]["digest"] == digest_of(b"state 2")
        assert (await collect(dry_run=False))["blobs"] == 1
        stored = {digest for digest, *_ in c.coordinator._store.stored()}
        assert stored == {digest_of(data) for data in (b"state 1", b"state 3", b"a dataset on its way")}
        assert (await collect(dry_run=True))["blobs"] == 0
        kinds = [row.text for row in c.coordinator.journal.records(0) if "checkpoint 2" in row.text]
        assert kinds[-1].endswith("checkpoint 2 deleted by admin")


async def test_a_rollback_ends_the_generation_and_names_who_wanted_it(pair: Pair) -> None:
    admin = await pair.c.admin()
    await pair.progress(1, 2)
    assert (await pair.checkpoint(2, [b"state"]))[-1]
    assert await pair.progress(3, 4) == 4
    following = admin.Steps(admin_pb2.StepsRequest(job="demo", follow=True))
    assert [row.step for row in (await following.read()).steps] == [1, 2, 3, 4]
    for step, wanted in ((3, agent_pb2.REFUSAL_UNKNOWN_CHECKPOINT), (0, agent_pb2.REFUSAL_INVALID)):
        request = admin_pb2.RollBackJobRequest(job="demo", step=step)
        assert (await refusal(admin.RollBackJob(request)))[0] == wanted
    view = json.loads((await admin.RollBackJob(admin_pb2.RollBackJobRequest(job="demo", step=2))).json)
    assert (view["phase"], view["why"], view["committed_step"]) == (
        "RECOVERING",
        "rolled_back_by_operator",
        2,
    )
    told = view["rollback"]
    assert (told["from_step"], told["to_step"], told["by"]) == (4, 2, "admin")
    assert [row.step for row in pair.c.coordinator.journal.steps(pair.job_id, 0)] == [1, 2]
    assert [row.step for row in pair.c.coordinator.journal.evaluations(pair.job_id, 0, 99)] == [2]
    # What a member of the ended generation says is acknowledged only as far as it is still so.
    assert await pair.progress(3, 5) == 2
    for port, session in enumerate(pair.sessions, 30_000):
        ready = agent_pb2.Ready(
            job_id=pair.job_id, store_host="127.0.0.1", store_port=port, step=4, holds_state=True,
            generation=pair.generation,
        )  # fmt: skip
        await session.say(ready=ready)
    for session in pair.sessions:
        plan = (await session.hear("plan")).plan
        assert (plan.from_checkpoint, plan.committed_step, plan.lineage) == (True, 2, plan.generation)
        assert json.loads(plan.checkpoint_json)["step"] == 2
        assert not any(member.holds_state for member in plan.members)
    pair.generation = plan.generation
    for session in pair.sessions:
        await session.say(formed=agent_pb2.Formed(job_id=pair.job_id, generation=plan.generation, step=2))
    assert await pair.progress(3, 3) == 3
    assert [row.step for row in (await following.read()).steps] == [3]


# ------------------------------------------------------------------------------------- around


async def test_metrics_show_jobs_agents_and_refusals(pair: Pair) -> None:
    await pair.progress(1, 4)
    address = pair.c.coordinator.addresses.metrics

    def scrape() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
            return str(reply.read().decode())

    text = await asyncio.to_thread(scrape)
    assert f'muster_job_committed_step{{job="{pair.job_id}",name="demo"}} 4.0' in text
    assert 'muster_agents{presence="ready"} 2.0' in text
    assert "muster_sessions 2.0" in text
    assert 'muster_events_total{kind="ProgressReceived"} 1.0' in text


async def test_after_a_restart_the_generation_goes_on_and_nothing_is_planned_anew(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        before = await job_view(c, "demo")
        sequence = c.coordinator.journal.last_sequence
    async with running_coordinator(tmp_path) as again:
        pair.c, pair.sessions = again, []
        for identity in pair.identities:
            session = AgentSession(await again.agent(identity))
            held = agent_pb2.Membership(job_id=pair.job_id, generation=pair.generation)
            await session.hello(held=held)
            pair.sessions.append(session)
        assert await pair.progress(2, 5) == 5
        after = await job_view(again, "demo")
        kinds = {row.kind for row in again.coordinator.journal.records(sequence)}
    assert after["generation"]["number"] == before["generation"]["number"]
    assert (after["phase"], after["committed_step"], after["loss"]) == ("RUNNING", 5, 2.0)
    assert not kinds & {"GenerationPlanned", "AgentLost", "MemberLost", "JobPhaseChanged"}, kinds
