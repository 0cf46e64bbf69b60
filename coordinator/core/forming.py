"""When a job's next generation is formed, of whom, in which rank, and from which state.

`assess` is the one judgement: settle acts on it, the deadlines follow from it, and `why` shows it.  It
does not know the time; a proposal names the moment from which it holds.  How records change the state,
and who serves which job, is decided elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.core.checkpoints import MAX_STEPS_AHEAD, newest_good
from coordinator.core.matching import serving
from coordinator.core.model import (
    ENDED,
    Agent,
    AgentId,
    Cut,
    Generation,
    GenerationPlanned,
    Job,
    JobId,
    JobPhase,
    JobPhaseChanged,
    Member,
    NotYet,
    Presence,
    Record,
    Roll,
    Standing,
    State,
    StepsRolledBack,
    Why,
)

UPLOAD_MS = 600_000
"""The last checkpoint of leaving members is waited for so long once some of it has been stored."""
TYPICAL_WEIGHT, MOST_WEIGHT = 100, 1_000
"""Of a member's part of the shards: see `upload_weights`."""
RESTORE_BYTES_PER_MS = 5_000
"""The slowest line on which a restored checkpoint is still waited for; agents reckon alike (agent/job.py)."""
# To look a member of an enum up takes ten times as long as a name does, and a roll may be of thousands.
_READY, _SUSPECT, _ABSENT, _ELIGIBLE = Presence.READY, Presence.SUSPECT, Presence.ABSENT, Standing.ELIGIBLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A generation that can be formed from `at_ms` on; None: from when the last call is over, which has
    not begun.  No members: everyone is released."""

    members: tuple[AgentId, ...]
    cut: Cut
    why: Why
    at_ms: int | None
    waiting: NotYet  # what it waits for until then
    detail: str = ""


def why(state: State, job_id: JobId) -> NotYet:
    """What the job waits for before its next generation is planned."""
    judged = assess(state, state.jobs[job_id])
    if isinstance(judged, NotYet):
        return judged
    return replace(judged.waiting, until_ms=judged.at_ms)


def assess(state: State, job: Job) -> Proposal | NotYet:
    """Judge what the job's next generation is (rules 4 to 10)."""
    if job.phase in ENDED or job.phase is JobPhase.PAUSED:
        return NotYet(why=Why.NOTHING_TO_DO)
    generation = job.generation
    alive = survivors(state, job)
    if generation is None or not alive:
        return _gather(state, job)
    if broken(state, job):
        lost = ", ".join(absent(state, job))
        return _reform(state, job, generation, alive, Why.MEMBER_LOST, 0, f"lost: {lost}")
    if generation.collective_failed_ms is not None:
        at_ms = generation.collective_failed_ms + state.timing.grace_ms
        reporters = ", ".join(generation.collective_failed)
        return _reform(state, job, generation, alive, Why.RETRY, at_ms, f"collective failed at: {reporters}")
    if not generation.members:
        return NotYet(
            why=Why.RELEASING, have=0, need=len(generation.leaving), until_ms=deadline(state, generation)
        )
    if generation.formed_ms is None:
        step = generation.from_checkpoint_step
        if step is not None and all(c.damaged for c in job.checkpoints if c.step == step):
            return _reform(
                state, job, generation, alive, Why.RETRY, 0, f"checkpoint {step} cannot be restored"
            )
        return NotYet(
            why=Why.FORMING,
            have=len(generation.formed),
            need=len(generation.members),
            until_ms=deadline(state, generation),
        )
    return _cut(state, job, generation, alive)


def deadline(state: State, generation: Generation) -> int:
    """When the newest generation has to be formed.  While the coordinator was away nobody could say that it
    is: after a start whoever lives comes back within a lease."""
    if not state.started_ms:
        return generation.deadline_ms
    timing = state.timing
    return max(generation.deadline_ms, state.started_ms + timing.lease_ms + timing.rebuild_timeout_ms)


# ------------------------------------------------------------------------- who is there


