"""What people and scripts see: jobs, agents, tokens and checkpoints as JSON objects.

Keys are only ever added to; docs/cli.md has the list.  Times are Unix milliseconds (`…_unix_ms`) by the
coordinator's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.caches import Cache
from coordinator.core import checkpoints
from coordinator.core.forming import why
from coordinator.core.matching import obstacles
from coordinator.core.model import (
    ENDED,
    Agent,
    AgentId,
    Checkpoint,
    Generation,
    Job,
    NotYet,
    PendingCheckpoint,
    Rollback,
    Standing,
    State,
    Token,
    Why,
)
from coordinator.journal import StepRow
from coordinator.sweep import Unreferenced

View = dict[str, Any]


def dump(view: View) -> str:
    return json.dumps(view, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def job(
    state: State,
    one: Job,
    latest: Mapping[str, StepRow],
    fetching: Mapping[AgentId, tuple[int, int]] | None = None,
) -> View:
    """One job; `fetching` says of its agents how many bytes they have of how many that they need."""
    spec = one.spec
    newest = checkpoints.newest_good(one)
    members = () if one.generation is None else one.generation.members
    step = latest.get(one.job_id)
    serving = [state.agents[member.agent_id] for member in members if member.agent_id in state.agents]
    member_ids = {member.agent_id for member in members}
    return {
        "id": one.job_id,
        "name": spec.name,
        "phase": one.phase.value,
        "why": one.phase_why.value,
        "detail": one.phase_detail,
        "phase_since_unix_ms": one.phase_since_ms,
        "submitted_unix_ms": one.submitted_ms,
        "waiting": None if one.phase in ENDED else _waiting(why(state, one.job_id)),
        "launch": spec.launch,
        "priority": spec.priority,
        "min_nodes": spec.min_nodes,
        "max_nodes": spec.max_nodes,
        "generation": None if one.generation is None else _generation(state, one.generation),
        "fetching": [
            {**_who(state, agent_id), **_fetching(fetched)}
            for agent_id, fetched in (fetching or {}).items()
            if fetched[1]
        ],
        "assigned": [_who(state, agent_id) for agent_id in one.assigned],
        "standbys": [_who(state, agent_id) for agent_id in one.assigned if agent_id not in member_ids],
        "committed_step": one.committed_step,
        "steps_total": _steps_total(spec.spec_json),
        "loss": None if step is None else step.loss,
        "step_seconds": None if step is None else step.duration_s,
        "tokens_per_s": round(sum(agent.tokens_per_s for agent in serving), 1),
        "total_tokens": one.total_tokens,
        "failures": one.failures,
        "max_failures": spec.max_failures,
        "last_failure": one.last_failure,
        "checkpoints": len(one.checkpoints),
        "newest_checkpoint_step": None if newest is None else newest.step,
        "rollback": None if one.rollback is None else _rollback(one.rollback),
        "pending_checkpoints": [_pending(state, one, pending) for pending in one.pending],
        "dataset": json.loads(spec.dataset_json).get("name") if spec.dataset_json else None,
        "tokenizer": json.loads(spec.dataset_json).get("tokenizer") if spec.dataset_json else None,
    }


def _steps_total(spec_json: str) -> int | None:
    train = json.loads(spec_json).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _who(state: State, agent_id: str) -> View:
    found = state.agents.get(agent_id)  # type: ignore[call-overload]
    ready = found is not None and found.readiness is not None
    return {"agent": agent_id, "name": agent_id if found is None else found.name, "ready": ready}


def _generation(state: State, generation: Generation) -> View:
    formed, finished = frozenset(generation.formed), frozenset(generation.finished)
    return {
        "number": generation.number,
        "world_size": generation.world_size,
        "reason": generation.why.value,
        "cut": generation.cut.value,
        "since_unix_ms": generation.planned_ms,
        "formed_unix_ms": generation.formed_ms,
        "from_checkpoint_step": generation.from_checkpoint_step,
        "members": [
            {
                "agent": member.agent_id,
                "name": _who(state, member.agent_id)["name"],
                "group_rank": member.group_rank,
                "first_rank": member.first_rank,
                "worker_count": member.worker_count,
                "host": member.host,
                "upload_weight": member.upload_weight,
                "formed": member.agent_id in formed,
                "finished": member.agent_id in finished,
            }
            for member in generation.members
        ],
    }


def _rollback(rollback: Rollback) -> View:
    return {
        "from_step": rollback.from_step,
        "to_step": rollback.to_step,
        "by": rollback.by,
        "at_unix_ms": rollback.at_ms,
    }


def _pending(state: State, one: Job, pending: PendingCheckpoint) -> View:
    waits = checkpoints.vouched(state, one, pending, 0)  # whatever time alone allows is committed by now
    whole = len(pending.shards) == pending.count
    return {
        "step": pending.step,
        "shards": len(pending.shards),
        "of": pending.count,
        "witnesses": len(checkpoints.agreeing(pending)),
        "waiting": _waiting(waits) if whole and isinstance(waits, NotYet) else None,
    }


def _waiting(not_yet: NotYet) -> View | None:
    if not_yet.why is Why.NOTHING_TO_DO:
        return None
    return {
        "why": not_yet.why.value,
        "have": not_yet.have,
        "need": not_yet.need,
        "until_unix_ms": not_yet.until_ms,
        "text": waiting_text(not_yet),
    }


def waiting_text(not_yet: NotYet) -> str:
    """One line for people: what a job waits for."""
    have, need = not_yet.have, not_yet.need
    match not_yet.why:
        case Why.NO_AGENT:
            return (
                "no agent serves the job: none is free that meets its requirements (see `muster agent list`)"
            )
        case Why.BELOW_MIN:
            return f"{have} of the {need} agents that it needs at least are there"
        case Why.PREPARING:
            return f"{have} of {need} agents are ready; the others prepare"
        case Why.LAST_CALL:
            return f"{have} of {need} agents are ready; it waits a little for more"
        case Why.MIN_GENERATION:
            return "an agent is ready to join; the generation is too young to be cut"
        case Why.FORMING:
            return f"{have} of {need} members have formed the generation"
        case Why.UNREACHABLE:
            return "a member that is needed has no open session; it is expected back"
        case Why.RELEASING:
            return f"{have} of {need} agents have left the last generation"
        case Why.CHECKPOINTING:
            return "the last checkpoint is still being stored"
        case Why.ONE_WITNESS:
            return f"{have} of {need} members have said what its state is"
        case Why.STATES_DIFFER:
            return "members say that their states differ; the generation forms again"
        case other:
            return str(other.value).replace("_", " ")


def _fetching(fetched: tuple[int, int]) -> View:
    return {"bytes": fetched[0], "of_bytes": fetched[1]}


def agent(state: State, one: Agent, now_ms: int, cache: Cache | None = None) -> View:
    """One agent, and what it says of its cache in the session that is open."""
    facts = one.facts
    serving = None if one.job_id is None else state.jobs.get(one.job_id)
    live = [each for each in state.jobs.values() if each.phase not in ENDED]
    return {
        "id": one.agent_id,
        "name": one.name,
        "presence": one.presence.value,
        "presence_since_unix_ms": one.presence_since_ms,
        "connected": one.session_id is not None,
        "standing": one.standing.value,
        "standing_why": None if one.standing_why is None else one.standing_why.value,
        "standing_detail": one.standing_detail,
        "quarantined_until_unix_ms": one.quarantined_until_ms
        if one.standing is Standing.QUARANTINED
        else None,
        "draining": one.draining,
        "drain_reason": one.drain_reason,
        "job": one.job_id,
        "job_name": None if serving is None else serving.spec.name,
        "member": serving is not None
        and serving.generation is not None
        and one.agent_id in {member.agent_id for member in serving.generation.members},
        "ready": one.readiness is not None,
        "admitted_unix_ms": one.admitted_ms,
        "step": one.step,
        "activity": one.activity,
        "tokens_per_s": round(one.tokens_per_s, 1),
        "disk_free_bytes": one.disk_free_bytes or facts.disk_free_bytes,
        "lease_left_ms": max(0, one.lease_until_ms - now_ms),
        "strikes": one.strikes,
        "fetching": _fetching(cache.fetched) if cache is not None and cache.fetched[1] else None,
        "cached_blobs": 0 if cache is None else len(cache.blobs),
        "lends_cache": cache is not None and cache.port > 0,
        "served_wrong_bytes_to": list(one.accusers),
        "torchrun_job": one.torchrun_job or None,
        "unmet": {each.spec.name: found for each in live if (found := list(obstacles(each, one)))},
        "kept_from": [{"job": job_id, "until_unix_ms": until_ms} for job_id, until_ms in one.kept_from],
        "facts": {
            "gpus": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "memory_bytes": gpu.memory_bytes,
                    "capability": f"{gpu.capability[0]}.{gpu.capability[1]}",
                }
                for gpu in facts.gpus
            ],
            "driver_version": facts.driver_version,
            "torch_version": facts.torch_version,
            "backends": list(facts.backends),
            "cpu_count": facts.cpu_count,
            "memory_bytes": facts.memory_bytes,
            "hostname": facts.hostname,
            "advertise_host": facts.advertise_host,
            "muster_version": facts.muster_version,
            "labels": dict(facts.labels),
            "worker_count": facts.worker_count,
        },
    }


def token(one: Token, now_ms: int) -> View:
    """One join token; its secret is known to nobody here."""
    if one.revoked:
        standing = "revoked"
    elif one.expires_ms <= now_ms:
        standing = "expired"
    else:
        standing = "usable" if one.uses_left > 0 else "exhausted"
    return {
        "id": one.token_id,
        "note": one.note,
        "standing": standing,
        "uses_left": one.uses_left,
        "created_unix_ms": one.created_ms,
        "expires_unix_ms": one.expires_ms,
    }


MOST_GARBAGE_SHOWN = 1_000


def garbage(found: Sequence[Unreferenced], *, dry_run: bool) -> View:
    """What a sweep took, or would take, and what is still too young for it."""
    old = [one for one in found if one.old]
    young = [one for one in found if not one.old]
    return {
        "dry_run": dry_run,
        "blobs": len(old),
        "bytes": sum(one.bytes for one in old),
        "young_blobs": len(young),
        "young_bytes": sum(one.bytes for one in young),
        "found": [
            {
                "digest": one.digest,
                "bytes": one.bytes,
                "age_s": round(one.age_s, 1),
                "grace_s": one.grace_s,
                "goes": one.old,
            }
            for one in (*old, *young)[:MOST_GARBAGE_SHOWN]
        ],
    }


def checkpoint_list(one: Job) -> list[View]:
    """A job's committed checkpoints, by step."""
    reasons = checkpoints.kept(one)
    return [_checkpoint(one, found, reasons[found.step]) for found in one.checkpoints]


def checkpoint(one: Job, found: Checkpoint) -> View:
    """One committed checkpoint."""
    return _checkpoint(one, found, checkpoints.kept(one).get(found.step, ()))


def _checkpoint(one: Job, found: Checkpoint, reasons: Sequence[checkpoints.Kept]) -> View:
    return {
        "job": one.job_id,
        "job_name": one.spec.name,
        "step": found.step,
        "generation": found.generation,
        "bytes": found.bytes,
        "shards": len(json.loads(found.manifest_json)["shards"]),
        "manifest_digest": found.manifest_digest,
        "state_digest": found.state_digest,
        "committed_unix_ms": found.committed_ms,
        "damaged": found.damaged or None,
        "kept": [reason.value for reason in reasons],
        "evaluation_loss": found.evaluation_loss,
        "pinned_by": found.pinned_by or None,
        "witnesses": len(checkpoints.agreeing(found)) if found.witnesses or found.alone else None,
        "alone": None if found.alone is None else found.alone.value,
    }
