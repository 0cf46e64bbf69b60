"""Every RPC of a real coordinator under messages that nobody would send: no exception escapes, what is refused
leaves no trace, and what was refused a thousand times takes no memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.access import MAIN_RULES
from coordinator.core import codec
from coordinator.identity import Role
from protos import admin_pb2, agent_pb2
from protos.wire import JoinToken, channel, enroll_channel, refusal_of
from tests.coordinator.harness import (
    RPC_TIMEOUT_S,
    AgentSession,
    RunningCoordinator,
    loopback_config,
    running_coordinator,
)
from tests.coordinator.test_rpc_table import methods
from tests.messages import Known, encoded

T = TypeVar("T")
PATIENT = {
    "enrolments_per_s": 1e6,
    "enrolments_burst": 10**9,
    "calls_per_s": 1e6,
    "calls_burst": 10**9,
    "session_messages_per_s": 1e6,
    "session_burst": 10**9,
}
LEASE_MS = 600_000  # nothing happens by itself while the state is compared
MUSTER = {
    name: method for name, method in methods().items() if name in MAIN_RULES and name.startswith("/muster.")
}
UNARY = sorted(name for name, method in MUSTER.items() if not method.client_streaming)
QUIET = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # all examples of a test meet one coordinator, as they would
    ],
)


class Host:
    """A coordinator on its own thread, so that blocking clients can call it between hypothesis's examples."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="host")
        self.coordinator: RunningCoordinator
        self.channels: dict[Role, grpc.Channel] = {}
        self.known: Known = {}

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        config = loopback_config(LEASE_MS, limits=PATIENT)
        async with running_coordinator(self._directory, config=config) as self.coordinator:
            await self._populate()
            self._started.set()
            await self._stop.wait()

    async def _populate(self) -> None:
        """Two members of a running job, and names that exist for the messages to use."""
        c = self.coordinator
        job = {"name": "demo", "elastic": {"min_nodes": 1, "max_nodes": 1, "last_call": 0}}
        request = admin_pb2.SubmitJobRequest(spec_json=json.dumps(job))
        admin = await c.admin()
        job_id = (await admin.SubmitJob(request, timeout=RPC_TIMEOUT_S)).job_id
        spare = json.dumps({**job, "name": "spare", "priority": -1})
        await admin.SubmitJob(admin_pb2.SubmitJobRequest(spec_json=spare), timeout=RPC_TIMEOUT_S)
        token = JoinToken.parse(await c.create_token())
        self.agent_identity = await c.enroll("box")
        self.guest = await c.enroll("guest")
        self.session = AgentSession(await c.agent(self.agent_identity))
        await self.session.hello()
        await self.session.hear("assignment")
        ready = agent_pb2.Ready(job_id=job_id, store_host="127.0.0.1", store_port=1)
        await self.session.say(ready=ready)
        plan = (await self.session.hear("plan")).plan
        await self.session.say(formed=agent_pb2.Formed(job_id=job_id, generation=plan.generation))
        steps = [agent_pb2.StepRecord(step=n, loss=1.0, generation=plan.generation) for n in range(1, 6)]
        await self.session.say(
            progress=agent_pb2.Progress(job_id=job_id, generation=plan.generation, steps=steps)
        )
        await self.session.hear("progress_ack")
        self.known = {
            "job": ("spare",),
            "job_id": (job_id,),
            "agent": ("guest",),
            "token_id": (token.token_id,),
            "secret": (token.secret,),
            "digest": ("ab" * 32,),
            "digests": ("ab" * 32,),
            "header_json": ("{}",),
            "state_digest": ("00",),
            "spec_json": (json.dumps(job), '{"name": "other"}'),
            "dataset_json": ("", "{}"),
            "reason": ("because",),
            "backends": ("gloo",),
        }

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(RPC_TIMEOUT_S)
        address = self.coordinator.main_address
        self.channels = {
            Role.ADMIN: channel(self.coordinator.admin_identity, address),
            Role.AGENT: channel(self.agent_identity, address),
        }
        self.stranger = enroll_channel(
            self.coordinator.authority.certificate_pem, self.coordinator.enroll_address
        )

    def stop(self) -> None:
        for made in (*self.channels.values(), self.stranger):
            made.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(RPC_TIMEOUT_S)

    def await_(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(RPC_TIMEOUT_S)

    def state(self) -> str:
        """The durable state, as a snapshot would hold it."""
        return self.await_(
            self.coordinator.coordinator.loop.query(lambda state, _: codec.encode_state(state))
        )

    def training(self) -> dict[str, Any]:
        """What no outsider may change of the running job; that there is a standby more or less, he may."""
        job: dict[str, Any] = json.loads(self.state())["jobs"][0]
        del job["assigned"]
        return job


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    made.start()
    yield made
    made.stop()


def channel_for(host: Host, name: str) -> grpc.Channel:
    return host.channels[Role.ADMIN if Role.ADMIN in MAIN_RULES[name] else Role.AGENT]


def outcome(call: Callable[[], object]) -> grpc.StatusCode:
    """The status of a call.  A refusal is one of ours, with its reason, and short; anything else escaped."""
    failed: Any = None
    try:
        call()
    except grpc.RpcError as error:
        failed = error
    if failed is None:
        return grpc.StatusCode.OK
    if failed.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:  # a stream that was let in
        assert refusal_of(failed) is not None, (failed.code(), failed.details())
        assert len(failed.details() or "") < 2_000, "an error repeats what the peer sent"
    code: grpc.StatusCode = failed.code()
    return code


def test_the_harness_knows_what_escapes() -> None:
    def fail() -> None:
        error: Any = grpc.RpcError()
        error.code = lambda: grpc.StatusCode.INTERNAL
        error.details = lambda: "boom"
        error.trailing_metadata = lambda: ()
        raise error

    with pytest.raises(AssertionError, match="boom"):
        outcome(fail)


@settings(QUIET, max_examples=300)
@given(data=st.data())
def test_an_rpc_answers_or_refuses_and_a_refusal_leaves_no_trace(host: Host, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(UNARY))
    request = data.draw(encoded(MUSTER[name].input_type, host.known))
    made = channel_for(host, name)
    before = host.state()
    if MUSTER[name].server_streaming:
        status = outcome(lambda: list(made.unary_stream(name)(request, timeout=0.1)))
    else:
        status = outcome(lambda: made.unary_unary(name)(request, timeout=RPC_TIMEOUT_S))
    if status is not grpc.StatusCode.OK:
        assert host.state() == before, f"{name} was refused and changed the state"


@settings(QUIET, max_examples=60)
@given(data=st.data())
def test_an_enrolment_answers_or_refuses_and_a_refusal_leaves_no_trace(
    host: Host, data: st.DataObject
) -> None:
    request = data.draw(encoded(agent_pb2.EnrollRequest.DESCRIPTOR, host.known))
    before = host.state()
    status = outcome(
        lambda: host.stranger.unary_unary("/muster.v1.AgentService/Enroll")(request, timeout=RPC_TIMEOUT_S)
    )
    assert status is not grpc.StatusCode.OK, "no request of these has a signing request that is one"
    assert host.state() == before


@settings(QUIET, max_examples=60)
@given(data=st.data())
def test_an_upload_answers_or_refuses_and_leaves_no_trace(host: Host, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(set(MUSTER) - set(UNARY) - {SESSION})))
    requests = data.draw(st.lists(encoded(MUSTER[name].input_type, host.known), max_size=3))
    before = host.state()
    made = channel_for(host, name)
    status = outcome(lambda: made.stream_unary(name)(iter(requests), timeout=RPC_TIMEOUT_S))
    if status is not grpc.StatusCode.OK:
        assert host.state() == before
    assert list((host.coordinator.home / "blobs").rglob("*.part*")) == []


