"""One seed's life: a fleet trains, is struck, is healed, must train again, and then all its numbers are
held against a run that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.churn import largest_error, rebuild_times_s, undisturbed_losses
from bench.fleets.fleet import REPOSITORY
from bench.trace import StepTrace
from protos import admin_pb2
from tests.chaos.blows import make_blows
from tests.chaos.storm import Fallen, Storm
from tests.e2e.fleet import CALL_S, Fleet, environment
from tests.e2e.oracle import check_exactly_once, check_slices

LOSS_TOLERANCE = 1e-4
"""Relative: worlds of different sizes add up in different orders."""
TRAIN_LIMIT_S = 90.0
"""From the last blow until all train together, beside some leases: the longest cool-down, a worker that
was started slowly again after several deaths, and two tries to form."""
ORPHAN_LIMIT_S = 10.0
STEPS = 1_000_000
"""Of the job, which is stopped when the storm is over."""


@dataclass(kw_only=True)
class Verdict:
    """What one seed showed.  `problem` is empty if every promise was kept."""

    seed: int
    problem: str = ""
    steps: int = 0
    generations: int = 0
    rolled_back: int = 0
    loss_error: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)
    rebuild_s: list[float] = field(default_factory=list)
    recovered_s: float = 0.0
    """From the last blow until all agents train together."""

    def __str__(self) -> str:
        slowest = f", slowest rebuild {max(self.rebuild_s):.2f} s" if self.rebuild_s else ""
        return (
            f"seed {self.seed}: {self.problem or 'every promise was kept'}; {sum(self.struck.values())} blows, "
            f"{self.steps} steps, {self.generations} generations, {self.rolled_back} steps rolled back, "
            f"loss error {self.loss_error:.1e}{slowest}, whole again after {self.recovered_s:.1f} s"
        )


def live(
    seed: int,
    seconds: float,
    *,
    root: Path,
    config: dict[str, Any],
    dataset: Path,
    agents: int = 4,
    gap_s: float = 3.0,
    lease_s: float = 2.0,
    tell: Callable[[str], None] = print,
) -> Verdict:
    """Run one seed for so many seconds of blows, in `root`, which must exist and be short."""
    verdict = Verdict(seed=seed)
    tell(f"seed {seed}: {seconds:g} s with {agents} agents")
    trace = StepTrace(root / "steps")
    fleet = Fleet(
        root=root,
        lease=f"{lease_s:g}s",
        # Flapping cools down, and is forgiven: otherwise a long run ends with nobody who may train.
        timing={"quarantine_base": "2s", "quarantine_max": "8s", "forgive": "10s"},
        variables={"MUSTER_STEP_TRACE": str(trace.path)},
    )
    try:
        with fleet:
            job = fleet.submit(config)
            token = fleet.admin().CreateToken(
                admin_pb2.CreateTokenRequest(ttl_s=86_400, uses=10_000), timeout=CALL_S
            )
            for number in range(agents):
                fleet.launch(chr(ord("a") + number), token.token)
            fleet.wait_generation(job, members=agents)
            storm = Storm(fleet, trace, token.token, tell)
            try:
                blows = make_blows(seed, until_s=seconds, gap_s=gap_s, lease_s=lease_s)
                storm.rage(blows, seconds)
                storm.heal()
                verdict.recovered_s = _train_again(fleet, job, agents, TRAIN_LIMIT_S + 15 * lease_s)
                _end(fleet, job)
                _judge(verdict, fleet, job, config, dataset, storm)
            finally:
                verdict.struck = storm.struck
                commits = trace.commits()
                verdict.rebuild_s = rebuild_times_s(commits)
                verdict.generations = len({commit.generation for commit in commits})
            _no_orphans(fleet)
    except grpc.RpcError as error:
        verdict.problem = f"{error.code().name}: {error.details()}"
    except (Fallen, AssertionError, ValueError) as error:
        verdict.problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        trace.close()
    tell(str(verdict))
    return verdict


def _train_again(fleet: Fleet, job: str, agents: int, limit_s: float) -> float:
    """Wait until all agents are in a formed generation that commits steps; how long that took."""
    since_s = time.monotonic()
    view = fleet.job(job)
    while time.monotonic() - since_s < limit_s:
        generation = view["generation"]
        whole = generation is not None and len(generation["members"]) == agents
        if whole and all(member["formed"] for member in generation["members"]):
            fleet.wait_step(job, view["committed_step"] + 10)
            if fleet.job(job)["generation"]["number"] == generation["number"]:
                return time.monotonic() - since_s
        fleet.wait_step(job, view["committed_step"] + 1)
        view = fleet.job(job)
    raise AssertionError(f"no {agents} agents train together {limit_s:g} s after the last blow: {view}")


def _end(fleet: Fleet, job: str) -> None:
    fleet.muster("job", "stop", job)
    view = fleet.wait_end(job)
    assert view["phase"] == "COMPLETED", f"the job was stopped and is {view['phase']}: {view}"
    assert view["newest_checkpoint_step"] == view["committed_step"], "stopping saves the last step"
    assert view["failures"] == 0, f"a worker failed by itself: {view}"


def _judge(
    verdict: Verdict, fleet: Fleet, job: str, config: dict[str, Any], dataset: Path, storm: Storm
) -> None:
    steps = fleet.steps(job)
    verdict.steps = len(steps)
    check_exactly_once(steps, fleet.job(job)["committed_step"])
    check_slices(steps, config, dataset)
    given_up = 0
    for event in fleet.admin().Watch(admin_pb2.WatchRequest(job=job, after_sequence=0), timeout=CALL_S):
        if event.kind == "StepsRolledBack":
            given_up += 1
            verdict.rolled_back += 1
    assert given_up <= storm.excused, (
        f"committed steps were given up {given_up} times, but only {storm.excused} blows left nobody who held them"
    )
    assert fleet.muster("checkpoint", "verify", job)["sound"] is True, "the last checkpoint is not sound"
    alone = undisturbed_losses(config, fleet.park, fleet.root, len(steps))
    verdict.loss_error = largest_error({step.step: step.loss for step in steps}, alone)
    assert verdict.loss_error <= LOSS_TOLERANCE, f"losses differ by {verdict.loss_error:.1e}"
    for log in sorted(fleet.root.glob("*.log")):
        text = log.read_text(errors="replace")
        assert "Traceback (most recent call last)" not in text, f"{log.name} has a traceback"


def _no_orphans(fleet: Fleet) -> None:
    """Agents and the coordinator are killed; then nothing that they started may live on."""
    processes = [agent.process for agent in fleet.agents.values()]
    processes += [fleet.coordinator] if fleet.coordinator is not None else []
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    deadline = time.monotonic() + ORPHAN_LIMIT_S
    while left := fleet.park.marked():
        assert time.monotonic() < deadline, f"processes outlive their agents: {[p.cmdline() for p in left]}"
        time.sleep(0.05)


def prepare(out: Path) -> Path:
    """A small dataset in `out`: byte tokens of our own sources."""
    sources = sorted(str(path) for path in (REPOSITORY / "coordinator" / "core").glob("*.py"))
    command = [sys.executable, "-m", "trainer.prepare", "--tokenizer", "byte", "--text", *sources]
    subprocess.run(
        [*command, "--out", str(out)], check=True, env=environment(), cwd=REPOSITORY, capture_output=True
    )
    return out


def job_of(dataset: Path, seed: int, agents: int) -> dict[str, Any]:
    """A tiny job for so many agents, from which two may be missing."""
    return {
        "name": "chaos",
        "data": {"path": str(dataset)},
        "model": {"preset": "tiny", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64},
        "train": {
            "steps": STEPS,
            "slices_per_step": 6,
            "slice_sequences": 1,
            "seq_len": 32,
            "lr": 1e-3,
            "warmup_steps": 5,
            "seed": seed,
            "dtype": "float32",
            "device": "cpu",
            "step_delay_ms": 60,
            # Ten minutes: nobody may owe its recovery to a collective's own timeout.
            "collective_timeout": "10m",
        },
        "checkpoint": {"every_steps": 50},
        "elastic": {
            "min_nodes": max(1, agents - 2),
            "max_nodes": agents,
            "last_call": "500ms",
            "min_generation": "500ms",
            "step_timeout": "10s",
        },
    }
