"""Durable records and snapshots as JSON, and records as lines for people.

Generic over the dataclasses of the model, by their type hints.  Reading is strict: an unknown kind or
field, or a value of another type, is an error that says where.  A field that an older writer did not
know takes its default, so fields may be added but never renamed.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, assert_never, get_args, get_origin

from coordinator.core.checkpoints import ALONE, dissent
from coordinator.core.evolve import look_at_everything
from coordinator.core.model import (
    VOLATILE_OF_AGENT,
    VOLATILE_OF_JOB,
    Agent,
    AgentAdmitted,
    AgentArrived,
    AgentAssigned,
    AgentDraining,
    AgentIdled,
    AgentLeft,
    AgentLost,
    AgentReadied,
    AgentReturned,
    AgentSuspected,
    AgentUnassigned,
    CertificateRenewed,
    CheckpointDamaged,
    CheckpointDoubted,
    CheckpointPinned,
    CheckpointRetired,
    CheckpointWanted,
    CollectiveFailed,
    DurableRecord,
    EvaluationRecorded,
    FailureCounted,
    GapSeen,
    Generation,
    GenerationPlanned,
    Job,
    JobAdmitted,
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
    PendingDropped,
    PreparationForgiven,
    PreparationGivenUp,
    Record,
    SessionEnded,
    ShardRecorded,
    StandingChanged,
    State,
    StatesDiffered,
    StateWitnessed,
    StepsCommitted,
    StepsRolledBack,
    StepsUnrecorded,
    StrikeCounted,
    Timing,
    Token,
    TokenCreated,
    TokenRevoked,
    UploadMeasured,
    WaitChanged,
)

VERSION = 1
"""Of this format: a reader refuses any other."""

Json = Any
_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in get_args(DurableRecord)}
_VOLATILE: Mapping[type, frozenset[str]] = {Agent: VOLATILE_OF_AGENT, Job: VOLATILE_OF_JOB}


class CodecError(ValueError):
    """Stored text that is not what this version of Muster writes; the message says where and what."""


def is_durable(record: Record) -> bool:
    """Whether the record belongs in the journal."""
    return type(record).__name__ in _KINDS


def encode_record(record: Record) -> str:
    """One JSON object.  Raise CodecError for a volatile record."""
    kind = type(record).__name__
    if kind not in _KINDS:
        raise CodecError(f"{kind} is a volatile record; only durable ones are stored")
    return _dump({"kind": kind, "v": VERSION, **_encode(record)})


def decode_record(text: str) -> DurableRecord:
    """The record that `encode_record` wrote.  Raise CodecError."""
    body = _load(text, "record")
    kind = body.pop("kind", None)
    _check_version(body, "record")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CodecError(f"kind: found {kind!r}; this version knows {', '.join(_KINDS)}")
    record: DurableRecord = _decode(_KINDS[kind], body, kind)
    return record


def encode_state(state: State) -> str:
    """The durable part of the state, for a snapshot."""
    return _dump(
        {
            "v": VERSION,
            "timing": _encode(state.timing),
            "tokens": [_encode(token) for token in state.tokens.values()],
            "agents": [_encode(agent, durable_only=True) for agent in state.agents.values()],
            "jobs": [_encode(job, durable_only=True) for job in state.jobs.values()],
        }
    )


def decode_state(text: str) -> State:
    """The state that `encode_state` wrote; what is volatile is as after a restart.  Raise CodecError."""
    body = _load(text, "state")
    _check_version(body, "state")
    parts: dict[str, tuple[Any, ...]] = {}
    for name, kind in (("tokens", Token), ("agents", Agent), ("jobs", Job)):
        parts[name] = _decode(types.GenericAlias(tuple, (kind, ...)), body.pop(name, None), name)
    timing: Timing = _decode(Timing, body.pop("timing", None), "timing")
    if body:
        raise CodecError(f"state: unknown fields {', '.join(sorted(body))}")
    state = State(
        timing=timing,
        tokens={token.token_id: token for token in parts["tokens"]},
        agents={agent.agent_id: agent for agent in parts["agents"]},
        jobs={job.job_id: job for job in parts["jobs"]},
    )
    look_at_everything(state)
    return state


# ------------------------------------------------------------------------------- generic


_dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _load(text: str, where: str) -> dict[str, Json]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"{where}: not JSON: {error}") from error
    if not isinstance(body, dict):
        raise CodecError(f"{where}: found {type(body).__name__}; expected a JSON object")
    return body


def _check_version(body: dict[str, Json], where: str) -> None:
    version = body.pop("v", None)
    if version != VERSION:
        raise CodecError(f"{where}: found version {version!r}; this version of Muster reads {VERSION}")


_PLAIN = frozenset({type(None), bool, int, float, str})


def _encode(value: Any, *, durable_only: bool = False) -> Json:
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple:
        return [item if type(item) in _PLAIN else _encode(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    names, read = _fields(kind, durable_only)
    return {
        name: item if type(item) in _PLAIN else _encode(item)
        for name, item in zip(names, read(value), strict=True)
    }


@functools.cache
def _fields(kind: Any, durable_only: bool) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The fields that are written, and how to read all of them at once."""
    left_out = _VOLATILE.get(kind, frozenset()) if durable_only else frozenset()
    names = tuple(field.name for field in fields(kind) if field.name not in left_out)
    read = operator.attrgetter(*names)
    return names, read if len(names) > 1 else lambda value: (read(value),)