def roll(state: State, job: Job) -> Roll:
    """Who is there, called once and remembered until something changes it.  `job` is the state's own."""
    known = state.agenda.rolls.get(job.job_id)
    if known is None:
        known = state.agenda.rolls[job.job_id] = _call(state, job)
    return known


def _call(state: State, job: Job) -> Roll:
    generation, agents, job_id = job.generation, state.agents, job.job_id
    alive: list[AgentId] = []
    lost: list[AgentId] = []
    leaving: tuple[AgentId, ...] = ()
    if generation is not None:
        leaving, gone = generation.leaving, frozenset(generation.gone)
        for member in generation.members:
            agent_id = member.agent_id
            agent = agents[agent_id]
            there = (  # as `serving`: a generation may have a thousand members
                agent.job_id == job_id
                and (agent.presence is _READY or agent.presence is _SUSPECT)
                and agent.standing is _ELIGIBLE
                and agent_id not in gone
            )
            (alive if there else lost).append(agent_id)
        still_leaving = [a for a in leaving if serving(state, job, a)]
        if awaits_leaving(generation):
            members = frozenset(member.agent_id for member in generation.members)
            lost += [a for a in generation.gone if a not in members]
            if len(still_leaving) < len(leaving):
                served = frozenset(still_leaving)
                lost += [a for a in leaving if a not in served]
        if generation.formed_ms is None:
            holders = frozenset(generation.holders)
            if holders.isdisjoint(alive):
                alive += [a for a in still_leaving if a in holders or not generation.members]
    inside = frozenset((*alive, *leaving))
    ready: list[AgentId] = []
    unfit: list[AgentId] = []
    preparing = False
    for agent_id in job.assigned:
        agent = agents[agent_id]
        if agent.draining or agent.standing is not _ELIGIBLE or agent.presence is _ABSENT:
            unfit.append(agent_id)
        elif agent_id not in inside and _reachable(agent):
            if agent.readiness is None:
                preparing = True
            else:
                ready.append(agent_id)
    return Roll(
        alive=tuple(alive),
        draining=tuple(a for a in alive if state.agents[a].draining),
        lost=tuple(lost),
        ready=tuple(ready),
        preparing=preparing,
        unfit=tuple(unfit),
        inside=inside,
    )


def survivors(state: State, job: Job) -> tuple[AgentId, ...]:
    """Members of the newest generation that are still there, by rank.

    Until it came to be, those who have not left the one before count too where nobody else is there, or
    nobody else holds the state."""
    return roll(state, job).alive


def awaits_leaving(generation: Generation) -> bool:
    """Whether the old generation still has to reach its cut, so that losing someone who leaves matters."""
    return generation.cut is Cut.AFTER_STEP and generation.formed_ms is None and not generation.formed


def absent(state: State, job: Job) -> tuple[AgentId, ...]:
    """Agents without which the newest generation cannot go on."""
    return roll(state, job).lost


def broken(state: State, job: Job) -> bool:
    """Whether the newest generation has lost someone that it needs."""
    return bool(absent(state, job))


def cut_off(generation: Generation) -> tuple[AgentId, ...]:
    """Members whom more than half of the others could not reach while the generation formed: the one that
    most could not reach is left out, of equals the most junior, and then the others are asked again.  One
    that lies about a peer is not enough, but for a world of two."""
    rank = {member.agent_id: member.group_rank for member in generation.members}
    links = set(generation.unreachable)
    out: list[AgentId] = []
    while links:
        missed = Counter(whom for _, whom in links)
        worst = max(missed, key=lambda agent_id: (missed[agent_id], rank[agent_id]))
        if 2 * missed[worst] <= len(rank) - len(out) - 1:
            break
        out.append(worst)
        links = {link for link in links if worst not in link}
    return tuple(out)


def joiners(state: State, job: Job) -> tuple[AgentId, ...]:
    """Ready agents that are in no generation of the job, in order of assignment."""
    return roll(state, job).ready


def preparing(state: State, job: Job) -> bool:
    """Whether some assigned agent is on its way to being ready."""
    return roll(state, job).preparing


def _reachable(agent: Agent) -> bool:
    return agent.session_id is not None and agent.presence is _READY


