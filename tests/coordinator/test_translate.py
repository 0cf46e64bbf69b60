"""Everything from outside is bounded, and an error names the field."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import translate
from coordinator.core.model import (
    AgentId,
    Cut,
    Evaluation,
    EvaluationsReceived,
    FailureKind,
    Generation,
    JobAction,
    JobId,
    LeaveAsked,
    Member,
    ProgressReceived,
    PushPlan,
    Refusal,
    SessionId,
    State,
    Timing,
    Why,
    WorkerFailedReceived,
)
from coordinator.translate import MalformedError
from protos import admin_pb2, agent_pb2

AGENT = AgentId("a0000001")
SESSION = SessionId("s1")
DIGEST = "ab" * 32


def probe(**changes: Any) -> agent_pb2.Probe:
    return agent_pb2.Probe(**{"worker_count": 1, "backends": ["gloo"], "hostname": "box", **changes})


def test_hello_becomes_facts_in_a_fixed_order() -> None:
    gpu = agent_pb2.Gpu(index=1, name="H200", memory_bytes=141 << 30, capability_major=9, capability_minor=0)
    message = agent_pb2.Hello(
        protocol=agent_pb2.PROTOCOL_VERSION_1,
        incarnation="i1",
        probe=probe(gpus=[gpu], labels={"z": "1", "a": "2"}),
        held=agent_pb2.Membership(job_id="j1", generation=4),
    )
    event = translate.hello(message, AGENT, SESSION)
    assert event.facts.gpus[0].capability == (9, 0)
    assert event.facts.labels == (("a", "2"), ("z", "1"))
    assert (event.held_job, event.held_generation) == ("j1", 4)


def test_hello_without_membership_holds_none() -> None:
    message = agent_pb2.Hello(incarnation="i1", probe=probe())
    assert translate.hello(message, AGENT, SESSION).held_job is None


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (agent_pb2.Hello(incarnation="", probe=probe()), "hello.incarnation"),
        (agent_pb2.Hello(incarnation="i", probe=probe(hostname="x" * 256)), "hello.probe.hostname"),
        (agent_pb2.Hello(incarnation="i", probe=probe(worker_count=0)), "hello.probe.worker_count"),
        (agent_pb2.Hello(incarnation="i", probe=probe(gpus=[agent_pb2.Gpu()] * 65)), "hello.probe.gpus"),
        (
            agent_pb2.Hello(incarnation="i", probe=probe(labels={str(n): "" for n in range(33)})),
            "hello.probe.labels",
        ),
        (agent_pb2.Hello(incarnation="i", probe=probe(memory_bytes=2**60)), "hello.probe.memory_bytes"),
    ],
)
def test_an_unbounded_hello_names_its_field(message: agent_pb2.Hello, field: str) -> None:
    with pytest.raises(MalformedError, match=f"^{field}: "):
        translate.hello(message, AGENT, SESSION)


@pytest.mark.parametrize("speed", [math.nan, math.inf, -1.0])
def test_a_heartbeat_with_an_impossible_speed_is_malformed(speed: float) -> None:
    with pytest.raises(MalformedError, match=r"^heartbeat\.tokens_per_s"):
        translate.heartbeat(agent_pb2.Heartbeat(tokens_per_s=speed), AGENT, SESSION)


def test_a_heartbeat_says_whether_all_is_stored_and_an_older_agent_s_does_not() -> None:
    assert translate.heartbeat(agent_pb2.Heartbeat(all_stored=True), AGENT, SESSION).all_stored
    assert not translate.heartbeat(agent_pb2.Heartbeat(), AGENT, SESSION).all_stored


def steps(*numbers: int, **changes: Any) -> list[agent_pb2.StepRecord]:
    return [agent_pb2.StepRecord(**{"step": n, "generation": 1, "tokens": 8.0, **changes}) for n in numbers]


def test_progress_gives_the_range_to_the_core_and_the_rows_to_the_journal() -> None:
    message = agent_pb2.Progress(
        job_id="j1",
        generation=2,
        steps=steps(5, 6, loss=math.nan),
        evaluations=[agent_pb2.Evaluation(step=5, loss=3.5)],
    )
    event, rows, evaluations = translate.progress(message, AGENT, 77)
    assert isinstance(event, ProgressReceived)
    assert (event.first_step, event.last_step, event.tokens) == (5, 6, 16.0)
    assert event.evaluations == (Evaluation(step=5, loss=3.5),)
    assert [(row.step, row.loss, row.at_ms) for row in rows] == [(5, None, 77), (6, None, 77)]
    assert [(row.step, row.loss) for row in evaluations] == [(5, 3.5)]


def test_progress_with_evaluations_only_has_no_range() -> None:
    message = agent_pb2.Progress(
        job_id="j1", generation=2, evaluations=[agent_pb2.Evaluation(step=5, loss=3.5)]
    )
    event, rows, evaluations = translate.progress(message, AGENT, 77)
    assert isinstance(event, EvaluationsReceived)
    assert event.evaluations == (Evaluation(step=5, loss=3.5),)
    assert (rows, len(evaluations)) == ((), 1)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (agent_pb2.Progress(job_id="", generation=1), "progress.job_id"),
        (agent_pb2.Progress(job_id="j", generation=0), "progress.generation"),
        (agent_pb2.Progress(job_id="j", generation=1, steps=steps(1, 3)), "progress.steps"),
        (agent_pb2.Progress(job_id="j", generation=1, steps=steps(*range(1, 1002))), "progress.steps"),
        (agent_pb2.Progress(job_id="j", generation=1, steps=steps(0)), r"progress.steps\[0\].step"),
        (
            agent_pb2.Progress(job_id="j", generation=1, steps=steps(1, lr=math.inf)),
            r"progress.steps\[0\].lr",
        ),
        (
            agent_pb2.Progress(job_id="j", generation=1, steps=steps(1, tokens=-1)),
            r"progress.steps\[0\].tokens",
        ),
    ],
)
def test_malformed_progress_names_its_field(message: agent_pb2.Progress, field: str) -> None:
    with pytest.raises(MalformedError, match=f"^{field}: "):
        translate.progress(message, AGENT, 0)


def test_reports_become_events() -> None:
    failed = agent_pb2.WorkerFailed(
        job_id="j1", kind=agent_pb2.FAILURE_KIND_KILLED, detail="signal 9\nlast line"
    )
    event = translate.report(agent_pb2.AgentMessage(failed=failed), AGENT)
    assert isinstance(event, WorkerFailedReceived)
    assert (event.kind, event.detail) == (FailureKind.KILLED, "signal 9\nlast line")
    leaving = agent_pb2.AgentMessage(leaving=agent_pb2.Leaving(reason="bed\x1b[31mtime"))
    assert translate.report(leaving, AGENT) == LeaveAsked(agent_id=AGENT, reason="bed [31mtime")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (agent_pb2.AgentMessage(), "body"),
        (agent_pb2.AgentMessage(hello=agent_pb2.Hello()), "hello"),
        (
            agent_pb2.AgentMessage(ready=agent_pb2.Ready(job_id="j", store_host="h", store_port=70_000)),
            "ready.store_port",
        ),
        (agent_pb2.AgentMessage(ready=agent_pb2.Ready(job_id="j", store_port=1)), "ready.store_host"),
        (agent_pb2.AgentMessage(failed=agent_pb2.WorkerFailed(job_id="j")), "failed.kind"),
        (
            agent_pb2.AgentMessage(formed=agent_pb2.Formed(job_id="j", generation=1, state_digest="XYZ")),
            "formed.state_digest",
        ),
        (agent_pb2.AgentMessage(goodbye=agent_pb2.Goodbye(reason="x" * 257)), "goodbye.reason"),
        (
            agent_pb2.AgentMessage(released=agent_pb2.Released(job_id="j" * 65, generation=1)),
            "released.job_id",
        ),
    ],
)
def test_malformed_reports_name_their_field(message: agent_pb2.AgentMessage, field: str) -> None:
    with pytest.raises(MalformedError, match=f"^{field}: "):
        translate.report(message, AGENT)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"index": 4}, "index"),
        ({"count": 0}, "count"),
        ({"digest": DIGEST + "\n"}, "digest"),
        ({"digest": "../../etc/passwd"}, "digest"),
        ({"header_json": "[]"}, "header_json"),
        ({"header_json": '{"a": NaN}'}, "header_json"),
        ({"step": 0}, "step"),
        ({"bytes": 0}, "bytes"),
        ({"digest": "", "bytes": 0}, "digest"),
        ({"digest": "", "state_digest": "ab"}, "bytes"),
        ({"digest": "", "state_digest": "ab", "bytes": 0, "index": 1}, "index"),
    ],
)
def test_a_malformed_shard_report_names_its_field(changes: dict[str, Any], field: str) -> None:
    good = {"job_id": "j", "generation": 1, "step": 1, "index": 0, "count": 4, "digest": DIGEST, "bytes": 1}
    sound = agent_pb2.ReportShardRequest(**{**good, "header_json": "{}"})
    assert translate.shard_report(sound, AGENT).digest == DIGEST
    word = agent_pb2.ReportShardRequest(
        **{**good, "header_json": "{}", "digest": "", "bytes": 0, "state_digest": "ab"}
    )
    assert translate.shard_report(word, AGENT).digest == ""
    with pytest.raises(MalformedError, match=f"^{field}: "):
        translate.shard_report(
            agent_pb2.ReportShardRequest(**{**good, "header_json": "{}", **changes}), AGENT
        )


def test_a_datasets_blobs_are_all_found_once() -> None:
    text = (
        f'{{"format":"muster-dataset-1","splits":{{"train":[{{"digest":"{DIGEST}","tokens":1}}],'
        f'"val":[{{"digest":"{DIGEST}"}}]}},"tokenizer":{{"kind":"bpe","digest":"{"cd" * 32}"}}}}'
    )
    assert translate.dataset_digests(text) == [DIGEST, "cd" * 32]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format":"x"}',
        '{"format":"muster-dataset-1"}',
        '{"format":"muster-dataset-1","splits":{"train":[{"digest":"zz"}]}}',
        '{"format":"muster-dataset-1","splits":[]}',
    ],
)
def test_what_is_no_dataset_manifest_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError, match=r"^dataset_json"):
        translate.dataset_digests(text)


def test_commands_without_a_kind_are_malformed() -> None:
    assert translate.job_action(admin_pb2.JOB_COMMAND_KIND_STOP) is JobAction.STOP
    with pytest.raises(MalformedError, match=r"^kind: found 0"):
        translate.job_action(0)
    with pytest.raises(MalformedError, match=r"^kind: found 99"):
        translate.agent_action(99)


def test_every_refusal_of_the_core_has_a_name_on_the_wire() -> None:
    for refusal in Refusal:
        assert translate.go_away(refusal, "m", retry=False).go_away.reason == int(refusal)
    assert translate.go_away(None, "m", retry=True).go_away.reason == 0


def test_welcome_carries_the_budget() -> None:
    message = translate.welcome(AGENT, Timing.from_lease(2_000)).welcome
    assert (message.lease_ms, message.heartbeat_interval_ms, message.grace_ms) == (2_000, 500, 1_000)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_from_outside_raise_anything_but_malformed(data: bytes) -> None:
    message = agent_pb2.AgentMessage()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    for read in (
        lambda: translate.report(message, AGENT),
        lambda: translate.hello(message.hello, AGENT, SESSION),
        lambda: translate.heartbeat(message.heartbeat, AGENT, SESSION),
        lambda: translate.progress(message.progress, AGENT, 0),
        lambda: translate.log_lines(message.logs, AGENT, 0),
    ):
        with contextlib.suppress(MalformedError):
            read()


def test_a_plan_is_worded_once_for_all_its_members_and_again_when_it_changes() -> None:
    member = Member(agent_id=AgentId("a1"), group_rank=0, first_rank=0, worker_count=1, host="h")
    first = Generation(
        number=1, members=(member,), store_host="h", store_port=1, cut=Cut.ABORT, why=Why.FORMED, planned_ms=0,
        deadline_ms=1, committed_step=0, committed_digest="", from_checkpoint_step=None, fresh=True,
    )  # fmt: skip
    wording, state = translate.Wording(), State(timing=Timing.from_lease(10_000))

    def told(agent_id: str, generation: Generation, checkpoint_json: str = "") -> object:
        push = PushPlan(
            agent_id=AgentId(agent_id),
            job_id=JobId("j"),
            generation=generation,
            checkpoint_json=checkpoint_json,
        )
        words = wording.of(push, state)
        assert isinstance(words, bytes)
        assert agent_pb2.CoordinatorMessage.FromString(words) == translate.push(push, state)
        return words

    once = told("a1", first)
    assert told("a2", first) is once
    assert told("a1", replace(first, number=2)) != once
    assert told("a1", first, "{}") != once


@pytest.mark.parametrize("counts", [True, False])
def test_a_plan_says_whose_state_counts_by_the_plan_whoever_is_gone_since(counts: bool) -> None:
    member = Member(
        agent_id=AgentId("a1"), group_rank=0, first_rank=0, worker_count=1, host="h", holds_state=counts
    )
    generation = Generation(
        number=1, members=(member,), store_host="h", store_port=1, cut=Cut.ABORT, why=Why.FORMED, planned_ms=0,
        deadline_ms=1, committed_step=4, committed_digest="", from_checkpoint_step=None, fresh=False,
        holders=() if counts else (AgentId("a1"),),
    )  # fmt: skip
    (told,) = translate.plan(JobId("j"), generation, "", 1).members
    assert told.holds_state is counts
