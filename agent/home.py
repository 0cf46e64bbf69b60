"""The agent's directory: what lies where, the lock that keeps a second agent out, and the socket
through which `muster-agent status`, `drain` and `leave` talk to the running agent."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import AgentError, BadInput

SOCKET_PATH_BYTES = 100  # sockaddr_un holds 108 on Linux; room for the longest name in `run`
REQUEST_BYTES = 64 * 1024


def default_home() -> Path:
    """MUSTER_AGENT_HOME, or `muster-agent` under XDG_STATE_HOME."""
    if home := os.environ.get("MUSTER_AGENT_HOME"):
        return Path(home)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "muster-agent"


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFiles:
    """The files of one job: `job.json`, `data/`, `cache/` and `tmp/` for the workers, their logs."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "job.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def manifest(self, step: int) -> Path:
        return self.cache / "manifests" / f"{step}.json"

    def log(self, slot: int) -> Path:
        return self.root / f"worker-{slot}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    root: Path

    @property
    def identity(self) -> Path:
        return self.root / "identity.json"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def run(self) -> Path:
        """Where sockets live.  A home whose path is too long for a socket's name gets a private
        directory under /tmp instead, found again by the hash of the home's path."""
        run = self.root / "run"
        if len(os.fsencode(run)) + len("/agent.sock") <= SOCKET_PATH_BYTES:
            return run
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        return Path("/tmp") / f"muster-{os.getuid()}-{digest}"  # noqa: S108 - ownership is checked in prepare

    @property
    def status_socket(self) -> Path:
        return self.run / "agent.sock"

    def job(self, job_id: str) -> JobFiles:
        """Make the job's directories; workers see the shared blobs through links."""
        files = JobFiles(root=self.root / "jobs" / job_id)
        (files.cache / "manifests").mkdir(parents=True, exist_ok=True)
        files.data.mkdir(exist_ok=True)
        files.temporary.mkdir(exist_ok=True)
        for directory in (files.cache, files.data):
            link = directory / "blobs"
            if not link.is_symlink():
                link.symlink_to(self.blobs.absolute())
        return files

    def prepare(self) -> None:
        """Make the directories.  Raise BadInput if that is impossible or they belong to somebody else."""
        try:
            for directory in (self.root, self.blobs, self.root / "jobs", self.run):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.run.chmod(0o700)
        except OSError as error:
            raise BadInput(
                f"home {self.root}: {error.strerror} ({error.filename}); choose another directory with --home"
            ) from error
        if self.run.stat().st_uid != os.getuid():
            raise BadInput(
                f"run directory {self.run}: belongs to another user; choose another directory with --home"
            )

    @contextlib.contextmanager
    def locked(self) -> Any:
        """Hold the home for one agent process.  Raise BadInput if another has it."""
        with open(self.run / "agent.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(
                    f"home {self.root}: another muster-agent is running with it; "
                    "stop that one (`muster-agent drain`) or choose another directory with --home"
                ) from error
            yield


Answer = Callable[[str], dict[str, Any]]


class StatusServer:
    """Answers one JSON line with one JSON line; the file mode is the access control."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path=self._path, limit=REQUEST_BYTES)
        self._path.chmod(0o600)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError):
            async with asyncio.timeout(5):
                line = await reader.readline()
                request = json.loads(line)
                command = request.get("command") if isinstance(request, dict) else None
                writer.write(json.dumps(self._answer(str(command))).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)


def ask(home: Home, command: str) -> dict[str, Any]:
    """Ask the running agent.  Raise AgentError if there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        try:
            connection.connect(str(home.status_socket))
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            line = connection.makefile("rb").readline(16 * 1024 * 1024)
        except OSError as error:
            raise AgentError(
                f"no agent answers at {home.status_socket} ({error.strerror or error}); "
                "start one with `muster-agent run`, or name its directory with --home"
            ) from error
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise AgentError(
            f"the agent at {home.status_socket} closed the connection without an answer"
        ) from error
    assert isinstance(reply, dict)
    return reply
