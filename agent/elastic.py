"""torch's LocalElasticAgent with workers that are warm before any rank is known and live through
re-formations: `_initialize_workers` and `_restart_workers` hand out plans instead of starting processes.

Runs in a thread beside the event loop, which starts and kills processes and writes to control sockets;
this side waits in the lobby, without polling, and keeps torch's worker group in step.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from agent.lobby import Lobby, LobbyClosed, Seen
from agent.rendezvous import MusterRendezvousHandler, StoreShelf, WorkersChangedError

if TYPE_CHECKING:
    from agent.job import JobRun


class MusterElasticAgent(LocalElasticAgent):
    """`stop_workers` is called when torch's side ends, whatever the reason."""

    def __init__(
        self,
        spec: WorkerSpec,
        handler: MusterRendezvousHandler,
        lobby: Lobby,
        stop_workers: Callable[[], None],
    ) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self._handler = handler
        self._lobby = lobby
        self._stop = stop_workers

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        """Wait for warm workers, then for a plan; the loop has handed it to them by the time we hear of it."""
        while True:
            try:
                self._handler.pids = self._lobby.wait_workers()
                self._rendezvous(worker_group)
                break
            except WorkersChangedError:
                continue
        for worker, pid in zip(worker_group.workers, self._handler.pids, strict=True):
            worker.id = pid
        worker_group.state = WorkerState.HEALTHY

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Keep the processes: a new plan, or a replaced worker, needs no more than to meet again."""
        self._initialize_workers(worker_group)

    def _assign_worker_ranks(
        self,
        store: Any,
        group_rank: int,
        group_world_size: int,
        spec: WorkerSpec,
    ) -> list[Worker]:
        """The plan has said it: no store is asked."""
        member = self._handler.member
        assert member is not None
        return [
            Worker(
                local_rank=local_rank,
                global_rank=member.first_rank + local_rank,
                role_rank=member.first_rank + local_rank,
                world_size=self._handler.world_size,
                role_world_size=self._handler.world_size,
            )
            for local_rank in range(spec.local_world_size)
        ]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._lobby.closed is not None:
            ranks = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=ranks)
        if self._lobby.pids != tuple(worker.id for worker in worker_group.workers):
            return RunResult(state=WorkerState.UNHEALTHY)
        return RunResult(state=WorkerState.HEALTHY)

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        group = self._worker_group
        self._initialize_workers(group)
        while True:
            self._lobby.wait_change(Seen(generation=self._handler.generation, pids=self._handler.pids))
            result = self._monitor_workers(group)
            group.state = result.state
            if result.state is WorkerState.SUCCEEDED:
                return result
            if result.state is WorkerState.UNHEALTHY or self._handler.num_nodes_waiting() > 0:
                self._restart_workers(group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._stop()

    def _shutdown(self, death_sig: Any = None, timeout: int = 30) -> None:
        self._stop()

    @contextlib.contextmanager
    def record_duration(self, state: str) -> Iterator[None]:
        """torch's record of an event looks up the host's full name, which takes seconds where name
        resolution is broken; nobody reads it here."""
        yield


class Seat:
    """The torch side of one job: see `agent.job.ElasticSeat`."""

    def __init__(self, lobby: Lobby, job: JobRun, *, agent_id: str, workers: int) -> None:
        self._lobby = lobby
        self._shelf = StoreShelf()
        self._handler = MusterRendezvousHandler(
            lobby, self._shelf, lambda: job.call_soon(job.announce), agent_id=agent_id, run_id=job.job_id
        )
        spec = WorkerSpec(
            role=DEFAULT_ROLE,
            local_world_size=workers,
            rdzv_handler=self._handler,
            entrypoint=sys.executable,
            max_restarts=0,  # who may try again is the coordinator's decision
        )
        self._agent = MusterElasticAgent(
            spec, self._handler, lobby, lambda: lobby.close("the elastic agent ended")
        )

    def fresh_port(self) -> int:
        return self._shelf.fresh_port()

    def run(self) -> None:
        with contextlib.suppress(LobbyClosed):
            try:
                self._agent.run()
            finally:
                self._handler.shutdown()
