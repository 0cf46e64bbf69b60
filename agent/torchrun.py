"""The session that stock torchrun holds with the coordinator, on an event loop in a thread of its own.

It has no workers and no data: it offers stores, takes plans and reports what torchrun's elastic agent
shows of itself.  `agent/rendezvous.py` has the torch side.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agent.errors import AgentError, RefusedByCoordinator
from agent.home import Home
from agent.lobby import Lobby
from agent.network import reaching_address
from agent.session import Session
from protos import agent_pb2, wire

PROBE_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0  # how long one that is done waits for the others to say so too
LEAVE_TIMEOUT_S = END_TIMEOUT_S + 3.0


class TorchrunPresence:
    """Called from torchrun's thread; everything is handed to the loop's thread."""

    def __init__(self, *, home: Path, address: str, job: str, advertise: str, workers: int) -> None:
        """Raise WireError without a usable identity."""
        identity = wire.Identity.load(Home(root=home).identity)
        if address:
            wire.split_address(address)
            identity = replace(identity, address=address)
        self.agent_id = identity.id
        self.lobby = Lobby()
        self.refusal = ""
        self._identity = identity
        self._job = job
        self._advertise = advertise or reaching_address(identity.address)
        self._workers = workers
        self._home = home
        self._incarnation = secrets.token_hex(8)
        self._job_id = ""
        self._generation = 0
        self._port = 0
        self._formed = 0
        self._probe = agent_pb2.Probe()
        self._loop = asyncio.new_event_loop()
        self._session: Session | None = None
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="muster-session", daemon=True)
        self._thread.start()

    # ---- from torchrun's thread

    def ready(self, port: int) -> None:
        self._soon(lambda: self._set_port(port))

    def formed(self, generation: int) -> None:
        self._soon(lambda: self._set_formed(generation))

    def released(self, generation: int) -> None:
        released = agent_pb2.Released(job_id=self._job_id, generation=generation)
        self._soon(lambda: self._send(agent_pb2.AgentMessage(released=released)))

    def collective_failed(self, generation: int, detail: str) -> None:
        self._soon(lambda: self._send_failed(agent_pb2.FAILURE_KIND_COLLECTIVE, generation, detail))

    def leave(self, failure: str) -> None:
        """Finished, or with `failure` as the reason why not; then goodbye.  Returns when it is said."""
        if self._thread.is_alive():
            self._soon(lambda: asyncio.ensure_future(self._leave(failure)))
            self._thread.join(LEAVE_TIMEOUT_S)

    def _soon(self, callback: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    # ---- on the loop's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except RefusedByCoordinator as refused:
            self.refusal = str(refused)
        except AgentError as error:
            self.refusal = str(error)
        finally:
            self.lobby.close(self.refusal or "the session with the coordinator ended")
            self._loop.close()

    async def _serve(self) -> None:
        from agent.probe import probe

        self._probe = await asyncio.to_thread(
            probe, home=self._home, advertise_host=self._advertise, gpus=None, labels={}
        )
        self._probe.worker_count = self._workers
        self._session = Session(lambda: self._identity, self)
        await self._session.run()

    def _set_port(self, port: int) -> None:
        self._port = port
        self._send_ready()

    def _set_formed(self, generation: int) -> None:
        self._formed = generation
        self._send_formed()

    def _send(self, message: agent_pb2.AgentMessage) -> None:
        if self._session is not None:
            self._session.send(message)

    def _send_ready(self) -> None:
        if self._job_id and self._port:
            ready = agent_pb2.Ready(job_id=self._job_id, store_host=self._advertise, store_port=self._port)
            self._send(agent_pb2.AgentMessage(ready=ready))

    def _send_formed(self) -> None:
        if self._formed and self._formed == self._generation:
            formed = agent_pb2.Formed(job_id=self._job_id, generation=self._formed)
            self._send(agent_pb2.AgentMessage(formed=formed))

    def _send_failed(self, kind: agent_pb2.FailureKind, generation: int, detail: str) -> None:
        failed = agent_pb2.WorkerFailed(
            job_id=self._job_id, generation=generation, kind=kind, detail=detail[:4096]
        )
        self._send(agent_pb2.AgentMessage(failed=failed))

    async def _leave(self, failure: str) -> None:
        if failure:
            self._send_failed(agent_pb2.FAILURE_KIND_PROGRAM, self._generation, failure)
        elif self._generation:
            finished = agent_pb2.Finished(job_id=self._job_id, generation=self._generation)
            self._send(agent_pb2.AgentMessage(finished=finished))
            # Goodbye before everybody has finished would be the loss of a member.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT_S):
                    await self._ended.wait()
        if self._session is not None:
            await self._session.close("torchrun failed" if failure else "torchrun is done")

    # ---- session delegate

    def hello(self) -> agent_pb2.Hello:
        held = agent_pb2.Membership(job_id=self._job_id, generation=self._formed) if self._formed else None
        return agent_pb2.Hello(
            protocol=wire.PROTOCOL,
            incarnation=self._incarnation,
            probe=self._probe,
            held=held,
            torchrun_job=self._job,
        )

    def heartbeat(self) -> agent_pb2.Heartbeat:
        return agent_pb2.Heartbeat(activity="computing" if self._formed else "preparing")

    def welcomed(self, welcome: agent_pb2.Welcome) -> None:
        if not self.lobby.pending(self._formed):
            self._send_ready()
        self._send_formed()

    def delivered(self, mark: int) -> None:
        pass

    def disconnected(self) -> None:
        pass

    def received(self, message: agent_pb2.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "assignment":
                self._job_id = message.assignment.job_id
                self._send_ready()
            case "plan" if message.plan.generation > self._generation:
                self._generation = message.plan.generation
                if any(m.agent_id == self.agent_id and m.group_rank == 0 for m in message.plan.members):
                    self._port = 0  # this store is used up; the handler offers the next
                self.lobby.offer(message.plan)
            case "unassign":
                self._ended.set()
                self.lobby.close(message.unassign.reason or "the job ended")
            case _:
                pass
