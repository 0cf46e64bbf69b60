"""What a checkpoint costs training on one CUDA card: GPT-2 124M, bfloat16, 1.5 GB of state.

    python -m bench.gpu_checkpoint [--json] [--checkpoints 5] [--quiet 30] [--device cuda|cpu]

Prints the table (or, with --json, one JSON list) and writes gpu_checkpoint.json, with the card and the
versions beside the rows, to $OUT or the current directory.  `--device cpu` is a rehearsal without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from bench.gpu_recovery import describe
from bench.report import Row, emit, progress
from bench.saving import Timings, Training, measure
from trainer.checkpoint import CheckpointDirectory

GOAL_STALL_MS = 20.0
GOAL_SLOWER_PERCENT = 2.0


def rows_of(found: Timings, case: str) -> list[Row]:
    """The step that a snapshot is read in is longer by the host's waits and by what copy and digest take of
    the card; the goal allows 20 ms beyond the copy alone."""
    quiet, copied = statistics.median(found.quiet_s), statistics.median(found.copy_s)
    held = [take + wait for take, wait in zip(found.take_s, found.wait_s, strict=True)]
    longer = [lasted - quiet for lasted in found.first_s]
    rows = [
        Row.of(_ms(found.quiet_s), case=case, system="muster", metric="step_ms", unit="ms"),
        Row.of(
            _ms(found.copy_s), case=case, system="device to host", metric="copy_ms", unit="ms",
            note="the whole state to pinned memory, nothing else running",
        ),
        Row.of(
            _ms(held), case=case, system="muster", metric="host_held_ms", unit="ms",
            note="take, and the wait before the next update",
        ),
        Row.of(
            _ms(longer), case=case, system="muster", metric="stall_ms", unit="ms",
            goal=GOAL_STALL_MS + 1000 * copied,
            note="the step of the snapshot less the median step; goal: the copy and 20 ms",
        ),
    ]  # fmt: skip
    if found.beside_s:
        slower = [100 * (lasted / quiet - 1) for lasted in found.beside_s]
        rows.append(
            Row.of(
                slower, case=case, system="muster", metric="later_steps_slower", unit="%",
                goal=GOAL_SLOWER_PERCENT, note="steps while it is hashed and written",
            )
        )  # fmt: skip
    return rows


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * s for s in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--quiet", type=int, default=30, help="steps between two checkpoints")
    parser.add_argument("--sequences", type=int, default=32, help="of --tokens tokens, in a step")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--state-mb", type=float, help="size of the state (GPT-2 124M with Adam, 1500)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk that is meant")
    args = parser.parse_args()
    made_with = describe(args.device)
    if args.device == "cuda" and not made_with.get("cards"):
        parser.error("torch sees no CUDA card here; --device cpu rehearses without one")
    with tempfile.TemporaryDirectory(prefix="mbench-", dir=args.directory) as home:
        training = Training(
            CheckpointDirectory(home),
            state_mb=args.state_mb,
            tokens=args.tokens,
            sequences=args.sequences,
            device=torch.device(args.device),
        )
        progress(f"state of {training.state_bytes / 1e6:,.0f} MB")
        copies = training.copies(5)
        found = measure(training, rank=0, world_size=1, checkpoints=args.checkpoints, quiet=args.quiet)
        found.copy_s = copies
    case = f"snapshot, one {args.device} device, {found.state_bytes / 1e6:,.0f} MB"
    rows = rows_of(found, case)
    path = Path(os.environ.get("OUT", ".")) / "gpu_checkpoint.json"
    record = {"made_with": made_with, "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    progress(f"wrote {path}")
    emit(rows, as_json=args.json)


if __name__ == "__main__":
    main()
