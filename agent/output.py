"""Workers' output on its way to the operator: in batches, and no faster than the bound."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from protos import agent_pb2

LINES_PER_S = 200
LINES_KEPT = 1_000
BATCH = 200
DELAY_S = 0.25


class Output:
    """Lines beyond the rate are dropped and counted; the count is sent in their place."""

    def __init__(self, job_id: str, send: Callable[[agent_pb2.AgentMessage], int]) -> None:
        self._job_id = job_id
        self._send = send
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._allowance = float(LINES_KEPT)
        self._counted_s = 0.0

    def write(self, line: str) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._allowance = min(LINES_KEPT, self._allowance + (now_s - self._counted_s) * LINES_PER_S)
        self._counted_s = now_s
        if self._allowance < 1 or len(self._lines) >= LINES_KEPT:
            self._dropped += 1
            return
        self._allowance -= 1
        if self._dropped:
            self._lines.append(f"[{self._dropped} lines dropped here: more than {LINES_PER_S} a second]")
            self._dropped = 0
        self._lines.append(line)
        if self._timer is None:
            self._timer = loop.call_later(DELAY_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._lines:
            batch = [self._lines[i] for i in range(min(BATCH, len(self._lines)))]
            if not self._send(
                agent_pb2.AgentMessage(logs=agent_pb2.LogLines(job_id=self._job_id, lines=batch))
            ):
                return  # no session: kept, bounded, for the next flush
            for _ in batch:
                self._lines.popleft()
