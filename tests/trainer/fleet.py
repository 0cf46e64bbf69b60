"""Real workers under a fake agent: the test hosts the stores and speaks the control protocol."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch._C._distributed_c10d import TCPStore

from trainer import control

REPOSITORY = Path(__file__).parents[2]
M = TypeVar("M", bound=control.Up)


def make_dataset(directory: Path, tokens: int = 60_000) -> Path:
    """Bytes with enough order in them that a loss falls."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, size=rng.integers(2, 8)) for _ in range(50)]
    stream = np.concatenate([np.append(words[i], 32) for i in rng.integers(0, 50, size=tokens // 4)])
    (directory / "blobs").mkdir(parents=True)
    splits = {}
    for name, part in (("train", stream[: tokens - 4000]), ("val", stream[tokens - 4000 : tokens])):
        raw = part.astype("<u2").tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        (directory / "blobs" / digest).write_bytes(raw)
        splits[name] = [{"digest": digest, "tokens": len(part)}]
    manifest = {
        "format": "muster-dataset-1",
        "name": "words",
        "dtype": "uint16",
        "tokenizer": {"kind": "byte", "vocab_size": 256, "digest": None},
        "splits": splits,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))
    return directory


def job(data: Path, *, steps: int = 20_000, **train: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "data": {"path": str(data)},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.1},
        "train": {
            "steps": steps,
            "slices_per_step": 5,
            "slice_sequences": 2,
            "seq_len": 32,
            "seed": 7,
            "lr": 3e-3,
            "device": "cpu",
            "dtype": "float32",
            "collective_timeout": 600,
            **train,
        },
        "checkpoint": {"every_steps": 100_000, "shard_bytes": "64KiB"},
    }


class Worker:
    """One worker process and the agent's end of its socket."""

    def __init__(
        self, home: Path, name: str, spec: Mapping[str, Any], fault: str, bell: threading.Condition
    ) -> None:
        self.name = name
        self.home = home / name
        self.home.mkdir()
        self.cache = self.home / "cache"
        self.messages: list[control.Up] = []
        self.times: list[float] = []
        self._bell = bell
        job_file = self.home / "job.json"
        job_file.write_text(json.dumps(spec))
        listener = socket.socket(socket.AF_UNIX)
        path = self.home / "control.sock"
        listener.bind(str(path))
        listener.listen(1)
        self.log = self.home / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.trainer.worker", "--job", str(job_file)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "MUSTER_CONTROL": str(path),
                    "MUSTER_CACHE": str(self.cache),
                    "MUSTER_DATA": spec["data"]["path"],
                    "MUSTER_PARENT_PID": str(os.getpid()),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "lo",
                    # Several NCCL ranks on one card: each is a host of its own, as volunteers are.
                    "NCCL_HOSTID": name,
                    "NCCL_SOCKET_IFNAME": "lo",
                    "FAULT": fault,
                },
            )
        self._listener = listener
        self._connected = threading.Event()
        self._socket: socket.socket
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._listener:
            self._socket, _ = self._listener.accept()
        self._connected.set()
        with self._socket, self._socket.makefile("rb") as lines:
            try:
                for line in lines:
                    message = control.decode(line)
                    with self._bell:
                        self.messages.append(message)
                        self.times.append(time.monotonic())
                        self._bell.notify_all()
            except OSError:
                pass
        with self._bell:
            self._bell.notify_all()

    def tell(self, message: control.Down) -> None:
        assert self._connected.wait(60)
        self._socket.sendall(control.encode(message))

    def all(self, kind: type[M]) -> list[M]:
        with self._bell:
            return [message for message in self.messages if isinstance(message, kind)]

    def losses(self) -> dict[int, float]:
        return {step.step: step.loss for step in self.all(control.Step)}

    @property
    def step(self) -> int:
        return max((step.step for step in self.all(control.Step)), default=0)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._thread.join(30)


