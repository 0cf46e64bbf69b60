from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.processes import Park

ORPHANING = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
print(child.pid, flush=True)
os._exit(0)
"""


def wait_for_line(park: Park, name: str) -> str:
    deadline = time.monotonic() + 30
    while not (text := park.log_tail(name)).strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return text.strip()


def test_orphans_in_sessions_of_their_own_are_killed_too(tmp_path: Path) -> None:
    with Park(tmp_path) as park:
        parent = park.start("parent", [sys.executable, "-c", ORPHANING])
        orphan = psutil.Process(int(wait_for_line(park, "parent")))
        parent.wait(30)
        assert orphan.is_running()
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_stopped_processes_are_killed_too(tmp_path: Path) -> None:
    with Park(tmp_path) as park:
        process = park.start("stopped", [sys.executable, "-c", "import signal; signal.pause()"])
        psutil.Process(process.pid).suspend()
    assert process.returncode == -9


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        with Park(tmp_path) as park:
            park.start("ours", [sys.executable, "-c", "import signal; signal.pause()"])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.1)
    finally:
        other.kill()
        other.wait()
