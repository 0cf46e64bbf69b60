"""The border between wire messages and the core's values: everything from outside is bounded here.

A message that breaks a bound is Malformed, with the field, what was found and what is allowed.
Nothing past this module needs to ask whether a string is too long or a number not finite.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any, assert_never

from coordinator.blobs import DIGEST
from coordinator.core.model import (
    AgentAction,
    AgentFacts,
    AgentId,
    CheckpointAction,
    Cut,
    Evaluation,
    EvaluationsReceived,
    Event,
    FailureKind,
    FinishedReceived,
    FormedReceived,
    Generation,
    GoodbyeReceived,
    GpuFacts,
    HeartbeatReceived,
    JobAction,
    JobId,
    LeaveAsked,
    ProgressReceived,
    Push,
    PushAssignment,
    PushDrain,
    PushGoAway,
    PushIdle,
    PushPlan,
    PushTakeCheckpoint,
    PushUnassign,
    Readiness,
    ReadyReceived,
    Refusal,
    ReleasedReceived,
    SessionId,
    SessionOpened,
    ShardReported,
    State,
    Timing,
    TokenId,
    WorkerFailedReceived,
    WrongBytesReported,
)
from coordinator.journal import EvaluationRow, StepRow
from coordinator.logs import NewLine
from protos import admin_pb2, agent_pb2
from protos.authorship import MOST_BYTES as MOST_AUTHORSHIP_BYTES
from protos.wire import CHUNK_BYTES

MOST = 2**53 - 1  # the largest whole number that JSON readers agree on
MAX_STEPS = 1_000
MAX_EVALUATIONS = 100
MAX_LOG_LINES = 200
MAX_LOG_CHARS = 4_096
MAX_DIGESTS = 10_000
MAX_CACHED = 4_096
MAX_WANTED = 64
MAX_SHARDS = 16_384  # a manifest must fit into one message, with room
MAX_HEADER_BYTES = 512 * 1024
MAX_DATASET_BYTES = 2 * 1024 * 1024
MAX_SPEC_BYTES = 512 * 1024

_NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_TOKEN_ID = re.compile(r"^[a-z0-9]{8}$")
_SECRET = re.compile(r"^[A-Za-z0-9_-]{32,64}$")
_STATE_DIGEST = re.compile(r"^[0-9a-f]{0,128}$")


class MalformedError(ValueError):
    """A message breaks the contract; the message names the field."""


# ------------------------------------------------------------------------------------- bounds


def _text(value: str, field: str, most: int, *, least: int = 0, kept: str = "") -> str:
    """`value` with control characters, but for those in `kept`, made spaces: it is shown on terminals."""
    if not least <= len(value) <= most:
        raise MalformedError(f"{field}: {len(value)} characters; expected {least} to {most}")
    return "".join(character if character.isprintable() or character in kept else " " for character in value)


def _whole(value: int, field: str, most: int = MOST, *, least: int = 0) -> int:
    if not least <= value <= most:
        raise MalformedError(f"{field}: found {value}; expected {least} to {most}")
    return value


def _finite(value: float, field: str, *, least: float = 0.0) -> float:
    if not math.isfinite(value) or value < least:
        raise MalformedError(f"{field}: found {value}; expected a finite number of at least {least:g}")
    return value


def _measured(value: float) -> float | None:
    """A figure that training may well make infinite or NaN: None then."""
    return value if math.isfinite(value) else None


def _few(values: Any, field: str, most: int) -> Any:
    if len(values) > most:
        raise MalformedError(f"{field}: {len(values)} entries; at most {most} are allowed")
    return values


def _matching(value: str, field: str, pattern: re.Pattern[str], expected: str) -> str:
    if pattern.fullmatch(value) is None:
        raise MalformedError(f"{field}: found {value[:80]!r}; expected {expected}")
    return value


def _job(value: str, field: str) -> JobId:
    return JobId(_text(value, field, 64, least=1))


MOST_AGENTS = 1_024  # of a generation


def _unreachable(values: Collection[str]) -> tuple[AgentId, ...]:
    if len(values) > MOST_AGENTS:
        raise MalformedError(f"failed.unreachable: {len(values)} agents; expected at most {MOST_AGENTS}")
    return tuple(AgentId(_text(value, "failed.unreachable", 64, least=1)) for value in values)


def digest(value: str, field: str = "digest") -> str:
    """A blob's digest."""
    return _matching(value, field, DIGEST, "64 lower-case hex digits (SHA-256)")


