"""What a step log must be, whoever was there: computed from (seed, step) alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from protos import agent_pb2
from trainer.config import parse_config
from trainer.data import TokenDataset


def check_exactly_once(steps: Sequence[agent_pb2.StepRecord], last: int) -> None:
    """Every step number from 1 to `last` stands in the log, once, in order."""
    assert [step.step for step in steps] == list(range(1, last + 1))


def check_slices(steps: Sequence[agent_pb2.StepRecord], config: dict[str, Any], dataset: Path) -> None:
    """Each step consumed exactly the slices that (seed, step) names: the sum of their digests agrees."""
    train = parse_config(config).train
    tokens = TokenDataset(dataset)
    for record in steps:
        expected = sum(tokens.digest_of(record.step, j, train) for j in range(train.slices_per_step)) % 2**64
        assert record.slices == train.slices_per_step, record
        assert record.data_digest == expected, (
            f"step {record.step} consumed other data than (seed, step) names"
        )


def check_same_losses(
    steps: Sequence[agent_pb2.StepRecord], others: Sequence[agent_pb2.StepRecord], relative: float = 1e-4
) -> None:
    """A run agrees step by step with the (longer) run it is compared with."""
    assert len(steps) <= len(others), "the reference run is too short"
    for one, other in zip(steps, others, strict=False):
        assert one.step == other.step
        assert one.loss == pytest.approx(other.loss, rel=relative), f"step {one.step}"
