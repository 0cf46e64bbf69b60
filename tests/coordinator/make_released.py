"""Makes tests/coordinator/released/N of the schema N that this code writes, before the next one comes.

    python -m tests.coordinator.make_released

`journal.db` is a transcript's records, a snapshot and a step log; `state.json` what the codec said of the state
at the end; `records.jsonl` every kind of record, with every value of each enumeration.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from coordinator.core import codec
from coordinator.core.model import DurableRecord
from coordinator.journal import MIGRATIONS, Entry, EvaluationRow, Journal, RecordRow, Snapshot, StepRow
from coordinator.loop import restore
from tests.core.scenario import Scenario

STEPS = 12
STORY = """
job tiny min 2 max 2 last_call 0
agent a,b,c joins
agent a,b,c ready
agent a ready
agent a,b formed
agent a steps 1 10
agent a shard 5 0/2
agent b shard 5 1/2
agent a shard 8 0/1
agent b vouches 8 1
operator checkpoint
agent a fails killed
agent b,c ready
agent b ready
agent b,c formed
SNAPSHOT
agent b steps 11 12
agent c closes
agent c joins
operator drain a
operator release a
job wide min 1 max 4 last_call 0
agent d,e joins
operator quarantine d
agent e leaving
"""


def examples(hint: Any) -> Iterator[Any]:
    """Values of the type that a hint names: each of an enumeration, one of anything else."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        each = {name: list(examples(hints[name])) for name in hints}
        for turn in range(max(map(len, each.values()))):
            yield hint(**{name: found[turn % len(found)] for name, found in each.items()})  # type: ignore[operator]
    elif isinstance(hint, typing.NewType):
        yield from examples(hint.__supertype__)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from hint
    elif get_origin(hint) in (typing.Union, types.UnionType):
        yield from itertools.chain(*(examples(a) for a in get_args(hint) if a is not types.NoneType))
    elif get_origin(hint) is tuple:
        arguments = get_args(hint)
        if arguments[-1] is Ellipsis:
            yield from ((one,) for one in examples(arguments[0]))
        else:
            yield tuple(next(examples(argument)) for argument in arguments)
    else:
        yield {int: 1, str: "t0", bool: True, float: 1.0}[hint]


def step(number: int) -> StepRow:
    return StepRow(
        job_id="tiny", step=number, loss=None if number == 2 else 1 / number, slices=2,
        data_digest=2**64 - number, tokens=8.0, lr=0.1, grad_norm=None, skipped=number == 2, generation=1,
        duration_s=0.25, at_ms=number,
    )  # fmt: skip


def make(directory: Path) -> None:
    directory.mkdir(parents=True)
    scenario = Scenario()
    with Journal(directory / "journal.db") as journal:
        for line in STORY.splitlines():
            if line == "SNAPSHOT":
                body = codec.encode_state(scenario.state)
                journal.write_snapshot(Snapshot(sequence=journal.last_sequence, body=body))
                continue
            scenario.say(line)
            new = [codec.decode_record(text) for text in scenario.journal.lines[journal.last_sequence :]]
            rows = tuple(
                RecordRow(
                    at_ms=record.at_ms,
                    kind=type(record).__name__,
                    job_id=str(getattr(record, "job_id", "") or ""),
                    body=codec.encode_record(record),
                    text=codec.describe(record),
                )
                for record in new
            )
            journal.commit([Entry(records=rows)])
        steps = tuple(map(step, range(1, STEPS + 1)))
        journal.commit(
            [Entry(steps=steps, evaluations=(EvaluationRow(job_id="tiny", step=STEPS, loss=2.5),))]
        )
        state = restore(journal, scenario.state.timing)
    (directory / "state.json").write_text(codec.encode_state(state) + "\n")
    kinds = (one for kind in get_args(DurableRecord) for one in examples(kind))
    (directory / "records.jsonl").write_text("".join(f"{codec.encode_record(one)}\n" for one in kinds))


if __name__ == "__main__":
    make(Path(__file__).with_name("released") / str(len(MIGRATIONS)))