def state_digest(value: str, field: str) -> str:
    """A state's digest; may be empty."""
    return _matching(value, field, _STATE_DIGEST, "at most 128 lower-case hex digits")


def name(value: str, field: str) -> str:
    """A name for an agent or operator."""
    return _matching(value, field, _NAME, "1 to 64 of A-Z a-z 0-9 . _ -")


def reason(value: str, field: str = "reason") -> str:
    """A sentence for people."""
    return _text(value, field, 256)


# ------------------------------------------------------------------------------------- in: unary


def token_parts(request: agent_pb2.EnrollRequest) -> tuple[TokenId, str]:
    """The token's id and secret; raise MalformedError."""
    _matching(request.token_id, "token_id", _TOKEN_ID, "8 of a-z 0-9")
    if _SECRET.fullmatch(request.secret) is None:
        raise MalformedError("secret: expected 32 to 64 of A-Z a-z 0-9 _ -")
    return TokenId(request.token_id), request.secret


def digests(request: agent_pb2.FindBlobsRequest) -> list[str]:
    """The digests asked for."""
    found = _few(request.digests, "digests", MAX_DIGESTS)
    return [digest(one, f"digests[{index}]") for index, one in enumerate(found)]


def blob_header(request: agent_pb2.PutBlobRequest) -> tuple[str, int, int]:
    """The digest and size of an upload, and where it goes on, from its first message."""
    if request.WhichOneof("body") != "header":
        raise MalformedError("header: missing; the first message of an upload names digest and bytes")
    size = _whole(request.header.bytes, "header.bytes")
    offset = _whole(request.header.offset, "header.offset", size)
    return digest(request.header.digest, "header.digest"), size, offset


def presign_put(request: agent_pb2.PresignPutRequest) -> tuple[str, int]:
    """The digest and size of a blob that the caller wants to send to the object store."""
    return digest(request.digest), _whole(request.bytes, "bytes")


def cached(message: agent_pb2.Cached) -> tuple[list[str], list[str], int]:
    """Digests that came to an agent's cache and that went, and the port where it serves them."""
    return (
        _raw_digests(message.added, "cached.added"),
        _raw_digests(message.removed, "cached.removed"),
        _whole(message.peer_port, "cached.peer_port", 65_535),
    )


def _raw_digests(values: Any, field: str) -> list[str]:
    for at, value in enumerate(_few(values, field, MAX_CACHED)):
        if len(value) != 32:
            raise MalformedError(f"{field}[{at}]: {len(value)} bytes; expected the 32 of a SHA-256")
    return [value.hex() for value in values]


def wanted_sources(request: agent_pb2.FindSourcesRequest) -> list[str]:
    """The digests asked for, each once."""
    found = _few(request.digests, "digests", MAX_WANTED)
    return list(dict.fromkeys(digest(one, f"digests[{index}]") for index, one in enumerate(found)))


def blob_data(request: agent_pb2.PutBlobRequest) -> bytes:
    """The bytes of an upload's later message."""
    if request.WhichOneof("body") != "data":
        raise MalformedError("header: sent twice; after it only data may follow")
    if len(request.data) > CHUNK_BYTES:
        raise MalformedError(f"data: {len(request.data)} bytes; at most {CHUNK_BYTES} go into one message")
    return bytes(request.data)


def shard_report(request: agent_pb2.ReportShardRequest, agent_id: AgentId) -> ShardReported:
    """A shard report; the blob itself is checked by the caller.  Without a digest: a word for the state."""
    count = _whole(request.count, "count", MAX_SHARDS, least=1)
    vouches = not request.digest
    if vouches and not request.state_digest:
        raise MalformedError(
            "digest: empty, and so is state_digest; a report names a shard or vouches for a state"
        )
    if len(request.header_json.encode()) > MAX_HEADER_BYTES:
        raise MalformedError(
            f"header_json: {len(request.header_json)} characters; at most {MAX_HEADER_BYTES} bytes"
        )
    json_object(request.header_json, "header_json")
    return ShardReported(
        agent_id=agent_id,
        job_id=_job(request.job_id, "job_id"),
        generation=_whole(request.generation, "generation", least=1),
        step=_whole(request.step, "step", least=1),
        index=_whole(request.index, "index", 0 if vouches else count - 1),
        count=count,
        digest="" if vouches else digest(request.digest),
        bytes=_whole(request.bytes, "bytes", 0) if vouches else _whole(request.bytes, "bytes", least=1),
        state_digest=state_digest(request.state_digest, "state_digest"),
        header_json=request.header_json,
        upload_bytes_per_s=_whole(request.upload_bytes_per_s, "upload_bytes_per_s"),
    )


