"""What must hold after every event.

A check costs what its event changed, so that thousands of agents can be checked at every step; the
checks of the whole state run at every event of a small fleet and now and then in a large one.
"""

from __future__ import annotations

import json
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

from coordinator.core.codec import decode_record, encode_state, is_durable
from coordinator.core.evolve import evolve, look_at_everything
from coordinator.core.model import (
    VOLATILE_OF_AGENT,
    VOLATILE_OF_JOB,
    Agent,
    AgentId,
    AgentUnassigned,
    Alone,
    CheckpointDamaged,
    CheckpointPinned,
    CheckpointRetired,
    CoordinatorStarted,
    Cut,
    EvaluationRecorded,
    Event,
    FormedReceived,
    GenerationPlanned,
    Job,
    JobId,
    JobRolledBack,
    ManifestCommitted,
    MemberFormed,
    MemberLost,
    Presence,
    PushPlan,
    Record,
    Refused,
    Standing,
    State,
    StepsCommitted,
    StepsRolledBack,
    StepsUnrecorded,
    Timing,
)
from coordinator.core.settle import next_deadline, settle
from coordinator.core.step import Outcome
from coordinator.journal import StepRow
from tests.core.invariants import check_state
from tests.sim.training import loss_of, shard_digest
from tests.sim.violation import require

if TYPE_CHECKING:
    from tests.sim.coordinator import Coordinator
    from tests.sim.fleet import Fleet

_DURABLE_OF_AGENT = attrgetter(*(f for f in Agent.__slots__ if f not in VOLATILE_OF_AGENT))
_DURABLE_OF_JOB = attrgetter(*(f for f in Job.__slots__ if f not in VOLATILE_OF_JOB))
LOOK_AT_ALL_EVERY = 20_000
SAMPLED_EVERY = 20
"""Of a large fleet's decisions, one in so many is held against what is written and what is due; a divisor of
the number above."""


