"""`muster checkpoint restore`: out of a directory or bucket, without a coordinator, and nothing that is not
signed and whole."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import obstore
import pytest
from click.testing import CliRunner, Result
from obstore.store import S3Store as Outsider

from coordinator.admin import restoring
from coordinator.admin.cli import main
from coordinator.identity import Authority, Role
from tests.admin.conftest import error_line
from tests.agent.test_restore import Bomb
from tests.coordinator.s3_server import BUCKET, KEY, REGION, S3Server, s3_server
from tests.trainer.test_checkpoint import empty, same, save, state
from trainer.checkpoint import CheckpointDirectory, Manifest

JOB = "job-1"


@dataclass(kw_only=True)
class Store:
    """What a coordinator left: signed checkpoints of steps 10 and 20, in its layout."""

    root: Path
    authority: Authority
    manifests: dict[int, Manifest] = field(default_factory=dict)

    def blob(self, step: int, index: int) -> Path:
        digest = self.manifests[step].shards[index].digest
        return self.root / "blobs" / digest[:2] / digest

    def manifest(self, step: int) -> Path:
        return self.root / "blobs" / "manifests" / JOB / f"{step}.json"

    def copy(self, root: Path) -> Store:
        shutil.copytree(self.root, root)
        return Store(root=root, authority=self.authority, manifests=self.manifests)


def run(*arguments: str | Path, **environment: str) -> Result:
    """`muster checkpoint restore` with nobody's identity."""
    env = {"MUSTER_IDENTITY": "/nonexistent", "AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    invoked = ["checkpoint", "restore", *map(str, arguments)]
    return CliRunner(env={**env, **environment}).invoke(main, invoked)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Store:
    home = tmp_path_factory.mktemp("home")
    authority = Authority.create()
    authority.save(home)
    signer = authority.manifest_signer(home)
    store = Store(root=home, authority=authority)
    local = CheckpointDirectory(tmp_path_factory.mktemp("local"))
    for step in (10, 20):
        manifest = store.manifests[step] = save(local, step, state(step))
        for index, shard in enumerate(manifest.shards):
            store.blob(step, index).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(local.root / "blobs" / shard.digest, store.blob(step, index))
        store.manifest(step).parent.mkdir(parents=True, exist_ok=True)
        store.manifest(step).write_text(signer.seal(manifest.to_json()))
    return store


@pytest.fixture
def store(original: Store, tmp_path: Path) -> Store:
    return original.copy(tmp_path / "home")


@pytest.fixture
def restore(store: Store, tmp_path: Path) -> Callable[..., Result]:
    def restored(*arguments: str | Path, **environment: str) -> Result:
        given = ("--authority", store.authority.fingerprint, "--from", store.root, "--out", tmp_path / "out")
        return run(*given, *arguments, **environment)

    return restored


def holds(out: Path, step: int) -> bool:
    """Whether the trainer restores this step from the directory, bit for bit."""
    into = empty()
    header = CheckpointDirectory(out).restore_newest(into)
    assert header is not None
    return header["step"] == step and same(into, state(step))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def plant(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


HARMS = {"flipped": flip, "truncated": truncate, "deleted": Path.unlink, "pickle": plant}
TOLD = {"flipped": "hash to", "truncated": "bytes instead of", "deleted": "missing", "pickle": "instead of"}


def test_the_newest_checkpoint_is_restored_and_the_trainer_goes_on_from_it(
    restore: Callable[..., Result], store: Store, tmp_path: Path
) -> None:
    result = restore("-o", "json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    view = json.loads(result.stdout)
    assert (view["job"], view["step"], view["signed_by"]) == (JOB, 20, store.authority.fingerprint)
    assert holds(tmp_path / "out", 20)
    assert {path.name for path in (tmp_path / "out" / "manifests").iterdir()} == {"20.json", "authority"}
    assert (tmp_path / "out" / "manifests" / "20.json").read_bytes() == store.manifest(20).read_bytes()


@pytest.mark.parametrize("inside", ["", "blobs"])
def test_a_home_and_its_blobs_are_both_a_source(store: Store, tmp_path: Path, inside: str) -> None:
    pem = store.root / "authority.pem"
    result = run("--from", store.root / inside, "--authority", pem, "--step", "10", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.stderr
    assert holds(tmp_path / "o", 10)
    # What was restored is a source itself: a copy of a copy.
    again = run("--from", tmp_path / "o", "--authority", pem, "--out", tmp_path / "p")
    assert again.exit_code == 0, again.stderr
    assert holds(tmp_path / "p", 10)


def test_the_operators_identity_names_the_authority(store: Store, tmp_path: Path) -> None:
    store.authority.issue_operator(Role.OBSERVER, "me", "localhost:1").save(tmp_path / "me.json")
    identity = {"MUSTER_IDENTITY": str(tmp_path / "me.json")}
    assert run("--from", store.root, "--out", tmp_path / "o", **identity).exit_code == 0
    assert holds(tmp_path / "o", 20)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_restored(
    restore: Callable[..., Result], store: Store, tmp_path: Path, harm: str
) -> None:
    index = 1
    HARMS[harm](store.blob(20, index))
    result = restore()
    assert result.exit_code == 0, result.stderr
    digest = store.manifests[20].shards[index].digest
    assert f"step 20: shard {index} ({digest[:16]}…) in {store.root}" in result.stderr
    assert TOLD[harm] in result.stderr
    assert holds(tmp_path / "out", 10)
    assert not Bomb.ran
    left = {path.name for path in (tmp_path / "out" / "blobs").iterdir()}
    assert left == {shard.digest for shard in store.manifests[10].shards}
    # Of a step that was asked for, nothing else is taken.
    asked = restore("--step", "20", "--out", tmp_path / "other")
    assert asked.exit_code == 1
    assert "name another copy" in asked.stderr.splitlines()[-1]
    assert not list((tmp_path / "other" / "manifests").iterdir())


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_shard_is_taken_from_the_next_copy(
    restore: Callable[..., Result], store: Store, tmp_path: Path, harm: str
) -> None:
    other = store.copy(tmp_path / "copy")
    HARMS[harm](store.blob(20, 0))
    HARMS[harm](other.blob(20, 1))
    other.manifest(20).unlink()
    result = restore("--from", other.root)
    assert (result.exit_code, result.stderr) == (0, "")
    assert holds(tmp_path / "out", 20)
    assert not Bomb.ran


def other_authority(store: Store, path: Path, tmp_path: Path) -> None:
    forger = Authority.create().manifest_signer(tmp_path)
    path.write_text(forger.seal(store.manifests[20].to_json()))


FORGERIES: dict[str, tuple[Callable[[Store, Path, Path], object], str]] = {
    "edited": (
        lambda _s, path, _t: path.write_text(path.read_text().replace('"tokens":200', '"tokens":201')),
        "changed since the coordinator signed it",
    ),
    "another key": (other_authority, "signed by authority"),
    "unsigned": (lambda s, path, _t: path.write_text(s.manifests[20].to_json()), "not signed"),
    "truncated": (lambda _s, path, _t: truncate(path), "seal"),
    "of another step": (lambda s, path, _t: shutil.copy(s.manifest(10), path), "of that step"),
    "pickle": (lambda _s, path, _t: plant(path), "not signed"),
    "endless": (lambda _s, path, _t: path.write_bytes(b"{" * (5 << 20)), "at most"),
    "deleted": (lambda _s, path, _t: path.unlink(), ""),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_is_not_the_coordinators_is_named_and_not_used(
    restore: Callable[..., Result], store: Store, tmp_path: Path, forgery: str
) -> None:
    forge, told = FORGERIES[forgery]
    forge(store, store.manifest(20), tmp_path)
    result = restore()
    assert result.exit_code == 0, result.stderr
    assert told in result.stderr
    assert not told or f"{JOB}/20.json" in result.stderr
    assert holds(tmp_path / "out", 10)
    assert not Bomb.ran


def test_an_unknown_signer_is_only_believed_with_the_flag(store: Store, tmp_path: Path) -> None:
    other_authority(store, store.manifest(20), tmp_path)
    refused = run("--from", store.root, "--out", tmp_path / "o")
    assert refused.exit_code == 2
    assert "--allow-unsigned" in error_line(refused)
    stranger = ("--authority", "ab" * 32)
    refused = run("--from", store.root, "--out", tmp_path / "o", *stranger)
    assert refused.exit_code == 1
    assert "jobs here: none" in refused.stderr
    allowed = run("--from", store.root, "--out", tmp_path / "o", "--allow-unsigned")
    assert allowed.exit_code == 0, allowed.stderr
    assert "NOT signed" in allowed.stdout
    assert holds(tmp_path / "o", 20)
    assert not (tmp_path / "o" / "manifests" / "authority").exists()
    # An edited one is never believed.
    path = store.manifest(20)
    path.write_text(path.read_text().replace('"tokens":200', '"tokens":201'))
    allowed = run("--from", store.root, "--out", tmp_path / "p", "--allow-unsigned")
    assert "changed since" in allowed.stderr
    assert holds(tmp_path / "p", 10)


def test_an_ended_restore_goes_on_where_it_was(
    restore: Callable[..., Result], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = tmp_path / "out" / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "out" / "manifests").mkdir()
    first, second, third = (shard.digest for shard in store.manifests[20].shards)
    shutil.copy(store.blob(20, 0), blobs / first)
    (blobs / f".partial-{second}").write_bytes(store.blob(20, 1).read_bytes()[:1000])
    (blobs / f".partial-{third}").write_bytes(b"something else")
    read: list[tuple[str, int]] = []
    honest = restoring.DirectorySource.read

    def watched(source: restoring.DirectorySource, digest: str, offset: int) -> Iterator[bytes]:
        read.append((digest, offset))
        return honest(source, digest, offset)

    monkeypatch.setattr(restoring.DirectorySource, "read", watched)
    assert restore().exit_code == 0
    assert sorted(read) == sorted([(second, 1000), (third, 14), (third, 0)])
    assert holds(tmp_path / "out", 20)
    assert not list(blobs.glob(".*"))


def test_what_is_in_the_way_is_refused(restore: Callable[..., Result], store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("")
    for out in ("file", "full"):
        refused = restore("--out", tmp_path / out)
        assert (refused.exit_code, "no directory of checkpoints" in error_line(refused)) == (2, True)
    save(CheckpointDirectory(tmp_path / "own"), 20, state(3))
    assert "another checkpoint of step 20" in error_line(restore("--out", tmp_path / "own"))
    assert "no such directory" in error_line(restore("--from", tmp_path / "none"))
    assert "jobs here: job-1" in error_line(restore("--job", "x"))
    assert "steps here: 20, 10" in error_line(restore("--step", "7"))
    text = store.manifest(20).read_text()
    other = store.root / "blobs" / "manifests" / "job-2" / "20.json"
    other.parent.mkdir()
    body = store.manifests[20].to_json().replace('"job-1"', '"job-2"')
    other.write_text(store.authority.manifest_signer(store.root).seal(body))
    assert "choose one of job-1, job-2" in error_line(restore())
    assert restore("--job", "job-1").exit_code == 0
    assert store.manifest(20).read_text() == text


def test_the_trainers_directory_names_a_forged_manifest_and_goes_on_from_the_one_before(
    restore: Callable[..., Result], store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    for step in ("10", "20"):
        assert restore("--step", step).exit_code == 0
    other_authority(store, out / "manifests" / "20.json", tmp_path)
    assert holds(out, 10)
    assert f"expected authority {store.authority.fingerprint[:16]}" in caplog.text
    # An agent's worker believes nothing that is not signed either.
    (out / "manifests" / "20.json").write_text(store.manifests[20].to_json())
    assert [one.step for one in CheckpointDirectory(out, store.authority.fingerprint).manifests()] == [10]
    assert [one.step for one in CheckpointDirectory(out).manifests()] == [20, 10]


# ------------------------------------------------------------------------------------------ buckets


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_a_bucket_alone_is_restored_from_and_what_it_lacks_comes_from_a_copy(
    server: S3Server, store: Store, tmp_path: Path
) -> None:
    prefix = secrets.token_hex(4)
    outside = Outsider(
        BUCKET,
        prefix=prefix,
        endpoint=server.url,
        region=REGION,
        access_key_id=KEY.access_key_id,
        secret_access_key=KEY.secret_access_key,
        client_options={"allow_http": True},
    )
    blobs = store.root / "blobs"
    for path in blobs.rglob("*"):
        if path.is_file():
            name = path.relative_to(blobs).as_posix()
            obstore.put(
                outside, name if name.startswith("manifests/") else f"blobs/{name}", path.read_bytes()
            )
    bucket = (
        "--from", f"s3://{BUCKET}/{prefix}", "--endpoint", server.url, "--region", REGION,
        "--authority", store.authority.fingerprint,
    )  # fmt: skip
    key = {"AWS_ACCESS_KEY_ID": KEY.access_key_id, "AWS_SECRET_ACCESS_KEY": KEY.secret_access_key}
    result = run(*bucket, "--out", tmp_path / "o", **key)
    assert result.exit_code == 0, result.stderr
    assert holds(tmp_path / "o", 20)

    digest = store.manifests[20].shards[1].digest
    obstore.delete(outside, f"blobs/{digest[:2]}/{digest}")
    older = run(*bucket, "--out", tmp_path / "p", **key)
    assert f"shard 1 ({digest[:16]}…) in s3://{BUCKET}/{prefix}: missing" in older.stderr
    assert holds(tmp_path / "p", 10)
    whole = run(*bucket, "--from", store.root, "--out", tmp_path / "q", **key)
    assert (whole.exit_code, whole.stderr) == (0, "")
    assert holds(tmp_path / "q", 20)

    assert "AWS_ACCESS_KEY_ID" in error_line(run(*bucket, "--out", tmp_path / "r"))
    file = tmp_path / "key.json"
    file.write_text(json.dumps({"access_key_id": KEY.access_key_id, "secret_access_key": "wrong"}))
    file.chmod(0o600)
    refused = run(*bucket, "--credentials", file, "--out", tmp_path / "r")
    assert refused.exit_code == 1
    assert '"wrong"' not in error_line(refused)
