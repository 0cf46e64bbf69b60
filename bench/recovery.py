"""How long after an event the survivors commit their next step, for Muster and for its peers.

    python -m bench.recovery [--json] [--repeats 5] [--systems muster,torchrun] [--cases freeze]

What is measured is written down in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from bench.fleets.fleet import Fleet, FleetError, Shape
from bench.fleets.muster import Muster
from bench.fleets.torchft import Torchft, TorchftTuned
from bench.fleets.torchrun import Torchrun, TorchrunPlain, TorchrunTuned
from bench.processes import send
from bench.report import Row, emit, progress
from bench.trace import Commit

SYSTEMS: tuple[type[Fleet], ...] = (Muster, Torchrun, TorchrunTuned, Torchft, TorchftTuned, TorchrunPlain)
DEFAULT_SYSTEMS = ("muster", "torchrun", "torchrun-tuned", "torchft", "torchft-tuned")
CASES = ("kill_worker", "kill_agent", "drain", "freeze", "join", "coordinator_restart")

GIVE_UP_AFTER = 2
"""Attempts of one case that run into the limit, one after the other, before the rest is left out."""
CALM_S = 3.0
"""How long steps are watched before a coordinator is killed, and after it is back."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One attempt.  `recovery_s` None: not within the limit."""

    recovery_s: float | None
    steps_lost: int | None
    joined_s: float | None = None
    """join: from the start of the newcomer's process to its first committed step."""
    note: str = ""


def rolled_back(commits: Iterable[Commit], who: Callable[[Commit], int | None]) -> int:
    """Committed steps that had to be computed again: by how many a member's step number fell back,
    of all members that `who` names the one that lost most."""
    newest: dict[int, int] = {}
    lost: dict[int, int] = {}
    for commit in sorted(commits, key=lambda c: c.t_ns):
        member = who(commit)
        if member is None:
            continue
        lost[member] = lost.get(member, 0) + max(0, newest.get(member, 0) + 1 - commit.step)
        newest[member] = commit.step
    return max(lost.values(), default=0)


def gaps_s(commits: Iterable[Commit], who: Callable[[Commit], int | None]) -> list[float]:
    """Seconds between two successive commits of each member that `who` names; None is passed over."""
    last: dict[int, int] = {}
    gaps = []
    for commit in sorted(commits, key=lambda c: c.t_ns):
        member = who(commit)
        if member is None:
            continue
        if member in last:
            gaps.append((commit.t_ns - last[member]) / 1e9)
        last[member] = commit.t_ns
    return gaps


def _first_steps(
    fleet: Fleet, survivors: Sequence[int], old_generation: int, since_ns: int, start: int
) -> dict[int, int] | None:
    """When each survivor first committed a step in a world other than the old one; None after the limit."""
    first: dict[int, int] = {}

    def done(fresh: Iterable[Commit]) -> bool:
        for commit in fresh:
            member = fleet.owner(commit)
            if member is None or member not in survivors:
                continue
            if commit.generation != old_generation and commit.t_ns > since_ns:
                first.setdefault(member, commit.t_ns)
        return len(first) == len(survivors)

    return first if fleet.trace.wait(done, fleet.limit_s, start=start, alive=fleet.alive) else None


def _around(fleet: Fleet, old_generation: int, since_ns: int) -> list[Commit]:
    """The commits of the world that an event met, and everything after the event."""
    return [c for c in fleet.trace.commits() if c.generation == old_generation or c.t_ns > since_ns]


def _missed(fleet: Fleet, since_ns: int, limit_s: float | None = None) -> Sample:
    if fleet.alive():
        return Sample(recovery_s=None, steps_lost=None, note=f"limit {limit_s or fleet.limit_s:g} s")
    seconds = (time.monotonic_ns() - since_ns) / 1e9
    return Sample(recovery_s=None, steps_lost=None, note=f"every member had ended after {seconds:.1f} s")


def _strike(
    fleet: Fleet, rank: int, rng: random.Random, act: Callable[[int], None], *, spares_agent: bool = False
) -> Sample:
    """Do `act` to the member that holds `rank` and time the others; then bring the fleet to full
    strength.  With `spares_agent` an agent is expected to start a new worker by itself."""
    newest = fleet.steady(fleet.shape.world)
    current = {c.rank: c for c in fleet.trace.commits() if c.generation == newest.generation}
    victim = fleet.owner(current[rank % fleet.shape.world])
    if victim is None:
        raise FleetError(f"{fleet.system}: no member holds rank {rank}")
    survivors = [member for member in fleet.members if member != victim]
    start = len(fleet.trace)
    # Not always at the same point of a step.
    time.sleep(rng.uniform(0, 2 * fleet.shape.step_delay_ms / 1000))
    since_ns = time.monotonic_ns()
    act(victim)
    first = _first_steps(fleet, survivors, newest.generation, since_ns, start)
    sample = (
        _missed(fleet, since_ns)
        if first is None
        else Sample(
            recovery_s=(max(first.values()) - since_ns) / 1e9,
            steps_lost=rolled_back(_around(fleet, newest.generation, since_ns), fleet.owner),
        )
    )
    if not (spares_agent and fleet.has_agents):
        fleet.remove(victim)
        fleet.add()
    return sample


