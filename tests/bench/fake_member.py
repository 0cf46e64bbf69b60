"""One pretended worker: touches its file every 10 ms, and commits a step with everyone whose file is fresh.

A new world goes on `repeats` steps before the last one; -1 means: leave as soon as somebody is gone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trainer.trace import StepTrace


def main() -> None:
    directory, me = Path(sys.argv[1]), sys.argv[2]
    silence_s, repeats = float(sys.argv[3]), int(sys.argv[4])
    trace = StepTrace()
    known: list[str] = []
    step = 0
    while True:
        (directory / me).touch()
        now = time.time()
        present = sorted(p.name for p in directory.iterdir() if now - p.stat().st_mtime < silence_s)
        if present != known:
            if repeats < 0 and set(known) - set(present):
                return
            known = present
            step = max(0, step - max(0, repeats))
        step += 1
        trace.committed(
            step=step,
            generation=sum(1 << int(name) for name in known),
            world=len(known),
            rank=known.index(me),
        )
        time.sleep(0.01)


main()
