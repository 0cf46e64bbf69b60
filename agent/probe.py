"""What this machine is: cards, driver, torch, memory, disk.  Initialises no CUDA context."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from agent.errors import BadInput
from protos import agent_pb2

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 13)


def torch_version() -> tuple[str, tuple[int, int]]:
    """torch's version as it names itself, and (major, minor).  Raise BadInput if torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BadInput(
            f"torch cannot be imported ({error}); install torch 2.11 to 2.13 beside muster-train"
        ) from error
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return torch.__version__, (int(major), int(minor))


def backends() -> tuple[str, ...]:
    """Collective backends that this torch was built with; NCCL only if it was built for CUDA."""
    import torch
    import torch.distributed as dist

    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.version.cuda is not None:
        found.insert(0, "nccl")
    return tuple(found)


def cards() -> tuple[tuple[agent_pb2.Gpu, ...], str]:
    """All cards that the NVIDIA driver shows, and its version; nothing without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), ""
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                agent_pb2.Gpu(
                    index=index,
                    name=_text(pynvml.nvmlDeviceGetName(handle)),
                    memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                    capability_major=major,
                    capability_minor=minor,
                    uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                )
            )
        return tuple(found), _text(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), ""
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def lent(gpus: Sequence[int] | None, found: Sequence[agent_pb2.Gpu]) -> tuple[agent_pb2.Gpu, ...]:
    """The cards to lend: all, or those named; an empty list lends none.  Raise BadInput for one that is not there."""
    if gpus is None:
        return tuple(found)
    by_index = {gpu.index: gpu for gpu in found}
    for index in gpus:
        if index not in by_index:
            there = ", ".join(str(i) for i in by_index) or "none"
            raise BadInput(f"--gpus {index}: there is no such card; the driver shows {there}")
    return tuple(by_index[index] for index in gpus)


def probe(
    *, home: Path, advertise_host: str, gpus: Sequence[int] | None, labels: Mapping[str, str]
) -> agent_pb2.Probe:
    """Takes seconds (torch is imported): call it in a thread.  Raise BadInput for an unusable torch or card."""
    version, number = torch_version()
    if number < OLDEST_TORCH:
        raise BadInput(f"torch is {version}; Muster needs 2.11 to 2.13: install one of them")
    available = backends()
    found, driver = cards()
    chosen = lent(gpus, found) if "nccl" in available else ()
    return agent_pb2.Probe(
        gpus=chosen,
        driver_version=driver,
        torch_version=version,
        backends=[backend for backend in available if backend != "nccl" or chosen],
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=shutil.disk_usage(home).free,
        hostname=socket.gethostname(),
        advertise_host=advertise_host,
        muster_version=importlib.metadata.version("muster-train"),
        labels=dict(labels),
        worker_count=max(1, len(chosen)),
    )
