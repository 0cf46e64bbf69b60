"""An asyncio loop for processes with thousands of gRPC streams.

gRPC's thread writes one byte into a socket pair for every event that it has for the loop.  The loop reads one
byte a turn and then takes all the events there are, so under load it is behind with the bytes, and is woken
again and again for nothing; once the socket is full, gRPC's thread waits for each byte to be read, and every
event costs a whole turn of the loop (grpcio 1.85, completion_queue.pyx.pxi, `_handle_events`).  Here all bytes
but one are read before.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any, TypeVarTuple, Unpack

Arguments = TypeVarTuple("Arguments")


class WholeTurns(asyncio.SelectorEventLoop):
    """For `asyncio.Runner(loop_factory=WholeTurns)`."""

    def add_reader(self, fd: Any, callback: Callable[[Unpack[Arguments]], Any], *args: *Arguments) -> None:
        wakes = getattr(callback, "func", callback)
        if isinstance(fd, socket.socket) and getattr(wakes, "__name__", "") == "_handle_events":
            super().add_reader(fd, _drained, fd, functools.partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _drained(wake: socket.socket, callback: Callable[[], Any]) -> None:
    """An event is there before its byte is, so whoever's byte is read here has its event taken now."""
    (waiting,) = struct.unpack("i", fcntl.ioctl(wake, termios.FIONREAD, bytes(4)))
    if waiting > 1:
        wake.recv(waiting - 1)
    callback()
