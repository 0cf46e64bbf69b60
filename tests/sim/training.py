"""What trains: workers, and the groups in which they compute steps.  A model of trainer/elastic.py and
trainer/group.py; what members agree on is decided by the real trainer.agreement.

A state is a step and a digest, which depends on all that went into it: the digest before, the step, and
how many ranks summed it.  So two histories that part never have equal digests again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING

from agent import control
from tests.sim.violation import require
from tests.sim.world import Timer
from trainer import agreement
from trainer.agreement import NO_OUTCOME, Claim, Outcome, Standing

if TYPE_CHECKING:
    from tests.sim.agent import JobRun, Process
    from tests.sim.fleet import Fleet, Training

CONTROL_MS = 2
RETRY_MS = 50
LONGEST_PING_MS = 7_500


@functools.lru_cache(maxsize=65_536)
def digest_after(digest: str, step: int, world_size: int) -> str:
    """Of the state that a step makes of another."""
    return hashlib.blake2b(f"{digest} {step} {world_size}".encode(), digest_size=16).hexdigest()


def fresh_digest(job_id: str) -> str:
    return hashlib.blake2b(job_id.encode(), digest_size=16).hexdigest()


@functools.lru_cache(maxsize=65_536)
def data_digest(step: int, slices: int) -> int:
    """Of all slices of a step."""
    return sum(slice_digest(step, j) for j in range(slices)) % (1 << 64)


def slice_digest(step: int, j: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{step}/{j}".encode(), digest_size=8).digest())


def lie_about(digest: str) -> str:
    return hashlib.blake2b(f"not {digest}".encode(), digest_size=16).hexdigest()


class Worker:
    """One training process."""

    def __init__(self, run: JobRun, slot: int) -> None:
        self.run = run
        self.process: Process = run.process
        self.fleet: Fleet = run.process.fleet
        self.world = run.process.world
        self.training: Training = run.training
        self.slot = slot
        self.alive = True
        self.warm = False
        self.frozen = False
        self.corrupt = False  # its memory was damaged, which nobody knows
        self.lies = False  # in what it tells its peers of its state
        # the state
        self.holds = False
        self.step = 0
        self.digest = ""
        self.last = NO_OUTCOME
        self.pending = 0
        self.pending_in = 0
        self.pending_world = 0
        # membership
        self.plan: control.Plan | None = None
        self.generation = 0
        self.aborted = 0
        self.group: Group | None = None
        self.left = (0, 1)
        self.idle = False
        # saving
        self.saved = (0, 0)  # step and generation of the newest snapshot
        self.unsaved = False  # it could not be written
        self.writing_until_ms = 0
        self._up_ms = 0
        self._deferred: list[tuple[object, tuple[object, ...]]] = []

    def __str__(self) -> str:
        return f"{self.process.name}.{self.slot}"

    # ------------------------------------------------------------------------- living

    def later(self, delay_ms: int, call, *args) -> Timer:  # type: ignore[no-untyped-def]
        """Something that this process does: not when it is dead, and only once it is not frozen."""
        return self.world.after(delay_ms, self._due, call, args)

    def _due(self, call, args) -> None:  # type: ignore[no-untyped-def]
        if not self.alive:
            return
        if self.frozen:
            self._deferred.append((call, args))
            return
        call(*args)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.frozen = False
        deferred, self._deferred = self._deferred, []
        for call, args in deferred:
            self._due(call, args)

    def die(self) -> None:
        """Gone, with all that was in its memory.  Its sockets close."""
        if not self.alive:
            return
        self.alive = False
        if self.group is not None:
            self.group.leave(self, "died")

    def tell(self, message: control.Up) -> None:
        """Up the control socket."""
        if self.fleet.crowded:
            self.process.later(0, self.run.heard, self, message)
            return
        self._up_ms = max(self.world.now_ms + self.world.between(0, CONTROL_MS), self._up_ms)
        self.world.at(self._up_ms, self.process.due, self.run.heard, (self, message))

    # ------------------------------------------------------------------------- listening

    def heard(self, message: control.Down) -> None:
        match message:
            case control.Plan():
                if self.plan is not None and message.generation <= self.plan.generation:
                    return
                self.plan = message
                group = self.group
                if group is not None and group.generation < message.generation:
                    if message.cut == "abort" or group.phase == "connecting":
                        group.leave(self, "aborted")
                    elif group.phase == "finished":
                        self.end_generation(group)
                    else:
                        group.newer_plan_heard()
                self._look()
            case control.Abort():
                self.aborted = max(self.aborted, message.generation)
                if self.group is not None and self.group.generation <= message.generation:
                    self.group.leave(self, "aborted")
                self._look()
            case control.TakeCheckpoint():
                if self.group is not None:
                    self.group.asked_checkpoint = True
            case _:
                pass

    def newer_plan(self) -> bool:
        return self.plan is not None and self.plan.generation > self.generation

    def _look(self) -> None:
        if self.idle and self.newer_plan():
            self.idle = False
            self._take()

    def rest(self) -> None:
        """Out of a generation: on to the newest plan, when there is one."""
        self.group = None
        self.idle = True
        self._look()

    # ------------------------------------------------------------------------- plans

    def become_warm(self) -> None:
        self.warm = True
        self.idle = True
        self.tell(control.Warm())

    def _take(self) -> None:
        plan = self.plan
        assert plan is not None
        previous, self.generation = self.generation, plan.generation
        if plan.checkpoint_before_cut and self.holds:
            self.take_checkpoint(previous, *self.left)
            wait_ms = max(0, self.writing_until_ms - self.world.now_ms)
            self.later(wait_ms, self._carry_out, plan)
        else:
            self._carry_out(plan)

    def _carry_out(self, plan: control.Plan) -> None:
        if plan.release:
            self.pending = 0
            if plan.cut == "abort" and plan.group_world_size:
                self.holds = False
            self.tell(control.Released(generation=plan.generation))
            self.rest()
        elif self.newer_plan() or self.aborted >= plan.generation:
            self.rest()
        else:
            group = self.fleet.group(self.training, plan)
            self.group = group
            group.arrive(self, plan)
            self.later(int(plan.timeout_s * 1000), self._not_connected, group)

    def _not_connected(self, group: Group) -> None:
        if self.group is group and group.phase == "connecting":
            absent = group.absent(self)
            told = self.aborted >= group.generation
            self.lose(group, "no answer from a peer", told=told, unreachable=absent)

    def lose(
        self, group: Group, detail: str, *, told: bool = False, unreachable: list[int] | None = None
    ) -> None:
        """A collective failed here."""
        if self.group is not group or group.phase == "finished":
            return
        group.leave(self, "failed")
        if not told and not self.newer_plan() and self.aborted < group.generation:
            self.fail("collective", detail, unreachable=unreachable)
        self.rest()

    def end_generation(self, group: Group) -> None:
        self.left = (group.rank_of(self), group.world_size)
        self.rest()

    def fail(
        self, kind: str, detail: str, step: int | None = None, unreachable: list[int] | None = None
    ) -> None:
        self.tell(
            control.Failed(
                generation=self.generation,
                kind=kind,
                detail=detail,
                step=self.step if step is None else step,
                unreachable=unreachable or [],
            )
        )

    # ------------------------------------------------------------------------- the state

    def begin_from(self, plan: control.Plan, rank: int) -> None:
        """What a plan without memory starts from."""
        if plan.source == "memory":
            return
        self.holds, self.pending, self.last, self.step, self.digest = False, 0, NO_OUTCOME, 0, ""
        self.corrupt = False
        if plan.source == "fresh":
            self.holds, self.digest = True, fresh_digest(self.training.job_id)
        elif rank == 0:
            assert plan.checkpoint_step is not None
            self.digest = self.process.restored[self.training.job_id, plan.checkpoint_step]
            self.step, self.holds = plan.checkpoint_step, True
            self.fleet.truth.restored(self.training, self.step, self.digest)

    def standing(self) -> Standing:
        return Standing(
            holds=self.holds,
            step=self.step,
            pending=self.pending,
            pending_in=self.pending_in,
            identity=1,
            broken=False,
            last=self.last,
        )

    def claim(self, rank: int) -> Claim:
        if self.lies and self.holds:
            return Claim(rank=rank, holds=True, step=self.step + 1, digest=lie_about(self.digest))
        return Claim(rank=rank, holds=self.holds, step=self.step, digest=self.digest if self.holds else "")

    def catch_up(self, plan: control.Plan, rank: int, everyone: list[Standing]) -> None:
        """Apply the gradients in hand if somebody's vote on them is known to have completed."""
        if not agreement.must_apply(everyone[rank], everyone, plan.committed_step):
            return
        outcome = agreement.outcome_of(everyone[rank], everyone)
        world_size = self.pending_world
        step = self.pending
        self.apply(step, world_size, outcome or NO_OUTCOME)
        self.fleet.truth.caught_up(self.training, self, step)
        if outcome is not None:
            self.report(outcome, plan.generation)

    def keep_gradients(self, step: int, group: Group) -> None:
        """They are complete, and the vote on them is not."""
        self.pending, self.pending_in, self.pending_world = step, group.generation, group.world_size

    def apply(self, step: int, world_size: int, outcome: Outcome) -> None:
        self.digest = digest_after(self.digest, step, world_size)
        self.step = step
        self.last = outcome
        self.pending = 0

    def report(self, outcome: Outcome, generation: int) -> None:
        self.tell(
            control.Step(
                generation=generation,
                step=outcome.step,
                loss=outcome.loss,
                slices=outcome.slices,
                data_digest=str(outcome.data_digest),
                tokens=float(outcome.slices),
                lr=0.1,
                grad_norm=outcome.grad_norm,
                skipped=outcome.skipped,
                duration_s=self.training.step_ms / 1000,
            )
        )

    # ------------------------------------------------------------------------- saving

    def take_checkpoint(self, generation: int, rank: int, world_size: int) -> None:
        """This rank's shards of the state as it is now, written beside training."""
        self.saved, self.unsaved = (self.step, generation), False
        count = self.training.shards
        begin_ms = max(self.world.now_ms, self.writing_until_ms)
        self.writing_until_ms = begin_ms + self.world.between(20, 200)
        header = {"step": self.step}
        mine = [
            control.Shard(
                generation=generation,
                step=self.step,
                index=index,
                count=count,
                digest=shard_digest(self.training.job_id, self.digest, index, count),
                bytes=100 + index,
                state_digest=self.digest,
                header=header,
            )
            for index in range(rank, count, world_size)
        ]
        if not mine:
            mine = [
                control.Shard(
                    generation=generation,
                    step=self.step,
                    index=0,
                    count=count,
                    digest="",
                    bytes=0,
                    state_digest=self.digest,
                    header=header,
                )
            ]
        self.later(self.writing_until_ms - self.world.now_ms, self._written, mine)

    def _written(self, shards: list[control.Shard]) -> None:
        for shard in shards:
            if shard.digest:
                if self.process.machine.full:
                    self.unsaved = True
                    return
                self.process.machine.blobs[shard.digest] = None
            self.tell(shard)

    def finish(self, group: Group) -> None:
        if self.saved != (self.step, group.generation):
            self.take_checkpoint(group.generation, group.rank_of(self), group.world_size)
        wait_ms = max(0, self.writing_until_ms - self.world.now_ms)
        self.later(wait_ms, self._finished, group)

    def _finished(self, group: Group) -> None:
        if self.group is group and self.unsaved:
            self.fail("program", "the last checkpoint cannot be written: no space is left")
        elif self.group is group:
            self.tell(control.Finished(generation=group.generation, step=self.step))


