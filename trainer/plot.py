"""Draw a loss curve.

python -m trainer.plot --steps FILE.jsonl|- --out PNG

Input is JSON lines; a line with `step` and `loss` is a training step, and an evaluation if it has
`"type": "evaluation"`.  Other lines are passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any


def plot_losses(
    steps: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]], out_png: Path | str
) -> Path:
    """Write a PNG of loss over step; each mapping has `step` and `loss` (nats).

    Where a step has a `generation`, the steps at which a new one began are marked.  Raise ValueError if
    there is no step with a finite loss.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    training = _finite(steps)
    validation = _finite(evaluations)
    if not training:
        raise ValueError("no step with a finite loss to draw")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [s["step"] for s in training], [s["loss"] for s in training], lw=1, color="#1f6f8b", label="training"
    )
    if validation:
        points = [v["step"] for v in validation], [v["loss"] for v in validation]
        axes.plot(*points, "o-", ms=4, lw=1, color="#c8553d", label="validation")
    changes = [
        later["step"]
        for earlier, later in pairwise(training)
        if earlier.get("generation") != later.get("generation")
    ]
    for index, step in enumerate(changes):
        axes.axvline(step, color="0.6", lw=0.8, ls=":", label="new generation" if index == 0 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".png")
    os.close(descriptor)
    try:
        figure.savefig(temporary, dpi=120)
        Path(temporary).chmod(0o644)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return out


def _finite(points: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept = [p for p in points if p.get("loss") is not None and math.isfinite(p["loss"])]
    return sorted(kept, key=lambda p: int(p["step"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.plot", description="Draw a loss curve.")
    parser.add_argument(
        "--steps", required=True, metavar="FILE.jsonl", help="JSON lines; - is standard input"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    try:
        text = sys.stdin.read() if options.steps == "-" else Path(options.steps).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        points = [line for line in lines if isinstance(line, dict) and "step" in line and "loss" in line]
        training = [p for p in points if p.get("type", "step") == "step"]
        evaluations = [p for p in points if p.get("type") == "evaluation"]
        plot_losses(training, evaluations, options.out)
    except (OSError, ValueError) as error:
        print(f"error: --steps {options.steps}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
