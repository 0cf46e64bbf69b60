"""The promises of the design, on real processes over real TLS: the oracle is the committed step log."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from protos import agent_pb2
from tests.e2e.fleet import Fleet, stopped
from tests.e2e.oracle import check_exactly_once, check_same_losses, check_slices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

Config = Callable[..., dict[str, Any]]
ENDLESS = 100_000
"""Steps of jobs that a test stops when it has seen what it came for: no test races a job's end."""
REFERENCE_STEPS = 2_500


def whole_log(fleet: Fleet, job: str, config: dict[str, Any], dataset: Path) -> list[agent_pb2.StepRecord]:
    """Wait for the job's end; check that it completed and that its log is exact."""
    view = fleet.wait_end(job)
    assert view["phase"] == "COMPLETED", view
    steps = fleet.steps(job)
    check_exactly_once(steps, view["committed_step"])
    check_slices(steps, config, dataset)
    return steps


def stopped_log(fleet: Fleet, job: str, config: dict[str, Any], dataset: Path) -> list[agent_pb2.StepRecord]:
    """Let the job go on for ten steps, stop it, and return its whole log."""
    fleet.wait_step(job, fleet.job(job)["committed_step"] + 10)
    fleet.muster("job", "stop", job)
    steps = whole_log(fleet, job, config, dataset)
    assert fleet.job(job)["newest_checkpoint_step"] == steps[-1].step, "stopping saves the last step"
    return steps


def start_three(fleet: Fleet, config: dict[str, Any]) -> str:
    job = fleet.submit(config)
    for name in ("a", "b", "c"):
        fleet.start_agent(name)
    fleet.wait_generation(job, members=3)
    return job


@pytest.fixture(scope="module")
def reference(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory, make_config: Config
) -> list[agent_pb2.StepRecord]:
    """The undisturbed run of one agent: what every other run's losses must equal."""
    config = make_config(steps=ENDLESS, step_delay_ms=0)
    with Fleet(root=tmp_path_factory.mktemp("ref")) as fleet:
        job = fleet.submit(config)
        fleet.start_agent("solo")
        fleet.wait_step(job, REFERENCE_STEPS)
        return stopped_log(fleet, job, config, dataset)


def test_killed_agent_is_replaced_and_every_step_is_committed_once(
    fleet: Fleet, make_config: Config, dataset: Path
) -> None:
    job_config = make_config(steps=500, step_delay_ms=80)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 20)
    first = fleet.job(job)["generation"]["number"]
    orphans = fleet.agents["b"].workers()
    survivors = fleet.agents["a"].workers() + fleet.agents["c"].workers()
    assert len(orphans) == 1
    assert len(survivors) == 2

    fleet.agents["b"].kill()
    second = fleet.wait_generation(job, members=2, after=first)
    assert (
        psutil.wait_procs([psutil.Process(pid) for pid in orphans if psutil.pid_exists(pid)], timeout=10)[1]
        == []
    )
    joiner = fleet.start_agent("d")
    fleet.wait_generation(job, members=3, after=second)
    assert len(joiner.workers()) == 1

    assert fleet.agents["a"].workers() + fleet.agents["c"].workers() == survivors, (
        "survivors keep their processes"
    )
    steps = whole_log(fleet, job, job_config, dataset)
    assert len(steps) == 500
    assert len({record.generation for record in steps}) >= 3


def test_killed_coordinator_returns_and_no_worker_restarts(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 20)
    before = fleet.job(job)
    workers = {name: agent.workers() for name, agent in fleet.agents.items()}
    acknowledged = fleet.steps(job)

    fleet.kill_coordinator()
    fleet.start_coordinator(ports=fleet.addresses)
    fleet.wait_step(job, acknowledged[-1].step + 20)

    assert {name: agent.workers() for name, agent in fleet.agents.items()} == workers
    assert fleet.job(job)["generation"]["number"] == before["generation"]["number"]
    steps = stopped_log(fleet, job, job_config, dataset)
    assert list(steps[: len(acknowledged)]) == acknowledged, "a committed record changed"
    check_same_losses(steps, reference)


