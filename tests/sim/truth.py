"""What really happened in the simulated training: every vote, and every state that may exist.

Nobody simulated may look here; the checks hold what the coordinator recorded against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.core.model import Generation, JobId
from tests.sim.training import Group, Worker, data_digest, digest_after, fresh_digest, slice_digest
from tests.sim.violation import require
from trainer import agreement
from trainer.agreement import Claim, Outcome

if TYPE_CHECKING:
    from tests.sim.agent import JobRun
    from tests.sim.fleet import Training


@dataclass(slots=True)
class Vote:
    """One commit vote that began; `completed` at one member at least."""

    job_id: str
    generation: int
    step: int
    world_size: int
    before: str
    after: str
    completed: bool = False


class Truth:
    def __init__(self) -> None:
        self.votes: list[Vote] = []
        self.known: dict[str, int] = {}  # digest of an honestly computed state -> its step
        self.corrupted: dict[str, None] = {}  # jobs of which some worker's memory was damaged
        self.tainted: dict[str, None] = {}  # jobs whose members agreed on a lie: nothing is known of them
        self.steps = 0
        self.formations = 0
        self.catch_ups = 0
        self.heals = 0

    def begin(self, training: Training) -> None:
        self.known[fresh_digest(training.job_id)] = 0

    # ------------------------------------------------------------------------- agents

    def told(self, run: JobRun, plan: Generation, member: bool) -> None:
        """An agent hears of a plan."""
        if member:
            require(run.readied, f"{run.process.name} is told to train and never said that it is ready")
        else:
            planned = any(slot.planned for slot in run.slots.values()) or run.member_of or run.readied
            require(planned, f"{run.process.name} stands by and is told of generation {plan.number}")

    # ------------------------------------------------------------------------- groups

    def agreed(self, training: Training, group: Group, chosen: Claim) -> None:
        source = group.workers[chosen.rank]
        if (source.lies or source.corrupt) and source.digest not in self.known:
            self.tainted[training.job_id] = None
        if source.lies and chosen.digest != source.digest:
            self.tainted[training.job_id] = None
        if training.job_id not in self.tainted:
            require(
                self.known[chosen.digest] == chosen.step,
                f"generation {group.generation} agreed on step {chosen.step}, "
                f"but that state is of step {self.known[chosen.digest]}",
            )

    def formed(self, training: Training, group: Group) -> None:
        self.formations += 1
        if training.job_id in self.tainted:
            return
        members = [worker for worker in group.workers.values() if not worker.corrupt]
        states = {(worker.step, worker.digest): None for worker in members}
        require(
            len(states) == 1, f"members of generation {group.generation} formed with states {list(states)}"
        )

    def vote(self, training: Training, group: Group, step: int) -> Outcome:
        """All members vote: each says how many slices it computed, and which."""
        ranges = [agreement.share(training.slices, group.world_size, rank) for rank in group.workers]
        computed = [j for slices in ranges for j in slices]
        require(
            computed == list(range(training.slices)),
            f"step {step} of generation {group.generation} computed the slices {computed}",
        )
        require(len(group.workers) == group.world_size, f"step {step} is voted on without all members")
        sound = next((w for w in group.workers.values() if not w.corrupt), group.workers[0])
        before = sound.digest
        self.votes.append(
            Vote(
                job_id=training.job_id,
                generation=group.generation,
                step=step,
                world_size=group.world_size,
                before=before,
                after=digest_after(before, step, group.world_size),
            )
        )
        return Outcome(
            step=step,
            loss=float(len(self.votes) - 1),  # so that a step's record names its vote
            slices=len(computed),
            data_digest=sum(slice_digest(step, j) for j in computed) % (1 << 64),
            grad_norm=1.0,
            skipped=False,
            generation=group.generation,
        )

    def voted(self, training: Training, group: Group, outcome: Outcome) -> None:
        """The vote has completed at some member."""
        vote = self.votes[int(outcome.loss)]
        vote.completed = True
        self.steps += 1
        if self.known.get(vote.before) == vote.step - 1:
            self.known[vote.after] = vote.step
        elif all(worker.corrupt for worker in group.workers.values()):
            self.tainted[training.job_id] = None
        else:
            require(training.job_id in self.tainted, f"step {vote.step} was made of an unknown state")

    def caught_up(self, training: Training, worker: Worker, step: int) -> None:
        """A member applied, while a generation formed, gradients that it had kept."""
        self.catch_ups += 1
        if training.job_id in self.tainted or worker.corrupt:
            return
        require(
            self.known.get(worker.digest) == step,
            f"{worker} applied step {step}, whose vote completed nowhere",
        )

    def restored(self, training: Training, step: int, digest: str) -> None:
        if training.job_id in self.corrupted and digest not in self.known:
            self.tainted[training.job_id] = None
        if training.job_id not in self.tainted:
            require(
                self.known.get(digest) == step,
                f"what was restored as step {step} is of step {self.known.get(digest)}",
            )

    # ------------------------------------------------------------------------- what is recorded

    def of_row(self, loss: float | None) -> Vote:
        require(loss is not None and 0 <= int(loss) < len(self.votes), f"no vote has the number {loss}")
        assert loss is not None
        return self.votes[int(loss)]

    @staticmethod
    def data(step: int, slices: int) -> int:
        return data_digest(step, slices)

    def is_honest(self, job_id: JobId, digest: str, step: int) -> bool:
        unknowable = job_id in self.tainted or (job_id in self.corrupted and digest not in self.known)
        return unknowable or self.known.get(digest) == step
