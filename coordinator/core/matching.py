"""Which agent may serve which job, and which job gets it.

Knows requirements, priorities and counts; knows nothing of ranks, generations or time.
"""

from __future__ import annotations

import re

from coordinator.core.model import (
    Agent,
    AgentAssigned,
    AgentFacts,
    AgentId,
    AgentIdled,
    AgentUnassigned,
    Job,
    JobId,
    JobPhase,
    JobSpec,
    Presence,
    Record,
    Standing,
    State,
)

WANTING = frozenset({JobPhase.QUEUED, JobPhase.GATHERING, JobPhase.RUNNING, JobPhase.RECOVERING})
"""Phases in which a job takes agents."""

# To look a member of an enum up takes ten times as long as a name does, and all agents are asked.
_READY, _SUSPECT, _ELIGIBLE = Presence.READY, Presence.SUSPECT, Standing.ELIGIBLE

TOO_SLOW = "it did not get ready in time; it may try again when it has cooled down"
_VERSION = re.compile(r"(\d+)\.(\d+)")


def unmet(spec: JobSpec, agent: Agent) -> tuple[str, ...]:
    """One sentence for each requirement of the job that the agent does not meet: what is required and
    what was found.  Empty if it may serve."""
    wants, facts = spec.requires, agent.facts
    missing: list[str] = []
    if wants.backend is not None and wants.backend not in facts.backends:
        found = ", ".join(facts.backends) or "none"
        missing.append(f"backend {wants.backend} is required; found {found}")
    if wants.min_gpu_memory_bytes > 0:
        least = min((gpu.memory_bytes for gpu in facts.gpus), default=0)
        if least < wants.min_gpu_memory_bytes:
            found = f"{_size(least)} on the smallest card" if facts.gpus else "no GPU"
            missing.append(f"GPU memory of {_size(wants.min_gpu_memory_bytes)} is required; found {found}")
    if wants.min_compute_capability > (0, 0):
        capability = min((gpu.capability for gpu in facts.gpus), default=None)
        if capability is None or capability < wants.min_compute_capability:
            found = _dotted(capability) if capability else "no GPU"
            missing.append(
                f"compute capability {_dotted(wants.min_compute_capability)} is required; found {found}"
            )
    if wants.min_torch > (0, 0) and _torch(facts) < wants.min_torch:
        found = facts.torch_version or "no torch"
        missing.append(f"torch {_dotted(wants.min_torch)} or newer is required; found {found}")
    if facts.disk_free_bytes < wants.min_disk_free_bytes:
        missing.append(
            f"free disk of {_size(wants.min_disk_free_bytes)} is required; found {_size(facts.disk_free_bytes)}"
        )
    labels = dict(facts.labels)
    for key, value in wants.labels:
        if labels.get(key) != value:
            found = f"{key}={labels[key]}" if key in labels else "no such label"
            missing.append(f"label {key}={value} is required; found {found}")
    if spec.launch == "torchrun" and not agent.torchrun_job:
        missing.append("a torchrun session for this job is required; found muster-agent")
    return tuple(missing)


def obstacles(job: Job, agent: Agent) -> tuple[str, ...]:
    """What keeps the agent from the job, as sentences: unmet requirements, or that it was too slow before."""
    missing = unmet(job.spec, agent)
    if any(job_id == job.job_id for job_id, _ in agent.kept_from):
        missing = (*missing, TOO_SLOW)
    return missing


def idle(agent: Agent) -> bool:
    """Whether the agent could be given a job (rule 1)."""
    return (
        agent.job_id is None
        and agent.session_id is not None
        and agent.presence is _READY
        and agent.standing is _ELIGIBLE
        and not agent.draining
    )


def counts(agent: Agent) -> bool:
    """Whether an assigned agent takes one of its job's places: it is there, or was a moment ago."""
    return (
        (agent.presence is _READY or agent.presence is _SUSPECT)
        and agent.standing is _ELIGIBLE
        and not agent.draining
    )


def serving(state: State, job: Job, agent_id: AgentId) -> bool:
    """Whether the agent is there for the job: alive as far as is known, eligible, and assigned."""
    agent = state.agents[agent_id]
    return (
        agent.job_id == job.job_id
        and (agent.presence is _READY or agent.presence is _SUSPECT)
        and agent.standing is _ELIGIBLE
    )


