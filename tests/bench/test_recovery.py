from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from bench.fleets.fleet import Fleet, FleetError, Shape
from bench.recovery import CASES, SYSTEMS, Lot, Sample, measure, rolled_back, rows_of
from bench.trace import Commit
from tests.bench.fakes import FakeFleet, ForgetfulFleet, MortalFleet

SHAPE = Shape(step_delay_ms=10, silence_s=0.3)


def commit(step: int, generation: int, t_ns: int, pid: int = 1) -> Commit:
    return Commit(step=step, t_ns=t_ns, generation=generation, world=2, rank=0, pid=pid, ppid=0)


def attempts(make: Callable[[], Fleet], case: str, repeats: int) -> tuple[list[Sample], str]:
    with Lot(make) as lot:
        return measure(lot, case, repeats, random.Random(1))


def test_steps_that_a_new_world_computes_again_are_lost() -> None:
    old = [commit(step, 1, step) for step in range(1, 11)]
    again = [commit(step, 2, 100 + step) for step in range(8, 12)]
    assert rolled_back([*old, *again], lambda c: c.pid) == 3
    assert rolled_back([*old, commit(11, 2, 111)], lambda c: c.pid) == 0


def test_survivor_that_applies_a_step_later_than_another_has_lost_nothing() -> None:
    first = [commit(1, 1, 1, pid=1), commit(2, 1, 2, pid=1), commit(3, 2, 9, pid=1)]
    second = [commit(1, 1, 1, pid=2), commit(2, 2, 8, pid=2), commit(3, 2, 9, pid=2)]
    assert rolled_back([*first, *second], lambda c: c.pid) == 0


@pytest.mark.parametrize("case", ["kill_worker", "kill_agent", "drain"])
def test_death_is_timed_from_the_signal_to_the_survivors_next_world(case: str) -> None:
    samples, _ = attempts(lambda: FakeFleet(SHAPE), case, 2)
    assert len(samples) == 2
    for sample in samples:
        assert sample.recovery_s is not None
        assert 0.2 < sample.recovery_s < 3
        assert sample.steps_lost == 0


def test_frozen_member_is_replaced_between_attempts() -> None:
    samples, said = attempts(lambda: FakeFleet(SHAPE), "freeze", 2)
    assert [s.recovery_s is not None for s in samples] == [True, True]
    assert said == ""


def test_lost_steps_are_counted() -> None:
    samples, _ = attempts(lambda: ForgetfulFleet(SHAPE), "kill_agent", 1)
    assert samples[0].steps_lost == 7


def test_join_counts_the_pause_of_the_others_and_not_the_start_of_the_newcomer() -> None:
    samples, _ = attempts(lambda: FakeFleet(SHAPE), "join", 2)
    for sample in samples:
        assert sample.recovery_s is not None
        assert sample.joined_s is not None
        assert sample.recovery_s < sample.joined_s


def test_coordinator_restart_measures_what_a_step_takes_longer() -> None:
    samples, _ = attempts(lambda: FakeFleet(SHAPE), "coordinator_restart", 1)
    assert samples[0].recovery_s is not None
    assert samples[0].recovery_s < 1
    assert samples[0].note == ""


def test_job_that_dies_is_reported_and_given_up_after_two_attempts() -> None:
    samples, _ = attempts(lambda: MortalFleet(SHAPE), "kill_agent", 5)
    assert [s.recovery_s for s in samples] == [None, None]
    assert "every member had ended" in samples[0].note


def test_fleet_that_does_not_start_says_so_in_the_row() -> None:
    class Absent(FakeFleet):
        def start_coordinator(self) -> None:
            raise FleetError("no coordinator here")

    samples, said = attempts(lambda: Absent(SHAPE), "drain", 1)
    (recovery, lost) = rows_of(samples, system="x", case="drain", goal=None, note=said)
    assert (recovery.n, recovery.median, lost.n) == (0, None, 0)
    assert "no coordinator here" in recovery.note


def test_every_sample_becomes_a_row_per_metric() -> None:
    samples = [Sample(recovery_s=0.1, steps_lost=0, joined_s=2.0)]
    rows = rows_of(samples, system="muster", case="join", goal=0.2, note="")
    assert [(r.metric, r.goal) for r in rows] == [
        ("recovery_s", 0.2),
        ("steps_lost", 0.0),
        ("joined_s", None),
    ]


def test_systems_and_cases_are_those_that_the_issue_names() -> None:
    assert {"muster", "torchrun", "torchrun-tuned", "torchft"} <= {s.system for s in SYSTEMS}
    assert set(CASES) == {"kill_worker", "kill_agent", "drain", "freeze", "join", "coordinator_restart"}
