"""Checkpoints: which shard reports are accepted, when a manifest is committed, and what is kept, why.

Knows digests and counts, not bytes: the shell has verified every blob before it is reported here.

A manifest is committed once all its shards are stored and two members of the generation vouch for the
state: a shard's digest says that its bytes arrived, not that they are the state everybody trains.  One
member's word is enough where nobody else can speak, or nobody does in time; the checkpoint says so.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from coordinator.core.matching import serving
from coordinator.core.model import (
    ENDED,
    AgentId,
    Alone,
    Checkpoint,
    CheckpointAction,
    CheckpointCommanded,
    CheckpointDamaged,
    CheckpointPinned,
    CheckpointRetired,
    CheckpointWanted,
    DamageFound,
    Decision,
    Evaluation,
    EvaluationRecorded,
    Generation,
    Job,
    JobPhase,
    ManifestCommitted,
    MemberDissented,
    NotYet,
    PendingCheckpoint,
    PendingDropped,
    Record,
    Refusal,
    Refused,
    Roster,
    Shard,
    ShardAccepted,
    ShardRecorded,
    ShardReported,
    Standing,
    State,
    StatesDiffered,
    StateWitnessed,
    Why,
    Witness,
)
from coordinator.core.strikes import quarantine

MAX_PENDING = 2
MAX_SHARDS = 65_536
MAX_STEPS_AHEAD = 1_000
"""A shard may be reported before the progress of its step: by so many steps at most."""
WITNESSES = 2
"""So many members have to say the same of the state."""
CLAIMS_OF_ONE = 2
"""An agent's workers may differ among themselves; more than two states in one generation is noise."""
MOST_KEPT = 1_000
"""Checkpoints of one job that one reason keeps: each is some kilobytes of the coordinator's memory."""


class Kept(enum.Enum):
    """Why a checkpoint is kept; shown to operators."""

    LAST = "last"  # among the newest `keep_checkpoints`
    EVERY = "every"  # of a step that is a multiple of `keep_every`
    BEST = "best"  # among the `keep_best` with the lowest evaluation loss
    PINNED = "pinned"
    IN_USE = "in_use"  # a generation is being formed from it
    DAMAGED = "damaged"  # until there is a newer one that is not
    ROLLED_BACK = "rolled_back"  # given up, until training has come so far again


def restorable(checkpoint: Checkpoint) -> bool:
    """Whether training may begin from it: it is not known to be damaged, and no operator went back before it."""
    return not checkpoint.damaged and not checkpoint.given_up


def newest_good(job: Job) -> Checkpoint | None:
    """The newest checkpoint that training may begin from."""
    return next((c for c in reversed(job.checkpoints) if restorable(c)), None)