def holds_state(state: State, job: Job, agent_id: AgentId) -> bool:
    """Whether the agent's workers may be trusted to have the committed state in memory: it was there
    when the state was formed, or it says so and the step (and digest, where both are known) fits."""
    generation = job.generation
    if generation is None:
        return False
    if agent_id in generation.holders:
        return True
    agent = state.agents[agent_id]
    readiness = agent.readiness
    if readiness is None or not readiness.holds_state or job.committed_step == 0:
        return False
    if readiness.generation < job.lineage:
        return False  # of a state that was given up
    if readiness.step == job.committed_step and readiness.state_digest and job.committed_digest:
        return readiness.state_digest == job.committed_digest
    # A process that was in the newest generation, and lost one of its workers, may know of steps that nobody
    # could report; another is not believed to be further than the step that may be on its way.
    ahead = MAX_STEPS_AHEAD if agent.last_generation == generation.number else 1
    return job.committed_step <= readiness.step <= job.committed_step + ahead


def counted_holders(state: State, job: Job, agents: tuple[AgentId, ...]) -> tuple[AgentId, ...]:
    """Those of `agents` whose state counts.  Who is in the newest generation may be steps ahead of the
    record: what others say that they hold counts only where nobody of it is left."""
    inside = frozenset(job.generation.holders if job.generation is not None else ())
    counted = tuple(a for a in agents if a in inside)
    return counted or tuple(a for a in agents if holds_state(state, job, a))


# ------------------------------------------------------------------------------ the cases


def _gather(state: State, job: Job) -> Proposal | NotYet:
    """Nobody is in a generation: rule 4."""
    if job.phase is JobPhase.STOPPING:
        return NotYet(why=Why.CHECKPOINTING, until_ms=checkpoint_awaited(state, job))
    ready = joiners(state, job)
    need = job.spec.min_nodes
    more = preparing(state, job)
    if len(ready) < need:
        return _too_few(state, job, len(ready), need, more)
    members = _holders_first(state, job, ready)[: job.spec.max_nodes]
    at_ms: int | None = 0
    if more and len(ready) < job.spec.max_nodes:
        at_ms = None if job.gathered_ms is None else job.gathered_ms + job.spec.last_call_ms
    waits_for = Why.LAST_CALL
    stored_ms = checkpoint_awaited(state, job)
    if stored_ms is not None and at_ms is not None and not any(holds_state(state, job, a) for a in ready):
        # The state is on its way from those who left: to begin now would be to begin without it.
        waits_for, at_ms = Why.CHECKPOINTING, max(at_ms, stored_ms)
    return Proposal(
        members=members,
        cut=Cut.ABORT,
        why=_why_gathered(job),
        at_ms=at_ms,
        waiting=NotYet(why=waits_for, have=len(ready), need=job.spec.max_nodes),
    )


def _why_gathered(job: Job) -> Why:
    if job.generation is None:
        return Why.AGENTS_ASSIGNED
    return Why.ROLLED_BACK_BY_OPERATOR if job.lineage > job.generation.number else Why.MEMBER_JOINED


def _too_few(state: State, job: Job, have: int, need: int, more: bool) -> NotYet:
    if more:
        return NotYet(why=Why.PREPARING, have=have, need=need)
    if not any(serving(state, job, a) for a in job.assigned):
        return NotYet(why=Why.NO_AGENT, have=have, need=need)
    return NotYet(why=Why.BELOW_MIN, have=have, need=need)


