"""`muster job` against a real gRPC server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from rich.console import Console

from coordinator.admin.connection import Coordinator
from coordinator.admin.waiting import shown
from protos import admin_pb2, agent_pb2
from tests.admin.conftest import error_line
from tests.admin.server import Served


def write_dataset(directory: Path) -> Path:
    """A prepared dataset of two small shards."""
    (directory / "blobs").mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, data in (("train", bytes(range(256)) * 40), ("val", b"\1\0" * 50)):
        digest = hashlib.sha256(data).hexdigest()
        (directory / "blobs" / digest).write_bytes(data)
        splits[split] = [{"digest": digest, "tokens": len(data) // 2}]
    tokenizer = {"kind": "byte", "vocab_size": 257, "digest": None}
    manifest = {
        "format": "muster-dataset-1", "name": "d", "dtype": "uint16", "tokenizer": tokenizer, "splits": splits,
    }  # fmt: skip
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (directory / "manifest.json").write_text(text)
    return directory


def write_job(path: Path, dataset: Path, **changes: Any) -> Path:
    spec = {
        "name": "demo",
        "data": {"path": str(dataset)},
        "model": {"preset": "tiny"},
        "train": {"steps": 10},
        "elastic": {"min_nodes": 1, "max_nodes": 3},
    }
    path.write_text(yaml.safe_dump(spec | changes))
    return path


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    return write_job(tmp_path / "job.yaml", write_dataset(tmp_path / "dataset"))


def test_submitting_uploads_the_missing_blobs_and_sends_both_parts(
    muster_json, served: Served, job_file: Path, tmp_path: Path
) -> None:
    reply = muster_json("job", "submit", str(job_file))
    assert reply == {"job_id": "j0000000", "name": "demo"}
    [request] = served.service.submitted
    manifest = (tmp_path / "dataset" / "manifest.json").read_text()
    assert request.dataset_json == manifest
    files = {path.name: path.read_bytes() for path in (tmp_path / "dataset" / "blobs").iterdir()}
    assert served.service.blobs == files
    spec = json.loads(request.spec_json)
    assert spec["elastic"] == {"min_nodes": 1, "max_nodes": 3}
    assert spec["data"] == {"path": f"sha256:{hashlib.sha256(manifest.encode()).hexdigest()}"}
    assert str(tmp_path) not in request.spec_json


def test_an_upload_whose_line_breaks_goes_on_where_it_ended(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin.connection.RECONNECT_PAUSE_S", 0.0)
    data = os.urandom(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "blob").write_bytes(data)
    sent: list[int] = []
    served.service.put_breaks = 1
    with Coordinator.open(served.identity_path) as coordinator:
        coordinator.put_blob(digest, tmp_path / "blob", sent.append)
        assert served.service.blobs == {digest: data}
        assert served.service.put_offsets == [0, 1 << 20]
        coordinator.put_blob(digest, tmp_path / "blob", sent.append)
        assert len(served.service.put_offsets) == 2, "what is stored is not sent"


def test_a_second_submission_uploads_nothing(muster_json, served: Served, job_file: Path) -> None:
    muster_json("job", "submit", str(job_file))
    served.service.PutBlob = None  # type: ignore[method-assign]  # an upload would fail now
    assert muster_json("job", "submit", str(job_file), "--name", "again")["job_id"] == "j0000001"


def test_settings_and_name_replace_the_values_of_the_file(
    muster_json, served: Served, job_file: Path
) -> None:
    muster_json(
        "job",
        "submit",
        str(job_file),
        "--name",
        "other",
        "--set",
        "train.lr=3e-4",
        "--set",
        "checkpoint.keep=2",
    )
    spec = json.loads(served.service.submitted[0].spec_json)
    assert (spec["name"], float(spec["train"]["lr"]), spec["train"]["steps"]) == ("other", 3e-4, 10)
    assert spec["checkpoint"] == {"keep": 2}


def test_text_is_prepared_once_into_the_cache(muster_json, served: Served, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Muster trains one model on many machines.\n" * 200)
    job = write_job(tmp_path / "job.yaml", tmp_path, data={"text": str(text), "tokenizer": "byte"})
    muster_json("job", "submit", str(job))
    [cached] = (tmp_path / "cache" / "muster" / "datasets").iterdir()
    made = (cached / "manifest.json").stat().st_mtime_ns
    muster_json("job", "submit", str(job), "--name", "again")
    assert (cached / "manifest.json").stat().st_mtime_ns == made
    first, second = served.service.submitted
    assert first.dataset_json == second.dataset_json != ""
    text.write_text("Something else.\n" * 500)
    muster_json("job", "submit", str(job), "--name", "changed")
    assert served.service.submitted[2].dataset_json != first.dataset_json


def test_a_mixture_is_submitted_as_one_dataset(muster_json, served: Served, tmp_path: Path) -> None:
    for name in ("prose", "verse"):
        (tmp_path / name).write_text(f"Some {name} for a mixture.\n" * 200)
    parts = [
        {"text": str(tmp_path / "prose"), "weight": 0.75},
        {"text": str(tmp_path / "verse"), "weight": 0.25},
    ]
    job = write_job(tmp_path / "job.yaml", tmp_path, data={"mix": parts})
    muster_json("job", "submit", str(job))
    muster_json("job", "submit", str(job), "--name", "again")
    first, second = served.service.submitted
    assert first.dataset_json == second.dataset_json
    manifest = json.loads(first.dataset_json)
    assert [(part["name"], part["weight"]) for part in manifest["mix"]] == [("prose", 3), ("verse", 1)]
    digests = {shard["digest"] for split in manifest["splits"].values() for shard in split}
    assert digests == set(served.service.blobs)
    spec = json.loads(first.spec_json)
    assert spec["data"] == {"path": f"sha256:{hashlib.sha256(first.dataset_json.encode()).hexdigest()}"}


def test_a_torchrun_job_needs_no_trainer_sections(muster_json, served: Served, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{name: mine, launch: torchrun, elastic: {min_nodes: 2}}")
    muster_json("job", "submit", str(path))
    assert served.service.submitted[0].dataset_json == ""


def test_a_taken_name_is_a_refusal_with_its_reason(muster, served: Served, job_file: Path) -> None:
    assert muster("job", "submit", str(job_file)).exit_code == 0
    result = muster("job", "submit", str(job_file))
    assert result.exit_code == 4
    assert error_line(result) == "muster: refused (NAME_TAKEN): a live job is named demo"


def test_list_shows_live_jobs_as_table_and_json(muster, muster_json, served: Served) -> None:
    running = {
        "id": "j1", "name": "one", "phase": "RUNNING", "committed_step": 12, "steps_total": 40, "loss": 3.25,
        "tokens_per_s": 1234.5, "min_nodes": 1, "max_nodes": 3,
        "generation": {"number": 2, "members": [{"name": "a1"}, {"name": "a2"}]},
        "waiting": {"why": "below_min", "have": 1, "need": 2, "text": "1 of 2 agents"},
    }  # fmt: skip
    served.service.jobs = {"j1": running, "j2": {"id": "j2", "name": "two", "phase": "COMPLETED"}}
    assert muster_json("job", "list") == [running]
    assert len(muster_json("job", "list", "--all")) == 2
    header, row = muster("job", "list").stdout.splitlines()
    assert header.split()[:3] == ["JOB", "NAME", "PHASE"]
    for part in ("j1", "one", "RUNNING", "12/40", "3.2500", "1,234", "2 of 1:3", "1 of 2 agents"):
        assert part in row


FETCHING = {
    "id": "j1", "name": "one", "phase": "RECOVERING", "committed_step": 12, "steps_total": 40,
    "fetching": [{"agent": "ag1", "name": "lab", "ready": True, "bytes": 2**20, "of_bytes": 2**21}],
}  # fmt: skip


def test_show_says_what_its_agents_are_fetching(muster, served: Served) -> None:
    served.service.jobs = {"j1": FETCHING}
    assert "fetching  lab 50 % of 2.0 MiB\n" in muster("job", "show", "one").stdout


def test_who_waits_on_a_terminal_sees_bars_of_the_steps_and_of_what_is_fetched() -> None:
    terminal = io.StringIO()
    with shown(Console(file=terminal, force_terminal=True, width=100)) as show:
        show(FETCHING)
        show(FETCHING | {"fetching": [], "committed_step": 13})
    drawn = terminal.getvalue()
    for part in ("RECOVERING", "step 12 of 40", "lab fetches", "1.0 MiB of 2.0 MiB", "step 13 of 40"):
        assert part in drawn
    pipe = io.StringIO()
    with shown(Console(file=pipe)) as show:
        show(FETCHING)
    assert pipe.getvalue() == ""


def test_show_names_the_members_in_rank_order(muster, muster_json, served: Served) -> None:
    view = {
        "id": "j1",
        "name": "one",
        "phase": "RUNNING",
        "generation": {"members": [{"name": "b"}, {"name": "a"}]},
    }
    served.service.jobs = {"j1": view}
    assert muster_json("job", "show", "j") == view
    assert "members  b, a\n" in muster("job", "show", "one").stdout


@pytest.mark.parametrize(
    ("command", "phase"),
    [
        ("pause", "PAUSED"),
        ("resume", "GATHERING"),
        ("stop", "STOPPING"),
        ("cancel", "CANCELLED"),
        ("checkpoint", "RUNNING"),
    ],
)
def test_a_command_reaches_the_job_and_shows_its_new_phase(
    muster_json, served: Served, command: str, phase: str
) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": "RUNNING"}}
    assert muster_json("job", command, "one")["phase"] == phase
    assert (
        admin_pb2.JobCommandKind.Name(served.service.requests[0].kind)
        == f"JOB_COMMAND_KIND_{command.upper()}"
    )


def test_a_command_in_the_wrong_phase_is_refused(muster, served: Served) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": "COMPLETED"}}
    result = muster("job", "pause", "one")
    assert (result.exit_code, error_line(result)) == (
        4,
        "muster: refused (WRONG_PHASE): the job is COMPLETED",
    )


def test_scale_sends_both_bounds(muster_json, served: Served) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": "RUNNING"}}
    view = muster_json("job", "scale", "one", "2:8")
    assert (view["min_nodes"], view["max_nodes"]) == (2, 8)


def test_rollback_names_a_checkpoint_of_the_job(muster, muster_json, served: Served) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": "RECOVERING"}}
    for target in ("7", "one@7"):
        assert muster_json("job", "rollback", "one", "--to", target)["rollback"]["to_step"] == 7
    assert muster("job", "rollback", "one", "--to", "7").stdout == "j1  RECOVERING  goes on from step 7\n"


@pytest.mark.parametrize(("phase", "status"), [("COMPLETED", 0), ("FAILED", 5), ("CANCELLED", 5)])
def test_wait_ends_with_a_status_for_the_jobs_end(muster, served: Served, phase: str, status: int) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": phase, "detail": "the worker raised"}}
    result = muster("job", "wait", "one", "-o", "json")
    assert result.exit_code == status
    assert json.loads(result.stdout)["phase"] == phase
    assert ("the worker raised" in result.stderr) == (status == 5)


def test_an_interrupted_wait_exits_130_in_one_line(served: Served) -> None:
    served.service.jobs = {"j1": {"id": "j1", "name": "one", "phase": "RUNNING"}}
    with subprocess.Popen(
        [sys.executable, "-m", "coordinator.admin.cli", "job", "wait", "one"],
        env={**os.environ, "MUSTER_IDENTITY": str(served.identity_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert served.service.asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, "", "muster: interrupted")


def event(sequence: int) -> admin_pb2.Event:
    return admin_pb2.Event(
        sequence=sequence,
        unix_ms=1_700_000_000_000,
        kind="AgentLost",
        json='{"agent_id":"x"}',
        text=f"event {sequence}",
    )


def json_lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_events_are_one_json_object_a_line(muster, served: Served) -> None:
    served.service.events = [event(1), event(2)]
    found = json_lines(muster("job", "events", "-o", "json"))
    assert [entry["sequence"] for entry in found] == [1, 2]
    assert found[0]["record"] == {"agent_id": "x"}


def test_followed_events_resume_after_a_break_without_repeating(muster, served: Served) -> None:
    served.service.events = [event(number) for number in range(1, 6)]
    served.service.stream_breaks = 1
    result = muster("job", "events", "-f", "-o", "json")
    assert [entry["sequence"] for entry in json_lines(result)] == [1, 2, 3, 4, 5]
    assert "reconnecting" in result.stderr


def test_followed_logs_start_with_the_tail_and_resume_by_sequence(muster, served: Served) -> None:
    served.service.lines = [
        admin_pb2.LogLine(sequence=n, agent_id="agent-1", line=f"line {n}") for n in range(1, 7)
    ]
    served.service.stream_breaks = 1
    result = muster("job", "logs", "one", "-f", "--tail", "3")
    assert result.exit_code == 0
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["4", "5", "6"]
    assert [(request.after_sequence, request.tail) for request in served.service.requests] == [(0, 3), (4, 0)]


def test_steps_carry_the_digest_as_text_and_evaluations_their_kind(muster, served: Served) -> None:
    served.service.steps = [
        agent_pb2.StepRecord(step=n, loss=5.0 / n, slices=8, data_digest=2**63 + n, tokens=1024, generation=1)
        for n in (1, 2)
    ]
    served.service.evaluations = [agent_pb2.Evaluation(step=2, loss=2.5)]
    found = json_lines(muster("job", "steps", "one", "-o", "json"))
    assert [(entry["type"], entry["step"]) for entry in found] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
    ]
    assert found[0]["data_digest"] == str(2**63 + 1)
    assert found[2]["loss"] == 2.5
