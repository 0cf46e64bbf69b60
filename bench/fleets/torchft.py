"""torchft from PyPI: a Lighthouse, and one replica group of one process per member.

torchft is no dependency of Muster.  It is installed once into a virtual environment under the user's
cache, which sees this environment's torch.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from bench.fleets.fleet import REPOSITORY, Fleet, Shape, free_port, wait_for_port
from bench.report import progress

VERSION = "0.2.0"


def environment_home() -> Path:
    """Where the virtual environment is made: one for each torchft and each Python environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"torchft-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "muster-bench" / name


@functools.cache
def install() -> tuple[Path, str]:
    """The environment's bin directory and why torchft cannot be used (empty if it can).

    Makes and fills the environment if it is not there; needs a package index then.
    """
    home = environment_home()
    python = home / "bin" / "python"
    check = [str(python), "-c", "import torch, torchft"]
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        # A virtual environment made from one sees only the base's packages, so name ours in a .pth;
        # rewritten each time, as another checkout may share the cache.
        site = home / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        if subprocess.run(check, check=False, capture_output=True).returncode != 0:
            progress(f"installing torchft {VERSION} into {home}")
            pip = [str(python), "-m", "pip", "install", "--quiet", f"torchft=={VERSION}"]
            subprocess.run(pip, check=True, capture_output=True, timeout=300)
        subprocess.run(check, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        last = output.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        return home / "bin", f"torchft {VERSION} cannot be installed here: {last[0]}"
    return home / "bin", ""


class Torchft(Fleet):
    """As its README and example set it: heartbeats expire after 5 s, collectives time out after 5 s.
    The example's hook is patched (see torchft_train.py), without which survivors crash."""

    system = "torchft"
    has_agents = False
    note = "hook patched; one process is agent and worker"
    lighthouse: tuple[str, ...] = ("--join_timeout_ms=10000", "--quorum_tick_ms=100")
    member: tuple[str, ...] = ()

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._bin, _ = install()
        self._port = free_port()
        self._lighthouse: subprocess.Popen[bytes] | None = None

    @staticmethod
    def unavailable() -> str:
        return install()[1]

    def start_coordinator(self) -> None:
        argv = [
            str(self._bin / "torchft_lighthouse"),
            f"--min_replicas={self.shape.min_world}",
            f"--bind=127.0.0.1:{self._port}",
            *self.lighthouse,
        ]
        self._lighthouse = self.park.start("lighthouse", argv)
        wait_for_port(self._port, self._lighthouse)

    def kill_coordinator(self) -> None:
        assert self._lighthouse is not None
        self._lighthouse.kill()
        self._lighthouse.wait()

    def launch(self, index: int) -> subprocess.Popen[bytes]:
        argv = [
            *(str(self._bin / "python"), "-m", "bench.baselines.torchft_train"),
            f"--lighthouse=http://127.0.0.1:{self._port}",
            f"--replica=bench_{index}",
            f"--min-replicas={self.shape.min_world}",
            f"--delay-ms={self.shape.step_delay_ms}",
            f"--seed={self.shape.seed}",
            *self.member,
            *self.tuning(),
        ]
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "MUSTER_STEP_TRACE": str(self.trace.path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return self.park.start(f"member-{index}", argv, environment)

    def tuning(self) -> tuple[str, ...]:
        """Options of a member that follow from the shape."""
        return ()


class TorchftTuned(Torchft):
    """Heartbeats as short as a quiet machine bears; collectives fail after the silence budget."""

    system = "torchft-tuned"
    note = "heartbeat 25 ms, dead after 150 ms, tick 10 ms; collectives fail after the silence budget; hook patched"
    lighthouse = ("--join_timeout_ms=1000", "--quorum_tick_ms=10", "--heartbeat_timeout_ms=150")
    member = ("--heartbeat-ms=25",)

    def tuning(self) -> tuple[str, ...]:
        return (f"--timeout-s={self.shape.silence_s}",)