SESSION = "/muster.v1.AgentService/Session"


@settings(QUIET, max_examples=100)
@given(data=st.data())
def test_a_session_of_nonsense_ends_with_a_reason_and_moves_no_job(host: Host, data: st.DataObject) -> None:
    kind = MUSTER[SESSION].input_type
    hello = data.draw(st.sampled_from((GUEST_HELLO, GUEST_HELLO, None)))
    messages = data.draw(st.lists(encoded(kind, host.known), min_size=1, max_size=3))
    before = host.training()
    with contextlib.closing(channel(host.guest, host.coordinator.main_address)) as made:
        sent = iter([*([hello] if hello else []), *messages])
        call = made.stream_stream(SESSION, response_deserializer=agent_pb2.CoordinatorMessage.FromString)(
            sent, timeout=RPC_TIMEOUT_S
        )
        heard: list[agent_pb2.CoordinatorMessage] = []
        status = outcome(lambda: heard.extend(call))
    if status is grpc.StatusCode.OK and heard and heard[-1].HasField("go_away"):
        assert heard[-1].go_away.message
    assert host.training() == before, "a guest moved a job"


GUEST_HELLO = agent_pb2.AgentMessage(
    hello=agent_pb2.Hello(
        protocol=agent_pb2.PROTOCOL_VERSION_1, incarnation="g", probe=agent_pb2.Probe(worker_count=1)
    )
).SerializeToString()


def test_refused_messages_of_any_size_take_no_memory(host: Host) -> None:
    fat = agent_pb2.FindBlobsRequest(digests=["é" * 500_000]).SerializeToString()
    larger_than_allowed = agent_pb2.FindBlobsRequest(digests=["x" * 5_000_000]).SerializeToString()
    find = host.channels[Role.AGENT].unary_unary("/muster.v1.AgentService/FindBlobs")

    def refused(request: bytes) -> None:
        with pytest.raises(grpc.RpcError):
            find(request, timeout=RPC_TIMEOUT_S)

    for _ in range(10):
        refused(fat)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(60):
            refused(fat)
            refused(larger_than_allowed)
        gc.collect()  # exceptions and their frames are cycles
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2_000_000, "sixty megabytes of refused messages are still held"
