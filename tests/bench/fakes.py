"""A fleet of processes that only pretend to train: real signals, a real trace, no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.fleets.fleet import REPOSITORY, Fleet, Shape

_MEMBER = Path(__file__).with_name("fake_member.py")


class FakeFleet(Fleet):
    """Members agree on their world through one file per member in a directory; whoever is dead or has
    been silent for `silence_s` is left out of the next world."""

    system = "fake"
    limit_s = 5.0
    start_limit_s = 30.0
    has_agents = False
    repeats_steps = 0
    """How many committed steps each new world computes again."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        (self.home / "world").mkdir()
        self.coordinator_starts = 0

    def start_coordinator(self) -> None:
        self.coordinator_starts += 1

    def kill_coordinator(self) -> None:
        pass

    def launch(self, index: int) -> subprocess.Popen[bytes]:
        argv = [sys.executable, str(_MEMBER), str(self.home / "world"), str(index)]
        argv += [str(self.shape.silence_s), str(self.repeats_steps)]
        environment = {"PYTHONPATH": str(REPOSITORY), "MUSTER_STEP_TRACE": str(self.trace.path)}
        return self.park.start(f"member-{index}", argv, environment)


class ForgetfulFleet(FakeFleet):
    system = "forgetful"
    repeats_steps = 7


class MortalFleet(FakeFleet):
    """Every member ends as soon as one is missed."""

    system = "mortal"
    repeats_steps = -1
