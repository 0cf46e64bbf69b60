"""The agent's presence at the coordinator: one stream, kept open, reopened when it breaks.

Knows the wire and time; knows nothing of jobs or workers.  What the coordinator must be told again
after a reconnect is the delegate's business (`welcomed`): the session itself remembers nothing, so that
there is one place that knows what is still true.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from agent.errors import RefusedByCoordinator
from agent.patience import NobodyThere, Patience
from protos import agent_pb2, agent_pb2_grpc, wire

log = structlog.get_logger(__name__)

OUTBOX_MESSAGES = 20_000

# Refusals that time may heal; after any other there is no sense in coming back.
PASSING = frozenset({agent_pb2.REFUSAL_RATE_LIMITED, agent_pb2.REFUSAL_NO_SPACE})


class Delegate(Protocol):
    """What the session asks of its owner; every call is made on the event loop and must not block."""

    def hello(self) -> agent_pb2.Hello: ...
    def heartbeat(self) -> agent_pb2.Heartbeat: ...
    def welcomed(self, welcome: agent_pb2.Welcome) -> None:
        """A session is open: send again whatever the coordinator may have missed."""

    def received(self, message: agent_pb2.CoordinatorMessage) -> None: ...
    def delivered(self, mark: int) -> None:
        """Everything whose `send` returned at most `mark` has been received."""

    def disconnected(self) -> None: ...


class Session:
    """`run` keeps the session; `send` speaks in it; `close` ends it politely."""

    def __init__(
        self, identity: Callable[[], wire.Identity], delegate: Delegate, patience: Patience | None = None
    ) -> None:
        self._identity = identity
        self._delegate = delegate
        self._patience = patience or Patience()
        self._outbox: deque[agent_pb2.AgentMessage] = deque()
        self._outbox_filled = asyncio.Event()
        self._sent = 0
        self._closing = asyncio.Event()
        self._call: Any = None
        self._answered = False
        self._disconnected = asyncio.Event()
        self.connected = False
        self.last_error = ""

    @property
    def backlog(self) -> int:
        """Messages waiting for the network."""
        return len(self._outbox)

    def send(self, message: agent_pb2.AgentMessage) -> int:
        """Queue for the open session and return its mark for `Delegate.delivered`; 0 if none is open."""
        if not self.connected:
            return 0
        if len(self._outbox) >= OUTBOX_MESSAGES:
            log.warning("session.stuck", backlog=len(self._outbox))
            self._call.cancel()
            return 0
        self._outbox.append(message)
        self._outbox_filled.set()
        self._sent += 1
        return self._sent

    async def run(self) -> None:
        """Until `close`.  Raise RefusedByCoordinator when coming back makes no sense."""
        while not self._closing.is_set():
            self._answered = False
            unanswered = False
            try:
                await self._attempt()
            except grpc.aio.AioRpcError as error:
                refusal = wire.refusal_of(error)
                if refusal is not None and refusal not in PASSING:
                    raise RefusedByCoordinator(
                        f"coordinator refused: {error.details()} [{agent_pb2.Refusal.Name(refusal)}]"
                    ) from error
                self.last_error = f"{error.code().name}: {error.details()}"
                # Refused, or not there: only with a word from the coordinator is it an answer.
                unanswered = not self._answered and refusal is None
            except NobodyThere as error:
                self.last_error = str(error)
            except (TimeoutError, asyncio.InvalidStateError, OSError) as error:
                self.last_error = str(error) or "no answer in time"
                unanswered = not self._answered
            if self._closing.is_set():
                return
            address = self._identity().address
            pause_s = self._patience.pause_s(unanswered=unanswered and await self._patience.knock(address))
            log.info(
                "session.reconnecting", address=address, after=self.last_error, pause_s=round(pause_s, 2)
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._closing.wait()

    async def _attempt(self) -> None:
        identity = self._identity()
        async with wire.aio_channel(identity, connect_s=self._patience.wait_s) as channel:
            call = agent_pb2_grpc.AgentServiceStub(channel).Session()
            self._call = call
            try:
                first = await self._patience.answer(self._greet(call), channel, identity.address)
                if first is grpc.aio.EOF:
                    await _raise_status(call)
                    raise TimeoutError("the coordinator closed the session without a word")
                self._answered = True
                if first.HasField("go_away"):
                    self._go_away(first.go_away)
                    return
                if not first.HasField("welcome"):
                    raise TimeoutError(f"the session began with {first.WhichOneof('body')}, expected welcome")
                await self._converse(call, first.welcome)
            finally:
                call.cancel()
                if self.connected:
                    self.connected = False
                    self._disconnected.set()
                    self._delegate.disconnected()

    async def _greet(self, call: Any) -> Any:
        await call.write(agent_pb2.AgentMessage(hello=self._delegate.hello()))
        return await call.read()

    async def _converse(self, call: Any, welcome: agent_pb2.Welcome) -> None:
        self._outbox.clear()
        self._outbox_filled.clear()
        self._disconnected.clear()
        self.connected = True
        self.last_error = ""
        self._patience.answered(welcome.lease_ms)
        heartbeats = Heartbeats(welcome, self._delegate, self, call)
        tasks = (asyncio.create_task(self._write(call)), asyncio.create_task(heartbeats.run()))
        try:
            self._delegate.welcomed(welcome)
            while True:
                message = await call.read()
                if message is grpc.aio.EOF:
                    await _raise_status(call)
                    self.last_error = "the coordinator closed the session"
                    return
                heartbeats.heard()
                match message.WhichOneof("body"):
                    case "heartbeat_ack":
                        self._delegate.delivered(heartbeats.mark_of(message.heartbeat_ack.sequence))
                    case "go_away":
                        self._go_away(message.go_away)
                        return
                    case _:
                        self._delegate.received(message)
        except asyncio.CancelledError:
            # grpc.aio raises this from read() both when we cancelled the call and when somebody cancels us.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self.last_error = self.last_error or "the session was given up"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _go_away(self, go_away: agent_pb2.GoAway) -> None:
        text = " ".join([go_away.message, *go_away.unmet])
        if go_away.retry or self._closing.is_set():
            self.last_error = text or "the coordinator sent us away"
            return
        raise RefusedByCoordinator(f"coordinator refused: {text} [{agent_pb2.Refusal.Name(go_away.reason)}]")

    async def _write(self, call: Any) -> None:
        try:
            while True:
                while self._outbox:
                    message = self._outbox.popleft()
                    await call.write(message)
                    if message.HasField("goodbye"):
                        await call.done_writing()
                        return
                self._outbox_filled.clear()
                await self._outbox_filled.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees the same end, with its status

    async def close(self, goodbye: str, timeout_s: float = 2.0) -> None:
        """Say goodbye if a session is open, flush it, and let `run` return."""
        self._closing.set()
        if not self.connected:
            if self._call is not None:
                self._call.cancel()
            return
        self.send(agent_pb2.AgentMessage(goodbye=agent_pb2.Goodbye(reason=goodbye[:256])))
        call = self._call
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._disconnected.wait()  # the coordinator ends a stream that said goodbye
        call.cancel()


async def _raise_status(call: Any) -> None:
    """Raise the error with which the stream ended, if it did not end well."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        raise grpc.aio.AioRpcError(
            code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


