"""The committed steps that the coordinator has not acknowledged: what a member keeps so that no record
is lost when the coordinator is away or the leader dies."""

from __future__ import annotations

import itertools
from collections import deque

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
        self.last_step = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def first_step(self) -> int:
        """The oldest step that is not acknowledged; 0 if there is none."""
        return self._steps[0].step if self._steps else 0

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

    def heard(self, sent: agent_pb2.Progress) -> None:
        """The evaluations of this message have arrived."""
        if sent.evaluations:
            last = sent.evaluations[-1].step
            while self._evaluations and self._evaluations[0].step <= last:
                self._evaluations.popleft()

    def rewind(self, step: int) -> None:
        """Training goes on from `step`: what came after it never happened."""
        while self._steps and self._steps[-1].step > step:
            self._steps.pop()
        self.forget_evaluations(step)
        self.last_step = min(self.last_step, step)
        self._acknowledged = min(self._acknowledged, step)

    def forget_evaluations(self, after: int) -> None:
        """Those of steps beyond `after` are of a state that was given up."""
        while self._evaluations and self._evaluations[-1].step > after:
            self._evaluations.pop()

    def batch(self, job_id: str, generation: int) -> agent_pb2.Progress | None:
        """The next message, within the wire's bounds; None if there is nothing to say.  The same again
        until it is acknowledged.  It ends before a gap: steps that were committed while we were not there."""
        if not self._steps and not self._evaluations:
            return None
        expected = itertools.count(self.first_step)
        oldest = itertools.islice(self._steps, STEPS_A_MESSAGE)
        steps = [step for step, number in zip(oldest, expected, strict=False) if step.step == number]
        return agent_pb2.Progress(
            job_id=job_id, generation=generation, steps=steps, evaluations=self._evaluations
        )
