from protos import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobCommandKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_COMMAND_KIND_UNSPECIFIED: _ClassVar[JobCommandKind]
    JOB_COMMAND_KIND_PAUSE: _ClassVar[JobCommandKind]
    JOB_COMMAND_KIND_RESUME: _ClassVar[JobCommandKind]
    JOB_COMMAND_KIND_STOP: _ClassVar[JobCommandKind]
    JOB_COMMAND_KIND_CANCEL: _ClassVar[JobCommandKind]
    JOB_COMMAND_KIND_CHECKPOINT: _ClassVar[JobCommandKind]

class AgentCommandKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGENT_COMMAND_KIND_UNSPECIFIED: _ClassVar[AgentCommandKind]
    AGENT_COMMAND_KIND_DRAIN: _ClassVar[AgentCommandKind]
    AGENT_COMMAND_KIND_QUARANTINE: _ClassVar[AgentCommandKind]
    AGENT_COMMAND_KIND_RELEASE: _ClassVar[AgentCommandKind]
    AGENT_COMMAND_KIND_BAN: _ClassVar[AgentCommandKind]

class CheckpointCommandKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKPOINT_COMMAND_KIND_UNSPECIFIED: _ClassVar[CheckpointCommandKind]
    CHECKPOINT_COMMAND_KIND_PIN: _ClassVar[CheckpointCommandKind]
    CHECKPOINT_COMMAND_KIND_UNPIN: _ClassVar[CheckpointCommandKind]
    CHECKPOINT_COMMAND_KIND_DELETE: _ClassVar[CheckpointCommandKind]
JOB_COMMAND_KIND_UNSPECIFIED: JobCommandKind
JOB_COMMAND_KIND_PAUSE: JobCommandKind
JOB_COMMAND_KIND_RESUME: JobCommandKind
JOB_COMMAND_KIND_STOP: JobCommandKind
JOB_COMMAND_KIND_CANCEL: JobCommandKind
JOB_COMMAND_KIND_CHECKPOINT: JobCommandKind
AGENT_COMMAND_KIND_UNSPECIFIED: AgentCommandKind
AGENT_COMMAND_KIND_DRAIN: AgentCommandKind
AGENT_COMMAND_KIND_QUARANTINE: AgentCommandKind
AGENT_COMMAND_KIND_RELEASE: AgentCommandKind
AGENT_COMMAND_KIND_BAN: AgentCommandKind
CHECKPOINT_COMMAND_KIND_UNSPECIFIED: CheckpointCommandKind
CHECKPOINT_COMMAND_KIND_PIN: CheckpointCommandKind
CHECKPOINT_COMMAND_KIND_UNPIN: CheckpointCommandKind
CHECKPOINT_COMMAND_KIND_DELETE: CheckpointCommandKind

class SubmitJobRequest(_message.Message):
    __slots__ = ("spec_json", "dataset_json", "signature", "certificate_pem")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASET_JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    dataset_json: str
    signature: bytes
    certificate_pem: str
    def __init__(self, spec_json: _Optional[str] = ..., dataset_json: _Optional[str] = ..., signature: _Optional[bytes] = ..., certificate_pem: _Optional[str] = ...) -> None: ...

class SubmitJobReply(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class JobRef(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class JobCommandRequest(_message.Message):
    __slots__ = ("job", "kind")
    JOB_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    job: str
    kind: JobCommandKind
    def __init__(self, job: _Optional[str] = ..., kind: _Optional[_Union[JobCommandKind, str]] = ...) -> None: ...

class RollBackJobRequest(_message.Message):
    __slots__ = ("job", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class ScaleJobRequest(_message.Message):
    __slots__ = ("job", "min_nodes", "max_nodes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    MIN_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    job: str
    min_nodes: int
    max_nodes: int
    def __init__(self, job: _Optional[str] = ..., min_nodes: _Optional[int] = ..., max_nodes: _Optional[int] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Views(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, json: _Optional[_Iterable[str]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("all",)
    ALL_FIELD_NUMBER: _ClassVar[int]
    all: bool
    def __init__(self, all: _Optional[bool] = ...) -> None: ...

class AgentRef(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: str
    def __init__(self, agent: _Optional[str] = ...) -> None: ...

class AgentCommandRequest(_message.Message):
    __slots__ = ("agent", "kind", "reason", "seconds")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    agent: str
    kind: AgentCommandKind
    reason: str
    seconds: int
    def __init__(self, agent: _Optional[str] = ..., kind: _Optional[_Union[AgentCommandKind, str]] = ..., reason: _Optional[str] = ..., seconds: _Optional[int] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("ttl_s", "uses", "note")
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    ttl_s: int
    uses: int
    note: str
    def __init__(self, ttl_s: _Optional[int] = ..., uses: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class CreateTokenReply(_message.Message):
    __slots__ = ("token", "token_id", "enroll_port")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ENROLL_PORT_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_id: str
    enroll_port: int
    def __init__(self, token: _Optional[str] = ..., token_id: _Optional[str] = ..., enroll_port: _Optional[int] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("token_id",)
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token_id: str
    def __init__(self, token_id: _Optional[str] = ...) -> None: ...

class CheckpointRef(_message.Message):
    __slots__ = ("job", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class CheckpointCommandRequest(_message.Message):
    __slots__ = ("job", "step", "kind")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    kind: CheckpointCommandKind
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., kind: _Optional[_Union[CheckpointCommandKind, str]] = ...) -> None: ...

class CollectGarbageRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("manifest_json",)
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    manifest_json: str
    def __init__(self, manifest_json: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("job", "after_sequence", "follow")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    job: str
    after_sequence: int
    follow: bool
    def __init__(self, job: _Optional[str] = ..., after_sequence: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("sequence", "unix_ms", "kind", "json", "text")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    unix_ms: int
    kind: str
    json: str
    text: str
    def __init__(self, sequence: _Optional[int] = ..., unix_ms: _Optional[int] = ..., kind: _Optional[str] = ..., json: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("job", "after_sequence", "follow", "tail")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    job: str
    after_sequence: int
    follow: bool
    tail: int
    def __init__(self, job: _Optional[str] = ..., after_sequence: _Optional[int] = ..., follow: _Optional[bool] = ..., tail: _Optional[int] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("sequence", "unix_ms", "agent_id", "line")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    unix_ms: int
    agent_id: str
    line: str
    def __init__(self, sequence: _Optional[int] = ..., unix_ms: _Optional[int] = ..., agent_id: _Optional[str] = ..., line: _Optional[str] = ...) -> None: ...

class StepsRequest(_message.Message):
    __slots__ = ("job", "after_step", "follow")
    JOB_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    job: str
    after_step: int
    follow: bool
    def __init__(self, job: _Optional[str] = ..., after_step: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class StepsReply(_message.Message):
    __slots__ = ("steps", "evaluations")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[_agent_pb2.StepRecord]
    evaluations: _containers.RepeatedCompositeFieldContainer[_agent_pb2.Evaluation]
    def __init__(self, steps: _Optional[_Iterable[_Union[_agent_pb2.StepRecord, _Mapping]]] = ..., evaluations: _Optional[_Iterable[_Union[_agent_pb2.Evaluation, _Mapping]]] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
