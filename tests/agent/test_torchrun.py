"""Stock torchrun with an unmodified DDP script, at a real coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import registry
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousParameters

from protos import admin_pb2
from protos.wire import Identity
from tests.agent.conftest import alive, eventually
from tests.coordinator.harness import RunningCoordinator, running_coordinator

TORCHRUN = Path(sys.executable).with_name("torchrun")
SCRIPT = Path(__file__).with_name("torchrun_script.py")


@dataclass
class Torchruns:
    """torchrun processes of one job, each with a home and an identity of its own."""

    folder: Path
    address: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, identity: Identity) -> subprocess.Popen[bytes]:
        home = self.folder / identity.id
        identity.save(home / "identity.json")
        with open(self.folder / f"{identity.id}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    TORCHRUN,
                    "--rdzv-backend=muster",
                    f"--rdzv-endpoint={self.address}",
                    "--rdzv-id=ddp",
                    f"--rdzv-conf=home={home}",
                    "--nnodes=1:2",
                    "--nproc-per-node=1",
                    "--max-restarts=5",
                    SCRIPT,
                    str(self.folder),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def notes(self) -> list[str]:
        notes = self.folder / "notes"
        return notes.read_text().splitlines() if notes.exists() else []

    def begun(self, world: int) -> list[str]:
        return [note for note in self.notes() if note.startswith("began") and f"/{world} " in note]

    def said(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.folder.glob("*.log"))


@pytest.fixture
def torchruns(tmp_path: Path) -> Iterator[Torchruns]:
    folder = tmp_path / "t"
    folder.mkdir()
    some = Torchruns(folder=folder, address="")
    yield some
    for process in some.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def submit(running: RunningCoordinator) -> str:
    spec: dict[str, Any] = {
        "name": "ddp",
        "launch": "torchrun",
        "elastic": {"min_nodes": 1, "max_nodes": 2, "last_call": "500ms", "min_generation": "500ms"},
    }
    admin = await running.admin()
    reply = await admin.SubmitJob(admin_pb2.SubmitJobRequest(spec_json=json.dumps(spec)), timeout=10)
    return str(reply.job_id)


async def test_stock_torchrun_forms_loses_a_peer_and_completes(tmp_path: Path, torchruns: Torchruns) -> None:
    async with running_coordinator(tmp_path, lease_ms=2_000) as running:
        torchruns.address = running.main_address
        job_id = await submit(running)
        first = torchruns.start(await running.enroll("first"))
        second = torchruns.start(await running.enroll("second"))
        await eventually(lambda: len(torchruns.begun(2)) >= 2, f"no world of 2: {torchruns.said()}", 90)
        os.killpg(second.pid, signal.SIGKILL)
        await eventually(lambda: torchruns.begun(1), f"no world of 1: {torchruns.said()}", 90)
        third = torchruns.start(await running.enroll("third"))
        formed = len(torchruns.begun(2))
        await eventually(lambda: len(torchruns.begun(2)) >= formed + 2, f"no joiner: {torchruns.said()}", 90)
        (torchruns.folder / "enough").touch()
        for process in (first, third):
            assert await asyncio.to_thread(process.wait, 60) == 0, torchruns.said()
        assert sum(note.startswith("done") for note in torchruns.notes()) == 2
        admin = await running.admin()

        async def phase() -> str:
            view = await admin.GetJob(admin_pb2.JobRef(job=job_id), timeout=10)
            return str(json.loads(view.json)["phase"])

        assert await phase() == "COMPLETED"
        assert not any(alive(int(note.split()[-1])) for note in torchruns.notes())


def test_backend_is_registered_with_torch(tmp_path: Path) -> None:
    parameters = RendezvousParameters(
        backend="muster", endpoint="127.0.0.1:1", run_id="ddp", min_nodes=1, max_nodes=1, home=str(tmp_path)
    )
    with pytest.raises(RendezvousConnectionError, match="identity file"):
        registry.get_rendezvous_handler(parameters)
