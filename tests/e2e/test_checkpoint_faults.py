"""Checkpoints while everyone is killed and disks are full: what is committed restores bit for bit, and nothing
is left over.  Moments are told by what can be seen from outside: records on the coordinator's watch stream."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protos import admin_pb2
from tests.e2e.fleet import LIMIT_S, Fleet, stopped, wait_until
from trainer.checkpoint import CheckpointDirectory, parse_manifest
from trainer.state import digest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

Config = Callable[..., dict[str, Any]]
ASKED, FIRST, MIDDLE, LAST, COMMITTED = "asked", "first shard", "middle shard", "last shard", "committed"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    root = tmp_path / "f"
    root.mkdir()
    blobs = {"reserve": 0, "retired_grace": "6s", "orphan_grace": "6s"}
    # Whom a test kills often is not to cool down.
    timing = {"quarantine_base": "1ms"}
    with Fleet(root=root, blobs=blobs, timing=timing) as started:
        yield started


def ask(fleet: Fleet, job: str) -> int:
    """Ask for a checkpoint; the number of the record that says so."""
    fleet.admin().CommandJob(
        admin_pb2.JobCommandRequest(job=job, kind=admin_pb2.JOB_COMMAND_KIND_CHECKPOINT), timeout=20
    )
    events = list(fleet.admin().Watch(admin_pb2.WatchRequest(job=job), timeout=20))
    return max(event.sequence for event in events if event.kind == "CheckpointWanted")


def wait_stage(fleet: Fleet, job: str, stage: str) -> None:
    """Ask for a checkpoint and return at this moment of it."""
    asked = ask(fleet, job)
    if stage == ASKED:
        return
    indices: set[int] = set()

    def reached(kind: str, record: dict[str, Any]) -> bool:
        if kind == "ShardRecorded":
            indices.add(record["shard"]["index"])
            wanted = {FIRST: 1, MIDDLE: record["count"] // 2, LAST: record["count"]}
            return len(indices) >= wanted.get(stage, record["count"] + 1)
        return kind == "ManifestCommitted"

    fleet.wait_event(reached, stage, job=job, after=asked)


def committed(fleet: Fleet, job: str) -> dict[int, Any]:
    """The manifest of every checkpoint that the coordinator lists as whole, by step."""
    views = fleet.admin().ListCheckpoints(admin_pb2.JobRef(job=job), timeout=20).json
    found = {}
    for text in views:
        step = json.loads(text)["step"]
        reply = fleet.admin().GetCheckpoint(admin_pb2.CheckpointRef(job=job, step=step), timeout=20)
        found[step] = parse_manifest(reply.manifest_json)
    return found


def check_restorable(fleet: Fleet, job: str, scratch: Path) -> dict[int, Any]:
    """Every listed checkpoint, out of the coordinator's own directory, is the state that its ranks agreed on."""
    manifests = committed(fleet, job)
    (scratch / "blobs").mkdir(parents=True, exist_ok=True)
    for manifest in manifests.values():
        for shard in manifest.shards:
            link = scratch / "blobs" / shard.digest
            if not link.exists():
                link.symlink_to(fleet.home / "blobs" / shard.digest[:2] / shard.digest)
        tensors = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in manifest.specs()
        }
        CheckpointDirectory(scratch).load(manifest, tensors)
        assert digest(tensors) == manifest.state_digest, f"step {manifest.step}"
    return manifests


def check_restored(fleet: Fleet, job: str, *, after: int, scratch: Path) -> int:
    """Members that have nothing but their disks form a generation after this one, out of a listed checkpoint and bit
    for bit; the checkpoint's step."""
    formed = fleet.wait_event(
        lambda kind, record: kind == "MemberFormed" and record["generation"] > after, "one to form", job=job
    )
    found = json.loads(formed.json)
    step: int = found["step"]
    assert found["state_digest"] == check_restorable(fleet, job, scratch)[step].state_digest
    return step


