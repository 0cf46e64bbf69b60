"""Snapshots beside training: what is written is the state of the step, whatever training does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from trainer.checkpoint import (
    CheckpointDirectory,
    Manifest,
    ShardFile,
    ShardImage,
    TensorSpec,
    layout,
    make_manifest,
)
from trainer.saving import SLOTS, Saver, Snapshot, division
from trainer.state import digest

SHARD_BYTES = 4096


def state(value: float) -> dict[str, Tensor]:
    return {
        "model.large": torch.full((50, 101), value),
        "model.half": torch.full((3,), value, dtype=torch.bfloat16),
        "optimizer.updates": torch.tensor([int(value)]),
    }


class Held(CheckpointDirectory):
    """A directory whose writes wait until they are let go, and may fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.let_go = threading.Event()
        self.full = False
        self.written = 0

    def store(self, digest: str, data: Tensor) -> bool:
        assert self.let_go.wait(30)
        if self.full:
            raise OSError(28, "No space left on device")
        new = super().store(digest, data)
        self.written += new
        return new


class Run:
    """A state with its savers, one for each rank."""

    def __init__(self, root: Path, world_size: int = 1) -> None:
        self.directory = Held(root)
        self.tensors = state(1)
        self.shards: list[tuple[Snapshot, ShardFile]] = []
        self.words: list[Snapshot] = []  # of ranks without a shard
        self.world_size = world_size
        self.savers = [
            Saver(self.directory, self.tensors, SHARD_BYTES, self.saved) for _ in range(world_size)
        ]

    def saved(self, snapshot: Snapshot, shard: ShardFile | None) -> None:
        if shard is None:
            self.words.append(snapshot)
        else:
            self.shards.append((snapshot, shard))

    def take(self, step: int, state_digest: Callable[[], str] | None = None) -> None:
        for rank, saver in enumerate(self.savers):
            saver.take(
                generation=1,
                step=step,
                state_digest=state_digest or (lambda: digest(self.tensors)),
                header={"tensors": [], "shard_bytes": SHARD_BYTES},
                rank=rank,
                world_size=self.world_size,
            )

    def update(self, value: float) -> None:
        for saver in self.savers:
            saver.before_update()
        for name, tensor in state(value).items():
            self.tensors[name].copy_(tensor)

    def checkpoint(self, step: int) -> Manifest:
        saver = self.savers[0]
        shards = [shard for snapshot, shard in self.shards if snapshot.step == step]
        header = {
            "tensors": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in saver.specs],
            "shard_bytes": SHARD_BYTES,
        }
        [found] = {snapshot.state_digest for snapshot, _ in self.shards if snapshot.step == step}
        return make_manifest(
            job="j", step=step, generation=1, state_digest=found, header=header, shards=shards
        )

    def wait(self) -> None:
        self.directory.let_go.set()
        for saver in self.savers:
            saver.wait()

    def restored(self, step: int) -> dict[str, Tensor]:
        manifest = self.checkpoint(step)
        into = state(0)
        self.directory.load(manifest, into)
        assert digest(into) == manifest.state_digest
        return into


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_written_is_the_state_of_the_step_though_training_went_on(
    tmp_path: Path, world_size: int
) -> None:
    run = Run(tmp_path, world_size)
    run.take(1)
    run.update(2)
    run.wait()
    assert same(run.restored(1), state(1))
    assert same(run.tensors, state(2))


def test_a_rank_without_a_shard_says_once_what_the_states_digest_is(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=12)
    run.take(1)
    run.wait()
    [shards] = {snapshot.count for snapshot, _ in run.shards}
    assert 0 < shards == len(run.shards) < 12
    assert [word.state_digest for word in run.words] == [digest(state(1))] * (12 - shards)


@given(
    sizes=st.lists(st.integers(1, 2**36), min_size=1, max_size=60),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
)
def test_every_shard_has_one_rank_and_every_rank_its_part_but_for_one_shard(
    sizes: list[int], weights: list[int]
) -> None:
    owners = division(sizes, weights)
    assert len(owners) == len(sizes)
    assert owners == sorted(owners), "each rank's shards follow each other"
    assert owners == division(tuple(sizes), tuple(weights))
    for rank, weight in enumerate(weights):
        stored = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        # |stored - part| is at most the largest shard, in whole numbers
        assert abs(stored * sum(weights) - weight * sum(sizes)) <= max(sizes) * sum(weights)
    assert set(owners) <= set(range(len(weights)))


