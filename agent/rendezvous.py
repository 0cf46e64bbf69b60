"""The `muster` rendezvous backend for torch elastic: it asks the coordinator, never its peers.

`MusterRendezvousHandler` serves muster-agent's own elastic agent, whose workers meet through the plan's
store.  `TorchrunRendezvousHandler` serves stock torchrun (`--rdzv-backend=muster`), whose agents also
exchange ranks through that store.  Heavy imports stay inside functions: torch loads this module
whenever anybody imports its elastic package.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousHandlerCreator,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

if TYPE_CHECKING:
    from agent.lobby import Lobby
    from agent.torchrun import TorchrunPresence
    from protos import agent_pb2

BACKEND = "muster"
STORES_KEPT = 4
MEETING_SLICE = timedelta(milliseconds=200)
STORE_TIMEOUT = timedelta(seconds=60)


class WorkersChangedError(RendezvousError):
    """While waiting for a plan a worker ended: make sure of the workers again first."""


class StoreShelf:
    """TCPStore servers that this process hosts.  Each is announced once and serves one generation.

    A superseded generation's store is closed, so that peers still blocked in its rendezvous fail at once;
    on a planned cut the old generation still trains, so there its store lives one generation longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: OrderedDict[int, Any] = OrderedDict()
        self._previous: Any = None
        self._current: Any = None

    def fresh_port(self) -> int:
        """Open a server on a free port of all interfaces."""
        store = TCPStore(
            host_name="127.0.0.1", port=0, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT
        )
        with self._lock:
            self._unused[store.port] = store
            dropped = [self._unused.popitem(last=False) for _ in range(len(self._unused) - STORES_KEPT)]
        del dropped  # the server ends here, outside the lock
        return int(store.port)

    def supersede(self, port: int | None, *, abort: bool) -> Any:
        """A new generation begins, in our store at `port` or elsewhere (None).  Return our store, if it is."""
        with self._lock:
            closing = [self._previous]
            self._previous = self._current
            if abort:
                closing.append(self._previous)
                self._previous = None
            self._current = None
            while port in self._unused and self._current is None:
                # Whoever knows of this store will not ask for one that was announced before it.
                announced, store = self._unused.popitem(last=False)
                if announced == port:
                    self._current = store
                else:
                    closing.append(store)
            current = self._current
        closing.clear()
        return current

    def close(self) -> None:
        with self._lock:
            closing = [self._previous, self._current, *self._unused.values()]
            self._previous = self._current = None
            self._unused.clear()
        closing.clear()


class MusterRendezvousHandler(RendezvousHandler):
    """Blocks until the coordinator's plan; used from the one thread of torch's elastic agent."""

    def __init__(
        self, lobby: Lobby, shelf: StoreShelf, announce: Callable[[], None], *, agent_id: str, run_id: str
    ) -> None:
        self._lobby = lobby
        self._shelf = shelf
        self._announce = announce
        self._agent_id = agent_id
        self._run_id = run_id
        self.generation = 0
        self.pids: tuple[int, ...] = ()
        self.member: agent_pb2.Member | None = None
        self.world_size = 0

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id

    def num_nodes_waiting(self) -> int:
        """1 if the coordinator has decided to form again, else 0: not the presence of a newcomer."""
        return int(self._lobby.pending(self.generation))

    def next_rendezvous(self) -> RendezvousInfo:
        """Say that we are ready, wait for a newer plan, take our place in it.

        Raise WorkersChangedError, RendezvousGracefulExitError when there is nothing more to do here."""
        if not self._lobby.pending(self.generation):
            self._announce()
        while True:
            plan = self._wait()
            info = self._take(plan)
            if info is not None:
                return info

    def _wait(self) -> agent_pb2.Plan:
        from agent.lobby import LobbyClosed, Seen

        try:
            plan = self._lobby.wait_plan(Seen(generation=self.generation, pids=self.pids))
        except LobbyClosed as closed:
            raise RendezvousGracefulExitError(str(closed)) from closed
        if plan is None:
            raise WorkersChangedError("a worker ended before the plan came")
        return plan

    def _take(self, plan: agent_pb2.Plan) -> RendezvousInfo | None:
        """Our place in `plan`; None if a newer plan makes it pointless."""
        from protos import agent_pb2

        self.generation = plan.generation
        self.member = next((member for member in plan.members if member.agent_id == self._agent_id), None)
        if self.member is None:
            self._released(plan)
            return None
        self.world_size = sum(member.worker_count for member in plan.members)
        leads = self.member.group_rank == 0
        ours = self._shelf.supersede(
            plan.store_port if leads else None, abort=plan.cut == agent_pb2.CUT_ABORT
        )
        if leads:
            self._announce()  # our store is used up; be ready to lead again at once
        return self._meet(plan, ours)

    def _released(self, plan: agent_pb2.Plan) -> None:
        """`plan` goes on without us; the event loop has told the workers."""

    def _meet(self, plan: agent_pb2.Plan, ours: Any) -> RendezvousInfo | None:
        """The agents have nothing to say to each other: a store of our own satisfies torch."""
        assert self.member is not None
        address = RendezvousStoreInfo(master_addr=plan.store_host, master_port=plan.store_port)
        return RendezvousInfo(HashStore(), self.member.group_rank, len(plan.members), address)

    def is_closed(self) -> bool:
        return self._lobby.closed is not None

    def set_closed(self) -> None:
        self._lobby.close("the rendezvous was closed")

    def shutdown(self) -> bool:
        self.set_closed()
        self._shelf.close()
        return True


