"""A few hundred simulated fleets in every run of the tests; `make sim SEEDS=10000` for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHUNK = 50


def simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        timeout=170,
        check=False,
    )


@pytest.mark.parametrize("first", range(1, 201, CHUNK))
def test_no_fleet_breaks_a_promise(first: int) -> None:
    done = simulate("--first", str(first), "--seeds", str(CHUNK), "--processes", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_no_crowd_breaks_a_promise() -> None:
    done = simulate("--first", "1", "--seeds", "2", "--agents", "120", "--minutes", "1", "--processes", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_seed_gives_the_same_trace_under_any_hash_seed() -> None:
    one, other = (simulate("--seed", "7", "--trace", hash_seed=seed) for seed in ("1", "2"))
    assert one.returncode == 0, one.stderr[-4000:]
    traces = [done.stdout.splitlines()[:-1] for done in (one, other)]  # the last line has the time it took
    assert len(traces[0]) > 100
    assert traces[0] == traces[1]


def test_processes_share_the_seeds() -> None:
    done = simulate("--first", "1", "--seeds", "10", "--minutes", "0.1", "--processes", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.startswith("10 seeds in ")