class Checks:
    """Called by the simulated coordinator and agents; raises Violation or AssertionError."""

    fleet: Fleet

    def __init__(self, timing: Timing, *, thorough: bool) -> None:
        self.records: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.lost_for: Counter[str] = Counter()
        self.decisions = 0
        self._thorough = thorough
        self._timing = timing
        self._shadow = State(timing=timing)
        self._now_ms = 0
        # Of what is committed, by job.
        self._generation: dict[JobId, int] = {}
        self._step: dict[JobId, int] = {}
        self._lineage: dict[JobId, int] = {}  # what is of an earlier generation has been given up
        self._manifest_ms: dict[JobId, int] = {}
        self._members: dict[tuple[JobId, int], tuple[AgentId, ...]] = {}  # of each generation
        self._stores: dict[tuple[str, int], None] = {}
        self._acknowledged: dict[JobId, int] = {}
        self._lineage: dict[JobId, int] = {}  # generation that began the state which counts
        self._holes: dict[JobId, dict[int, None]] = {}  # steps without a record
        self._restorable: dict[JobId, dict[int, None]] = {}  # steps of checkpoints
        self.deleted: dict[JobId, None] = {}  # jobs of which an operator deleted a checkpoint
        self._pinned: dict[tuple[JobId, int], None] = {}

    # ------------------------------------------------------------------------- after every event

    def decided(self, state: State, now_ms: int, event: Event, outcome: Outcome, lines: list[str]) -> None:
        """The state has just evolved by what came of `event`."""
        require(now_ms >= self._now_ms, f"time went back from {self._now_ms} to {now_ms}")
        self._now_ms = now_ms
        self.decisions += 1
        if isinstance(outcome.reply, Refused):
            mine = [
                r for r in outcome.records if getattr(r, "agent_id", None) == getattr(event, "agent_id", "")
            ]
            require(not mine or not isinstance(event, FormedReceived), f"{event} was refused and counted")
        if lines:
            self._replay(state, outcome.records, lines)
        deadline: int | None = None
        if self._thorough or self.decisions % SAMPLED_EVERY == 0:
            deadline = next_deadline(state)
            require(deadline is None or deadline > now_ms, f"woken at {deadline}, but it is {now_ms}")
        for push in outcome.pushes:
            if isinstance(push, PushPlan):
                self._check_push(
                    state, push, [r.agent_id for r in outcome.records if isinstance(r, AgentUnassigned)]
                )
        if (lines or isinstance(event, CoordinatorStarted)) and self._thorough:
            check_state(state, now_ms)
            self._look_at_everything(state, now_ms, deadline)
        if self.decisions % LOOK_AT_ALL_EVERY == 0:
            check_state(state, now_ms)
            self._look_at_everything(state, now_ms, deadline)
            require(
                encode_state(state) == encode_state(self._shadow),
                "the journal, replayed, gives another state",
            )

    def _replay(self, state: State, records: tuple[Record, ...], lines: list[str]) -> None:
        """The journal gives the same: for everything that these records are about."""
        agents: dict[AgentId, None] = {}
        jobs: dict[JobId, None] = {}
        if not self._thorough and self.decisions % SAMPLED_EVERY:
            for record in records:
                if is_durable(record):
                    evolve(self._shadow, record)
                    self.records[type(record).__name__] += 1
            return
        for line in lines:
            record = decode_record(line)
            evolve(self._shadow, record)
            self.records[type(record).__name__] += 1
            if (agent_id := getattr(record, "agent_id", None)) is not None:
                agents[agent_id] = None
            if (job_id := getattr(record, "job_id", None)) is not None:
                jobs[job_id] = None
            if isinstance(record, GenerationPlanned):
                agents.update((m.agent_id, None) for m in record.generation.members)
        durable = [r for r in records if type(r).__name__ in self.records]
        require(len(durable) >= len(lines), "records were lost on their way to the journal")
        for agent_id in agents:
            same = _DURABLE_OF_AGENT(state.agents[agent_id]) == _DURABLE_OF_AGENT(
                self._shadow.agents[agent_id]
            )
            require(same, f"the journal, replayed, gives another agent {agent_id}")
        for job_id in jobs:
            same = _DURABLE_OF_JOB(state.jobs[job_id]) == _DURABLE_OF_JOB(self._shadow.jobs[job_id])
            require(same, f"the journal, replayed, gives another job {job_id}")

    def _check_push(self, state: State, push: PushPlan, unassigned: list[AgentId]) -> None:
        agent, generation = state.agents[push.agent_id], push.generation
        if agent.agent_id in unassigned:  # it is told so right after
            return
        require(
            agent.job_id == push.job_id, f"{push.agent_id} is told a plan of a job that it does not serve"
        )
        require(agent.last_generation > 0, f"{push.agent_id} stands by and is told a plan")
        if generation.from_checkpoint_step is not None and generation.formed_ms is None:
            require(
                push.checkpoint_json, f"generation {generation.number} begins from a checkpoint that is gone"
            )

    def _look_at_everything(self, state: State, now_ms: int, deadline: int | None) -> None:
        """The agenda is only a cache: with everything on it, nothing else is found."""
        afresh = State(
            timing=state.timing,
            tokens=dict(state.tokens),
            agents=dict(state.agents),
            jobs=dict(state.jobs),
            started_ms=state.started_ms,
        )
        look_at_everything(afresh)
        found = settle(afresh, now_ms)
        require(not found, f"the agenda hid what is due: {found[:1]}")
        due = next_deadline(afresh)
        late = due is not None and (deadline is None or deadline > due)
        require(not late, f"the agenda wakes at {deadline}, but something is due at {due}")

    # ------------------------------------------------------------------------- after every commit

    def committed(self, coordinator: Coordinator, event: Event, outcome: Outcome) -> None:
        """What came of `event` is durable."""
        for record in outcome.records:
            match record:
                case GenerationPlanned():
                    self._check_plan(coordinator, record)
                case StepsCommitted(job_id=job_id):
                    before = self._step.get(job_id, 0)
                    require(
                        record.first_step == before + 1, f"step {record.first_step} follows step {before}"
                    )
                    require(record.last_step >= record.first_step, "no step was committed")
                    self._step[job_id] = record.last_step
                    log = coordinator.step_log.get(job_id, {})
                    require(
                        record.last_step in log, f"step {record.last_step} is committed and not in the log"
                    )
                case MemberFormed(job_id=job_id):
                    require(record.generation == self._generation[job_id], "a stale generation was formed")
                case ManifestCommitted():
                    self._check_manifest(coordinator, record)
                    step = record.checkpoint.step
                    self._restorable.setdefault(record.job_id, {})[step] = None
                case EvaluationRecorded():
                    self._check_evaluation(coordinator, record)
                case CheckpointDamaged():
                    self._restorable[record.job_id].pop(record.step, None)
                case JobRolledBack():
                    self._check_rollback(record)
                case CheckpointPinned():
                    self._pinned.pop((record.job_id, record.step), None)
                    if record.pinned:
                        self._pinned[record.job_id, record.step] = None
                case CheckpointRetired():
                    self._check_retired(record)
                case MemberLost(evidence=evidence):
                    self.lost_for[evidence.value] += 1
                case _:
                    pass
            if self._is_told(record):
                self.fleet.told(record)

    @staticmethod
    def _is_told(record: Record) -> bool:
        return type(record).__name__ not in (
            "LeaseRenewed",
            "AgentReadied",
            "WaitChanged",
            "AgentIdled",
            "LeasesRefreshed",
        )

    def _check_plan(self, coordinator: Coordinator, record: GenerationPlanned) -> None:
        job_id, generation = record.job_id, record.generation
        number = self._generation.get(job_id, 0) + 1
        require(generation.number == number, f"generation {generation.number} is planned after {number - 1}")
        self._generation[job_id] = number
        if generation.fresh or generation.from_checkpoint_step is not None:
            self._lineage[job_id] = number
        step = self._step.get(job_id, 0)
        require(
            generation.committed_step == step, f"a plan says step {generation.committed_step}; it is {step}"
        )
        members = [m.agent_id for m in generation.members]
        self._members[job_id, number] = tuple(members)
        require(len(set(members)) == len(members), "an agent is twice in one generation")
        place = 0
        for rank, member in enumerate(generation.members):
            require(member.group_rank == rank, "group ranks have holes")
            require(member.first_rank == place, "ranks have holes")
            place += member.worker_count
        if not members:
            return
        store = (generation.store_host, generation.store_port)
        require(store not in self._stores, f"store {store} is used twice")
        self._stores[store] = None
        held = [a for a in generation.holders if a in members]
        sources = [bool(held), generation.from_checkpoint_step is not None, generation.fresh]
        require(sum(sources) == 1, f"generation {number} begins from {sum(sources)} sources")
        if generation.cut is Cut.AFTER_STEP:
            require(members[0] in held, "who leads after a planned cut does not hold the state")
        if generation.from_checkpoint_step is not None:
            newest = max(self._restorable.get(job_id, ()), default=0)
            require(
                generation.from_checkpoint_step == newest,
                f"a plan names checkpoint {generation.from_checkpoint_step}, not {newest}",
            )
            job = coordinator.state.jobs[job_id]
            found = [c for c in job.checkpoints if c.step == generation.from_checkpoint_step]
            if job.generation is generation:
                require(found and not found[0].damaged, "a plan names a checkpoint that is not restorable")

    def _check_evaluation(self, coordinator: Coordinator, record: EvaluationRecorded) -> None:
        truth, found = self.fleet.truth, record.evaluation
        unknown = found.step not in coordinator.step_log[record.job_id]
        if unknown or record.job_id in truth.tainted or record.job_id in truth.corrupted:
            return
        vote = truth.of_row(coordinator.step_log[record.job_id][found.step].loss)
        require(
            found.loss == loss_of(vote.after),
            f"the loss of step {found.step} is of another state than the recorded one",
        )

    def _check_rollback(self, record: JobRolledBack) -> None:
        self._lineage[record.job_id] = self._generation.get(record.job_id, 0) + 1
        steps = self._restorable[record.job_id]
        require(record.to_step in steps, f"taken back to {record.to_step}, which cannot be restored")
        given_up = [step for step in steps if step > record.to_step]
        pinned = [step for step in given_up if (record.job_id, step) in self._pinned]
        require(not pinned, f"pinned checkpoints {pinned} were given up")
        for step in given_up:
            del steps[step]

    def _check_retired(self, record: CheckpointRetired) -> None:
        steps = self._restorable.get(record.job_id, {})
        pinned = (record.job_id, record.step) in self._pinned
        require(not pinned, f"checkpoint {record.step} is pinned, and gone")
        require(
            record.step not in steps or len(steps) > 1,
            f"checkpoint {record.step} was the only one that could be restored, and is gone",
        )
        steps.pop(record.step, None)
        if record.by:
            self.deleted[record.job_id] = None

    def _check_manifest(self, coordinator: Coordinator, record: ManifestCommitted) -> None:
        job_id, checkpoint = record.job_id, record.checkpoint
        require(checkpoint.committed_ms >= self._manifest_ms.get(job_id, 0), "manifests went back in time")
        self._manifest_ms[job_id] = checkpoint.committed_ms
        require(
            checkpoint.step <= self._step.get(job_id, 0), f"checkpoint {checkpoint.step} is of the future"
        )
        self._check_witnesses(record)
        manifest = json.loads(checkpoint.manifest_json)
        shards = manifest["shards"]
        require([s["index"] for s in shards] == list(range(len(shards))), "a manifest lacks shards")
        for shard in shards:
            require(shard["digest"] in coordinator.blobs, f"shard {shard['index']} is named and not stored")
            right = shard_digest(job_id, checkpoint.state_digest, shard["index"], len(shards))
            require(
                shard["digest"] == right,
                f"shard {shard['index']} of checkpoint {checkpoint.step} is of another state",
            )
        honest = self.fleet.truth.is_honest(job_id, checkpoint.state_digest, checkpoint.step)
        require(honest, f"checkpoint {checkpoint.step} holds a state of another step")

    def _check_witnesses(self, record: ManifestCommitted) -> None:
        """Two members of the generations that took it say the same of its state, or it says why one was enough."""
        checkpoint = record.checkpoint
        for word in checkpoint.witnesses:
            members = self._members[record.job_id, word.generation]
            require(word.agent_id in members, f"{word} is not of a member")
        agree = {w.agent_id for w in checkpoint.witnesses if w.state_digest == checkpoint.state_digest}
        require(
            (checkpoint.alone is None) == (len(agree) >= 2),
            f"checkpoint {checkpoint.step} was committed on the word of {len(agree)}: {checkpoint.alone}",
        )
        if checkpoint.alone is Alone.ONLY_MEMBER:
            numbers = {checkpoint.generation, *(w.generation for w in checkpoint.witnesses)}
            everybody = {a for number in numbers for a in self._members[record.job_id, number]}
            require(len(everybody) == 1, f"the only member of {len(everybody)} vouched")

    def unrecorded(self, record: StepsUnrecorded) -> None:
        """The log gets a hole: nobody who is there may know what was in it."""
        job_id = record.job_id
        require(record.first_step == self._step.get(job_id, 0) + 1, "a hole that does not follow")
        require(record.last_step >= record.first_step, "a hole without a step")
        self._step[job_id] = record.last_step
        self._holes.setdefault(job_id, {}).update(
            dict.fromkeys(range(record.first_step, record.last_step + 1))
        )
        for machine in self.fleet.machines:
            process = machine.process
            if process is None or not process.alive or process.job is None or not process.connected:
                continue
            run = process.job
            if run.job_id != job_id or run.stopping or machine.cut_up or machine.cut_down:
                continue
            first = run.ledger.first_step
            knows = first and first <= record.last_step and run.reports_steps
            require(not knows, f"steps {record.first_step} to {record.last_step} are known to {process.name}")

    def logged(self, step_log: dict[JobId, dict[int, StepRow]], row: StepRow) -> None:
        """A step has been added to the log."""
        job_id = JobId(row.job_id)
        log = step_log[job_id]
        known = len(log) + len(self._holes.get(job_id, ()))
        require(known == row.step, f"step {row.step} of {job_id} is in a log of {known} steps")
        training = self.fleet.trainings[job_id]
        require(row.slices == training.slices, f"step {row.step} was committed with {row.slices} slices")
        right = self.fleet.truth.data(row.step, training.slices)
        require(row.data_digest == right, f"step {row.step} was committed with other data")
        vote = self.fleet.truth.of_row(row.loss)
        require(
            (vote.job_id, vote.step) == (job_id, row.step), f"step {row.step} is recorded with another's vote"
        )
        require(vote.completed, f"step {row.step} is recorded, but its vote completed nowhere")
        if row.step - 1 in log and job_id not in self.fleet.truth.tainted:
            self._check_descent(log, row)

    def _check_descent(self, log: dict[int, StepRow], row: StepRow) -> None:
        """A recorded step was made of the one before it: the log is one history, not two spliced."""
        truth = self.fleet.truth
        vote, before = truth.of_row(row.loss), truth.of_row(log[row.step - 1].loss)
        require(
            vote.before == before.after or vote.before in self.fleet.other_starts,
            f"step {row.step} of generation {vote.generation} was not made of the recorded step "
            f"{before.step} of generation {before.generation}",
        )

    def rolled_back(self, coordinator: Coordinator, record: StepsRolledBack, *, wanted: bool) -> None:
        job_id = record.job_id
        before = self._step.get(job_id, 0)
        require(record.to_step < before, f"rolled back from {before} to {record.to_step}")
        self._step[job_id] = record.to_step
        for step in [s for s in self._holes.get(job_id, ()) if s > record.to_step]:
            del self._holes[job_id][step]
        self._acknowledged[job_id] = min(self._acknowledged.get(job_id, 0), record.to_step)
        if not wanted:
            self.fleet.nobody_holds(job_id, before, self._lineage.get(job_id, 0))

    # ------------------------------------------------------------------------- of the shell

    def acknowledged(self, job_id: JobId, step: int) -> None:
        """An agent was told that steps up to this one are recorded."""
        require(step <= self._step.get(job_id, 0), f"step {step} was acknowledged before it was recorded")
        self._acknowledged[job_id] = max(step, self._acknowledged.get(job_id, 0))

    def refused(self, reply: Refused) -> None:
        self.refusals[reply.refusal.name] += 1
        self.fleet.world.tell(f"refused: {reply.refusal.name}: {reply.message}")

    def unrestorable(self, digests: list[str]) -> None:
        """A plan's leader found a checkpoint incomplete."""
        missing = [d for d in digests if d not in self.fleet.coordinator.blobs]
        require(not missing, "a checkpoint was to be restored that was never stored in full")

    def restarted(self, state: State, journal: list[str], step_log: dict[JobId, dict[int, StepRow]]) -> None:
        """A coordinator has read its journal."""
        shadow = State(timing=self._timing)
        for line in journal:
            evolve(shadow, decode_record(line))
        require(encode_state(shadow) == encode_state(state), "snapshot and journal give different states")
        self._shadow = shadow
        self._now_ms = 0
        for job_id, job in state.jobs.items():
            require(
                job.committed_step >= self._acknowledged.get(job_id, 0),
                f"steps up to {self._acknowledged.get(job_id)} were acknowledged; {job.committed_step} are remembered",
            )
            require(job.generation_count == self._generation.get(job_id, 0), "a generation was forgotten")
            known = len(step_log.get(job_id, {})) + len(self._holes.get(job_id, ()))
            require(known == job.committed_step, "the step log and the state differ")

    def finish(self, state: State) -> None:
        """At the end of a run."""
        require(
            encode_state(state) == encode_state(self._shadow), "the journal, replayed, gives another state"
        )
        for agent in state.agents.values():
            if agent.standing is not Standing.ELIGIBLE or agent.presence is Presence.ABSENT:
                require(agent.job_id is None, f"{agent.agent_id} may not train and serves")
