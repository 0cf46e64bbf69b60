"""Simulate fleets: `python -m tests.sim --seed N --trace` replays one, `--seeds N` searches many.

Not in `__main__`: the processes that share the work could not find their function there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.sim.faults import Fault
from tests.sim.fleet import Result, Settings, faults_of, make_settings, simulate
from tests.sim.shrink import shrink

SHOWN_FAILURES = 5


def main(arguments: list[str] | None = None) -> int:
    """0: no violation; 1: one at least; 2: usage."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed only")
    parser.add_argument("--seeds", type=int, default=100, help="run so many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--agents", type=int, help="machines at the start (default: 2 to 8, by the seed)")
    parser.add_argument(
        "--minutes", type=float, help="how long faults happen (default: 0.5 to 2, by the seed)"
    )
    parser.add_argument("--only", help="only these of the seed's faults, by number: 3,7,12 ('' for none)")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--shrink", action="store_true", help="look for few faults that fail still")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options)
    return _many(options)


def _one(options: argparse.Namespace) -> int:
    settings = make_settings(options.seed, options.agents, options.minutes)
    faults = faults_of(options.seed, settings)
    if options.only is not None:
        chosen = {int(number) for number in options.only.split(",") if number}
        faults = [fault for fault in faults if fault.number in chosen]
    if options.shrink:
        _shrink(options.seed, settings, faults)
        return 0
    if options.trace:
        print(settings)
    began = time.process_time()
    result = simulate(options.seed, settings, faults, print if options.trace else None)
    if result.problem is not None and not options.trace:
        print("\n".join(result.trace[-60:]))
    print(
        f"seed {options.seed}: {result.problem or 'nothing is wrong'}; {len(faults)} faults, "
        f"{result.decisions} decisions, {result.generations} generations, {result.steps} steps, "
        f"{time.process_time() - began:.2f} s of one core, trace {result.digest}"
    )
    return int(result.problem is not None)


def _shrink(seed: int, settings: Settings, faults: list[Fault]) -> None:
    def problem(part: list[Fault]) -> str:
        found = simulate(seed, settings, part).problem
        return "" if found is None else "".join(c for c in found if not c.isdigit())[:40]

    sought = problem(faults)
    if not sought:
        print(f"seed {seed} does not fail")
        return
    least = shrink(faults, lambda part: problem(part) == sought)
    print(f"seed {seed} fails with {len(least)} of {len(faults)} faults:")
    for fault in least:
        print(f"  {fault}")
    again = f"python -m tests.sim --seed {seed} --only {','.join(str(f.number) for f in least)} --trace"
    print(f"replay with: {again}")


@dataclass(slots=True)
class Totals:
    seeds: int = 0
    decisions: int = 0
    steps: int = 0
    generations: int = 0
    recovery_ms: list[int] = field(default_factory=list)
    slowest: tuple[int, int] = (0, 0)  # ms, and the seed
    injected: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failed: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.decisions += result.decisions
        self.steps += result.steps
        self.generations += result.generations
        self.recovery_ms += result.recovery_ms
        self.slowest = max(self.slowest, (max(result.recovery_ms, default=0), result.seed))
        self.injected += result.injected
        self.refusals += result.refusals
        if result.problem is not None:
            self.failed.append(result)


def _run(task: tuple[int, int | None, float | None]) -> Result:
    seed, agents, minutes = task
    return simulate(seed, make_settings(seed, agents, minutes))


def _results(options: argparse.Namespace) -> Iterator[Result]:
    tasks = [
        (seed, options.agents, options.minutes)
        for seed in range(options.first, options.first + options.seeds)
    ]
    if options.processes <= 1:
        yield from map(_run, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        yield from pool.imap(_run, tasks, chunksize=8)


def _many(options: argparse.Namespace) -> int:
    totals, began = Totals(), time.monotonic()
    for result in _results(options):
        totals.add(result)
        if result.problem is not None:
            print(f"seed {result.seed}: {result.problem}", flush=True)
        elif totals.seeds % 500 == 0:
            print(f"{totals.seeds} seeds, {len(totals.failed)} failed", flush=True)
    seconds = time.monotonic() - began
    print(
        f"{totals.seeds} seeds in {seconds:.0f} s: {len(totals.failed)} failed; {totals.decisions} decisions, "
        f"{totals.generations} generations, {totals.steps} steps"
    )
    if totals.recovery_ms:
        slowest = sorted(totals.recovery_ms)
        print(
            f"from the last fault to training again: median {statistics.median(slowest) / 1000:.1f} s, "
            f"99 % within {slowest[len(slowest) * 99 // 100] / 1000:.1f} s, slowest {slowest[-1] / 1000:.1f} s (seed {totals.slowest[1]})"
        )
    print("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(totals.injected.items())))
    print("refusals: " + ", ".join(f"{kind} {count}" for kind, count in sorted(totals.refusals.items())))
    kinds = Counter(
        "".join(c for c in result.problem or "" if not c.isdigit())[:100] for result in totals.failed
    )
    for kind, count in kinds.most_common():
        print(f"{count} x {kind}")
    for result in totals.failed[:SHOWN_FAILURES]:
        print(f"look closer with: python -m tests.sim --seed {result.seed} --shrink")
    return int(bool(totals.failed))
