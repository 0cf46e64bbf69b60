"""A program in a worker's place that looks around and prints what it could reach, as one line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

looked_for: dict[str, str] = json.loads(sys.argv[1])


def tried(act: Callable[[], Any]) -> str:
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return "done"


def descriptors() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(path.readlink()))
    return [one for one in found if not one.startswith("/proc/")]


seen = {
    "environment": dict(os.environ),
    "descriptors": descriptors(),
    "leads its group": os.getpgid(0) == os.getpid(),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "no new privileges": "NoNewPrivs:\t1" in Path("/proc/self/status").read_text(),
    "read": tried(lambda: Path(looked_for["secret"]).read_bytes()),
    "write": tried(lambda: Path(looked_for["outside"]).write_text("x")),
    "signal": tried(lambda: os.kill(os.getppid(), signal.SIGCONT)),
    "parent's memory": tried(lambda: open(f"/proc/{os.getppid()}/mem", "rb").close()),
    "another process": tried(lambda: Path(f"/proc/{os.getppid()}/oom_score_adj").write_text("1000")),
    "own threads": tried(lambda: Path(f"/proc/self/task/{os.getpid()}/comm").write_text("nosy")),
    "own blob": tried(lambda: Path("cache/blobs/own").write_text("x")),
    "own trace": tried(lambda: Path(os.environ["MUSTER_STEP_TRACE"]).write_text("x")),
    "temporary": tempfile.gettempdir(),
    "shared memory": tried(lambda: tempfile.TemporaryFile(dir="/dev/shm").close()),
}
print(json.dumps(seen), flush=True)