def match(state: State, now_ms: int) -> tuple[Record, ...]:
    """Assign the agents on the agenda, or all idle ones if places may have become free (rule 1).

    Each of the others that is idle is told why, when the reason is new."""
    agenda = state.agenda
    looked_at = [a for a in (state.agents[i] for i in agenda.agents) if _listens(a)]
    if not looked_at and not agenda.slots and not _may_lend(state):
        return ()
    jobs = _wanting(state)
    taken = {job.job_id: places_taken(state, job) for job in jobs}
    open_jobs = [job for job in jobs if taken[job.job_id] < 2 * job.spec.max_nodes]
    records: list[Record] = []
    assigned: set[AgentId] = set()
    candidates = looked_at
    if agenda.slots and open_jobs:
        candidates = list(state.agents.values())
    for agent in candidates:
        if not open_jobs:
            break
        if not idle(agent):
            continue
        job = _best(open_jobs, taken, agent)
        if job is not None:
            taken[job.job_id] += 1
            if taken[job.job_id] >= 2 * job.spec.max_nodes:
                open_jobs.remove(job)
            assigned.add(agent.agent_id)
            records.append(AgentAssigned(at_ms=now_ms, agent_id=agent.agent_id, job_id=job.job_id))
    if not records:
        records.extend(_lend(state, now_ms, jobs, taken))
    for agent in looked_at:
        if agent.agent_id not in assigned:
            reason, missing = _why_idle(jobs, taken, agent)
            if (reason, missing) != (agent.idle_reason, agent.idle_unmet):
                records.append(
                    AgentIdled(at_ms=now_ms, agent_id=agent.agent_id, reason=reason, unmet=missing)
                )
    return tuple(records)


def _listens(agent: Agent) -> bool:
    return agent.job_id is None and agent.session_id is not None and agent.presence is Presence.READY


def _wanting(state: State) -> list[Job]:
    jobs = [state.jobs[job_id] for job_id in state.agenda.live]
    return sorted((j for j in jobs if j.phase in WANTING), key=lambda j: (-j.spec.priority, j.order))


def places_taken(state: State, job: Job) -> int:
    """How many of the job's agents take a place."""
    known = state.agenda.places.get(job.job_id)
    if known is None:
        known = sum(counts(state.agents[agent_id]) for agent_id in job.assigned)
        state.agenda.places[job.job_id] = known
    return known


def serves(job: Job, agent: Agent) -> bool:
    """Whether the agent may be given to the job: torchrun sessions to the job they name, and to no other."""
    if agent.torchrun_job and (
        job.spec.launch != "torchrun" or agent.torchrun_job not in (job.job_id, job.spec.name)
    ):
        return False
    return not obstacles(job, agent)


def _best(open_jobs: list[Job], taken: dict[JobId, int], agent: Agent) -> Job | None:
    """Of the jobs that have a place left: one below its minimum, one below its maximum, or any."""
    second: Job | None = None
    third: Job | None = None
    for job in open_jobs:
        places = taken[job.job_id]
        if (second is not None and places >= job.spec.min_nodes) or not serves(job, agent):
            continue
        if places < job.spec.min_nodes:
            return job
        if places < job.spec.max_nodes:
            second = job
        elif third is None:
            third = job
    return second or third


def _may_lend(state: State) -> bool:
    """Whether a job on the agenda might have an agent to spare for another."""
    touched = (state.jobs[job_id] for job_id in state.agenda.jobs)
    return len(state.agenda.live) > 1 and any(len(job.assigned) > job.spec.max_nodes for job in touched)


def _lend(state: State, now_ms: int, jobs: list[Job], taken: dict[JobId, int]) -> list[Record]:
    """A job below its minimum gets a standby that another job has beyond its maximum."""
    for needy in jobs:
        if taken[needy.job_id] >= needy.spec.min_nodes:
            continue
        for rich in reversed(jobs):
            if taken[rich.job_id] <= rich.spec.max_nodes:
                continue
            in_use = engaged(rich)
            for agent_id in reversed(rich.assigned):
                agent = state.agents[agent_id]
                if agent_id in in_use or not counts(agent) or agent.session_id is None:
                    continue
                if serves(needy, agent):
                    reason = f"job {needy.spec.name} needs it more"
                    return [
                        AgentUnassigned(at_ms=now_ms, agent_id=agent_id, job_id=rich.job_id, reason=reason)
                    ]
    return []


def engaged(job: Job) -> frozenset[AgentId]:
    """Agents that are in a generation of the job, or still leaving one."""
    generation = job.generation
    if generation is None:
        return frozenset()
    members = (member.agent_id for member in generation.members)
    return frozenset((*members, *generation.leaving)) - frozenset(generation.gone)


def _why_idle(jobs: list[Job], taken: dict[JobId, int], agent: Agent) -> tuple[str, tuple[str, ...]]:
    if agent.standing is not Standing.ELIGIBLE:
        return f"{agent.standing.value}: {agent.standing_detail or 'no reason was given'}", ()
    if agent.draining:
        return f"draining: {agent.drain_reason or 'no reason was given'}", ()
    if agent.torchrun_job:
        return f"no live torchrun job has the id or name {agent.torchrun_job}, or it has enough agents", ()
    missing: list[str] = []
    lacking = False
    for job in jobs:
        sentences = obstacles(job, agent)
        if not sentences:
            return "every job whose requirements it meets has enough agents", ()
        lacking = lacking or sentences != (TOO_SLOW,)
        missing += [f"job {job.spec.name}: {sentence}" for sentence in sentences]
    if lacking:
        return "it does not meet the requirements of any job", tuple(missing)
    if missing:
        return "it did not get ready in time, and cools down", tuple(missing)
    return "no job wants agents", ()


def _torch(facts: AgentFacts) -> tuple[int, int]:
    found = _VERSION.match(facts.torch_version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
