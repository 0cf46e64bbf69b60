"""Recovery with NCCL: three ranks on one CUDA card and, where there are two cards, 2 → 1 → 2 on two.

    python -m bench.gpu_recovery [--json] [--repeats 5] [--device cuda|cpu]
                                 [--confine auto|off|require]

Prints the table (or, with --json, one JSON list) and writes gpu_recovery.json, with the card and the
versions beside the rows, to $OUT or the current directory.  `--device cpu` is a rehearsal without a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
from pathlib import Path

from agent.launch import landlock_version
from bench.fleets.fleet import Shape
from bench.fleets.muster import Muster
from bench.recovery import Lot, chosen, measure, rows_of
from bench.report import Row, emit, progress

CASES = ("kill_agent", "freeze", "join")


def goal_of(case: str, shape: Shape) -> float:
    """Seconds: one, and for a frozen peer its lease beside."""
    return 1.0 + (shape.silence_s if case == "freeze" else 0.0)


def describe(device: str) -> dict[str, object]:
    """What the figures were made with."""
    import torch

    found: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        count = torch.cuda.device_count()
        found["cards"] = [torch.cuda.get_device_name(index) for index in range(count)]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found["cuda"] = torch.version.cuda
    return found


def layouts(args: argparse.Namespace, cards: int) -> dict[str, Shape]:
    """Which fleets to measure on so many cards."""
    device: str = args.device
    one = Shape(
        world=3,
        min_world=2,
        device=device,
        silence_s=args.silence_s,
        step_delay_ms=args.step_delay_ms,
        confine=args.confine,
    )
    found = {"3 ranks on 1 card" if device == "cuda" else "3 ranks on the CPU": one}
    if cards >= 2:
        found["2 ranks on 2 cards"] = dataclasses.replace(one, world=2, min_world=1, cards=2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", type=chosen(set(CASES)), default=list(CASES))
    parser.add_argument("--silence-s", type=float, default=1.0, help="the lease")
    parser.add_argument("--step-delay-ms", type=int, default=20)
    parser.add_argument("--confine", choices=("auto", "off", "require"), default="auto", help="the workers")
    args = parser.parse_args()
    made_with = describe(args.device) | {"landlock": landlock_version(), "confine": args.confine}
    cards = made_with.get("cards", [])
    assert isinstance(cards, list)
    if args.device == "cuda" and not cards:
        parser.error("torch sees no CUDA card here; --device cpu rehearses without one")
    rng = random.Random(1)
    rows: list[Row] = []
    path = Path(os.environ.get("OUT", ".")) / "gpu_recovery.json"
    for layout, shape in layouts(args, len(cards)).items():
        # One fleet for all cases of a layout: with CUDA a start takes long, and time on cards is short.
        with Lot(lambda shape=shape: Muster(shape)) as lot:  # type: ignore[misc]
            for case in args.cases:
                progress(f"{layout}: {case}")
                samples, said = measure(lot, case, args.repeats, rng)
                rows += rows_of(
                    samples, system="muster", case=f"{case}, {layout}", goal=goal_of(case, shape), note=said
                )
                record = {"made_with": made_with, "rows": [row.as_json() for row in rows]}
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    progress(f"wrote {path}")
    emit(rows, as_json=args.json)


if __name__ == "__main__":
    main()
