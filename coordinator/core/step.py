"""One turn of the core: an event in; records, a reply and pushes out.

The shell and the simulation both call this and nothing else to change a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.core.decide import decide
from coordinator.core.evolve import evolve
from coordinator.core.model import (
    Event,
    ManifestCommitted,
    Push,
    Record,
    Refused,
    Reply,
    SessionOpened,
    State,
)
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


Seal = Callable[[str], str]
"""Gives a manifest back with the coordinator's signature; the same for the same manifest."""


def no_seal(manifest_json: str) -> str:
    """For those who simulate: nobody there checks signatures."""
    return manifest_json


def step(state: State, now_ms: int, event: Event, seal: Seal = no_seal) -> Outcome:
    """Decide `event` at `now_ms`, evolve `state` by what follows until it is quiet, and say what came of it.

    `now_ms` never goes back.  An agent whose session was accepted is told everything once, in place of
    what changed just now.  A manifest is sealed before anybody can see it committed."""
    decision = decide(state, now_ms, event)
    records: list[Record] = []
    told: list[Push] = []
    due = decision.records
    for _ in range(MAX_ROUNDS):
        for decided in due:
            record = _sealed(decided, seal) if isinstance(decided, ManifestCommitted) else decided
            evolve(state, record)
            told += pushes(state, record)
            records.append(record)
        due = settle(state, now_ms)
        if not due:
            break
    else:
        raise AssertionError(f"the state does not come to rest after {type(event).__name__}: {due[0]}")
    if isinstance(event, SessionOpened) and not isinstance(decision.reply, Refused):
        told = [push for push in told if push.agent_id != event.agent_id]
        told += resync(state, event.agent_id)
    return Outcome(records=tuple(records), reply=decision.reply, pushes=tuple(told))


def _sealed(record: ManifestCommitted, seal: Seal) -> ManifestCommitted:
    plain = record.checkpoint.manifest_json
    text = seal(plain)
    return replace(record, checkpoint=replace(record.checkpoint, manifest_json=text, sealed=text != plain))
