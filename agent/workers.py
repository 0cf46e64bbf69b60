"""One worker process in its slot: started by exec, listened to, killed with its whole group.

Knows processes and the control socket; does not know why a worker runs or what its messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agent import control

LOG_BYTES = 16 * 1024 * 1024
LINE_CHARACTERS = 4096
TAIL_LINES = 20
SOCKET_GRACE_S = 1.0

# Signals that a process earns by its own doing; any other that ends it came from outside.
OWN_SIGNALS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)


class Cause(enum.Enum):
    """Why a worker's process ended."""

    STOPPED = "stopped"  # we asked it to
    KILLED = "killed"  # a signal from outside
    PROGRAM = "program"  # its own doing
    WEDGED = "wedged"  # we killed it at a deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a worker ended: `detail` is one message for people with the last lines it wrote."""

    cause: Cause
    detail: str
    status: int


class Worker:
    """A process and its control connection.  Must be started on the main thread: PR_SET_PDEATHSIG, which
    the worker sets, fires when the *thread* that started it ends.

    `heard(worker, message)`, `wrote(worker, line)` and, once and last, `ended(worker, exit)` are called on
    the event loop.
    """

    def __init__(
        self,
        slot: int,
        *,
        heard: Callable[[Worker, control.Up], None],
        wrote: Callable[[Worker, str], None],
        ended: Callable[[Worker, Exit], None],
    ) -> None:
        self.slot = slot
        self.pid = 0
        self.started_s = time.monotonic()
        self._heard = heard
        self._wrote = wrote
        self._ended = ended
        self._connection = control.Connection(self._on_message, self._on_disconnect)
        self._server: asyncio.AbstractServer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._log: BinaryIO | None = None
        self._log_path: Path | None = None
        self._partial = b""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._stopping = False
        self._wedged = ""
        self._complaint = ""
        self.exited = asyncio.Event()

    async def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        socket: Path,
        directory: Path,
        log: Path,
    ) -> None:
        """Raise OSError if the socket, the log or the process cannot be had."""
        loop = asyncio.get_running_loop()
        self._log_path = log
        self._server = await control.listen(socket, self._connection)
        try:
            self._log = open(log, "ab")  # noqa: SIM115, ASYNC230 - opened in microseconds; _on_exit closes it
            self._process = subprocess.Popen(  # noqa: ASYNC220 - exec takes a millisecond; asyncio's own watcher adds a thread
                [*command],
                cwd=directory,
                env={**environment, "MUSTER_CONTROL": str(socket), "MUSTER_PARENT_PID": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except BaseException:
            self._server.close()
            if self._log is not None:
                self._log.close()
            raise
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        loop.add_reader(self._pidfd, self._on_exit)
        loop.add_reader(self._process.stdout.fileno(), self._read_output)

    def send(self, *messages: control.Down) -> None:
        self._connection.send(*messages)

    @property
    def running(self) -> bool:
        return self._process is not None and not self.exited.is_set()

    def kill(self, wedged: str = "") -> None:
        """SIGKILL the process and all it started; `wedged` says which deadline it missed, if one."""
        if self.running:
            self._wedged = self._wedged or wedged
            self._signal_group(signal.SIGKILL)

    def condemn(self, complaint: str) -> None:
        """SIGKILL it for a failure that it reported itself."""
        if self.running:
            self._complaint = self._complaint or complaint
            self._signal_group(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Ask it to leave; SIGKILL it when `grace_s` is over.  Returns when it is gone."""
        if not self.running:
            return
        self._stopping = True
        self.send(control.Stop())
        if not self._connection.open:
            self._signal_group(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.exited.wait()
        self._signal_group(signal.SIGKILL)
        await self.exited.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        # Only while the leader is not reaped: until then its number cannot belong to another group.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _on_message(self, message: control.Up) -> None:
        if isinstance(message, control.Hello) and (
            message.pid != self.pid or message.version != control.VERSION
        ):
            raise control.ControlError(
                f"control hello is of pid {message.pid} version {message.version}, "
                f"expected pid {self.pid} version {control.VERSION}"
            )
        self._heard(self, message)

    def _on_disconnect(self, reason: str) -> None:
        # The socket closes just before the process can be reaped.  A live process without its socket
        # is of no use: nobody could tell it anything.
        if reason:
            self.condemn(reason)
        elif self.running and not self._stopping:
            loop = asyncio.get_running_loop()
            loop.call_later(SOCKET_GRACE_S, self.condemn, "closed its control socket but lived on")

    def _read_output(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            data = os.read(self._process.stdout.fileno(), 65_536)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._process.stdout.fileno())
            return
        self._keep(data)

    def _keep(self, data: bytes) -> None:
        assert self._log is not None
        assert self._log_path is not None
        with contextlib.suppress(
            OSError
        ):  # a full disk must not stop the agent; the lines still go to the operator
            if self._log.tell() > LOG_BYTES:
                self._log.close()
                os.replace(self._log_path, self._log_path.with_suffix(".old.log"))
                self._log = open(self._log_path, "ab")  # noqa: SIM115
            self._log.write(data)
            self._log.flush()
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LINE_CHARACTERS:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            text = line.decode(errors="replace").rstrip()[:LINE_CHARACTERS]
            if text:
                self._tail.append(text)
                self._wrote(self, text)

    def _on_exit(self) -> None:
        loop = asyncio.get_running_loop()
        process = self._process
        assert process is not None
        assert process.stdout is not None
        assert self._server is not None
        assert self._log is not None
        self._signal_group(signal.SIGKILL)  # whatever it started goes with it
        status = process.wait()
        self.exited.set()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(process.stdout.fileno(), 65_536):
                self._keep(data)
        if self._partial:
            self._keep(b"\n")
        loop.remove_reader(process.stdout.fileno())
        process.stdout.close()
        self._log.close()
        self._connection.close()
        self._server.close()
        self._ended(self, self._explain(status))

    def _explain(self, status: int) -> Exit:
        who = f"worker {self.slot} (pid {self.pid})"
        if self._stopping:
            return Exit(cause=Cause.STOPPED, detail=f"{who} stopped", status=status)
        if self._wedged:
            return Exit(cause=Cause.WEDGED, detail=f"{who} was killed: {self._wedged}", status=status)
        last = " | ".join(list(self._tail)[-3:])
        tail = f": {last}" if last else ""
        if status < 0 and not self._complaint:
            number = signal.Signals(-status)
            cause = Cause.PROGRAM if number in OWN_SIGNALS else Cause.KILLED
            return Exit(cause=cause, detail=f"{who} was ended by {number.name}{tail}"[:4096], status=status)
        how = self._complaint or f"exited with status {status}"
        return Exit(cause=Cause.PROGRAM, detail=f"{who} {how}{tail}"[:4096], status=status)