def check_nothing_left_over(fleet: Fleet, job: str, config: dict[str, Any]) -> None:
    """Every blob and manifest of no listed checkpoint goes, and what stays is what its name says."""
    root = fleet.home / "blobs"
    data = {blob.name for blob in (Path(config["data"]["path"]) / "blobs").iterdir()}

    def left_over() -> set[str]:
        found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        manifests = committed(fleet, job)
        blobs = data | {shard.digest for one in manifests.values() for shard in one.shards}
        return (
            found
            - {f"{blob[:2]}/{blob}" for blob in blobs}
            - {f"manifests/{job}/{step}.json" for step in manifests}
        )

    assert fleet.coordinator is not None
    wait_until(lambda: not left_over(), "blobs that nothing refers to to go", process=fleet.coordinator)
    for path in root.glob("??/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def with_a_checkpoint(fleet: Fleet, make_config: Config) -> tuple[str, dict[str, Any]]:
    """A job of agents a and b that has one, of several shards."""
    config = make_config(steps=100_000, step_delay_ms=50, checkpoint_every=50_000)
    config["checkpoint"]["shard_bytes"] = "64KiB"
    config["elastic"] |= {"last_call": "100ms", "min_generation": "0s"}
    job = fleet.submit(config)
    for name in ("a", "b"):
        fleet.start_agent(name)
    fleet.wait_generation(job, members=2)
    wait_stage(fleet, job, COMMITTED)
    return job, config


def test_a_coordinator_killed_at_any_moment_keeps_the_old_checkpoint_or_has_the_new_one(
    fleet: Fleet, make_config: Config, tmp_path: Path
) -> None:
    job, config = with_a_checkpoint(fleet, make_config)
    newest = max(check_restorable(fleet, job, tmp_path / "restored"))
    for stage in (ASKED, FIRST, MIDDLE, LAST, COMMITTED):
        wait_stage(fleet, job, stage)
        fleet.kill_coordinator()
        fleet.start_coordinator(ports=fleet.addresses)
        fleet.wait_step(job, fleet.job(job)["committed_step"] + 5)
        steps = check_restorable(fleet, job, tmp_path / "restored")
        assert max(steps) >= newest, f"killed at {stage}: a committed checkpoint was forgotten"
        newest = max(steps)

    # The road of a restore itself: all members die, and others come.
    wait_stage(fleet, job, COMMITTED)
    newest = fleet.job(job)["newest_checkpoint_step"]
    number = fleet.job(job)["generation"]["number"]
    for agent in fleet.agents.values():
        agent.kill()
    fleet.start_agent("c")
    assert check_restored(fleet, job, after=number, scratch=tmp_path / "restored") >= newest

    fleet.muster("job", "cancel", job)
    fleet.wait_end(job)
    check_nothing_left_over(fleet, job, config)


def test_workers_and_agents_killed_at_any_moment_come_back_to_the_old_checkpoint_or_the_new_one(
    fleet: Fleet, make_config: Config, tmp_path: Path
) -> None:
    job, config = with_a_checkpoint(fleet, make_config)
    scratch = tmp_path / "restored"
    for stage in (ASKED, FIRST, LAST, COMMITTED):
        newest = max(committed(fleet, job))
        b = fleet.agents["b"]
        # An agent that stands still sends no shard: the first is one of the other's, and is not the last.
        with stopped([b.process.pid] if stage == FIRST else []):
            wait_stage(fleet, job, stage)
            view = fleet.job(job)
            number = view["generation"]["number"]  # a new one, if it stood still for longer than its lease
            at_least = view["newest_checkpoint_step"] if stage == COMMITTED else newest
            # One loses its worker, the other is killed with its own: the state is in nobody's memory any more.
            for pid in fleet.agents["a"].workers() + b.workers():
                os.kill(pid, signal.SIGKILL)
            b.kill()
        fleet.start_agent("b")
        restored = check_restored(fleet, job, after=number, scratch=scratch)
        assert restored >= at_least, f"killed at {stage}: a committed checkpoint was forgotten"
        fleet.wait_generation(job, members=2, after=number)
        fleet.wait_step(job, restored + 2)

    wait_stage(fleet, job, COMMITTED)
    check_nothing_left_over(fleet, job, config)


# --------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[None]:
    """16 MiB of their own at `at`; skips the test where that is not allowed."""
    at.mkdir(mode=0o700, parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(at)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room; remove the file to give it back."""
    filler = disk / ".filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize("where", ["agent", "coordinator"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    fleet: Fleet, make_config: Config, tmp_path: Path, where: str
) -> None:
    config = make_config(steps=100_000, step_delay_ms=50, checkpoint_every=50_000)
    config["checkpoint"]["shard_bytes"] = "64KiB"
    disk = fleet.home / "blobs" if where == "coordinator" else fleet.root / "a" / "blobs"
    if where == "coordinator":
        fleet.kill_coordinator()
    with small_disk(disk):
        if where == "coordinator":
            fleet.start_coordinator(ports=fleet.addresses)
        job = fleet.submit(config)
        fleet.start_agent("a")
        fleet.wait_generation(job, members=1)
        wait_stage(fleet, job, COMMITTED)
        (old,) = committed(fleet, job)

        filler = fill(disk)
        asked = ask(fleet, job)
        if where == "agent":
            # The worker says it, and the operator reads it.
            logs = fleet.admin().Logs(admin_pb2.LogsRequest(job=job, follow=True), timeout=LIMIT_S)
            said = next(line.line for line in logs if "training goes on without it" in line.line)
            logs.cancel()
            assert "No space left on device" in said
        else:
            log = fleet.root / "a.log"
            wait_until(
                lambda: "bytes free and keeps" in log.read_text(errors="replace"),
                "the agent to hear that there is no room",
                process=fleet.agents["a"].process,
            )
            assert "bytes free and keeps" in (fleet.root / "coordinator.log").read_text()
        step = fleet.job(job)["committed_step"]
        fleet.wait_step(job, step + 10)
        assert list(committed(fleet, job)) == [old]
        check_restorable(fleet, job, tmp_path / "restored")

        filler.unlink()
        if where == "agent":  # what was not written is gone; the coordinator's is still being sent
            asked = ask(fleet, job)
        fleet.wait_event(lambda kind, _: kind == "ManifestCommitted", "room", job=job, after=asked)
        assert max(check_restorable(fleet, job, tmp_path / "restored")) > old
        (generation,) = {record.generation for record in fleet.steps(job)}
        assert generation == 1, "nobody had to form again"
        fleet.muster("job", "cancel", job)
        for agent in fleet.agents.values():
            agent.kill()
        fleet.kill_coordinator()
