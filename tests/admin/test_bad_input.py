"""Bad input: one line that says what was found and what to do, the right exit code, nothing sent or kept."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.identity import Authority, Role
from protos.wire import Identity
from tests.admin.conftest import error_line
from tests.admin.server import Served
from tests.admin.test_job import write_dataset, write_job


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---------------------------------------------------------------------------------- job files


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trian": {"steps": 5}}, ["trian", "train"]),
        ({"train": {"stesp": 5}}, ["train.stesp", "train.steps"]),
        ({"elastic": {"min_node": 1}}, ["elastic.min_node", "min_nodes"]),
        ({"train": {"steps": "many"}}, ["train.steps", "'many'"]),
        ({"elastic": {"min_nodes": 4, "max_nodes": 2}}, ["min_nodes is 4", "max_nodes is 2"]),
        ({"elastic": {"last_call": "soon"}}, ["elastic.last_call", "'soon'", "5s"]),
        ({"requires": {"backend": "mpi"}}, ["requires.backend", "nccl"]),
        ({"model": {"preset": "huge"}}, ["model.preset", "tiny"]),
        ({"name": "-bad"}, ["name", "-bad"]),
        ({"data": {}}, ["data", "path"]),
    ],
)
def test_a_wrong_job_file_is_refused_before_anything_is_sent(
    muster, served: Served, tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    path = write_job(tmp_path / "job.yaml", write_dataset(tmp_path / "dataset"), **changes)
    result = muster("job", "submit", str(path))
    assert result.exit_code == 2
    line = error_line(result)
    assert str(path) in line
    for part in named:
        assert part in line
    assert not served.service.submitted
    assert not served.service.blobs


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [", "name: a\nname: b\n", ""])
def test_a_file_that_is_no_mapping_is_refused(muster, tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "job.yaml", text)
    result = muster("job", "submit", str(path))
    assert result.exit_code == 2
    assert str(path) in error_line(result)


def test_an_absent_job_file_is_named(muster, tmp_path: Path) -> None:
    result = muster("job", "submit", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "none.yaml: No such file or directory" in error_line(result)


@pytest.mark.parametrize(
    "setting", ["steps", "=3", "train..steps=3", "name.x=3", "train.steps=[", "train.stesp=3"]
)
def test_a_malformed_setting_is_named(muster, served: Served, tmp_path: Path, setting: str) -> None:
    path = write_job(tmp_path / "job.yaml", write_dataset(tmp_path / "dataset"))
    result = muster("job", "submit", str(path), "--set", setting)
    assert result.exit_code == 2
    assert setting.partition("=")[0] in error_line(result)
    assert not served.service.submitted


# ---------------------------------------------------------------------------------- datasets


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))


def blob(dataset: Path) -> Path:
    digest = json.loads((dataset / "manifest.json").read_text())["splits"]["train"][0]["digest"]
    return dataset / "blobs" / digest


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(dataset: Path) -> None:
        manifest = json.loads((dataset / "manifest.json").read_text())
        change(manifest)
        (dataset / "manifest.json").write_text(json.dumps(manifest))

    return apply


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda dataset: (dataset / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda dataset: (dataset / "manifest.json").write_text("{"), "not a dataset manifest"),
        (lambda dataset: blob(dataset).unlink(), "No such file"),
        (lambda dataset: blob(dataset).write_bytes(b"short"), "5 bytes, expected 10240"),
        (lambda dataset: flip(blob(dataset)), "damaged"),
        (edit(lambda m: m.update(format="other-1")), "'other-1'"),
        (edit(lambda m: m["splits"]["train"][0].update(digest="../../etc/passwd")), "not a SHA-256"),
    ],
)
def test_a_damaged_dataset_is_refused_and_the_job_is_not_submitted(
    muster, served: Served, tmp_path: Path, damage: Callable[[Path], Any], named: str
) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    damage(dataset)
    result = muster("job", "submit", str(write_job(tmp_path / "job.yaml", dataset)))
    assert result.exit_code == 2
    assert named in error_line(result)
    assert not served.service.submitted


def test_absent_text_is_named_and_nothing_is_cached(muster, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job.yaml", tmp_path, data={"text": str(tmp_path / "nowhere.txt")})
    result = muster("job", "submit", str(path))
    assert result.exit_code == 2
    assert "nowhere.txt: no such file" in error_line(result)
    assert not (tmp_path / "cache").exists()


def test_text_that_cannot_be_prepared_leaves_nothing_in_the_cache(muster, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    path = write_job(tmp_path / "job.yaml", tmp_path, data={"text": str(tmp_path / "binary")})
    result = muster("job", "submit", str(path))
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "cache").rglob("*manifest.json"))


# ---------------------------------------------------------------------------------- the connection


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_unreachable_coordinator_is_named_with_what_to_do(muster, free_port: int) -> None:
    result = muster("job", "list", "--address", f"127.0.0.1:{free_port}")
    assert result.exit_code == 3
    line = error_line(result)
    assert f"127.0.0.1:{free_port} is unreachable" in line
    assert "refused" in line
    assert "musterd" in line


def test_json_mode_prints_errors_on_standard_error_only(muster, free_port: int) -> None:
    result = muster("agent", "list", "-o", "json", "--address", f"127.0.0.1:{free_port}")
    assert result.exit_code == 3
    assert error_line(result)


def test_a_coordinator_of_another_authority_is_not_talked_to(served: Served, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    Authority.create().issue_operator(Role.ADMIN, "stranger", served.address).save(other)
    # In a process of its own: gRPC's C core writes to standard error past Python.
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.admin.cli", "--identity", str(other), "job", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    [line] = done.stderr.splitlines()
    assert "could not be verified" in line
    assert str(other) in line


@pytest.mark.parametrize("address", ["nowhere", "host:port", "host:99999", ":7470"])
def test_a_malformed_address_is_refused(muster, address: str) -> None:
    result = muster("job", "list", "--address", address)
    assert result.exit_code == 2
    assert "HOST:PORT" in error_line(result)


def test_an_absent_identity_is_named(muster, tmp_path: Path) -> None:
    result = muster("job", "list", identity=tmp_path / "none.json")
    assert result.exit_code == 2
    assert "none.json: No such file" in error_line(result)


def test_an_identity_that_others_can_read_is_refused(muster, served: Served) -> None:
    served.identity_path.chmod(0o644)
    result = muster("job", "list")
    assert result.exit_code == 2
    assert "chmod 600" in error_line(result)


def test_an_identity_with_unknown_content_is_refused(muster, tmp_path: Path) -> None:
    path = written(tmp_path / "identity.json", '{"role": "admin"}')
    path.chmod(0o600)
    result = muster("job", "list", identity=path)
    assert result.exit_code == 2
    assert "not a Muster identity" in error_line(result)


def test_an_agents_identity_is_refused_before_anything_is_sent(
    muster, served: Served, tmp_path: Path
) -> None:
    path = served.identity(tmp_path / "agent.json", role=Role.AGENT)
    result = muster("job", "list", identity=path)
    assert result.exit_code == 2
    assert "role is 'agent'" in error_line(result)


def test_a_malformed_certificate_is_named_as_the_identitys(muster, served: Served, tmp_path: Path) -> None:
    good = json.loads(served.identity_path.read_text())
    path = tmp_path / "broken.json"
    Identity(**(good | {"certificate_pem": "-----BEGIN NOTHING-----"})).save(path)
    result = muster("job", "list", identity=path)
    assert result.exit_code == 2
    assert "broken.json" in result.stderr.splitlines()[-1]


def test_an_expired_certificate_is_named_with_its_date(muster, served: Served, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    good = json.loads(served.identity_path.read_text())
    issued = served.authority.issue_client(key.public_key(), Role.ADMIN, "late", dt.timedelta(seconds=-60))
    path = tmp_path / "late.json"
    Identity(**(good | {"certificate_pem": issued.certificate_pem.decode()})).save(path)
    result = muster("job", "list", identity=path)
    assert result.exit_code == 2
    assert "expired on" in result.stderr.splitlines()[-1]


def test_an_address_without_a_port_is_looked_up_where_the_coordinator_wrote_it(
    muster, served: Served, tmp_path: Path
) -> None:
    path = served.identity(tmp_path / "home" / "admin.json", address="127.0.0.1:0")
    result = muster("job", "list", identity=path)
    assert result.exit_code == 2
    assert "musterd serve" in error_line(result)
    (tmp_path / "home" / "run").mkdir()
    (tmp_path / "home" / "run" / "addresses.json").write_text(json.dumps({"main": served.address}))
    assert muster("job", "list", identity=path).exit_code == 0


def test_an_unknown_job_is_a_refusal(muster) -> None:
    result = muster("job", "show", "nothing")
    assert result.exit_code == 4
    assert error_line(result) == "muster: refused (UNKNOWN_JOB): no job 'nothing'; see `muster job list`"


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["job", "nonsense"],
        ["job", "scale", "one", "3:1"],
        ["job", "scale", "one", "0:1"],
        ["job", "scale", "one", "two"],
        ["job", "rollback", "one", "--to", "newest"],
        ["job", "rollback", "one", "--to", "two@5"],
        ["job", "logs", "one", "--tail", "-1"],
        ["agent", "quarantine", "a", "--for", "soon"],
        ["checkpoint", "show", "job@zero"],
        ["checkpoint", "show", "job@0"],
        ["checkpoint", "show", "@5"],
        ["job", "list", "-o", "xml"],
        ["local"],
        ["generate", "/nowhere/at/all"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(muster, served: Served, arguments: list[str]) -> None:
    result = muster(*arguments)
    assert result.exit_code == 2
    assert error_line(result).startswith("muster: ")
    assert not served.service.requests


@pytest.mark.parametrize(
    ("arguments", "changes", "named"),
    [
        (["--rejoin-after", "3"], {}, "--kill-after"),
        (["--agents", "2"], {"elastic": {"min_nodes": 3}}, "elastic.min_nodes is 3"),
        ([], {"launch": "torchrun"}, "torchrun"),
        ([], {"nonsense": 1}, "nonsense"),
        (["--set", "data.path=/nowhere"], {}, "/nowhere"),
        (["--limit", "soon"], {}, "soon"),
    ],
)
def test_local_refuses_what_could_never_train_and_starts_nothing(
    muster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    changes: dict[str, Any],
    named: str,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", os.fspath(temporary))
    path = tmp_path / "job.yaml"
    spec = yaml.safe_load(write_job(path, write_dataset(tmp_path / "dataset")).read_text())
    if changes.get("launch"):
        spec = {"name": "mine"}
    path.write_text(yaml.safe_dump(spec | changes))
    result = muster("local", str(path), *arguments)
    assert result.exit_code == 2
    assert named in error_line(result)
    assert not list(temporary.iterdir())
