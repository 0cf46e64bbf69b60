"""The worker's codec, alone and against the agent's."""

from __future__ import annotations

import json
import math
import typing

import pytest

import agent.control
from trainer import control

UP: list[control.Up] = [
    control.Hello(pid=4),
    control.Warm(),
    control.Formed(generation=3, step=9, state_digest="ab", healed=True),
    control.Step(
        generation=3,
        step=10,
        loss=2.5,
        slices=8,
        data_digest=str(2**64 - 1),
        tokens=512,
        lr=1e-3,
        grad_norm=0.5,
        skipped=False,
        duration_s=0.1,
    ),
    control.Evaluation(step=10, loss=3.0),
    control.Shard(
        generation=3,
        step=10,
        index=1,
        count=2,
        digest="cd",
        bytes=7,
        state_digest="ab",
        header={"step": 10},
    ),
    control.Wants(digests=["ab", "cd"]),
    control.Pong(sequence=1, activity="reducing", since_s=0.5, step=10),
    control.Failed(generation=3, kind="collective", detail="peer — gone", step=10),
    control.Released(generation=4),
    control.Finished(generation=4, step=10),
]
PLAN = control.Plan(
    generation=5,
    rank=0,
    world_size=2,
    group_rank=0,
    group_world_size=2,
    store_host="10.0.0.1",
    store_port=1234,
    cut="after_step",
    committed_step=10,
    committed_digest="",
    source="memory",
    checkpoint_step=None,
    release=False,
    checkpoint_before_cut=False,
    timeout_s=20,
)
DOWN: list[control.Down] = [
    PLAN,
    control.Abort(generation=5),
    control.Checkpoint(generation=5),
    control.Ping(sequence=2),
    control.Stop(),
]


def test_every_message_survives_the_codec() -> None:
    assert {type(m) for m in UP} == set(typing.get_args(control.Up))
    assert {type(m) for m in DOWN} == set(typing.get_args(control.Down))
    for message in (*UP, *DOWN):
        line = control.encode(message)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert control.decode(line) == message


@pytest.mark.parametrize("message", UP, ids=lambda m: type(m).__name__)
def test_the_agent_understands_what_the_worker_says(message: control.Up) -> None:
    heard = agent.control.decode(control.encode(message))
    assert heard.type == type(message).__name__.lower()
    for name in type(message).__dataclass_fields__:
        assert getattr(heard, name) == getattr(message, name)


@pytest.mark.parametrize("message", DOWN, ids=lambda m: type(m).__name__)
def test_the_worker_understands_what_the_agent_says(message: control.Down) -> None:
    kinds = {kind.type: kind for kind in typing.get_args(agent.control.Down)}
    values = {name: getattr(message, name) for name in type(message).__dataclass_fields__}
    said = kinds[type(message).__name__.lower()](**values)
    assert control.decode(agent.control.encode(said)) == message


def test_a_loss_that_is_not_a_number_travels() -> None:
    step = UP[3]
    assert isinstance(step, control.Step)
    line = control.encode(step).replace(b"2.5", b"NaN")
    back = control.decode(line)
    assert isinstance(back, control.Step)
    assert math.isnan(back.loss)


def test_fields_of_a_newer_agent_are_passed_over() -> None:
    body = json.loads(control.encode(control.Ping(sequence=2)))
    assert control.decode(json.dumps({**body, "colour": "blue"}).encode()) == control.Ping(sequence=2)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{",
        b'{"type":"dance"}',
        b'{"type":["plan"]}',
        b'{"type":"ping"}',
        b'{"type":"ping","sequence":"2"}',
        b'{"type":"ping","sequence":true}',
        b'{"type":"abort","generation":1.5}',
        control.encode(PLAN).replace(b"after_step", b"sometime"),
    ],
)
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(control.BadMessage):
        control.decode(line)
