"""`musterd backup` while serving, and `musterd restore`: all of it, or nothing and a clear message."""

from __future__ import annotations

import io
import json
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.daemon import main
from protos import admin_pb2, admin_pb2_grpc
from protos.wire import Identity, channel
from tests.processes import Musterd, init_home, start_musterd


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_home(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def archive(home: Path, tmp_path: Path) -> Path:
    """A backup of a coordinator that knows one token, made while it serves."""
    musterd = start_musterd(home)
    try:
        with admin(musterd) as stub:
            stub.CreateToken(admin_pb2.CreateTokenRequest(ttl_s=60, uses=5, note="before"), timeout=20)
            result = run("backup", "--home", home, tmp_path / "b.tar")
            assert result.exit_code == 0, result.output
            stub.CreateToken(admin_pb2.CreateTokenRequest(ttl_s=60, uses=5, note="after"), timeout=20)
            assert notes(stub) == ["before", "after"]
    finally:
        musterd.stop()
    return tmp_path / "b.tar"


class admin:  # noqa: N801 (used as a function)
    def __init__(self, musterd: Musterd) -> None:
        self._channel = channel(Identity.load(musterd.home / "admin.json"), musterd.addresses["main"])

    def __enter__(self) -> admin_pb2_grpc.AdminServiceStub:
        return admin_pb2_grpc.AdminServiceStub(self._channel)

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def notes(stub: admin_pb2_grpc.AdminServiceStub) -> list[str]:
    views = stub.ListTokens(admin_pb2.ListRequest(all=True), timeout=20)
    return [json.loads(text)["note"] for text in views.json]


def test_a_restored_home_serves_what_was_known_to_the_identities_of_then(
    home: Path, archive: Path, tmp_path: Path
) -> None:
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    assert run("backup", "--home", home, archive).exit_code == 2  # never over another backup
    (home / "blobs").rename(tmp_path / "blobs")
    restored = tmp_path / "other"
    result = run("restore", "--home", restored, archive)
    assert result.exit_code == 0, result.output
    assert {stat.S_IMODE(path.stat().st_mode) for path in restored.iterdir()} == {0o600}
    assert (restored / "authority.pem").read_bytes() == (home / "authority.pem").read_bytes()
    assert json.loads(run("replay", "--home", restored).output)["tokens"][0]["note"] == "before"
    musterd = start_musterd(restored)
    try:
        with admin(musterd) as stub:
            assert notes(stub) == ["before"]
    finally:
        musterd.stop()


def test_restoring_never_touches_a_home(home: Path, archive: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    result = run("restore", "--home", home, archive)
    assert result.exit_code == 2
    assert "not empty" in result.output
    assert {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()} == before


def rewritten(archive: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """Put `change` of every member, in order, in place of it."""
    with tarfile.open(archive) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as tar:
        for found in (change(*member) for member in members):
            if found is not None:
                information = tarfile.TarInfo(found[0])
                information.size = len(found[1])
                tar.addfile(information, io.BytesIO(found[1]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda name, data: None if name == "backup.json" else (name, data),
            "not what `musterd backup` makes",
        ),
        (lambda name, data: None if name == "authority.key" else (name, data), "authority.key is missing"),
        (
            lambda name, data: (name, data[:-1] + b"!" if name == "journal.db" else data),
            "journal.db does not match its digest",
        ),
        (lambda name, data: (name, data.replace(b"muster-backup-1", b"muster-backup-9")), "newer musterd"),
        (lambda name, data: (name, data.replace(b'"admin.json"', b'"../../admin"')), "damaged"),
    ],
    ids=["foreign", "incomplete", "flipped", "newer", "climbing"],
)
def test_a_backup_that_is_not_whole_makes_no_home(
    archive: Path, tmp_path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], complaint: str
) -> None:
    rewritten(archive, change)
    result = run("restore", "--home", tmp_path / "other", archive)
    assert result.exit_code == 2
    assert complaint in result.output
    assert not (tmp_path / "other").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".other")]


def test_a_truncated_backup_makes_no_home(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    result = run("restore", "--home", tmp_path / "other", archive)
    assert result.exit_code == 2
    assert "damaged" in result.output
    assert not (tmp_path / "other").exists()


def test_a_damaged_journal_is_not_backed_up(home: Path, tmp_path: Path) -> None:
    start_musterd(home).stop()
    raw = sqlite3.connect(home / "journal.db")
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    result = run("backup", "--home", home, tmp_path / "b.tar")
    assert result.exit_code == 1
    assert "newer musterd" in result.output
    assert not (tmp_path / "b.tar").exists()
