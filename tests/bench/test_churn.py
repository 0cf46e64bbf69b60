from __future__ import annotations

import random

import pytest

from bench.churn import Storm, average_world, largest_error, losses, rebuild_times_s
from bench.fleets.fleet import FleetError, Shape
from bench.trace import Commit
from tests.bench.fakes import FakeFleet


def commit(step: int, t_ms: int, *, generation: int = 1, world: int = 3, loss: float = 1.0) -> Commit:
    return Commit(
        step=step, t_ns=t_ms * 10**6, generation=generation, world=world, rank=0, pid=1, ppid=0, loss=loss
    )


def test_rebuild_takes_from_the_last_step_of_one_world_to_the_first_of_the_next() -> None:
    commits = [commit(1, 0), commit(2, 100), commit(3, 250, generation=2), commit(4, 350, generation=2)]
    assert rebuild_times_s(commits) == [pytest.approx(0.15)]


def test_average_world_counts_each_step_once() -> None:
    commits = [commit(1, 0), commit(1, 1), commit(1, 2), commit(2, 9, world=2), commit(2, 9, world=2)]
    assert average_world(commits) == 2.5


def test_members_that_disagree_on_a_loss_are_found_out() -> None:
    with pytest.raises(ValueError, match="step 1 was committed with loss"):
        losses([commit(1, 0, loss=1.0), commit(1, 1, loss=1.1)])


def test_missing_step_is_no_small_error() -> None:
    with pytest.raises(ValueError, match="the churned run has no step 2"):
        largest_error({1: 1.0, 3: 1.0}, {1: 1.0, 2: 1.0, 3: 1.0})


def test_largest_error_is_relative() -> None:
    assert largest_error({1: 2.0, 2: 4.0}, {1: 2.0, 2: 5.0}) == pytest.approx(0.2)


def test_storm_leaves_a_fleet_that_still_trains() -> None:
    with FakeFleet(Shape(step_delay_ms=10, silence_s=0.3)) as fleet:
        fleet.start(3)
        storm = Storm(fleet, random.Random(3), every_s=0.3)
        storm.rage(4.0)
        struck = {kind: count for kind, count in storm.events.items() if kind != "spared"}
        assert sum(struck.values()) >= 3
        assert set(struck) <= {"kill", "freeze", "drain", "join"}
        start = len(fleet.trace)
        assert fleet.trace.wait(lambda fresh: any(True for _ in fresh), 10, start=start, alive=fleet.alive)


def test_storm_notices_a_member_that_ends_by_itself() -> None:
    with FakeFleet(Shape(step_delay_ms=10, silence_s=0.3)) as fleet:
        fleet.start(3)
        victim = next(iter(fleet.members))
        fleet.members[victim].kill()
        fleet.members[victim].wait()
        with pytest.raises(FleetError, match=f"member {victim} ended by itself"):
            Storm(fleet, random.Random(3), every_s=0.1).rage(4.0)