@functools.cache
def _reader(hint: Any) -> Callable[[Json, str], Any]:
    """How to read a value of the type that `hint` names."""
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_reader(hint)
    if isinstance(hint, typing.NewType):
        return _reader(hint.__supertype__)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_reader(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        read = _reader(inner)
        return lambda value, where: None if value is None else read(value, where)
    if origin is tuple:
        return _tuple_reader(arguments)
    assert hint in (int, float, str, bool), f"the model uses {hint}, which the codec does not know"
    return _plain_reader(hint)


def _decode(hint: Any, value: Json, where: str) -> Any:
    return _reader(hint)(value, where)


def _dataclass_reader(kind: type) -> Callable[[Json, str], Any]:
    hints = typing.get_type_hints(kind)
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}

    def read(value: Json, where: str) -> Any:
        if not isinstance(value, dict):
            raise CodecError(f"{where}: found {_found(value)}; expected a {kind.__name__} object")
        unknown = value.keys() - hints.keys()
        if unknown:
            raise CodecError(f"{where}: unknown fields {', '.join(sorted(unknown))} of {kind.__name__}")
        missing = required - value.keys()
        if missing:
            raise CodecError(f"{where}: missing fields {', '.join(sorted(missing))} of {kind.__name__}")
        return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})

    return read


def _enum_reader(kind: type[enum.Enum]) -> Callable[[Json, str], Any]:
    by_value = {member.value: member for member in kind}

    def read(value: Json, where: str) -> Any:
        if not isinstance(value, str | int) or value not in by_value:
            allowed = ", ".join(str(known) for known in by_value)
            raise CodecError(f"{where}: found {value!r}; allowed are {allowed}")
        return by_value[value]

    return read


def _tuple_reader(arguments: tuple[Any, ...]) -> Callable[[Json, str], Any]:
    repeated = len(arguments) == 2 and arguments[1] is Ellipsis

    def read(value: Json, where: str) -> Any:
        if not isinstance(value, list):
            raise CodecError(f"{where}: found {_found(value)}; expected a list")
        if not repeated and len(value) != len(arguments):
            raise CodecError(f"{where}: found {len(value)} items; expected {len(arguments)}")
        kinds = [arguments[0]] * len(value) if repeated else list(arguments)
        return tuple(
            _decode(kind, item, f"{where}[{place}]")
            for place, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )

    return read


def _plain_reader(kind: type) -> Callable[[Json, str], Any]:
    def read(value: Json, where: str) -> Any:
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            return float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise CodecError(f"{where}: found {_found(value)}; expected {kind.__name__}")
        return value

    return read


