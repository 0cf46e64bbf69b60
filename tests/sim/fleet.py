"""A whole fleet: machines, a coordinator, jobs, and what is done to them.  `run` is one seed's life."""

from __future__ import annotations

import json
import random
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from agent import control
from coordinator.core.checkpoints import restorable
from coordinator.core.codec import describe
from coordinator.core.forming import why
from coordinator.core.model import (
    ENDED,
    AgentAction,
    AgentCommanded,
    AgentId,
    CheckpointAction,
    CheckpointCommanded,
    EnrollAsked,
    Event,
    FailureKind,
    Generation,
    JobAction,
    JobCommanded,
    JobId,
    JobPhase,
    JobScaled,
    JobSpec,
    JobSubmitted,
    Presence,
    Record,
    Refused,
    Reply,
    Requirements,
    RollbackAsked,
    Standing,
    State,
    Timing,
    TokenAsked,
    TokenId,
)
from tests.sim.agent import REACH_PATIENCE_MS, Machine, Process
from tests.sim.checks import Checks
from tests.sim.coordinator import Coordinator
from tests.sim.faults import Fault, Kind, make_faults
from tests.sim.training import Group, Worker, lie_about
from tests.sim.truth import Truth
from tests.sim.violation import Violation, require
from tests.sim.world import World

TOKEN = TokenId("token")
CROWD = 100
"""From so many agents on, what costs much and finds little is left out: see `Fleet.crowded`."""


@dataclass(slots=True, kw_only=True)
class Training:
    """A job as its members know it."""

    job_id: str
    spec: JobSpec
    step_ms: int
    slices: int
    steps: int
    shards: int
    checkpoint_every: int
    collective_timeout_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a seed's fleet is."""

    agents: int
    faulty_ms: int
    lease_ms: int
    gap_ms: int
    burst: int
    latency_ms: tuple[int, int]
    warm_ms: tuple[int, int]
    trainings: tuple[Training, ...] = field(repr=False)


