"""Fixtures of the end-to-end tests: a fleet's coordinator, and a small prepared dataset."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Fleet, environment


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte tokens of a few of our own sources."""
    out = tmp_path_factory.mktemp("data") / "dataset"
    sources = [str(path) for path in sorted((Path(__file__).parents[2] / "coordinator/core").glob("*.py"))]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "trainer.prepare",
            "--text",
            *sources,
            "--tokenizer",
            "byte",
            "--out",
            str(out),
        ],
        check=True,
        env=environment(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
    )
    return out


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    root = tmp_path / "f"
    root.mkdir()
    assert len(os.fsencode(root)) < 80, "Unix socket paths are bounded"
    with Fleet(root=root) as started:
        yield started


@pytest.fixture(scope="session")
def make_config(dataset: Path) -> Callable[..., dict[str, Any]]:
    """A tiny job: `make_config(steps=60, min_nodes=1, ...)`."""

    def make(
        *,
        steps: int,
        min_nodes: int = 1,
        max_nodes: int = 3,
        step_delay_ms: int = 20,
        checkpoint_every: int = 10,
        **train: Any,
    ) -> dict[str, Any]:
        return {
            "name": "e2e",
            "data": {"path": str(dataset)},
            "model": {"preset": "tiny", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64},
            "train": {
                "steps": steps,
                "slices_per_step": 5,
                "slice_sequences": 2,
                "seq_len": 32,
                "lr": 1e-3,
                "warmup_steps": 5,
                "seed": 7,
                "dtype": "float32",
                "device": "cpu",
                "step_delay_ms": step_delay_ms,
                **train,
            },
            "checkpoint": {"every_steps": checkpoint_every},
            "elastic": {
                "min_nodes": min_nodes,
                "max_nodes": max_nodes,
                "last_call": "1s",
                "min_generation": "500ms",
                "step_timeout": "20s",
            },
        }

    return make
