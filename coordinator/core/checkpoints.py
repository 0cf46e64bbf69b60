"""Checkpoints: which shard reports are accepted, when a manifest is committed, and what is kept, why.

Knows digests and counts, not bytes: the shell has verified every blob before it is reported here.
"""

from __future__ import annotations

import enum
import hashlib
import json
from typing import assert_never

from coordinator.core.model import (
    ENDED,
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
    Job,
    JobPhase,
    ManifestCommitted,
    PendingCheckpoint,
    PendingDropped,
    Record,
    Refusal,
    Refused,
    Shard,
    ShardAccepted,
    ShardRecorded,
    ShardReported,
    State,
    StatesDiffered,
    Why,
)

MAX_PENDING = 2
MAX_SHARDS = 65_536
MAX_STEPS_AHEAD = 1_000
"""A shard may be reported before the progress of its step: by so many steps at most."""
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
    if any(c.step == event.step and restorable(c) for c in job.checkpoints):
        return Decision(reply=ShardAccepted(committed=True))
    shard = Shard(index=event.index, digest=event.digest, bytes=event.bytes)
    found = next((p for p in job.pending if p.step == event.step), None)
    if found is None and not _is_json_object(event.header_json):
        message = "header_json: not a JSON object in UTF-8 with finite numbers"
        return Decision(reply=Refused(refusal=Refusal.INVALID, message=message))
    if found is not None:
        clash = _clash(found, shard, event)
        if clash is not None:
            return Decision(records=_differ(job, now_ms, found, event), reply=clash)
        if shard in found.shards:
            return Decision(reply=ShardAccepted(committed=False))
    records: list[Record] = []
    if found is None and len(job.pending) >= MAX_PENDING:
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
        records.append(
            PendingDropped(
                at_ms=now_ms,
                job_id=job.job_id,
                step=dropped.step,
                reason=f"checkpoint {event.step} began before it was complete",
            )
        )
    records.append(
        ShardRecorded(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=event.generation,
            step=event.step,
            count=event.count,
            shard=shard,
            state_digest=event.state_digest,
            header_json=event.header_json,
        )
    )
    stored = len(found.shards) + 1 if found is not None else 1
    committed = stored == event.count and event.step <= job.committed_step
    return Decision(records=tuple(records), reply=ShardAccepted(committed=committed))


def commit(job: Job, now_ms: int) -> tuple[Record, ...]:
    """Commit what is complete."""
    for pending in job.pending:
        if len(pending.shards) == pending.count and pending.step <= job.committed_step:
            checkpoint = _manifest(job, pending, now_ms)
            return (ManifestCommitted(at_ms=now_ms, job_id=job.job_id, checkpoint=checkpoint),)
    return _overtaken(job, now_ms) or _anew(job, now_ms)


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


def _clash(found: PendingCheckpoint, shard: Shard, event: ShardReported) -> Refused | None:
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
        if other.index == shard.index and other != shard:
            return Refused(
                refusal=Refusal.INVALID,
                message=f"shard {shard.index} of checkpoint {found.step} is already stored as {other.digest}",
            )
    return None


def _differ(job: Job, now_ms: int, found: PendingCheckpoint, event: ShardReported) -> tuple[Record, ...]:
    """Two members of one generation say different things about their common state: until somebody is
    healed no checkpoint comes about, and nobody is found out before the next formation."""
    generation = job.generation
    if event.state_digest == found.state_digest or generation is None or generation.formed_ms is None:
        return ()
    if not event.generation == found.generation == generation.number:
        return ()
    members = {m.agent_id for m in generation.members}.difference(generation.gone)
    if event.agent_id not in members or generation.collective_failed_ms is not None:
        return ()
    return (
        StatesDiffered(
            at_ms=now_ms,
            job_id=job.job_id,
            generation=generation.number,
            agent_id=event.agent_id,
            step=event.step,
        ),
    )


def _is_json_object(text: str) -> bool:
    try:
        parsed = json.loads(text)
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict)


def _to_drop(job: Job) -> PendingCheckpoint:
    """The one that nobody has committed steps for, else the oldest."""
    ahead = [p for p in job.pending if _is_ahead(job, p.step)]
    return ahead[-1] if ahead else job.pending[0]


def _is_ahead(job: Job, step: int) -> bool:
    return step > job.committed_step + 1


def _manifest(job: Job, pending: PendingCheckpoint, now_ms: int) -> Checkpoint:
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
    )
