"""The script without a coordinator: alone, and under torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.fleet import REPOSITORY, job, make_dataset
from trainer.checkpoint import CheckpointDirectory

ALONE = [sys.executable, "-m", "trainer.train"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer.train",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def spec_file(tmp_path: Path, data: Path, *, steps: int, **train: Any) -> Path:
    spec = job(data, steps=steps, log_every=1, **train)
    spec["checkpoint"] = {"every_steps": 5, "dir": str(tmp_path / "out"), "keep": 2, "shard_bytes": "64KiB"}
    path = tmp_path / f"{steps}.json"
    path.write_text(json.dumps(spec))
    return path


def environment() -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run(command: list[str], path: Path) -> tuple[int, dict[int, float], str]:
    """Exit status, printed losses, and everything it printed."""
    done = subprocess.run(
        [*command, str(path)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    return done.returncode, losses(done.stdout), done.stdout + done.stderr


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+  loss ([\d.]+)", text)}


def test_alone_it_trains_checkpoints_evaluates_and_resumes_at_another_world_size(
    tmp_path: Path, data: Path
) -> None:
    path = spec_file(tmp_path, data, steps=12, eval_every=6, eval_slices=3)
    (tmp_path / "whole").mkdir()
    code, whole, text = run(ALONE, spec_file(tmp_path / "whole", data, steps=12))
    assert code == 0, text
    code, alone, text = run(ALONE, path)
    assert code == 0, text
    assert alone == whole
    assert list(alone) == list(range(1, 13))
    assert alone[12] < alone[1]
    assert len(re.findall("validation loss", text)) == 2
    directory = CheckpointDirectory(tmp_path / "out")
    assert [m.step for m in directory.manifests()] == [12, 10], "the newest two are kept"
    # The job goes on at step 10 on two ranks, as if nothing had happened.
    (tmp_path / "out" / "manifests" / "12.json").unlink()
    code, two, text = run(TORCHRUN, path)
    assert code == 0, text
    assert "resuming after step 10" in text
    assert two == pytest.approx({11: alone[11], 12: alone[12]}, rel=1e-4)
    restored = directory.manifest(12)
    directory.verify(restored)
    assert restored.header["tokens"] == 12 * 5 * 2 * 32


def test_terminated_it_saves_at_a_step_and_leaves(tmp_path: Path, data: Path) -> None:
    path = spec_file(tmp_path, data, steps=10_000, step_delay_ms=20)
    with subprocess.Popen(
        [*ALONE, str(path)], cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 7/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(60) == 0
    last = max(losses(rest), default=7)
    assert CheckpointDirectory(tmp_path / "out").manifest().step == last


def test_a_bad_job_file_is_one_message_and_status_2(tmp_path: Path, data: Path) -> None:
    path = spec_file(tmp_path, data, steps=10, lr=-1.0)
    code, _, text = run(ALONE, path)
    assert code == 2
    assert "train.lr" in text
    assert "Traceback" not in text
