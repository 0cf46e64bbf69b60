from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.trace import StepTrace
from trainer.trace import StepTrace as Writer


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[StepTrace]:
    made = StepTrace(tmp_path / "steps")
    yield made
    made.close()


def test_many_writers_share_the_trace_and_every_line_arrives_whole(trace: StepTrace) -> None:
    program = (
        "from trainer.trace import StepTrace\n"
        "trace = StepTrace()\n"
        "for step in range(1, 1001):\n"
        "    trace.committed(step=step, generation=1, world=4, rank=0, loss=0.5)\n"
    )
    environment = {**os.environ, "MUSTER_STEP_TRACE": str(trace.path)}
    argv = [sys.executable, "-c", program]
    writers = [subprocess.Popen(argv, cwd=Path(__file__).parents[2], env=environment) for _ in range(4)]
    assert trace.wait(lambda _: len(trace._commits) == 4000, 60, start=0)
    for writer in writers:
        assert writer.wait(30) == 0
        steps = [c.step for c in trace.commits() if c.pid == writer.pid]
        assert steps == list(range(1, 1001))


def test_waiting_ends_with_the_first_batch_that_is_enough(
    trace: StepTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSTER_STEP_TRACE", str(trace.path))
    writer = Writer()
    writer.committed(step=1, generation=1, world=1, rank=0)
    writer.committed(step=2, generation=1, world=1, rank=0)
    assert trace.wait(lambda fresh: any(c.step == 2 for c in fresh), 10, start=0)


def test_worker_outlives_the_reader_of_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = StepTrace(tmp_path / "steps")
    monkeypatch.setenv("MUSTER_STEP_TRACE", str(trace.path))
    writer = Writer()
    trace.close()
    writer.committed(step=1, generation=1, world=1, rank=0)


def test_without_a_trace_in_the_environment_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUSTER_STEP_TRACE", raising=False)
    Writer().committed(step=1, generation=1, world=1, rank=0)


def test_waiting_gives_up_when_the_fleet_is_dead(trace: StepTrace) -> None:
    assert not trace.wait(lambda _: True, 60, alive=lambda: False)


def test_waiting_gives_up_at_its_limit(trace: StepTrace) -> None:
    assert not trace.wait(lambda _: True, 0.05)