def json_object(text: str, field: str) -> dict[str, Any]:
    """`text` as a JSON object without NaN, infinities or surrogates."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(text, parse_constant=refuse)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{field}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise MalformedError(f"{field}: expected a JSON object, found {type(found).__name__}")
    return found


def dataset_digests(dataset_json: str) -> list[str]:
    """Every blob that a dataset's manifest names; raise MalformedError if it is not one."""
    if len(dataset_json.encode()) > MAX_DATASET_BYTES:
        raise MalformedError(
            f"dataset_json: {len(dataset_json)} characters; at most {MAX_DATASET_BYTES} bytes"
        )
    manifest = json_object(dataset_json, "dataset_json")
    if manifest.get("format") != "muster-dataset-1":
        raise MalformedError(
            f"dataset_json.format: found {manifest.get('format')!r}; expected 'muster-dataset-1'"
        )
    found = []
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not splits:
        raise MalformedError("dataset_json.splits: expected a mapping with at least the split 'train'")
    for split, shards in splits.items():
        if not isinstance(shards, list):
            raise MalformedError(f"dataset_json.splits.{split}: expected a list of shards")
        for index, shard in enumerate(shards):
            value = shard.get("digest") if isinstance(shard, dict) else None
            found.append(digest(str(value), f"dataset_json.splits.{split}[{index}].digest"))
    tokenizer = manifest.get("tokenizer")
    if isinstance(tokenizer, dict) and tokenizer.get("digest") is not None:
        found.append(digest(str(tokenizer["digest"]), "dataset_json.tokenizer.digest"))
    return list(dict.fromkeys(found))


def authorship(request: admin_pb2.SubmitJobRequest) -> tuple[str, bytes]:
    """(certificate, signature) of a job's operator; both may be empty."""
    if len(request.signature) > MOST_AUTHORSHIP_BYTES:
        raise MalformedError(f"signature: {len(request.signature)} bytes; at most {MOST_AUTHORSHIP_BYTES}")
    if len(request.certificate_pem) > MOST_AUTHORSHIP_BYTES:
        raise MalformedError(
            f"certificate_pem: {len(request.certificate_pem)} characters; at most {MOST_AUTHORSHIP_BYTES}"
        )
    return request.certificate_pem, bytes(request.signature)


def job_action(kind: int) -> JobAction:
    """What the operator wants of a job."""
    actions = {
        admin_pb2.JOB_COMMAND_KIND_PAUSE: JobAction.PAUSE,
        admin_pb2.JOB_COMMAND_KIND_RESUME: JobAction.RESUME,
        admin_pb2.JOB_COMMAND_KIND_STOP: JobAction.STOP,
        admin_pb2.JOB_COMMAND_KIND_CANCEL: JobAction.CANCEL,
        admin_pb2.JOB_COMMAND_KIND_CHECKPOINT: JobAction.CHECKPOINT,
    }
    if kind not in actions:
        raise MalformedError(f"kind: found {kind}; expected one of JobCommandKind")
    return actions[kind]  # type: ignore[index]


def rollback_step(request: admin_pb2.RollBackJobRequest) -> int:
    """The step of the checkpoint to go back to."""
    return _whole(request.step, "step", least=1)


def checkpoint_action(kind: int) -> CheckpointAction:
    """What the operator wants of a checkpoint."""
    actions = {
        admin_pb2.CHECKPOINT_COMMAND_KIND_PIN: CheckpointAction.PIN,
        admin_pb2.CHECKPOINT_COMMAND_KIND_UNPIN: CheckpointAction.UNPIN,
        admin_pb2.CHECKPOINT_COMMAND_KIND_DELETE: CheckpointAction.DELETE,
    }
    if kind not in actions:
        raise MalformedError(f"kind: found {kind}; expected one of CheckpointCommandKind")
    return actions[kind]  # type: ignore[index]