def kill_worker(fleet: Fleet, rank: int, rng: random.Random) -> Sample:
    """SIGKILL one training process."""
    return _strike(
        fleet, rank, rng, lambda member: send(fleet.worker(member), signal.SIGKILL), spares_agent=True
    )


def kill_agent(fleet: Fleet, rank: int, rng: random.Random) -> Sample:
    """SIGKILL an agent with its training process."""
    return _strike(fleet, rank, rng, lambda member: fleet.signal(member, signal.SIGKILL))


def drain(fleet: Fleet, rank: int, rng: random.Random) -> Sample:
    """SIGTERM to an agent: it is asked to go."""
    return _strike(fleet, rank, rng, lambda member: send(member, signal.SIGTERM))


def freeze(fleet: Fleet, rank: int, rng: random.Random) -> Sample:
    """SIGSTOP an agent and its training process: silence, with every connection open."""
    return _strike(fleet, rank, rng, lambda member: fleet.signal(member, signal.SIGSTOP))


def join(fleet: Fleet, _rank: int, _rng: random.Random) -> Sample:
    """A new member comes to a fleet that is one short: how long do the others pause?"""
    shape = fleet.shape
    if len(fleet.members) == shape.world:
        fleet.remove(next(reversed(fleet.members)))
    newest = fleet.steady(shape.world - 1)
    survivors = list(fleet.members)
    start = len(fleet.trace)
    since_ns = time.monotonic_ns()
    newcomer = fleet.add()
    # The newcomer imports torch and builds its model meanwhile: that is not the others' pause.
    entered: dict[int, int] = {}

    def done(fresh: Iterable[Commit]) -> bool:
        for commit in fresh:
            member = fleet.owner(commit)
            if member is not None and commit.world == shape.world:
                entered.setdefault(member, commit.t_ns)
        return len(entered) == shape.world

    if not fleet.trace.wait(done, fleet.start_limit_s, start=start, alive=fleet.alive):
        return _missed(fleet, since_ns, fleet.start_limit_s)
    commits = _around(fleet, newest.generation, since_ns)
    pauses = []
    for member in survivors:
        before = [
            c.t_ns
            for c in commits
            if fleet.owner(c) == member and c.generation == newest.generation and c.t_ns < entered[member]
        ]
        pauses.append((entered[member] - max(before)) / 1e9)
    return Sample(
        recovery_s=max(pauses),
        steps_lost=rolled_back(commits, fleet.owner),
        joined_s=(entered[newcomer] - since_ns) / 1e9,
    )


def coordinator_restart(fleet: Fleet, _rank: int, _rng: random.Random) -> Sample:
    """SIGKILL the coordinator and start it again: how much longer than before is the longest step?"""
    world = fleet.shape.world
    fleet.steady(world)
    calm_start = len(fleet.trace)
    fleet.trace.wait(lambda _: False, CALM_S)
    before = fleet.trace.commits(calm_start)
    start = len(fleet.trace)
    since_ns = time.monotonic_ns()
    fleet.kill_coordinator()
    fleet.start_coordinator()
    calm_ns = time.monotonic_ns() + int(CALM_S * 1e9)
    stepped: set[int] = set()

    def done(fresh: Iterable[Commit]) -> bool:
        stepped.update(m for c in fresh if c.t_ns > calm_ns and (m := fleet.owner(c)) is not None)
        return len(stepped) == world

    if not fleet.trace.wait(done, CALM_S + fleet.limit_s, start=start, alive=fleet.alive):
        return _missed(fleet, since_ns)
    after = fleet.trace.commits(start - world)
    restarted = len({c.pid for c in after} - {c.pid for c in before})
    pause_s = max(gaps_s(after, fleet.owner)) - max(gaps_s(before, fleet.owner))
    return Sample(
        recovery_s=max(0.0, pause_s),
        steps_lost=rolled_back(after, fleet.owner),
        note=f"{restarted} workers restarted" if restarted else "",
    )


MEASURES: dict[str, Callable[[Fleet, int, random.Random], Sample]] = {
    "kill_worker": kill_worker,
    "kill_agent": kill_agent,
    "drain": drain,
    "freeze": freeze,
    "join": join,
    "coordinator_restart": coordinator_restart,
}


def goal_of(system: str, case: str, shape: Shape) -> float | None:
    """What Muster has to reach; the others are there to be compared with."""
    if system != "muster":
        return None
    return {
        "kill_worker": 0.15,
        "kill_agent": 0.15,
        "drain": 0.15,
        "freeze": shape.silence_s + 0.2,
        "join": 0.2,
        "coordinator_restart": shape.step_delay_ms / 1000,
    }[case]


