"""The elastic part of training: one small class that a loop talks to.

    elastic = ElasticGroup.from_environment(config, device)
    model = elastic.adopt(model, optimizer, ...)
    while elastic.next_step():                    # forms, heals; False when the job ends
        for batch in elastic.slices(dataset):
            elastic.backward(model(batch.x, batch.y))
        elastic.commit()                          # reduce, vote, update

With an agent (MUSTER_CONTROL) generations come and go by its plans; under torchrun, or alone, there is
one, for life.  The loop sees no difference and handles no failure: a step that is lost is begun again.

How a step is kept whole.  Gradients are summed by DDP's communication hook over the generation's own
group, and the result is divided by `slices_per_step`.  Before the update a commit vote sums one small
vector over the ranks; a rank applies the step only if its vote completed.  A rank whose vote did not
complete keeps its reduced gradients, and applies them when the next generation forms and somebody's vote
on them is known to have completed (`agreement.must_apply`): so no survivor is ever a step ahead for good.

DDP itself lives on a process group of one, for ever: its only use of it is to agree on a bucket layout
after the first backward, which all members do alike since they run the same model.  That agreement is
a hidden broadcast that nobody could interrupt; over a group of one it needs no peer.  The layout is part
of the identity that members compare when a generation forms.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from trainer import agreement, control
from trainer.agreement import NO_OUTCOME, Claim, Outcome, Standing
from trainer.alone import Alone
from trainer.checkpoint import CheckpointDirectory, CheckpointError, ShardFile
from trainer.config import TrainingConfig
from trainer.data import slice_seed
from trainer.group import (
    Bell,
    CollectiveFailed,
    Graveyard,
    Group,
    Interrupted,
    form,
    ready,
    solo_process_group,
)
from trainer.saving import Saver, Snapshot
from trainer.state import TrainingState
from trainer.trace import StepTrace


class Link(Protocol):
    """Where plans come from and reports go: an agent, or `Alone`."""

    def send(self, message: control.Up) -> None: ...
    def listen(self, on_message: Callable[[control.Down], None]) -> None: ...


class Slices(Protocol):
    """Where batches come from.  `id` names the data; equal ids mean equal batches."""

    id: str

    def slice_and_digest(self, step: int, j: int, train: Any) -> tuple[Tensor, Tensor, int]: ...
    def ready(self, step: int, slices: Sequence[int], train: Any, given_up: Callable[[], bool]) -> bool:
        """Wait for these slices' data; False if it was given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One slice of the step, on the device."""

    x: Tensor
    y: Tensor


class _Lost(Exception):
    """This generation cannot go on with this member; the next plan decides."""


