"""What a record does to the state: the only place where `State` changes.

Total and without judgement: whoever made the record has decided.  Replaying the durable records of a
journal gives the durable part of the state.  Besides the facts, the agenda is kept here: what `settle`
has to look at because of a record.  A renewed lease puts nothing on it, which keeps heartbeats cheap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, TypeVar, assert_never

from coordinator.core import checkpoints
from coordinator.core.matching import counts
from coordinator.core.model import (
    ENDED,
    Agent,
    AgentAdmitted,
    AgentArrived,
    AgentAssigned,
    AgentDraining,
    AgentId,
    AgentIdled,
    AgentLeft,
    AgentLost,
    AgentReadied,
    AgentReturned,
    AgentSuspected,
    AgentUnassigned,
    CertificateRenewed,
    Checkpoint,
    CheckpointDamaged,
    CheckpointDoubted,
    CheckpointPinned,
    CheckpointRetired,
    CheckpointWanted,
    CollectiveFailed,
    Evaluation,
    EvaluationRecorded,
    FailureCounted,
    FailureKind,
    GapSeen,
    Generation,
    GenerationPlanned,
    Job,
    JobAdmitted,
    JobId,
    JobPhase,
    JobPhaseChanged,
    JobRescaled,
    JobRolledBack,
    LeaseRenewed,
    LeasesRefreshed,
    ManifestCommitted,
    MemberDissented,
    MemberFinished,
    MemberFormed,
    MemberLost,
    MemberReleased,
    MemberStored,
    PeerAccused,
    PeerTrusted,
    PendingCheckpoint,
    PendingDropped,
    PreparationForgiven,
    PreparationGivenUp,
    Presence,
    Record,
    Rollback,
    Roster,
    SessionEnded,
    ShardRecorded,
    Standing,
    StandingChanged,
    State,
    StatesDiffered,
    StateWitnessed,
    StepsCommitted,
    StepsRolledBack,
    StepsUnrecorded,
    StrikeCounted,
    TokenCreated,
    TokenRevoked,
    UploadMeasured,
    WaitChanged,
    Why,
)

Value = TypeVar("Value", Agent, Job)

EVALUATIONS_KEPT = 16
"""A checkpoint is committed at most a few checkpoints after its step was evaluated."""
ROSTERS_KEPT = 4
"""Shards of a checkpoint are seldom reported later than by the generation after the next."""
FORGOTTEN_AFTER_STEPS = 1_000
"""Failures are forgotten after so many committed steps without another one."""


def evolve(state: State, record: Record) -> None:
    """Apply `record`.  Its agent, job and token exist: whoever made the record has checked."""
    match record:
        case LeaseRenewed():  # the first, since most are, and cases are tried in order
            _set(
                state,
                record.agent_id,
                lease_until_ms=record.until_ms,
                step=record.step,
                activity=record.activity,
                tokens_per_s=record.tokens_per_s,
                disk_free_bytes=record.disk_free_bytes,
            )
            if record.fetched_bytes > state.agents[record.agent_id].fetched_bytes:
                _set(
                    state,
                    record.agent_id,
                    fetched_bytes=record.fetched_bytes,
                    progress_ms=record.at_ms,
                )
        case TokenCreated():
            state.tokens[record.token.token_id] = record.token
        case TokenRevoked():
            state.tokens[record.token_id] = replace(state.tokens[record.token_id], revoked=True)
        case AgentAdmitted():
            token = state.tokens[record.token_id]
            state.tokens[record.token_id] = replace(token, uses_left=token.uses_left - 1)
            state.agents[record.agent_id] = Agent(
                agent_id=record.agent_id,
                name=record.name,
                certificate_serial=record.certificate_serial,
                admitted_ms=record.at_ms,
                presence_since_ms=record.at_ms,
            )
        case CertificateRenewed():
            _set(state, record.agent_id, certificate_serial=record.certificate_serial)
        case AgentArrived():
            _arrive(state, record)
        case AgentReturned():
            progress_ms = _absence_left_out(state.agents[record.agent_id], record.at_ms)
            _presence(state, record.agent_id, Presence.READY, record.at_ms, progress_ms=progress_ms)
        case AgentSuspected():
            _presence(state, record.agent_id, Presence.SUSPECT, record.at_ms)
        case AgentLost():
            agent = state.agents[record.agent_id]
            prepared = agent.readiness is not None or agent.last_generation > 0
            _presence(
                state,
                record.agent_id,
                Presence.LOST,
                record.at_ms,
                readiness=None,
                progress_ms=record.at_ms if prepared else agent.progress_ms,
                fetched_bytes=0 if prepared else agent.fetched_bytes,
            )
            state.agenda.slots = True
        case AgentLeft():
            agent = state.agents[record.agent_id]
            stays_draining = agent.draining and not agent.drain_until_left
            _presence(
                state,
                record.agent_id,
                Presence.ABSENT,
                record.at_ms,
                readiness=None,
                draining=stays_draining,
                drain_reason=agent.drain_reason if stays_draining else "",
                drain_until_left=False,
            )
            state.agenda.slots = True
        case AgentDraining():
            _set_and_look(
                state,
                record.agent_id,
                draining=record.draining,
                drain_reason=record.reason if record.draining else "",
                drain_until_left=record.draining and record.until_left,
            )
            state.agenda.slots = True
        case StandingChanged():
            released = record.standing is Standing.ELIGIBLE and record.why is Why.BY_OPERATOR
            _set_and_look(
                state,
                record.agent_id,
                standing=record.standing,
                standing_why=record.why,
                standing_detail=record.detail,
                quarantined_until_ms=record.until_ms,
                dissents=0 if released else state.agents[record.agent_id].dissents,
            )
            state.agenda.slots = True
        case StrikeCounted():
            _set(state, record.agent_id, strikes=record.strikes, last_strike_ms=record.at_ms)
            state.agenda.agents[record.agent_id] = None
        case PeerAccused():
            accusers = state.agents[record.agent_id].accusers
            _set(state, record.agent_id, accusers=(*accusers, record.by))
        case PeerTrusted():
            _set(state, record.agent_id, accusers=())
        case PreparationGivenUp():
            kept_from = state.agents[record.agent_id].kept_from
            _set(state, record.agent_id, kept_from=(*kept_from, (record.job_id, record.until_ms)))
            state.agenda.agents[record.agent_id] = None
        case PreparationForgiven():
            kept_from = state.agents[record.agent_id].kept_from
            kept_from = tuple(each for each in kept_from if each[0] != record.job_id)
            _set(state, record.agent_id, kept_from=kept_from)
            state.agenda.agents[record.agent_id] = None
            state.agenda.slots = True  # a job that has it to spare may lend it to this one
        case AgentAssigned():
            _assign(state, record)
        case AgentUnassigned():
            job = state.jobs[record.job_id]
            _set_job(
                state,
                job,
                assigned=_without(job.assigned, record.agent_id),
                generation=_expelled(job.generation, record.agent_id),
                rosters=_struck_off(job.rosters, record.agent_id),
            )
            _set_and_look(state, record.agent_id, job_id=None, last_generation=0, readiness=None)
            state.agenda.slots = True
            state.agenda.places.pop(record.job_id, None)
        case JobAdmitted():
            state.jobs[record.job_id] = Job(
                job_id=record.job_id,
                spec=record.spec,
                submitted_ms=record.at_ms,
                order=len(state.jobs),
                phase_since_ms=record.at_ms,
            )
            state.agenda.live[record.job_id] = None
            state.agenda.jobs[record.job_id] = None
            _look_at_idle(state)
        case JobPhaseChanged():
            _phase(state, record)
        case JobRescaled():
            job = state.jobs[record.job_id]
            spec = replace(job.spec, min_nodes=record.min_nodes, max_nodes=record.max_nodes)
            _set_job(state, job, spec=spec)
            state.agenda.slots = True
        case GenerationPlanned():
            _plan(state, record)
        case MemberFormed():
            _form(state, record)
        case MemberFinished():
            job, generation = _generation(state, record.job_id)
            finished = (*generation.finished, record.agent_id)
            step = max(generation.finished_step, record.step)
            _note(state, job, finished=finished, finished_step=step)
        case MemberReleased():
            job, generation = _generation(state, record.job_id)
            _set_generation(
                state,
                job,
                replace(
                    generation,
                    leaving=_without(generation.leaving, record.agent_id),
                    uploading=generation.uploading
                    if generation.members
                    else (*_without(generation.uploading, record.agent_id), record.agent_id),
                    holders=_without(generation.holders, record.agent_id),
                ),
            )
            _set_and_look(
                state, record.agent_id, last_generation=0, progress_ms=record.at_ms, fetched_bytes=0
            )
        case MemberStored():
            _forget_uploading(state, state.jobs[record.job_id], record.agent_id)
        case MemberLost():
            job, generation = _generation(state, record.job_id)
            _set_generation(
                state,
                job,
                replace(
                    generation,
                    gone=(*generation.gone, record.agent_id),
                    leaving=_without(generation.leaving, record.agent_id),
                    holders=_without(generation.holders, record.agent_id),
                ),
            )
            _set(state, record.agent_id, failed_generation=record.generation)
            _prepare_anew(state, record.agent_id, record.at_ms)
        case CollectiveFailed() | StatesDiffered():
            job, generation = _generation(state, record.job_id)
            first_ms = generation.collective_failed_ms
            missed = record.unreachable if isinstance(record, CollectiveFailed) else ()
            disputed = record.step if isinstance(record, StatesDiffered) else generation.disputed_step
            _note(
                state,
                job,
                collective_failed=(*generation.collective_failed, record.agent_id),
                unreachable=(*generation.unreachable, *((record.agent_id, other) for other in missed)),
                collective_failed_ms=record.at_ms if first_ms is None else first_ms,
                disputed_step=disputed,
            )
        case MemberDissented():
            job, generation = _generation(state, record.job_id)
            _note(state, job, disputed_step=0)
            _set(state, record.agent_id, dissents=record.dissents)
        case FailureCounted():
            job = state.jobs[record.job_id]
            prepare_failed = job.prepare_failed
            if record.failure is FailureKind.PREPARE or record.generation == 0:
                prepare_failed = (*prepare_failed, record.agent_id)
            _set_job(
                state,
                job,
                failures=job.failures + 1,
                last_failure=record.detail,
                failed_step=job.committed_step,
                failed_generation=max(job.failed_generation, record.generation),
                failed_agent=record.agent_id if record.generation else job.failed_agent,
                prepare_failed=prepare_failed,
            )
        case StepsCommitted():
            _commit_steps(state, record)
        case StepsUnrecorded():
            job = state.jobs[record.job_id]
            _set_job(state, job, committed_step=record.last_step, committed_digest="", known_from=0)
        case StepsRolledBack():
            job = state.jobs[record.job_id]
            _set_job(
                state,
                job,
                committed_step=record.to_step,
                committed_digest="",
                known_from=0,
                failed_step=min(job.failed_step, record.to_step),
                pending=tuple(p for p in job.pending if p.step <= record.to_step),
                evaluations=tuple(e for e in job.evaluations if e.step <= record.to_step),
            )
        case JobRolledBack():
            _roll_back(state, record)
        case ShardRecorded():
            _record_shard(state, record)
        case StateWitnessed():
            _record_witness(state, record)
        case ManifestCommitted():
            job, new = state.jobs[record.job_id], record.checkpoint
            others = tuple(c for c in job.checkpoints if c.step != new.step)
            known = new.step == job.committed_step
            loss = next((e.loss for e in job.evaluations if e.step == new.step), None)
            pinned_by = next((c.pinned_by for c in job.checkpoints if c.step == new.step), "")
            new = replace(new, evaluation_loss=loss, pinned_by=pinned_by)
            _set_job(
                state,
                job,
                checkpoints=tuple(sorted((*others, new), key=lambda c: c.step)),
                pending=tuple(p for p in job.pending if p.step != new.step),
                committed_digest=new.state_digest if known else job.committed_digest,
                failures=0,
                prepare_failed=(),
            )
        case PendingDropped():
            job = state.jobs[record.job_id]
            _set_job(state, job, pending=tuple(p for p in job.pending if p.step != record.step))
        case CheckpointDoubted():
            _change_checkpoint(
                state,
                record,
                lambda found: replace(found, doubted_by=(*found.doubted_by, record.agent_id)),
            )
        case CheckpointDamaged():
            _change_checkpoint(
                state, record, lambda found: replace(found, damaged=record.detail or "damaged")
            )
        case CheckpointRetired():
            job = state.jobs[record.job_id]
            _set_job(state, job, checkpoints=tuple(c for c in job.checkpoints if c.step != record.step))
        case CheckpointPinned():
            by = record.by if record.pinned else ""
            _change_checkpoint(state, record, lambda found: replace(found, pinned_by=by))
        case EvaluationRecorded():
            _evaluate(state, record)
        case CheckpointWanted():  # a command to the members; see pushes
            job, generation = _generation(state, record.job_id)
            if generation.number == record.generation:
                _note(state, job, checkpoint_asked=True)
        case SessionEnded():
            _set_and_look(state, record.agent_id, session_id=None, session_closed_ms=record.at_ms)
        case AgentReadied():
            if record.readiness is not None:
                _set(state, record.agent_id, readiness=record.readiness)
            elif state.agents[record.agent_id].readiness is not None:
                _prepare_anew(state, record.agent_id, record.at_ms)
            _look_at_job_of(state, record.agent_id)
        case AgentIdled():
            _set(state, record.agent_id, idle_reason=record.reason, idle_unmet=record.unmet)
        case UploadMeasured():
            _set(state, record.agent_id, upload_bytes_per_s=record.bytes_per_s)
        case WaitChanged():
            _set_job(
                state,
                state.jobs[record.job_id],
                gathered_ms=record.gathered_ms,
                standby_ms=record.standby_ms,
            )
        case GapSeen():
            job = state.jobs[record.job_id]
            state.jobs[record.job_id] = replace(job, known_from=record.known_from)
        case LeasesRefreshed():
            _refresh(state, record)
        case _:
            assert_never(record)


def look_at_everything(state: State) -> None:
    """Put the whole state on the agenda: after a restart nothing is known to be quiet."""
    agenda = state.agenda
    agenda.agents = dict.fromkeys(state.agents)
    agenda.jobs = dict.fromkeys(state.jobs)
    agenda.live = {job.job_id: None for job in state.jobs.values() if job.phase not in ENDED}
    agenda.slots = True
    agenda.places = {}
    agenda.rolls = {}
    agenda.due = {}
    agenda.heap = []


# ------------------------------------------------------------------------------------- pieces


@functools.cache
def _slots(kind: Any) -> tuple[Callable[[Any], tuple[Any, ...]], tuple[Callable[[Any, Any], None], ...]]:
    names = [field.name for field in fields(kind)]
    return attrgetter(*names), tuple(getattr(kind, name).__set__ for name in names)


def _changed(value: Value, **changes: Any) -> Value:
    """`dataclasses.replace` for values of many fields, four times as fast: half of what a heartbeat cost."""
    kind: Any = type(value)
    read, writers = _slots(kind)
    new: Value = object.__new__(kind)
    for write, item in zip(writers, read(value), strict=True):
        write(new, item)
    for name, item in changes.items():
        getattr(kind, name).__set__(new, item)
    return new


def _set(state: State, agent_id: AgentId, **changes: Any) -> Agent:
    agent = _changed(state.agents[agent_id], **changes)
    state.agents[agent_id] = agent
    return agent


def _look_at_job_of(state: State, agent_id: AgentId) -> None:
    job_id = state.agents[agent_id].job_id
    if job_id is not None:
        state.agenda.jobs[job_id] = None
        _forget_roll_of_outsider(state, agent_id, job_id)


def _forget_roll_of_outsider(state: State, agent_id: AgentId, job_id: JobId) -> None:
    """Whether an agent is ready and reachable is on its job's roll only if it is in no generation.  After a
    restart, when all members come back one by one, this is what keeps it from being called each time."""
    known = state.agenda.rolls.get(job_id)
    if known is not None and agent_id not in known.inside:
        del state.agenda.rolls[job_id]


def _set_and_look(state: State, agent_id: AgentId, **changes: Any) -> None:
    """Change something by which agents are matched and generations are formed."""
    before = state.agents[agent_id]
    agent = _set(state, agent_id, **changes)
    agenda = state.agenda
    agenda.agents[agent_id] = None
    if agent.job_id is not None:
        agenda.jobs[agent.job_id] = None
        counted, counting = counts(before), counts(agent)
        if not (counted and counting):
            agenda.rolls.pop(agent.job_id, None)
        else:
            _forget_roll_of_outsider(state, agent_id, agent.job_id)
        if agent.job_id in agenda.places:
            agenda.places[agent.job_id] += counting - counted


def _presence(state: State, agent_id: AgentId, presence: Presence, at_ms: int, **changes: Any) -> None:
    if state.agents[agent_id].presence is not presence:
        changes["presence_since_ms"] = at_ms
    _set_and_look(state, agent_id, presence=presence, **changes)


def _arrive(state: State, record: AgentArrived) -> None:
    agent = state.agents[record.agent_id]
    changes: dict[str, Any] = {}
    if agent.incarnation != record.incarnation:
        changes = {"readiness": None, "last_generation": 0, "step": 0, "activity": "", "tokens_per_s": 0.0}
        if agent.drain_until_left:
            changes |= {"draining": False, "drain_reason": "", "drain_until_left": False}
        _forget_upload(state, agent)
    _presence(
        state,
        record.agent_id,
        Presence.READY,
        record.at_ms,
        session_id=record.session_id,
        session_closed_ms=None,
        incarnation=record.incarnation,
        facts=record.facts,
        torchrun_job=record.torchrun_job,
        lease_until_ms=record.at_ms + state.timing.lease_ms,
        progress_ms=_absence_left_out(agent, record.at_ms),
        disk_free_bytes=record.facts.disk_free_bytes,
        held_job=record.held_job,
        idle_reason="",
        idle_unmet=(),
        **changes,
    )


def _absence_left_out(agent: Agent, at_ms: int) -> int:
    """`progress_ms` of an agent that comes (back): while it was lost its preparation stood still."""
    away_ms = at_ms - agent.presence_since_ms if agent.presence is Presence.LOST else 0
    return agent.progress_ms + away_ms


def _prepare_anew(state: State, agent_id: AgentId, at_ms: int) -> None:
    _set(state, agent_id, readiness=None, progress_ms=at_ms, fetched_bytes=0)
    state.agenda.agents[agent_id] = None


def _forget_upload(state: State, agent: Agent) -> None:
    """What its process had still to store, or to say of a checkpoint, went with it."""
    if agent.job_id is None:
        return
    job = state.jobs[agent.job_id]
    job = _set_job(state, job, rosters=_struck_off(job.rosters, agent.agent_id))
    _forget_uploading(state, job, agent.agent_id)


def _forget_uploading(state: State, job: Job, agent_id: AgentId) -> None:
    generation = job.generation
    if generation is not None and agent_id in generation.uploading:
        _note(state, job, uploading=_without(generation.uploading, agent_id))


def _assign(state: State, record: AgentAssigned) -> None:
    job = state.jobs[record.job_id]
    job = replace(job, assigned=(*job.assigned, record.agent_id))
    state.jobs[record.job_id] = job
    agenda = state.agenda
    agenda.rolls.pop(record.job_id, None)
    # One more that is not ready yet changes nothing for a job that has agents (thousands may come at once),
    # unless it was about to form without waiting for anybody.
    about_to_form = (
        ("job", record.job_id) in agenda.due and job.gathered_ms is None and job.standby_ms is None
    )
    if job.phase is JobPhase.QUEUED or len(job.assigned) > 2 * job.spec.max_nodes or about_to_form:
        agenda.jobs[record.job_id] = None
    if record.job_id in agenda.places:
        agenda.places[record.job_id] += 1
    _set(
        state,
        record.agent_id,
        job_id=record.job_id,
        assignments=state.agents[record.agent_id].assignments + 1,
        last_generation=0,
        failed_generation=0,
        readiness=None,
        progress_ms=record.at_ms,
        fetched_bytes=0,
        idle_reason="",
        idle_unmet=(),
    )
    agenda.agents[record.agent_id] = None


def _look_at_idle(state: State) -> None:
    """The set of jobs that want agents changed: each idle agent may be matched, or told another reason."""
    state.agenda.slots = True
    state.agenda.agents.update(
        (agent.agent_id, None)
        for agent in state.agents.values()
        if agent.job_id is None and agent.session_id is not None
    )


def _set_job(state: State, job: Job, **changes: Any) -> Job:
    changed = _changed(job, **changes)
    state.jobs[job.job_id] = changed
    state.agenda.jobs[job.job_id] = None
    if "generation" in changes or "assigned" in changes:  # the rest says nothing of who is there
        state.agenda.rolls.pop(job.job_id, None)
    return changed


def _generation(state: State, job_id: JobId) -> tuple[Job, Generation]:
    job = state.jobs[job_id]
    assert job.generation is not None, f"job {job_id} has no generation"
    return job, job.generation


def _set_generation(state: State, job: Job, generation: Generation) -> None:
    _set_job(state, job, generation=generation)


def _note(state: State, job: Job, **changes: Any) -> None:
    """Change of the generation what says nothing of who is there.  A thousand members may report that a
    collective failed: the roll is not called anew for each."""
    assert job.generation is not None
    state.jobs[job.job_id] = _changed(job, generation=replace(job.generation, **changes))
    state.agenda.jobs[job.job_id] = None


def _expelled(generation: Generation | None, agent_id: AgentId) -> Generation | None:
    """Without the agent for good: should it be assigned again, it comes as a joiner."""
    if generation is None:
        return None
    generation = replace(generation, uploading=_without(generation.uploading, agent_id))
    inside = agent_id in generation.leaving or any(m.agent_id == agent_id for m in generation.members)
    if not inside or agent_id in generation.gone:
        return generation
    return replace(
        generation,
        gone=(*generation.gone, agent_id),
        leaving=_without(generation.leaving, agent_id),
        holders=_without(generation.holders, agent_id),
    )


def _without(agents: tuple[AgentId, ...], gone: AgentId) -> tuple[AgentId, ...]:
    if gone not in agents:
        return agents
    at = agents.index(gone)
    return (*agents[:at], *agents[at + 1 :])


def _struck_off(rosters: tuple[Roster, ...], agent_id: AgentId) -> tuple[Roster, ...]:
    return tuple(
        replace(roster, gone=(*roster.gone, agent_id))
        if agent_id in roster.members and agent_id not in roster.gone
        else roster
        for roster in rosters
    )


def _phase(state: State, record: JobPhaseChanged) -> None:
    job = state.jobs[record.job_id]
    generation = job.generation
    over = record.phase in ENDED or record.phase is JobPhase.PAUSED
    if over and generation is not None:
        generation = replace(generation, leaving=(), holders=())
    _set_job(
        state,
        job,
        phase=record.phase,
        phase_why=record.why,
        phase_detail=record.detail,
        phase_since_ms=record.at_ms,
        generation=generation,
        gathered_ms=None,
        standby_ms=None,
    )
    if record.phase in ENDED:
        state.agenda.live.pop(record.job_id, None)
    if over or record.phase in (JobPhase.QUEUED, JobPhase.STOPPING):
        _look_at_idle(state)


def _plan(state: State, record: GenerationPlanned) -> None:
    new = record.generation
    job = state.jobs[record.job_id]
    begins = new.fresh or new.from_checkpoint_step is not None
    old = job.generation
    rosters = job.rosters
    if old is not None and old.members:
        rosters = (*rosters, checkpoints.roster_of(old))[-ROSTERS_KEPT:]
    _set_job(
        state,
        job,
        generation=new,
        rosters=rosters,
        generation_count=new.number,
        lineage=new.number if begins else job.lineage,
        gathered_ms=None,
        standby_ms=None,
    )
    for member in new.members:
        if member.group_rank == 0:  # its store is used up by this plan
            _set(state, member.agent_id, last_generation=new.number, readiness=None)
        else:
            _set(state, member.agent_id, last_generation=new.number)


def _form(state: State, record: MemberFormed) -> None:
    job, generation = _generation(state, record.job_id)
    formed = (*generation.formed, record.agent_id)
    complete = len(formed) == len(generation.members)
    digest = record.state_digest
    if generation.formed and digest != generation.formed_digest:
        digest = ""
    holders = generation.holders
    if record.agent_id not in holders:
        holders = (*holders, record.agent_id)
    if complete:  # who is still leaving an older generation falls behind from here on
        members = (member.agent_id for member in generation.members)
        holders = tuple(a for a in members if a not in generation.gone)
    known = complete and digest and record.step == job.committed_step
    state.jobs[record.job_id] = replace(
        job,
        generation=replace(
            generation,
            formed=formed,
            formed_ms=record.at_ms if complete else None,
            formed_step=min(generation.formed_step, record.step) if generation.formed else record.step,
            formed_digest=digest,
            holders=holders,
        ),
        committed_digest=digest if known else job.committed_digest,
    )
    # The first to form ends the wait for those who leave, the last begins the generation.
    if complete or len(formed) == 1:
        state.agenda.jobs[record.job_id] = None
        state.agenda.rolls.pop(record.job_id, None)


def _commit_steps(state: State, record: StepsCommitted) -> None:
    job = state.jobs[record.job_id]
    forgiven = job.failures > 0 and record.last_step >= job.failed_step + FORGOTTEN_AFTER_STEPS
    state.jobs[record.job_id] = replace(
        job,
        committed_step=record.last_step,
        committed_digest="",
        total_tokens=job.total_tokens + record.tokens,
        known_from=0,
        failures=0 if forgiven else job.failures,
        prepare_failed=() if forgiven else job.prepare_failed,
    )
    if job.pending or job.phase is not JobPhase.RUNNING:
        state.agenda.jobs[record.job_id] = None


def _change_checkpoint(
    state: State,
    record: CheckpointDoubted | CheckpointDamaged | CheckpointPinned,
    change: Callable[[Checkpoint], Checkpoint],
) -> None:
    job = state.jobs[record.job_id]
    changed = tuple(change(c) if c.step == record.step else c for c in job.checkpoints)
    _set_job(state, job, checkpoints=changed)


def _roll_back(state: State, record: JobRolledBack) -> None:
    job = state.jobs[record.job_id]
    generation = job.generation
    if generation is not None:
        inside = (*(member.agent_id for member in generation.members), *generation.leaving)
        out = tuple(a for a in inside if a not in generation.gone)
        for agent_id in out:
            _set(state, agent_id, progress_ms=record.at_ms, fetched_bytes=0)
            state.agenda.agents[agent_id] = None
        generation = replace(
            generation,
            gone=(*generation.gone, *out),
            leaving=(),
            uploading=(),
            holders=(),
            checkpoint_before_cut=False,
        )
    _set_job(
        state,
        job,
        generation=generation,
        checkpoints=tuple(
            replace(c, given_up=True) if c.step > record.to_step else c for c in job.checkpoints
        ),
        pending=(),  # what is still to be stored of it is fenced off
        evaluations=tuple(e for e in job.evaluations if e.step <= record.to_step),
        committed_digest="",
        lineage=job.generation_count + 1,
        rollback=Rollback(
            at_ms=record.at_ms, from_step=record.from_step, to_step=record.to_step, by=record.by
        ),
        gathered_ms=None,
        standby_ms=None,
    )


def _evaluate(state: State, record: EvaluationRecorded) -> None:
    job, new = state.jobs[record.job_id], record.evaluation
    others: tuple[Evaluation, ...] = tuple(e for e in job.evaluations if e.step != new.step)
    newest = sorted((*others, new), key=lambda e: e.step)[-EVALUATIONS_KEPT:]
    judged = tuple(
        replace(c, evaluation_loss=new.loss) if c.step == new.step and not c.given_up else c
        for c in job.checkpoints
    )
    _set_job(state, job, evaluations=tuple(newest), checkpoints=judged)


def _record_shard(state: State, record: ShardRecorded) -> None:
    job = state.jobs[record.job_id]
    found = next((p for p in job.pending if p.step == record.step), None)
    _set_pending(state, job, checkpoints.with_shard(found, record))


def _record_witness(state: State, record: StateWitnessed) -> None:
    job = state.jobs[record.job_id]
    found = next((p for p in job.pending if p.step == record.step), None)
    stored = next((c for c in job.checkpoints if c.step == record.step), None)
    if found is None and stored is not None and checkpoints.restorable(stored):
        changed = replace(stored, witnesses=(*stored.witnesses, record.witness))
        _set_job(state, job, checkpoints=tuple(changed if c is stored else c for c in job.checkpoints))
    else:
        _set_pending(state, job, checkpoints.with_witness(found, record))


def _set_pending(state: State, job: Job, pending: PendingCheckpoint) -> None:
    others = tuple(p for p in job.pending if p.step != pending.step)
    _set_job(state, job, pending=tuple(sorted((*others, pending), key=lambda p: p.step)))


def _refresh(state: State, record: LeasesRefreshed) -> None:
    until_ms = dict(record.until_ms)
    state.started_ms = record.at_ms
    for agent_id, agent in state.agents.items():
        state.agents[agent_id] = replace(
            agent,
            session_id=None,
            session_closed_ms=None,
            readiness=None,
            lease_until_ms=until_ms.get(agent_id, 0),
            progress_ms=record.at_ms,
            idle_reason="",
            idle_unmet=(),
        )
    for job_id, job in state.jobs.items():
        state.jobs[job_id] = replace(job, gathered_ms=None, standby_ms=None, known_from=0)
    look_at_everything(state)