def agent_action(kind: int) -> AgentAction:
    """What the operator wants of an agent."""
    actions = {
        admin_pb2.AGENT_COMMAND_KIND_DRAIN: AgentAction.DRAIN,
        admin_pb2.AGENT_COMMAND_KIND_QUARANTINE: AgentAction.QUARANTINE,
        admin_pb2.AGENT_COMMAND_KIND_RELEASE: AgentAction.RELEASE,
        admin_pb2.AGENT_COMMAND_KIND_BAN: AgentAction.BAN,
    }
    if kind not in actions:
        raise MalformedError(f"kind: found {kind}; expected one of AgentCommandKind")
    return actions[kind]  # type: ignore[index]


def nodes(request: admin_pb2.ScaleJobRequest) -> tuple[int, int]:
    """(min_nodes, max_nodes) of a ScaleJob."""
    most = _whole(request.max_nodes, "max_nodes", 1024, least=1)
    return _whole(request.min_nodes, "min_nodes", most, least=1), most


def token_wish(request: admin_pb2.CreateTokenRequest) -> tuple[int, int, str]:
    """(ttl_s, uses, note) of a CreateToken."""
    return (
        _whole(request.ttl_s, "ttl_s", 31_536_000, least=60),
        _whole(request.uses, "uses", 100_000, least=1),
        reason(request.note, "note"),
    )


def quarantine_seconds(request: admin_pb2.AgentCommandRequest) -> int:
    """For how long; 0 means until released."""
    return _whole(request.seconds, "seconds", 315_360_000)


def sequence(value: int, field: str) -> int:
    """A place to resume from."""
    return _whole(value, field)


# ------------------------------------------------------------------------------------- in: session


def hello(message: agent_pb2.Hello, agent_id: AgentId, session_id: SessionId) -> SessionOpened:
    """The first message of a session."""
    return SessionOpened(
        agent_id=agent_id,
        session_id=session_id,
        incarnation=_text(message.incarnation, "hello.incarnation", 64, least=1),
        facts=replace(_facts(message.probe), weighs_uploads=message.weighs_uploads),
        held_job=_job(message.held.job_id, "hello.held.job_id") if message.HasField("held") else None,
        held_generation=_whole(message.held.generation, "hello.held.generation"),
        torchrun_job=_text(message.torchrun_job, "hello.torchrun_job", 64),
    )


def _facts(probe: agent_pb2.Probe) -> AgentFacts:
    gpus = _few(probe.gpus, "hello.probe.gpus", 64)
    labels = _few(probe.labels, "hello.probe.labels", 32)
    return AgentFacts(
        gpus=tuple(
            GpuFacts(
                index=_whole(gpu.index, f"hello.probe.gpus[{at}].index", 1024),
                name=_text(gpu.name, f"hello.probe.gpus[{at}].name", 128),
                memory_bytes=_whole(gpu.memory_bytes, f"hello.probe.gpus[{at}].memory_bytes"),
                capability=(
                    _whole(gpu.capability_major, f"hello.probe.gpus[{at}].capability_major", 1000),
                    _whole(gpu.capability_minor, f"hello.probe.gpus[{at}].capability_minor", 1000),
                ),
            )
            for at, gpu in enumerate(gpus)
        ),
        driver_version=_text(probe.driver_version, "hello.probe.driver_version", 64),
        torch_version=_text(probe.torch_version, "hello.probe.torch_version", 64),
        backends=tuple(
            _text(one, f"hello.probe.backends[{at}]", 16, least=1)
            for at, one in enumerate(_few(probe.backends, "hello.probe.backends", 8))
        ),
        cpu_count=_whole(probe.cpu_count, "hello.probe.cpu_count", 65_536),
        memory_bytes=_whole(probe.memory_bytes, "hello.probe.memory_bytes"),
        disk_free_bytes=_whole(probe.disk_free_bytes, "hello.probe.disk_free_bytes"),
        hostname=_text(probe.hostname, "hello.probe.hostname", 255),
        advertise_host=_text(probe.advertise_host, "hello.probe.advertise_host", 255),
        muster_version=_text(probe.muster_version, "hello.probe.muster_version", 64),
        labels=tuple(
            (
                _text(key, "hello.probe.labels", 64, least=1),
                _text(labels[key], f"hello.probe.labels.{key[:64]}", 64),
            )
            for key in sorted(labels)
        ),
        worker_count=_whole(probe.worker_count, "hello.probe.worker_count", 64, least=1),
    )