class ElasticGroup:
    """A member of a fleet that trains one model.  All methods belong to one thread, the loop's."""

    @classmethod
    def from_environment(cls, config: TrainingConfig, device: torch.device) -> Self:
        """As an agent's worker if MUSTER_CONTROL is set, else under torchrun (RANK, WORLD_SIZE …) or alone."""
        path = os.environ.get("MUSTER_CONTROL")
        if path is None:
            return cls(config, device, Alone(config), CheckpointDirectory(config.checkpoint.dir))
        cache = CheckpointDirectory(os.environ["MUSTER_CACHE"], os.environ.get("MUSTER_AUTHORITY", ""))
        return cls(config, device, control.AgentLink(path), cache)

    def __init__(
        self, config: TrainingConfig, device: torch.device, link: Link, checkpoints: CheckpointDirectory
    ) -> None:
        self.config = config
        self.device = device
        self.step = 0
        """The newest step applied here."""
        self._link = link
        self._checkpoints = checkpoints
        self._trace = StepTrace()
        # What the listener and the loop share, under the bell.
        self._bell = Bell()
        self._plan: control.Plan | None = None
        self._aborted = 0
        self._asked_checkpoint = False
        self._stopped = False
        self._checkpoint_now = False
        self._activity: tuple[control.Activity, float] = ("idle", time.monotonic())
        # Membership.
        self._group: Group | None = None
        self._generation = 0
        self._graveyard = Graveyard()
        self._leaving = False
        self._left = (0, 1)  # rank and world size in the generation before
        self._holds = False
        # The step in hand.
        self._begun = 0.0
        self._losses = torch.zeros((), dtype=torch.float64, device=device)
        self._computed = 0
        self._data_digest = 0
        self._pending = 0
        self._pending_in = 0
        self._pending_norm = math.nan
        self._last = NO_OUTCOME
        self._layout: dict[int, int] = {}
        # `adopt` sets these.
        self._ddp: DistributedDataParallel
        self._solo: torch.distributed.ProcessGroup
        self._optimizer: torch.optim.AdamW
        self._parameters: list[nn.Parameter]
        self._state: TrainingState
        self._saver: Saver
        self._schedule: Callable[[int], float]
        self._describe: Callable[[int], dict[str, Any]]
        self._fresh: Callable[[], nn.Module]
        self._identity = 0

    # ================================================================================ being warm

    def adopt(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        data: Slices,
        *,
        identity: str,
        schedule: Callable[[int], float],
        describe: Callable[[tuple[Any, ...], int], dict[str, Any]],
        fresh: Callable[[], nn.Module],
    ) -> nn.Module:
        """Take charge of a model on the device and its optimizer; return the model to compute losses with.

        `model(x, y)` is the mean loss of a slice.  `schedule(step)` is the learning rate; `describe(specs,
        step)` a checkpoint's header; `fresh()` the model as it was at step 0; members whose `identity`
        differs refuse each other.  Runs two slices, so that everything that happens once (compilation,
        DDP's bucket layout) has happened, and changes no state.
        """
        compiled: nn.Module = torch.compile(model) if self.config.train.compile else model  # type: ignore[assignment]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer
        self._schedule, self._fresh = schedule, fresh
        self._state = TrainingState(model, optimizer)
        self._saver = Saver(
            self._checkpoints, self._state.tensors, self.config.checkpoint.shard_bytes, self._saved
        )
        self._describe = lambda step: describe(self._saver.specs, step)
        self._solo = solo_process_group(self.device)
        self._ddp = DistributedDataParallel(
            compiled,
            process_group=self._solo,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # A lambda, because DDP does not understand annotations that are strings.
        self._ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        x, y, _ = data.slice_and_digest(1, 0, self.config.train)
        x, y = x.to(self.device), y.to(self.device)
        for _ in range(2):
            self._layout.clear()
            self._ddp(x, y).backward()
            self._optimizer.zero_grad(set_to_none=True)
        if self.config.train.eval_every:
            with torch.no_grad():
                compiled.eval()(x, y)
            compiled.train()
        text = f"{identity} {data.id} {sorted(self._layout.items())} {list(self._state.tensors)}"
        self._identity = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        self._link.listen(self._heard)
        self._link.send(control.Warm())
        return self._ddp

    def _reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """DDP's hook: the sum over the ranks, divided by the number of slices in a step.

        Out of place on purpose: a superseded all-reduce may still write into its tensor when a frozen
        peer wakes up, and the bucket is where later steps' gradients live.
        """
        buffer = bucket.buffer()
        group = self._group
        if group is None:  # warming up
            self._layout[bucket.index()] = buffer.numel()
            return ready(buffer)
        self._doing("reducing")
        scaled = buffer / self.config.train.slices_per_step if self._computed else torch.zeros_like(buffer)
        return group.all_reduce_later(scaled)

    # ============================================================================== the listener

    def _heard(self, message: control.Down) -> None:
        """On the link's thread."""
        match message:
            case control.Plan():
                with self._bell:
                    if self._plan is not None and message.generation <= self._plan.generation:
                        return
                    self._plan = message
                    group = self._group
                    self._bell.notify_all()
                if message.cut == "abort" and group is not None and group.generation < message.generation:
                    group.abort()
            case control.Abort():
                with self._bell:
                    self._aborted = max(self._aborted, message.generation)
                    group = self._group
                    self._bell.notify_all()
                if group is not None and group.generation <= message.generation:
                    group.abort()
            case control.Checkpoint():
                self._asked_checkpoint = True
            case control.Ping():
                activity, since = self._activity
                self._check_peers(activity, since)
                self._link.send(
                    control.Pong(
                        sequence=message.sequence,
                        activity=activity,
                        since_s=time.monotonic() - since,
                        step=self.step,
                    )
                )
            case control.Stop():
                if isinstance(self._link, Alone):
                    self._stopped = True
                else:
                    control.leave(0)

    def _check_peers(self, activity: control.Activity, since: float) -> None:
        """Do not wait for a peer that nothing reaches: the collective's own timeout may be far away."""
        group, plan = self._group, self._plan
        if group is None or plan is None or activity not in {"forming", "reducing"}:
            return
        if time.monotonic() - since > plan.timeout_s and (silent := group.silent_peers(plan.timeout_s)):
            group.give_up(f"nothing reaches {', '.join(silent)} since {plan.timeout_s:g} s")

    def leave_after_step(self) -> None:
        """Checkpoint after the step in hand on every rank and end the loop; for a signal handler."""
        self._asked_checkpoint = self._stopped = True

    def _doing(self, activity: control.Activity) -> None:
        self._activity = (activity, time.monotonic())

    def _newer_plan(self) -> bool:
        return self._plan is not None and self._plan.generation > self._generation

    # ============================================================================= public: a step

    def next_step(self) -> bool:
        """Be in a generation, with the state agreed, at the beginning of a step.  False when the job ends."""
        while True:
            if self._leaving:
                self._end_generation()
            if self._group is None and not self._form():
                return False
            if self.step < self.config.train.steps:
                break
            if not self._finish():
                return False
        self._doing("computing")
        self._begun = time.monotonic()
        self._pending = 0
        self._losses.zero_()
        self._computed = 0
        self._data_digest = 0
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def slices(self, data: Slices) -> Iterator[Batch]:
        """This rank's slices of the step.  A rank without one gets the first, for show: its gradients and
        loss count as zero, but the collectives need it to run."""
        group = self._group
        assert group is not None
        train, step = self.config.train, self.step + 1
        mine = agreement.share(train.slices_per_step, group.world_size, group.rank)
        if not data.ready(step, mine or [0], train, lambda: self._group is None or group.aborted):
            return
        for j in mine or [0]:
            x, y, digest = data.slice_and_digest(step, j, train)
            if mine:
                self._computed += 1
                self._data_digest = (self._data_digest + digest) % (1 << 64)
            if self.device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            # As DDP's no_sync(): only the last slice's backward reduces.
            self._ddp.require_backward_grad_sync = not mine or j == mine[-1]
            self._seed(slice_seed(train.seed, step, j))
            yield Batch(x=x.to(self.device, non_blocking=True), y=y.to(self.device, non_blocking=True))
            if self._group is None or group.aborted:
                return

    def _seed(self, seed: int) -> None:
        """As torch.manual_seed, which takes 0.8 ms to seed devices that are not there."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)

    def backward(self, loss: Tensor) -> None:
        """Add a slice's gradients.  If the generation ends meanwhile, the step is quietly lost."""
        group = self._group
        if group is None:
            return
        if self._computed:
            self._losses += loss.detach()
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            if group.failure is not None and not group.aborted:
                self._lose(group.broken or CollectiveFailed(group.failure))
            elif group.aborted:
                self._lose(Interrupted("the step in flight was dropped"))
            else:
                raise

    def want(self, digests: list[str]) -> None:
        """Have the agent fetch these shards of the dataset, in this order, and keep them."""
        self._link.send(control.Wants(digests=digests))

    def pause(self, seconds: float) -> None:
        """Make the step longer, for demonstrations and tests; ends early with the generation."""
        group = self._group
        if seconds > 0 and group is not None:
            with self._bell:
                self._bell.wait_for(lambda: group.aborted, timeout=seconds)

    def commit(self) -> bool:
        """Vote, and apply the step if the vote completes.  Whether it did.

        A step with a gradient that is not finite is committed without an update, on every rank.
        """
        group = self._group
        if group is None:
            return False
        self._doing("reducing")
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(torch.float64)
        self._pending, self._pending_in = self.step + 1, group.generation
        if self.device.type == "cpu":
            self._pending_norm = float(norm)
        try:
            outcome = self._vote(group, norm)
        except (Interrupted, CollectiveFailed) as error:
            self._lose(error)
            return False
        self._apply(outcome)
        self._report(outcome, group)
        self._checkpoint_if_due(group)
        return True

    def evaluate(self, score: Callable[[int], Tensor], count: int) -> None:
        """Report the mean of `score(k)` for k in 0 … count−1, which the ranks divide among themselves."""
        group = self._group
        if group is None:
            return
        self._doing("computing")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self._ddp.eval()
        with torch.no_grad():
            for k in agreement.share(count, group.world_size, group.rank):
                total += score(k)
        self._ddp.train()  # type: ignore[no-untyped-call]
        try:
            group.all_reduce(total)
        except (Interrupted, CollectiveFailed) as error:
            self._lose(error)
            return
        if group.rank == 0:
            self._say(control.Evaluation(step=self.step, loss=float(total) / count), group.rank)

    # =========================================================================== voting, applying

    def _vote(self, group: Group, norm: Tensor) -> Outcome:
        """Raise Interrupted or CollectiveFailed if it did not complete on this rank."""
        train, step = self.config.train, self.step + 1
        asked = self._asked_checkpoint
        with self._bell:
            leaving = self._newer_plan() or self._stopped
        # On CUDA these stay where they are: the sum is queued behind the gradients that they come from.
        here = self.device.type == "cpu"
        # Sums of these are exact in float64: each half of the digest is below 2^32.
        vote = torch.tensor(
            [
                1.0,
                float(step),
                float(self._computed),
                float(self._data_digest & 0xFFFFFFFF),
                float(self._data_digest >> 32),
                float(leaving),
                float(asked),
                float(self._losses) if here else 0.0,
                self._pending_norm if here else 0.0,
                float(math.isfinite(self._pending_norm)) if here else 0.0,
                1.0,
            ],
            dtype=torch.float64,
        )
        if not here:
            vote = vote.to(self.device, non_blocking=True)
            vote[7] = self._losses
            vote[8] = norm
            vote[9] = norm.isfinite()
        try:
            group.all_reduce(vote)
        except Interrupted:
            # On CUDA an abort may come after the sum did: then it is complete, and others may act on it.
            if self.device.type != "cuda" or vote.tolist()[0] != group.world_size:
                raise
        present, steps, slices, low, high, leave, checkpoint, loss, norms, finite, present_too = vote.tolist()
        world = group.world_size
        if (present, present_too, steps, slices) != (world, world, world * step, train.slices_per_step):
            raise CollectiveFailed(
                f"commit vote of step {step}: {present:g} of {world} ranks, sum of steps {steps:g}, "
                f"{slices:g} slices instead of {train.slices_per_step}"
            )
        self._leaving = leave > 0
        self._stopped = self._stopped or (self._leaving and isinstance(self._link, Alone))
        self._checkpoint_now = checkpoint > 0
        if asked:  # what was asked since waits for the next vote
            self._asked_checkpoint = False
        return Outcome(
            step=step,
            loss=loss / train.slices_per_step,
            slices=int(slices),
            data_digest=(int(low) + (int(high) << 32)) % (1 << 64),
            grad_norm=norms / world,
            skipped=finite < world,
            generation=group.generation,
        )

    def _apply(self, outcome: Outcome) -> None:
        """Update with the reduced gradients in hand.  Every number that enters is the same on every rank."""
        if not outcome.skipped:
            self._saver.before_update()
            clip = self.config.train.grad_clip
            if clip and outcome.grad_norm > clip:
                gradients = [p.grad for p in self._parameters if p.grad is not None]
                torch._foreach_mul_(gradients, clip / outcome.grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = self._schedule(outcome.step)
            self._optimizer.step()
            self._state.count_update()
        self.step = outcome.step
        self._last = outcome
        self._pending = 0

    def _report(self, outcome: Outcome, group: Group) -> None:
        self._trace.committed(
            step=outcome.step,
            generation=group.generation,
            world=group.world_size,
            rank=group.rank,
            loss=outcome.loss,
        )
        train = self.config.train
        message = control.Step(
            generation=group.generation,
            step=outcome.step,
            loss=outcome.loss,
            slices=outcome.slices,
            data_digest=str(outcome.data_digest),
            tokens=train.slices_per_step * train.slice_sequences * train.seq_len,
            lr=self._schedule(outcome.step),
            grad_norm=outcome.grad_norm,
            skipped=outcome.skipped,
            duration_s=time.monotonic() - self._begun,
        )
        self._say(message, group.rank)

    def _say(self, message: control.Up, rank: int) -> None:
        """Report; rank 0 also prints what a person who reads the log wants to know."""
        self._link.send(message)
        train = self.config.train
        match message:
            case _ if rank != 0:
                pass
            case control.Formed(step=step) if step > 0:
                print(f"resuming after step {step} in generation {message.generation}", flush=True)
            case control.Step(step=step) if step % train.log_every == 0 or step in {1, train.steps}:
                skipped = "  skipped: a gradient is not finite" if message.skipped else ""
                print(
                    f"step {step}/{train.steps}  loss {message.loss:.4f}  lr {message.lr:.2e}  "
                    f"norm {message.grad_norm:.2f}  {message.tokens / message.duration_s:,.0f} tokens/s{skipped}",
                    flush=True,
                )
            case control.Evaluation():
                print(f"step {message.step}  validation loss {message.loss:.4f}", flush=True)
            case _:
                pass

    # ==================================================================== the life of a generation

    def _lose(self, error: Interrupted | CollectiveFailed) -> None:
        """Leave a generation that cannot go on.  Says so unless everybody knows already."""
        group = self._group
        assert group is not None
        failed = isinstance(error, CollectiveFailed) and not group.aborted
        with self._bell:
            failed = failed and not self._newer_plan() and self._aborted < group.generation
        self._end_generation()
        if failed:
            self._graveyard.sweep()  # closing our connections tells the peers that see no error
            self._fail("collective", str(error))

    def _end_generation(self) -> None:
        with self._bell:
            group, self._group = self._group, None
        self._leaving = False
        if group is not None:
            self._left = (group.rank, group.world_size)
            self._graveyard.bury(group)

    def _fail(
        self,
        kind: control.FailureKind,
        detail: str,
        step: int | None = None,
        unreachable: tuple[int, ...] = (),
    ) -> None:
        self._link.send(
            control.Failed(
                generation=self._generation,
                kind=kind,
                detail=detail[: control.MAX_DETAIL_CHARS],
                step=self.step if step is None else step,
                unreachable=list(unreachable),
            )
        )

    def _form(self) -> bool:
        """Wait for a plan and carry it out, and the next, until a generation is formed.  False at the end."""
        while True:
            self._doing("idle")
            with self._bell:
                self._bell.wait_for(lambda: self._newer_plan() or self._stopped)
                plan = self._plan
            if self._stopped:
                return False
            assert plan is not None
            previous, self._generation = self._generation, plan.generation
            if plan.checkpoint_before_cut and self._holds:
                self._take_checkpoint(previous, *self._left)
                self._finish_saving()
            if plan.release:
                self._pending = 0
                if plan.cut == "abort" and plan.group_world_size:
                    # Given up: what the others do from here on is the job's history, whatever we hold.
                    self._holds = False
                self._graveyard.sweep()
                self._link.send(control.Released(generation=plan.generation))
                continue
            try:
                self._doing("forming")
                self._enter(plan)
            except Interrupted:
                self._end_generation()
            except CollectiveFailed as error:
                self._end_generation()
                self._graveyard.sweep()
                with self._bell:
                    told = self._newer_plan() or self._aborted >= plan.generation
                if not told:
                    self._fail("collective", str(error), unreachable=error.unreachable)
            except _Lost:
                self._end_generation()
            else:
                self._graveyard.sweep()
                self._checkpoint_again(plan)
                return True

    def _enter(self, plan: control.Plan) -> None:
        self._begun = time.monotonic()
        # A newer plan of any kind supersedes connecting; once connected only an abort ends waiting, for
        # peers may have gone on already and then count on this rank until the cut.
        group = form(
            generation=plan.generation,
            rank=plan.rank,
            world_size=plan.world_size,
            store_host=plan.store_host,
            store_port=plan.store_port,
            device=self.device,
            bell=self._bell,
            superseded=lambda: self._newer_plan() or self._aborted >= plan.generation,
            timeout_s=plan.timeout_s,
            collective_timeout_s=self.config.train.collective_timeout,
        )
        with self._bell:
            self._group = group
            self._saver.weights = plan.upload_weights
            newer = self._plan
            dead = self._aborted >= plan.generation or (
                newer is not None and newer.generation > plan.generation and newer.cut == "abort"
            )
        if dead:
            group.abort()
        # What a failed backward left behind in the reducer goes; every member does this, always.
        self._ddp._update_process_group(self._solo)  # type: ignore[no-untyped-call]
        failure = self._prepare_state(plan, group)
        everyone = [Standing.of(row) for row in group.exchange(self._standing(failure is not None).row())]
        self._check_standings(everyone, group, failure, plan)
        self._catch_up(plan, group, everyone)
        self._agree(plan, group, everyone)

    def _standing(self, broken: bool) -> Standing:
        return Standing(
            holds=self._holds,
            step=self.step,
            pending=self._pending,
            pending_in=self._pending_in,
            identity=self._identity,
            broken=broken,
            last=self._last,
        )

    def _prepare_state(self, plan: control.Plan, group: Group) -> str | None:
        """Make the state that a plan without memory starts from.  Returns what went wrong, if anything."""
        self._saver.before_update()  # healing and restoring write into what it reads
        if plan.source == "memory":
            return None
        self._holds, self._pending, self._last, self.step = False, 0, NO_OUTCOME, 0
        try:
            if plan.source == "checkpoint":
                if group.rank == 0:
                    self._restore(plan.checkpoint_step)
            else:
                self._state.reset(self._fresh())
                self._holds = True
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def _restore(self, step: int | None) -> None:
        """Load the checkpoint of `step`; with None the newest intact one, or start anew if there is none."""
        if step is None:
            header = self._checkpoints.restore_newest(self._state.tensors)
        else:
            header = self._checkpoints.load(self._checkpoints.manifest(step), self._state.tensors)
        if header is None:
            self._state.reset(self._fresh())
        else:
            self._state.loaded()
            self.step = int(header["step"])
        self._holds = True

    def _check_standings(
        self, everyone: list[Standing], group: Group, failure: str | None, plan: control.Plan
    ) -> None:
        if failure is not None:
            self._fail("restore", failure, plan.checkpoint_step or 0)
        if any(standing.broken for standing in everyone):
            raise _Lost
        odd = agreement.odd_ones(everyone)
        if group.rank in odd:
            self._fail(
                "program",
                f"rank {group.rank} trains something else than its peers: job file, dataset or model differ; "
                "the agent should fetch the job again",
            )
        if odd:
            raise _Lost

    def _catch_up(self, plan: control.Plan, group: Group, everyone: list[Standing]) -> None:
        mine = everyone[plan.rank]
        if not agreement.must_apply(mine, everyone, plan.committed_step):
            return
        outcome = agreement.outcome_of(mine, everyone)
        known = outcome is not None
        if outcome is None:  # the coordinator has its record; only our own norm is needed here
            norm = self._pending_norm
            if self.device.type == "cuda":
                norm = float(
                    torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
                )
            outcome = Outcome(
                step=mine.pending,
                loss=0.0,
                slices=0,
                data_digest=0,
                grad_norm=norm,
                skipped=not math.isfinite(norm),
            )
        self._apply(outcome)
        if known:
            self._report(outcome, group)
        else:
            self._last = NO_OUTCOME

    def _claim(self, rank: int) -> Claim:
        return Claim(
            rank=rank,
            holds=self._holds,
            step=self.step,
            digest=self._state.digest() if self._holds else "",
        )

    def _agree(self, plan: control.Plan, group: Group, everyone: list[Standing]) -> None:
        """Settle on one state, bring everybody to it, and say so."""
        claims = [
            Claim.of(rank, row) for rank, row in enumerate(group.exchange(self._claim(group.rank).row()))
        ]
        # What others hold may be older, or of a generation that was given up.
        counted = [claim for claim in claims if claim.rank in plan.holders or not plan.holders]
        match plan.source:
            case "memory":
                chosen = agreement.reference(
                    counted, plan.committed_step, plan.committed_digest
                ) or agreement.reference(claims, plan.committed_step, plan.committed_digest)
            case "fresh":
                chosen = agreement.reference([claim for claim in claims if claim.step == 0], 0, "")
            case "checkpoint":
                leader = claims[0]
                named = plan.checkpoint_step is None or leader.step == plan.checkpoint_step
                chosen = leader if leader.holds and named else None
        if chosen is None:
            if group.rank == 0:
                self._fail(
                    "restore", "no member of the generation holds the training state", plan.committed_step
                )
            raise _Lost
        known = (s.last for s in (everyone[chosen.rank], *everyone) if s.holds and s.last.step == chosen.step)
        stale = [c for c in claims if not (c.holds and (c.step, c.digest) == (chosen.step, chosen.digest))]
        healed = any(claim.rank == group.rank for claim in stale)
        if stale:
            if healed:
                self._holds, self._last, self._pending = False, NO_OUTCOME, 0
            self._state.heal(group, chosen.rank)
        if healed:
            self.step = chosen.step
            found = self._state.digest()
            if found != chosen.digest:
                self._fail(
                    "diverged",
                    f"after healing from rank {chosen.rank} the state has digest {found}, expected {chosen.digest}",
                )
                raise _Lost
            self._holds = True
            self._last = next(known, NO_OUTCOME)
            if self._last.step:
                # Should all who voted on this step be gone before they have reported it, we do.
                self._report(self._last, group)
            mine = claims[group.rank]
            if plan.source == "memory" and mine in counted and agreement.diverged(mine, chosen):
                self._fail(
                    "diverged",
                    f"rank {group.rank} held step {mine.step} with digest {mine.digest}; its peers hold step "
                    f"{chosen.step} with digest {chosen.digest}; it was healed from rank {chosen.rank}",
                )
        formed = control.Formed(
            generation=plan.generation, step=self.step, state_digest=chosen.digest, healed=healed
        )
        self._say(formed, plan.rank)

    def _finish(self) -> bool:
        """After the last step: the last checkpoint, then wait to be stopped.  False if the loop should end."""
        group = self._group
        assert group is not None
        newest = self._saver.newest
        if newest is None or (newest.step, newest.generation) != (self.step, group.generation):
            self._checkpoint(group)
            if self._group is None:
                return True
        if self._finish_saving():
            self._link.send(control.Finished(generation=group.generation, step=self.step))
        self._doing("idle")
        with self._bell:
            self._bell.wait_for(lambda: self._newer_plan() or group.aborted or self._stopped)
        if self._stopped:
            return False
        self._end_generation()
        return True

    # ================================================================================= checkpoints

    def _checkpoint_if_due(self, group: Group) -> None:
        last = self.step == self.config.train.steps
        if self._checkpoint_now or last or self.step % self.config.checkpoint.every_steps == 0:
            if self._saver.busy and not last:
                print(
                    f"worker: no checkpoint at step {self.step}: the one of step "
                    f"{self._saver.newest.step if self._saver.newest else 0} is still being written",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                self._checkpoint(group)

    def _checkpoint(self, group: Group) -> None:
        """Take a checkpoint on every rank; without a coordinator also commit it."""
        self._take_checkpoint(group.generation, group.rank, group.world_size)
        if not isinstance(self._link, Alone):
            return
        self._finish_saving()
        assert self._saver.newest is not None
        try:
            self._link.commit(self._checkpoints, group, self._saver.newest)
        except (Interrupted, CollectiveFailed) as error:
            self._lose(error)

    def _checkpoint_again(self, plan: control.Plan) -> None:
        """Somebody is gone, and the state is that of a checkpoint: who is left takes over the shards of who is
        gone.  What is stored already is neither written nor sent again."""
        group = self._group
        if group is None or plan.source != "memory" or plan.cut != "abort" or self.step == 0:
            return
        if self.step % self.config.checkpoint.every_steps == 0 and self.step < self.config.train.steps:
            self._checkpoint(group)

    def _take_checkpoint(self, generation: int, rank: int, world_size: int) -> None:
        if self._saver.busy:
            self._finish_saving()
        self._doing("saving")
        self._saver.take(
            generation=generation,
            step=self.step,
            state_digest=self._state.digest,
            header=self._describe(self.step),
            rank=rank,
            world_size=world_size,
        )

    def _finish_saving(self) -> bool:
        """Wait for the checkpoint in flight; whether it was written."""
        self._doing("saving")
        try:
            self._saver.wait()
        except OSError as error:
            if self.step == self.config.train.steps:
                self._fail("program", f"the last checkpoint cannot be written: {error}; free some space")
            return False
        return True

    def _saved(self, snapshot: Snapshot, shard: ShardFile | None) -> None:
        """On the saver's thread."""
        shard = shard or ShardFile(index=0, digest="", bytes=0)
        self._link.send(
            control.Shard(
                generation=snapshot.generation,
                step=snapshot.step,
                index=shard.index,
                count=snapshot.count,
                digest=shard.digest,
                bytes=shard.bytes,
                state_digest=snapshot.state_digest,
                header=snapshot.header,
            )
        )

    def failed(self, error: BaseException) -> None:
        """Report that the loop itself raised."""
        self._fail("program", f"{type(error).__name__}: {error}")
