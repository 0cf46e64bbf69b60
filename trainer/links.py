"""Which of this process's connections have gone silent: the peer's machine answers nothing that is sent.

A collective that takes long says nothing: a peer may be computing, or the network may be slow.  The kernel
knows better.  A machine that lives acknowledges what arrives, also for a process that is frozen, and a slow
link acknowledges slowly; over a link that was cut, nothing is acknowledged and TCP sends the same again and
again.  Left alone it does so for a quarter of an hour (net.ipv4.tcp_retries2) before anybody is told.

Linux only; elsewhere nothing is ever found to be silent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_TCP_INFO_BYTES = 60
# Of struct tcp_info, linux/tcp.h: bytes 0, 2 and 3, and the 32-bit word at byte 56.
_STATE, _RETRANSMITS, _PROBES, _LAST_ACK_MS = 0, 2, 3, 56
_ESTABLISHED = 1
_UNANSWERED = 2
"""So many transmissions of the same bytes (or probes of a closed window) without an answer."""


def connections() -> frozenset[str]:
    """This process's sockets, by the kernel's names for them."""
    return frozenset(name for name, _ in _sockets())


def silent_peers(seconds: float, older: frozenset[str] = frozenset()) -> list[str]:
    """Addresses of peers that have acknowledged nothing for so long, though asked again and again; over
    other connections than the `older` ones."""
    found: dict[str, None] = {}
    for name, descriptor in _sockets():
        if name in older:
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if _is_silent(connection, seconds):
                found[str(connection.getpeername()[0])] = None
    return list(found)


def _sockets() -> Iterator[tuple[str, int]]:
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            name = str(path.readlink())
            if name.startswith("socket:"):
                yield name, int(path.name)


def _is_silent(connection: socket.socket, seconds: float) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES or info[_STATE] != _ESTABLISHED:
        return False
    (last_ack_ms,) = struct.unpack_from("=I", info, _LAST_ACK_MS)
    asked = max(info[_RETRANSMITS], info[_PROBES])
    return asked >= _UNANSWERED and bool(last_ack_ms >= 1000 * seconds)
