"""Checkpoints: which shard reports are accepted, when a manifest is committed, and what is kept.

Knows digests and counts, not bytes: the shell has verified every blob before it is reported here.
"""

from __future__ import annotations

import hashlib
import json

from coordinator.core.model import (
    Checkpoint,
    CheckpointRetired,
    Decision,
    Job,
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
)

MAX_PENDING = 2
MAX_SHARDS = 65_536
MAX_STEPS_AHEAD = 1_000
"""A shard may be reported before the progress of its step: by so many steps at most."""


def newest_good(job: Job) -> Checkpoint | None:
    """The newest checkpoint that is not known to be damaged."""
    return next((c for c in reversed(job.checkpoints) if not c.damaged), None)


def report(state: State, job: Job, now_ms: int, event: ShardReported) -> Decision:
    """Accept or refuse a shard (rule 13).  The manifest itself is committed by settle."""
    refusal = _refuse(state, job, event)
    if refusal is not None:
        return Decision(reply=refusal)
    if any(c.step == event.step and not c.damaged for c in job.checkpoints):
        return Decision(reply=ShardAccepted(committed=True))
    shard = Shard(index=event.index, digest=event.digest, bytes=event.bytes)
    found = next((p for p in job.pending if p.step == event.step), None)
    if found is None and not _is_json_object(event.header_json):
        message = "header_json: not a JSON object in UTF-8 with finite numbers"
        return Decision(reply=Refused(refusal=Refusal.INVALID, message=message))
    if found is not None:
        clash = _clash(found, shard, event)
        if clash is not None:
            return Decision(reply=clash)
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
    """Commit what is complete, and retire what is no longer kept."""
    for pending in job.pending:
        if len(pending.shards) == pending.count and pending.step <= job.committed_step:
            checkpoint = _manifest(job, pending, now_ms)
            retired = _retired(job, checkpoint)
            return (
                ManifestCommitted(at_ms=now_ms, job_id=job.job_id, checkpoint=checkpoint),
                *(CheckpointRetired(at_ms=now_ms, job_id=job.job_id, step=step) for step in retired),
            )
    return ()


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


def _retired(job: Job, new: Checkpoint) -> tuple[int, ...]:
    """Steps of the checkpoints that `new` makes superfluous: all but the newest `keep_checkpoints` good
    ones, never the only one, and never the one that a generation is being formed from."""
    good = sorted({c.step for c in job.checkpoints if not c.damaged} | {new.step})
    kept = set(good[-max(1, job.spec.keep_checkpoints) :])
    generation = job.generation
    if generation is not None and generation.formed_ms is None:
        kept.add(generation.from_checkpoint_step or new.step)
    return tuple(c.step for c in job.checkpoints if c.step not in kept and c.step != new.step)