def report(state: State, job: Job, now_ms: int, event: ShardReported) -> Decision:
    """Accept or refuse a shard (rule 13).  The manifest itself is committed by settle."""
    refusal = _refuse(state, job, event)
    if refusal is not None:
        return Decision(reply=refusal)
    witness = _witness(job, event)
    stored = next((c for c in job.checkpoints if c.step == event.step and restorable(c)), None)
    if stored is not None:
        records = _differ(job, now_ms, stored, event, witness)
        return Decision(records=records, reply=ShardAccepted(committed=True))
    shard = Shard(index=event.index, digest=event.digest, bytes=event.bytes) if event.digest else None
    if shard is None and witness is None:
        message = (
            f"agent {event.agent_id} has no say in what the state of generation {event.generation} is: it was no "
            "member, or its worker of that time is gone"
        )
        return Decision(reply=Refused(refusal=Refusal.NOT_A_MEMBER, message=message))
    found = next((p for p in job.pending if p.step == event.step), None)
    begun: list[Record] = []
    if found is not None and _contradicted(found, event, witness):
        reason = (
            f"generation {event.generation} says that the state is another, and one member alone had vouched"
        )
        begun.append(PendingDropped(at_ms=now_ms, job_id=job.job_id, step=found.step, reason=reason))
        found = None
    if found is None and not _is_json_object(event.header_json):
        message = "header_json: not a JSON object in UTF-8 with finite numbers"
        return Decision(reply=Refused(refusal=Refusal.INVALID, message=message))
    if found is not None:
        clash = _clash(found, shard, event)
        if clash is not None:
            return Decision(records=_differ(job, now_ms, found, event, witness), reply=clash)
        if witness is not None and not _says_more(found, witness):
            witness = None
        if shard is None or shard in found.shards:
            if witness is None:
                return Decision(reply=ShardAccepted(committed=False))
            shard = None
    if found is None and not begun and len(job.pending) >= MAX_PENDING:
        dropped = _to_drop(job)
        ahead = _is_ahead(job, event.step)
        if ahead or (event.step < dropped.step and not _is_ahead(job, dropped.step)):
            steps = " and ".join(str(p.step) for p in job.pending)
            message = (
                f"step: found {event.step}; checkpoints {steps} are being stored, which is as many as may be"
            )
            # Word of the steps before it is on its way: only an older checkpoint is not wanted any more.
            why = Refusal.RATE_LIMITED if ahead else Refusal.INVALID
            return Decision(reply=Refused(refusal=why, message=message))
        begun.append(
            PendingDropped(
                at_ms=now_ms,
                job_id=job.job_id,
                step=dropped.step,
                reason=f"checkpoint {event.step} began before it was complete",
            )
        )
    record: ShardRecorded | StateWitnessed
    if shard is not None:
        record = ShardRecorded(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=event.generation,
            step=event.step,
            count=event.count,
            shard=shard,
            state_digest=event.state_digest,
            header_json=event.header_json,
            witness=witness,
        )
        after = with_shard(found, record)
    else:
        assert witness is not None
        record = _witnessed(now_ms, event, witness)
        after = with_witness(found, record)
    committed = not isinstance(_to_commit(state, job, after, now_ms), NotYet)
    return Decision(records=(*begun, record), reply=ShardAccepted(committed=committed))


def with_shard(found: PendingCheckpoint | None, record: ShardRecorded) -> PendingCheckpoint:
    """The unfinished checkpoint with one shard more; `found` is None if it is the first word of it."""
    if found is None:
        found = _begun(record, record.state_digest)
    shards = tuple(sorted((*found.shards, record.shard), key=lambda shard: shard.index))
    witnesses = found.witnesses if record.witness is None else (*found.witnesses, record.witness)
    whole = len(shards) == found.count
    return replace(
        found, shards=shards, witnesses=witnesses, whole_ms=record.at_ms if whole else found.whole_ms
    )


def with_witness(found: PendingCheckpoint | None, record: StateWitnessed) -> PendingCheckpoint:
    """The unfinished checkpoint with one word more about its state."""
    if found is None:
        found = _begun(record, record.witness.state_digest)
    return replace(found, witnesses=(*found.witnesses, record.witness))


def _begun(record: ShardRecorded | StateWitnessed, state_digest: str) -> PendingCheckpoint:
    return PendingCheckpoint(
        step=record.step,
        generation=record.generation,
        count=record.count,
        state_digest=state_digest,
        header_json=record.header_json,
        shards=(),
    )


