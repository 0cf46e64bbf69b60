"""One turn of the core: an event in; records, a reply and pushes out.

The shell and the simulation both call this and nothing else to change a state.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.decide import decide
from coordinator.core.evolve import evolve
from coordinator.core.model import Event, Push, Record, Refused, Reply, SessionOpened, State
from coordinator.core.pushes import pushes, resync
from coordinator.core.settle import settle

MAX_ROUNDS = 1_000
"""Far more than any event needs: an agent gone, a generation cut, a job ended and its agents matched
anew take about ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one event came to.  The durable records must be stored before the rest is let out."""

    records: tuple[Record, ...]
    reply: Reply
    pushes: tuple[Push, ...]


def step(state: State, now_ms: int, event: Event) -> Outcome:
    """Decide `event` at `now_ms`, evolve `state` by what follows until it is quiet, and say what came of it.

    `now_ms` never goes back.  An agent whose session was accepted is told everything once, in place of
    what changed just now."""
    decision = decide(state, now_ms, event)
    records: list[Record] = []
    told: list[Push] = []
    due = decision.records
    for _ in range(MAX_ROUNDS):
        for record in due:
            evolve(state, record)
            told += pushes(state, record)
        records += due
        due = settle(state, now_ms)
        if not due:
            break
    else:
        raise AssertionError(f"the state does not come to rest after {type(event).__name__}: {due[0]}")
    if isinstance(event, SessionOpened) and not isinstance(decision.reply, Refused):
        told = [push for push in told if push.agent_id != event.agent_id]
        told += resync(state, event.agent_id)
    return Outcome(records=tuple(records), reply=decision.reply, pushes=tuple(told))
