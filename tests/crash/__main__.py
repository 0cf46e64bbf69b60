"""`python -m tests.crash --kills 200`: SIGKILL a coordinator under load again and again (`make crash`)."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.crash.crash import Crash


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mcrash-") as directory:
        crash = Crash(Path(directory), jobs=args.jobs, seed=args.seed)
        done = asyncio.run(crash.run(args.kills, lambda text: print(text, file=sys.stderr)))
    back = done.return_s
    print(
        f"{done.kills} kills in {time.monotonic() - began:.0f} s: {done.acknowledged} decisions acknowledged "
        f"({done.steps} steps, {done.checkpoints} checkpoints), nothing forgotten, no generation disturbed"
    )
    if back:
        tenth = len(back) // 10
        print(
            f"sessions came back {back[tenth]:.2f} to {back[-1 - tenth]:.2f} s after the coordinator served "
            f"(the middle 80 %; slowest {back[-1]:.2f} s; {len(back)} returns)"
        )


if __name__ == "__main__":
    main()