def commit(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Commit what is complete."""
    for pending in job.pending:
        alone = _to_commit(state, job, pending, now_ms)
        if not isinstance(alone, NotYet):
            checkpoint = _manifest(job, pending, now_ms, alone)
            return (ManifestCommitted(at_ms=now_ms, job_id=job.job_id, checkpoint=checkpoint),)
    return _overtaken(job, now_ms) or _anew(job, now_ms)


# ------------------------------------------------------------------------------- witnesses


ALONE = {
    Alone.ONLY_MEMBER: "on the word of its only member",
    Alone.MEMBERS_GONE: "on the word of one member: the others are gone",
    Alone.MEMBERS_SILENT: "on the word of one member: no other has spoken in time",
}
"""Why less than two witnesses were enough, for people."""


def agreeing(found: PendingCheckpoint | Checkpoint) -> tuple[AgentId, ...]:
    """Who vouches for the checkpoint's state."""
    return _distinct(w.agent_id for w in found.witnesses if w.state_digest == found.state_digest)


def vouched(state: State, job: Job, pending: PendingCheckpoint, now_ms: int) -> Alone | NotYet | None:
    """Whether the word of its members is enough for the checkpoint, once its shards are there: None if two
    agree; else why one alone is enough, or what is waited for.

    What members say of it in the newest of its generations counts against it: healing ended older disputes."""
    agree = agreeing(pending)
    newest = max((w.generation for w in pending.witnesses), default=pending.generation)
    now = [w for w in pending.witnesses if w.generation == newest]
    against = _distinct(w.agent_id for w in now if w.state_digest != pending.state_digest)
    if against:
        in_favour = _distinct(w.agent_id for w in now if w.state_digest == pending.state_digest)
        if len(in_favour) < WITNESSES or len(in_favour) <= len(against):
            return NotYet(why=Why.STATES_DIFFER, have=len(in_favour), need=len(against) + 1)
    if len(agree) >= WITNESSES:
        return None
    numbers = {pending.generation, *(w.generation for w in pending.witnesses)}
    rosters = [roster(job, number) for number in sorted(numbers)]
    known = [found for found in rosters if found is not None]
    if len(known) == len(rosters):
        if len({agent_id for found in known for agent_id in found.members}) == 1:
            return Alone.ONLY_MEMBER
        others = (a for found in known for a in found.members if a not in found.gone and a not in agree)
        there = [agent_id for agent_id in others if serving(state, job, agent_id)]
        if not there:
            return Alone.MEMBERS_GONE
        left = job.generation
        if left is not None and not left.members and not {*left.leaving, *left.uploading}.intersection(there):
            return Alone.MEMBERS_SILENT  # who is out, and has stored all, has spoken
    # While the coordinator was away nobody could speak.
    until_ms = max(pending.whole_ms, state.started_ms) + state.timing.witness_ms
    if now_ms >= until_ms:
        return Alone.MEMBERS_SILENT
    return NotYet(why=Why.ONE_WITNESS, have=len(agree), need=WITNESSES, until_ms=until_ms)


def witness_awaited(state: State, job: Job, now_ms: int) -> int | None:
    """When the wait for a second witness ends, of the checkpoint where it does first; None if there is none."""
    waits = [_to_commit(state, job, pending, now_ms) for pending in job.pending]
    ends = [wait.until_ms for wait in waits if isinstance(wait, NotYet) and wait.until_ms is not None]
    return min(ends, default=None)


def roster(job: Job, number: int) -> Roster | None:
    """Who was in that generation; None if it is not known any more."""
    generation = job.generation
    if generation is not None and generation.number == number:
        return roster_of(generation)
    return next((found for found in job.rosters if found.number == number), None)


def roster_of(generation: Generation) -> Roster:
    """Who is in it, by its plan."""
    members = tuple(member.agent_id for member in generation.members)
    return Roster(number=generation.number, members=members, gone=generation.gone)


def name_dissenters(state: State, job: Job, now_ms: int) -> tuple[Record, ...]:
    """Hold a state that differed against whoever is in the minority, when generation forms again because of
    it: by then all have spoken who will.

    Once is an accident, which healing repairs.  Whoever does it again is quarantined, longer each time: else
    it could have its peers form again at every checkpoint.  Where as many say the one as the other, it is the
    junior, as with links that are cut: a senior that lies is then alone, and stops nobody."""
    generation = job.generation
    if generation is None or not generation.disputed_step:
        return ()
    step = generation.disputed_step
    known: tuple[PendingCheckpoint | Checkpoint, ...] = (*job.pending, *job.checkpoints)
    found = next((checkpoint for checkpoint in known if checkpoint.step == step), None)
    sides: dict[str, dict[AgentId, None]] = {}
    for said in found.witnesses if found is not None else ():
        if said.generation == generation.number:
            sides.setdefault(said.state_digest, {})[said.agent_id] = None
    if len(sides) < 2:
        return ()
    sizes = sorted((len(side) for side in sides.values()), reverse=True)
    outvoted = sizes[0] > sizes[1]
    rank = {member.agent_id: member.group_rank for member in generation.members}
    right = min(sides, key=lambda digest: (-len(sides[digest]), min(rank[a] for a in sides[digest])))
    records: list[Record] = []
    for agent_id in _distinct(a for digest, side in sides.items() if digest != right for a in side):
        agent = state.agents[agent_id]
        peers = tuple(sides[right])
        record = MemberDissented(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=agent_id,
            step=step,
            peers=tuple(a for a in peers if a != agent_id) or peers,
            outvoted=outvoted,
            dissents=agent.dissents + 1,
        )
        records.append(record)
        if record.dissents > 1 and agent.standing is Standing.ELIGIBLE:
            detail, before = dissent(record), record.dissents - 2
            records.append(quarantine(state, now_ms, agent, why=Why.DIVERGED, detail=detail, before=before))
    return tuple(records)


def dissent(record: MemberDissented) -> str:
    """What is held against the agent, for people."""
    peers = ", ".join(record.peers)
    if record.outvoted:
        return f"after step {record.step} its state was not that of {peers}, who are more"
    return (
        f"after step {record.step} its state was not that of {peers}; nobody else says which is right, and "
        f"{record.agent_id} is the junior"
    )


def _to_commit(state: State, job: Job, pending: PendingCheckpoint, now_ms: int) -> Alone | NotYet | None:
    """As `vouched`; and what is waited for before that."""
    if len(pending.shards) < pending.count or pending.step > job.committed_step:
        return NotYet(why=Why.CHECKPOINTING, have=len(pending.shards), need=pending.count)
    return vouched(state, job, pending, now_ms)


def _witness(job: Job, event: ShardReported) -> Witness | None:
    """The agent's word, if it counts: who was in the generation that took the snapshot, by its plan, and still
    is that process, had the state."""
    found = roster(job, event.generation)
    if found is None or event.agent_id not in found.members or event.agent_id in found.gone:
        return None
    if not event.state_digest:
        return None
    return Witness(agent_id=event.agent_id, generation=event.generation, state_digest=event.state_digest)


def _witnessed(now_ms: int, event: ShardReported, witness: Witness) -> StateWitnessed:
    return StateWitnessed(
        at_ms=now_ms,
        job_id=event.job_id,
        generation=event.generation,
        step=event.step,
        count=event.count,
        header_json=event.header_json,
        witness=witness,
    )


def _says_more(found: PendingCheckpoint, witness: Witness) -> bool:
    """Whether the word is to be kept: two that agree are enough, unless somebody has said otherwise."""
    disputed = any(w.state_digest != found.state_digest for w in found.witnesses)
    agree = agreeing(found)
    known = witness in found.witnesses if disputed else witness.agent_id in agree
    return not known and (disputed or len(agree) < WITNESSES)


def _contradicted(found: PendingCheckpoint, event: ShardReported, witness: Witness | None) -> bool:
    """Whether a later generation, whose members have compared their states, knows better than the one member
    that has spoken."""
    newest = max((w.generation for w in found.witnesses), default=found.generation)
    return (
        witness is not None
        and event.state_digest != found.state_digest
        and event.generation > newest
        and len(agreeing(found)) < WITNESSES
    )


def _distinct(agents: Iterable[AgentId]) -> tuple[AgentId, ...]:
    return tuple(dict.fromkeys(agents))


def _overtaken(job: Job, now_ms: int) -> tuple[Record, ...]:
    """Give up what an earlier generation left incomplete, once a later generation's checkpoint is whole: so
    that its shards do not lie there for ever."""
    newest = newest_good(job)
    if newest is None:
        return ()
    return tuple(
        PendingDropped(
            at_ms=now_ms,
            job_id=job.job_id,
            step=pending.step,
            reason=f"{len(pending.shards)} of its {pending.count} shards came; checkpoint {newest.step}, which a "
            "later generation took, is whole",
        )
        for pending in job.pending
        if pending.step < newest.step and pending.generation < newest.generation
    )


def end(job: Job, now_ms: int) -> tuple[Record, ...]:
    """Give up what an ended job left incomplete: nobody serves it any more, so nobody's shard will be taken."""
    if job.phase not in ENDED:
        return ()
    reason = f"the job is {job.phase.value}"
    return tuple(
        PendingDropped(at_ms=now_ms, job_id=job.job_id, step=pending.step, reason=reason)
        for pending in job.pending
    )


def _anew(job: Job, now_ms: int) -> tuple[Record, ...]:
    """Have a checkpoint taken at once where one was probably lost, instead of at the next turn.

    Each rank holds its own shards of a snapshot only, and the state has changed since: what a rank that is gone
    has not stored, nobody can.  Where the state is still that of the snapshot, the ranks that are left begin it
    again by themselves (`ElasticGroup`), and there is nothing to ask for."""
    generation = job.generation
    if (
        job.phase is not JobPhase.RUNNING
        or generation is None
        or generation.formed_ms is None
        or generation.checkpoint_asked
        or generation.why is Why.MEMBER_JOINED
    ):
        return ()
    lost = [p for p in job.pending if p.generation < generation.number and p.step < generation.formed_step]
    if not lost:
        return ()
    reason = f"a member left while checkpoint {lost[-1].step} was being stored"
    return (CheckpointWanted(at_ms=now_ms, job_id=job.job_id, generation=generation.number, reason=reason),)


def damage(job: Job, now_ms: int, event: DamageFound) -> Decision:
    """What was found so is never restored: by nobody, and without two having to fail with it first."""
    found = next((c for c in job.checkpoints if c.step == event.step), None)
    if found is None or found.damaged or found.manifest_digest != event.manifest_digest:
        return Decision()
    record = CheckpointDamaged(at_ms=now_ms, job_id=job.job_id, step=found.step, detail=event.detail)
    return Decision(records=(record,))


# ------------------------------------------------------------------------------- retention


def kept(job: Job) -> dict[int, tuple[Kept, ...]]:
    """Why each of the job's checkpoints is kept, by step; without a reason it is to go.

    What cannot be restored does not count as one of the newest or best, so that the only one that can
    is always among the newest."""
    good = [c for c in job.checkpoints if restorable(c)]
    newest = good[-1].step if good else 0
    generation = job.generation
    forming = generation if generation is not None and generation.formed_ms is None else None
    by_loss = sorted(
        (c.evaluation_loss, -c.step) for c in good if c.evaluation_loss is not None
    )  # of equals the newest
    every = [c.step for c in good if job.spec.keep_every and c.step % job.spec.keep_every == 0]
    steps: dict[Kept, set[int]] = {
        Kept.LAST: {c.step for c in good[-max(1, job.spec.keep_checkpoints) :]},
        Kept.EVERY: set(every[-MOST_KEPT:]),
        Kept.BEST: {-step for _, step in by_loss[: job.spec.keep_best]},
        Kept.PINNED: {c.step for c in job.checkpoints if c.pinned_by},
        Kept.IN_USE: {forming.from_checkpoint_step or 0} if forming is not None else set(),
        Kept.DAMAGED: {c.step for c in job.checkpoints if c.damaged and c.step > newest},
        Kept.ROLLED_BACK: {c.step for c in job.checkpoints if c.given_up and c.step > newest},
    }
    return {c.step: tuple(why for why in Kept if c.step in steps[why]) for c in job.checkpoints}


def retire(job: Job, now_ms: int) -> tuple[Record, ...]:
    """Let go of what nothing keeps."""
    if len(job.checkpoints) <= job.spec.keep_checkpoints and all(restorable(c) for c in job.checkpoints):
        return ()
    return tuple(
        CheckpointRetired(at_ms=now_ms, job_id=job.job_id, step=step)
        for step, reasons in kept(job).items()
        if not reasons
    )


_GIVEN_UP = "the job was taken back before it, and makes its steps anew"


def _at(job: Job, step: int) -> Checkpoint | Refused:
    found = next((c for c in job.checkpoints if c.step == step), None)
    if found is not None:
        return found
    have = ", ".join(str(c.step) for c in job.checkpoints) or "none"
    message = f"step: job {job.spec.name} has no checkpoint at step {step}; it has: {have}"
    return Refused(refusal=Refusal.UNKNOWN_CHECKPOINT, message=message)


def may_go_back(job: Job, step: int) -> Refused | None:
    """Why the job cannot be taken back to its checkpoint of `step`; None if it can."""
    found = _at(job, step)
    if isinstance(found, Refused):
        return found
    if not restorable(found):
        why = f"it is damaged ({found.damaged})" if found.damaged else _GIVEN_UP
        return Refused(refusal=Refusal.INVALID, message=f"checkpoint {step} cannot be restored: {why}")
    pinned = [str(c.step) for c in job.checkpoints if c.step > step and c.pinned_by]
    if pinned:
        # Training would store other ones of the same steps in their place.
        return Refused(
            refusal=Refusal.CHECKPOINT_NEEDED,
            message=f"checkpoint {', '.join(pinned)} of job {job.spec.name} is pinned, and newer than {step}: its "
            "steps would be made anew; export what you need of it, then unpin it",
        )
    return None


def command(job: Job, now_ms: int, event: CheckpointCommanded) -> Decision:
    """What an operator wants of one checkpoint."""
    found = _at(job, event.step)
    if isinstance(found, Refused):
        return Decision(reply=found)
    match event.action:
        case CheckpointAction.PIN | CheckpointAction.UNPIN:
            pin = event.action is CheckpointAction.PIN
            if pin == bool(found.pinned_by):
                return Decision()
            if pin and found.given_up:
                message = f"checkpoint {found.step}: {_GIVEN_UP}; export it to keep it"
                return Decision(reply=Refused(refusal=Refusal.INVALID, message=message))
            if pin and sum(1 for c in job.checkpoints if c.pinned_by) >= MOST_KEPT:
                message = (
                    f"job {job.spec.name} has {MOST_KEPT:,} pinned checkpoints, which is as many as may be"
                )
                return Decision(reply=Refused(refusal=Refusal.TOO_LARGE, message=message))
            record = CheckpointPinned(
                at_ms=now_ms, job_id=job.job_id, step=found.step, pinned=pin, by=event.by
            )
            return Decision(records=(record,))
        case CheckpointAction.DELETE:
            needed = _needed(job, found)
            if needed:
                message = f"checkpoint {found.step} of job {job.spec.name} {needed}"
                return Decision(reply=Refused(refusal=Refusal.CHECKPOINT_NEEDED, message=message))
            deleted = CheckpointRetired(at_ms=now_ms, job_id=job.job_id, step=found.step, by=event.by)
            return Decision(records=(deleted,))
        case _:
            assert_never(event.action)


def _needed(job: Job, found: Checkpoint) -> str:
    """Why the checkpoint may not be deleted; empty if it may."""
    if found.pinned_by:
        return f"was pinned by {found.pinned_by}; unpin it first"
    if Kept.IN_USE in kept(job)[found.step]:
        return "is what a generation is being formed from; wait until it trains"
    if not restorable(found):
        return ""
    others = [c for c in job.checkpoints if restorable(c) and c is not found]
    if not others:
        return "is the only one that can be restored; it is never deleted"
    if job.phase not in ENDED and found is newest_good(job):
        return f"is what the job would be restored from; take another one, or go back to {others[-1].step}, first"
    return ""


def evaluations(
    job: Job, now_ms: int, found: tuple[Evaluation, ...], committed_step: int
) -> tuple[Record, ...]:
    """Keep what is new about committed steps.  What was said first of a step counts."""
    known = {e.step for e in job.evaluations}
    known |= {c.step for c in job.checkpoints if c.evaluation_loss is not None and not c.given_up}
    oldest = job.evaluations[0].step if job.evaluations else 0
    new = {e.step: e for e in reversed(found) if oldest <= e.step <= committed_step and e.step not in known}
    return tuple(
        EvaluationRecorded(at_ms=now_ms, job_id=job.job_id, evaluation=new[step]) for step in sorted(new)
    )


# ------------------------------------------------------------------------------- reports


def _refuse(state: State, job: Job, event: ShardReported) -> Refused | None:
    agent = state.agents[event.agent_id]
    if agent.job_id != job.job_id:
        return Refused(
            refusal=Refusal.NOT_A_MEMBER,
            message=f"agent {agent.agent_id} does not serve job {job.job_id}; its shards are not wanted",
        )
    newest = job.generation_count
    took = roster(job, event.generation)
    if event.generation < max(1, job.lineage):
        return Refused(
            refusal=Refusal.STALE_GENERATION,
            message=f"generation {event.generation} is older than {job.lineage}, which began from another state",
        )
    if event.generation > newest:
        return Refused(
            refusal=Refusal.INVALID,
            message=f"generation: found {event.generation}; the newest is {newest}",
        )
    if took is not None and agent.agent_id not in took.members:
        return Refused(
            refusal=Refusal.NOT_A_MEMBER,
            message=f"agent {agent.agent_id} was not a member of generation {event.generation}; its shards are "
            "not wanted",
        )
    if not 1 <= event.count <= MAX_SHARDS:
        message = f"count: found {event.count}; allowed are 1 to {MAX_SHARDS}"
        return Refused(refusal=Refusal.INVALID, message=message)
    if not 0 <= event.index < event.count:
        message = f"index: found {event.index}; allowed are 0 to {event.count - 1}"
        return Refused(refusal=Refusal.INVALID, message=message)
    if not 1 <= event.step <= job.committed_step + MAX_STEPS_AHEAD:
        message = (
            f"step: found {event.step}; allowed are 1 to {job.committed_step + MAX_STEPS_AHEAD}, "
            f"for step {job.committed_step} is the newest committed"
        )
        return Refused(refusal=Refusal.INVALID, message=message)
    return None


def _clash(found: PendingCheckpoint, shard: Shard | None, event: ShardReported) -> Refused | None:
    if event.generation < found.generation:
        return Refused(
            refusal=Refusal.STALE_GENERATION,
            message=f"checkpoint {found.step} was begun by generation {found.generation}; "
            f"found {event.generation}",
        )
    for name, expected, got in (
        ("count", found.count, event.count),
        ("state_digest", found.state_digest, event.state_digest),
        ("header_json", found.header_json, event.header_json),
    ):
        if expected != got:
            return Refused(
                refusal=Refusal.INVALID,
                message=f"{name}: the first report of checkpoint {found.step} said {expected}; found {got}",
            )
    for other in found.shards:
        if shard is not None and other.index == shard.index and other != shard:
            return Refused(
                refusal=Refusal.INVALID,
                message=f"shard {shard.index} of checkpoint {found.step} is already stored as {other.digest}",
            )
    return None


def _differ(
    job: Job,
    now_ms: int,
    found: PendingCheckpoint | Checkpoint,
    event: ShardReported,
    witness: Witness | None,
) -> tuple[Record, ...]:
    """Two members of one generation say different things about their common state: until somebody is
    healed no checkpoint comes about, and nobody is found out before the next formation.  Nothing where the
    report says the same as the checkpoint `found`."""
    said = found.witnesses
    if event.state_digest == found.state_digest or witness is None or witness in said:
        return ()
    mine = [w for w in said if w.agent_id == witness.agent_id and w.generation == witness.generation]
    if len(mine) >= CLAIMS_OF_ONE:
        return ()
    records: list[Record] = [_witnessed(now_ms, event, witness)]
    generation = job.generation
    peers = _distinct(
        w.agent_id
        for w in said
        if w.generation == witness.generation and w.state_digest != witness.state_digest
    )
    if (
        peers
        and generation is not None
        and generation.number == witness.generation
        and generation.formed_ms is not None
        and generation.collective_failed_ms is None
    ):
        records.append(
            StatesDiffered(
                at_ms=now_ms,
                job_id=job.job_id,
                generation=generation.number,
                agent_id=event.agent_id,
                step=event.step,
                peers=peers,
            )
        )
    return tuple(records)


def _is_json_object(text: str) -> bool:
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict)


