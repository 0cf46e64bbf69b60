"""Data and checkpoints reach the workers' directories whole, or the coordinator hears why not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from protos import agent_pb2, seal
from tests.agent.conftest import Volunteer, eventually, member
from tests.agent.fake_coordinator import Authority, FakeCoordinator


class Bomb:
    """Runs when it is unpickled."""

    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Bomb.ran.append, ("it ran",)


SHARD = b"parameters" * 500
DIGEST = hashlib.sha256(SHARD).hexdigest()
MANIFEST = json.dumps(
    {
        "format": "muster-checkpoint-1",
        "job": "j1",
        "step": 40,
        "shards": [{"index": 0, "digest": DIGEST, "bytes": len(SHARD)}],
    },
    sort_keys=True,
    separators=(",", ":"),
)


def dataset(data: bytes) -> str:
    shard = {"digest": hashlib.sha256(data).hexdigest(), "tokens": len(data) // 2}
    return json.dumps(
        {"format": "muster-dataset-1", "dtype": "uint16", "splits": {"train": [shard], "val": []}}
    )


async def test_leader_restores_before_its_worker_hears_of_the_plan(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"steps": 1})
    coordinator.blobs[DIGEST] = SHARD
    ready = await coordinator.heard("ready")
    volunteer.plan(
        3,
        ready,
        from_checkpoint=True,
        checkpoint_json=coordinator.authority.seal(MANIFEST),
        committed_step=45,
    )
    await coordinator.heard("formed")
    (plan,) = volunteer.told("plan")
    assert (plan["source"], plan["checkpoint_step"]) == ("checkpoint", 40)
    cache = volunteer.home.job("j1").cache
    assert (cache / "manifests" / "40.json").read_text() == coordinator.authority.seal(MANIFEST)
    assert (cache / "blobs" / DIGEST).read_bytes() == SHARD


async def test_a_restore_is_seen_from_everywhere_and_its_blobs_are_not_evicted(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start(cache_bytes=0)
    volunteer.assign()
    coordinator.blobs[DIGEST] = SHARD
    coordinator.hold_gets = asyncio.Event()
    volunteer.plan(
        3,
        await coordinator.heard("ready"),
        from_checkpoint=True,
        checkpoint_json=coordinator.authority.seal(MANIFEST),
    )
    beat = await coordinator.heard("heartbeat", lambda beat: beat.transfer_bytes)
    assert (beat.activity, beat.transfer_bytes, beat.transfer_total) == ("fetching", 1000, len(SHARD))
    assert volunteer.agent is not None
    assert volunteer.agent._job is not None
    assert volunteer.agent.status()["job"]["fetching"] == {
        "what": "checkpoint 40",
        "bytes": 1000,
        "of_bytes": len(SHARD),
        "from": {"store": 1000},
    }
    assert volunteer.agent._job.blobs_in_use() == {DIGEST}
    coordinator.hold_gets.set()
    await coordinator.heard("formed")
    await coordinator.heard("heartbeat", lambda beat: not beat.transfer_total)
    assert volunteer.agent.status()["job"]["fetching"] is None
    assert volunteer.agent._job.blobs_in_use() == {DIGEST}


async def test_other_members_do_not_fetch_the_checkpoint(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    ready = await coordinator.heard("ready")
    members = [member("a2", 0), member("a1", 1)]
    volunteer.plan(
        3, ready, members=members, from_checkpoint=True, checkpoint_json=coordinator.authority.seal(MANIFEST)
    )
    await coordinator.heard("formed")
    assert coordinator.gets == []


async def test_damaged_shard_in_the_cache_is_fetched_again(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    (volunteer.home.blobs / DIGEST).write_bytes(b"!" + SHARD[1:])
    coordinator.blobs[DIGEST] = SHARD
    volunteer.plan(
        3,
        await coordinator.heard("ready"),
        from_checkpoint=True,
        checkpoint_json=coordinator.authority.seal(MANIFEST),
    )
    await coordinator.heard("formed")
    assert (volunteer.home.blobs / DIGEST).read_bytes() == SHARD


async def test_checkpoint_in_the_cache_is_not_fetched(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    (volunteer.home.blobs / DIGEST).write_bytes(SHARD)
    volunteer.plan(
        3,
        await coordinator.heard("ready"),
        from_checkpoint=True,
        checkpoint_json=coordinator.authority.seal(MANIFEST),
    )
    await coordinator.heard("formed")
    assert coordinator.gets == []


async def test_checkpoint_that_nobody_has_is_reported_with_its_step(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign()
    volunteer.plan(
        3,
        await coordinator.heard("ready"),
        from_checkpoint=True,
        checkpoint_json=coordinator.authority.seal(MANIFEST),
    )
    failed = await coordinator.heard("failed")
    assert (failed.kind, failed.step, failed.generation) == (agent_pb2.FAILURE_KIND_RESTORE, 40, 3)
    assert DIGEST in failed.detail
    assert volunteer.told("plan") == []


async def test_dataset_is_there_before_the_worker_starts(
    volunteer: Volunteer, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    data = b"tokens" * 100
    coordinator.blobs[hashlib.sha256(data).hexdigest()] = data
    await volunteer.start()
    assignment = agent_pb2.Assignment(job_id="j1", spec_json="{}", dataset_json=dataset(data))
    coordinator.say(assignment=assignment)
    await coordinator.heard("ready")
    folder = volunteer.home.job("j1").data
    assert (folder / "manifest.json").read_text() == dataset(data)
    assert (folder / "blobs" / hashlib.sha256(data).hexdigest()).read_bytes() == data


async def test_of_a_dataset_larger_than_the_cache_only_what_is_wanted_is_there(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    shards = [bytes([n]) * 1000 for n in range(8)]
    digests = [hashlib.sha256(shard).hexdigest() for shard in shards]
    coordinator.blobs = dict(zip(digests, shards, strict=True))
    manifest = {
        "format": "muster-dataset-1",
        "dtype": "uint16",
        "splits": {"train": [{"digest": digest, "tokens": 500} for digest in digests], "val": []},
    }
    fake = {"wants": [digests[:3], digests[2:5]], "steps": 1}
    await volunteer.start(cache_bytes=4000)

    def held() -> set[str]:
        return {path.name for path in volunteer.home.blobs.iterdir() if len(path.name) == 64}

    coordinator.say(
        assignment=agent_pb2.Assignment(
            job_id="j1", spec_json=json.dumps({"fake": fake}), dataset_json=json.dumps(manifest)
        )
    )
    ready = await coordinator.heard("ready")
    assert held() == set(digests[:3])
    assert {digest for digest, _ in coordinator.gets} == set(digests[:3])
    await coordinator.heard("logs", lambda logs: "window of 2000 bytes" in logs.lines)
    volunteer.plan(1, ready)
    await coordinator.heard("formed")
    assert set(digests[2:5]) <= held()
    assert len(held()) <= 4, "what is wanted no more makes room"
    assert volunteer.agent is not None
    assert volunteer.agent._job is not None
    assert volunteer.agent._job.blobs_in_use() == set(digests[2:5])
    await volunteer.agent.trim_cache(room=4000)
    assert held() == set(digests[2:5])


async def test_dataset_with_another_digest_is_a_failed_preparation(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    digest = hashlib.sha256(b"what was promised").hexdigest()
    coordinator.blobs[digest] = b"something else"
    await volunteer.start()
    assignment = agent_pb2.Assignment(job_id="j1", spec_json="{}", dataset_json=dataset(b"what was promised"))
    coordinator.say(assignment=assignment)
    failed = await coordinator.heard("failed")
    assert failed.kind == agent_pb2.FAILURE_KIND_PREPARE
    assert digest in failed.detail
    assert not (volunteer.home.job("j1").data / "manifest.json").exists()
    assert await eventually(lambda: volunteer.agent and volunteer.agent.status()["job"]["problem"])


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (lambda text: text.replace('"step":40', '"step":41'), "changed since the coordinator signed it"),
        (lambda _: Authority().seal(MANIFEST), "signed by authority"),
        (lambda _: MANIFEST, "not signed"),
        (lambda _: seal.checksummed(MANIFEST), "not signed"),
        (lambda text: text[:-40], "seal"),
        (lambda _: pickle.dumps(Bomb()).decode("latin-1"), "not signed"),
    ],
    ids=["edited", "another authority", "unsigned", "checksummed", "truncated", "pickle"],
)
async def test_a_manifest_that_the_coordinator_did_not_sign_is_reported_and_not_restored(
    volunteer: Volunteer, coordinator: FakeCoordinator, forge: Callable[[str], str], told: str
) -> None:
    await volunteer.start()
    volunteer.assign({"steps": 1})
    coordinator.blobs[DIGEST] = SHARD
    signed = coordinator.authority.seal(MANIFEST)
    ready = await coordinator.heard("ready")
    volunteer.plan(3, ready, from_checkpoint=True, checkpoint_json=forge(signed), committed_step=40)
    failed = await coordinator.heard("failed")
    assert (failed.kind, failed.step, failed.generation) == (agent_pb2.FAILURE_KIND_RESTORE, 40, 3)
    assert told in failed.detail
    assert coordinator.gets == []
    assert volunteer.told("plan") == []
    # The plan that follows, from the checkpoint before it, is carried out.
    volunteer.plan(4, ready, from_checkpoint=True, checkpoint_json=signed, committed_step=40)
    await coordinator.heard("formed", lambda formed: formed.generation == 4)
    assert not Bomb.ran


async def test_a_manifest_of_another_job_is_not_restored(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    volunteer.assign({"steps": 1})
    text = coordinator.authority.seal(MANIFEST.replace('"j1"', '"j2"'))
    volunteer.plan(3, await coordinator.heard("ready"), from_checkpoint=True, checkpoint_json=text)
    assert "of job 'j2'; expected" in (await coordinator.heard("failed")).detail
