"""Strikes: how flapping agents cool down (rule 11)."""

from __future__ import annotations

from coordinator.core.model import (
    Agent,
    Record,
    Standing,
    StandingChanged,
    State,
    StrikeCounted,
    Why,
)

TOLERATED = 2
"""So many strikes cost nothing; each further one quarantines, for twice as long."""


def strike(state: State, now_ms: int, agent: Agent, detail: str) -> tuple[Record, ...]:
    """Count one strike, and quarantine the agent if it has too many."""
    strikes = agent.strikes + 1
    counted = StrikeCounted(at_ms=now_ms, agent_id=agent.agent_id, strikes=strikes, detail=detail)
    if strikes <= TOLERATED or agent.standing is not Standing.ELIGIBLE:
        return (counted,)
    detail = f"strike {strikes}: {detail}"
    return (
        counted,
        quarantine(state, now_ms, agent, why=Why.FLAPPING, detail=detail, before=strikes - TOLERATED - 1),
    )


def quarantine(
    state: State, now_ms: int, agent: Agent, *, why: Why, detail: str, before: int
) -> StandingChanged:
    """For twice as long as the time before; `before`: how often that was."""
    timing = state.timing
    # More doublings than this exceed any bound that makes sense.
    doublings = min(before, 20)
    cool_down_ms = min(timing.quarantine_base_ms << doublings, timing.quarantine_max_ms)
    return StandingChanged(
        at_ms=now_ms,
        agent_id=agent.agent_id,
        standing=Standing.QUARANTINED,
        why=why,
        detail=detail,
        until_ms=now_ms + cool_down_ms,
    )


def deadline(state: State, agent: Agent) -> int | None:
    """When the next strike is forgiven."""
    return agent.last_strike_ms + state.timing.forgive_ms if agent.strikes else None