def rows_of(
    samples: Sequence[Sample], *, system: str, case: str, goal: float | None, note: str, unit: str = "s"
) -> list[Row]:
    """The rows of one system in one case."""
    missed = {s.note for s in samples if s.note}
    note = "; ".join(filter(None, [*sorted(missed), note]))
    rows = [
        Row.of(
            [s.recovery_s for s in samples],
            case=case,
            system=system,
            metric="recovery_s",
            unit=unit,
            goal=goal,
            note=note,
        ),
        Row.of(
            [float(s.steps_lost) for s in samples if s.steps_lost is not None],
            case=case,
            system=system,
            metric="steps_lost",
            unit="steps",
            goal=None if goal is None else 0.0,
        ),
    ]
    if joined := [s.joined_s for s in samples if s.joined_s is not None]:
        rows.append(Row.of(joined, case=case, system=system, metric="joined_s", unit="s"))
    return rows


class Lot:
    """A place for one fleet, which serves attempt after attempt as long as it comes back to full strength.
    A context manager."""

    def __init__(self, make: Callable[[], Fleet]) -> None:
        self.starts = 0
        self._make = make
        self._fleet: Fleet | None = None

    def fleet(self, missing: int = 0) -> Fleet:
        """The fleet, all members stepping; a new one is started with `missing` members less."""
        if self._fleet is None:
            self.starts += 1
            self._fleet = self._make()
            self._fleet.start(self._fleet.shape.world - missing)
        return self._fleet

    def clear(self) -> None:
        """Have the next attempt start a fresh fleet."""
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def measure(lot: Lot, case: str, repeats: int, rng: random.Random) -> tuple[list[Sample], str]:
    """`repeats` attempts of a case, and what is to be said about them.

    After an attempt that ran into the limit, or when the fleet does not come back, a fresh one is started.
    """
    samples: list[Sample] = []
    starts = lot.starts
    try:
        while len(samples) < repeats:
            if lot.starts - starts == 2 * repeats:
                return samples, "gave up: the fleet kept failing between attempts"
            fleet = lot.fleet(missing=int(case == "join"))
            try:
                rank = (fleet.shape.world - 1 - len(samples)) % fleet.shape.world
                sample = MEASURES[case](fleet, rank, rng)
            except FleetError as error:
                progress(f"    the fleet did not come back: {str(error).splitlines()[0]}")
                lot.clear()
                continue
            samples.append(sample)
            shown = "not within the limit" if sample.recovery_s is None else f"{sample.recovery_s:.3f} s"
            progress(f"    {len(samples)}/{repeats}: {shown}, {sample.steps_lost} steps lost {sample.note}")
            if sample.recovery_s is None:
                lot.clear()
                last = samples[-GIVE_UP_AFTER:]
                if len(last) == GIVE_UP_AFTER and all(s.recovery_s is None for s in last):
                    break
    except FleetError as error:
        progress(str(error))
        lot.clear()
        return samples, str(error).splitlines()[0]
    replaced = lot.starts - starts - 1
    return samples, f"{replaced} times a fresh fleet was needed" if replaced > 0 else ""


def measure_all(
    systems: Sequence[type[Fleet]], cases: Sequence[str], repeats: int, shape: Shape, rng: random.Random
) -> list[Row]:
    """Every case of every system, case by case, so that systems are compared close in time."""
    rows: list[Row] = []
    for case in cases:
        for system in systems:
            progress(f"{case}: {system.system}")
            samples: list[Sample] = []
            if not (said := system.unavailable()):
                with Lot(lambda made=system: made(shape)) as lot:  # type: ignore[misc]
                    samples, said = measure(lot, case, repeats, rng)
            rows += rows_of(
                samples,
                system=system.system,
                case=case,
                goal=goal_of(system.system, case, shape),
                note="; ".join(filter(None, [said, system.note])),
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--systems", type=chosen({s.system for s in SYSTEMS}), default=list(DEFAULT_SYSTEMS))
    parser.add_argument("--cases", type=chosen(set(CASES)), default=list(CASES))
    parser.add_argument("--step-delay-ms", type=int, default=20)
    parser.add_argument("--silence-s", type=float, default=0.3, help="Muster's lease, and its equals")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    shape = Shape(step_delay_ms=args.step_delay_ms, silence_s=args.silence_s, seed=args.seed)
    systems = [s for s in SYSTEMS if s.system in args.systems]
    cases = [c for c in CASES if c in args.cases]
    emit(measure_all(systems, cases, args.repeats, shape, random.Random(args.seed)), as_json=args.json)


def chosen(allowed: set[str]) -> Callable[[str], list[str]]:
    """An argparse type: names from `allowed`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"found {name!r}; allowed: {', '.join(sorted(allowed))}, separated by commas"
                )
        return names

    return parse


if __name__ == "__main__":
    main()
