from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.trace import Commit, StepTrace


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[StepTrace]:
    made = StepTrace(tmp_path / "steps")
    yield made
    made.close()


def commit(step: int) -> Commit:
    return Commit(step=step, t_ns=step, generation=1, world=1, rank=0, pid=1, ppid=0)


def test_many_writers_share_the_trace_and_every_line_arrives_whole(trace: StepTrace) -> None:
    program = (
        "import os, sys\n"
        "from bench.trace import Commit\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for step in range(1, 1001):\n"
        "    line = Commit(step=step, t_ns=0, generation=1, world=4, rank=0, pid=os.getpid(), ppid=0)\n"
        "    os.write(fd, line.as_line())\n"
    )
    argv = [sys.executable, "-c", program, str(trace.path)]
    writers = [subprocess.Popen(argv, cwd=Path(__file__).parents[2]) for _ in range(4)]
    assert trace.wait(lambda _: len(trace._commits) == 4000, 60, start=0)
    for writer in writers:
        assert writer.wait(30) == 0
        steps = [c.step for c in trace.commits() if c.pid == writer.pid]
        assert steps == list(range(1, 1001))


def test_waiting_ends_with_the_first_batch_that_is_enough(trace: StepTrace) -> None:
    fd = os.open(trace.path, os.O_WRONLY)
    os.write(fd, commit(1).as_line() + commit(2).as_line())
    assert trace.wait(lambda fresh: any(c.step == 2 for c in fresh), 10, start=0)
    os.close(fd)


def test_waiting_gives_up_when_the_fleet_is_dead(trace: StepTrace) -> None:
    assert not trace.wait(lambda _: True, 60, alive=lambda: False)


def test_waiting_gives_up_at_its_limit(trace: StepTrace) -> None:
    assert not trace.wait(lambda _: True, 0.05)