def shard_digest(job_id: str, digest: str, index: int, count: int) -> str:
    """A digest that says what is in the shard."""
    return hashlib.sha256(json.dumps([job_id, digest, index, count]).encode()).hexdigest()


def loss_of(digest: str) -> float:
    """The loss of a state on the held-out slices."""
    return float(int(hashlib.sha256(digest.encode()).hexdigest()[:6], 16))


class Group:
    """One generation's process group: connecting, agreeing on a state, then computing and voting, step by
    step, until somebody leaves it."""

    def __init__(self, fleet: Fleet, training: Training, plan: control.Plan) -> None:
        self.fleet = fleet
        self.world = fleet.world
        self.training = training
        self.generation = plan.generation
        self.world_size = plan.world_size
        self.store = (plan.store_host, plan.store_port)
        self.phase = "connecting"
        self.plans: dict[int, control.Plan] = {}
        self.workers: dict[int, Worker] = {}  # by rank, in order of arrival until connected
        self.step = 0
        self.asked_checkpoint = False
        self._arrived: dict[int, Worker] = {}  # whoever came, also who has left since
        self._ranks: dict[Worker, int] = {}
        self._leaving = False
        self._leaving_next = False
        self._stalled_ms: int | None = None
        self._silence_ms = 0
        self._failing = False
        self._vote: Outcome | None = None

    def rank_of(self, worker: Worker) -> int:
        return self._ranks[worker]

    def arrive(self, worker: Worker, plan: control.Plan) -> None:
        assert (plan.world_size, plan.store_host, plan.store_port) == (self.world_size, *self.store), (
            f"two plans of generation {self.generation} of {self.training.job_id} differ"
        )
        assert plan.rank not in self.workers, f"two workers have rank {plan.rank} in one generation"
        if self.phase != "connecting":  # too late: peers gave up
            return
        self.workers[plan.rank] = self._arrived[plan.rank] = worker
        self.plans[plan.rank] = plan
        self._ranks[worker] = plan.rank
        if len(self.workers) == self.world_size:
            self.world.after(self.world.between(2, 20), self._connect)

    # ------------------------------------------------------------------------- forming

    def _held_up(self) -> bool:
        """Whether somebody is frozen or unreachable, so that no collective ends."""
        return not self.fleet.calm and (
            any(w.frozen for w in self.workers.values())
            or not self.fleet.connected([w.process.machine for w in self.workers.values()])
        )

    def absent(self, worker: Worker) -> list[int]:
        """Whom a worker misses on the store's roll; the leader, if it does not reach the store."""
        rank, store = self.rank_of(worker), self.store[0]
        if rank and not self.fleet.reaches(worker.process.machine, store):
            return [0]
        return [
            other
            for other in range(self.world_size)
            if other not in self._arrived
            or not self.fleet.reaches(self._arrived[other].process.machine, store)
        ]

    def _connect(self) -> None:
        if self.phase != "connecting" or len(self.workers) < self.world_size:
            return
        assert sorted(self.workers) == list(range(self.world_size)), "ranks have holes"
        leader = self.workers[0]
        if self._held_up() or leader.process.frozen or not leader.run.has_store(self.store[1]):
            self.world.after(RETRY_MS, self._connect)
            return
        self.phase = "agreeing"
        self.workers = dict(sorted(self.workers.items()))
        for rank, worker in self.workers.items():
            worker.begin_from(self.plans[rank], rank)
        self.world.after(self.world.between(1, 10), self._exchange_standings)

    def _exchange_standings(self) -> None:
        if self.phase != "agreeing":
            return
        if self._held_up():
            self._stall(self._exchange_standings)
            return
        self._catch_up(list(self.workers))
        self.world.after(self.world.between(1, 10), self._exchange_claims)

    def _catch_up(self, ranks: list[int]) -> None:
        everyone = [worker.standing() for worker in self.workers.values()]
        for rank in ranks:
            self.workers[rank].catch_up(self.plans[rank], rank, everyone)

    def _exchange_claims(self) -> None:
        if self.phase != "agreeing":
            return
        if self._held_up():
            self._stall(self._exchange_claims)
            return
        self._unstall()
        chosen = self._agree(list(self.workers))
        if chosen is None or self.phase != "agreeing":
            return
        self.phase = "computing"
        self.step = chosen.step
        self.fleet.truth.formed(self.training, self)
        self._begin()

    def _agree(self, ranks: list[int]) -> Claim | None:
        claims = [worker.claim(rank) for rank, worker in self.workers.items()]
        plan = self.plans[0]
        require(
            all(p.holders == plan.holders for p in self.plans.values()), "members are told of other holders"
        )
        counted = [claim for claim in claims if claim.rank in plan.holders or not plan.holders]
        match plan.source:
            case "memory":
                chosen = agreement.reference(
                    counted, plan.committed_step, plan.committed_digest
                ) or agreement.reference(claims, plan.committed_step, plan.committed_digest)
            case "fresh":
                chosen = agreement.reference([c for c in claims if c.step == 0], 0, "")
            case _:
                chosen = claims[0] if claims[0].holds and claims[0].step == plan.checkpoint_step else None
        if chosen is None:
            self.workers[0].fail("restore", "no member holds the state", plan.committed_step)
            for worker in list(self.workers.values()):
                self._drop(worker)
            return None
        source = self.workers[chosen.rank]
        actual, corrupt = (source.step, source.digest), source.corrupt
        self.fleet.truth.agreed(self.training, self, chosen)
        lasts = [source.last, *(worker.last for worker in self.workers.values())]
        told = next((last for last in lasts if last.step == chosen.step), NO_OUTCOME)
        for rank in ranks:
            if rank in self.workers:
                self._heal(self.workers[rank], claims[rank], chosen, actual, told, corrupt=corrupt)
        return chosen

    def _heal(
        self,
        worker: Worker,
        claim: Claim,
        chosen: Claim,
        actual: tuple[int, str],
        told: Outcome,
        *,
        corrupt: bool,
    ) -> None:
        stale = not (claim.holds and (claim.step, claim.digest) == (chosen.step, chosen.digest))
        if stale:
            worker.last, worker.pending, worker.holds = told, 0, True
            worker.step, worker.digest = chosen.step, actual[1]
            worker.corrupt = corrupt
            if actual[1] != chosen.digest:
                worker.fail("diverged", "after healing the state has another digest than was claimed")
                worker.holds = False
                self._drop(worker)
                return
            if told.step:
                worker.report(told, self.generation)
            plan = self.plans[claim.rank]
            counts = claim.rank in plan.holders or not plan.holders
            if plan.source == "memory" and counts and agreement.diverged(claim, chosen):
                worker.fail("diverged", "held a state that contradicts its peers'")
        worker.pending = 0
        worker.tell(
            control.Formed(
                generation=self.generation, step=worker.step, state_digest=chosen.digest, healed=stale
            )
        )

    def _drop(self, worker: Worker) -> None:
        """It gives this generation up without a word and waits for a plan."""
        if worker.group is self:
            self.leave(worker, "failed")
            worker.rest()

    # ------------------------------------------------------------------------- training

    def newer_plan_heard(self) -> None:
        """One of the members knows of a newer plan: its next vote says so."""
        if self.phase == "voting":
            self._leaving_next = True
        else:
            self._leaving = True

    def _begin(self) -> None:
        if self.phase != "computing":
            return
        if self.step >= self.training.steps:
            self.phase = "finished"
            for worker in list(self.workers.values()):
                if worker.newer_plan():
                    worker.end_generation(self)
                else:
                    worker.finish(self)
            return
        step_ms = self.training.step_ms
        self.world.after(step_ms + self.world.between(0, step_ms // 4), self._reduce)

    def _reduce(self) -> None:
        """Every rank has computed its slices and holds the reduced gradients."""
        if self.phase != "computing":
            return
        if self._held_up():
            self._stall(self._reduce)
            return
        self._unstall()
        self.phase = "voting"
        self._leaving_next = False
        step = self.step + 1
        self._vote = self.fleet.truth.vote(self.training, self, step)
        self.world.after(self.world.between(1, 3), self._apply)

    def _apply(self) -> None:
        """The vote has completed everywhere."""
        if self.phase != "voting":
            return
        if self._held_up():
            self._stall(self._apply)
            return
        self._unstall()
        outcome = self._vote
        assert outcome is not None
        self.fleet.truth.voted(self.training, self, outcome)
        self.phase = "computing"
        self.step = outcome.step
        for worker in self.workers.values():
            worker.apply(outcome.step, self.world_size, outcome)
            worker.report(outcome, self.generation)
        self._checkpoint_if_due()
        if self._leaving:
            self.phase = "over"
            for worker in list(self.workers.values()):
                worker.end_generation(self)
            return
        self._leaving = self._leaving_next
        self._begin()

    def _checkpoint_if_due(self) -> None:
        asked, self.asked_checkpoint = self.asked_checkpoint, False
        last = self.step == self.training.steps
        if not (asked or last or self.step % self.training.checkpoint_every == 0):
            return
        if not asked and (reporter := self.workers.get(0)) is not None:
            reporter.tell(control.Evaluation(step=self.step, loss=loss_of(reporter.digest)))
        for rank, worker in self.workers.items():
            if last or worker.writing_until_ms <= self.world.now_ms:
                worker.take_checkpoint(self.generation, rank, self.world_size)

    # ------------------------------------------------------------------------- how it ends

    def leave(self, worker: Worker, how: str) -> None:
        """`worker` is out: it "died", was "aborted" by its agent, or a collective "failed" at it."""
        rank = self._ranks[worker]
        if self.workers.get(rank) is not worker:
            worker.group = None
            return
        if self.phase == "connecting":
            del self.workers[rank], self._ranks[worker]
            worker.group = None
            if how == "aborted":
                worker.rest()
            return
        broken = self.phase == "broken"
        if self.phase not in ("broken", "finished"):
            self._break(worker)
        worker.left = (rank, self.world_size)
        self.workers.pop(rank, None)
        worker.group = None
        if how == "aborted":
            worker.rest()
        if self.phase == "finished" or (broken and self.fleet.crowded):
            return  # no collective is under way, or the first to leave has told the crowd
        odds = 0.3 if how == "aborted" else 0.9
        for peer in self.workers.values():
            if self.world.chance(odds):
                peer.later(self.world.between(1, 40), peer.lose, self, "connection closed by peer")

    def _break(self, leaver: Worker) -> None:
        """What was under way ends here; how far each member had come is a matter of microseconds."""
        phase, self.phase = self.phase, "broken"
        everyone = list(self.workers.values())
        match phase:
            case "computing":
                if self.step < self.training.steps and self.world.chance(0.3):
                    for worker in everyone:
                        if worker.alive and self.world.chance(0.5):
                            worker.keep_gradients(self.step + 1, self)
            case "voting":
                self._break_vote(everyone, leaver)
            case "agreeing":
                self._break_agreement(everyone)
            case _:
                pass
        for worker in everyone:
            if worker is not leaver:
                worker.later(self.training.collective_timeout_ms, worker.lose, self, "collective timed out")

    def _break_vote(self, everyone: list[Worker], leaver: Worker) -> None:
        outcome = self._vote
        assert outcome is not None
        completed = self.world.chance(0.7)
        for worker in everyone:
            worker.keep_gradients(outcome.step, self)
        first = True
        for worker in everyone:
            if completed and self.world.chance(0.5):
                if first:
                    self.fleet.truth.voted(self.training, self, outcome)
                    first = False
                worker.apply(outcome.step, self.world_size, outcome)
                if worker.alive:
                    worker.report(outcome, self.generation)
                    if self._leaving and worker is not leaver:
                        # Out at the cut; nobody needs to tell it.
                        self.workers.pop(self._ranks[worker], None)
                        worker.later(0, self._cut, worker)

    def _cut(self, worker: Worker) -> None:
        if worker.group is self:
            worker.end_generation(self)

    def _break_agreement(self, everyone: list[Worker]) -> None:
        stage = self.world.between(0, 3)
        some = [rank for rank in self.workers if self.world.chance(0.5)]
        if stage == 1:
            self._catch_up(some)
        elif stage == 2:
            # The standings were exchanged everywhere, and some were being healed.
            self._catch_up(list(self.workers))
            for worker in everyone:
                if not worker.holds or worker.step < max(w.step for w in everyone):
                    worker.holds, worker.last, worker.pending = False, NO_OUTCOME, 0
        elif stage == 3:
            self._catch_up(list(self.workers))
            self._agree(some)

    # ------------------------------------------------------------------------- waiting

    def _stall(self, again) -> None:  # type: ignore[no-untyped-def]
        """Somebody does not answer: the others wait, at most for the collective's own timeout."""
        if self._stalled_ms is None:
            self._stalled_ms = self.world.now_ms
            # Found by the kernel's counters, which are read when the agent pings.
            self._silence_ms = int(1000 * self.plans[0].timeout_s) + self.world.between(0, LONGEST_PING_MS)
        if self.world.now_ms - self._stalled_ms > self._silence_ms:
            self._look_for_silence()
        if self.world.now_ms - self._stalled_ms > self.training.collective_timeout_ms:
            for worker in list(self.workers.values()):
                worker.later(0, worker.lose, self, "collective timed out")
            if any(not worker.frozen for worker in self.workers.values()):
                return
        self.world.after(RETRY_MS, again)

    def _look_for_silence(self) -> None:
        machines = [worker.process.machine for worker in self.workers.values()]
        for worker in list(self.workers.values()):
            mine = worker.process.machine
            if not (worker.process.frozen or all(self.fleet.connected([mine, other]) for other in machines)):
                worker.later(0, worker.lose, self, "nothing reaches a peer")

    def _unstall(self) -> None:
        self._stalled_ms = None
