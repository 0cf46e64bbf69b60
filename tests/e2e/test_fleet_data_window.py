"""Agents whose caches are smaller than the job's dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Fleet
from tests.e2e.oracle import check_exactly_once, check_slices
from trainer.data import TokenDataset
from trainer.prepare import FileText, prepare

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_dataset_larger_than_the_cache_is_trained_on_as_if_it_were_all_there(
    fleet: Fleet, make_config: Callable[..., dict[str, Any]], dataset: Path, tmp_path: Path
) -> None:
    tokens = TokenDataset(dataset)
    many = tmp_path / "many"
    shard_tokens = max(1_000, tokens.train_tokens // 20)
    sources = sorted((Path(__file__).parents[2] / "coordinator/core").glob("*.py"))
    made = prepare(FileText([str(path) for path in sources]), "byte", many, shard_tokens=shard_tokens)
    config = make_config(steps=40, min_nodes=2, max_nodes=2, eval_every=20, eval_slices=1)
    config["data"] = {"path": str(made)}
    config["train"]["slices_per_step"] = 2
    config["train"]["slice_sequences"] = 1
    job = fleet.submit(config)
    cache = 10 * shard_tokens * 2
    for name in ("a", "b"):
        fleet.start_agent(name, "--cache-bytes", str(cache))
    view = fleet.wait_end(job)
    assert view["phase"] == "COMPLETED", view
    steps = fleet.steps(job)
    check_exactly_once(steps, view["committed_step"])
    check_slices(steps, config, made)
    for name in ("a", "b"):
        assert "job.data_window" in (fleet.root / f"{name}.log").read_text()
