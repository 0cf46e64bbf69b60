"""What time, or the state itself, demands: called until it returns nothing, and told when to come back.

`settle` looks only at what is on the agenda: agents and jobs that a record touched, or whose time has
come.  So an event costs what it changes, not what there is.  The agenda is a cache of "nothing to do
here": settle and `next_deadline` tidy it, and that never changes an answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from coordinator.core import checkpoints, forming, matching, strikes
from coordinator.core.forming import Proposal
from coordinator.core.model import (
    ENDED,
    Agent,
    AgentId,
    AgentLost,
    AgentUnassigned,
    Evidence,
    Generation,
    Job,
    JobId,
    JobPhase,
    JobPhaseChanged,
    MemberLost,
    NotYet,
    PreparationForgiven,
    PreparationGivenUp,
    Presence,
    Record,
    Standing,
    StandingChanged,
    State,
    StrikeCounted,
    WaitChanged,
    Why,
)

AGENT, JOB = "agent", "job"
Judged = dict[JobId, Proposal | NotYet]
"""What `forming.assess` has said in this call: it asks every member, and the state stands still meanwhile."""
# To look a member of an enum up takes ten times as long as a name does, and every agent is asked time and again.
_READY, _SUSPECT, _QUARANTINED = Presence.READY, Presence.SUSPECT, Standing.QUARANTINED


def settle(state: State, now_ms: int) -> tuple[Record, ...]:
    """The next transitions that are due, or nothing if all is quiet at `now_ms`."""
    agenda = state.agenda
    _wake(state, now_ms)
    if not agenda.agents and not agenda.jobs and not agenda.slots:
        return ()
    records: list[Record] = []
    for agent_id in agenda.agents:
        records += _settle_agent(state, state.agents[agent_id], now_ms)
    judged: Judged = {}
    if not records:
        for job_id in sorted(agenda.jobs, key=lambda i: state.jobs[i].order):
            records += _settle_job(state, state.jobs[job_id], now_ms, judged)
    if not records:
        records += matching.match(state, now_ms)
    if not records:
        _sleep(state, now_ms, judged)
    return tuple(records)


def next_deadline(state: State) -> int | None:
    """When `settle` has something to do if nothing happens before; None if never.

    Asked when the state is quiet, it is exact."""
    agenda = state.agenda
    while agenda.heap:
        at_ms, kind, key = agenda.heap[0]
        if agenda.due.get((kind, key)) != at_ms:
            heapq.heappop(agenda.heap)
            continue
        # Leases are renewed without a word here, so what was noted may be too early by now.
        due_ms = _agent_deadline(state, state.agents[AgentId(key)]) if kind == AGENT else at_ms
        if due_ms == at_ms:
            return at_ms
        heapq.heappop(agenda.heap)
        _note(state, kind, key, due_ms)
    return None


# ------------------------------------------------------------------------------ the agenda


def _wake(state: State, now_ms: int) -> None:
    agenda = state.agenda
    while agenda.heap and agenda.heap[0][0] <= now_ms:
        at_ms, kind, key = heapq.heappop(agenda.heap)
        if agenda.due.get((kind, key)) != at_ms:
            continue
        del agenda.due[kind, key]
        if kind == AGENT:
            agenda.agents[AgentId(key)] = None
        else:
            agenda.jobs[JobId(key)] = None


def _sleep(state: State, now_ms: int, judged: Judged) -> None:
    agenda = state.agenda
    for agent_id in agenda.agents:
        _note(state, AGENT, agent_id, _agent_deadline(state, state.agents[agent_id]))
    for job_id in agenda.jobs:
        _note(state, JOB, job_id, _job_deadline(state, state.jobs[job_id], now_ms, judged))
    agenda.agents.clear()
    agenda.jobs.clear()
    agenda.slots = False
    if len(agenda.heap) > 64 + 4 * len(agenda.due):
        agenda.heap = [(at_ms, kind, key) for (kind, key), at_ms in agenda.due.items()]
        heapq.heapify(agenda.heap)


def _note(state: State, kind: str, key: str, at_ms: int | None) -> None:
    due = state.agenda.due
    if at_ms is None:
        due.pop((kind, key), None)
    elif due.get((kind, key)) != at_ms:
        due[kind, key] = at_ms
        heapq.heappush(state.agenda.heap, (at_ms, kind, key))


# ------------------------------------------------------------------------------ one agent


def _agent_deadline(state: State, agent: Agent) -> int | None:
    candidates: list[int | None] = [strikes.deadline(state, agent), _prepared_by(state, agent)]
    candidates += [until_ms for _, until_ms in agent.kept_from]
    if agent.presence is _READY or agent.presence is _SUSPECT:
        candidates.append(agent.lease_until_ms)
        candidates.append(_grace_ends(state, agent))
    if agent.standing is _QUARANTINED:
        candidates.append(agent.quarantined_until_ms)
    return min((at_ms for at_ms in candidates if at_ms is not None), default=None)


def _grace_ends(state: State, agent: Agent) -> int | None:
    if agent.presence is not _SUSPECT or agent.session_closed_ms is None:
        return None
    return agent.session_closed_ms + state.timing.grace_ms


def _prepared_by(state: State, agent: Agent) -> int | None:
    """When an agent that its job waits for is given up; None if it is ready, in a generation or away."""
    if agent.job_id is None or agent.readiness is not None or agent.session_id is None:
        return None
    if agent.presence is not _READY or not matching.counts(agent):
        return None
    job = state.jobs[agent.job_id]
    since_ms = agent.progress_ms
    if agent.last_generation > 0 and job.generation is not None:
        if agent.agent_id in forming.roll(state, job).inside:
            return None
        since_ms = max(since_ms, job.generation.planned_ms)
    return since_ms + state.timing.prepare_timeout_ms


def _give_up(state: State, agent: Agent, job_id: JobId, now_ms: int) -> tuple[Record, ...]:
    """It keeps a place, and standbys wait behind it.  It may serve other jobs meanwhile."""
    patience_ms = state.timing.prepare_timeout_ms
    reason = f"it neither got ready nor fetched anything for {patience_ms / 1000:g} s"
    return (
        PreparationGivenUp(
            at_ms=now_ms, agent_id=agent.agent_id, job_id=job_id, until_ms=now_ms + patience_ms
        ),
        _unassign(state.jobs[job_id], agent.agent_id, reason, now_ms),
    )


def _settle_agent(state: State, agent: Agent, now_ms: int) -> tuple[Record, ...]:
    agent_id = agent.agent_id
    if agent.presence is _READY or agent.presence is _SUSPECT:
        if now_ms >= agent.lease_until_ms:
            lost = AgentLost(
                at_ms=now_ms, agent_id=agent_id, evidence=(Evidence.LEASE_EXPIRED,), striked=True
            )
            return (lost, *strikes.strike(state, now_ms, agent, "its lease expired"))
        grace_ends = _grace_ends(state, agent)
        if grace_ends is not None and now_ms >= grace_ends:
            evidence = (Evidence.SESSION_CLOSED,)
            return (AgentLost(at_ms=now_ms, agent_id=agent_id, evidence=evidence, striked=False),)
    prepared_by_ms = _prepared_by(state, agent)
    if agent.job_id is not None and prepared_by_ms is not None and now_ms >= prepared_by_ms:
        return _give_up(state, agent, agent.job_id, now_ms)
    for job_id, kept_until_ms in agent.kept_from:
        if now_ms >= kept_until_ms:
            return (PreparationForgiven(at_ms=now_ms, agent_id=agent_id, job_id=job_id),)
    until_ms = agent.quarantined_until_ms
    if agent.standing is _QUARANTINED and until_ms is not None and now_ms >= until_ms:
        return (
            StandingChanged(
                at_ms=now_ms,
                agent_id=agent_id,
                standing=Standing.ELIGIBLE,
                why=Why.COOLED_DOWN,
                detail="",
                until_ms=None,
            ),
        )
    forgiven_ms = strikes.deadline(state, agent)
    if forgiven_ms is not None and now_ms >= forgiven_ms:
        return (
            StrikeCounted(
                at_ms=now_ms, agent_id=agent_id, strikes=agent.strikes - 1, detail="forgiven in time"
            ),
        )
    return ()


# -------------------------------------------------------------------------------- one job


def _job_deadline(state: State, job: Job, now_ms: int, judged: Judged) -> int | None:
    if job.phase in ENDED or job.phase is JobPhase.PAUSED:
        return None
    candidates: list[int | None] = []
    generation = job.generation
    if generation is not None:
        if next(_late(state, job, generation), None) is not None:
            candidates.append(forming.deadline(state, generation))
        if not generation.members:
            candidates.append(forming.checkpoint_awaited(state, job))
    candidates.append(checkpoints.witness_awaited(state, job, now_ms))
    found = judged.get(job.job_id) or forming.assess(state, job)
    if isinstance(found, Proposal):
        candidates.append(found.at_ms)
    # What is past has been acted upon, or was found to need nothing.
    return min((at_ms for at_ms in candidates if at_ms is not None and at_ms > now_ms), default=None)


def _settle_job(state: State, job: Job, now_ms: int, judged: Judged) -> tuple[Record, ...]:
    retired = checkpoints.retire(job, now_ms)
    if retired:
        return retired
    if job.phase in ENDED or job.phase is JobPhase.PAUSED:
        dropped = checkpoints.end(job, now_ms)
        if dropped:
            return dropped
        reason = f"job {job.spec.name} is {job.phase.value}"
        return tuple(_unassign(job, agent_id, reason, now_ms) for agent_id in job.assigned)
    return (
        checkpoints.commit(state, job, now_ms)
        or _complete(state, job, now_ms)
        or _proven_dead(state, job, now_ms)
        or _not_formed(state, job, now_ms)
        or _unserving(state, job, now_ms)
        or _phase(state, job, now_ms)
        or _form(state, job, now_ms, judged)
        or _surplus(state, job, now_ms)
    )


def _proven_dead(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """A closed session and a peer's failed collective: two independent signs are enough (rule 6)."""
    generation = job.generation
    if generation is None or not generation.collective_failed:
        return ()
    inside = [member.agent_id for member in generation.members]
    if forming.awaits_leaving(generation):
        inside += generation.leaving
    return tuple(
        AgentLost(
            at_ms=now_ms,
            agent_id=agent_id,
            evidence=(Evidence.SESSION_CLOSED, Evidence.PEER_COLLECTIVE),
            striked=False,
        )
        for agent_id in inside
        if state.agents[agent_id].presence is Presence.SUSPECT
        and state.agents[agent_id].job_id == job.job_id
        and any(reporter != agent_id for reporter in generation.collective_failed)
    )


