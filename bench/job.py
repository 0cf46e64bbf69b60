"""The one training job that every system runs: a model so small that computing hardly shows beside
the padded step, on tokens that need no download."""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
    "preset": "tiny",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "vocab_size": 257,
}
SLICES_PER_STEP = 6
SLICE_SEQUENCES = 1


def job_file(
    *,
    name: str,
    steps: int,
    step_delay_ms: int,
    seed: int,
    device: str,
    elastic: dict[str, Any],
    data: dict[str, Any],
    every_steps: int = 1000,
) -> dict[str, Any]:
    """A Muster job file of the benchmark's job."""
    return {
        "name": name,
        "data": data,
        "model": MODEL,
        "train": {
            "steps": steps,
            "slices_per_step": SLICES_PER_STEP,
            "slice_sequences": SLICE_SEQUENCES,
            "seq_len": MODEL["block_size"],
            "step_delay_ms": step_delay_ms,
            "seed": seed,
            "device": device,
            "dtype": "float32",
            # Ten minutes: no survivor may owe its recovery to a collective's own timeout.
            "collective_timeout": "10m",
        },
        "checkpoint": {"every_steps": every_steps},
        "elastic": elastic,
    }
