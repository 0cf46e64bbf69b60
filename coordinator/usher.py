"""Shows out the connections of an address that has more than its share.

gRPC bounds how many connections there are in all, and how long a handshake may take, but not whose they
are.  So the sockets of this process are counted by peer, from the kernel's own table, and where an address
is over its bound those that have said least are shut down: an agent has shown a certificate and sent
heartbeats, a stranger has not.  gRPC sees them end like any other connection.  Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

log = structlog.get_logger("coordinator.usher")

PERIOD_S = 1.0
ESTABLISHED = "01"
DESCRIPTORS = Path("/proc/self/fd")
TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))


def address_of(hexadecimal: str) -> str:
    """The address as /proc/net/tcp writes it: 32-bit words in the machine's order.  Of IPv6 the /64."""
    words = [bytes.fromhex(hexadecimal[at : at + 8])[::-1] for at in range(0, len(hexadecimal), 8)]
    found = ipaddress.ip_address(b"".join(words))
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def connections(lines: Iterable[str], ports: frozenset[int]) -> dict[str, list[int]]:
    """Inodes of established connections to our `ports`, by the peer's address."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[3] == ESTABLISHED and int(fields[1].rpartition(":")[2], 16) in ports:
            found[fields[2].rpartition(":")[0]].append(int(fields[9]))
    by_address: defaultdict[str, list[int]] = defaultdict(list)
    for peer, inodes in found.items():
        by_address[address_of(peer)] += inodes
    return by_address


class Usher:
    """Looks every second, and costs nothing while there are fewer descriptors than one address may have."""

    def __init__(self, most: int, ports: Callable[[], frozenset[int]]) -> None:
        self._most = most
        self._ports = ports
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if TABLES[0].exists():
            self._task = asyncio.create_task(self._run(), name="usher")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            for address, count in (await asyncio.to_thread(self.look)).items():
                log.warning("connections closed", peer=address, closed=count, allowed=self._most)

    def look(self) -> dict[str, int]:
        """Close what is too much; how much that was, by address."""
        if sum(1 for _ in DESCRIPTORS.iterdir()) <= self._most:
            return {}
        lines = [line for table in TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
        closed: dict[str, int] = {}
        for address, inodes in connections(lines, self._ports()).items():
            if len(inodes) <= self._most:
                continue
            found = _copies(frozenset(inodes))
            found.sort(key=_bytes_received, reverse=True)
            for connection in found[self._most :]:
                with contextlib.suppress(OSError):  # it has just ended by itself
                    connection.shutdown(socket.SHUT_RDWR)
            for connection in found:
                connection.close()
            closed[address] = len(found) - self._most
        return closed


def _copies(inodes: frozenset[int]) -> list[socket.socket]:
    """Descriptors of our own for these sockets.  gRPC may close its own at any moment, and the number may be
    another's by then: what counts is what the copy turns out to be."""
    found: dict[int, socket.socket] = {}
    for path in DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int(str(path.readlink()).removeprefix("socket:[").rstrip("]")) not in inodes:
                continue
            copy = socket.socket(fileno=os.dup(int(path.name)))
            inode = os.fstat(copy.fileno()).st_ino
            if inode in inodes and inode not in found:  # a copy may meanwhile stand at a later number itself
                found[inode] = copy
            else:
                copy.close()
    return list(found.values())


def _bytes_received(connection: socket.socket) -> int:
    """tcpi_bytes_received of linux/tcp.h."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int(struct.unpack_from("Q", info, 128)[0])
