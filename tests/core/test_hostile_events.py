"""What any agent may say, to a coordinator in the middle of its work: refused without a trace, or taken in
with every promise kept."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import translate
from coordinator.core import codec
from coordinator.core.decide import decide
from coordinator.core.model import AgentId, Event, Refused, SessionId, State
from coordinator.core.step import step
from protos import agent_pb2
from tests.core.invariants import check_state
from tests.core.scenario import Scenario
from tests.messages import messages

BODIES = agent_pb2.AgentMessage.DESCRIPTOR
NAMES = ("a", "b", "c", "d", "outsider", "nobody")


def busy() -> Scenario:
    """A job that trains with a checkpoint half stored, one that waits, and agents of every standing."""
    scenario = Scenario()
    for line in (
        "job tiny min 2 max 2 failures 3 last_call 200",
        "job later min 3 max 3",
        *(f"agent {name} {what}" for name in "ab" for what in ("joins", "ready", "formed")),
        "agent c joins",
        "agent d joins",
        "agent outsider joins",
        "operator quarantine outsider for 100000",
    ):
        scenario.say(line)
    for name in "ab":
        scenario.say(f"agent {name} formed")
    scenario.say("agent a steps 1 5")
    scenario.say("agent a shard 5 0/2")
    return scenario


SCENARIO = busy()
JOBS = tuple(SCENARIO.state.jobs)
KNOWN = {
    "job_id": (JOBS[0], JOBS[0], JOBS[0], JOBS[1]),
    "state_digest": ("00", "ab"),
    "backends": ("gloo", "nccl"),
}


def event_of(message: agent_pb2.AgentMessage, name: AgentId, session: SessionId) -> Event | None:
    match message.WhichOneof("body"):
        case "hello":
            return translate.hello(message.hello, name, SessionId("another"))
        case "heartbeat":
            return translate.heartbeat(message.heartbeat, name, session)
        case "progress":
            return translate.progress(message.progress, name, 0)[0]
        case "logs":
            translate.log_lines(message.logs, name, 0)
            return None
        case "cached":
            translate.cached(message.cached)
            return None
        case _:
            return translate.report(message, name)


def said(state: State, event: Event) -> None:
    """Raises unless the event is refused without records, or leaves a state that keeps every promise."""
    now_ms = SCENARIO.now_ms
    before = codec.encode_state(state)
    decision = decide(state, now_ms, event)
    assert codec.encode_state(state) == before, "decide changed the state"
    if isinstance(decision.reply, Refused):
        assert decision.records == (), "a refusal came with records"
        return
    after = copy.deepcopy(state)
    step(after, now_ms, event)
    check_state(after, now_ms)
    assert codec.encode_state(codec.decode_state(codec.encode_state(after))) == codec.encode_state(after)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(messages(BODIES, KNOWN), st.sampled_from(NAMES))
def test_whatever_an_agent_says_is_refused_without_a_trace_or_keeps_every_promise(
    message: agent_pb2.AgentMessage, name: str
) -> None:
    agent = SCENARIO.state.agents.get(AgentId(name))
    session = agent.session_id if agent is not None else None
    event, complaint = None, ""
    try:
        event = event_of(message, AgentId(name), session or SessionId("none"))
    except translate.MalformedError as error:
        complaint = str(error)
    assert len(complaint) < 2_000, "an error repeats what the peer sent"
    if event is not None:
        said(SCENARIO.state, event)


@pytest.mark.parametrize("index", [0, 2**32 - 1])
def test_a_shard_report_from_outside_is_refused_without_a_trace(index: int) -> None:
    request = agent_pb2.ReportShardRequest(
        job_id=JOBS[0], generation=1, step=5, index=min(index, 1), count=2, digest="ab" * 32, bytes=9,
        state_digest="00", header_json="{}",
    )  # fmt: skip
    said(SCENARIO.state, translate.shard_report(request, AgentId("outsider")))
