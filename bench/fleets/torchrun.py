"""torchrun with its c10d rendezvous, as it comes, made to restart, and with everything tuned."""

from __future__ import annotations

import subprocess
import sys

from bench.fleets.fleet import REPOSITORY, Fleet, Shape, free_port, wait_for_port

CHECKPOINT_EVERY_STEPS = 50


class Torchrun(Fleet):
    """The c10d rendezvous' defaults, with what it needs to survive anything at all: restarts, a
    fresh store per restart, and a host for the rendezvous that is not one of the agents."""

    system = "torchrun"
    limit_s = 60.0
    note = (
        f"restarts on, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; checkpoint every {CHECKPOINT_EVERY_STEPS} steps"
    )
    options: tuple[str, ...] = ("--max-restarts=1000",)
    rendezvous: dict[str, object] = {}  # noqa: RUF012 - never changed
    environment: dict[str, str] = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # noqa: RUF012
    tuned = False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._port = free_port()
        self._store: subprocess.Popen[bytes] | None = None

    def start_coordinator(self) -> None:
        argv = [sys.executable, "-m", "bench.baselines.rendezvous_store", f"--port={self._port}"]
        self._store = self.park.start("store", argv, {"PYTHONPATH": str(REPOSITORY)})
        wait_for_port(self._port, self._store)

    def kill_coordinator(self) -> None:
        assert self._store is not None
        self._store.kill()
        self._store.wait()

    def launch(self, index: int) -> subprocess.Popen[bytes]:
        conf = ",".join(f"{key}={value}" for key, value in {"is_host": "false", **self.rendezvous}.items())
        argv = [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes={self.shape.min_world}:{self.shape.world}",
            *("--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=bench", "--local-addr=127.0.0.1"),
            f"--rdzv-endpoint=127.0.0.1:{self._port}",
            f"--rdzv-conf={conf}",
            *self.options,
            *("-m", "bench.baselines.torchrun_train"),
            f"--checkpoint={self.home / 'checkpoint.safetensors'}",
            f"--every-steps={CHECKPOINT_EVERY_STEPS}",
            f"--delay-ms={self.shape.step_delay_ms}",
            f"--seed={self.shape.seed}",
            *([f"--collective-timeout-s={self.shape.silence_s}"] if self.tuned else []),
        ]
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "MUSTER_STEP_TRACE": str(self.trace.path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **self.environment,
        }
        return self.park.start(f"member-{index}", argv, environment)


class TorchrunPlain(Torchrun):
    """No option beyond what torchrun needs to find its peers: the job is expected to die."""

    system = "torchrun-plain"
    note = "all defaults: no restarts, shared store"
    options = ()
    environment = {}  # noqa: RUF012


class TorchrunTuned(Torchrun):
    """Every timeout that torchrun has, as short as it takes whole seconds."""

    system = "torchrun-tuned"
    note = (
        "monitor 0.1 s, keep-alive 1 s × 3, last call 1 s, shutdown timeout 1 s, collectives fail after "
        f"the silence budget; checkpoint every {CHECKPOINT_EVERY_STEPS} steps"
    )
    options = ("--max-restarts=1000", "--monitor-interval=0.1", "--shutdown-timeout=1")
    rendezvous = {  # noqa: RUF012
        "last_call_timeout": 1,
        "close_timeout": 2,
        "heartbeat_timeout": 1,
        "keep_alive_interval": 1,
        # Not 2: a keep-alive is late by up to one interval, and a node that finds itself expired in its own
        # copy of the state never sends another (a later joiner then waits for ever).
        "keep_alive_max_attempt": 3,
        "read_timeout": 5,
    }
    tuned = True
