"""What fault tolerance costs a step when nothing happens.

    python -m bench.overhead [--json] [--rounds 40] [--steps 8]

Muster (coordinator, agents, vote, digests, control socket, progress) and a plain DDP loop run the same
model on the same data at the same padded step, in turns on one machine: while the workers of one are
measured those of the other are frozen.  The turns are short, about a second each, because a machine's speed
changes by more than what is to be measured within minutes; each worker has a core of its own.  Each round gives one ratio of median step times.

In a third turn the coordinator and the agents are frozen, too, and the workers go on alone, which they do
for as long as the lease allows.  That is the cost where two workers do not share two cores with a coordinator
and two agents.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable

from bench.fleets.fleet import REPOSITORY, Fleet, Shape, free_port
from bench.fleets.muster import Muster
from bench.processes import send, threads
from bench.recovery import gaps_s
from bench.report import Row, emit, progress

GOAL_PERCENT = 0.5


class Plain(Fleet):
    """The same training by one torchrun, without any fault tolerance."""

    system = "plain-ddp"

    def __init__(self, shape: Shape, job: str) -> None:
        super().__init__(shape)
        self._job = job

    def start_coordinator(self) -> None:
        """There is none."""

    def kill_coordinator(self) -> None:
        """There is none."""

    def launch(self, index: int) -> subprocess.Popen[bytes]:
        argv = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.shape.world}"),
            *(f"--node-rank={index}", "--nproc-per-node=1", "--master-addr=127.0.0.1"),
            f"--master-port={self._port}",
            *("-m", "bench.baselines.plain_train", "--job", self._job),
        ]
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "MUSTER_STEP_TRACE": str(self.trace.path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return self.park.start(f"member-{index}", argv, environment)

    def begin(self) -> None:
        """Nothing to submit."""

    def start(self, count: int) -> None:
        self._port = free_port()
        super().start(count)


def workers(fleet: Fleet) -> list[int]:
    """Pids of the processes that train."""
    return [fleet.worker(member) for member in fleet.members]


def settle(fleet: Fleet) -> list[int]:
    """Give each worker a core of its own, and return their pids.

    Two workers that wait for each other are drawn to one core by the kernel, one system's more than the
    other's; on machines of their own they would not be."""
    cores = sorted(os.sched_getaffinity(0))
    pids = workers(fleet)
    for index, pid in enumerate(pids):
        for thread in threads(pid):
            os.sched_setaffinity(thread, {cores[index % len(cores)]})
    return pids


def hold(pids: Iterable[int], number: signal.Signals) -> None:
    """SIGSTOP or SIGCONT."""
    for pid in pids:
        send(pid, number)


def step_s(fleet: Fleet, steps: int) -> float:
    """Median time of a step over the next `steps` steps of the whole fleet."""
    fleet.steady(fleet.shape.world, steps=2)
    start = len(fleet.trace)
    fleet.steady(fleet.shape.world, steps=steps)
    return statistics.median(gaps_s(fleet.trace.commits(start), fleet.owner))


def measure(shape: Shape, rounds: int, steps: int) -> list[Row]:
    """Alternate the two and compare."""
    times: dict[str, list[float]] = {"plain-ddp": [], "muster": [], "muster-workers": []}
    with contextlib.ExitStack() as stack:
        muster = stack.enter_context(Muster(shape))
        muster.start(shape.world)
        mine = settle(muster)
        hold(mine, signal.SIGSTOP)
        plain = stack.enter_context(Plain(shape, str(muster.home / "job.yaml")))
        plain.start(shape.world)
        others = settle(plain)
        for number in range(rounds):
            times["plain-ddp"].append(step_s(plain, steps))
            hold(others, signal.SIGSTOP)
            hold(mine, signal.SIGCONT)
            times["muster"].append(step_s(muster, steps))
            rest = (muster.coordinator_pid, *muster.members)
            hold(rest, signal.SIGSTOP)
            times["muster-workers"].append(step_s(muster, steps))
            hold(rest, signal.SIGCONT)
            hold(mine, signal.SIGSTOP)
            hold(others, signal.SIGCONT)
            if (number + 1) % 10 == 0:
                found = ", ".join(f"{name} {1000 * found[-1]:.2f}" for name, found in times.items())
                progress(f"  {number + 1}/{rounds}: {found} ms")
    case = f"step of {shape.step_delay_ms} ms"
    rows = [
        Row.of([1000 * t for t in found], case=case, system=system, metric="step_ms", unit="ms")
        for system, found in times.items()
    ]
    notes = {
        "muster": "of rounds, each Muster's median step over plain DDP's",
        "muster-workers": "the same, coordinator and agents frozen meanwhile",
    }
    for system, note in notes.items():
        ratios = [100 * (on / off - 1) for on, off in zip(times[system], times["plain-ddp"], strict=True)]
        rows.append(
            Row.of(
                ratios, case=case, system=system, metric="overhead", unit="%", goal=GOAL_PERCENT, note=note
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-delay-ms", type=int, default=100)
    parser.add_argument("--world", type=int, default=2)
    args = parser.parse_args()
    shape = Shape(world=args.world, min_world=args.world, step_delay_ms=args.step_delay_ms, silence_s=10.0)
    emit(measure(shape, args.rounds, args.steps), as_json=args.json)


if __name__ == "__main__":
    main()
