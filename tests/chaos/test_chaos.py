"""A short storm in every run of the tests; `make chaos MINUTES=60` for more."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.chaos.blows import CHOICES, make_blows
from tests.chaos.run import job_of, live, prepare


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_fleet_under_random_blows_trains_what_an_undisturbed_run_trains(tmp_path: Path) -> None:
    root = tmp_path / "c"
    root.mkdir()
    assert len(os.fsencode(root)) < 80, "Unix socket paths are bounded"
    dataset = prepare(tmp_path / "dataset")
    verdict = live(1, 15.0, root=root, config=job_of(dataset, 1, 3), dataset=dataset, agents=3, gap_s=2.0)
    assert verdict.problem == "", verdict
    assert sum(verdict.struck.values()) >= 5, verdict
    assert verdict.generations >= 2, verdict
    assert verdict.steps >= 50, verdict


def test_a_seed_gives_the_same_blows_and_time_brings_every_kind() -> None:
    one, other = (make_blows(7, until_s=600, gap_s=2.0, lease_s=2.0) for _ in range(2))
    assert one == other
    assert one != make_blows(8, until_s=600, gap_s=2.0, lease_s=2.0)
    assert {(blow.kind, blow.whom) for blow in one} == set(CHOICES)
    assert any(after.at_s - before.at_s < 0.3 for before, after in itertools.pairwise(one))
