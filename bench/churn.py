"""A job under random SIGKILL, SIGSTOP, SIGTERM and joins: how much training is left, and is it the same?

    python -m bench.churn [--json] [--minutes 10] [--seed 1] [--every 10] [--newcomers-yield]

Goodput is the steps committed under churn divided by the steps that the same fleet commits undisturbed
in the same time (measured first, in the same run).  Afterwards one process trains alone through the same
steps, and its loss per step is compared with what the fleet committed.

A newcomer imports torch twice, some 8 s of a core, which on a machine of its own costs the others nothing,
and here, where all share two cores, a good part of their time.  With --newcomers-yield it runs only when
nobody else wants a core, until it has committed its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.fleets.fleet import REPOSITORY, Fleet, FleetError, Shape
from bench.fleets.muster import Muster
from bench.processes import Park, send, threads
from bench.recovery import rolled_back
from bench.report import Row, emit, progress
from bench.trace import Commit, StepTrace

GOODPUT_GOAL = 0.95
LOSS_GOAL = 1e-4


def rebuild_times_s(commits: Sequence[Commit]) -> list[float]:
    """For each change of world, from the last committed step before it to the first one after it."""
    ordered = sorted(commits, key=lambda c: c.t_ns)
    times = []
    seen = {ordered[0].generation} if ordered else set()
    for before, after in itertools.pairwise(ordered):
        if after.generation not in seen:
            seen.add(after.generation)
            times.append((after.t_ns - before.t_ns) / 1e9)
    return times


def average_world(commits: Sequence[Commit]) -> float:
    """Mean world size over the committed steps, each step counted once."""
    return statistics.fmean({c.step: c.world for c in commits}.values())


def losses(commits: Iterable[Commit]) -> dict[int, float]:
    """The committed loss of each step.  Raises ValueError if two members differ on one step."""
    found: dict[int, float] = {}
    for commit in commits:
        assert commit.loss is not None
        if found.setdefault(commit.step, commit.loss) != commit.loss:
            known = found[commit.step]
            raise ValueError(f"step {commit.step} was committed with loss {known} and with {commit.loss}")
    return found


def largest_error(churned: dict[int, float], undisturbed: dict[int, float]) -> float:
    """Largest relative difference of the losses.  Raises ValueError for a step that is missing."""
    expected = range(1, max(churned) + 1)
    for name, run in (("churned", churned), ("undisturbed", undisturbed)):
        if missing := [step for step in expected if step not in run]:
            raise ValueError(f"the {name} run has no step {missing[0]} ({len(missing)} are missing)")
    return max(abs(churned[s] - undisturbed[s]) / abs(undisturbed[s]) for s in expected)


class Storm:
    """Does something to a member now and then, and cleans up after it; seeded.

    Two members at least are always left alone, and one more than the job takes may wait as a standby.
    """

    def __init__(self, fleet: Fleet, rng: random.Random, every_s: float, *, yielding: bool = False) -> None:
        """`yielding`: newcomers get idle time only; needs the right to give it back (CAP_SYS_NICE)."""
        self._yielding = yielding
        self._newcomers: set[int] = set()
        self._fleet = fleet
        self._rng = rng
        self._every_s = every_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._busy: set[int] = set()  # frozen or draining: something is due for them
        self.events: dict[str, int] = {}

    def rage(self, seconds: float) -> None:
        """Go on for so long; then wake and replace what is still frozen."""
        end = time.monotonic() + seconds
        self._at(time.monotonic() + self._rng.expovariate(1 / self._every_s), self._strike)
        while self._due and self._due[0][0] < end:
            due, _, act = heapq.heappop(self._due)
            self._fleet.trace.wait(self._watch, max(0.0, due - time.monotonic()))
            self._check()
            act()
        self._fleet.trace.wait(self._watch, max(0.0, end - time.monotonic()))

    def _watch(self, fresh: Iterable[Commit]) -> bool:
        for commit in fresh:
            member = self._fleet.owner(commit)
            if member in self._newcomers:
                self._newcomers.discard(member)
                for pid in (member, commit.pid):
                    schedule(pid, os.SCHED_OTHER)
        return False

    def _add(self) -> None:
        member = self._fleet.add()
        if self._yielding:
            self._newcomers.add(member)
            schedule(member, os.SCHED_IDLE)

    def _check(self) -> None:
        for member, process in self._fleet.members.items():
            if member not in self._busy and process.poll() is not None:
                raise FleetError(f"churn: member {member} ended by itself with status {process.poll()}")

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), act))

    def _later(self, low_s: float, high_s: float, act: Callable[[], None]) -> None:
        self._at(time.monotonic() + self._rng.uniform(low_s, high_s), act)

    def _strike(self) -> None:
        self._at(time.monotonic() + self._rng.expovariate(1 / self._every_s), self._strike)
        fleet, rng = self._fleet, self._rng
        kinds = ("kill", "kill_worker", "freeze", "drain", "join")
        kind = rng.choice(kinds if fleet.has_agents else ("kill", "freeze", "drain", "join"))
        # A member that has not trained yet has no worker to strike at.
        trained = {owner for c in fleet.trace.commits() if (owner := fleet.owner(c)) is not None}
        targets = sorted(trained - self._busy)
        if kind != "join" and len(targets) <= 2:
            kind = "join"
        if kind == "join" and len(fleet.members) > fleet.shape.world:
            kind = "kill" if len(targets) > 2 else "spared"
        self.events[kind] = self.events.get(kind, 0) + 1
        progress(f"  {kind} ({len(fleet.members)} members)")
        if kind == "join":
            self._add()
        if kind in {"join", "spared"}:
            return
        victim = rng.choice(targets)
        if kind == "kill":
            fleet.remove(victim)
            self._later(0.0, 3.0, self._add)
        elif kind == "kill_worker":
            send(fleet.worker(victim), signal.SIGKILL)
        elif kind == "drain":
            self._busy.add(victim)
            send(victim, signal.SIGTERM)
            self._later(2.0, 4.0, lambda: self._replace(victim))
        else:
            self._busy.add(victim)
            fleet.signal(victim, signal.SIGSTOP)
            lease = fleet.shape.silence_s
            wake = rng.random() < 0.5
            self._later(
                0.2 * lease,
                2 * lease,
                (lambda: self._wake(victim)) if wake else lambda: self._replace(victim),
            )

    def _wake(self, member: int) -> None:
        self._busy.discard(member)
        self._fleet.signal(member, signal.SIGCONT)

    def _replace(self, member: int) -> None:
        self._busy.discard(member)
        self._fleet.remove(member)
        self._add()


def schedule(pid: int, policy: int) -> None:
    """Give every thread of a process, if it still lives, a scheduling policy; what they start inherits it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in threads(pid):
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def undisturbed_losses(job: dict[str, Any], park: Park, home: Path, last: int) -> dict[int, float]:
    """Train `job`, a job file, alone to step `last` (no later than its last): without a coordinator and
    without padding.  Its files go to `home`.  Raises FleetError if the run ends early."""
    import yaml

    alone = {**job, "train": {**job["train"], "step_delay_ms": 0}}
    alone["checkpoint"] = {"every_steps": job["train"]["steps"], "dir": str(home / "alone")}
    path = home / "alone.yaml"
    path.write_text(yaml.safe_dump(alone), encoding="utf-8")
    trace = StepTrace(home / "alone-steps")
    try:
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "MUSTER_STEP_TRACE": str(trace.path),
        }
        process = park.start("alone", [sys.executable, "-m", "trainer.train", str(path)], environment)
        reached = trace.wait(
            lambda fresh: any(c.step >= last for c in fresh),
            120 + last,
            start=0,
            alive=lambda: process.poll() is None,
        )
        process.kill()
        process.wait()
        if not reached:
            raise FleetError(f"the undisturbed run ended early; its output:\n{park.log_tail('alone')}")
        return losses(trace.commits())
    finally:
        trace.close()


