"""What must hold after every event, whatever the events were."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.core.codec import decode_record, encode_record, encode_state, is_durable
from coordinator.core.evolve import evolve
from coordinator.core.forming import why
from coordinator.core.matching import counts, serving
from coordinator.core.model import (
    ENDED,
    AgentId,
    Cut,
    GenerationPlanned,
    JobId,
    JobPhase,
    JobRolledBack,
    ManifestCommitted,
    MemberLost,
    PushPlan,
    Record,
    Standing,
    State,
    StepsCommitted,
    StepsRolledBack,
    StepsUnrecorded,
)
from coordinator.core.settle import next_deadline, settle
from coordinator.core.step import Outcome


def check_state(state: State, now_ms: int) -> None:
    """The state is consistent and quiet."""
    serving: dict[AgentId, JobId] = {}
    for job in state.jobs.values():
        assert len(set(job.assigned)) == len(job.assigned)
        for agent_id in job.assigned:
            assert agent_id not in serving, f"{agent_id} serves two jobs"
            serving[agent_id] = job.job_id
        if job.phase in ENDED or job.phase is JobPhase.PAUSED:
            assert job.assigned == (), f"{job.phase} has agents"
        assert len(job.pending) <= 2
        assert all(c.step <= job.committed_step or c.damaged or c.given_up for c in job.checkpoints)
        generation = job.generation
        if generation is not None:
            assert generation.number == job.generation_count
            members = [m.agent_id for m in generation.members]
            assert len(set(members)) == len(members)
            assert not set(members) & set(generation.leaving)
            assert not set(generation.gone) & {*generation.holders, *generation.leaving}
            assert [m.group_rank for m in generation.members] == list(range(len(members)))
            ranks = [
                r for m in generation.members for r in range(m.first_rank, m.first_rank + m.worker_count)
            ]
            assert ranks == list(range(generation.world_size))
        assert why(state, job.job_id) is not None
    for agent in state.agents.values():
        assert agent.job_id == serving.get(agent.agent_id)
        if agent.readiness is not None:
            assert agent.readiness.job_id == agent.job_id
        if agent.standing is not Standing.ELIGIBLE:
            assert agent.job_id is None, f"{agent.agent_id} is {agent.standing} and serves"
    assert settle(state, now_ms) == (), "the state is not quiet"
    deadline = next_deadline(state)
    assert deadline is None or deadline > now_ms, f"woken at {deadline}, but it is {now_ms}"
    for job_id, places in state.agenda.places.items():
        assert places == sum(counts(state.agents[a]) for a in state.jobs[job_id].assigned)
    assert state.agenda.live.keys() == {j.job_id for j in state.jobs.values() if j.phase not in ENDED}


def check_nothing_held_was_given_up(
    state: State, held: Mapping[JobId, tuple[AgentId, ...]], outcome: Outcome
) -> None:
    """Promise 1: no committed step is lost while one up-to-date member lives."""
    proven_lost = {record.agent_id for record in outcome.records if isinstance(record, MemberLost)}
    wanted = {record.job_id for record in outcome.records if isinstance(record, JobRolledBack)}
    for record in outcome.records:
        if isinstance(record, StepsRolledBack) and record.job_id not in wanted:
            job = state.jobs[record.job_id]
            alive = [a for a in held.get(job.job_id, ()) if a not in proven_lost and serving(state, job, a)]
            assert not alive, f"rolled back to {record.to_step} although {alive} hold more"


class Journal:
    """Keeps the durable records of every step, and holds them against what must be true of their order."""

    def __init__(self, state: State) -> None:
        self.lines: list[str] = []
        self._timing = state.timing
        self._generation: dict[JobId, int] = {}
        self._step: dict[JobId, int] = {}
        self._stores: set[tuple[str, int]] = set()

    def check(self, outcome: Outcome) -> None:
        for record in outcome.records:
            self._check_record(record)
            if is_durable(record):
                line = encode_record(record)
                assert decode_record(line) == record
                self.lines.append(line)
        for push in outcome.pushes:
            if isinstance(push, PushPlan) and push.generation.from_checkpoint_step is not None:
                assert push.checkpoint_json, "a plan from a checkpoint names none"

    def _check_record(self, record: Record) -> None:
        match record:
            case GenerationPlanned(job_id=job_id, generation=generation):
                assert generation.number == self._generation.get(job_id, 0) + 1
                self._generation[job_id] = generation.number
                assert generation.committed_step == self._step.get(job_id, 0)
                if generation.members:
                    store = (generation.store_host, generation.store_port)
                    assert store not in self._stores, f"store {store} is used twice"
                    self._stores.add(store)
                    held = set(generation.holders) & {m.agent_id for m in generation.members}
                    sources = [bool(held), generation.from_checkpoint_step is not None, generation.fresh]
                    assert sum(sources) == 1, "a generation begins from exactly one source"
                    if generation.cut is Cut.AFTER_STEP:
                        assert generation.members[0].agent_id in held, "who holds the state leads"
            case StepsCommitted(job_id=job_id):
                assert record.first_step == self._step.get(job_id, 0) + 1
                assert record.last_step >= record.first_step
                self._step[job_id] = record.last_step
            case StepsUnrecorded(job_id=job_id):
                assert record.first_step == self._step.get(job_id, 0) + 1
                assert record.last_step >= record.first_step
                self._step[job_id] = record.last_step
            case StepsRolledBack(job_id=job_id):
                assert record.to_step < self._step.get(job_id, 0)
                self._step[job_id] = record.to_step
            case ManifestCommitted(job_id=job_id):
                assert record.checkpoint.step <= self._step.get(job_id, 0)
            case _:
                pass

    def replayed(self) -> State:
        state = State(timing=self._timing)
        for line in self.lines:
            evolve(state, decode_record(line))
        return state

    def check_replay(self, state: State) -> None:
        """Folding the journal gives the durable part of the state."""
        assert encode_state(self.replayed()) == encode_state(state)