def make_settings(seed: int, agents: int | None = None, minutes: float | None = None) -> Settings:
    """A fleet of a few agents and a minute or two, or of as many and as long as asked for."""
    chance = random.Random(f"fleet of {seed}")
    count = chance.choice((2, 3, 3, 4, 4, 5, 6, 8)) if agents is None else agents
    crowd = count >= CROWD
    lease_ms = 30_000 if crowd else chance.choice((1_000, 2_000, 2_000, 4_000))
    faulty_ms = int(60_000 * (chance.choice((0.5, 1.0, 1.0, 2.0)) if minutes is None else minutes))
    jobs = max(1, count // 250) if crowd else (2 if count >= 4 and chance.random() < 0.3 else 1)
    room = count
    trainings = []
    for place in range(jobs):
        max_nodes = max(1, room // (jobs - place))
        if not crowd:
            max_nodes = max(1, max_nodes - chance.choice((0, 0, 1)))
        room -= max_nodes
        min_nodes = max(1, chance.randrange(1, max_nodes + 1) if not crowd else max_nodes // 2)
        trainings.append(
            Training(
                job_id=f"job{place}",
                spec=JobSpec(
                    name=f"job{place}",
                    spec_json="{}",
                    dataset_json="",
                    launch="muster",
                    min_nodes=min_nodes,
                    max_nodes=min(1_024, max_nodes),
                    priority=chance.randrange(2),
                    requires=Requirements(),
                    max_failures=10 if crowd else chance.choice((3, 10, 10)),
                    last_call_ms=chance.choice((200, 1_000, 3_000)),
                    min_generation_ms=60_000 if crowd else chance.choice((0, 1_000, 5_000)),
                    step_timeout_ms=30_000 if crowd else chance.choice((3_000, 10_000)),
                    keep_checkpoints=chance.choice((1, 2, 3)),
                    keep_every=chance.choice((0, 0, 20, 100)),
                    keep_best=chance.choice((0, 1)),
                ),
                step_ms=5_000 if crowd else chance.choice((50, 100, 300)),
                slices=chance.choice((1, 4, 8, 12)) if not crowd else 2 * max_nodes,
                steps=chance.choice((60, 10**9, 10**9)) if not crowd else 10**9,
                shards=chance.choice((1, 2, 3, 5)) if not crowd else 16,
                checkpoint_every=chance.choice((5, 10, 50)) if not crowd else 20,
                collective_timeout_ms=chance.choice((10_000, 30_000)),
            )
        )
    return Settings(
        agents=count,
        faulty_ms=faulty_ms,
        lease_ms=lease_ms,
        gap_ms=20_000 if crowd else chance.choice((2_000, 5_000, 8_000)),
        burst=count // 4 if crowd else 3,
        latency_ms=chance.choice(((0, 1), (1, 20), (10, 150))),
        warm_ms=chance.choice(((50, 200), (300, 3_000))),
        trainings=tuple(trainings),
    )


class Fleet:
    """One run.  `crowded`: reports of steps do not queue in control sockets, and commits take no time."""

    def __init__(
        self,
        seed: int,
        settings: Settings,
        faults: Sequence[Fault],
        show: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.crowded = settings.agents >= CROWD
        timing = Timing.from_lease(settings.lease_ms)
        self.timing = replace(
            timing, prepare_timeout_ms=2 * timing.rebuild_timeout_ms
        )  # or nobody is given up
        self.world = World(seed, show)
        self.truth = Truth()
        self.checks = Checks(self.timing, thorough=not self.crowded)
        self.checks.fleet = self
        self.coordinator = Coordinator(
            self.world, self.timing, self.checks, snapshots=self.world.chance(0.5), hasty=self.crowded
        )
        self.machines: list[Machine] = []
        self.trainings = {JobId(t.job_id): replace(t) for t in settings.trainings}
        self.faults = list(faults)
        self.injected: Counter[str] = Counter()
        self.calm = True
        self.sessions = 0
        self.recovery_ms: list[int] = []
        self.other_starts: dict[str, None] = {}
        self._sides: dict[str, int] = {}
        self._cut_pairs: Counter[tuple[str, str]] = Counter()
        self._incarnations = 0
        self._agents = 0
        self._groups: dict[tuple[str, int], Group] = {}
        self._holders: tuple[Generation | None, list[int]] = (None, [])
        self._faulty = True

    # ------------------------------------------------------------------------- a seed's life

    def run(self) -> None:
        """Raise Violation, or another AssertionError, if something is wrong."""
        self.coordinator.start()
        self.command(TokenAsked(token_id=TOKEN, secret_sha256="s", note="", expires_ms=10**15, uses=10**9))
        for training in self.trainings.values():
            self.truth.begin(training)
            self.command(JobSubmitted(job_id=JobId(training.job_id), spec=training.spec))
        for number in range(self.settings.agents):
            self.add_machine().start(0 if number % 2 else self.world.between(0, 3_000))
        for fault in self.faults:
            self.world.at(fault.at_ms, self._inject, fault)
        self.world.run(self.settings.faulty_ms)
        self._heal()
        self._expect_training()
        self._expect_ends()
        self.checks.finish(self.coordinator.state)

    def add_machine(self) -> Machine:
        workers = 2 if not self.crowded and self.world.chance(0.2) else 1
        machine = Machine(self, f"m{len(self.machines)}", workers)
        self.machines.append(machine)
        return machine

    def enroll(self, machine: Machine) -> None:
        """A machine without an identity asks for one; where the coordinator does not answer, again later."""
        coordinator = self.coordinator
        if not coordinator.listens or machine.cut_up or machine.cut_down:
            machine.start(self.world.between(500, 2_000))
            return
        self._agents += 1
        agent_id = AgentId(f"{machine.name}-{self._agents}")
        event = EnrollAsked(
            token_id=TOKEN, secret_sha256="s", agent_id=agent_id, name=machine.name, certificate_serial="1"
        )

        def enrolled(_: State, reply: Reply) -> None:
            require(not isinstance(reply, Refused), f"{agent_id} was refused: {reply}")
            if machine.agent_id is None:
                machine.agent_id = agent_id
            machine.start(machine.latency_ms())

        coordinator.submit(event, released=enrolled)
        # If the coordinator dies before it answers, this machine tries again.
        machine.start(self.world.between(2_000, 4_000))

    def command(self, event: Event, expect: type[Reply] | None = None) -> None:
        """What an operator does; whether it was refused is no matter."""
        del expect
        self.coordinator.submit(event)

    def next_incarnation(self) -> str:
        self._incarnations += 1
        return f"process{self._incarnations}"

    def exited(self, machine: Machine, reason: str) -> None:
        """An agent has ended by itself; somebody starts it again after a while."""
        if reason == "BANNED":
            machine.agent_id = None
            machine.blobs.clear()
        machine.start(self.world.between(2_000, 8_000))

    def told(self, record: Record) -> None:
        self.world.tell(describe(record))

    # ------------------------------------------------------------------------- the data plane

    def group(self, training: Training, plan: control.Plan) -> Group:
        key = (training.job_id, plan.generation)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(self, training, plan)
            for old in [k for k in self._groups if k[0] == key[0] and k[1] < key[1] - 20]:
                del self._groups[old]
        return group

    def holder_ranks(self, plan: Generation) -> list[int]:
        """The ranks whose state counts by `plan`."""
        if self._holders[0] is not plan:
            members = (m for m in plan.members if m.holds_state)
            ranks = [r for m in members for r in range(m.first_rank, m.first_rank + m.worker_count)]
            self._holders = (plan, ranks)
        return self._holders[1]

    def connected(self, machines: list[Machine]) -> bool:
        """Whether all of these reach each other."""
        if len(machines) > 1 and any(m.cut_data for m in machines):
            return False
        if self._cut_pairs:
            names = {m.name for m in machines}
            if any(one in names and other in names for one, other in self._cut_pairs):
                return False
        return len({self._sides.get(m.name, 0) for m in machines}) <= 1

    def reaches(self, machine: Machine, name: str) -> bool:
        """Whether packets pass between a machine and the one of this name, both ways."""
        other = next(m for m in self.machines if m.name == name)
        return machine is other or self.connected([machine, other])

    def look_calm(self) -> None:
        """Whether nobody is frozen or cut off, so that groups need not look."""
        self.calm = not (self._sides or self._cut_pairs) and not any(
            m.cut_data or (m.process is not None and self._frozen(m.process)) for m in self.machines
        )

    @staticmethod
    def _frozen(process: Process) -> bool:
        return process.alive and (
            process.frozen
            or (process.job is not None and any(s.worker.frozen for s in process.job.slots.values()))
        )

    # ------------------------------------------------------------------------- faults

    def _inject(self, fault: Fault) -> None:
        if not self._faulty:
            return
        self.world.tell(f"fault {fault}")
        if self._do(fault, self.machines[fault.target % len(self.machines)]):
            self.injected[fault.kind.value] += 1

    def _do(self, fault: Fault, machine: Machine) -> bool:
        """Whether there was something to do."""
        kind, ms = fault.kind, fault.ms
        process = machine.process if machine.process is not None and machine.process.alive else None
        match kind:
            case Kind.KILL_AGENT | Kind.POWER_LOSS | Kind.LOSE_DISK:
                if process is None:
                    return False
                process.die(kind.value, silent=kind is Kind.POWER_LOSS)
                if kind is Kind.LOSE_DISK:
                    machine.agent_id = None
                    machine.blobs.clear()
                machine.start(ms)
            case Kind.KILL_WORKER | Kind.CRASH_WORKER:
                return self._kill_worker(process, kind, fault.number)
            case Kind.FREEZE | Kind.FREEZE_AGENT | Kind.FREEZE_WORKER | Kind.WEDGE_WORKER:
                return self._freeze(process, kind, ms)
            case Kind.CUT_BOTH | Kind.CUT_UP | Kind.CUT_DOWN | Kind.CUT_DATA | Kind.CUT_ALL:
                up = int(kind in (Kind.CUT_BOTH, Kind.CUT_UP, Kind.CUT_ALL))
                down = int(kind in (Kind.CUT_BOTH, Kind.CUT_DOWN, Kind.CUT_ALL))
                data = int(kind in (Kind.CUT_DATA, Kind.CUT_ALL))
                machine.cut(up=up, down=down, data=data)
                self.world.after(ms, self._uncut, machine, up, down, data)
            case Kind.CUT_PAIR:
                others = [m.name for m in self.machines if m is not machine]
                pair = (machine.name, others[fault.number % len(others)])
                self._cut_pairs[pair] += 1
                self.look_calm()
                self.world.after(ms, self._mend, pair)
            case Kind.SPLIT:
                self._sides = {m.name: self.world.between(0, 1) for m in self.machines}
                self.look_calm()
                self.world.after(ms, self._unsplit)
            case Kind.BREAK_SESSION:
                if process is None or process.session is None:
                    return False
                process._break(process.session)
            case Kind.SLOW:
                machine.slow_ms += min(ms, 5_000)
                self.world.after(10_000, self._speed_up, machine, min(ms, 5_000))
            case Kind.FLAP:
                for turn in range(5):
                    self.world.after(turn * (ms + 1_000), self._flap, machine)
            case Kind.CLONE:
                return self._clone(machine, ms)
            case (
                Kind.LIE_READY
                | Kind.LIE_FORMED
                | Kind.LIE_TO_PEERS
                | Kind.LIE_VOUCHING
                | Kind.NEVER_VOUCH
                | Kind.CORRUPT
            ):
                return self._lie(process, kind)
            case Kind.CLOCK_JUMP:
                if process is None or process.session is None:
                    return False
                process._heard_ms -= ms
            case Kind.AGENT_DISK_FULL:
                machine.full += 1
                self.world.after(ms, self._free_machine, machine)
            case Kind.NO_DATA:
                machine.prepare_fails = 1 + fault.number % 2
            case Kind.HANG:
                machine.hangs += 1
                machine.fetches = fault.number % 2 == 0
                self.world.after(3 * self.timing.prepare_timeout_ms, self._unhang, machine)
                self._kill_worker(process, Kind.KILL_WORKER, fault.number)
            case Kind.BURST:
                for _ in range(fault.target):
                    self.add_machine().start(self.world.between(0, 200))
            case Kind.LEAVE:
                if process is None or process.frozen:
                    return False
                process.drain("SIGTERM")
            case Kind.DRAIN | Kind.QUARANTINE | Kind.BAN:
                return self._command_agent(machine, kind, ms)
            case (
                Kind.PAUSE
                | Kind.RESUME
                | Kind.SCALE
                | Kind.TAKE_CHECKPOINT
                | Kind.KILL_ALL
                | Kind.DAMAGE_CHECKPOINT
                | Kind.ROLL_BACK
                | Kind.PIN
                | Kind.DELETE_CHECKPOINT
            ):
                return self._to_job(fault)
            case _:
                return self._to_coordinator(kind, ms)
        return True

    def _kill_worker(self, process: Process | None, kind: Kind, number: int) -> bool:
        worker = self._worker(process, number)
        if worker is None:
            return False
        failure = FailureKind.KILLED if kind is Kind.KILL_WORKER else FailureKind.PROGRAM
        worker.run.kill(worker, failure, kind.value)
        return True

    @staticmethod
    def _worker(process: Process | None, number: int) -> Worker | None:
        if process is None or process.job is None or not process.job.slots:
            return None
        slots = [process.job.slots[i] for i in sorted(process.job.slots)]
        return slots[number % len(slots)].worker

    def _freeze(self, process: Process | None, kind: Kind, ms: int) -> bool:
        if process is None:
            return False
        workers: list[Worker] = []
        if kind is not Kind.FREEZE_AGENT and process.job is not None:
            workers = [slot.worker for slot in process.job.slots.values()]
        if kind in (Kind.FREEZE_WORKER, Kind.WEDGE_WORKER):
            workers = workers[:1]
            if not workers:
                return False
        if kind in (Kind.FREEZE, Kind.FREEZE_AGENT):
            process.freeze()
        for worker in workers:
            worker.freeze()
            if kind in (Kind.FREEZE_WORKER, Kind.WEDGE_WORKER):
                worker.run.worker_frozen(worker, answers=kind is Kind.WEDGE_WORKER)
        self.look_calm()
        self.world.after(ms if kind is not Kind.WEDGE_WORKER else 10 * ms, self._thaw, process, workers)
        return True

    def _thaw(self, process: Process, workers: list[Worker]) -> None:
        for worker in workers:
            worker.thaw()
        process.thaw()
        self.look_calm()

    def _uncut(self, machine: Machine, up: int, down: int, data: int) -> None:
        if self._faulty:
            machine.cut(up=-up, down=-down, data=-data)

    def _mend(self, pair: tuple[str, str]) -> None:
        self._cut_pairs -= Counter([pair])  # which drops what comes to nothing
        self.look_calm()

    def _unsplit(self) -> None:
        self._sides = {}
        self.look_calm()

    def _speed_up(self, machine: Machine, ms: int) -> None:
        machine.slow_ms = max(0, machine.slow_ms - ms)

    def _flap(self, machine: Machine) -> None:
        if self._faulty and machine.process is not None and machine.process.alive:
            machine.process.die("flapping")
            machine.start(self.world.between(100, 900))

    def _clone(self, machine: Machine, ms: int) -> bool:
        if machine.agent_id is None:
            return False
        clone = self.add_machine()
        clone.name = f"{machine.name}-clone{len(self.machines)}"
        clone.agent_id = machine.agent_id
        clone.start()
        self.world.after(4 * ms, self._end_clone, clone)
        return True

    def _end_clone(self, clone: Machine) -> None:
        clone.shunned = True
        if clone.process is not None:
            clone.process.die("the clone ends")

    def _lie(self, process: Process | None, kind: Kind) -> bool:
        if process is None or process.job is None:
            return False
        if kind is Kind.LIE_READY:
            process.lies_ready = True
        elif kind is Kind.LIE_FORMED:
            process.lies_formed = True
        elif kind is Kind.LIE_VOUCHING:
            process.lies_vouching = True
        elif kind is Kind.NEVER_VOUCH:
            process.never_vouches = True
        else:
            return self._lie_in_memory(process, kind)
        return True

    def _lie_in_memory(self, process: Process, kind: Kind) -> bool:
        """Only where two others hold the state: nobody can tell which of two is wrong."""
        assert process.job is not None
        holders = [
            m
            for m in self.machines
            if m.process is not None
            and m.process.job is not None
            and m.process.job.job_id == process.job.job_id
            and self._holds(m.process, 0)
        ]
        worker = self._worker(process, 0)
        if worker is None or not worker.holds or len(holders) < 4:
            return False
        if kind is Kind.LIE_TO_PEERS:
            worker.lies = True
        else:
            worker.corrupt = True
            worker.digest = lie_about(worker.digest)
            self.truth.corrupted[process.job.job_id] = None
        return True

    def _command_agent(self, machine: Machine, kind: Kind, ms: int) -> bool:
        if machine.agent_id is None:
            return False
        action = {
            Kind.DRAIN: AgentAction.DRAIN,
            Kind.QUARANTINE: AgentAction.QUARANTINE,
            Kind.BAN: AgentAction.BAN,
        }[kind]
        until_ms = self.coordinator.state.agents[machine.agent_id].lease_until_ms + ms if ms % 3 else None
        self.command(
            AgentCommanded(
                agent_id=machine.agent_id,
                action=action,
                reason="why not",
                until_ms=until_ms if kind is Kind.QUARANTINE else None,
            )
        )
        if kind is not Kind.BAN and until_ms is not None:
            release = AgentCommanded(
                agent_id=machine.agent_id, action=AgentAction.RELEASE, reason="", until_ms=None
            )
            self.world.after(4 * ms, self.command, release)
        return True

    def _to_job(self, fault: Fault) -> bool:
        training = list(self.trainings.values())[fault.target % len(self.trainings)]
        job_id, spec = JobId(training.job_id), training.spec
        match fault.kind:
            case Kind.PAUSE:
                self.command(JobCommanded(job_id=job_id, action=JobAction.PAUSE))
                self.world.after(
                    2 * fault.ms, self.command, JobCommanded(job_id=job_id, action=JobAction.RESUME)
                )
            case Kind.RESUME:
                self.command(JobCommanded(job_id=job_id, action=JobAction.RESUME))
            case Kind.SCALE:
                most = 1 + fault.number % spec.max_nodes
                self.command(JobScaled(job_id=job_id, min_nodes=min(spec.min_nodes, most), max_nodes=most))
                again = JobScaled(job_id=job_id, min_nodes=spec.min_nodes, max_nodes=spec.max_nodes)
                self.world.after(2 * fault.ms, self.command, again)
            case Kind.TAKE_CHECKPOINT:
                self.command(JobCommanded(job_id=job_id, action=JobAction.CHECKPOINT))
            case Kind.DAMAGE_CHECKPOINT:
                return self._damage(job_id)
            case Kind.ROLL_BACK | Kind.PIN | Kind.DELETE_CHECKPOINT:
                return self._to_checkpoint(fault, job_id)
            case _:
                return self._kill_all(job_id, fault)
        return True

    def _to_checkpoint(self, fault: Fault, job_id: JobId) -> bool:
        """What an operator does to one checkpoint, whichever it is."""
        job = self.coordinator.state.jobs.get(job_id)
        if job is None or not job.checkpoints:
            return False
        found = job.checkpoints[fault.number % len(job.checkpoints)]
        if fault.kind is Kind.ROLL_BACK:
            self.command(RollbackAsked(job_id=job_id, step=found.step, by="olga"))
            return True
        action = CheckpointAction.UNPIN if found.pinned_by else CheckpointAction.PIN
        if fault.kind is Kind.DELETE_CHECKPOINT:
            action = CheckpointAction.DELETE
        self.command(CheckpointCommanded(job_id=job_id, step=found.step, action=action, by="olga"))
        return True

    def _damage(self, job_id: JobId) -> bool:
        job = self.coordinator.state.jobs.get(job_id)
        if job is None or not job.checkpoints:
            return False
        for shard in json.loads(job.checkpoints[-1].manifest_json)["shards"][:1]:
            self.coordinator.damaged[shard["digest"]] = None
            for machine in self.machines:
                machine.blobs.pop(shard["digest"], None)
        return True

    def _kill_all(self, job_id: JobId, fault: Fault) -> bool:
        """All members at once; some lose their workers only."""
        killed = False
        for machine in self.machines:
            process = machine.process
            if process is None or not process.alive or process.job is None or process.job.job_id != job_id:
                continue
            killed = True
            if fault.number % 2:
                process.die("all are killed")
                machine.start(self.world.between(100, fault.ms + 100))
            else:
                self._kill_worker(process, Kind.KILL_WORKER, 0)
        return killed

    def _to_coordinator(self, kind: Kind, ms: int) -> bool:
        coordinator = self.coordinator
        if kind is Kind.BLOBS_FULL:
            coordinator.blobs_full = True
            self.world.after(ms, self._free_blobs)
            return True
        if not coordinator.up:
            return False
        match kind:
            case Kind.CRASH_BEFORE | Kind.CRASH_AFTER | Kind.CRASH_PARTWAY:
                coordinator.crash_at = {
                    Kind.CRASH_BEFORE: "before",
                    Kind.CRASH_AFTER: "after",
                    Kind.CRASH_PARTWAY: "partway",
                }[kind]
            case Kind.CRASH_NOW:
                coordinator.die("killed")
            case Kind.STOP_COORDINATOR:
                coordinator.freeze()
                self.world.after(ms, coordinator.thaw)
            case Kind.DISK_FULL:
                coordinator.disk_full = True
                self.world.after(ms, self._free_disk)
            case _:
                raise AssertionError(f"nobody knows how to do {kind}")
        return True

    def coordinator_died(self) -> None:
        """Somebody starts it again."""
        self.world.after(self.world.between(50, 3 * self.timing.lease_ms // 2), self.coordinator.start)

    def _free_disk(self) -> None:
        self.coordinator.disk_full = False

    def _free_machine(self, machine: Machine) -> None:
        machine.full = max(0, machine.full - 1)

    def _unhang(self, machine: Machine) -> None:
        machine.hangs = max(0, machine.hangs - 1)

    def _free_blobs(self) -> None:
        self.coordinator.blobs_full = False

    # ------------------------------------------------------------------------- what is expected

    def nobody_holds(self, job_id: JobId, step: int, lineage: int) -> None:
        """Committed steps were just given up: nobody whom the coordinator sees may have had them."""
        if job_id in self.truth.tainted:
            return
        state = self.coordinator.state
        for machine in self.machines:
            process = machine.process
            if process is None or process.job is None or process.job.job_id != job_id or process.job.stopping:
                continue
            agent = state.agents[process.agent_id]
            if (
                agent.job_id == job_id
                and agent.presence is Presence.READY
                and agent.standing is Standing.ELIGIBLE
                and self.coordinator.sessions.get(agent.agent_id) is process.session
                and process.connected
                and not process.lies_ready  # nor is it believed where it would be right
                and agent.readiness is not None
                and agent.readiness.holds_state
                and agent.readiness.generation >= lineage
                and self._holds(process, step)
            ):
                raise Violation(
                    f"step {step} of {job_id} was given up, but {process.name} holds it and is there"
                )

    def _holds(self, process: Process, step: int) -> bool:
        assert process.job is not None
        slots = process.job.slots.values()
        return bool(slots) and all(
            s.worker.alive
            and s.worker.holds
            and not s.worker.frozen
            and s.worker.step >= step
            and not s.worker.corrupt
            and s.worker.digest in self.truth.known
            for s in slots
        )

    def _heal(self) -> None:
        """All faults stop: who is frozen goes on, who is dead is started, links work, disks have space."""
        self._faulty = False
        self.world.tell("faults stop")
        self._sides = {}
        self._cut_pairs.clear()
        self.coordinator.disk_full = self.coordinator.blobs_full = False
        self.coordinator.crash_at = None
        self.coordinator.thaw()
        self.coordinator.start()
        for machine in self.machines:
            machine.cut(up=-machine.cut_up, down=-machine.cut_down, data=-machine.cut_data)
            machine.slow_ms = machine.prepare_fails = machine.full = machine.hangs = 0
            if "clone" in machine.name:
                self._end_clone(machine)
                continue
            process = machine.process
            if process is not None and process.alive:
                process.lies_ready = process.lies_formed = process.lies_vouching = False
                for slot in process.job.slots.values() if process.job is not None else ():
                    slot.worker.lies = False
                    slot.worker.thaw()
                process.thaw()
            machine.start(self.world.between(0, 500))
        self.look_calm()
        for agent in list(self.coordinator.state.agents.values()):
            if agent.standing is not Standing.BANNED:
                self.command(
                    AgentCommanded(
                        agent_id=agent.agent_id, action=AgentAction.RELEASE, reason="", until_ms=None
                    )
                )
        for job_id, training in self.trainings.items():
            spec = training.spec
            self.command(JobScaled(job_id=job_id, min_nodes=spec.min_nodes, max_nodes=spec.max_nodes))

    def bound_ms(self, training: Training) -> int:
        """How long it may take until the job trains again, once nothing fails any more.

        An agent notices a dead session within a lease, and is back after its longest pause; a restarted
        coordinator waits for the silent for two leases, then grace; a worker that died young is started
        again after a minute at most; then it forms, perhaps twice because somebody was counted who is gone."""
        timing, spec = self.timing, training.spec
        return (
            3 * timing.lease_ms
            + timing.grace_ms
            + 15_000  # a connection that is being tried, and the pause after it
            + 60_000  # the longest pause of a worker or a preparation that failed
            + timing.prepare_timeout_ms  # who waited for that too long is not given to the job for as long
            + REACH_PATIENCE_MS
            + self.settings.warm_ms[1]
            + 3 * (timing.rebuild_timeout_ms + spec.step_timeout_ms)
            + training.collective_timeout_ms
            + spec.last_call_ms
            + spec.min_generation_ms
            + 5 * training.step_ms
        )

    def _expect_training(self) -> None:
        """Liveness: every job that has not ended trains again within its bound."""
        state = self.coordinator.state
        since_ms = self.world.now_ms
        resumed: dict[JobId, None] = {}
        waiting = {j: state.jobs[j].committed_step + 3 for j in self.trainings}
        limit_ms = since_ms + max(self.bound_ms(t) for t in self.trainings.values())
        while waiting and self.world.now_ms < limit_ms:
            self.world.run(self.world.now_ms + 200)
            state = self.coordinator.state
            for job_id in list(waiting):
                job = state.jobs[job_id]
                if job.phase is JobPhase.PAUSED and job_id not in resumed:
                    resumed[job_id] = None
                    self.command(JobCommanded(job_id=job_id, action=JobAction.RESUME))
                    limit_ms = max(limit_ms, self.world.now_ms + self.bound_ms(self.trainings[job_id]))
                if job.phase in ENDED or (
                    job.committed_step >= waiting[job_id] and job.phase is JobPhase.RUNNING
                ):
                    del waiting[job_id]
                    self.recovery_ms.append(self.world.now_ms - since_ms)
        for job_id, step in waiting.items():
            job = state.jobs[job_id]
            raise Violation(
                f"{job_id} does not train within {limit_ms - since_ms} ms after the last fault: it is {job.phase.value} "
                f"({job.phase_why.value}) at step {job.committed_step}, waited for {step}; it waits for {why(state, job_id)}"
            )

    def _expect_ends(self) -> None:
        """Every job ends when it is told to, or when its last step is done, and keeps its last state."""
        state = self.coordinator.state
        stopped: dict[JobId, None] = {}
        for job_id, training in self.trainings.items():
            if state.jobs[job_id].phase in ENDED:
                continue
            if self.world.chance(0.5):
                stopped[job_id] = None
                self.command(JobCommanded(job_id=job_id, action=JobAction.STOP))
            else:
                training.steps = min(training.steps, state.jobs[job_id].committed_step + 20)
        limit_ms = self.world.now_ms + max(self.bound_ms(t) + 30 * t.step_ms for t in self.trainings.values())
        live = list(self.trainings)
        while live and self.world.now_ms < limit_ms:
            self.world.run(self.world.now_ms + 200)
            state = self.coordinator.state
            live = [job_id for job_id in live if state.jobs[job_id].phase not in ENDED]
        for job_id in live:
            job = state.jobs[job_id]
            raise Violation(
                f"{job_id} does not end: {job.phase.value} at step {job.committed_step}; {why(state, job_id)}"
            )
        for job_id in self.trainings:
            job = state.jobs[job_id]
            if job.phase is JobPhase.COMPLETED:
                newest = max((c.step for c in job.checkpoints if restorable(c)), default=0)
                require(
                    newest == job.committed_step or job_id in self.checks.deleted,
                    f"{job_id} is complete at step {job.committed_step} with a checkpoint of step {newest}",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run."""

    seed: int
    problem: str | None
    trace: tuple[str, ...]
    digest: str
    events: int
    decisions: int
    steps: int
    generations: int
    recovery_ms: tuple[int, ...]
    injected: Counter[str]
    records: Counter[str]
    refusals: Counter[str]


def faults_of(seed: int, settings: Settings) -> list[Fault]:
    return make_faults(
        seed,
        agents=settings.agents,
        until_ms=settings.faulty_ms - 1_000,
        gap_ms=settings.gap_ms,
        lease_ms=settings.lease_ms,
        burst=settings.burst,
    )


def simulate(
    seed: int,
    settings: Settings | None = None,
    faults: Sequence[Fault] | None = None,
    show: Callable[[str], None] | None = None,
) -> Result:
    """Run a seed, or a part of its faults."""
    settings = settings or make_settings(seed)
    fleet = Fleet(seed, settings, faults_of(seed, settings) if faults is None else faults, show)
    problem: str | None = None
    try:
        fleet.run()
    except Violation as error:
        problem = str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__} in {where.name}: {error}"
    if problem is not None:
        fleet.world.tell(f"VIOLATION: {problem}")
    return Result(
        seed=seed,
        problem=problem,
        trace=tuple(fleet.world.trace),
        digest=fleet.world.digest(),
        events=fleet.world.events,
        decisions=fleet.checks.decisions,
        steps=fleet.truth.steps,
        generations=fleet.checks.records["GenerationPlanned"],
        recovery_ms=tuple(fleet.recovery_ms),
        injected=fleet.injected,
        records=fleet.checks.records,
        refusals=fleet.checks.refusals,
    )
