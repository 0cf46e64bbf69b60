"""A worker that misbehaves at one step, as FAULT says (`KIND:STEP`); without it, an ordinary one."""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
from dataclasses import replace

import torch
from torch import Tensor

import trainer.elastic
import trainer.train
from trainer.agreement import Claim, Outcome
from trainer.elastic import ElasticGroup
from trainer.group import Group, Interrupted

KIND, _, _STEP = os.environ.get("FAULT", "").partition(":")
AT = int(_STEP or 0)


class Faulty(ElasticGroup):
    def backward(self, loss: Tensor) -> None:
        if self.step + 1 == AT and KIND == "nan":
            loss = loss * float("nan")
        super().backward(loss)

    def _vote(self, group: Group, norm: Tensor) -> Outcome:
        if self.step + 1 == AT and KIND == "die-before-vote":
            os._exit(9)
        outcome = super()._vote(group, norm)
        if self.step + 1 == AT and KIND == "miss-vote":
            raise Interrupted("the vote completed, but not here")
        return outcome

    def _apply(self, outcome: Outcome) -> None:
        super()._apply(outcome)
        if KIND == "count-compiled":
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            print(f"compiled {compiled} graphs by step {outcome.step}", flush=True)
        if outcome.step == AT and KIND == "corrupt":
            with torch.no_grad():
                self._parameters[0][0, 0] += 1.0
        if outcome.step == AT and KIND == "die-after-step":
            assert self._group is not None
            self._report(outcome, self._group)
            os._exit(9)


class Liar(Faulty):
    """Says that it is far ahead of everybody."""

    def _claim(self, rank: int) -> Claim:
        claim = super()._claim(rank)
        return replace(claim, step=claim.step + 1000) if claim.holds else claim


if KIND == "count-compiled":
    # What is compiled again is dynamo's decision; the code that inductor would make of it takes a minute.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # a test that waited in vain shows where its workers are
    trainer.elastic.ElasticGroup = Liar if KIND == "lie" else Faulty  # type: ignore[misc]
    trainer.train.main()
