"""`muster local` with a real coordinator, real agents and real training; and how a run is judged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from coordinator.admin.local import LiveProgress, Progress, Run, judge
from coordinator.admin.submission import read_job_file

MUSTER = [sys.executable, "-m", "coordinator.admin.cli"]


def steps(losses: list[float]) -> list[dict[str, Any]]:
    return [{"step": number, "loss": loss} for number, loss in enumerate(losses, start=1)]


def test_a_falling_loss_over_every_step_once_has_no_problem() -> None:
    assert judge(steps([5.0 - n / 10 for n in range(20)]), 20) == []


@pytest.mark.parametrize(
    ("log", "total", "named"),
    [
        (steps([5.0, 4.0, 3.0]), 4, "missing [4]"),
        ([*steps([5.0, 4.0]), {"step": 2, "loss": 3.0}], 2, "repeated [2]"),
        (list(reversed(steps([5.0, 4.0, 6.0]))), 3, "not 1 to 3"),
        (steps([5.0] * 20), 20, "did not fall: 5.0000"),
        (steps([5.0] * 10 + [4.9] * 10), 20, "did not fall"),
        (steps([5.0, float("nan")]), 2, "did not fall"),
        ([], 3, "no step"),
    ],
)
def test_a_run_that_proves_nothing_is_a_failure(log: list[dict[str, Any]], total: int, named: str) -> None:
    assert named in "; ".join(judge(log, total))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A job that learns to repeat a sentence within a few dozen steps."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    spec = {
        "name": "fox",
        "data": {"text": str(tmp_path / "text.txt")},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
        "train": {
            "steps": 60, "slices_per_step": 2, "slice_sequences": 4, "lr": 0.01, "device": "cpu", "step_delay_ms": 50,
        },
        "checkpoint": {"every_steps": 20},
        "elastic": {"min_nodes": 1, "max_nodes": 2, "last_call": "1s", "min_generation": "200ms"},
    }  # fmt: skip
    path = tmp_path / "fox.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize(("kind", "terminal"), [(Progress, False), (LiveProgress, True)])
def test_the_progress_view_shows_the_jobs_state_and_what_happened(
    config: Path, kind: type[Progress], terminal: bool
) -> None:
    run = Run(
        submission=read_job_file(config),
        agent_count=2,
        kill_after_s=None,
        rejoin_after_s=None,
        limit_s=60,
        device="cpu",
    )
    run.job = {
        "phase": "RECOVERING",
        "detail": "agent a2 lost: session closed + peer collective",
        "generation": {"number": 3, "members": [{"name": "a1"}, {"name": "a2"}]},
        "committed_step": 30,
        "loss": 2.5,
        "tokens_per_s": 1234.0,
    }
    run.notes.append("killed agent a2 [with SIGKILL]")
    text = io.StringIO()
    progress = kind(Console(file=text, force_terminal=terminal, width=120, color_system=None))
    with progress.live if isinstance(progress, LiveProgress) else contextlib.nullcontext():
        progress.update(run, list(run.notes))
    for part in ("RECOVERING", "3", "a1 a2", "30/60", "2.5000", "1,234", "peer collective", "[with SIGKILL]"):
        assert part in text.getvalue()


def environment(tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "t"
    temporary.mkdir()
    return {
        **os.environ,
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.mark.e2e
def test_a_fleet_that_loses_an_agent_completes_and_leaves_its_results(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(*MUSTER, "local", str(config), "--agents", "2", "--kill-after", "1s", "--rejoin-after", "0s"),
            *("--out", str(out), "--limit", "2m", "-o", "json"),
        ],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(log.read_text() for log in sorted((out / "logs").glob("*.log")))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    summary = json.loads(done.stdout)
    assert (summary["phase"], summary["steps"], summary["problems"]) == ("COMPLETED", 60, [])
    assert summary["killed"] in {"a1", "a2"}
    assert "started agent a3" in done.stderr
    assert summary["last_loss"] < summary["first_loss"]
    assert "killed agent" in done.stderr
    entries = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["type"] == "step"] == list(range(1, 61))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("The ")
    assert json.loads((out / "summary.json").read_text()) == summary
    assert not list((tmp_path / "t").glob("muster-*"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_outlives_muster_local(
    config: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with subprocess.Popen(
        [*MUSTER, "local", str(config), "--agents", "1", "--set", "train.steps=100000"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if "phase RUNNING" in line:
                break
        else:
            pytest.fail("".join(shown))
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("trainer.train" in " ".join(member.cmdline()) for member in family)
        process.send_signal(number)
        process.stdout.read()
        assert process.wait() == status
    _, left = psutil.wait_procs(family, timeout=20)
    for member in left:  # so that a failure leaves nothing either
        member.kill()
    assert left == []
    if number is not signal.SIGKILL:
        assert not list((tmp_path / "t").glob("muster-*"))