def heartbeat(message: agent_pb2.Heartbeat, agent_id: AgentId, session_id: SessionId) -> HeartbeatReceived:
    """A renewal of the lease."""
    return HeartbeatReceived(
        agent_id=agent_id,
        session_id=session_id,
        step=_whole(message.step, "heartbeat.step"),
        activity=_text(message.activity, "heartbeat.activity", 32),
        tokens_per_s=_finite(message.tokens_per_s, "heartbeat.tokens_per_s"),
        disk_free_bytes=_whole(message.disk_free_bytes, "heartbeat.disk_free_bytes"),
        fetched_bytes=fetching(message)[0],
        all_stored=message.all_stored,
    )


def fetching(message: agent_pb2.Heartbeat) -> tuple[int, int]:
    """Bytes that are there and bytes in all, of what the agent is fetching."""
    total = _whole(message.transfer_total, "heartbeat.transfer_total")
    return _whole(message.transfer_bytes, "heartbeat.transfer_bytes", total), total


def progress(
    message: agent_pb2.Progress, agent_id: AgentId, at_ms: int
) -> tuple[ProgressReceived | EvaluationsReceived, tuple[StepRow, ...], tuple[EvaluationRow, ...]]:
    """What the core hears, and the rows that go with it."""
    job_id = _job(message.job_id, "progress.job_id")
    generation = _whole(message.generation, "progress.generation", least=1)
    records = _few(message.steps, "progress.steps", MAX_STEPS)
    rows = tuple(_step(record, job_id, at, at_ms) for at, record in enumerate(records))
    for before, after in itertools.pairwise(rows):
        if after.step != before.step + 1:
            raise MalformedError(
                f"progress.steps: step {before.step} is followed by {after.step}; expected no gap"
            )
    evaluations = tuple(
        EvaluationRow(
            job_id=job_id,
            step=_whole(one.step, f"progress.evaluations[{at}].step"),
            loss=_measured(one.loss),
        )
        for at, one in enumerate(_few(message.evaluations, "progress.evaluations", MAX_EVALUATIONS))
    )
    # One that is not finite is shown and decides nothing.
    losses = tuple(Evaluation(step=row.step, loss=row.loss) for row in evaluations if row.loss is not None)
    if not rows:
        alone = EvaluationsReceived(
            agent_id=agent_id, job_id=job_id, generation=generation, evaluations=losses
        )
        return alone, (), evaluations
    event = ProgressReceived(
        agent_id=agent_id,
        job_id=job_id,
        generation=generation,
        first_step=rows[0].step,
        last_step=rows[-1].step,
        tokens=sum(row.tokens for row in rows),
        evaluations=losses,
    )
    return event, rows, evaluations


def _step(record: agent_pb2.StepRecord, job_id: JobId, at: int, at_ms: int) -> StepRow:
    field = f"progress.steps[{at}]"
    return StepRow(
        job_id=job_id,
        step=_whole(record.step, f"{field}.step", least=1),
        loss=_measured(record.loss),
        slices=_whole(record.slices, f"{field}.slices"),
        data_digest=record.data_digest,
        tokens=_finite(record.tokens, f"{field}.tokens"),
        lr=_finite(record.lr, f"{field}.lr"),
        grad_norm=_measured(record.grad_norm),
        skipped=record.skipped,
        generation=_whole(record.generation, f"{field}.generation", least=1),
        duration_s=_finite(record.duration_s, f"{field}.duration_s"),
        at_ms=at_ms,
    )


def log_lines(message: agent_pb2.LogLines, agent_id: AgentId, at_ms: int) -> list[NewLine]:
    """Output of workers."""
    job_id = _job(message.job_id, "logs.job_id")
    return [
        NewLine(
            job_id=job_id,
            at_ms=at_ms,
            agent_id=agent_id,
            line=_text(line, f"logs.lines[{at}]", MAX_LOG_CHARS, kept="\t"),
        )
        for at, line in enumerate(_few(message.lines, "logs.lines", MAX_LOG_LINES))
    ]


_FAILURES = {
    agent_pb2.FAILURE_KIND_COLLECTIVE: FailureKind.COLLECTIVE,
    agent_pb2.FAILURE_KIND_KILLED: FailureKind.KILLED,
    agent_pb2.FAILURE_KIND_PROGRAM: FailureKind.PROGRAM,
    agent_pb2.FAILURE_KIND_WEDGED: FailureKind.WEDGED,
    agent_pb2.FAILURE_KIND_DIVERGED: FailureKind.DIVERGED,
    agent_pb2.FAILURE_KIND_RESTORE: FailureKind.RESTORE,
    agent_pb2.FAILURE_KIND_PREPARE: FailureKind.PREPARE,
}