class TorchrunRendezvousHandler(MusterRendezvousHandler):
    """For stock torchrun, with restart semantics: a re-formation restarts the script's workers."""

    def __init__(self, presence: TorchrunPresence, shelf: StoreShelf, run_id: str) -> None:
        super().__init__(presence.lobby, shelf, self._offer_store, agent_id=presence.agent_id, run_id=run_id)
        self._presence = presence
        self._served = 0

    def _offer_store(self) -> None:
        self._presence.ready(self._shelf.fresh_port())

    def next_rendezvous(self) -> RendezvousInfo:
        """As above.  A call without a newer plan means that torchrun stopped its workers, mostly since a
        peer's death failed their collectives: that is told as evidence.

        Raise RendezvousClosedError when the job ended, RendezvousConnectionError when the coordinator
        refuses us."""
        if self._served and not self._lobby.pending(self._served):
            self._presence.collective_failed(
                self._served, "torchrun stopped its workers and wants to meet again"
            )
        try:
            info = super().next_rendezvous()
        except RendezvousGracefulExitError as closed:
            if self._presence.refusal:
                raise RendezvousConnectionError(self._presence.refusal) from closed
            raise RendezvousClosedError(f"muster: {closed}") from closed
        self._served = self.generation
        self._presence.formed(self.generation)
        return info

    def _released(self, plan: agent_pb2.Plan) -> None:
        self._presence.released(plan.generation)
        self._announce()

    def _meet(self, plan: agent_pb2.Plan, ours: Any) -> RendezvousInfo | None:
        """All agents of the plan arrive in the leader's store and learn where rank 0 will listen.

        Waiting in slices: whoever does not arrive is replaced by a newer plan, not by a timeout."""
        assert self.member is not None
        try:
            base = ours or TCPStore(
                plan.store_host,
                plan.store_port,
                is_master=False,
                wait_for_workers=False,
                timeout=STORE_TIMEOUT,
            )
            store = PrefixStore(f"muster/{plan.job_id}/{plan.generation}", base)
            rank = self.member.group_rank
            if rank == 0:
                address = RendezvousStoreInfo.build(0, store, plan.members[0].host)
            store.set(f"arrived/{rank}", "1")
            awaited = [f"arrived/{other}" for other in range(len(plan.members))]
            while True:
                try:
                    store.wait(awaited, MEETING_SLICE)
                    break
                except dist.DistStoreError:
                    if self._lobby.pending(plan.generation) or self._lobby.closed is not None:
                        return None
            if rank != 0:
                address = RendezvousStoreInfo.build(rank, store, None)
        except dist.DistError:  # the leader died; the coordinator will say how to go on
            return None
        return RendezvousInfo(store, rank, len(plan.members), address)

    def shutdown(self) -> bool:
        # torch calls this from a `finally`: an exception on its way says that the workers failed.
        failure = sys.exc_info()[1]
        self._presence.leave(str(failure) if failure is not None else "")
        return super().shutdown()


def create_torchrun_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """`--rdzv-endpoint` is the coordinator's main HOST:PORT (empty: the identity's), `--rdzv-id` the job's name
    or id; the identity lies in `--rdzv-conf home=DIR` or MUSTER_AGENT_HOME.

    Raise RendezvousConnectionError if there is no identity or the coordinator refuses it."""
    from agent.errors import AgentError
    from agent.home import default_home
    from agent.torchrun import TorchrunPresence
    from protos.wire import WireError

    home = Path(parameters.get("home") or default_home())
    try:
        presence = TorchrunPresence(
            home=home,
            address=parameters.endpoint,
            job=parameters.run_id,
            advertise=parameters.local_addr or os.environ.get("MUSTER_ADVERTISE", ""),
            workers=parameters.get_as_int("workers", 1) or 1,
        )
    except (AgentError, WireError) as error:
        raise RendezvousConnectionError(f"muster: {error}") from error
    return TorchrunRendezvousHandler(presence, StoreShelf(), parameters.run_id)


def create_handler() -> RendezvousHandlerCreator:
    """Entry point `torchrun.handlers`: torch calls it without arguments and registers what it returns."""
    return create_torchrun_handler