def test_killed_worker_is_replaced_by_its_agent(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 20)
    first = fleet.job(job)["generation"]["number"]
    (worker,) = fleet.agents["a"].workers()

    os.kill(worker, signal.SIGKILL)
    second = fleet.wait_generation(job, members=2, after=first)
    fleet.wait_generation(job, members=3, after=second)

    assert fleet.job(job)["failures"] == 0, "a kill from outside is not the job's fault"
    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_frozen_agent_is_left_behind_and_returns_when_it_thaws(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS, step_delay_ms=60)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 10)
    first = fleet.job(job)["generation"]["number"]
    frozen = fleet.agents["c"]

    with stopped([frozen.process.pid, *frozen.workers()]):
        second = fleet.wait_generation(job, members=2, after=first)
    fleet.wait_generation(job, members=3, after=second)

    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_sigterm_drains_an_agent_without_losing_computed_work(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 20)
    first = fleet.job(job)["generation"]["number"]
    leaving = fleet.agents["a"]  # rank 0: hosts the store, most senior

    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(timeout=60) == 0
    fleet.wait_generation(job, members=2, after=first)

    view = fleet.job(job)
    assert view["generation"]["cut"] == "after_step"
    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_when_everyone_dies_the_job_resumes_from_the_newest_checkpoint(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    fleet.wait_event(
        lambda kind, record: kind == "ManifestCommitted" and record["checkpoint"]["step"] >= 20,
        "a checkpoint at step 20 or later",
        job=job,
    )
    for name in ("a", "b", "c"):
        fleet.agents[name].kill()
    for name in ("d", "e"):
        fleet.start_agent(name)

    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_paused_job_resumes_where_it_was(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    fleet.wait_step(job, 20)
    fleet.muster("job", "pause", job)
    fleet.wait_event(lambda kind, r: kind == "JobPhaseChanged" and r["phase"] == "PAUSED", "PAUSED", job=job)
    paused_at = fleet.job(job)["committed_step"]
    assert paused_at == len(fleet.steps(job))
    fleet.muster("job", "resume", job)

    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_rolled_back_job_makes_its_steps_anew_from_the_checkpoint(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    """While it runs, and while it is paused: whatever the members hold, and without restarting a worker."""
    job_config = make_config(steps=ENDLESS)
    job = start_three(fleet, job_config)
    saved = fleet.wait_event(
        lambda kind, record: kind == "ManifestCommitted" and record["checkpoint"]["step"] >= 20,
        "a checkpoint at step 20 or later",
        job=job,
    )
    target = json.loads(saved.json)["checkpoint"]["step"]
    fleet.muster("checkpoint", "pin", f"{job}@{target}")
    fleet.wait_step(job, target + 15)
    workers = {name: agent.workers() for name, agent in fleet.agents.items()}
    first = fleet.job(job)["generation"]["number"]

    rolled_back = fleet.muster("job", "rollback", job, "--to", f"{job}@{target}")["rollback"]
    assert (rolled_back["to_step"], rolled_back["by"]) == (target, "admin")
    assert rolled_back["from_step"] >= target + 15
    second = fleet.wait_generation(job, members=3, after=first)
    generation = fleet.job(job)["generation"]
    assert (generation["from_checkpoint_step"], generation["reason"]) == (target, "rolled_back_by_operator")
    fleet.wait_step(job, target + 15)
    assert {name: agent.workers() for name, agent in fleet.agents.items()} == workers
    anew = [record for record in fleet.steps(job) if record.step > target]
    assert all(record.generation >= second for record in anew), "made after the rollback"

    fleet.muster("job", "pause", job)
    fleet.wait_event(lambda kind, r: kind == "JobPhaseChanged" and r["phase"] == "PAUSED", "PAUSED", job=job)
    newer = fleet.job(job)["newest_checkpoint_step"]
    assert newer > target, "pausing saves the last step"
    fleet.muster("job", "rollback", job, "--to", str(target))
    kept = {view["step"]: view["kept"] for view in fleet.muster("checkpoint", "list", job)}
    assert "rolled_back" in kept[newer]
    assert fleet.job(job)["committed_step"] == len(fleet.steps(job)) == target
    fleet.muster("job", "resume", job)
    fleet.wait_generation(job, members=3, after=second)

    check_same_losses(stopped_log(fleet, job, job_config, dataset), reference)


def test_losses_do_not_depend_on_the_world_size(
    fleet: Fleet, make_config: Config, dataset: Path, reference: list[agent_pb2.StepRecord]
) -> None:
    """The reference has a world of one; here are two and three, in one run of each."""
    for world in (2, 3):
        config = make_config(steps=ENDLESS, min_nodes=world, max_nodes=world, step_delay_ms=0)
        while len(fleet.agents) < world:
            fleet.start_agent(f"w{len(fleet.agents)}")
        job = fleet.submit(config)
        fleet.wait_step(job, 100)
        steps = stopped_log(fleet, job, config, dataset)
        check_same_losses(steps, reference)
