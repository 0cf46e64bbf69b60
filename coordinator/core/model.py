"""The core's nouns: what the coordinator knows (state), what it hears (events), what it keeps
(records), what it answers (replies) and what it tells agents (pushes).

Everything here is a frozen value except `State`, which only `evolve` changes.  Nothing here knows
about gRPC, SQLite, certificates or the clock: times are integers in milliseconds handed in by the
shell, ids and random numbers arrive inside events, and every collection has an order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NewType

AgentId = NewType("AgentId", str)
JobId = NewType("JobId", str)
TokenId = NewType("TokenId", str)
SessionId = NewType("SessionId", str)


# ------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One budget: everything follows from `lease_ms`.  See `Timing.from_lease`."""

    lease_ms: int
    heartbeat_ms: int
    grace_ms: int
    """How long a closed session may stay closed before that alone is evidence of loss."""
    rebuild_timeout_ms: int
    """How long a member may take to confirm a plan once its old generation has ended."""
    quarantine_base_ms: int
    """First cool-down of a flapping agent; doubles each time."""
    quarantine_max_ms: int
    forgive_ms: int
    """An agent without a strike for this long has one strike forgiven."""
    prepare_timeout_ms: int = 1_800_000
    """An assigned agent that neither gets ready nor fetches anything for so long is given up, and not given
    to the same job again for as long."""

    @property
    def witness_ms(self) -> int:
        """How long a checkpoint whose shards are all stored waits for a second member's word for it: as long
        as a member may take to confirm a plan."""
        return self.rebuild_timeout_ms

    @staticmethod
    def from_lease(lease_ms: int) -> Timing:
        """Derive the budget.  `lease_ms` is 200 to 600,000; below a second is for machines in one room."""
        return Timing(
            lease_ms=lease_ms,
            heartbeat_ms=max(50, lease_ms // 4),
            grace_ms=lease_ms // 2,
            rebuild_timeout_ms=max(5_000, 2 * lease_ms),
            quarantine_base_ms=4 * lease_ms,
            quarantine_max_ms=3_600_000,
            forgive_ms=600_000,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a job asks of an agent; empty means anyone."""

    backend: str | None = None
    min_gpu_memory_bytes: int = 0
    min_compute_capability: tuple[int, int] = (0, 0)
    min_torch: tuple[int, int] = (0, 0)
    min_disk_free_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """The part of a job file that the coordinator decides by; the rest is `spec_json`, opaque."""

    name: str
    spec_json: str
    dataset_json: str
    launch: str  # "muster": agents start the workers; "torchrun": people run torchrun themselves
    min_nodes: int
    max_nodes: int
    priority: int
    requires: Requirements
    max_failures: int
    last_call_ms: int
    """How long a generation (or a gathering at min_nodes) waits for more agents to come along."""
    min_generation_ms: int
    """A joiner does not cut a generation younger than this."""
    step_timeout_ms: int
    """No step may take longer; a planned cut waits this long for its step boundary."""
    keep_checkpoints: int
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it are kept; 0: none is for that."""
    keep_best: int = 0
    """So many checkpoints with the lowest evaluation loss are kept."""
    signature: str = ""
    """The submitting operator's, hex, for the agents; empty if it was submitted without."""
    certificate_pem: str = ""
    """Of that operator."""


# ----------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFacts:
    """An agent's Hello, bounded and checked by the codec."""

    gpus: tuple[GpuFacts, ...] = ()
    driver_version: str = ""
    torch_version: str = ""
    backends: tuple[str, ...] = ("gloo",)
    cpu_count: int = 1
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    hostname: str = ""
    advertise_host: str = ""
    muster_version: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    worker_count: int = 1
    weighs_uploads: bool = False  # its workers divide shards by `Member.upload_weight`


class Presence(enum.Enum):
    """Is it alive?"""

    ABSENT = "absent"  # never came, or said goodbye
    READY = "ready"
    SUSPECT = "suspect"  # one sign of death, not yet two
    LOST = "lost"


class Standing(enum.Enum):
    """May it train?"""

    ELIGIBLE = "eligible"
    QUARANTINED = "quarantined"
    BANNED = "banned"


class JobPhase(enum.Enum):
    QUEUED = "QUEUED"  # no agent assigned
    GATHERING = "GATHERING"  # agents assigned, no generation yet
    RUNNING = "RUNNING"  # a generation is live
    RECOVERING = "RECOVERING"  # a generation was lost; forming the next, or waiting for agents
    PAUSED = "PAUSED"
    STOPPING = "STOPPING"  # cutting after a step and saving the last checkpoint
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({JobPhase.COMPLETED, JobPhase.FAILED, JobPhase.CANCELLED})


class Cut(enum.Enum):
    AFTER_STEP = "after_step"
    ABORT = "abort"


class FailureKind(enum.Enum):
    COLLECTIVE = "collective"
    KILLED = "killed"
    PROGRAM = "program"
    WEDGED = "wedged"
    DIVERGED = "diverged"
    RESTORE = "restore"
    PREPARE = "prepare"


class Evidence(enum.Enum):
    """A sign that an agent, or its worker, is gone."""

    WORKER_EXIT = "worker_exit"
    GOODBYE = "goodbye"
    SESSION_CLOSED = "session_closed"
    PEER_COLLECTIVE = "peer_collective"
    LEASE_EXPIRED = "lease_expired"
    NEW_INCARNATION = "new_incarnation"
    NOT_FORMED = "not_formed"  # missed the rebuild deadline
    BANNED = "banned"
    UNREADY = "unready"  # it no longer serves the job (quarantined, diverged, unassigned)


class Why(enum.Enum):
    """Reasons for waiting, refusing and changing phase: shown by the CLI, compared by tests."""

    # why a NotYet waits
    NO_AGENT = "no_agent"
    BELOW_MIN = "below_min"
    PREPARING = "preparing"
    LAST_CALL = "last_call"
    MIN_GENERATION = "min_generation"
    FORMING = "forming"
    NOTHING_TO_DO = "nothing_to_do"
    UNREACHABLE = "unreachable"  # a member that is needed has no open session; it is expected back
    RELEASING = "releasing"  # members are still leaving the last generation
    CHECKPOINTING = "checkpointing"  # the last checkpoint is still being stored
    # why a checkpoint whose shards are all stored is not committed
    ONE_WITNESS = "one_witness"  # a second member has to say that its state is the same
    STATES_DIFFER = "states_differ"  # members say that their states are not the same
    # why a phase changed
    SUBMITTED = "submitted"
    AGENTS_ASSIGNED = "agents_assigned"
    FORMED = "formed"
    MEMBER_LOST = "member_lost"
    MEMBER_JOINED = "member_joined"
    MEMBER_DRAINED = "member_drained"
    RETRY = "retry"
    RESTARTED_WORKER = "restarted_worker"
    PAUSED_BY_OPERATOR = "paused_by_operator"
    RESUMED_BY_OPERATOR = "resumed_by_operator"
    SCALED_BY_OPERATOR = "scaled_by_operator"
    ROLLED_BACK_BY_OPERATOR = "rolled_back_by_operator"
    STOPPED_BY_OPERATOR = "stopped_by_operator"
    CANCELLED_BY_OPERATOR = "cancelled_by_operator"
    FINISHED = "finished"
    MAX_FAILURES = "max_failures"
    # agents
    FLAPPING = "flapping"
    BY_OPERATOR = "by_operator"
    DIVERGED = "diverged"
    COOLED_DOWN = "cooled_down"


class Alone(enum.Enum):
    """Why the word of less than two members was enough for a checkpoint; shown to operators."""

    ONLY_MEMBER = "only_member"  # the generation had no other
    MEMBERS_GONE = "members_gone"  # nobody else who was in the generation is left
    MEMBERS_SILENT = "members_silent"  # nobody else has said anything in time


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """Why a job does not form (or re-form) now: `NotYet(why=BELOW_MIN, have=1, need=2)`."""

    why: Why
    have: int = 0
    need: int = 0
    until_ms: int | None = None


# ----------------------------------------------------------------------------------- state


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    token_id: TokenId
    secret_sha256: str
    note: str
    created_ms: int
    expires_ms: int
    uses_left: int
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """The newest Ready of an agent: it is warm for this job and names a store no generation has used."""

    job_id: JobId
    store_host: str
    store_port: int
    holds_state: bool
    step: int
    state_digest: str
    assignment: int = 0  # which of the agent's assignments it is ready for; 0 is not compared
    generation: int = 0  # in which the state was last agreed on


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    agent_id: AgentId
    name: str
    certificate_serial: str
    admitted_ms: int
    facts: AgentFacts = AgentFacts()
    presence: Presence = Presence.ABSENT
    presence_since_ms: int = 0
    standing: Standing = Standing.ELIGIBLE
    standing_why: Why | None = None
    standing_detail: str = ""
    quarantined_until_ms: int | None = None  # None with QUARANTINED: until released
    draining: bool = False
    drain_reason: str = ""
    drain_until_left: bool = False  # its owner asked for the drain: over when this process is gone
    incarnation: str = ""
    job_id: JobId | None = None
    assignments: int = 0  # how often it was assigned: a Ready of an earlier one is late
    torchrun_job: str = ""
    strikes: int = 0
    last_strike_ms: int = 0
    dissents: int = 0  # how often its state was not that of its peers when a checkpoint was taken
    accusers: tuple[AgentId, ...] = ()  # to whom it served wrong bytes, by their word; at most MOST_ACCUSERS
    kept_from: tuple[tuple[JobId, int], ...] = ()  # jobs it was not ready for in time, each until when
    last_generation: int = 0  # newest generation of `job_id` that it was planned into and not released from
    failed_generation: int = (
        0  # newest one of `job_id` that its worker's end cost it: a repeated report is told
    )
    # volatile: not journalled, rebuilt after a restart
    session_id: SessionId | None = None
    session_closed_ms: int | None = None
    lease_until_ms: int = 0
    readiness: Readiness | None = None
    step: int = 0
    activity: str = ""
    tokens_per_s: float = 0.0
    disk_free_bytes: int = 0
    upload_bytes_per_s: int = 0  # of late, as it measured; 0 if that is not known
    progress_ms: int = 0  # when it last got on with its preparation, or began it
    fetched_bytes: int = 0  # the most that it said to have fetched since then
    held_job: JobId | None = None  # what it believed to serve when its session opened
    idle_reason: str = ""  # what it was last told when it serves no job
    idle_unmet: tuple[str, ...] = ()

    @property
    def mistrusted(self) -> bool:
        """Whether others are no longer sent to its cache.  One agent's word is not enough: it may lie."""
        return len(self.accusers) >= MISTRUSTED_BY


MISTRUSTED_BY = 2
MOST_ACCUSERS = 16

VOLATILE_OF_AGENT = frozenset(
    {
        "session_id",
        "session_closed_ms",
        "lease_until_ms",
        "readiness",
        "step",
        "activity",
        "tokens_per_s",
        "disk_free_bytes",
        "upload_bytes_per_s",
        "progress_ms",
        "fetched_bytes",
        "held_job",
        "idle_reason",
        "idle_unmet",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    agent_id: AgentId
    group_rank: int
    first_rank: int
    worker_count: int
    host: str
    upload_weight: int = (
        0  # its part of a checkpoint's shards is in proportion to this; 0: all have equal parts
    )
    holds_state: bool = False
    """Whether its state counted when the generation was planned.  All members are told the same of it, whenever
    they hear of the plan: else each would take another's state for the one to heal from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    number: int
    members: tuple[Member, ...]  # in group_rank order
    store_host: str
    store_port: int
    cut: Cut
    why: Why
    planned_ms: int
    deadline_ms: int  # members that have not confirmed by then are NOT_FORMED
    committed_step: int
    committed_digest: str
    from_checkpoint_step: int | None  # None: from memory (or fresh, if committed_step is 0)
    fresh: bool
    checkpoint_before_cut: bool = False
    formed: tuple[AgentId, ...] = ()  # who has confirmed
    formed_ms: int | None = None  # when all had
    finished: tuple[AgentId, ...] = ()
    finished_step: int = 0
    leaving: tuple[AgentId, ...] = ()
    """Agents of superseded generations that are not members here and have not said they are out."""
    uploading: tuple[AgentId, ...] = ()
    """Agents that left at the cut of a generation without members, and have not said that all they had of its
    checkpoint is stored."""
    gone: tuple[AgentId, ...] = ()
    """Members, or agents leaving, that are out for good though their agent may live."""
    holders: tuple[AgentId, ...] = ()
    """Agents whose workers have the committed state in memory."""
    formed_step: int = 0  # the lowest step that those who have confirmed say they start from
    checkpoint_asked: bool = False  # a checkpoint was asked for outside its turn
    disputed_step: int = 0  # of a checkpoint at which its members' states differed, until somebody was named
    formed_digest: str = ""  # state digest on which all that have confirmed agree, else empty
    # (peer evidence) members that reported a failed collective in this generation
    collective_failed: tuple[AgentId, ...] = ()
    collective_failed_ms: int | None = None
    unreachable: tuple[tuple[AgentId, AgentId], ...] = ()
    """(who, whom): who could not reach whom while this generation formed."""

    @property
    def world_size(self) -> int:
        return sum(m.worker_count for m in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    index: int
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who was in a generation that is over: whose word counts for a checkpoint that it took."""

    number: int
    members: tuple[AgentId, ...]  # as planned, in group_rank order
    gone: tuple[AgentId, ...]
    """Of those, whose worker or process of that time is no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """A member's word for the digest of the state that a checkpoint is of."""

    agent_id: AgentId
    generation: int
    state_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCheckpoint:
    step: int
    generation: int
    count: int
    state_digest: str
    header_json: str
    shards: tuple[Shard, ...]  # by index
    witnesses: tuple[Witness, ...] = ()  # who vouches for `state_digest`, or says another; in order of coming
    whole_ms: int = 0  # when the last of its shards was stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    step: int
    generation: int
    manifest_json: str  # canonical JSON and its seal: docs/checkpoints.md
    manifest_digest: str  # of the canonical JSON, which is what is sealed
    state_digest: str
    bytes: int
    committed_ms: int
    damaged: str = ""  # why it cannot be restored, if found so
    evaluation_loss: float | None = None  # after exactly this step; None if it was not evaluated
    pinned_by: str = ""  # the operator who wants it kept; empty if nobody does
    given_up: bool = False  # an operator went back before it: its steps will be made anew
    doubted_by: tuple[AgentId, ...] = ()  # leaders that could not restore it, which may be their own fault
    sealed: bool = False  # false: of a coordinator that did not sign manifests yet
    witnesses: tuple[Witness, ...] = ()  # as of the pending checkpoint; none: of an older coordinator
    alone: Alone | None = None  # None: two members agreed, or it is of an older coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The loss on the held-out slices after a step."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """An operator took the job back to a checkpoint."""

    at_ms: int
    from_step: int
    to_step: int
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    job_id: JobId
    spec: JobSpec
    submitted_ms: int
    order: int  # of submission
    phase: JobPhase = JobPhase.QUEUED
    phase_why: Why = Why.SUBMITTED
    phase_detail: str = ""
    phase_since_ms: int = 0
    assigned: tuple[AgentId, ...] = ()  # in order of assignment; seniority among non-members
    generation: Generation | None = None  # the newest; live unless superseded
    generation_count: int = 0  # numbers are never reused, so this is the last number given out
    committed_step: int = 0
    committed_digest: str = ""  # of committed_step if it is known, else empty
    total_tokens: float = 0.0
    failures: int = 0
    last_failure: str = ""
    checkpoints: tuple[Checkpoint, ...] = ()  # by step
    pending: tuple[PendingCheckpoint, ...] = ()  # by step; at most 2
    rosters: tuple[Roster, ...] = ()  # of the last few generations before the newest
    evaluations: tuple[Evaluation, ...] = ()  # the newest few, by step: their checkpoint may be on its way
    gathered_ms: int | None = None  # when min_nodes were first ready (last call starts)
    standby_ms: int | None = None  # when the first ready standby appeared while RUNNING
    known_from: int = 0  # the lowest step beyond a gap that a member has the record of; 0 if there is no gap
    rollback: Rollback | None = None  # the last one
    lineage: int = 0
    """Number of the last generation that began from a checkpoint or afresh; after a rollback, of the one
    that will.  What an older generation
    still has to say about steps belongs to a state that was given up."""
    failed_step: int = 0  # committed_step when a failure was last counted
    failed_generation: int = 0  # a generation's failure counts once, however many members report it
    failed_agent: AgentId | None = None  # whose failure in a generation was counted last
    prepare_failed: tuple[AgentId, ...] = ()  # whose failures outside a generation were counted


VOLATILE_OF_JOB = frozenset({"gathered_ms", "standby_ms", "known_from"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """Who is there for a job: see `forming.roll`."""

    alive: tuple[AgentId, ...]  # of the newest generation
    draining: tuple[AgentId, ...]  # of those
    lost: tuple[AgentId, ...]  # without whom the newest generation cannot go on
    ready: tuple[AgentId, ...]  # and in no generation
    preparing: bool  # whether somebody is on its way to being ready
    unfit: tuple[AgentId, ...]  # assigned, and absent, not eligible or draining
    inside: frozenset[AgentId]  # alive, or still leaving the generation before


@dataclass(slots=True, kw_only=True)
class Agenda:
    """What `settle` has to look at: derived from the rest of the state, so never stored or compared.

    `evolve` adds what a record touched; `settle` takes off what it found quiet and notes when to look
    again.  Dicts are sets in order of insertion."""

    agents: dict[AgentId, None] = field(default_factory=dict)
    jobs: dict[JobId, None] = field(default_factory=dict)
    slots: bool = False  # some job may want agents that it did not want before
    live: dict[JobId, None] = field(default_factory=dict)  # jobs that have not ended
    places: dict[JobId, int] = field(default_factory=dict)  # taken places, of jobs where it is known
    rolls: dict[JobId, Roll] = field(default_factory=dict)  # of jobs where it is known
    due: dict[tuple[str, str], int] = field(default_factory=dict)  # ("agent" | "job", id) -> when
    heap: list[tuple[int, str, str]] = field(default_factory=list)  # of `due`, with stale entries


@dataclass(slots=True, kw_only=True)
class State:
    timing: Timing
    agenda: Agenda = field(default_factory=Agenda, compare=False, repr=False)
    started_ms: int = field(default=0, compare=False)  # when this coordinator began; volatile
    tokens: dict[TokenId, Token] = field(default_factory=dict)
    agents: dict[AgentId, Agent] = field(default_factory=dict)
    jobs: dict[JobId, Job] = field(default_factory=dict)


# ----------------------------------------------------------------------------------- events in


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A deadline passed, or the shell just wants `settle` to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrollAsked:
    token_id: TokenId
    secret_sha256: str
    agent_id: AgentId
    name: str
    certificate_serial: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRenewed:
    agent_id: AgentId
    certificate_serial: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    agent_id: AgentId
    session_id: SessionId
    incarnation: str
    facts: AgentFacts
    held_job: JobId | None
    held_generation: int
    torchrun_job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed:
    agent_id: AgentId
    session_id: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReceived:
    agent_id: AgentId
    session_id: SessionId
    step: int
    activity: str
    tokens_per_s: float
    disk_free_bytes: int
    fetched_bytes: int = 0
    """Of the dataset or checkpoint that it is fetching."""
    all_stored: bool = False
    """Whether every shard that its workers have written is stored and reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyReceived:
    agent_id: AgentId
    readiness: Readiness


@dataclass(frozen=True, slots=True, kw_only=True)
class FormedReceived:
    agent_id: AgentId
    job_id: JobId
    generation: int
    step: int
    state_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReceived:
    """The steps' own data (loss, ...) stays in the shell; the core needs the range and its fence.

    `first_step .. last_step` are contiguous.  The reply is `ProgressAccepted(first_step, last_step)`
    with the part that is new, which the shell stores in the same transaction."""

    agent_id: AgentId
    job_id: JobId
    generation: int
    first_step: int
    last_step: int
    tokens: float
    evaluations: tuple[Evaluation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationsReceived:
    """Evaluations without steps: these had been acknowledged before."""

    agent_id: AgentId
    job_id: JobId
    generation: int
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailedReceived:
    agent_id: AgentId
    job_id: JobId
    generation: int
    kind: FailureKind
    detail: str
    step: int
    unreachable: tuple[AgentId, ...] = ()
    """With a failed collective, while a generation forms: members that its workers could not reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedReceived:
    agent_id: AgentId
    job_id: JobId
    generation: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedReceived:
    agent_id: AgentId
    job_id: JobId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsked:
    """The agent's owner wants it to leave after a step: the same as a drain by the operator."""

    agent_id: AgentId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodbyeReceived:
    agent_id: AgentId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReported:
    """The shell has verified that a blob with this digest and size is stored.

    With an empty `digest`: the agent has no shard to store, and vouches for the state's digest."""

    agent_id: AgentId
    job_id: JobId
    generation: int
    step: int
    index: int
    count: int
    digest: str
    bytes: int
    state_digest: str
    header_json: str
    upload_bytes_per_s: int = 0  # how fast the agent has uploaded of late; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongBytesReported:
    """Bytes that `peer_id` alone had served to `agent_id` were not the blob it had asked for."""

    agent_id: AgentId
    peer_id: AgentId
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongBytesSent:
    """What `agent_id` has uploaded as the blob `digest` hashes to something else; nothing of it was kept."""

    agent_id: AgentId
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSubmitted:
    job_id: JobId
    spec: JobSpec


class JobAction(enum.Enum):
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    CANCEL = "cancel"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCommanded:
    job_id: JobId
    action: JobAction


@dataclass(frozen=True, slots=True, kw_only=True)
class JobScaled:
    job_id: JobId
    min_nodes: int
    max_nodes: int


class CheckpointAction(enum.Enum):
    PIN = "pin"
    UNPIN = "unpin"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommanded:
    job_id: JobId
    step: int
    action: CheckpointAction
    by: str
    """The operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackAsked:
    """Go back to a checkpoint, whatever the members hold."""

    job_id: JobId
    step: int
    by: str
    """The operator."""


class AgentAction(enum.Enum):
    DRAIN = "drain"
    QUARANTINE = "quarantine"
    RELEASE = "release"
    BAN = "ban"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCommanded:
    agent_id: AgentId
    action: AgentAction
    reason: str
    until_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAsked:
    token_id: TokenId
    secret_sha256: str
    note: str
    expires_ms: int
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRevokeAsked:
    token_id: TokenId


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStarted:
    """First event after a restart.  Every agent that was alive gets one fresh lease, spread over
    `spread_ms` in the order of the agents, so that they do not all expire at one moment."""

    spread_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageFound:
    """The shell has read a checkpoint again, and it is not what was committed."""

    job_id: JobId
    step: int
    manifest_digest: str
    """Of the one that was read: another may have come at the same step since."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SealAsked:
    """Commit again, sealed, what was committed by a coordinator that did not sign manifests yet."""


Event = (
    Tick
    | EnrollAsked
    | IdentityRenewed
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
    | JobSubmitted
    | JobCommanded
    | JobScaled
    | CheckpointCommanded
    | RollbackAsked
    | AgentCommanded
    | TokenAsked
    | TokenRevokeAsked
    | CoordinatorStarted
    | SealAsked
    | DamageFound
)


# ----------------------------------------------------------------------------------- records kept
# A record is a fact with the time at which it was decided.  `evolve(state, record)` is total: replaying
# the durable records of a journal gives the durable part of the state.


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCreated:
    at_ms: int
    token: Token


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRevoked:
    at_ms: int
    token_id: TokenId


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAdmitted:
    at_ms: int
    agent_id: AgentId
    token_id: TokenId
    name: str
    certificate_serial: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRenewed:
    at_ms: int
    agent_id: AgentId
    certificate_serial: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentArrived:
    """A session opened with these facts (durable: after a restart we know what the agent was)."""

    at_ms: int
    agent_id: AgentId
    session_id: SessionId
    incarnation: str
    facts: AgentFacts
    torchrun_job: str
    held_job: JobId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReturned:
    """An agent that was counted as lost speaks again in a session that had stayed open (it was frozen)."""

    at_ms: int
    agent_id: AgentId


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSuspected:
    at_ms: int
    agent_id: AgentId
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLost:
    at_ms: int
    agent_id: AgentId
    evidence: tuple[Evidence, ...]
    striked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLeft:
    at_ms: int
    agent_id: AgentId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDraining:
    at_ms: int
    agent_id: AgentId
    draining: bool
    reason: str
    until_left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingChanged:
    at_ms: int
    agent_id: AgentId
    standing: Standing
    why: Why
    detail: str
    until_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StrikeCounted:
    at_ms: int
    agent_id: AgentId
    strikes: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAssigned:
    at_ms: int
    agent_id: AgentId
    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentUnassigned:
    at_ms: int
    agent_id: AgentId
    job_id: JobId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationGivenUp:
    """The agent did not get ready for the job in time, and is not given to it again before `until_ms`."""

    at_ms: int
    agent_id: AgentId
    job_id: JobId
    until_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationForgiven:
    """The agent may be given to the job again."""

    at_ms: int
    agent_id: AgentId
    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAdmitted:
    at_ms: int
    job_id: JobId
    spec: JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPhaseChanged:
    at_ms: int
    job_id: JobId
    phase: JobPhase
    why: Why
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRescaled:
    at_ms: int
    job_id: JobId
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlanned:
    """Supersedes the job's previous generation.  `generation.members` may be empty: everyone is
    released at the cut (pause, stop)."""

    at_ms: int
    job_id: JobId
    generation: Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFormed:
    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    step: int
    state_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFinished:
    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReleased:
    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStored:
    """An agent that left at the cut has nothing more to store of the last checkpoint."""

    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberLost:
    """A member, or an agent still leaving, is out of the generation for good; its agent may live and
    come back as a joiner.  (A member whose *agent* is lost needs no such record: it is a member again
    if it returns before a new generation was planned.)"""

    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    evidence: Evidence
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveFailed:
    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    unreachable: tuple[AgentId, ...] = ()  # members that it could not reach, while the generation formed


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesDiffered:
    """The agent's shard is of another state than its peers' of the same generation and step: some memory is
    damaged.  The generation forms again, which heals whoever is in the minority and finds it out."""

    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    step: int
    peers: tuple[AgentId, ...] = ()  # who had said otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberDissented:
    """Whose state is held to be the wrong one after StatesDiffered, before the generation forms again."""

    at_ms: int
    job_id: JobId
    generation: int
    agent_id: AgentId
    step: int
    peers: tuple[AgentId, ...]  # whose states differ from its own
    outvoted: bool  # false: as many say the one as the other, and it is the junior
    dissents: int  # of the agent, with this one


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureCounted:
    at_ms: int
    job_id: JobId
    agent_id: AgentId
    failure: FailureKind
    detail: str
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsCommitted:
    at_ms: int
    job_id: JobId
    generation: int
    first_step: int
    last_step: int
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsUnrecorded:
    """The members' state has these steps, but whoever had their records is gone: the step log has a hole."""

    at_ms: int
    job_id: JobId
    first_step: int
    last_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsRolledBack:
    """Training goes on from a checkpoint, since all state was lost or an operator wants it; later steps will
    be computed again.
    The shell deletes steps after `to_step` from the step log in the same transaction."""

    at_ms: int
    job_id: JobId
    to_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRolledBack:
    """An operator took the job back to the checkpoint of `to_step`: its generation is over, what the members
    hold counts for nothing, and newer checkpoints are not restored.  StepsRolledBack follows if there
    are later steps."""

    at_ms: int
    job_id: JobId
    from_step: int
    to_step: int
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecorded:
    at_ms: int
    job_id: JobId
    generation: int
    step: int
    count: int
    shard: Shard
    state_digest: str
    header_json: str
    witness: Witness | None = None  # whose word it is, where it counts and was not given before


@dataclass(frozen=True, slots=True, kw_only=True)
class StateWitnessed:
    """A member's word for the state of a checkpoint, without a shard: it had none, or it was stored before."""

    at_ms: int
    job_id: JobId
    generation: int
    step: int
    count: int
    header_json: str
    witness: Witness


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestCommitted:
    at_ms: int
    job_id: JobId
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingDropped:
    """An unfinished checkpoint was given up (superseded or fenced off)."""

    at_ms: int
    job_id: JobId
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDoubted:
    """A leader could not restore it.  Another is tried before it counts as damaged."""

    at_ms: int
    job_id: JobId
    step: int
    agent_id: AgentId
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDamaged:
    at_ms: int
    job_id: JobId
    step: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRetired:
    """It is no more; the sweep takes its blobs."""

    at_ms: int
    job_id: JobId
    step: int
    by: str = ""  # the operator who deleted it; empty: nothing keeps it


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPinned:
    at_ms: int
    job_id: JobId
    step: int
    pinned: bool
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecorded:
    at_ms: int
    job_id: JobId
    evaluation: Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWanted:
    """A checkpoint is to be taken after the current step: the operator asked, or (`reason`) one was lost."""

    at_ms: int
    job_id: JobId
    generation: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAccused:
    """An agent says that the bytes which this one served it were wrong."""

    at_ms: int
    agent_id: AgentId
    by: AgentId
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTrusted:
    """The operator does not hold against the agent what others said of the bytes it served."""

    at_ms: int
    agent_id: AgentId


# volatile records: applied to the state, never written to the journal


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRenewed:
    at_ms: int
    agent_id: AgentId
    until_ms: int
    step: int
    activity: str
    tokens_per_s: float
    disk_free_bytes: int
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnded:
    at_ms: int
    agent_id: AgentId


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReadied:
    at_ms: int
    agent_id: AgentId
    readiness: Readiness | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentIdled:
    """The agent is told why it serves no job."""

    at_ms: int
    agent_id: AgentId
    reason: str
    unmet: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadMeasured:
    """How fast an agent uploads, by its own word."""

    at_ms: int
    agent_id: AgentId
    bytes_per_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitChanged:
    """Bookkeeping of `gathered_ms` / `standby_ms` of a job."""

    at_ms: int
    job_id: JobId
    gathered_ms: int | None
    standby_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSeen:
    """A member has records from `known_from` on, and nobody has yet sent those before."""

    at_ms: int
    job_id: JobId
    known_from: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesRefreshed:
    at_ms: int
    until_ms: tuple[tuple[AgentId, int], ...]


DurableRecord = (
    TokenCreated
    | TokenRevoked
    | AgentAdmitted
    | CertificateRenewed
    | AgentArrived
    | AgentReturned
    | AgentSuspected
    | AgentLost
    | AgentLeft
    | AgentDraining
    | StandingChanged
    | StrikeCounted
    | AgentAssigned
    | AgentUnassigned
    | JobAdmitted
    | JobPhaseChanged
    | JobRescaled
    | GenerationPlanned
    | MemberFormed
    | MemberFinished
    | MemberReleased
    | MemberStored
    | MemberLost
    | CollectiveFailed
    | StatesDiffered
    | MemberDissented
    | FailureCounted
    | StepsCommitted
    | StepsUnrecorded
    | StepsRolledBack
    | JobRolledBack
    | ShardRecorded
    | StateWitnessed
    | ManifestCommitted
    | PendingDropped
    | CheckpointDoubted
    | CheckpointDamaged
    | CheckpointRetired
    | CheckpointPinned
    | EvaluationRecorded
    | CheckpointWanted
    | PeerAccused
    | PeerTrusted
    | PreparationGivenUp
    | PreparationForgiven
)
VolatileRecord = (
    LeaseRenewed
    | SessionEnded
    | AgentReadied
    | AgentIdled
    | UploadMeasured
    | WaitChanged
    | GapSeen
    | LeasesRefreshed
)
Record = DurableRecord | VolatileRecord


# ----------------------------------------------------------------------------------- replies out


class Refusal(enum.IntEnum):
    """Same numbers as `muster.v1.Refusal` in protos/agent.proto (a test compares them)."""

    PROTOCOL_VERSION = 1
    TOKEN_MALFORMED = 2
    TOKEN_UNKNOWN = 3
    TOKEN_EXPIRED = 4
    TOKEN_EXHAUSTED = 5
    TOKEN_REVOKED = 6
    BAD_CSR = 7
    UNKNOWN_AGENT = 8
    BANNED = 9
    WRONG_ROLE = 10
    DUPLICATE_IDENTITY = 11
    STALE_GENERATION = 12
    UNKNOWN_JOB = 13
    WRONG_PHASE = 14
    INVALID = 15
    NOT_A_MEMBER = 16
    DIGEST_MISMATCH = 17
    UNKNOWN_BLOB = 18
    NO_SPACE = 19
    TOO_LARGE = 20
    UNKNOWN_TOKEN = 21
    UNKNOWN_CHECKPOINT = 22
    RATE_LIMITED = 23
    UNKNOWN_DATASET = 24
    NAME_TAKEN = 25
    CHECKPOINT_NEEDED = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    refusal: Refusal
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Done; what was decided is in the records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressAccepted:
    """Steps `first_new_step .. last_step` are new; nothing is if first_new_step > last_step."""

    first_new_step: int
    last_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAccepted:
    committed: bool


Reply = Refused | Accepted | ProgressAccepted | ShardAccepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    records: tuple[Record, ...] = ()
    reply: Reply = Accepted()


# ----------------------------------------------------------------------------------- pushes to agents


@dataclass(frozen=True, slots=True, kw_only=True)
class PushAssignment:
    agent_id: AgentId
    job_id: JobId
    number: int = 0  # of the agent's assignments


@dataclass(frozen=True, slots=True, kw_only=True)
class PushUnassign:
    agent_id: AgentId
    job_id: JobId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    agent_id: AgentId
    job_id: JobId
    generation: Generation
    checkpoint_json: str  # manifest to restore; empty unless generation.from_checkpoint_step
    lineage: int = 0  # the job's


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTakeCheckpoint:
    agent_id: AgentId
    job_id: JobId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PushDrain:
    agent_id: AgentId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushIdle:
    agent_id: AgentId
    reason: str
    unmet: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushGoAway:
    """The shell closes the session (and refuses the identity if BANNED) after sending it."""

    agent_id: AgentId
    refusal: Refusal
    message: str
    retry: bool


Push = PushAssignment | PushUnassign | PushPlan | PushTakeCheckpoint | PushDrain | PushIdle | PushGoAway
