"""A committed manifest lies beside its shards, signed, from its commit until it is retired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from coordinator.blobs import DirectoryStore
from coordinator.config import CoordinatorConfig
from coordinator.core.codec import encode_state
from coordinator.core.model import SealAsked
from coordinator.journal import Journal, Snapshot
from coordinator.loop import restore
from protos import admin_pb2, seal
from tests.agent.conftest import eventually
from tests.coordinator.harness import RPC_TIMEOUT_S, RunningCoordinator, loopback_config, running_coordinator
from tests.coordinator.test_admin_service import JOB, Pair, digest_of

KEEP_ONE = {**JOB, "checkpoint": {"keep": 1}}


def mirrored(c: RunningCoordinator) -> dict[int, str]:
    """Manifests that lie beside the blobs, by step."""
    folder = c.home / "blobs" / "manifests"
    return {int(path.stem): path.read_text() for path in folder.glob("*/*.json")}


async def committed(c: RunningCoordinator) -> str:
    reply = await (await c.admin()).GetCheckpoint(admin_pb2.CheckpointRef(job="demo"), timeout=RPC_TIMEOUT_S)
    return str(reply.manifest_json)


async def test_a_manifest_is_signed_in_the_journal_and_mirrored_until_it_is_retired(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        pair = Pair(c)
        await pair.form(KEEP_ONE)
        await pair.progress(1, 3)
        await pair.checkpoint(2, [b"one", b"two"])
        text = await committed(c)
        found = seal.verified(text, c.authority.fingerprint).manifest()
        assert (found["job"], found["step"], found["generation"]) == (pair.job_id, 2, pair.generation)
        await eventually(lambda: mirrored(c) == {2: text})
        await pair.checkpoint(3, [b"three", b"four"])
        await eventually(lambda: list(mirrored(c)) == [3])
    with Journal(c.home / "journal.db") as journal:
        (job,) = restore(journal, loopback_config().budget()).jobs.values()
        assert [one.manifest_json for one in job.checkpoints] == list(mirrored(c).values())


async def test_what_the_mirror_lacks_after_a_crash_is_put_right_at_the_start(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        await pair.checkpoint(2, [b"one", b"two"])
        text = await committed(c)
    assert mirrored(c) == {2: text}, "a coordinator that stops has mirrored what it committed"
    folder = c.home / "blobs" / "manifests" / pair.job_id
    (folder / "2.json").write_text(text[:-9])
    (folder / "1.json").write_text(text)  # retired just before the coordinator died
    async with running_coordinator(tmp_path) as c:
        await eventually(lambda: mirrored(c) == {2: text})
    shutil.rmtree(folder)
    async with running_coordinator(tmp_path) as c:
        await eventually(lambda: mirrored(c) == {2: text})


async def test_checkpoints_of_another_coordinator_are_not_swept(tmp_path: Path) -> None:
    """A home that was lost, and a new one on what is left of its blobs."""
    config = loopback_config(blobs={"reserve": 0, "retired_grace": 0, "orphan_grace": 0})
    async with running_coordinator(tmp_path / "old", config=config) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        await pair.checkpoint(2, [b"one", b"two"])
    left = tmp_path / "new" / "home" / "blobs"
    async with running_coordinator(tmp_path / "new", config=config) as c:
        pass
    shutil.copytree(tmp_path / "old" / "home" / "blobs", left, dirs_exist_ok=True)
    stray = DirectoryStore(left, max_bytes=99, reserve_bytes=0).upload(digest_of(b"stray"), 5)
    assert stray is not None
    stray.write(b"stray")
    stray.finish()
    async with running_coordinator(tmp_path / "new", config=config) as c:
        assert await c.coordinator._sweeper.sweep(c.coordinator.loop) == 1
        assert list(mirrored(c)) == [2]
    kept = DirectoryStore(left, max_bytes=99, reserve_bytes=0)
    assert {digest for digest, *_ in kept.stored()} == {digest_of(b"one"), digest_of(b"two")}


async def test_a_store_that_takes_no_manifest_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.mirror.RETRY_S", (0.01, 0.01))
    async with running_coordinator(tmp_path) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        obstacle = c.home / "blobs" / "manifests"
        obstacle.write_text("")
        await pair.checkpoint(2, [b"one", b"two"])
        text = await committed(c)
        await eventually(lambda: c.coordinator._mirror._failed)
        obstacle.unlink()
        await eventually(lambda: mirrored(c) == {2: text})


async def test_checkpoints_from_before_manifests_were_signed_are_signed_at_the_start(tmp_path: Path) -> None:
    config: CoordinatorConfig = loopback_config()
    async with running_coordinator(tmp_path, config=config) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        await pair.checkpoint(2, [b"one", b"two"])
        text = await committed(c)
    body = seal.opened(text).body.decode()
    with Journal(c.home / "journal.db") as journal:
        state = json.loads(encode_state(restore(journal, config.budget())))
        for found in state["jobs"][0]["checkpoints"]:
            del found["sealed"]
            found["manifest_json"] = body
        journal.write_snapshot(Snapshot(sequence=journal.last_sequence, body=json.dumps(state)))
    async with running_coordinator(tmp_path, config=config) as c:
        assert await committed(c) == text
        await c.coordinator.loop.submit(SealAsked())
        with Journal(c.home / "journal.db") as journal:
            rows = journal.records(0, kind="ManifestCommitted")
        assert len(rows) == 2, "once by its shards, once signed anew"


async def test_a_manifest_that_was_edited_in_the_journal_is_found_damaged(tmp_path: Path) -> None:
    config = loopback_config()
    async with running_coordinator(tmp_path, config=config) as c:
        pair = Pair(c)
        await pair.form()
        await pair.progress(1, 3)
        await pair.checkpoint(2, [b"one", b"two"])
        text = await committed(c)
    with Journal(c.home / "journal.db") as journal:
        state = json.loads(encode_state(restore(journal, config.budget())))
        (found,) = state["jobs"][0]["checkpoints"]
        found["manifest_json"] = text.replace('"bytes":3', '"bytes":4', 1)
        journal.write_snapshot(Snapshot(sequence=journal.last_sequence, body=json.dumps(state)))
    async with running_coordinator(tmp_path, config=config) as c:
        request = admin_pb2.CheckpointRef(job="demo", step=2)
        view = json.loads((await (await c.admin()).VerifyCheckpoint(request, timeout=RPC_TIMEOUT_S)).json)
        assert view["sound"] is False
        assert "manifest: it was changed since the coordinator signed it" in view["damaged"]