def measure(shape: Shape, minutes: float, every_s: float, seed: int, *, yielding: bool) -> list[Row]:
    """The whole benchmark."""
    with Muster(shape) as fleet:
        fleet.start(shape.world)
        calm_s = min(60.0, 12 * minutes)
        fleet.steady(shape.world, steps=20)
        progress(f"undisturbed for {calm_s:.0f} s")
        calm_start = len(fleet.trace)
        fleet.trace.wait(lambda _: False, calm_s)
        calm = fleet.trace.commits(calm_start)
        calm_rate = (max(c.step for c in calm) - min(c.step for c in calm)) / (
            (max(c.t_ns for c in calm) - min(c.t_ns for c in calm)) / 1e9
        )
        progress(f"{calm_rate:.2f} steps/s; churn for {minutes:g} min")
        start, since = len(fleet.trace), time.monotonic()
        first = max(c.step for c in fleet.trace.commits(start - 3 * shape.world))
        storm = Storm(fleet, random.Random(seed), every_s, yielding=yielding)
        storm.rage(60 * minutes)
        seconds = time.monotonic() - since
        churned = fleet.trace.commits(start)
        everything = fleet.trace.commits()
        last = max(c.step for c in churned)
        progress(f"{last - first} steps in {seconds:.0f} s; now alone through {last} steps")
        lost = rolled_back(everything, lambda c: c.pid)
        for member in list(fleet.members):
            fleet.remove(member)
        error = largest_error(
            losses(everything), undisturbed_losses(fleet.job(), fleet.park, fleet.home, last)
        )
    happened = ", ".join(f"{count} {kind}" for kind, count in sorted(storm.events.items()))
    case = f"every {every_s:g} s for {minutes:g} min" + (", newcomers yield" if yielding else "")
    return [
        Row.of([value], case=case, system="muster", metric=metric, unit=unit, goal=goal, note=note)
        for metric, value, unit, goal, note in (
            ("goodput", (last - first) / (calm_rate * seconds), "", GOODPUT_GOAL, happened),
            ("steps_lost", float(lost), "steps", 0.0, ""),
            ("loss_error", error, "", LOSS_GOAL, f"largest relative difference over {last} steps"),
            ("world", average_world(churned), "workers", None, f"undisturbed: {average_world(calm):g}"),
        )
    ] + [
        Row.of(
            rebuild_times_s(churned),
            case=case,
            system="muster",
            metric="rebuild_s",
            unit="s",
            note="last step of a world to first step of the next, waiting for leases included",
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.churn", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=10.0, help="mean seconds between events")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-delay-ms", type=int, default=100)
    parser.add_argument("--silence-s", type=float, default=1.0, help="the lease")
    parser.add_argument(
        "--newcomers-yield", action="store_true", help="they get idle time only until they have joined"
    )
    args = parser.parse_args()
    shape = Shape(step_delay_ms=args.step_delay_ms, silence_s=args.silence_s, seed=args.seed)
    emit(
        measure(shape, args.minutes, args.every, args.seed, yielding=args.newcomers_yield), as_json=args.json
    )


if __name__ == "__main__":
    main()
