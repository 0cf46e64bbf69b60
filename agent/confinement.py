"""What a worker may have of this machine: its environment, its limits and the files it can see.

`agent/launch.py` does it, in the worker's own process; this module says what.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import launch
from agent.errors import BadInput
from agent.home import JobFiles

OPEN_FILES = 65_536

_NAMES = frozenset(
    [
        "PATH",
        "HOME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "USER",
        "LOGNAME",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "MUSTER_STEP_TRACE",
        "XDG_CACHE_HOME",
        "CONDA_PREFIX",
    ]
)
_PREFIXES = (
    "LC_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_",
    "TRITON_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TP_",
)  # fmt: skip
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY")

# Programs, libraries, settings and devices.  No one's home, no mail, no other job, no temporary files of others.
_READABLE = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/opt",
    "/nix",
    "/etc",
    "/proc",
    "/sys",
    "/dev",
)
_WRITABLE = ("/dev/shm", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")  # noqa: S108 - the kernel's


def clean_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Of the agent's environment what training needs: nothing that could be a secret of its owner."""
    return {
        name: value
        for name, value in base.items()
        if (name in _NAMES or name.startswith(_PREFIXES)) and not _SECRET.search(name.upper())
    }


def confines(mode: str) -> bool:
    """Whether workers are confined under `--confine MODE`.  Raise BadInput where it is required and impossible."""
    if mode == "off":
        return False
    possible = launch.landlock_version() > 0
    if mode == "require" and not possible:
        raise BadInput(
            "--confine require: this kernel has no Landlock (Linux 5.13 or newer, with lsm=…,landlock); "
            "use another kernel, or --confine auto to run workers with this user's rights"
        )
    return possible


def hide() -> None:
    """Keep this process's environment and memory from others of the same user, workers among them: a join token
    may be in the one, and the key is in the other.  Landlock would let the environment be read."""
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a worker of one job is started."""

    files: JobFiles
    blobs: Path
    confined: bool

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """`given`, with places for temporary files and caches that a confined worker can reach."""
        if not self.confined:
            return dict(given)
        return {**given, "HOME": str(self.files.root), "TMPDIR": str(self.files.temporary)}

    def command(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
        """`command`, started through launch.py."""
        settings: dict[str, object] = {"open_files": OPEN_FILES, "read": None, "write": None}
        if self.confined:
            # Where a resolver keeps it elsewhere (/run/systemd/resolve), it is written anew by renaming.
            names = Path("/etc/resolv.conf").resolve().parent
            settings["read"] = [*_READABLE, str(names), *_code(command, environment)]
            settings["write"] = [*_WRITABLE, *_devices(), *self._own(environment)]
        return (sys.executable, "-I", "-S", launch.__file__, json.dumps(settings), *command)

    def _own(self, environment: Mapping[str, str]) -> list[str]:
        own = [self.files.root, self.blobs]
        if trace := environment.get("MUSTER_STEP_TRACE"):  # the owner asked for it
            own.append(Path(trace).parent)
        return [str(path.absolute()) for path in own]


def _code(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Where the interpreter, the libraries and the trainer are."""
    ours = [importlib.util.find_spec(name) for name in ("trainer", "protos")]  # of which it reads `seal`
    found = [
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
        *site.getsitepackages(),
        *(place for spec in ours for place in ((spec and spec.submodule_search_locations) or ())),
        *environment.get("PYTHONPATH", "").split(os.pathsep),
        *(part for part in command if Path(part).is_absolute()),
    ]
    return [path for path in dict.fromkeys(found) if path]


def _devices() -> list[str]:
    return ["/dev/dxg", *(str(path) for path in Path("/dev").glob("nvidia*"))]  # dxg: a card under WSL
