"""The coordinator's event loop takes all that gRPC has for it in one turn."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

from coordinator.turns import WholeTurns


class Queue:
    """Woken as gRPC's completion queue is: one byte an event, of which it reads one."""

    def __init__(self, wake: socket.socket) -> None:
        self.wake = wake
        self.calls = 0

    def _handle_events(self) -> None:
        self.wake.recv(1)
        self.calls += 1


def test_many_events_are_one_turn() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, asyncio.Runner(loop_factory=WholeTurns) as runner:

        async def turns() -> int:
            queue, loop = Queue(ours), asyncio.get_running_loop()
            loop.add_reader(ours, queue._handle_events)
            for events in (1, 100):
                theirs.send(bytes(events))
                for _ in range(5):
                    await asyncio.sleep(0)
            loop.remove_reader(ours)
            return queue.calls

        assert runner.run(turns()) == 2, "once for each time that something came"


SERVE = """
import asyncio
import grpc.aio
from coordinator.turns import WholeTurns

class Watched(WholeTurns):
    def _add_reader(self, fd, callback, *args):
        print(getattr(callback, "__name__", ""))
        return super()._add_reader(fd, callback, *args)

async def serve():
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await server.stop(None)

with asyncio.Runner(loop_factory=Watched) as runner:
    runner.run(serve())
"""


def test_grpc_still_wakes_the_loop_in_the_way_that_is_mended() -> None:
    """In a process of its own, since gRPC keeps one completion queue for all loops.  Should this fail with a new
    grpcio: see whether it reads all bytes itself by now."""
    found = subprocess.run(
        [sys.executable, "-c", SERVE], capture_output=True, text=True, check=True, timeout=60
    )
    assert "_drained" in found.stdout.split()