def _to_drop(job: Job) -> PendingCheckpoint:
    """The oldest if a newer checkpoint is whole; else the one that nobody has committed steps for, else the oldest.

    What is only a moment ahead may be the job's last, whose shards nobody reports again."""
    newest, oldest = newest_good(job), job.pending[0]
    if newest is not None and oldest.step < newest.step:
        return oldest
    ahead = [p for p in job.pending if _is_ahead(job, p.step)]
    return ahead[-1] if ahead else oldest


def _is_ahead(job: Job, step: int) -> bool:
    return step > job.committed_step + 1


def _manifest(job: Job, pending: PendingCheckpoint, now_ms: int, alone: Alone | None) -> Checkpoint:
    text = json.dumps(
        {
            "format": "muster-checkpoint-1",
            "job": job.job_id,
            "step": pending.step,
            "generation": pending.generation,
            "state_digest": pending.state_digest,
            "header": json.loads(pending.header_json),
            "shards": [{"index": s.index, "digest": s.digest, "bytes": s.bytes} for s in pending.shards],
        },
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    return Checkpoint(
        step=pending.step,
        generation=pending.generation,
        manifest_json=text,
        manifest_digest=hashlib.sha256(text.encode()).hexdigest(),
        state_digest=pending.state_digest,
        bytes=sum(shard.bytes for shard in pending.shards),
        committed_ms=now_ms,
        witnesses=pending.witnesses,
        alone=alone,
    )
