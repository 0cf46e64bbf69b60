"""Open sessions: what waits to be written to each agent, and how a session ends."""

from __future__ import annotations

import asyncio
from collections import deque

import grpc.aio

from coordinator.core.model import AgentId, SessionId
from protos import agent_pb2

WRITE_TIMEOUT_S = 10.0
ACKS_TOGETHER_S = 0.02


class OpenSession:
    """One open stream.  `send` never waits; a peer that does not read is cut off."""

    def __init__(
        self,
        agent_id: AgentId,
        session_id: SessionId,
        most_waiting: int,
        write_timeout_s: float = WRITE_TIMEOUT_S,
    ) -> None:
        self.agent_id = agent_id
        self.session_id = session_id
        self._most_waiting = most_waiting
        self._write_timeout_s = write_timeout_s
        self._waiting: deque[agent_pb2.CoordinatorMessage | bytes] = deque()
        self._stirred = asyncio.Event()
        self._ending = False
        self._writer: asyncio.Task[None] | None = None
        self._writing_since: float | None = None
        self._watch: asyncio.TimerHandle | None = None

    def send(self, message: agent_pb2.CoordinatorMessage | bytes) -> None:
        """Queue a message, or an encoded one.  After a GoAway, and after `end`, nothing more is taken."""
        if self._ending:
            return
        if len(self._waiting) >= self._most_waiting:
            self.end()
            if self._writer is not None:
                self._writer.cancel()
            return
        self._waiting.append(message)
        if not isinstance(message, bytes) and message.HasField("go_away"):
            self._ending = True
        self._stirred.set()

    def end(self) -> None:
        """Write what waits, then end the stream."""
        self._ending = True
        self._stirred.set()

    def write_to(self, context: grpc.aio.ServicerContext) -> asyncio.Task[None]:
        """Start to write.  The task ends with the session, and when the peer does not take what is written."""
        self._writer = asyncio.create_task(
            self._write(context), name=f"session {self.session_id} of {self.agent_id}"
        )
        return self._writer

    async def _write(self, context: grpc.aio.ServicerContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._waiting:
                    self._writing_since = loop.time()
                    if self._watch is None:
                        self._watch = loop.call_later(self._write_timeout_s, self._look)
                    await context.write(self._waiting.popleft())
                    self._writing_since = None
                if self._ending:
                    return
                self._stirred.clear()
                await self._stirred.wait()
        finally:
            if self._watch is not None:
                self._watch.cancel()

    def _look(self) -> None:
        """Cut off who does not take what is written.  One timer for many writes: setting one up for each cost
        as much as a third of a write."""
        self._watch = None
        if self._writing_since is None or self._writer is None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._writing_since + self._write_timeout_s - loop.time()
        if left_s > 0:
            self._watch = loop.call_later(left_s, self._look)
        else:
            self._writer.cancel()


class Sessions:
    """The open session of each agent."""

    def __init__(self) -> None:
        self._by_agent: dict[AgentId, OpenSession] = {}

    def open(self, session: OpenSession) -> None:
        """Make this the agent's session; one before it ends."""
        before = self._by_agent.get(session.agent_id)
        self._by_agent[session.agent_id] = session
        if before is not None:
            before.end()

    def close(self, session: OpenSession) -> None:
        if self._by_agent.get(session.agent_id) is session:
            del self._by_agent[session.agent_id]

    def of(self, agent_id: AgentId) -> OpenSession | None:
        return self._by_agent.get(agent_id)

    def __len__(self) -> int:
        return len(self._by_agent)

    def send_all(self, message: agent_pb2.CoordinatorMessage) -> None:
        for session in list(self._by_agent.values()):
            session.send(message)


class Acks:
    """Answers heartbeats a few milliseconds late and many together: each alone wakes the loop and gRPC's threads
    for itself, which with thousands of agents is a third of what their heartbeats cost."""

    def __init__(self, together_s: float = ACKS_TOGETHER_S) -> None:
        self._together_s = together_s
        self._owed: dict[OpenSession, int] = {}

    def owe(self, session: OpenSession, sequence: int) -> None:
        """Answer this heartbeat, and with it those before it."""
        if not self._owed:
            asyncio.get_running_loop().call_later(self._together_s, self._pay)
        self._owed[session] = sequence

    def _pay(self) -> None:
        owed, self._owed = self._owed, {}
        for session, sequence in owed.items():
            ack = agent_pb2.HeartbeatAck(sequence=sequence)
            session.send(agent_pb2.CoordinatorMessage(heartbeat_ack=ack))