def _reform(
    state: State,
    job: Job,
    generation: Generation,
    alive: tuple[AgentId, ...],
    reason: Why,
    at_ms: int,
    detail: str,
) -> Proposal | NotYet:
    """The generation cannot go on: form again at once with who is left (rules 6 and 8)."""
    stopping = job.phase is JobPhase.STOPPING
    there = tuple(a for a in alive if _reachable(state.agents[a]))
    staying = tuple(a for a in there if not state.agents[a].draining)
    fresh = () if stopping else joiners(state, job)
    counted = frozenset(counted_holders(state, job, (*alive, *fresh)))
    keepers = [a for a in alive if a in counted]
    if keepers and not counted.intersection(there):
        # Forming without them would throw away what they hold; they come back or their lease ends.
        return NotYet(why=Why.UNREACHABLE, have=0, need=1)
    # The last ones to leave still form, so that their state reaches a checkpoint.
    need = 1 if stopping or (keepers and not staying) else job.spec.min_nodes
    chosen = (*staying, *fresh)
    only_leavers_hold = bool(keepers) and not any(a in counted for a in chosen)
    if stopping or len(chosen) < need or not chosen or only_leavers_hold:
        chosen = (*there, *fresh)
    if len(chosen) < need or not chosen:
        return _too_few(state, job, len(chosen), need, preparing(state, job))
    members = _holders_first(state, job, chosen)[: job.spec.max_nodes]
    return _led(
        state,
        job,
        generation,
        Proposal(
            members=members,
            cut=Cut.ABORT,
            why=reason,
            at_ms=at_ms,
            waiting=NotYet(why=Why.FORMING, have=len(members), need=len(members)),
            detail=detail,
        ),
    )


def _cut(state: State, job: Job, generation: Generation, alive: tuple[AgentId, ...]) -> Proposal | NotYet:
    """The generation runs: end it after a step if someone leaves, or may come in (rules 5 and 10)."""
    if generation.finished:
        if _last_is_lost(state, job, generation):
            detail = f"nobody has anything left to store of checkpoint {generation.finished_step}"
            return _reform(state, job, generation, alive, Why.RETRY, 0, detail)
        return NotYet(why=Why.CHECKPOINTING, have=len(generation.finished), need=len(generation.members))
    stopping = job.phase is JobPhase.STOPPING
    leavers = alive if stopping else roll(state, job).draining
    out = frozenset(leavers)
    staying = tuple(a for a in alive if a not in out)
    surplus = staying[job.spec.max_nodes :]
    staying = staying[: job.spec.max_nodes]
    ready = () if stopping else joiners(state, job)
    members = (*staying, *ready[: job.spec.max_nodes - len(staying)])
    forced = bool(leavers or surplus)
    if not forced and len(members) == len(staying):
        if preparing(state, job) and len(staying) < job.spec.max_nodes:
            return NotYet(why=Why.PREPARING, have=len(staying), need=job.spec.max_nodes)
        return NotYet(why=Why.NOTHING_TO_DO, have=len(staying), need=job.spec.max_nodes)
    there = sum(_reachable(state.agents[a]) for a in alive)
    if there < len(alive):
        # Who is not there would not hear of the cut, and the others would wait for it.
        return NotYet(why=Why.UNREACHABLE, have=there, need=len(alive))
    cut = Cut.ABORT if job.spec.launch == "torchrun" else Cut.AFTER_STEP
    if forced:
        reason = _why_cut(job, leavers)
        gone = ", ".join((*leavers, *surplus))
        if len(members) < job.spec.min_nodes or not frozenset(generation.holders).intersection(members):
            members = ()
        return _led(
            state,
            job,
            generation,
            Proposal(
                members=members,
                cut=cut,
                why=reason,
                at_ms=0,
                waiting=NotYet(why=Why.FORMING, have=len(members), need=len(members)),
                detail=f"leaving: {gone}",
            ),
        )
    return _led(state, job, generation, _take_in(state, job, generation, members, cut))


def all_finished(state: State, job: Job, generation: Generation) -> list[AgentId]:
    """The members that are there, once all of them have finished; nobody before."""
    there = [a for a in generation.holders if serving(state, job, a)]
    return there if frozenset(generation.finished).issuperset(there) else []


def _last_is_lost(state: State, job: Job, generation: Generation) -> bool:
    """Whether all have finished, which they say once all their shards are reported, and the last checkpoint
    lacks some: it was given up for another, or a report was refused.  They form again, and store it anew."""
    step = generation.finished_step
    newest = newest_good(job)
    if job.spec.launch == "torchrun" or (newest is not None and newest.step >= step):
        return False
    if not all_finished(state, job, generation):
        return False
    pending = next((p for p in job.pending if p.step == step), None)
    return pending is None or len(pending.shards) < pending.count