def report(message: agent_pb2.AgentMessage, agent_id: AgentId) -> Event:
    """A session's message that is nothing but an event: all but hello, heartbeat, progress and logs."""
    match message.WhichOneof("body"):
        case "ready":
            ready = message.ready
            return ReadyReceived(
                agent_id=agent_id,
                readiness=Readiness(
                    job_id=_job(ready.job_id, "ready.job_id"),
                    store_host=_text(ready.store_host, "ready.store_host", 255, least=1),
                    store_port=_whole(ready.store_port, "ready.store_port", 65_535, least=1),
                    holds_state=ready.holds_state,
                    step=_whole(ready.step, "ready.step"),
                    state_digest=state_digest(ready.state_digest, "ready.state_digest"),
                    assignment=_whole(ready.assignment, "ready.assignment"),
                    generation=_whole(ready.generation, "ready.generation"),
                ),
            )
        case "formed":
            formed = message.formed
            return FormedReceived(
                agent_id=agent_id,
                job_id=_job(formed.job_id, "formed.job_id"),
                generation=_whole(formed.generation, "formed.generation", least=1),
                step=_whole(formed.step, "formed.step"),
                state_digest=state_digest(formed.state_digest, "formed.state_digest"),
            )
        case "failed":
            failed = message.failed
            if failed.kind not in _FAILURES:
                raise MalformedError(f"failed.kind: found {failed.kind}; expected one of FailureKind")
            return WorkerFailedReceived(
                agent_id=agent_id,
                job_id=_job(failed.job_id, "failed.job_id"),
                generation=_whole(failed.generation, "failed.generation"),
                kind=_FAILURES[failed.kind],
                detail=_text(failed.detail, "failed.detail", 4_096, kept="\n\t"),
                step=_whole(failed.step, "failed.step"),
                unreachable=_unreachable(failed.unreachable),
            )
        case "finished":
            finished = message.finished
            return FinishedReceived(
                agent_id=agent_id,
                job_id=_job(finished.job_id, "finished.job_id"),
                generation=_whole(finished.generation, "finished.generation", least=1),
                step=_whole(finished.step, "finished.step"),
            )
        case "released":
            released = message.released
            return ReleasedReceived(
                agent_id=agent_id,
                job_id=_job(released.job_id, "released.job_id"),
                generation=_whole(released.generation, "released.generation", least=1),
            )
        case "goodbye":
            return GoodbyeReceived(agent_id=agent_id, reason=reason(message.goodbye.reason, "goodbye.reason"))
        case "leaving":
            return LeaveAsked(agent_id=agent_id, reason=reason(message.leaving.reason, "leaving.reason"))
        case "peer_fault":
            fault = message.peer_fault
            return WrongBytesReported(
                agent_id=agent_id,
                peer_id=AgentId(_text(fault.agent_id, "peer_fault.agent_id", 64, least=1)),
                digest=digest(fault.digest, "peer_fault.digest"),
            )
        case "hello":
            raise MalformedError("hello: sent twice in one session; it is the first message only")
        case other:
            raise MalformedError(f"body: found {other or 'nothing'}; expected one of AgentMessage")


# ------------------------------------------------------------------------------------- out


def welcome(agent_id: AgentId, timing: Timing) -> agent_pb2.CoordinatorMessage:
    """The answer to Hello."""
    return agent_pb2.CoordinatorMessage(
        welcome=agent_pb2.Welcome(
            agent_id=agent_id,
            heartbeat_interval_ms=timing.heartbeat_ms,
            lease_ms=timing.lease_ms,
            rebuild_timeout_ms=timing.rebuild_timeout_ms,
            grace_ms=timing.grace_ms,
        )
    )


def go_away(refusal: Refusal | None, message: str, *, retry: bool) -> agent_pb2.CoordinatorMessage:
    """The last message of a session.  Nothing is refused (None) when the agent shall just come back."""
    reason = "REFUSAL_UNSPECIFIED" if refusal is None else f"REFUSAL_{refusal.name}"
    return agent_pb2.CoordinatorMessage(go_away=agent_pb2.GoAway(reason=reason, message=message, retry=retry))


