"""The coordinator's copies are gone: a fleet restores from itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Fleet
from tests.e2e.oracle import check_exactly_once, check_slices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_stranger_restores_data_and_checkpoint_from_another_agents_cache(
    fleet: Fleet, make_config: Callable[..., dict[str, Any]], dataset: Path
) -> None:
    config = make_config(steps=100_000, max_nodes=1)
    job = fleet.submit(config)
    first = fleet.start_agent("first")
    fleet.wait_event(
        lambda kind, record: kind == "ManifestCommitted" and record["checkpoint"]["step"] >= 20,
        "a checkpoint at step 20 or later",
        job=job,
    )
    for pid in first.workers():
        os.kill(pid, signal.SIGKILL)
    fleet.muster("agent", "quarantine", "first", "--reason", "its card is broken")
    for folder in (fleet.home / "blobs").iterdir():
        if folder.name != "incoming":
            shutil.rmtree(folder)
    left = fleet.wait_event(
        lambda kind, record: kind == "AgentUnassigned" and record["job_id"] == job, "the first one's end"
    )

    fleet.start_agent("second")
    resumed = fleet.wait_event(
        lambda kind, _: kind == "GenerationPlanned", "a plan", job=job, after=left.sequence
    )
    from_step = json.loads(resumed.json)["generation"]["from_checkpoint_step"]
    assert from_step >= 20
    fleet.wait_step(job, from_step + 30)
    fleet.muster("job", "stop", job)
    view = fleet.wait_end(job)
    assert view["phase"] == "COMPLETED", view
    steps = fleet.steps(job)
    check_exactly_once(steps, view["committed_step"])
    check_slices(steps, config, dataset)
    lines = [json.loads(line) for line in (fleet.root / "second.log").read_text().splitlines() if "{" in line]
    sources = {line["what"]: set(line["sources"]) for line in lines if line.get("event") == "job.fetched"}
    assert sources == {"dataset": {"agents"}, f"checkpoint {from_step}": {"agents"}}
    lender = fleet.muster("agent", "show", "first")
    assert lender["lends_cache"]
    assert lender["served_wrong_bytes_to"] == []
