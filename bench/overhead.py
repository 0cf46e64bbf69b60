"""What fault tolerance costs a step when nothing happens.

    python -m bench.overhead [--json] [--rounds 10] [--steps 50]

Muster (coordinator, agents, vote, digests, control socket, progress) and a plain DDP loop run the same
model on the same data at the same padded step, in turns on one machine: while one is measured the other
is paused.  Each round gives one ratio of the two median step times.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys

from bench.fleets.fleet import REPOSITORY, Fleet, Shape, free_port
from bench.fleets.muster import Muster
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

    def hold(self, number: signal.Signals) -> None:
        """SIGSTOP or SIGCONT to every member and worker."""
        for member in self.members:
            self.signal(member, number)


def step_s(fleet: Fleet, steps: int) -> float:
    """Median time of a step over the next `steps` steps of the whole fleet."""
    fleet.steady(fleet.shape.world, steps=5)
    start = len(fleet.trace)
    fleet.steady(fleet.shape.world, steps=steps)
    return statistics.median(gaps_s(fleet.trace.commits(start), fleet.owner))


def measure(shape: Shape, rounds: int, steps: int) -> list[Row]:
    """Alternate the two and compare."""
    times: dict[str, list[float | None]] = {"muster": [], "plain-ddp": []}
    with contextlib.ExitStack() as stack:
        muster = stack.enter_context(Muster(shape))
        muster.start(shape.world)
        muster.command("pause")
        plain = stack.enter_context(Plain(shape, str(muster.home / "job.yaml")))
        plain.start(shape.world)
        for number in range(rounds):
            times["plain-ddp"].append(step_s(plain, steps))
            plain.hold(signal.SIGSTOP)
            muster.command("resume")
            times["muster"].append(step_s(muster, steps))
            muster.command("pause")
            plain.hold(signal.SIGCONT)
            on, off = times["muster"][-1], times["plain-ddp"][-1]
            assert on is not None
            assert off is not None
            progress(f"  {number + 1}/{rounds}: {on * 1000:.2f} ms on, {off * 1000:.2f} ms off")
    ratios: list[float | None] = [
        100 * (on / off - 1)
        for on, off in zip(times["muster"], times["plain-ddp"], strict=True)
        if on is not None and off is not None
    ]
    case = f"step of {shape.step_delay_ms} ms"
    rows = [
        Row.of(
            [None if t is None else 1000 * t for t in of],
            case=case,
            system=system,
            metric="step_ms",
            unit="ms",
        )
        for system, of in times.items()
    ]
    goal = Row.of(
        ratios, case=case, system="muster", metric="overhead", unit="%", goal=GOAL_PERCENT,
        note="of rounds, each Muster's median step over plain DDP's",
    )  # fmt: skip
    return [*rows, goal]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--step-delay-ms", type=int, default=100)
    parser.add_argument("--world", type=int, default=2)
    args = parser.parse_args()
    shape = Shape(world=args.world, min_world=args.world, step_delay_ms=args.step_delay_ms, silence_s=10.0)
    emit(measure(shape, args.rounds, args.steps), as_json=args.json)


if __name__ == "__main__":
    main()
