"""One stream between an agent's process and the coordinator: ordered in each direction, never reordered,
silently stalled while a direction is cut, broken for one end before the other knows.

Two sessions know nothing of each other, so messages of an old one may arrive after a newer one opened.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from coordinator.core.model import AgentId, Refusal, SessionId, SessionOpened
from tests.sim.coordinator import Coordinator, GoAway

if TYPE_CHECKING:
    from tests.sim.agent import Process

KEEPALIVE_MS = (20_000, 30_000)
"""gRPC's ping and its timeout: how long a silent connection lives."""


class Session:
    def __init__(self, process: Process, coordinator: Coordinator, session_id: SessionId) -> None:
        self.process = process
        self.agent_id: AgentId = process.agent_id
        self.session_id = session_id
        self._machine = process.machine
        self._world = process.world
        self._coordinator = coordinator
        self._epoch = coordinator.starts
        self.agent_open = True
        self.coordinator_open = True
        self._inbox: deque[Any] = deque()
        self._taking = True  # the Hello
        self._ending = False
        self._up_ms = 0
        self._down_ms = 0
        self._held_up: list[Any] = []
        self._held_down: list[Any] = []

    # ------------------------------------------------------------------------- the agent's end

    def up(self, message: Any) -> None:
        if not self.agent_open:
            return
        if self._machine.cut_up:
            self._held_up.append(message)
            return
        self._up_ms = max(self._world.now_ms + self._machine.latency_ms(), self._up_ms)
        self._world.at(self._up_ms, self._arrived, message)

    def hello(self, event: SessionOpened) -> None:
        self.up(event)

    def agent_gone(self, *, silent: bool) -> None:
        """The agent's end is gone.  `silent`: nobody is left to say so (its machine lost power)."""
        if not self.agent_open:
            return
        self.agent_open = False
        if silent or self._machine.cut_up:
            self._world.after(self._world.between(*KEEPALIVE_MS), self._closed)
        else:
            self._up_ms = max(self._world.now_ms + self._machine.latency_ms(), self._up_ms)
            self._world.at(self._up_ms, self._closed)

    def link_changed(self) -> None:
        """A direction was cut or healed."""
        if self._machine.cut_up or self._machine.cut_down:
            self._world.after(self._world.between(*KEEPALIVE_MS), self._starved)
        if not self._machine.cut_up:
            held, self._held_up = self._held_up, []
            for message in held:
                self.up(message)
        if not self._machine.cut_down:
            held, self._held_down = self._held_down, []
            for message in held:
                self.down(message)
            if not self.coordinator_open and self.agent_open:
                self._world.after(self._machine.latency_ms(), self._agent_told)

    def _starved(self) -> None:
        """Either side's keepalive has had no answer."""
        if self._machine.cut_up or self._machine.cut_down:
            self._closed()
            self._agent_told()

    def agent_frozen(self) -> None:
        self._world.after(self._world.between(*KEEPALIVE_MS), self._unanswered)

    def _unanswered(self) -> None:
        if self.process.frozen:
            self.end()

    def _agent_told(self) -> None:
        if self.agent_open:
            self.agent_open = False
            self.process.later(0, self.process.session_broke, self)

    # ------------------------------------------------------------------------- the coordinator's end

    def _arrived(self, message: Any) -> None:
        if not self.coordinator_open or self._epoch != self._coordinator.starts or not self._coordinator.up:
            return
        if isinstance(message, SessionOpened):
            self._coordinator.hello(self, message)
            return
        self._inbox.append(message)
        if not self._taking:
            self.ready()

    def ready(self) -> None:
        """The message before has been dealt with."""
        self._taking = False
        if self._inbox and self.coordinator_open and not self._ending:
            self._taking = True
            self._coordinator.take(self, self._inbox.popleft())

    def down(self, message: Any) -> None:
        if not self.coordinator_open or self._ending:
            return
        if self._machine.cut_down:
            self._held_down.append(message)
            return
        self._down_ms = max(self._world.now_ms + self._machine.latency_ms(), self._down_ms)
        self._world.at(self._down_ms, self._received, message)

    def _received(self, message: Any) -> None:
        if self.agent_open:
            self.process.later(0, self.process.received, self, message)

    def go_away(self, refusal: Refusal, message: str) -> None:
        self.down(GoAway(refusal=refusal, message=message))
        self.end()

    def end(self) -> None:
        """The coordinator ends the stream; what it has sent still arrives."""
        if self._ending or not self.coordinator_open:
            return
        self._ending = True
        self._world.after(0, self._closed)
        if not self._machine.cut_down:
            self._down_ms = max(self._world.now_ms + self._machine.latency_ms(), self._down_ms)
            self._world.at(self._down_ms, self._agent_told)

    def coordinator_died(self) -> None:
        self.coordinator_open = False
        self._inbox.clear()
        if self.agent_open and not self._machine.cut_down:
            self._world.after(self._machine.latency_ms(), self._agent_told)

    def _closed(self) -> None:
        if not self.coordinator_open:
            return
        self.coordinator_open = False
        self._inbox.clear()
        if self._epoch == self._coordinator.starts and self._coordinator.up:
            self._coordinator.closed(self)