def test_ranks_store_shards_in_proportion_to_their_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    for saver in run.savers:
        saver.weights = [1, 4]
    run.take(1)
    run.wait()
    sizes = [shard.bytes for _, shard in sorted(run.shards, key=lambda found: found[1].index)]
    owners = division(sizes, [1, 4])
    assert (owners.count(0), owners.count(1)) == (2, 8)
    assert same(run.restored(1), state(1))
    stored = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == 0)
    assert len(run.savers[0]._slots[0].memory) <= stored + 64 * 2  # type: ignore[arg-type]


def test_training_waits_for_the_snapshot_to_be_read_and_not_for_it_to_be_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    reading, read_on = threading.Event(), threading.Event()

    def slow_digest() -> str:
        reading.set()
        assert read_on.wait(30)
        return digest(run.tensors)

    run.take(1, slow_digest)
    assert reading.wait(30)
    updated = threading.Thread(target=run.update, args=(2,))
    updated.start()
    updated.join(0.05)
    assert updated.is_alive(), "an update must not change what is being read"
    assert same(run.tensors, state(1))
    read_on.set()
    updated.join(30)
    assert same(run.tensors, state(2))
    assert run.shards == [], "nothing is written yet"
    run.wait()
    assert same(run.restored(1), state(1))


def test_a_second_snapshot_is_taken_while_the_first_is_written_and_a_third_is_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    [saver] = run.savers
    for step in range(1, SLOTS + 1):
        assert not saver.busy
        run.update(step)
        run.take(step)
    assert saver.busy
    run.update(9)
    run.wait()
    assert not saver.busy
    assert [snapshot.step for snapshot, _ in run.shards] == sorted(
        snapshot.step for snapshot, _ in run.shards
    )
    for step in range(1, SLOTS + 1):
        assert same(run.restored(step), state(step))


def test_memory_is_used_again_and_its_size_is_that_of_the_ranks_files(tmp_path: Path) -> None:
    run = Run(tmp_path, world_size=2)
    run.directory.let_go.set()
    for step in (1, 2, 3):
        run.update(step)
        run.take(step)
        run.wait()
    [memory] = [slot.memory for slot in run.savers[0]._slots if slot.memory is not None]
    files = [shard.bytes for snapshot, shard in run.shards if snapshot.step == 3 and shard.index % 2 == 0]
    assert sum(files) <= len(memory) < sum(files) + 64 * len(files)


def test_shards_that_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.directory.let_go.set()
    run.take(1)
    run.wait()
    first = run.directory.written
    run.update(1)
    run.tensors["optimizer.updates"].fill_(7)  # in the last shard
    run.take(2)
    run.wait()
    assert (first, run.directory.written) == (len(run.checkpoint(1).shards), first + 1)
    assert run.checkpoint(2).shards[:-1] == run.checkpoint(1).shards[:-1]


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    [saver] = run.savers
    run.directory.full = True
    run.take(1)
    with pytest.raises(OSError, match="No space left"):
        run.wait()
    assert "checkpoint of step 1: [Errno 28] No space left" in capsys.readouterr().err
    run.directory.full = False
    run.update(2)
    run.take(2)
    run.wait()
    assert same(run.restored(2), state(2))
    assert saver.newest is not None
    assert saver.newest.state_digest == digest(run.tensors)


def test_a_state_that_cannot_be_read_fails_the_checkpoint_and_lets_training_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)

    def broken() -> str:
        raise RuntimeError("out of memory")

    run.take(1, broken)
    run.update(2)
    with pytest.raises(OSError, match="out of memory"):
        run.wait()
    assert "training goes on" in capsys.readouterr().err
    assert run.shards == []


specs_strategy = st.lists(
    st.builds(
        lambda name, dtype, shape: TensorSpec(name=name, dtype=dtype, shape=tuple(shape)),
        st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable()),
        st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]),
        st.lists(st.integers(0, 6), max_size=3),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda spec: spec.name,
)


@given(specs=specs_strategy, shard_bytes=st.integers(8, 500))
def test_a_shards_image_is_byte_for_byte_what_the_library_writes(
    specs: list[TensorSpec], shard_bytes: int
) -> None:
    tensors = {
        spec.name: torch.arange(spec.numel).reshape(spec.shape).to(getattr(torch, spec.dtype))
        for spec in specs
    }
    for shard in layout(specs, shard_bytes):
        image = ShardImage(shard)
        memory = torch.zeros(image.bytes, dtype=torch.uint8)
        image.fill(memory, tensors)
        pieces = {piece.key: piece.of(tensors[piece.spec.name]) for piece in shard.pieces}
        assert memory.numpy().tobytes() == safetensors_bytes(pieces)