def plan(job_id: JobId, generation: Generation, checkpoint_json: str, lineage: int) -> agent_pb2.Plan:
    """A generation as agents are told of it."""
    match generation.cut:
        case Cut.AFTER_STEP:
            cut = agent_pb2.CUT_AFTER_STEP
        case Cut.ABORT:
            cut = agent_pb2.CUT_ABORT
        case _:
            assert_never(generation.cut)
    return agent_pb2.Plan(
        job_id=job_id,
        generation=generation.number,
        members=[
            agent_pb2.Member(
                agent_id=member.agent_id,
                group_rank=member.group_rank,
                first_rank=member.first_rank,
                worker_count=member.worker_count,
                host=member.host,
                holds_state=member.holds_state,
                upload_weight=member.upload_weight,
            )
            for member in generation.members
        ],
        store_host=generation.store_host,
        store_port=generation.store_port,
        cut=cut,
        committed_step=generation.committed_step,
        committed_digest=generation.committed_digest,
        # On the wire a fresh start is one from a checkpoint that is not there.
        from_checkpoint=generation.from_checkpoint_step is not None or generation.fresh,
        checkpoint_json=checkpoint_json,
        reason=generation.why.value,
        checkpoint_before_cut=generation.checkpoint_before_cut,
        lineage=lineage,
    )


class Wording:
    """What is pushed, in the words of the wire.  A plan comes to all its members in the same words, which
    for a thousand members take a millisecond to find: they are found once."""

    def __init__(self) -> None:
        self._plan: tuple[PushPlan, bytes] | None = None

    def of(self, message: Push, state: State) -> agent_pb2.CoordinatorMessage | bytes | None:
        """As `push`; a plan is encoded already."""
        if not isinstance(message, PushPlan):
            return push(message, state)
        if self._plan is not None:
            before, found = self._plan
            if before.generation is message.generation and before.checkpoint_json == message.checkpoint_json:
                return found
        worded = push(message, state)
        assert worded is not None
        encoded = worded.SerializeToString()
        self._plan = (message, encoded)
        return encoded


def push(message: Push, state: State) -> agent_pb2.CoordinatorMessage | None:
    """What an agent is told; None if it is about a job that is no more."""
    match message:
        case PushAssignment():
            job = state.jobs.get(message.job_id)
            if job is None:
                return None
            return agent_pb2.CoordinatorMessage(
                assignment=agent_pb2.Assignment(
                    job_id=message.job_id,
                    name=job.spec.name,
                    spec_json=job.spec.spec_json,
                    dataset_json=job.spec.dataset_json,
                    committed_step=job.committed_step,
                    number=message.number,
                    signature=bytes.fromhex(job.spec.signature),
                    certificate_pem=job.spec.certificate_pem,
                )
            )
        case PushUnassign():
            return agent_pb2.CoordinatorMessage(
                unassign=agent_pb2.Unassign(job_id=message.job_id, reason=message.reason)
            )
        case PushPlan():
            return agent_pb2.CoordinatorMessage(
                plan=plan(message.job_id, message.generation, message.checkpoint_json, message.lineage)
            )
        case PushTakeCheckpoint():
            return agent_pb2.CoordinatorMessage(
                take_checkpoint=agent_pb2.TakeCheckpoint(job_id=message.job_id, generation=message.generation)
            )
        case PushDrain():
            return agent_pb2.CoordinatorMessage(drain=agent_pb2.Drain(reason=message.reason))
        case PushIdle():
            return agent_pb2.CoordinatorMessage(
                idle=agent_pb2.Idle(reason=message.reason, unmet=list(message.unmet))
            )
        case PushGoAway():
            return go_away(message.refusal, message.message, retry=message.retry)
        case _:
            assert_never(message)


def step_record(row: StepRow) -> agent_pb2.StepRecord:
    """A committed step as it is shown; figures that were not finite are NaN."""
    return agent_pb2.StepRecord(
        step=row.step,
        loss=math.nan if row.loss is None else row.loss,
        slices=row.slices,
        data_digest=row.data_digest,
        tokens=row.tokens,
        lr=row.lr,
        grad_norm=math.nan if row.grad_norm is None else row.grad_norm,
        skipped=row.skipped,
        generation=row.generation,
        duration_s=row.duration_s,
    )


def evaluation(row: EvaluationRow) -> agent_pb2.Evaluation:
    """An evaluation as it is shown."""
    return agent_pb2.Evaluation(step=row.step, loss=math.nan if row.loss is None else row.loss)