def _take_in(
    state: State, job: Job, generation: Generation, members: tuple[AgentId, ...], cut: Cut
) -> Proposal:
    """Take ready standbys in once last call is over and the generation is old enough (rule 5)."""
    called_ms: int | None = 0
    if preparing(state, job) and len(members) < job.spec.max_nodes:
        called_ms = None if job.standby_ms is None else job.standby_ms + job.spec.last_call_ms
    assert generation.formed_ms is not None
    aged_ms = generation.formed_ms + job.spec.min_generation_ms
    old_enough_last = called_ms is not None and aged_ms >= called_ms
    return Proposal(
        members=members,
        cut=cut,
        why=Why.MEMBER_JOINED,
        at_ms=None if called_ms is None else max(called_ms, aged_ms),
        waiting=NotYet(
            why=Why.MIN_GENERATION if old_enough_last else Why.LAST_CALL,
            have=len(generation.members),
            need=len(members),
        ),
    )


def _why_cut(job: Job, leavers: tuple[AgentId, ...]) -> Why:
    if job.phase is JobPhase.STOPPING:
        return job.phase_why
    return Why.MEMBER_DRAINED if leavers else Why.SCALED_BY_OPERATOR


def _holders_first(state: State, job: Job, agents: Iterable[AgentId]) -> tuple[AgentId, ...]:
    """Rule 3: the order is kept, but who holds the state comes before who does not."""
    order = tuple(agents)
    counted = frozenset(counted_holders(state, job, order))
    return tuple(sorted(order, key=lambda a: a not in counted))


def _led(state: State, job: Job, generation: Generation, proposal: Proposal) -> Proposal | NotYet:
    """Wait for the leader's next store rather than have a junior lead, but not for ever.

    The leader's store was used up when the generation was planned, and it names another within
    milliseconds."""
    members = proposal.members
    if not members or state.agents[members[0]].readiness is not None:
        return proposal
    holders = counted_holders(state, job, members)
    # Nothing is lost by waiting for a planned cut; a broken generation has to be led by someone.
    candidates = (*holders, *members) if proposal.cut is Cut.ABORT else holders
    with_store = [a for a in candidates if state.agents[a].readiness is not None]
    if not with_store:
        return NotYet(why=Why.PREPARING, have=0, need=1)
    leader = with_store[0]
    patience_ms = generation.planned_ms + state.timing.rebuild_timeout_ms
    return replace(
        proposal,
        members=(leader, *(a for a in members if a != leader)),
        at_ms=None if proposal.at_ms is None else max(proposal.at_ms, patience_ms),
        waiting=NotYet(why=Why.PREPARING, have=0, need=1),
    )


# ------------------------------------------------------------------ leaving with a checkpoint


def checkpoint_awaited(state: State, job: Job) -> int | None:
    """Until when a released generation's last checkpoint is waited for; None if it is not."""
    generation = job.generation
    if generation is None or not generation.checkpoint_before_cut or job.committed_step == 0:
        return None
    newest = newest_good(job)
    if newest is not None and newest.step >= job.committed_step:
        return None
    if not any(serving(state, job, a) for a in (*generation.leaving, *generation.uploading)):
        return None  # nobody is left who could store it
    begun = any(p.step >= job.committed_step for p in job.pending)
    return deadline(state, generation) + (UPLOAD_MS if begun else 0)


# ------------------------------------------------------------------------------- the plan


