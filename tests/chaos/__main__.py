"""Strike real fleets at random: `python -m tests.chaos --minutes 60 --seed 1`.

Each seed is one fleet's life.  Seeds are counted up from --seed until the time is over.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.run import Verdict, job_of, live, prepare


def main() -> int:
    """0: every promise was kept; 1: one was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long altogether")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--each", type=float, default=120.0, help="seconds of blows per seed")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--gap", type=float, default=3.0, help="mean seconds between blows")
    parser.add_argument("--lease", type=float, default=2.0, help="seconds; more where others use the machine")
    options = parser.parse_args()
    end_s = time.monotonic() + 60 * options.minutes
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as home:
        dataset = Path(home) / "dataset"
        prepare(dataset)
        seed = options.seed
        while not verdicts or time.monotonic() < end_s:
            root = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
            verdict = live(
                seed,
                options.each,
                root=root,
                config=job_of(dataset, seed, options.agents),
                dataset=dataset,
                agents=options.agents,
                gap_s=options.gap,
                lease_s=options.lease,
                tell=lambda line: print(line, flush=True),
            )
            verdicts.append(verdict)
            if verdict.problem:
                print(f"  what it left behind: {root}")
            else:
                shutil.rmtree(root)
            seed += 1
    return summarise(verdicts)


def summarise(verdicts: list[Verdict]) -> int:
    struck: Counter[str] = sum((verdict.struck for verdict in verdicts), Counter())
    rebuilds = sorted(s for verdict in verdicts for s in verdict.rebuild_s)
    print(
        f"\nseeds {verdicts[0].seed} to {verdicts[-1].seed}; {sum(struck.values())} blows: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(struck.items()))
    )
    print(
        f"{sum(v.steps for v in verdicts)} steps, {sum(v.generations for v in verdicts)} generations, "
        f"{sum(v.rolled_back for v in verdicts)} returns to a checkpoint, "
        f"largest relative error of a loss {max(v.loss_error for v in verdicts):.1e}"
    )
    if rebuilds:
        print(
            f"from the last step of a world to the first of the next, frozen peers and leases included: "
            f"median {statistics.median(rebuilds):.2f} s, 99 % within {rebuilds[len(rebuilds) * 99 // 100]:.2f} s, "
            f"slowest {rebuilds[-1]:.2f} s"
        )
    failed = [verdict for verdict in verdicts if verdict.problem]
    for verdict in failed:
        print(f"seed {verdict.seed}: {verdict.problem}")
    print("verdict: " + ("every promise was kept" if not failed else f"{len(failed)} seeds failed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
