"""What a real worker process can have and reach, with and without Landlock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from agent import launch
from agent.confinement import OPEN_FILES, Launch, _code, clean_environment, confines
from agent.errors import BadInput
from agent.home import Home
from agent.workers import Exit, Worker

CONFINED_RANK = str(Path(__file__).with_name("confined_rank.py"))
NOSY = str(Path(__file__).with_name("nosy_worker.py"))
LANDLOCK = pytest.mark.skipif(launch.landlock_version() == 0, reason="this kernel has no Landlock")
TRUSTED = {
    "PATH": "/usr/bin", "HOME": "/home/v", "LANG": "C.UTF-8", "LC_ALL": "C", "NCCL_HOSTID": "h1",
    "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "CUDA_CACHE_PATH": "/c",
    "MUSTER_STEP_TRACE": "/t/trace", "PYTHONPATH": "/src",
}  # fmt: skip
SECRET = {
    "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "s", "GITHUB_TOKEN": "s", "HF_TOKEN": "s", "MUSTER_TOKEN": "s",
    "MUSTER_IDENTITY": "/i", "MUSTER_AGENT_HOME": "/h", "SSH_AUTH_SOCK": "/s", "DATABASE_URL": "s", "LD_PRELOAD": "/x",
    "TORCH_HUB_TOKEN": "s", "NVIDIA_API_KEY": "s", "PYTHONSTARTUP": "/p", "WANDB_API_KEY": "s", "KUBECONFIG": "/k",
}  # fmt: skip


def test_workers_get_what_training_needs_of_the_agents_environment_and_no_secret() -> None:
    assert clean_environment({**TRUSTED, **SECRET}) == TRUSTED


async def seen_by_a_worker(home: Home, tmp_path: Path, *, confined: bool) -> dict[str, Any]:
    """Start the nosy worker as a job's and return what it saw."""
    home.prepare()
    (home.root / "identity.json").write_text("a private key")
    trace = tmp_path / "traces" / "trace"
    trace.parent.mkdir()
    start = Launch(files=home.job("j1"), blobs=home.blobs, confined=confined)
    environment = start.environment(
        clean_environment({**os.environ, **SECRET, "MUSTER_STEP_TRACE": str(trace)})
    )
    looked_for = {"secret": str(home.root / "identity.json"), "outside": str(tmp_path / "outside")}
    command = (sys.executable, NOSY, json.dumps(looked_for))
    lines: list[str] = []
    ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    worker = Worker(
        0,
        heard=lambda *_: None,
        wrote=lambda _, line: lines.append(line),
        ended=lambda _, end: ended.set_result(end),
    )
    leaked = os.open(looked_for["secret"], os.O_RDONLY)
    os.set_inheritable(leaked, True)  # as a library might leave it
    try:
        await worker.start(
            start.command(command, environment),
            environment,
            socket=home.run / "w0.sock",
            directory=start.files.root,
            log=start.files.log(0),
        )
        end = await ended
    finally:
        os.close(leaked)
    assert end.status == 0, end.detail
    found: dict[str, Any] = json.loads("".join(lines))
    return found


def check_limits(seen: dict[str, Any]) -> None:
    assert not SECRET.keys() & seen["environment"].keys()
    assert [one for one in seen["descriptors"] if one.startswith("/") and one != "/dev/null"] == []
    assert seen["leads its group"]
    assert seen["no new privileges"]
    assert seen["core"] == [0, 0]
    assert seen["files"][1] <= OPEN_FILES
    assert (seen["own blob"], seen["own trace"], seen["shared memory"]) == ("done", "done", "done")


@LANDLOCK
async def test_a_confined_worker_reaches_its_job_and_nothing_of_its_host(home: Home, tmp_path: Path) -> None:
    seen = await seen_by_a_worker(home, tmp_path, confined=True)
    check_limits(seen)
    assert seen["own threads"] == "done"  # without it CUDA does not start
    for what in ("read", "write", "signal", "parent's memory", "another process"):
        assert seen[what] == "PermissionError", what
    assert not (tmp_path / "outside").exists()
    assert seen["temporary"] == str(home.job("j1").temporary)


async def test_a_worker_that_is_not_confined_has_its_limits_all_the_same(home: Home, tmp_path: Path) -> None:
    seen = await seen_by_a_worker(home, tmp_path, confined=False)
    check_limits(seen)
    assert (seen["read"], seen["write"]) == ("done", "done")


def test_confinement_that_is_required_and_impossible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "landlock_version", lambda: 0)
    assert not confines("auto")
    assert not confines("off")
    with pytest.raises(BadInput, match="no Landlock"):
        confines("require")


def test_workers_are_confined_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "landlock_version", lambda: 4)
    assert confines("auto")
    assert confines("require")
    assert not confines("off")


@LANDLOCK
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(300)
def test_confined_workers_compile_and_join_one_group_with_nccl(home: Home) -> None:
    home.prepare()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with contextlib.ExitStack() as ranks:
        started = []
        for rank in range(2):
            start = Launch(files=home.job("j1"), blobs=home.blobs, confined=True)
            settings = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
            environment = start.environment(clean_environment({**os.environ, **settings}))
            command = (sys.executable, CONFINED_RANK, str(rank), "2", str(store.port), "compile")
            process = subprocess.Popen(
                start.command(command, environment),
                env=environment,
                cwd=start.files.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            ranks.enter_context(process)
            ranks.callback(process.kill)
            started.append(process)
        for process in started:
            said, complaint = process.communicate()
            assert (process.returncode, said) == (0, "1.0\n"), complaint


def test_the_agents_own_environment_is_closed_to_others_of_its_user() -> None:
    code = "import ctypes; from agent.confinement import hide; hide(); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_confined_worker_may_read_every_file_of_ours_that_it_imports() -> None:
    code = "import sys, trainer.train, trainer.elastic; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    allowed = _code((), {})
    found = [Path(file) for file in done.stdout.split()]
    for file in (file for file in found if file.is_absolute()):  # torch gives some modules no real name
        assert any(file.is_relative_to(place) for place in allowed), file