class Heartbeats:
    """Sends them at the welcome's interval; ends a session in which nothing is heard for a lease."""

    def __init__(self, welcome: agent_pb2.Welcome, delegate: Delegate, session: Session, call: Any) -> None:
        self._interval_s = max(0.02, welcome.heartbeat_interval_ms / 1000)
        self._lease_s = max(self._interval_s * 2, welcome.lease_ms / 1000)
        self._delegate = delegate
        self._session = session
        self._call = call
        self._marks: deque[tuple[int, int]] = deque(maxlen=1_000)
        self._sequence = 0
        self._heard_s = asyncio.get_running_loop().time()

    def heard(self) -> None:
        self._heard_s = asyncio.get_running_loop().time()

    def mark_of(self, sequence: int) -> int:
        """What had been sent before this heartbeat."""
        mark = 0
        while self._marks and self._marks[0][0] <= sequence:
            mark = self._marks.popleft()[1]
        return mark

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            beat = self._delegate.heartbeat()
            self._sequence += 1
            beat.sequence = self._sequence
            self._marks.append((self._sequence, self._session.send(agent_pb2.AgentMessage(heartbeat=beat))))
            await asyncio.sleep(self._interval_s)
            if loop.time() - self._heard_s > self._lease_s:
                self._session.last_error = f"nothing was heard for {self._lease_s:.1f} s"
                self._call.cancel()
                return