class Fleet:
    """What coordinator and agents are in life: starts workers, hands out plans, waits for reports."""

    def __init__(self, home: Path, spec: Mapping[str, Any]) -> None:
        self.home = home
        self.spec = spec
        self.bell = threading.Condition()
        self.workers: list[Worker] = []
        self.stores: list[TCPStore] = []
        self.generation = 0
        self.pings = 0

    def start(self, count: int, faults: Sequence[str] = ()) -> list[Worker]:
        """`count` new workers, warm."""
        made = [
            Worker(
                self.home,
                f"w{len(self.workers) + i}",
                self.spec,
                faults[i] if i < len(faults) else "",
                self.bell,
            )
            for i in range(count)
        ]
        self.workers += made
        for worker in made:
            self.wait(lambda worker=worker: worker.all(control.Warm), f"{worker.name} to be warm")
        return made

    def wait(self, predicate: Callable[[], object], what: str, timeout_s: float = 150.0) -> None:
        with self.bell:
            if self.bell.wait_for(predicate, timeout=timeout_s):
                return
        self.show_stacks()
        logs = "\n".join(f"--- {w.name} ({w.process.poll()})\n{w.log.read_text()}" for w in self.workers)
        raise AssertionError(f"waited {timeout_s:g} s for {what}\n{logs}")

    def show_stacks(self, patience_s: float = 2.0) -> None:
        """Have every living worker write its threads' stacks to its log."""
        living = {w: w.log.stat().st_size for w in self.workers if w.process.poll() is None}
        for worker in living:
            worker.signal(signal.SIGUSR1)
        deadline = time.monotonic() + patience_s  # a stopped worker writes nothing
        while time.monotonic() < deadline and any(w.log.stat().st_size == n for w, n in living.items()):
            time.sleep(0.05)

    def wait_step(self, workers: Sequence[Worker], step: int) -> None:
        self.wait(
            lambda: all(worker.step >= step for worker in workers),
            f"step {step} of {[worker.name for worker in workers]}",
        )

    def wait_activity(self, workers: Sequence[Worker], activity: str) -> None:
        """Ping until every worker answers that it is doing this."""
        pongs: list[control.Pong] = []
        while {pong.activity for pong in pongs} != {activity}:
            self.pings += 1
            for worker in workers:
                worker.tell(control.Ping(sequence=self.pings))

            def answered() -> bool:
                nonlocal pongs
                pongs = [p for w in workers for p in w.all(control.Pong) if p.sequence == self.pings]
                return len(pongs) == len(workers)

            self.wait(answered, "pongs")

    def new_store(self) -> int:
        store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self.stores.append(store)
        return store.port

    def plan(
        self,
        members: Sequence[Worker],
        *,
        source: str = "memory",
        cut: str = "abort",
        committed_step: int | None = None,
        committed_digest: str = "",
        checkpoint_step: int | None = None,
        released: Sequence[Worker] = (),
        checkpoint_before_cut: bool = False,
        timeout_s: float = 30.0,
        port: int | None = None,
        upload_weights: Sequence[int] = (),
    ) -> int:
        """Hand a new plan to members, in rank order, and to the released; return its generation."""
        self.generation += 1
        port = self.new_store() if port is None and members else port
        if committed_step is None:
            committed_step = max((worker.step for worker in (*members, *released)), default=0)
        for rank, worker in enumerate((*members, *released)):
            worker.tell(
                control.Plan(
                    generation=self.generation,
                    rank=rank,
                    world_size=len(members),
                    group_rank=rank,
                    group_world_size=len(members),
                    store_host="127.0.0.1",
                    store_port=port or 0,
                    cut=cut,
                    committed_step=committed_step if source == "memory" else 0,
                    committed_digest=committed_digest,
                    source=source,
                    checkpoint_step=checkpoint_step,
                    release=worker in released,
                    checkpoint_before_cut=checkpoint_before_cut,
                    timeout_s=timeout_s,
                    upload_weights=list(upload_weights),
                )
            )
        return self.generation

    def formed(self, worker: Worker, generation: int) -> control.Formed | None:
        return next((f for f in worker.all(control.Formed) if f.generation == generation), None)

    def form(self, members: Sequence[Worker], **plan: Any) -> list[control.Formed]:
        """Plan, and wait until every member has formed."""
        generation = self.plan(members, **plan)
        self.wait(
            lambda: all(self.formed(worker, generation) for worker in members),
            f"generation {generation} to form",
        )
        found = [self.formed(worker, generation) for worker in members]
        assert all(found)
        return [formed for formed in found if formed]

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.signal(signal.SIGCONT)
            worker.close()
