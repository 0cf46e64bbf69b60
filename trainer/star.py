"""Sums of a few numbers over the ranks of a generation, round rank 0, over TCP connections of their own.

The commit vote is ninety bytes at every step.  Gloo carries such a sum from one thread to the next on both
ends, 0.9 ms between two processes of one machine; here the thread that waits reads the socket itself, 0.13 ms
(docs/benchmarks.md).  Between distant machines it is one journey to rank 0 and back instead of one round the
whole ring.  And it can be left at any moment, which a collective of gloo cannot.

A sum that returned on one rank has everybody's numbers in it.  It may have returned on some ranks only: rank
0 is done when it has heard everybody, whether or not its answers arrive.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

_KEY = "star"
_NONCE_BYTES = 16
_HELLO = struct.Struct(f"<{_NONCE_BYTES}sI")  # what the store told, and the rank
_HEADER = struct.Struct("<II")  # number of the sum, bytes that follow
_STRANGERS = 16
"""So many connections beside those of the ranks may be open before they have said who they are."""


class Left(Exception):
    """`leave` was called."""


class Star:
    """One rank's connections: to every other rank on rank 0, to rank 0 elsewhere.

    All methods but `leave` belong to one thread.
    """

    def __init__(self, peers: Sequence[socket.socket], rank: int) -> None:
        """`peers`: on rank 0 the others in the order of their ranks, else rank 0 alone."""
        self._peers = tuple(peers)
        self._rank = rank
        self._number = 0
        self._asleep, self._alarm = os.pipe()
        self._open = threading.Lock()  # held while the pipe must not be closed
        self._closed = False
        for peer in peers:
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def sum(self, tensor: Tensor) -> None:
        """Sum a contiguous CPU `tensor` over the ranks, in place, added in the order of the ranks.

        Raise Left after `leave`, ConnectionError if a peer is gone or sums something else.  The tensor is
        undefined then.
        """
        self._number += 1
        size = tensor.numel() * tensor.element_size()
        header = _HEADER.pack(self._number, size)
        if self._rank:
            self._move([(self._peers[0], memoryview(header + tensor.numpy().tobytes()))], sending=True)
            answer = bytearray(_HEADER.size + size)
            self._move([(self._peers[0], memoryview(answer))], sending=False)
            self._check(answer, header, 0)
            tensor.copy_(_numbers(answer, tensor))
            return
        heard = [bytearray(_HEADER.size + size) for _ in self._peers]
        self._move([(p, memoryview(row)) for p, row in zip(self._peers, heard, strict=True)], sending=False)
        for rank, row in enumerate(heard, start=1):
            self._check(row, header, rank)
        for row in heard:
            tensor += _numbers(row, tensor)
        total = header + tensor.numpy().tobytes()
        # Everybody has been heard: who does not hear of it will find out otherwise.
        with contextlib.suppress(ConnectionError, Left):
            self._move([(peer, memoryview(total)) for peer in self._peers], sending=True)

    def _check(self, message: bytearray, expected: bytes, rank: int) -> None:
        if message[: _HEADER.size] != expected:
            number, size = _HEADER.unpack_from(message)
            raise ConnectionError(
                f"rank {rank} sums {size} bytes as sum {number}; this rank {len(message) - _HEADER.size} bytes "
                f"as sum {self._number}: are all agents of one version?"
            )

    def _move(self, parts: list[tuple[socket.socket, memoryview]], *, sending: bool) -> None:
        """Send or fill each buffer."""
        poll = select.poll()
        poll.register(self._asleep, select.POLLIN)
        left = {peer.fileno(): (peer, data) for peer, data in parts}
        for descriptor in left:
            poll.register(descriptor, select.POLLOUT if sending else select.POLLIN)
        lost: OSError | None = None
        while left:
            for descriptor, _ in poll.poll():
                if descriptor == self._asleep:
                    raise Left
                peer, data = left[descriptor]
                try:
                    count = peer.send(data) if sending else peer.recv_into(data)
                    if count == 0:
                        raise ConnectionError("a peer closed its connection")
                except BlockingIOError:
                    continue
                except OSError as error:
                    if not sending:
                        raise ConnectionError(str(error)) from error
                    lost, count = error, len(data)  # the others get theirs all the same
                if count == len(data):
                    del left[descriptor]
                    poll.unregister(descriptor)
                else:
                    left[descriptor] = (peer, data[count:])
        if lost is not None:
            raise ConnectionError(str(lost)) from lost

    def leave(self) -> None:
        """End the sum that waits, if one does, and every later one.  From any thread."""
        with self._open:
            if not self._closed:
                os.write(self._alarm, b"!")

    def close(self) -> None:
        """Close the connections; peers that wait for this rank notice.  Again is nothing."""
        with self._open:
            if self._closed:
                return
            self._closed = True
            os.close(self._asleep)
            os.close(self._alarm)
        for peer in self._peers:
            peer.close()


def _numbers(message: bytearray, like: Tensor) -> Tensor:
    return torch.frombuffer(message, dtype=like.dtype, offset=_HEADER.size).view(like.shape)


# ------------------------------------------------------------------------------------------ connecting


class Host:
    """Rank 0's end while a generation forms: says in the store where it listens, and lets the others in."""

    def __init__(self, store: Store, store_host: str) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._server = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._poll = select.poll()
        self._unknown: dict[int, tuple[socket.socket, bytes]] = {}  # in the order in which they came
        self._known: dict[int, socket.socket] = {}  # by rank
        port = self._server.getsockname()[1]
        store.set(_KEY, f"{_address(store_host)} {port} {self._nonce.hex()}")

    def admit(self, world_size: int, timeout_s: float) -> Star:
        """Wait for every other rank.  Raise TimeoutError if one does not come."""
        deadline = time.monotonic() + timeout_s
        self._server.setblocking(False)
        self._poll.register(self._server, select.POLLIN)
        try:
            while len(self._known) < world_size - 1:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    absent = sorted(set(range(1, world_size)) - self._known.keys())
                    raise TimeoutError(f"rank {', '.join(map(str, absent))} did not connect to rank 0")
                for descriptor, _ in self._poll.poll(1000 * left_s):
                    if descriptor == self._server.fileno():
                        self._let_in(world_size)
                    elif descriptor in self._unknown:
                        self._hear(descriptor, world_size)
            return Star([self._known.pop(rank) for rank in range(1, world_size)], 0)
        finally:
            for peer in (*(peer for peer, _ in self._unknown.values()), *self._known.values()):
                peer.close()
            self.close()

    def _let_in(self, world_size: int) -> None:
        with contextlib.suppress(OSError):
            stranger = self._server.accept()[0]
            stranger.setblocking(False)
            self._unknown[stranger.fileno()] = (stranger, b"")
            self._poll.register(stranger, select.POLLIN)
        if len(self._unknown) > world_size + _STRANGERS:
            self._forget(next(iter(self._unknown))).close()

    def _hear(self, descriptor: int, world_size: int) -> None:
        """Who has said it all is known, or gone."""
        peer, said = self._unknown[descriptor]
        try:
            more = peer.recv(_HELLO.size - len(said))
        except BlockingIOError:
            return
        except OSError:
            more = b""
        said += more
        if more and len(said) < _HELLO.size:
            self._unknown[descriptor] = (peer, said)
            return
        self._forget(descriptor)
        rank = self._rank_of(said)
        if 0 < rank < world_size and rank not in self._known:
            self._known[rank] = peer
        else:
            peer.close()

    def _forget(self, descriptor: int) -> socket.socket:
        self._poll.unregister(descriptor)
        return self._unknown.pop(descriptor)[0]

    def _rank_of(self, hello: bytes) -> int:
        if len(hello) < _HELLO.size:
            return -1
        nonce, rank = _HELLO.unpack(hello)
        return int(rank) if hmac.compare_digest(nonce, self._nonce) else -1

    def close(self) -> None:
        self._server.close()


def join(store: Store, store_host: str, rank: int, timeout_s: float) -> Star:
    """Connect to rank 0.  Raise OSError if it cannot be reached, RuntimeError if the store cannot."""
    host, port, nonce = store.get(_KEY).decode().split(" ")
    peer = socket.create_connection((host or store_host, int(port)), timeout=timeout_s)
    peer.sendall(_HELLO.pack(bytes.fromhex(nonce), rank))
    return Star([peer], rank)


def _address(store_host: str) -> str:
    """Where others reach this machine: where they find the store, if it is here (then empty), else the address
    with which this machine goes to the store (a store under torchrun may be anywhere)."""
    for family, kind, protocol, _, address in socket.getaddrinfo(store_host, 9, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as route:
            route.connect(address)  # sends nothing
            mine = str(route.getsockname()[0])
            return "" if mine == address[0] else mine
    return ""