def plan(state: State, job: Job, proposal: Proposal, now_ms: int) -> tuple[Record, ...]:
    """The records that make `proposal` the job's newest generation."""
    records: list[Record] = []
    old = job.generation
    members = proposal.members
    holders = counted_holders(state, job, members)
    released = not members
    newest = newest_good(job)
    from_step: int | None = None
    committed_step, committed_digest = job.committed_step, job.committed_digest
    if not released and not holders:
        from_step = newest.step if newest is not None else None
        resumed = from_step or 0
        if committed_step > resumed:
            records.append(StepsRolledBack(at_ms=now_ms, job_id=job.job_id, to_step=resumed))
        committed_step = resumed
        committed_digest = newest.state_digest if newest is not None else ""
    fresh = not released and not holders and from_step is None
    leaving = _leaving(state, job, members)
    if old is not None:
        holders = (*holders, *(a for a in leaving if a in old.holders))
    timing = state.timing
    deadline_ms = now_ms + timing.rebuild_timeout_ms
    if proposal.cut is Cut.AFTER_STEP or job.spec.launch == "torchrun":  # which stops scripts in its own time
        deadline_ms += job.spec.step_timeout_ms
    restored = next((c for c in job.checkpoints if c.step == from_step), None)
    if restored is not None:  # the leader may have to fetch it first, as slowly as agents bear with
        deadline_ms += restored.bytes // RESTORE_BYTES_PER_MS
    store = state.agents[members[0]].readiness if members else None
    assert store is not None or released, f"{members[:1]} leads but names no store"
    generation = Generation(
        number=job.generation_count + 1,
        members=_ranked(state, members, frozenset(holders)),
        store_host=store.store_host if store is not None else "",
        store_port=store.store_port if store is not None else 0,
        cut=proposal.cut,
        why=proposal.why,
        planned_ms=now_ms,
        deadline_ms=deadline_ms,
        committed_step=committed_step,
        committed_digest=committed_digest,
        from_checkpoint_step=from_step,
        fresh=fresh,
        checkpoint_before_cut=released and job.spec.launch != "torchrun",
        leaving=leaving,
        holders=holders,
    )
    interrupted = proposal.cut is Cut.ABORT or released
    if job.phase is JobPhase.RUNNING and interrupted:
        records.append(
            JobPhaseChanged(
                at_ms=now_ms,
                job_id=job.job_id,
                phase=JobPhase.RECOVERING,
                why=proposal.why,
                detail=proposal.detail,
            )
        )
    records.append(GenerationPlanned(at_ms=now_ms, job_id=job.job_id, generation=generation))
    return tuple(records)


def _leaving(state: State, job: Job, members: tuple[AgentId, ...]) -> tuple[AgentId, ...]:
    old = job.generation
    if old is None:
        return ()
    inside = (*(member.agent_id for member in old.members), *old.leaving)
    out = frozenset((*members, *old.gone))
    return tuple(a for a in inside if a not in out and serving(state, job, a))


def upload_weights(agents: Sequence[Agent]) -> tuple[int, ...]:
    """What part of a checkpoint's shards each is to store: in proportion to how fast it uploads, where
    TYPICAL_WEIGHT is the (lower) median of those that have measured it, and of who has not.

    Nobody gets nothing, so everybody is measured again in time; and nobody gets more than ten times the
    median, however fast it says it is.  All 0, for equal parts, if one could not divide so: the ranks have to
    agree on the division without a word."""
    if not all(agent.facts.weighs_uploads for agent in agents):
        return (0,) * len(agents)
    rates = sorted(agent.upload_bytes_per_s for agent in agents if agent.upload_bytes_per_s)
    if not rates:
        return (0,) * len(agents)
    typical = rates[(len(rates) - 1) // 2]
    return tuple(
        min(max(1, TYPICAL_WEIGHT * agent.upload_bytes_per_s // typical), MOST_WEIGHT)
        if agent.upload_bytes_per_s
        else TYPICAL_WEIGHT
        for agent in agents
    )


def _ranked(state: State, members: tuple[AgentId, ...], holders: frozenset[AgentId]) -> tuple[Member, ...]:
    weights = upload_weights([state.agents[agent_id] for agent_id in members])
    ranked: list[Member] = []
    first_rank = 0
    for group_rank, agent_id in enumerate(members):
        facts = state.agents[agent_id].facts
        workers = max(1, facts.worker_count)
        ranked.append(
            Member(
                agent_id=agent_id,
                group_rank=group_rank,
                first_rank=first_rank,
                worker_count=workers,
                host=facts.advertise_host or facts.hostname,
                upload_weight=weights[group_rank],
                holds_state=agent_id in holders,
            )
        )
        first_rank += workers
    return tuple(ranked)
