"""Muster itself: `musterd`, one `muster-agent` per member over real TLS, their workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench.fleets.fleet import REPOSITORY, Fleet, FleetError, Shape, free_port
from bench.job import job_file

_BIN = Path(sys.executable).parent


class Muster(Fleet):
    """Settings beside the shape: joiners are not kept waiting for company, and an agent that the
    benchmark has killed thrice is not quarantined for flapping."""

    system = "muster"
    note = "lease = the silence budget; no cool-down for flapping"
    steps = 10_000_000

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.job_id = ""
        self._addresses = {part: f"127.0.0.1:{free_port()}" for part in ("main", "enroll", "metrics")}
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._token = ""
        self._run(str(_BIN / "musterd"), "init", str(self._home))
        config = {
            "listen": self._addresses,
            "lease": shape.silence_s,
            "timing": {"quarantine_base": "1ms", "quarantine_max": "1ms", "forgive": "1ms"},
        }
        (self.home / "coordinator.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    @property
    def _home(self) -> Path:
        return self.home / "coordinator"

    def start_coordinator(self) -> None:
        ready = self._home / "run" / "addresses.json"
        ready.unlink(missing_ok=True)
        argv = [str(_BIN / "musterd"), "serve", "--config", str(self.home / "coordinator.yaml")]
        self._coordinator = self.park.start("musterd", [*argv, "--home", str(self._home)])
        deadline = time.monotonic() + 30
        while not ready.exists():
            if self._coordinator.poll() is not None or time.monotonic() > deadline:
                raise FleetError(f"musterd does not serve; its output:\n{self.park.log_tail('musterd')}")
            time.sleep(0.02)

    @property
    def coordinator_pid(self) -> int:
        """While it runs."""
        assert self._coordinator is not None
        return self._coordinator.pid

    def kill_coordinator(self) -> None:
        assert self._coordinator is not None
        self._coordinator.kill()
        self._coordinator.wait()

    def launch(self, index: int) -> subprocess.Popen[bytes]:
        if not self._token:
            self._token = str(self._muster("token", "create", "--uses", "10000")["token"])
        name = f"member-{index}"
        argv = [
            *(str(_BIN / "muster-agent"), "join", "--token", self._token),
            *("--home", str(self.home / name), "--name", name, "--advertise", "127.0.0.1"),
            *("--confine", self.shape.confine),
            *self.placement(index),
            self._addresses["enroll"],
        ]
        environment = {
            "MUSTER_STEP_TRACE": str(self.trace.path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            # Ranks that share a card must look like ranks of several hosts, or NCCL refuses them.
            "NCCL_HOSTID": f"bench-{index}",
            "NCCL_NVLS_ENABLE": "0",
        }
        if self.shape.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return self.park.start(name, argv, environment)

    def placement(self, index: int) -> tuple[str, ...]:
        """Which card member `index` lends: they take turns."""
        if self.shape.device == "cpu":
            return ()
        return ("--gpus", str(index % self.shape.cards))

    def job(self) -> dict[str, Any]:
        """The job file that is submitted."""
        return job_file(
            name="bench",
            steps=self.steps,
            step_delay_ms=self.shape.step_delay_ms,
            seed=self.shape.seed,
            device=self.shape.device,
            elastic={
                "min_nodes": self.shape.min_world,
                "max_nodes": self.shape.world,
                "last_call": "200ms",
                "min_generation": "200ms",
                "step_timeout": "30s",
            },
            data={"path": str(self.home / "data")},
        )

    def begin(self) -> None:
        sources = sorted(str(path) for path in (REPOSITORY / "bench").glob("*.py"))
        prepare = [sys.executable, "-m", "trainer.prepare", "--tokenizer", "byte", "--text", *sources]
        self._run(*prepare, "--out", str(self.home / "data"))
        path = self.home / "job.yaml"
        path.write_text(yaml.safe_dump(self.job()), encoding="utf-8")
        self.job_id = str(self._muster("job", "submit", str(path))["job_id"])

    def command(self, verb: str) -> None:
        """`muster job VERB` for the job."""
        self._muster("job", verb, self.job_id)

    def _muster(self, *arguments: str) -> Any:
        identity = ("--identity", str(self._home / "admin.json"), "--address", self._addresses["main"])
        return json.loads(self._run(str(_BIN / "muster"), *identity, *arguments, "-o", "json"))

    def _run(self, *argv: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            raise FleetError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}{done.stdout}")
        return done.stdout