def _late(state: State, job: Job, generation: Generation) -> Iterator[AgentId]:
    """Who has not yet done what the newest generation's plan asks of it."""
    if generation.formed_ms is None and not forming.broken(state, job):
        done = frozenset((*generation.formed, *generation.gone))
        for member in generation.members:
            if member.agent_id not in done and matching.serving(state, job, member.agent_id):
                yield member.agent_id
    yield from generation.leaving


def _not_formed(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Rule 9.  Healthy workers that wait in vain say so in time, so the silent ones are out.  When all
    have said so, or nobody, it is the leader whom they could not reach; to blame everyone would throw
    away the state that they hold."""
    generation = job.generation
    if generation is None or now_ms < forming.deadline(state, generation):
        return ()
    late = tuple(_late(state, job, generation))
    members = tuple(m.agent_id for m in generation.members)
    waiting = [a for a in members if a in late]
    silent = [a for a in waiting if a not in generation.collective_failed]
    if waiting and not generation.formed and len(silent) in (0, len(members)):
        silent = [*forming.cut_off(generation)] or waiting[:1]
    late = (*(silent or waiting), *(a for a in late if a not in members))
    records: list[Record] = []
    for agent_id in late:
        detail = f"generation {generation.number} was not formed in time"
        records.append(_member_lost(job, generation, agent_id, detail, now_ms))
        if agent_id in members:
            records += strikes.strike(state, now_ms, state.agents[agent_id], detail)
    return tuple(records)


def _member_lost(job: Job, generation: Generation, agent_id: AgentId, detail: str, now_ms: int) -> MemberLost:
    return MemberLost(
        at_ms=now_ms,
        job_id=job.job_id,
        generation=generation.number,
        agent_id=agent_id,
        evidence=Evidence.NOT_FORMED,
        detail=detail,
    )


def _complete(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Rule 14.  Members that are gone have nothing more to say."""
    generation = job.generation
    if generation is None or not generation.finished:
        return ()
    there = forming.all_finished(state, job, generation)
    if not there:
        return ()
    step = generation.finished_step
    newest = checkpoints.newest_good(job)
    if job.spec.launch != "torchrun" and (newest is None or newest.step < step):
        return ()
    detail = f"all {len(there)} members finished at step {step}"
    return (_change(job, JobPhase.COMPLETED, Why.FINISHED, detail, now_ms),)


def _unserving(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Unassign who said goodbye, may not train, or is drained and out."""
    unfit = forming.roll(state, job).unfit
    if not unfit:
        return ()
    records: list[Record] = []
    waits_for_checkpoint: bool | None = None
    inside = matching.engaged(job)
    for agent_id in unfit:
        agent = state.agents[agent_id]
        if agent.presence is Presence.ABSENT:
            records.append(_unassign(job, agent_id, "it left", now_ms))
        elif agent.standing is not Standing.ELIGIBLE:
            reason = f"{agent.standing.value}: {agent.standing_detail}"
            records.append(_unassign(job, agent_id, reason, now_ms))
        elif agent.draining and not (agent_id in inside and matching.serving(state, job, agent_id)):
            if waits_for_checkpoint is None:
                waits_for_checkpoint = _awaits_checkpoint(state, job, now_ms)
            if not waits_for_checkpoint:
                records.append(_unassign(job, agent_id, f"drained: {agent.drain_reason}", now_ms))
    return tuple(records)


def _awaits_checkpoint(state: State, job: Job, now_ms: int) -> bool:
    generation = job.generation
    if generation is None or generation.members:
        return False
    until_ms = forming.checkpoint_awaited(state, job)
    return until_ms is not None and now_ms < until_ms


def _phase(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Make the phase say what is so."""
    generation = job.generation
    if job.phase is JobPhase.STOPPING:
        return _stop(state, job, now_ms)
    if job.phase is JobPhase.QUEUED and job.assigned:
        return (_change(job, JobPhase.GATHERING, Why.AGENTS_ASSIGNED, "", now_ms),)
    if job.phase is JobPhase.GATHERING and not job.assigned:
        return (_change(job, JobPhase.QUEUED, Why.NO_AGENT, "", now_ms),)
    if generation is None:
        return ()
    lost = forming.absent(state, job)
    if job.phase is JobPhase.RUNNING and lost:
        detail = f"lost: {', '.join(lost)}"
        return (_change(job, JobPhase.RECOVERING, Why.MEMBER_LOST, detail, now_ms),)
    runs = generation.formed_ms is not None and not lost and generation.collective_failed_ms is None
    if job.phase is not JobPhase.RUNNING and runs:
        detail = f"generation {generation.number} of {len(generation.members)}"
        return (_change(job, JobPhase.RUNNING, Why.FORMED, detail, now_ms),)
    return ()


def _stop(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """End or pause once everybody is out and the last checkpoint is stored, or nothing is left to save."""
    generation = job.generation
    detail = ""
    if job.spec.launch == "muster" and generation is not None:
        alive = forming.survivors(state, job)
        if any(forming.holds_state(state, job, a) for a in alive):
            return ()
        if not generation.members and _awaits_checkpoint(state, job, now_ms):
            return ()
        newest = checkpoints.newest_good(job)
        stored = newest.step if newest is not None else 0
        if stored < job.committed_step:
            detail = f"the newest checkpoint is of step {stored}, before step {job.committed_step}"
    paused = job.phase_why is Why.PAUSED_BY_OPERATOR
    phase = JobPhase.PAUSED if paused else JobPhase.COMPLETED
    return (_change(job, phase, job.phase_why, detail, now_ms),)


def _form(state: State, job: Job, now_ms: int, judged: Judged) -> tuple[Record, ...]:
    found = judged[job.job_id] = forming.assess(state, job)
    if isinstance(found, Proposal):
        if found.at_ms is None:
            running = found.why is Why.MEMBER_JOINED and bool(forming.survivors(state, job))
            return (
                WaitChanged(
                    at_ms=now_ms,
                    job_id=job.job_id,
                    gathered_ms=None if running else now_ms,
                    standby_ms=now_ms if running else None,
                ),
            )
        if found.at_ms <= now_ms:
            named = checkpoints.name_dissenters(state, job, now_ms)
            retried = found.why is Why.RETRY and _again(state, job, now_ms)
            return named or retried or forming.plan(state, job, found, now_ms)
        return ()
    if job.gathered_ms is not None or job.standby_ms is not None:
        return (WaitChanged(at_ms=now_ms, job_id=job.job_id, gathered_ms=None, standby_ms=None),)
    return ()


def _again(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Members could not reach each other: try it without those who are cut off.  The same members failed to
    form twice in a row, and nobody says why: try it without the leader, lest everybody waits for ever."""
    generation = job.generation
    if generation is None or generation.formed_ms is not None or len(generation.members) < 2:
        return ()
    out = forming.cut_off(generation)
    detail = f"its peers of generation {generation.number} could not reach it"
    if not out and generation.why is Why.RETRY and generation.collective_failed_ms is not None:
        out = (generation.members[0].agent_id,)
        detail = f"generation {generation.number} could not be formed with it as the leader"
    records: list[Record] = []
    for agent_id in out:
        records.append(_member_lost(job, generation, agent_id, detail, now_ms))
        records += strikes.strike(state, now_ms, state.agents[agent_id], detail)
    return tuple(records)


def _surplus(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Unassign who is too many: the last that came, and of the lost, who may never return, the first."""
    most = 2 * job.spec.max_nodes
    if len(job.assigned) <= most:
        return ()
    inside = matching.engaged(job)
    idle = [a for a in job.assigned if a not in inside]
    lost = [a for a in idle if state.agents[a].presence is Presence.LOST]
    there = [a for a in idle if matching.counts(state.agents[a])]
    excess = max(0, matching.places_taken(state, job) - most)
    out = (*there[max(0, len(there) - excess) :], *lost[: max(0, len(lost) - most)])
    return tuple(_unassign(job, agent_id, "the job has enough agents", now_ms) for agent_id in out)


def _change(job: Job, phase: JobPhase, why: Why, detail: str, now_ms: int) -> JobPhaseChanged:
    return JobPhaseChanged(at_ms=now_ms, job_id=job.job_id, phase=phase, why=why, detail=detail)


def _unassign(job: Job, agent_id: AgentId, reason: str, now_ms: int) -> AgentUnassigned:
    return AgentUnassigned(at_ms=now_ms, agent_id=agent_id, job_id=job.job_id, reason=reason)
