from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProtocolVersion(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROTOCOL_VERSION_UNSPECIFIED: _ClassVar[ProtocolVersion]
    PROTOCOL_VERSION_1: _ClassVar[ProtocolVersion]

class Refusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_UNSPECIFIED: _ClassVar[Refusal]
    REFUSAL_PROTOCOL_VERSION: _ClassVar[Refusal]
    REFUSAL_TOKEN_MALFORMED: _ClassVar[Refusal]
    REFUSAL_TOKEN_UNKNOWN: _ClassVar[Refusal]
    REFUSAL_TOKEN_EXPIRED: _ClassVar[Refusal]
    REFUSAL_TOKEN_EXHAUSTED: _ClassVar[Refusal]
    REFUSAL_TOKEN_REVOKED: _ClassVar[Refusal]
    REFUSAL_BAD_CSR: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_AGENT: _ClassVar[Refusal]
    REFUSAL_BANNED: _ClassVar[Refusal]
    REFUSAL_WRONG_ROLE: _ClassVar[Refusal]
    REFUSAL_DUPLICATE_IDENTITY: _ClassVar[Refusal]
    REFUSAL_STALE_GENERATION: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_JOB: _ClassVar[Refusal]
    REFUSAL_WRONG_PHASE: _ClassVar[Refusal]
    REFUSAL_INVALID: _ClassVar[Refusal]
    REFUSAL_NOT_A_MEMBER: _ClassVar[Refusal]
    REFUSAL_DIGEST_MISMATCH: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_BLOB: _ClassVar[Refusal]
    REFUSAL_NO_SPACE: _ClassVar[Refusal]
    REFUSAL_TOO_LARGE: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_TOKEN: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_CHECKPOINT: _ClassVar[Refusal]
    REFUSAL_RATE_LIMITED: _ClassVar[Refusal]
    REFUSAL_UNKNOWN_DATASET: _ClassVar[Refusal]
    REFUSAL_NAME_TAKEN: _ClassVar[Refusal]
    REFUSAL_CHECKPOINT_NEEDED: _ClassVar[Refusal]

class FailureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_KIND_UNSPECIFIED: _ClassVar[FailureKind]
    FAILURE_KIND_COLLECTIVE: _ClassVar[FailureKind]
    FAILURE_KIND_KILLED: _ClassVar[FailureKind]
    FAILURE_KIND_PROGRAM: _ClassVar[FailureKind]
    FAILURE_KIND_WEDGED: _ClassVar[FailureKind]
    FAILURE_KIND_DIVERGED: _ClassVar[FailureKind]
    FAILURE_KIND_RESTORE: _ClassVar[FailureKind]
    FAILURE_KIND_PREPARE: _ClassVar[FailureKind]

class Cut(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CUT_UNSPECIFIED: _ClassVar[Cut]
    CUT_AFTER_STEP: _ClassVar[Cut]
    CUT_ABORT: _ClassVar[Cut]
PROTOCOL_VERSION_UNSPECIFIED: ProtocolVersion
PROTOCOL_VERSION_1: ProtocolVersion
REFUSAL_UNSPECIFIED: Refusal
REFUSAL_PROTOCOL_VERSION: Refusal
REFUSAL_TOKEN_MALFORMED: Refusal
REFUSAL_TOKEN_UNKNOWN: Refusal
REFUSAL_TOKEN_EXPIRED: Refusal
REFUSAL_TOKEN_EXHAUSTED: Refusal
REFUSAL_TOKEN_REVOKED: Refusal
REFUSAL_BAD_CSR: Refusal
REFUSAL_UNKNOWN_AGENT: Refusal
REFUSAL_BANNED: Refusal
REFUSAL_WRONG_ROLE: Refusal
REFUSAL_DUPLICATE_IDENTITY: Refusal
REFUSAL_STALE_GENERATION: Refusal
REFUSAL_UNKNOWN_JOB: Refusal
REFUSAL_WRONG_PHASE: Refusal
REFUSAL_INVALID: Refusal
REFUSAL_NOT_A_MEMBER: Refusal
REFUSAL_DIGEST_MISMATCH: Refusal
REFUSAL_UNKNOWN_BLOB: Refusal
REFUSAL_NO_SPACE: Refusal
REFUSAL_TOO_LARGE: Refusal
REFUSAL_UNKNOWN_TOKEN: Refusal
REFUSAL_UNKNOWN_CHECKPOINT: Refusal
REFUSAL_RATE_LIMITED: Refusal
REFUSAL_UNKNOWN_DATASET: Refusal
REFUSAL_NAME_TAKEN: Refusal
REFUSAL_CHECKPOINT_NEEDED: Refusal
FAILURE_KIND_UNSPECIFIED: FailureKind
FAILURE_KIND_COLLECTIVE: FailureKind
FAILURE_KIND_KILLED: FailureKind
FAILURE_KIND_PROGRAM: FailureKind
FAILURE_KIND_WEDGED: FailureKind
FAILURE_KIND_DIVERGED: FailureKind
FAILURE_KIND_RESTORE: FailureKind
FAILURE_KIND_PREPARE: FailureKind
CUT_UNSPECIFIED: Cut
CUT_AFTER_STEP: Cut
CUT_ABORT: Cut

class EnrollRequest(_message.Message):
    __slots__ = ("protocol", "token_id", "secret", "csr_pem", "name")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    protocol: ProtocolVersion
    token_id: str
    secret: str
    csr_pem: bytes
    name: str
    def __init__(self, protocol: _Optional[_Union[ProtocolVersion, str]] = ..., token_id: _Optional[str] = ..., secret: _Optional[str] = ..., csr_pem: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("agent_id", "certificate_pem", "authority_pem", "not_after_unix_s", "port")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_PEM_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    certificate_pem: bytes
    authority_pem: bytes
    not_after_unix_s: int
    port: int
    def __init__(self, agent_id: _Optional[str] = ..., certificate_pem: _Optional[bytes] = ..., authority_pem: _Optional[bytes] = ..., not_after_unix_s: _Optional[int] = ..., port: _Optional[int] = ...) -> None: ...

class RenewIdentityRequest(_message.Message):
    __slots__ = ("csr_pem",)
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    def __init__(self, csr_pem: _Optional[bytes] = ...) -> None: ...

class RenewIdentityReply(_message.Message):
    __slots__ = ("certificate_pem", "not_after_unix_s")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    not_after_unix_s: int
    def __init__(self, certificate_pem: _Optional[bytes] = ..., not_after_unix_s: _Optional[int] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("index", "name", "memory_bytes", "capability_major", "capability_minor", "uuid")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_MAJOR_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_MINOR_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    memory_bytes: int
    capability_major: int
    capability_minor: int
    uuid: str
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., capability_major: _Optional[int] = ..., capability_minor: _Optional[int] = ..., uuid: _Optional[str] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("gpus", "driver_version", "torch_version", "backends", "cpu_count", "memory_bytes", "disk_free_bytes", "hostname", "advertise_host", "muster_version", "labels", "worker_count")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DRIVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    CPU_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    ADVERTISE_HOST_FIELD_NUMBER: _ClassVar[int]
    MUSTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    driver_version: str
    torch_version: str
    backends: _containers.RepeatedScalarFieldContainer[str]
    cpu_count: int
    memory_bytes: int
    disk_free_bytes: int
    hostname: str
    advertise_host: str
    muster_version: str
    labels: _containers.ScalarMap[str, str]
    worker_count: int
    def __init__(self, gpus: _Optional[_Iterable[_Union[Gpu, _Mapping]]] = ..., driver_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., backends: _Optional[_Iterable[str]] = ..., cpu_count: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., hostname: _Optional[str] = ..., advertise_host: _Optional[str] = ..., muster_version: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., worker_count: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "incarnation", "probe", "held", "torchrun_job", "weighs_uploads")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    TORCHRUN_JOB_FIELD_NUMBER: _ClassVar[int]
    WEIGHS_UPLOADS_FIELD_NUMBER: _ClassVar[int]
    protocol: ProtocolVersion
    incarnation: str
    probe: Probe
    held: Membership
    torchrun_job: str
    weighs_uploads: bool
    def __init__(self, protocol: _Optional[_Union[ProtocolVersion, str]] = ..., incarnation: _Optional[str] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., held: _Optional[_Union[Membership, _Mapping]] = ..., torchrun_job: _Optional[str] = ..., weighs_uploads: _Optional[bool] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("job_id", "generation")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "disk_free_bytes", "step", "activity", "tokens_per_s", "transfer_bytes", "transfer_total", "all_stored")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ALL_STORED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    disk_free_bytes: int
    step: int
    activity: str
    tokens_per_s: float
    transfer_bytes: int
    transfer_total: int
    all_stored: bool
    def __init__(self, sequence: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., step: _Optional[int] = ..., activity: _Optional[str] = ..., tokens_per_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transfer_total: _Optional[int] = ..., all_stored: _Optional[bool] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("job_id", "store_host", "store_port", "step", "holds_state", "state_digest", "assignment", "generation")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HOLDS_STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    store_host: str
    store_port: int
    step: int
    holds_state: bool
    state_digest: str
    assignment: int
    generation: int
    def __init__(self, job_id: _Optional[str] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., step: _Optional[int] = ..., holds_state: _Optional[bool] = ..., state_digest: _Optional[str] = ..., assignment: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Formed(_message.Message):
    __slots__ = ("job_id", "generation", "step", "state_digest", "healed")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEALED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    step: int
    state_digest: str
    healed: bool
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., state_digest: _Optional[str] = ..., healed: _Optional[bool] = ...) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("step", "loss", "slices", "data_digest", "tokens", "lr", "grad_norm", "skipped", "generation", "duration_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    DATA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    slices: int
    data_digest: int
    tokens: float
    lr: float
    grad_norm: float
    skipped: bool
    generation: int
    duration_s: float
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., slices: _Optional[int] = ..., data_digest: _Optional[int] = ..., tokens: _Optional[float] = ..., lr: _Optional[float] = ..., grad_norm: _Optional[float] = ..., skipped: _Optional[bool] = ..., generation: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("job_id", "generation", "steps", "evaluations")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    steps: _containers.RepeatedCompositeFieldContainer[StepRecord]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("step", "loss")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class WorkerFailed(_message.Message):
    __slots__ = ("job_id", "generation", "kind", "detail", "step", "unreachable")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    kind: FailureKind
    detail: str
    step: int
    unreachable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., kind: _Optional[_Union[FailureKind, str]] = ..., detail: _Optional[str] = ..., step: _Optional[int] = ..., unreachable: _Optional[_Iterable[str]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("job_id", "generation", "step")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    step: int
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("job_id", "generation")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class LogLines(_message.Message):
    __slots__ = ("job_id", "lines")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    lines: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job_id: _Optional[str] = ..., lines: _Optional[_Iterable[str]] = ...) -> None: ...

class Cached(_message.Message):
    __slots__ = ("whole", "added", "removed", "peer_port")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    PEER_PORT_FIELD_NUMBER: _ClassVar[int]
    whole: bool
    added: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    peer_port: int
    def __init__(self, whole: _Optional[bool] = ..., added: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ..., peer_port: _Optional[int] = ...) -> None: ...

class PeerFault(_message.Message):
    __slots__ = ("agent_id", "digest")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    digest: str
    def __init__(self, agent_id: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "ready", "formed", "progress", "failed", "finished", "released", "goodbye", "logs", "leaving", "cached", "peer_fault")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    LOGS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    PEER_FAULT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    ready: Ready
    formed: Formed
    progress: Progress
    failed: WorkerFailed
    finished: Finished
    released: Released
    goodbye: Goodbye
    logs: LogLines
    leaving: Leaving
    cached: Cached
    peer_fault: PeerFault
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., formed: _Optional[_Union[Formed, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., failed: _Optional[_Union[WorkerFailed, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., logs: _Optional[_Union[LogLines, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., cached: _Optional[_Union[Cached, _Mapping]] = ..., peer_fault: _Optional[_Union[PeerFault, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("agent_id", "heartbeat_interval_ms", "lease_ms", "rebuild_timeout_ms", "grace_ms")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    REBUILD_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    heartbeat_interval_ms: int
    lease_ms: int
    rebuild_timeout_ms: int
    grace_ms: int
    def __init__(self, agent_id: _Optional[str] = ..., heartbeat_interval_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ..., rebuild_timeout_ms: _Optional[int] = ..., grace_ms: _Optional[int] = ...) -> None: ...

class HeartbeatAck(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class ProgressAck(_message.Message):
    __slots__ = ("job_id", "step")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    step: int
    def __init__(self, job_id: _Optional[str] = ..., step: _Optional[int] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("job_id", "name", "spec_json", "dataset_json", "committed_step", "number", "signature", "certificate_pem")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASET_JSON_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    spec_json: str
    dataset_json: str
    committed_step: int
    number: int
    signature: bytes
    certificate_pem: str
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., spec_json: _Optional[str] = ..., dataset_json: _Optional[str] = ..., committed_step: _Optional[int] = ..., number: _Optional[int] = ..., signature: _Optional[bytes] = ..., certificate_pem: _Optional[str] = ...) -> None: ...

class Unassign(_message.Message):
    __slots__ = ("job_id", "reason")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    reason: str
    def __init__(self, job_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("agent_id", "group_rank", "first_rank", "worker_count", "host", "holds_state", "upload_weight")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    HOLDS_STATE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    group_rank: int
    first_rank: int
    worker_count: int
    host: str
    holds_state: bool
    upload_weight: int
    def __init__(self, agent_id: _Optional[str] = ..., group_rank: _Optional[int] = ..., first_rank: _Optional[int] = ..., worker_count: _Optional[int] = ..., host: _Optional[str] = ..., holds_state: _Optional[bool] = ..., upload_weight: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("job_id", "generation", "members", "store_host", "store_port", "cut", "committed_step", "committed_digest", "from_checkpoint", "checkpoint_json", "reason", "checkpoint_before_cut", "lineage")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FROM_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_JSON_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BEFORE_CUT_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    store_host: str
    store_port: int
    cut: Cut
    committed_step: int
    committed_digest: str
    from_checkpoint: bool
    checkpoint_json: str
    reason: str
    checkpoint_before_cut: bool
    lineage: int
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., cut: _Optional[_Union[Cut, str]] = ..., committed_step: _Optional[int] = ..., committed_digest: _Optional[str] = ..., from_checkpoint: _Optional[bool] = ..., checkpoint_json: _Optional[str] = ..., reason: _Optional[str] = ..., checkpoint_before_cut: _Optional[bool] = ..., lineage: _Optional[int] = ...) -> None: ...

class TakeCheckpoint(_message.Message):
    __slots__ = ("job_id", "generation")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class GoAway(_message.Message):
    __slots__ = ("reason", "message", "retry", "unmet")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    UNMET_FIELD_NUMBER: _ClassVar[int]
    reason: Refusal
    message: str
    retry: bool
    unmet: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reason: _Optional[_Union[Refusal, str]] = ..., message: _Optional[str] = ..., retry: _Optional[bool] = ..., unmet: _Optional[_Iterable[str]] = ...) -> None: ...

class Idle(_message.Message):
    __slots__ = ("reason", "unmet")
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNMET_FIELD_NUMBER: _ClassVar[int]
    reason: str
    unmet: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reason: _Optional[str] = ..., unmet: _Optional[_Iterable[str]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Revoked(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "heartbeat_ack", "progress_ack", "assignment", "unassign", "plan", "take_checkpoint", "go_away", "idle", "drain", "revoked")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_ACK_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_ACK_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    UNASSIGN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TAKE_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat_ack: HeartbeatAck
    progress_ack: ProgressAck
    assignment: Assignment
    unassign: Unassign
    plan: Plan
    take_checkpoint: TakeCheckpoint
    go_away: GoAway
    idle: Idle
    drain: Drain
    revoked: Revoked
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat_ack: _Optional[_Union[HeartbeatAck, _Mapping]] = ..., progress_ack: _Optional[_Union[ProgressAck, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., unassign: _Optional[_Union[Unassign, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., take_checkpoint: _Optional[_Union[TakeCheckpoint, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., idle: _Optional[_Union[Idle, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., revoked: _Optional[_Union[Revoked, _Mapping]] = ...) -> None: ...

class BlobChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class GetBlobRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class PutBlobRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: PutBlobHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[PutBlobHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutBlobHeader(_message.Message):
    __slots__ = ("digest", "bytes", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bytes: int
    offset: int
    def __init__(self, digest: _Optional[str] = ..., bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class PutBlobReply(_message.Message):
    __slots__ = ("existed",)
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    existed: bool
    def __init__(self, existed: _Optional[bool] = ...) -> None: ...

class FindBlobsRequest(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class FindBlobsReply(_message.Message):
    __slots__ = ("missing", "received")
    class ReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MISSING_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    missing: _containers.RepeatedScalarFieldContainer[str]
    received: _containers.ScalarMap[str, int]
    def __init__(self, missing: _Optional[_Iterable[str]] = ..., received: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PresignPutRequest(_message.Message):
    __slots__ = ("digest", "bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bytes: int
    def __init__(self, digest: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class PresignPutReply(_message.Message):
    __slots__ = ("url", "headers", "received")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    URL_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    url: str
    headers: _containers.ScalarMap[str, str]
    received: bool
    def __init__(self, url: _Optional[str] = ..., headers: _Optional[_Mapping[str, str]] = ..., received: _Optional[bool] = ...) -> None: ...

class PresignGetRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class PresignGetReply(_message.Message):
    __slots__ = ("url", "bytes")
    URL_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    url: str
    bytes: int
    def __init__(self, url: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class BlobTicket(_message.Message):
    __slots__ = ("agent_id", "digest", "not_after_unix_s", "signature")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    digest: str
    not_after_unix_s: int
    signature: bytes
    def __init__(self, agent_id: _Optional[str] = ..., digest: _Optional[str] = ..., not_after_unix_s: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class FindSourcesRequest(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class BlobSource(_message.Message):
    __slots__ = ("agent_id", "host", "port")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    host: str
    port: int
    def __init__(self, agent_id: _Optional[str] = ..., host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class BlobSources(_message.Message):
    __slots__ = ("ticket", "sources")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    ticket: BlobTicket
    sources: _containers.RepeatedCompositeFieldContainer[BlobSource]
    def __init__(self, ticket: _Optional[_Union[BlobTicket, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[BlobSource, _Mapping]]] = ...) -> None: ...

class FindSourcesReply(_message.Message):
    __slots__ = ("blobs",)
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[BlobSources]
    def __init__(self, blobs: _Optional[_Iterable[_Union[BlobSources, _Mapping]]] = ...) -> None: ...

class GetPeerBlobRequest(_message.Message):
    __slots__ = ("ticket", "offset")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ticket: BlobTicket
    offset: int
    def __init__(self, ticket: _Optional[_Union[BlobTicket, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class ReportShardRequest(_message.Message):
    __slots__ = ("job_id", "generation", "step", "index", "count", "digest", "bytes", "state_digest", "upload_bytes_per_s", "header_json")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    HEADER_JSON_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    generation: int
    step: int
    index: int
    count: int
    digest: str
    bytes: int
    state_digest: str
    upload_bytes_per_s: int
    header_json: str
    def __init__(self, job_id: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., index: _Optional[int] = ..., count: _Optional[int] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., state_digest: _Optional[str] = ..., upload_bytes_per_s: _Optional[int] = ..., header_json: _Optional[str] = ...) -> None: ...

class ReportShardReply(_message.Message):
    __slots__ = ("committed",)
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    def __init__(self, committed: _Optional[bool] = ...) -> None: ...