def _found(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


# ------------------------------------------------------------------------------ for people


def describe(record: Record) -> str:
    """One line that says what happened."""
    match record:
        case TokenCreated(token=token):
            return f"token {token.token_id} created for {token.uses_left} uses{_because(token.note)}"
        case TokenRevoked():
            return f"token {record.token_id} revoked"
        case AgentAdmitted():
            return f"agent {record.agent_id} ({record.name}) enrolled with token {record.token_id}"
        case CertificateRenewed():
            return f"agent {record.agent_id} renewed its certificate"
        case AgentArrived(facts=facts):
            cards = f"{len(facts.gpus)} GPU" if facts.gpus else f"{facts.cpu_count} CPU"
            return f"agent {record.agent_id} arrived from {facts.hostname or 'somewhere'} with {cards}"
        case AgentReturned():
            return f"agent {record.agent_id} speaks again"
        case AgentSuspected():
            return f"agent {record.agent_id} is suspected: {record.evidence.value}"
        case AgentLost():
            return f"agent {record.agent_id} is lost: {', '.join(e.value for e in record.evidence)}"
        case AgentLeft():
            return f"agent {record.agent_id} left{_because(record.reason)}"
        case AgentDraining():
            verb = "is to leave after a step" if record.draining else "may work again"
            return f"agent {record.agent_id} {verb}{_because(record.reason)}"
        case StandingChanged():
            until = f" until {record.until_ms}" if record.until_ms is not None else ""
            detail = _because(record.detail or record.why.value)
            return f"agent {record.agent_id} is {record.standing.value}{until}{detail}"
        case StrikeCounted():
            return f"agent {record.agent_id} has {record.strikes} strikes{_because(record.detail)}"
        case AgentAssigned():
            return f"agent {record.agent_id} assigned to job {record.job_id}"
        case AgentUnassigned():
            return f"agent {record.agent_id} taken off job {record.job_id}{_because(record.reason)}"
        case JobAdmitted(spec=spec):
            return (
                f"job {record.job_id} ({spec.name}) submitted for {spec.min_nodes} to {spec.max_nodes} agents"
            )
        case JobPhaseChanged():
            detail = f" ({record.detail})" if record.detail else ""
            return f"job {record.job_id} is {record.phase.value}: {record.why.value}{detail}"
        case JobRescaled():
            return f"job {record.job_id} wants {record.min_nodes} to {record.max_nodes} agents"
        case GenerationPlanned(generation=generation):
            return f"job {record.job_id}: {_describe_plan(generation)}"
        case MemberFormed():
            return f"agent {record.agent_id} formed generation {record.generation} at step {record.step}"
        case MemberFinished():
            return f"agent {record.agent_id} finished at step {record.step}"
        case MemberReleased():
            return f"agent {record.agent_id} is out of job {record.job_id} by generation {record.generation}"
        case MemberStored():
            return f"agent {record.agent_id} has nothing more to store for job {record.job_id}"
        case MemberLost():
            evidence = record.evidence.value
            return f"generation {record.generation} lost agent {record.agent_id}: {evidence}{_because(record.detail)}"
        case CollectiveFailed():
            others = f", which could not reach {', '.join(record.unreachable)}" if record.unreachable else ""
            return f"a collective of generation {record.generation} failed at agent {record.agent_id}{others}"
        case StatesDiffered():
            return (
                f"members of generation {record.generation} hold different states after step {record.step}: "
                f"agent {record.agent_id} another than {', '.join(record.peers) or 'its peers'}"
            )
        case MemberDissented():
            return f"agent {record.agent_id} has dissented {record.dissents} times: {dissent(record)}"
        case FailureCounted():
            return f"job {record.job_id} failed at agent {record.agent_id}: {record.failure.value}: {record.detail}"
        case StepsCommitted():
            return f"job {record.job_id} committed steps {record.first_step} to {record.last_step}"
        case StepsUnrecorded():
            steps = f"{record.first_step} to {record.last_step}"
            return f"job {record.job_id}: records of steps {steps} are lost with the agents that had them"
        case StepsRolledBack():
            return f"job {record.job_id} goes back to step {record.to_step}: later ones will be made again"
        case JobRolledBack():
            return (
                f"job {record.job_id} is taken back from step {record.from_step} to checkpoint {record.to_step} "
                f"by {record.by}"
            )
        case ShardRecorded(shard=shard):
            return f"job {record.job_id}: shard {shard.index + 1} of {record.count} of checkpoint {record.step} stored"
        case StateWitnessed(witness=witness):
            return (
                f"job {record.job_id}: agent {witness.agent_id} says that the state of checkpoint {record.step} "
                f"is {witness.state_digest[:12]}"
            )
        case ManifestCommitted(checkpoint=checkpoint):
            alone = f", {ALONE[checkpoint.alone]}" if checkpoint.alone is not None else ""
            return f"job {record.job_id}: checkpoint {checkpoint.step} committed, {checkpoint.bytes} bytes{alone}"
        case PendingDropped():
            return (
                f"job {record.job_id}: unfinished checkpoint {record.step} given up{_because(record.reason)}"
            )
        case CheckpointDoubted():
            return (
                f"job {record.job_id}: agent {record.agent_id} could not restore checkpoint {record.step}"
                f"{_because(record.detail)}"
            )
        case CheckpointDamaged():
            return f"job {record.job_id}: checkpoint {record.step} is damaged{_because(record.detail)}"
        case CheckpointRetired():
            verb = f"deleted by {record.by}" if record.by else "retired"
            return f"job {record.job_id}: checkpoint {record.step} {verb}"
        case CheckpointPinned():
            verb = "pinned" if record.pinned else "unpinned"
            return f"job {record.job_id}: checkpoint {record.step} {verb} by {record.by}"
        case EvaluationRecorded(evaluation=found):
            return f"job {record.job_id} evaluated step {found.step}: loss {found.loss:.4f}"
        case CheckpointWanted():
            return f"job {record.job_id}: a checkpoint was asked for{_because(record.reason)}"
        case PeerAccused():
            return f"agent {record.agent_id} served agent {record.by} wrong bytes for blob {record.digest}"
        case PeerTrusted():
            return f"agent {record.agent_id} may be asked for blobs again"
        case PreparationGivenUp():
            return (
                f"agent {record.agent_id} did not get ready for job {record.job_id} in time: it is not given to it "
                f"again until {record.until_ms}"
            )
        case PreparationForgiven():
            return f"agent {record.agent_id} may be given to job {record.job_id} again"
        case LeaseRenewed():
            return f"agent {record.agent_id} renewed its lease"
        case SessionEnded():
            return f"session of agent {record.agent_id} closed"
        case AgentReadied(readiness=readiness):
            return f"agent {record.agent_id} is {'ready' if readiness is not None else 'not ready'}"
        case AgentIdled():
            return f"agent {record.agent_id} is idle{_because(record.reason)}"
        case UploadMeasured():
            return f"agent {record.agent_id} uploads {record.bytes_per_s} bytes/s"
        case WaitChanged():
            return f"job {record.job_id} waits since {record.gathered_ms or record.standby_ms or 'now'}"
        case GapSeen():
            return f"job {record.job_id}: the record of the steps before {record.known_from} is missing"
        case LeasesRefreshed():
            return f"the coordinator started; {len(record.until_ms)} agents have a fresh lease"
        case _:
            assert_never(record)


def _describe_plan(generation: Generation) -> str:
    if not generation.members:
        return f"generation {generation.number} releases everyone ({generation.why.value})"
    members = ", ".join(member.agent_id for member in generation.members)
    if generation.from_checkpoint_step is not None:
        source = f"from checkpoint {generation.from_checkpoint_step}"
    else:
        source = "from the start" if generation.fresh else f"from memory at step {generation.committed_step}"
    cut = generation.cut.value
    return f"generation {generation.number} of {members} ({cut}, {generation.why.value}) {source}"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""
