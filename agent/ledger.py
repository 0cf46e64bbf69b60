"""The committed steps that the coordinator has not acknowledged: what a member keeps so that no record
is lost when the coordinator is away or the leader dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from protos import agent_pb2

STEPS = 100_000
STEPS_A_MESSAGE = 1_000
EVALUATIONS = 100


class Ledger:
    """Steps in order.  Full, it forgets the oldest: the coordinator then sees a gap and says so."""

    def __init__(self) -> None:
        self._steps: deque[agent_pb2.StepRecord] = deque(maxlen=STEPS)
        self._evaluations: deque[agent_pb2.Evaluation] = deque(maxlen=EVALUATIONS)
        self._acknowledged = 0
        self._sent = 0
        self._evaluation_sent = 0
        self.last_step = 0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, record: agent_pb2.StepRecord) -> None:
        """Append a step; one that is not beyond the last is known already."""
        if record.step > self.last_step:
            self.last_step = record.step
            if record.step > self._acknowledged:
                self._steps.append(record)

    def evaluated(self, evaluation: agent_pb2.Evaluation) -> None:
        self._evaluations.append(evaluation)

    def acknowledge(self, step: int) -> None:
        """All steps up to `step` are recorded: forget them."""
        self._acknowledged = max(self._acknowledged, step)
        while self._steps and self._steps[0].step <= step:
            self._steps.popleft()
        while (
            self._evaluations
            and self._evaluations[0].step <= step
            and self._evaluation_sent >= self._evaluations[0].step
        ):
            self._evaluations.popleft()

    def rewind(self, step: int) -> None:
        """Training goes on from `step`: what came after it never happened."""
        while self._steps and self._steps[-1].step > step:
            self._steps.pop()
        while self._evaluations and self._evaluations[-1].step > step:
            self._evaluations.pop()
        self.last_step = min(self.last_step, step)
        self._acknowledged = min(self._acknowledged, step)
        self._sent = min(self._sent, step)
        self._evaluation_sent = min(self._evaluation_sent, step)

    def resend(self) -> None:
        """Whoever heard what was sent may not have kept it: send everything unacknowledged again."""
        self._sent = self._evaluation_sent = self._acknowledged

    def unsent(self, job_id: str, generation: int) -> Iterator[agent_pb2.Progress]:
        """What was not sent yet, in messages within the wire's bounds; taken is sent."""
        steps = list(self._steps_after(self._sent))
        evaluations = [e for e in self._evaluations if e.step > self._evaluation_sent]
        while steps or evaluations:
            batch = steps[:STEPS_A_MESSAGE]
            del steps[:STEPS_A_MESSAGE]
            upto = batch[-1].step if batch else self._sent
            due = evaluations if not steps else [e for e in evaluations if e.step <= upto]
            evaluations = [] if not steps else [e for e in evaluations if e.step > upto]
            self._sent = max(self._sent, upto)
            if due:
                self._evaluation_sent = due[-1].step
            yield agent_pb2.Progress(job_id=job_id, generation=generation, steps=batch, evaluations=due)

    def _steps_after(self, step: int) -> Iterator[agent_pb2.StepRecord]:
        fresh: list[agent_pb2.StepRecord] = []
        for record in reversed(self._steps):  # nearly always the last one only
            if record.step <= step:
                break
            fresh.append(record)
        return reversed(fresh)
