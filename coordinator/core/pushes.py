"""What agents are told: because of a record, or because they have just come.

A push may be lost with its session at any moment: `resync` says it all again, and a plan is known by
its generation's number, so hearing it twice does no harm.
"""

from __future__ import annotations

from coordinator.core.model import (
    Agent,
    AgentAssigned,
    AgentDraining,
    AgentId,
    AgentIdled,
    AgentReturned,
    AgentUnassigned,
    CheckpointWanted,
    Evidence,
    GenerationPlanned,
    Job,
    JobId,
    MemberLost,
    Push,
    PushAssignment,
    PushDrain,
    PushGoAway,
    PushIdle,
    PushPlan,
    PushTakeCheckpoint,
    PushUnassign,
    Record,
    Refusal,
    Standing,
    StandingChanged,
    State,
)


def pushes(state: State, record: Record) -> tuple[Push, ...]:
    """What agents with an open session must be told because of `record`, which was evolved."""
    match record:
        case AgentAssigned() if _listens(state, record.agent_id):
            return (_assignment(state, record.agent_id, record.job_id),)
        case AgentUnassigned() if _listens(state, record.agent_id):
            return (PushUnassign(agent_id=record.agent_id, job_id=record.job_id, reason=record.reason),)
        case AgentDraining() if record.draining and _listens(state, record.agent_id):
            return (PushDrain(agent_id=record.agent_id, reason=record.reason),)
        case AgentIdled() if _listens(state, record.agent_id):
            return (PushIdle(agent_id=record.agent_id, reason=record.reason, unmet=record.unmet),)
        case AgentReturned():
            return resync(state, record.agent_id)
        case MemberLost() if record.evidence is Evidence.NOT_FORMED and _listens(state, record.agent_id):
            # It is to prepare anew, and may not know.
            return (_assignment(state, record.agent_id, record.job_id),)
        case StandingChanged() if record.standing is Standing.BANNED and _listens(state, record.agent_id):
            return (
                PushGoAway(
                    agent_id=record.agent_id,
                    refusal=Refusal.BANNED,
                    message=f"the operator banned this agent: {record.detail or 'no reason was given'}",
                    retry=False,
                ),
            )
        case GenerationPlanned():
            job = state.jobs[record.job_id]
            found = (_plan_for(state, job, state.agents[agent_id]) for agent_id in job.assigned)
            return tuple(push for push in found if push is not None)
        case CheckpointWanted():
            job = state.jobs[record.job_id]
            members = job.generation.members if job.generation is not None else ()
            return tuple(
                PushTakeCheckpoint(agent_id=m.agent_id, job_id=job.job_id, generation=record.generation)
                for m in members
                if _listens(state, m.agent_id)
            )
        case _:
            return ()


def resync(state: State, agent_id: AgentId) -> tuple[Push, ...]:
    """Everything an agent must be told whose session has just opened."""
    agent = state.agents[agent_id]
    if agent.session_id is None:
        return ()
    told: list[Push] = []
    if agent.held_job is not None and agent.held_job != agent.job_id:
        told.append(
            PushUnassign(
                agent_id=agent_id, job_id=agent.held_job, reason="it is not assigned to this job any more"
            )
        )
    if agent.job_id is not None:
        told.append(_assignment(state, agent_id, agent.job_id))
        plan = _plan_for(state, state.jobs[agent.job_id], agent)
        if plan is not None:
            told.append(plan)
    if agent.draining:
        told.append(PushDrain(agent_id=agent_id, reason=agent.drain_reason))
    if agent.job_id is None and agent.idle_reason:
        told.append(PushIdle(agent_id=agent_id, reason=agent.idle_reason, unmet=agent.idle_unmet))
    return tuple(told)


def _assignment(state: State, agent_id: AgentId, job_id: JobId) -> PushAssignment:
    return PushAssignment(agent_id=agent_id, job_id=job_id, number=state.agents[agent_id].assignments)


def _listens(state: State, agent_id: AgentId) -> bool:
    return state.agents[agent_id].session_id is not None


def _plan_for(state: State, job: Job, agent: Agent) -> PushPlan | None:
    """The newest plan for whoever was in it, or in one before: without a place in it, one is released."""
    generation = job.generation
    if generation is None or agent.last_generation == 0 or agent.session_id is None:
        return None
    if agent.agent_id in generation.gone and any(m.agent_id == agent.agent_id for m in generation.members):
        # Out for good: it may not come late into a group whose others count on the state that it had.
        return None
    restored = generation.from_checkpoint_step
    found = next((c for c in job.checkpoints if c.step == restored), None)
    return PushPlan(
        agent_id=agent.agent_id,
        job_id=job.job_id,
        generation=generation,
        checkpoint_json=found.manifest_json if found is not None else "",
        lineage=job.lineage,
    )
