"""A model that trains and is saved: what the checkpoint benchmarks on the CPU and on a card share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from trainer.checkpoint import CheckpointDirectory, ShardFile
from trainer.config import TrainSettings
from trainer.model import GPT, ModelShape, configure_optimizer
from trainer.saving import Saver
from trainer.state import TrainingState

GPT2 = ModelShape(n_layer=12, n_head=12, n_embd=768, vocab_size=50_257, block_size=1024)
SHARD_BYTES = 64 * 2**20


def shape_of(state_mb: float | None) -> ModelShape:
    """GPT-2 124M (1.5 GB with Adam), or a GPT whose state has about so many MB."""
    if state_mb is None:
        return GPT2
    parameters = state_mb * 1e6 / 12
    width = 16
    while 12 * 4 * (width + 16) ** 2 + (257 + 256) * (width + 16) <= parameters:
        width += 16
    return ModelShape(n_layer=4, n_head=4, n_embd=width, vocab_size=257, block_size=256)


@dataclass(slots=True)
class Timings:
    """What one rank has measured, in seconds."""

    copy_s: list[float] = field(default_factory=list)
    """One memory copy of the whole state (on a card: to pinned host memory), nothing else running."""
    take_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    """From the first update after `take`: how long it waited for the snapshot to be read."""
    quiet_s: list[float] = field(default_factory=list)
    """Steps while nothing is saved."""
    first_s: list[float] = field(default_factory=list)
    """The steps in which a snapshot is read."""
    beside_s: list[float] = field(default_factory=list)
    """Later steps while a checkpoint is hashed and written."""
    state_bytes: int = 0

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class Training:
    """A GPT, its AdamW and a Saver for one rank of so many, on the CPU or a card."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        *,
        state_mb: float | None,
        tokens: int,
        device: torch.device,
        sequences: int = 1,
        saved: Callable[[ShardFile], None] = lambda _: None,
    ) -> None:
        settings = TrainSettings(seq_len=tokens)
        shape = shape_of(state_mb)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = GPT(shape, seed=1, compute_dtype=dtype).to(device)
        self.optimizer = configure_optimizer(self.model, settings, device)
        self.state = TrainingState(self.model, self.optimizer)
        stream = torch.Generator().manual_seed(1)
        for name, tensor in self.state.tensors.items():
            if name.startswith("optimizer.exp"):  # zeros would compress, and hash, like nothing real
                tensor.copy_(torch.randn(tensor.shape, generator=stream).mul_(1e-4).abs_())
        self.saver = Saver(
            directory,
            self.state.tensors,
            SHARD_BYTES,
            lambda _, shard: None if shard is None else saved(shard),
        )
        self._tokens = torch.randint(shape.vocab_size, (sequences, tokens + 1), generator=stream).to(device)
        self._device = device
        self.steps = 0

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.tensors.values())

    def take(self, rank: int = 0, world_size: int = 1) -> float:
        """Begin a checkpoint; how long that took."""
        begun = time.perf_counter()
        self.saver.take(
            generation=1,
            step=self.steps,
            state_digest=self.state.digest,
            header={},
            rank=rank,
            world_size=world_size,
        )
        return time.perf_counter() - begun

    def compute(self, vote: Callable[[], object] = lambda: None) -> None:
        """Gradients, and whatever the ranks agree on before an update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self._tokens[:, :-1], self._tokens[:, 1:]).backward()
        vote()
        self.synchronize()

    def update(self) -> float:
        """Apply the gradients; how long the snapshot held that up."""
        begun = time.perf_counter()
        self.saver.before_update()
        waited = time.perf_counter() - begun
        self.optimizer.step()
        self.state.count_update()
        self.synchronize()
        self.steps += 1
        return waited

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def copies(self, count: int) -> list[float]:
        """Seconds of `count` memory copies of the state to host memory that is there already."""
        pin = self._device.type == "cuda"
        target = {
            name: torch.empty(t.shape, dtype=t.dtype, pin_memory=pin)
            for name, t in self.state.tensors.items()
        }
        times = []
        for _ in range(count + 1):  # the first one touches the memory
            self.synchronize()
            begun = time.perf_counter()
            copy(self.state.tensors, target)
            self.synchronize()
            times.append(time.perf_counter() - begun)
        return times[1:]


def copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor, non_blocking=True)


def measure(
    training: Training,
    *,
    rank: int,
    world_size: int,
    checkpoints: int,
    quiet: int,
    vote: Callable[[], object] = lambda: None,
) -> Timings:
    """Train, with a checkpoint now and then.  The first checkpoint takes the memory, and does not count."""
    found = Timings(state_bytes=training.state_bytes)
    for _ in range(3):  # what happens once has happened
        training.compute(vote)
        training.update()
    for number in range(checkpoints + 1):
        for _ in range(quiet):
            begun = time.perf_counter()
            training.compute(vote)
            training.update()
            found.quiet_s.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        taken = training.take(rank, world_size)
        training.compute(vote)
        waited = training.update()
        lasted = time.perf_counter() - begun
        if number:
            found.take_s.append(taken)
            found.wait_s.append(waited)
            found.first_s.append(lasted)
        # A fixed number of steps on every rank, so that all vote alike.
        for _ in range(quiet):
            writing = any(slot.busy for slot in training.saver._slots)
            begun = time.perf_counter()
            training.compute(vote)
            training.update()
            if number and writing:
                found.beside_s.append(time.perf_counter() - begun)
        training.saver.wait()
    return found
