"""What follows from one event: records and a reply.  Reads the state, changes nothing.

Only what the event itself says is judged here; what then follows from the state as a whole (forming,
matching, completing, expiring) is `settle`'s.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from typing import Any, assert_never

from coordinator.core import checkpoints
from coordinator.core.forming import awaits_leaving
from coordinator.core.matching import engaged, serves, serving
from coordinator.core.model import (
    ENDED,
    MOST_ACCUSERS,
    Agent,
    AgentAction,
    AgentAdmitted,
    AgentArrived,
    AgentCommanded,
    AgentDraining,
    AgentId,
    AgentLeft,
    AgentLost,
    AgentReadied,
    AgentReturned,
    AgentSuspected,
    AgentUnassigned,
    CertificateRenewed,
    CheckpointCommanded,
    CheckpointDamaged,
    CheckpointDoubted,
    CheckpointWanted,
    CollectiveFailed,
    CoordinatorStarted,
    DamageFound,
    Decision,
    EnrollAsked,
    EvaluationsReceived,
    Event,
    Evidence,
    FailureCounted,
    FailureKind,
    FinishedReceived,
    FormedReceived,
    GapSeen,
    Generation,
    GoodbyeReceived,
    HeartbeatReceived,
    IdentityRenewed,
    Job,
    JobAction,
    JobAdmitted,
    JobCommanded,
    JobId,
    JobPhase,
    JobPhaseChanged,
    JobRescaled,
    JobRolledBack,
    JobScaled,
    JobSubmitted,
    LeaseRenewed,
    LeasesRefreshed,
    LeaveAsked,
    ManifestCommitted,
    MemberFinished,
    MemberFormed,
    MemberLost,
    MemberReleased,
    MemberStored,
    PeerAccused,
    PeerTrusted,
    PreparationForgiven,
    Presence,
    ProgressAccepted,
    ProgressReceived,
    ReadyReceived,
    Record,
    Refusal,
    Refused,
    ReleasedReceived,
    RollbackAsked,
    SealAsked,
    SessionClosed,
    SessionEnded,
    SessionOpened,
    ShardReported,
    Standing,
    StandingChanged,
    State,
    StepsCommitted,
    StepsRolledBack,
    StepsUnrecorded,
    StrikeCounted,
    Tick,
    Token,
    TokenAsked,
    TokenCreated,
    TokenRevokeAsked,
    TokenRevoked,
    UploadMeasured,
    Why,
    WorkerFailedReceived,
    WrongBytesReported,
    WrongBytesSent,
)
from coordinator.core.strikes import strike

MAX_NODES = 1_024


def decide(state: State, now_ms: int, event: Event) -> Decision:
    """Judge `event`.  A refusal is a reply, never an exception; what it shows may be kept all the same."""
    match event:
        case Tick():
            return Decision()
        case EnrollAsked():
            return _enroll(state, now_ms, event)
        case TokenAsked():
            return _create_token(state, now_ms, event)
        case TokenRevokeAsked():
            if event.token_id not in state.tokens:
                return _refuse(Refusal.UNKNOWN_TOKEN, f"no token has the id {event.token_id}")
            if state.tokens[event.token_id].revoked:
                return Decision()
            return _accept(TokenRevoked(at_ms=now_ms, token_id=event.token_id))
        case JobSubmitted():
            return _submit(state, now_ms, event)
        case JobCommanded() | JobScaled():
            return _command_job(state, now_ms, event)
        case CheckpointCommanded():
            job = state.jobs.get(event.job_id)
            if job is None:
                return _refuse(Refusal.UNKNOWN_JOB, f"no job has the id {event.job_id}")
            return checkpoints.command(job, now_ms, event)
        case RollbackAsked():
            return _roll_back(state, now_ms, event)
        case CoordinatorStarted():
            return _start(state, now_ms, event)
        case DamageFound():
            job = state.jobs.get(event.job_id)
            if job is None:
                return _refuse(Refusal.UNKNOWN_JOB, f"no job has the id {event.job_id}")
            return checkpoints.damage(job, now_ms, event)
        case SealAsked():
            unsealed = (
                (job.job_id, c) for job in state.jobs.values() for c in job.checkpoints if not c.sealed
            )
            return _accept(
                *(ManifestCommitted(at_ms=now_ms, job_id=job_id, checkpoint=c) for job_id, c in unsealed)
            )
        case _:
            return _of_agent(state, now_ms, event)


RETURN_MS = 2_000
"""Agents try to come back at least once a second (agent/session.py), however short the lease."""
RETURN_EACH_MS = 6
"""What a coordinator needs for the return of one agent, when all come at once: none is lost that waits in line."""

AgentEvent = (
    IdentityRenewed
    | SessionOpened
    | SessionClosed
    | HeartbeatReceived
    | ReadyReceived
    | FormedReceived
    | ProgressReceived
    | EvaluationsReceived
    | WorkerFailedReceived
    | FinishedReceived
    | ReleasedReceived
    | LeaveAsked
    | GoodbyeReceived
    | ShardReported
    | WrongBytesReported
    | WrongBytesSent
    | AgentCommanded
)


def _of_agent(state: State, now_ms: int, event: AgentEvent) -> Decision:
    agent = state.agents.get(event.agent_id)
    if agent is None:
        return _refuse(Refusal.UNKNOWN_AGENT, f"no agent has the id {event.agent_id}; enrol with a token")
    if isinstance(event, AgentCommanded):
        return _command_agent(state, now_ms, agent, event)
    if isinstance(event, SessionClosed):
        return _close(now_ms, agent, event)
    if agent.standing is Standing.BANNED:
        detail = f": {agent.standing_detail}" if agent.standing_detail else ""
        return _refuse(Refusal.BANNED, f"agent {agent.agent_id} was banned{detail}")
    match event:
        case SessionOpened():
            return _open(state, now_ms, agent, event)
        case IdentityRenewed():
            serial = event.certificate_serial
            return _accept(
                CertificateRenewed(at_ms=now_ms, agent_id=agent.agent_id, certificate_serial=serial)
            )
        case HeartbeatReceived():
            return _heartbeat(state, now_ms, agent, event)
        case LeaveAsked():
            if agent.draining:
                return Decision()
            return _accept(
                AgentDraining(
                    at_ms=now_ms,
                    agent_id=agent.agent_id,
                    draining=True,
                    reason=event.reason or "its owner asked",
                    until_left=True,
                )
            )
        case GoodbyeReceived():
            if agent.presence is Presence.ABSENT:
                return Decision()
            return _accept(
                AgentLeft(at_ms=now_ms, agent_id=agent.agent_id, reason=event.reason),
                *_lose_member(state, now_ms, agent, Evidence.GOODBYE, event.reason),
            )
        case WrongBytesReported():
            return _accuse(state, now_ms, agent, event)
        case WrongBytesSent():
            # Once it is quarantined nothing is added, so that nobody fills the journal.
            if agent.standing is not Standing.ELIGIBLE:
                return Decision()
            detail = f"it uploaded other bytes than those of blob {event.digest}"
            return _accept(*strike(state, now_ms, agent, detail))
        case ReadyReceived():
            return _of_job(state, now_ms, agent, event.readiness.job_id, event)
        case _:
            return _of_job(state, now_ms, agent, event.job_id, event)


def _accuse(state: State, now_ms: int, agent: Agent, event: WrongBytesReported) -> Decision:
    """Each accuser counts once, so that nobody fills the journal."""
    peer = state.agents.get(event.peer_id)
    if peer is None or peer is agent:
        return _refuse(Refusal.UNKNOWN_AGENT, f"agent_id: {event.peer_id} is no other agent of this fleet")
    if agent.job_id is None:
        return _refuse(Refusal.NOT_A_MEMBER, f"agent {agent.agent_id} serves no job and fetches nothing")
    if agent.agent_id in peer.accusers or len(peer.accusers) >= MOST_ACCUSERS:
        return Decision()
    return _accept(PeerAccused(at_ms=now_ms, agent_id=peer.agent_id, by=agent.agent_id, digest=event.digest))


# --------------------------------------------------------------------- admission and tokens


def _enroll(state: State, now_ms: int, event: EnrollAsked) -> Decision:
    token = state.tokens.get(event.token_id)
    # An unknown token costs the same comparison as a known one.
    known = token.secret_sha256 if token is not None else "0" * 64
    if not hmac.compare_digest(known.encode(), event.secret_sha256.encode()) or token is None:
        return _refuse(Refusal.TOKEN_UNKNOWN, "no such token, or its secret is wrong; ask for a new one")
    if token.revoked:
        return _refuse(Refusal.TOKEN_REVOKED, f"token {token.token_id} was revoked; ask for a new one")
    if now_ms >= token.expires_ms:
        return _refuse(Refusal.TOKEN_EXPIRED, f"token {token.token_id} has expired; ask for a new one")
    if token.uses_left < 1:
        return _refuse(
            Refusal.TOKEN_EXHAUSTED,
            f"token {token.token_id} was used as often as it allows; ask for a new one",
        )
    if event.agent_id in state.agents:
        return _refuse(Refusal.INVALID, f"agent_id: {event.agent_id} is taken")
    return _accept(
        AgentAdmitted(
            at_ms=now_ms,
            agent_id=event.agent_id,
            token_id=event.token_id,
            name=event.name,
            certificate_serial=event.certificate_serial,
        )
    )


def _create_token(state: State, now_ms: int, event: TokenAsked) -> Decision:
    if event.token_id in state.tokens:
        return _refuse(Refusal.INVALID, f"token_id: {event.token_id} is taken")
    if event.uses < 1:
        return _refuse(Refusal.INVALID, f"uses: found {event.uses}; at least 1 is needed")
    if event.expires_ms <= now_ms:
        return _refuse(Refusal.INVALID, f"expires_ms: found {event.expires_ms}; it is {now_ms} already")
    token = Token(
        token_id=event.token_id,
        secret_sha256=event.secret_sha256,
        note=event.note,
        created_ms=now_ms,
        expires_ms=event.expires_ms,
        uses_left=event.uses,
    )
    return _accept(TokenCreated(at_ms=now_ms, token=token))


def _start(state: State, now_ms: int, event: CoordinatorStarted) -> Decision:
    alive = [a for a in state.agents.values() if a.presence in (Presence.READY, Presence.SUSPECT)]
    term_ms = max(state.timing.lease_ms, RETURN_MS, RETURN_EACH_MS * len(alive))
    until_ms = tuple(
        (agent.agent_id, now_ms + term_ms + event.spread_ms * place // len(alive))
        for place, agent in enumerate(alive)
    )
    return _accept(LeasesRefreshed(at_ms=now_ms, until_ms=until_ms))


# ------------------------------------------------------------------------------- sessions


def _open(state: State, now_ms: int, agent: Agent, event: SessionOpened) -> Decision:
    """Rule 15."""
    records: list[Record] = []
    renewed = agent.incarnation != event.incarnation
    if renewed:
        alive = agent.presence is Presence.READY and now_ms < agent.lease_until_ms
        if agent.session_id is not None and alive:
            return _refuse(
                Refusal.DUPLICATE_IDENTITY,
                f"another process holds a live session as agent {agent.agent_id}; stop it, "
                "or enrol this machine on its own",
            )
        if agent.presence in (Presence.READY, Presence.SUSPECT):
            records.append(_lost(now_ms, agent, Evidence.NEW_INCARNATION))
        records += _lose_member(state, now_ms, agent, Evidence.NEW_INCARNATION, "its agent started anew")
    records.append(
        AgentArrived(
            at_ms=now_ms,
            agent_id=agent.agent_id,
            session_id=event.session_id,
            incarnation=event.incarnation,
            facts=event.facts,
            torchrun_job=event.torchrun_job,
            held_job=event.held_job,
        )
    )
    if renewed and agent.job_id is not None:
        job = state.jobs[agent.job_id]
        if not serves(job, replace(agent, facts=event.facts, torchrun_job=event.torchrun_job)):
            records.append(
                AgentUnassigned(
                    at_ms=now_ms,
                    agent_id=agent.agent_id,
                    job_id=job.job_id,
                    reason="it came back without what the job requires",
                )
            )
    return _accept(*records)


def _close(now_ms: int, agent: Agent, event: SessionClosed) -> Decision:
    if agent.session_id != event.session_id:
        return Decision()  # replaced by a newer session
    records: list[Record] = [SessionEnded(at_ms=now_ms, agent_id=agent.agent_id)]
    if agent.presence is Presence.READY:
        suspected = AgentSuspected(at_ms=now_ms, agent_id=agent.agent_id, evidence=Evidence.SESSION_CLOSED)
        records.append(suspected)
    return _accept(*records)


def _heartbeat(state: State, now_ms: int, agent: Agent, event: HeartbeatReceived) -> Decision:
    if agent.session_id != event.session_id:
        return _refuse(
            Refusal.DUPLICATE_IDENTITY,
            f"session {event.session_id} of agent {agent.agent_id} was replaced by a newer one",
        )
    renewed = LeaseRenewed(
        at_ms=now_ms,
        agent_id=agent.agent_id,
        until_ms=now_ms + state.timing.lease_ms,
        step=event.step,
        activity=event.activity,
        tokens_per_s=event.tokens_per_s,
        disk_free_bytes=event.disk_free_bytes,
        fetched_bytes=event.fetched_bytes,
    )
    stored = _all_stored(state, now_ms, agent) if event.all_stored else ()
    if agent.presence is Presence.LOST:
        return _accept(renewed, AgentReturned(at_ms=now_ms, agent_id=agent.agent_id), *stored)
    return _accept(renewed, *stored)


def _all_stored(state: State, now_ms: int, agent: Agent) -> tuple[Record, ...]:
    """A session keeps its order: whoever is out of the generation had written its shards before it said so."""
    job = state.jobs[agent.job_id] if agent.job_id is not None else None
    generation = job.generation if job is not None else None
    if job is None or generation is None or agent.agent_id not in generation.uploading:
        return ()
    return (
        MemberStored(at_ms=now_ms, job_id=job.job_id, generation=generation.number, agent_id=agent.agent_id),
    )


# ------------------------------------------------------------------------ an agent of a job

JobEvent = (
    ReadyReceived
    | FormedReceived
    | ProgressReceived
    | EvaluationsReceived
    | WorkerFailedReceived
    | FinishedReceived
    | ReleasedReceived
    | ShardReported
)


def _of_job(state: State, now_ms: int, agent: Agent, job_id: JobId, event: JobEvent) -> Decision:
    job = state.jobs.get(job_id)
    if job is None:
        return _refuse(Refusal.UNKNOWN_JOB, f"no job has the id {job_id}")
    if agent.job_id != job_id:
        return _refuse(
            Refusal.NOT_A_MEMBER, f"agent {agent.agent_id} is not assigned to job {job_id}; forget it"
        )
    match event:
        case ReadyReceived():
            return _ready(state, now_ms, agent, job, event)
        case FormedReceived():
            return _formed(state, now_ms, job, event)
        case ProgressReceived():
            return _progress(state, now_ms, job, event)
        case EvaluationsReceived():
            return _evaluated(now_ms, job, event)
        case WorkerFailedReceived():
            return _failed(state, now_ms, agent, job, event)
        case FinishedReceived():
            return _finished(now_ms, job, event)
        case ReleasedReceived():
            return _released(now_ms, agent, job, event)
        case ShardReported():
            return _measured(now_ms, agent, event, checkpoints.report(state, job, now_ms, event))
        case _:
            assert_never(event)


def _measured(now_ms: int, agent: Agent, event: ShardReported, decision: Decision) -> Decision:
    """Keep how fast the agent uploads, if it is one whose shards are wanted."""
    rate = event.upload_bytes_per_s
    if isinstance(decision.reply, Refused) or rate == agent.upload_bytes_per_s:
        return decision
    measured = UploadMeasured(at_ms=now_ms, agent_id=agent.agent_id, bytes_per_s=rate)
    return replace(decision, records=(*decision.records, measured))


def _ready(state: State, now_ms: int, agent: Agent, job: Job, event: ReadyReceived) -> Decision:
    readiness = event.readiness
    if agent.session_id is None or agent.presence is Presence.ABSENT:
        return _refuse(Refusal.INVALID, f"agent {agent.agent_id} has no open session")
    if readiness.assignment not in (0, agent.assignments):
        return _refuse(
            Refusal.NOT_A_MEMBER,
            f"assignment: found {readiness.assignment}, which is over; agent {agent.agent_id} has {agent.assignments}",
        )
    records: list[Record] = []
    if agent.presence is Presence.LOST:
        until_ms = now_ms + state.timing.lease_ms
        records += [_renewed(now_ms, agent, until_ms), AgentReturned(at_ms=now_ms, agent_id=agent.agent_id)]
    generation = job.generation
    store = (readiness.store_host, readiness.store_port)
    if generation is not None and store == (generation.store_host, generation.store_port):
        return Decision()  # it crossed the plan that used this store up
    holders = generation.holders if generation is not None else ()
    ahead = readiness.step > job.committed_step + checkpoints.MAX_STEPS_AHEAD
    given_up = readiness.generation < job.lineage  # honestly ahead, of what was given up
    if readiness.holds_state and ahead and not given_up and agent.agent_id not in holders:
        detail = f"says that it holds step {readiness.step}, but {job.committed_step} is the newest committed"
        records += strike(state, now_ms, agent, detail)
        readiness = replace(readiness, holds_state=False, step=0, state_digest="")
    records.append(AgentReadied(at_ms=now_ms, agent_id=agent.agent_id, readiness=readiness))
    return _accept(*records)


def _formed(state: State, now_ms: int, job: Job, event: FormedReceived) -> Decision:
    generation = _current(job, event.agent_id, event.generation)
    if isinstance(generation, Refused):
        return Decision(reply=generation)
    if not _is_member(generation, event.agent_id) or not serving(state, job, event.agent_id):
        return _not_member(event.agent_id, generation)
    if event.agent_id in generation.formed:
        return Decision()
    return _accept(
        MemberFormed(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=event.agent_id,
            step=event.step,
            state_digest=event.state_digest,
        )
    )


def _progress(state: State, now_ms: int, job: Job, event: ProgressReceived) -> Decision:
    """Rule 12."""
    generation = job.generation
    if not 1 <= event.first_step <= event.last_step:
        return _refuse(
            Refusal.INVALID,
            f"steps: found {event.first_step} to {event.last_step}; the first is at least 1 and not after the last",
        )
    if generation is None or not 1 <= event.generation <= generation.number:
        return _refuse(
            Refusal.INVALID,
            f"generation: found {event.generation}; the newest is {job.generation_count}",
        )
    if event.last_step <= job.committed_step:
        known = ProgressAccepted(first_new_step=job.committed_step + 1, last_step=job.committed_step)
        may_speak = _is_member(generation, event.agent_id) and event.generation >= job.lineage
        evaluations = event.evaluations if may_speak else ()
        return Decision(
            records=checkpoints.evaluations(job, now_ms, evaluations, job.committed_step), reply=known
        )
    inside = _is_member(generation, event.agent_id) or event.agent_id in generation.leaving
    if event.generation < job.lineage or (event.generation < generation.number and not inside):
        return _stale(event.generation, generation)
    if not inside or event.agent_id in generation.gone:
        return _not_member(event.agent_id, generation)
    if event.agent_id not in generation.holders and event.agent_id not in generation.leaving:
        # Taken in and not yet healed: what it has done was with others, or alone.
        return _refuse(
            Refusal.NOT_A_MEMBER,
            f"agent {event.agent_id} has not formed generation {generation.number}, so it has no step of it",
        )
    hole: tuple[Record, ...] = ()
    if event.first_step > job.committed_step + 1:
        if not _nobody_has(state, now_ms, job, generation, event):
            message = (
                f"steps: found {event.first_step} to {event.last_step}; the next is {job.committed_step + 1}"
            )
            lower = not job.known_from or event.first_step < job.known_from
            seen = GapSeen(at_ms=now_ms, job_id=job.job_id, known_from=event.first_step)
            return Decision(
                records=(seen,) if lower else (), reply=Refused(refusal=Refusal.INVALID, message=message)
            )
        hole = (
            StepsUnrecorded(
                at_ms=now_ms,
                job_id=job.job_id,
                first_step=job.committed_step + 1,
                last_step=event.first_step - 1,
            ),
        )
    first_step = max(event.first_step, job.committed_step + 1)
    share = (event.last_step - first_step + 1) / (event.last_step - event.first_step + 1)
    return Decision(
        records=(
            *hole,
            StepsCommitted(
                at_ms=now_ms,
                job_id=job.job_id,
                generation=event.generation,
                first_step=first_step,
                last_step=event.last_step,
                tokens=event.tokens * share,
            ),
            *checkpoints.evaluations(job, now_ms, event.evaluations, event.last_step),
        ),
        reply=ProgressAccepted(first_new_step=first_step, last_step=event.last_step),
    )


def _nobody_has(state: State, now_ms: int, job: Job, generation: Generation, event: ProgressReceived) -> bool:
    """Whether the records of the steps before this report will not come any more.

    All members started from a later step, so those steps are part of what they hold; but whoever made them
    died, or is cut off, before it had reported them.  Who is there has said what it knows within two leases
    of the formation, or of our own start.  To wait for ever would mean that no step is recorded, and no
    checkpoint committed, until all members are gone too."""
    if generation.formed_ms is None or event.generation != generation.number:
        return False
    if not 0 < event.first_step <= job.known_from:
        return False  # somebody has more
    since_ms = max(generation.formed_ms, state.started_ms)
    return event.first_step <= generation.formed_step + 1 and now_ms >= since_ms + 2 * state.timing.lease_ms


def _evaluated(now_ms: int, job: Job, event: EvaluationsReceived) -> Decision:
    generation = _current(job, event.agent_id, event.generation)
    if isinstance(generation, Refused):
        return Decision(reply=generation)
    if not _is_inside(generation, event.agent_id):
        return _not_member(event.agent_id, generation)
    return _accept(*checkpoints.evaluations(job, now_ms, event.evaluations, job.committed_step))


def _finished(now_ms: int, job: Job, event: FinishedReceived) -> Decision:
    generation = _current(job, event.agent_id, event.generation)
    if isinstance(generation, Refused):
        return Decision(reply=generation)
    if not _is_inside(generation, event.agent_id):
        return _not_member(event.agent_id, generation)
    if event.agent_id in generation.finished:
        return Decision()
    return _accept(
        MemberFinished(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=event.agent_id,
            step=event.step,
        )
    )


def _released(now_ms: int, agent: Agent, job: Job, event: ReleasedReceived) -> Decision:
    generation = job.generation
    if generation is None or event.generation > generation.number:
        return _refuse(
            Refusal.INVALID, f"generation: found {event.generation}; the newest is {job.generation_count}"
        )
    if _is_member(generation, agent.agent_id):
        return _stale(event.generation, generation)
    if agent.last_generation == 0 and agent.agent_id not in generation.leaving:
        return Decision()
    return _accept(
        MemberReleased(at_ms=now_ms, job_id=job.job_id, generation=generation.number, agent_id=agent.agent_id)
    )


# -------------------------------------------------------------------------------- failures


def _failed(state: State, now_ms: int, agent: Agent, job: Job, event: WorkerFailedReceived) -> Decision:
    generation = job.generation
    newest = generation.number if generation is not None else 0
    if event.generation > newest:
        return _refuse(Refusal.INVALID, f"generation: found {event.generation}; the newest is {newest}")
    match event.kind:
        case FailureKind.COLLECTIVE:
            return _collective(now_ms, job, event)
        case FailureKind.RESTORE:
            return _restore(now_ms, job, event)
        case FailureKind.DIVERGED:
            return _diverged(state, now_ms, agent, job, event)
        case FailureKind.KILLED | FailureKind.WEDGED:
            if _told_before(agent, event):
                return _unready(now_ms, agent, job)
            detail = f"worker {event.kind.value}: {event.detail}"
            return _accept(
                *_worker_gone(state, now_ms, agent, job, detail),
                *strike(state, now_ms, agent, detail),
            )
        case FailureKind.PROGRAM:
            if _told_before(agent, event):
                return _unready(now_ms, agent, job)
            return _accept(
                *_worker_gone(state, now_ms, agent, job, event.detail),
                *_count(state, now_ms, agent, job, event),
            )
        case FailureKind.PREPARE:
            return _accept(
                *_worker_gone(state, now_ms, agent, job, event.detail),
                *strike(state, now_ms, agent, f"preparation failed: {event.detail}"),
                *_count(state, now_ms, agent, job, event),
            )
        case _:
            assert_never(event.kind)


def _collective(now_ms: int, job: Job, event: WorkerFailedReceived) -> Decision:
    generation = _current(job, event.agent_id, event.generation)
    if isinstance(generation, Refused):
        return Decision(reply=generation)
    if not _is_inside(generation, event.agent_id):
        return _not_member(event.agent_id, generation)
    if event.agent_id in generation.collective_failed:
        return Decision()
    forming = generation.formed_ms is None and event.generation == generation.number
    peers = {m.agent_id for m in generation.members if m.agent_id != event.agent_id} if forming else set()
    return _accept(
        CollectiveFailed(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=event.agent_id,
            unreachable=tuple(dict.fromkeys(a for a in event.unreachable if a in peers)),
        )
    )


def _told_before(agent: Agent, event: WorkerFailedReceived) -> bool:
    """Evidence is sent again after a reconnection.  An agent that lost its worker in a generation is not
    in that one any more, so it cannot lose another there."""
    return 0 < event.generation <= agent.failed_generation


def _unready(now_ms: int, agent: Agent, job: Job) -> Decision:
    """In doubt it is not ready: it says so again if it is."""
    if agent.agent_id in engaged(job) or agent.readiness is None:
        return Decision()
    return _accept(AgentReadied(at_ms=now_ms, agent_id=agent.agent_id, readiness=None))


def _restore(now_ms: int, job: Job, event: WorkerFailedReceived) -> Decision:
    """Only the leader restores, so only it can say that it cannot.

    Its own disk may be at fault: another leads the next try, and a checkpoint is damaged once two have
    failed with it, or the only one."""
    generation = _current(job, event.agent_id, event.generation)
    if isinstance(generation, Refused):
        return Decision(reply=generation)
    leads = bool(generation.members) and generation.members[0].agent_id == event.agent_id
    if not leads or event.agent_id in generation.formed or event.agent_id in generation.gone:
        return _refuse(
            Refusal.INVALID, f"agent {event.agent_id} was not asked to restore generation {generation.number}"
        )
    out = MemberLost(
        at_ms=now_ms,
        job_id=job.job_id,
        generation=generation.number,
        agent_id=event.agent_id,
        evidence=Evidence.NOT_FORMED,
        detail=event.detail,
    )
    step = generation.from_checkpoint_step
    found = next((c for c in job.checkpoints if c.step == step and not c.damaged), None)
    if found is None:
        return _accept(out)  # nobody holds the state that was to be in memory: it does not lead again
    others = tuple(a for a in found.doubted_by if a != event.agent_id)
    if others or len(generation.members) == 1:
        return _accept(
            CheckpointDamaged(at_ms=now_ms, job_id=job.job_id, step=found.step, detail=event.detail)
        )
    doubted = CheckpointDoubted(
        at_ms=now_ms, job_id=job.job_id, step=found.step, agent_id=event.agent_id, detail=event.detail
    )
    return _accept(doubted, out)


def _diverged(state: State, now_ms: int, agent: Agent, job: Job, event: WorkerFailedReceived) -> Decision:
    return _accept(
        *_worker_gone(state, now_ms, agent, job, event.detail, Evidence.UNREADY),
        StandingChanged(
            at_ms=now_ms,
            agent_id=agent.agent_id,
            standing=Standing.QUARANTINED,
            why=Why.DIVERGED,
            detail=event.detail,
            until_ms=now_ms + state.timing.quarantine_base_ms,
        ),
    )


def _worker_gone(
    state: State,
    now_ms: int,
    agent: Agent,
    job: Job,
    detail: str,
    evidence: Evidence = Evidence.WORKER_EXIT,
) -> tuple[Record, ...]:
    """Rule 7.  Whatever generation the worker was in: it will not take part in the newest."""
    lost = _lose_member(state, now_ms, agent, evidence, detail)
    if lost:
        return lost
    return (AgentReadied(at_ms=now_ms, agent_id=agent.agent_id, readiness=None),)


def _count(
    state: State, now_ms: int, agent: Agent, job: Job, event: WorkerFailedReceived
) -> tuple[Record, ...]:
    """Rule 11.  A generation's failure counts once, however many of its members crash by it.

    One volunteer alone cannot use up the job's failures: one that is the only one to crash, again, gets
    a strike instead; and outside a generation each agent counts once."""
    member = event.kind is FailureKind.PROGRAM and event.generation > 0
    if member and event.generation <= job.failed_generation:
        return ()
    has_peers = job.generation is not None and len(job.generation.members) > 1
    if member and has_peers and agent.agent_id == job.failed_agent:
        return strike(state, now_ms, agent, f"crashed again: {event.detail}")
    alone = len(job.assigned) <= 1
    if not member and agent.agent_id in job.prepare_failed and not alone:
        return ()
    counted = FailureCounted(
        at_ms=now_ms,
        job_id=job.job_id,
        agent_id=agent.agent_id,
        failure=event.kind,
        detail=event.detail,
        generation=event.generation if member else 0,
    )
    failures = job.failures + 1
    if failures < job.spec.max_failures or job.phase in ENDED:
        return (counted,)
    return (
        counted,
        JobPhaseChanged(
            at_ms=now_ms,
            job_id=job.job_id,
            phase=JobPhase.FAILED,
            why=Why.MAX_FAILURES,
            detail=f"{failures} failures; the last, of agent {agent.agent_id}: {event.detail}",
        ),
    )


def _lose_member(
    state: State, now_ms: int, agent: Agent, evidence: Evidence, detail: str
) -> tuple[Record, ...]:
    if agent.job_id is None:
        return ()
    job = state.jobs[agent.job_id]
    generation = job.generation
    if generation is None or agent.agent_id not in engaged(job):
        return ()
    return (
        MemberLost(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=agent.agent_id,
            evidence=evidence,
            detail=detail,
        ),
    )


def _lost(now_ms: int, agent: Agent, evidence: Evidence) -> AgentLost:
    return AgentLost(at_ms=now_ms, agent_id=agent.agent_id, evidence=(evidence,), striked=False)


def _renewed(now_ms: int, agent: Agent, until_ms: int) -> LeaseRenewed:
    return LeaseRenewed(
        at_ms=now_ms,
        agent_id=agent.agent_id,
        until_ms=until_ms,
        step=agent.step,
        activity=agent.activity,
        tokens_per_s=agent.tokens_per_s,
        disk_free_bytes=agent.disk_free_bytes,
    )


# -------------------------------------------------------------------------------- fences


def _current(job: Job, agent_id: AgentId, number: int) -> Generation | Refused:
    """The newest generation if the message is about it: by its number, or by the one before while that
    still has to reach its cut."""
    generation = job.generation
    if generation is None or number > generation.number:
        return Refused(
            refusal=Refusal.INVALID,
            message=f"generation: found {number}; the newest is {job.generation_count}",
        )
    old_goes_on = awaits_leaving(generation) and number == generation.number - 1
    if number == generation.number or old_goes_on:
        return generation
    return Refused(
        refusal=Refusal.STALE_GENERATION,
        message=f"generation {number} of agent {agent_id} is over; the newest is {generation.number}",
    )


def _is_member(generation: Generation, agent_id: AgentId) -> bool:
    return agent_id not in generation.gone and any(m.agent_id == agent_id for m in generation.members)


def _is_inside(generation: Generation, agent_id: AgentId) -> bool:
    return _is_member(generation, agent_id) or agent_id in generation.leaving


def _not_member(agent_id: AgentId, generation: Generation) -> Decision:
    return _refuse(
        Refusal.NOT_A_MEMBER, f"agent {agent_id} is not a member of generation {generation.number}"
    )


def _stale(number: int, generation: Generation) -> Decision:
    return _refuse(
        Refusal.STALE_GENERATION, f"generation {number} is over; the newest is {generation.number}"
    )


# --------------------------------------------------------------------------- the operator


def _submit(state: State, now_ms: int, event: JobSubmitted) -> Decision:
    if event.job_id in state.jobs:
        return _refuse(Refusal.INVALID, f"job_id: {event.job_id} is taken")
    for job_id in state.agenda.live:
        if state.jobs[job_id].spec.name == event.spec.name:
            return _refuse(
                Refusal.NAME_TAKEN,
                f"name: live job {job_id} is called {event.spec.name} already; choose another name or end that job",
            )
    wrong = _wrong_size(event.spec.min_nodes, event.spec.max_nodes)
    if wrong is not None:
        return wrong
    if event.spec.launch not in ("muster", "torchrun"):
        return _refuse(Refusal.INVALID, f"launch: found {event.spec.launch}; allowed are muster and torchrun")
    return _accept(JobAdmitted(at_ms=now_ms, job_id=event.job_id, spec=event.spec))


def _wrong_size(min_nodes: int, max_nodes: int) -> Decision | None:
    if 1 <= min_nodes <= max_nodes <= MAX_NODES:
        return None
    return _refuse(
        Refusal.INVALID,
        f"min_nodes and max_nodes: found {min_nodes} and {max_nodes}; "
        f"min_nodes is at least 1 and at most max_nodes, which is at most {MAX_NODES:,}",
    )


def _command_job(state: State, now_ms: int, event: JobCommanded | JobScaled) -> Decision:
    job = state.jobs.get(event.job_id)
    if job is None:
        return _refuse(Refusal.UNKNOWN_JOB, f"no job has the id {event.job_id}")
    if job.phase in ENDED:
        return _wrong_phase(job, "it has ended")
    if isinstance(event, JobScaled):
        return _wrong_size(event.min_nodes, event.max_nodes) or _accept(
            JobRescaled(at_ms=now_ms, job_id=job.job_id, min_nodes=event.min_nodes, max_nodes=event.max_nodes)
        )
    stopping = job.phase is JobPhase.STOPPING and job.phase_why is Why.STOPPED_BY_OPERATOR
    match event.action:
        case JobAction.PAUSE:
            if job.phase is JobPhase.PAUSED or job.phase is JobPhase.STOPPING:
                return _wrong_phase(job, "only a job that is not stopping or paused can be paused")
            return _change(now_ms, job, JobPhase.STOPPING, Why.PAUSED_BY_OPERATOR)
        case JobAction.RESUME:
            if job.phase is not JobPhase.PAUSED:
                return _wrong_phase(job, "only a paused job can be resumed")
            return _change(now_ms, job, JobPhase.QUEUED, Why.RESUMED_BY_OPERATOR)
        case JobAction.STOP:
            if stopping:
                return Decision()
            return _change(now_ms, job, JobPhase.STOPPING, Why.STOPPED_BY_OPERATOR)
        case JobAction.CANCEL:
            return _change(now_ms, job, JobPhase.CANCELLED, Why.CANCELLED_BY_OPERATOR)
        case JobAction.CHECKPOINT:
            if job.phase is not JobPhase.RUNNING or job.generation is None:
                return _wrong_phase(job, "only a running job can take a checkpoint")
            number = job.generation.number
            return _accept(CheckpointWanted(at_ms=now_ms, job_id=job.job_id, generation=number))
        case _:
            assert_never(event.action)


def _roll_back(state: State, now_ms: int, event: RollbackAsked) -> Decision:
    job = state.jobs.get(event.job_id)
    if job is None:
        return _refuse(Refusal.UNKNOWN_JOB, f"no job has the id {event.job_id}")
    if job.phase in ENDED:
        return _wrong_phase(job, "it has ended")
    if job.phase is JobPhase.STOPPING:
        return _wrong_phase(job, "its last checkpoint is being stored; wait until it is paused")
    refused = checkpoints.may_go_back(job, event.step)
    if refused is not None:
        return Decision(reply=refused)
    same: dict[str, Any] = {"at_ms": now_ms, "job_id": job.job_id}
    records: list[Record] = [
        JobRolledBack(**same, from_step=job.committed_step, to_step=event.step, by=event.by)
    ]
    if event.step < job.committed_step:
        records.append(StepsRolledBack(**same, to_step=event.step))
    if job.phase in (JobPhase.RUNNING, JobPhase.RECOVERING):
        detail = f"by {event.by}, from step {job.committed_step} to checkpoint {event.step}"
        why = Why.ROLLED_BACK_BY_OPERATOR
        records.append(JobPhaseChanged(**same, phase=JobPhase.RECOVERING, why=why, detail=detail))
    return _accept(*records)


def _change(now_ms: int, job: Job, phase: JobPhase, reason: Why) -> Decision:
    return _accept(JobPhaseChanged(at_ms=now_ms, job_id=job.job_id, phase=phase, why=reason, detail=""))


def _wrong_phase(job: Job, message: str) -> Decision:
    return _refuse(Refusal.WRONG_PHASE, f"job {job.spec.name} is {job.phase.value}: {message}")


def _command_agent(state: State, now_ms: int, agent: Agent, event: AgentCommanded) -> Decision:
    agent_id = agent.agent_id
    if agent.standing is Standing.BANNED:
        if event.action is AgentAction.BAN:
            return Decision()
        return _refuse(
            Refusal.WRONG_PHASE, f"agent {agent_id} is banned for good; its machine may enrol anew"
        )
    match event.action:
        case AgentAction.DRAIN:
            if agent.draining and not agent.drain_until_left:
                return Decision()
            reason = event.reason or "the operator asked"
            return _accept(AgentDraining(at_ms=now_ms, agent_id=agent_id, draining=True, reason=reason))
        case AgentAction.QUARANTINE:
            if event.until_ms is not None and event.until_ms <= now_ms:
                return _refuse(Refusal.INVALID, f"until_ms: found {event.until_ms}; it is {now_ms} already")
            return _accept(
                _standing(now_ms, agent, Standing.QUARANTINED, event.reason, event.until_ms),
                *_lose_member(state, now_ms, agent, Evidence.UNREADY, "quarantined by the operator"),
            )
        case AgentAction.RELEASE:
            return _accept(*_release(now_ms, agent, event.reason))
        case AgentAction.BAN:
            lost = agent.presence in (Presence.READY, Presence.SUSPECT)
            return _accept(
                _standing(now_ms, agent, Standing.BANNED, event.reason, None),
                *((_lost(now_ms, agent, Evidence.BANNED),) if lost else ()),
                *_lose_member(state, now_ms, agent, Evidence.BANNED, "banned by the operator"),
            )
        case _:
            assert_never(event.action)


def _standing(
    now_ms: int, agent: Agent, standing: Standing, reason: str, until_ms: int | None
) -> StandingChanged:
    return StandingChanged(
        at_ms=now_ms,
        agent_id=agent.agent_id,
        standing=standing,
        why=Why.BY_OPERATOR,
        detail=reason,
        until_ms=until_ms,
    )


def _release(now_ms: int, agent: Agent, reason: str) -> list[Record]:
    records: list[Record] = []
    if agent.standing is Standing.QUARANTINED:
        records.append(_standing(now_ms, agent, Standing.ELIGIBLE, reason, None))
    if agent.strikes:
        records.append(
            StrikeCounted(at_ms=now_ms, agent_id=agent.agent_id, strikes=0, detail="released by the operator")
        )
    if agent.draining:
        records.append(AgentDraining(at_ms=now_ms, agent_id=agent.agent_id, draining=False, reason=reason))
    if agent.accusers:
        records.append(PeerTrusted(at_ms=now_ms, agent_id=agent.agent_id))
    for job_id, _ in agent.kept_from:
        records.append(PreparationForgiven(at_ms=now_ms, agent_id=agent.agent_id, job_id=job_id))
    return records


def _accept(*records: Record) -> Decision:
    return Decision(records=records)


def _refuse(refusal: Refusal, message: str) -> Decision:
    return Decision(reply=Refused(refusal=refusal, message=message))
