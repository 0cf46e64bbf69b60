"""Durable records and snapshots survive the journal."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.core.codec import (
    CodecError,
    decode_record,
    decode_state,
    describe,
    encode_record,
    encode_state,
    is_durable,
)
from coordinator.core.model import (
    VOLATILE_OF_AGENT,
    VOLATILE_OF_JOB,
    Agent,
    DurableRecord,
    Job,
    LeaseRenewed,
    Readiness,
    State,
    StepsCommitted,
    Timing,
    Token,
    VolatileRecord,
)

NUMBERS = st.integers(-(2**62), 2**62)
TEXTS = st.text(max_size=8)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of the type that a hint names; only what the model uses."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: values(hints[name]) for name in hints})
    if isinstance(hint, typing.NewType):
        return values(hint.__supertype__)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if get_origin(hint) in (typing.Union, types.UnionType):
        return st.one_of(st.none(), *(values(a) for a in get_args(hint) if a is not types.NoneType))
    if get_origin(hint) is tuple:
        arguments = get_args(hint)
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=2).map(tuple)
        return st.tuples(*(values(argument) for argument in arguments))
    return {
        int: NUMBERS,
        str: TEXTS,
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }[hint]


@pytest.mark.parametrize("kind", get_args(DurableRecord), ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_durable_record_is_read_back_as_it_was(kind: type, data: st.DataObject) -> None:
    record = data.draw(values(kind))
    text = encode_record(record)
    assert decode_record(text) == record
    assert json.loads(text)["kind"] == kind.__name__
    assert "\n" not in text
    assert describe(record)


@pytest.mark.parametrize("kind", get_args(VolatileRecord), ids=lambda kind: kind.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_volatile_records_are_described_but_never_stored(kind: type, data: st.DataObject) -> None:
    record = data.draw(values(kind))
    assert not is_durable(record)
    assert describe(record)
    with pytest.raises(CodecError, match="volatile"):
        encode_record(record)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(values(Token), max_size=2),
    agents=st.lists(values(Agent), max_size=2),
    jobs=st.lists(values(Job), max_size=2),
    timing=values(Timing),
)
def test_a_snapshot_keeps_what_is_durable_and_nothing_else(
    tokens: list[Token], agents: list[Agent], jobs: list[Job], timing: Timing
) -> None:
    state = State(
        timing=timing,
        tokens={t.token_id: t for t in tokens},
        agents={a.agent_id: a for a in agents},
        jobs={j.job_id: j for j in jobs},
    )
    read = decode_state(encode_state(state))
    assert read.timing == timing
    assert read.tokens == state.tokens
    for found, written, volatile in (
        (read.agents, state.agents, VOLATILE_OF_AGENT),
        (read.jobs, state.jobs, VOLATILE_OF_JOB),
    ):
        assert list(found) == list(written)
        for key, value in written.items():
            defaults = {f.name: f.default for f in dataclasses.fields(value) if f.name in volatile}
            assert found[key] == dataclasses.replace(value, **defaults)


STORED = encode_record(
    StepsCommitted(at_ms=1, job_id="j", generation=2, first_step=3, last_step=4, tokens=5.0)
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "Rumour"}, "kind: found 'Rumour'"),
        ({"kind": "LeaseRenewed"}, "kind: found 'LeaseRenewed'"),
        ({"v": 2}, "found version 2"),
        ({"mood": "good"}, "unknown fields mood"),
        ({"first_step": "3"}, r"StepsCommitted.first_step: found '3'; expected int"),
        ({"first_step": True}, "expected int"),
        ({"tokens": None}, r"tokens: found None; expected float"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(CodecError, match=complaint):
        decode_record(json.dumps({**json.loads(STORED), **change}))


def test_a_missing_field_is_refused_and_one_with_a_default_is_filled_in() -> None:
    body = json.loads(STORED)
    del body["job_id"]
    with pytest.raises(CodecError, match="missing fields job_id"):
        decode_record(json.dumps(body))
    old = '{"kind":"AgentDraining","v":1,"at_ms":1,"agent_id":"a","draining":true,"reason":""}'
    assert decode_record(old).until_left is False


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"v":1}'])
def test_text_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(CodecError):
        decode_record(text)


@pytest.mark.parametrize("text", ["{}", '{"v":1}', '{"v":1,"tokens":[],"agents":[{}],"jobs":[],"timing":{}}'])
def test_text_that_is_no_snapshot_is_refused(text: str) -> None:
    with pytest.raises(CodecError):
        decode_state(text)


def test_only_what_is_named_volatile_may_be_lost() -> None:
    fields = {f.name for f in dataclasses.fields(Agent)}
    assert fields >= VOLATILE_OF_AGENT
    assert {f.name for f in dataclasses.fields(Job)} >= VOLATILE_OF_JOB
    assert Readiness.__name__ not in {kind.__name__ for kind in get_args(DurableRecord)}
    assert LeaseRenewed not in get_args(DurableRecord)
