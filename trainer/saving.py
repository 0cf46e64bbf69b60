"""Taking checkpoints beside training: a snapshot at a step boundary, hashed and written by a thread.

Between two updates the state does not change.  A snapshot is therefore read by a thread while the next
step already computes, and training waits only if it comes to its next update before the reading is done
(`before_update`).  Every rank takes its part of the shards (`division`).

Host memory: a rank holds at most SLOTS snapshots of its own share, each as long as the files of those
shards: 2 × 1.5 GB / world size for GPT-2 124M with Adam where all upload equally fast.  The memory is kept and used again, pinned on
CUDA; a second snapshot's is only taken when one is due while the first is still being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import CheckpointDirectory, ShardFile, ShardImage, TensorSpec, layout, sha256

SLOTS = 2
WRITERS = 3
_ALIGNMENT = 64
_BACKGROUND_NICENESS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a checkpoint's shards have in common."""

    generation: int
    step: int
    count: int
    state_digest: str
    """Empty until the thread has computed it, which is before the first shard is handed up."""
    header: dict[str, Any]


@dataclass(slots=True)
class _Slot:
    """Host memory of one snapshot, and the thread that reads into it and writes from it."""

    memory: Tensor | None = None
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


def division(sizes: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Which rank stores each of the shards of these `sizes` (bytes, positive), by index.  `weights`, all
    positive, are the ranks'.

    The shards in their order are one stretch of bytes, and the ranks divide it in proportion to their weights;
    a shard is its whose part has its middle.  So a rank's bytes are its part but for half a shard at either
    end, and every rank comes to the same without a word: there are whole numbers only."""
    total, whole = sum(sizes), sum(weights)
    owners: list[int] = []
    rank, part, start = 0, weights[0], 0
    for size in sizes:
        middle = 2 * start + size  # twice
        while middle * whole > 2 * total * part:
            rank += 1
            part += weights[rank]
        owners.append(rank)
        start += size
    return owners


class Saver:
    """At most SLOTS checkpoints in flight.  `saved` is called on their threads, one shard after another,
    and an older checkpoint's shards before a newer one's; once without a shard where a rank has none, for
    its word on the state's digest counts as well."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        tensors: dict[str, Tensor],
        shard_bytes: int,
        saved: Callable[[Snapshot, ShardFile | None], None],
    ) -> None:
        self.specs = tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
        self._images = tuple(ShardImage(shard) for shard in layout(self.specs, shard_bytes))
        self._directory = directory
        self._tensors = tensors
        self._saved = saved
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._device = next((t.device for t in tensors.values() if t.is_cuda), None)
        self._stream: torch.cuda.Stream | None = None
        self._read: threading.Event | None = None
        self._error: OSError | None = None
        self.weights: Sequence[int] = ()
        """Of each rank of the generation: it takes a part of the shards in proportion to this.  Another number
        of weights than ranks: equal parts."""
        self.newest: Snapshot | None = None
        """The last one taken here, written or not."""

    @property
    def busy(self) -> bool:
        """Whether there is no room for another snapshot."""
        return all(slot.busy for slot in self._slots)

    def take(
        self,
        *,
        generation: int,
        step: int,
        state_digest: Callable[[], str],
        header: dict[str, Any],
        rank: int,
        world_size: int,
    ) -> None:
        """Begin a checkpoint of the state as it is now.  Not while `busy`.  One thread calls this class.

        This returns at once; call `before_update` before a tensor changes.  `state_digest` is called on
        the thread, with the state still as it is.
        """
        assert not self.busy
        self.before_update()  # one reader at a time
        slot = next(slot for slot in self._slots if not slot.busy)
        previous = next((other.thread for other in self._slots if other.busy), None)
        snapshot = Snapshot(
            generation=generation, step=step, count=len(self._images), state_digest="", header=header
        )
        images = self._share(rank, world_size)
        begun: torch.cuda.Event | None = None
        if self._device is not None:
            begun = torch.cuda.Event()  # type: ignore[no-untyped-call]
            begun.record()
        self.newest, self._error, self._read = snapshot, None, threading.Event()
        slot.thread = threading.Thread(
            target=self._run,
            args=(snapshot, slot, images, state_digest, begun, self._read, previous),
            name="saver",
            daemon=True,
        )
        slot.thread.start()

    def _share(self, rank: int, world_size: int) -> tuple[ShardImage, ...]:
        weights = self.weights if len(self.weights) == world_size else [1] * world_size
        owners = division([image.bytes for image in self._images], weights)
        return tuple(image for image, owner in zip(self._images, owners, strict=True) if owner == rank)

    def before_update(self) -> None:
        """Call before tensors change: waits until the snapshot that is being taken has read them."""
        if self._read is not None:
            self._read.wait()
            self._read = None

    def wait(self) -> None:
        """Wait for the checkpoints in flight.  Raise OSError if the newest could not be written."""
        for slot in self._slots:
            if slot.thread is not None:
                slot.thread.join()
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------------------------- on the thread

    def _run(
        self,
        snapshot: Snapshot,
        slot: _Slot,
        images: tuple[ShardImage, ...],
        state_digest: Callable[[], str],
        begun: torch.cuda.Event | None,
        read: threading.Event,
        previous: threading.Thread | None,
    ) -> None:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="digester") as digester:
                try:
                    files = self._read_state(slot, images, begun)
                    digested = digester.submit(self._digest, snapshot, state_digest, begun, read)
                except BaseException:
                    read.set()
                    raise
                # Whatever follows yields to training; on Linux a thread has a priority of its own.
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
                if previous is not None:
                    previous.join()
                self._write(images, files, digested)
        except OSError as error:
            if self._is_newest(snapshot):
                self._error = error
            print(
                f"worker: checkpoint of step {snapshot.step}: {error}; training goes on without it",
                file=sys.stderr,
                flush=True,
            )

    def _is_newest(self, snapshot: Snapshot) -> bool:
        newest = self.newest
        return newest is not None and (newest.generation, newest.step) == (snapshot.generation, snapshot.step)

    def _digest(
        self,
        snapshot: Snapshot,
        state_digest: Callable[[], str],
        begun: torch.cuda.Event | None,
        read: threading.Event,
    ) -> Snapshot:
        try:
            with _readable(), self._side_stream(begun):
                digested = dataclasses.replace(snapshot, state_digest=state_digest())
            self.newest = digested  # nobody takes another before `read` is set
            return digested
        finally:
            read.set()

    def _read_state(
        self, slot: _Slot, images: tuple[ShardImage, ...], begun: torch.cuda.Event | None
    ) -> list[Tensor]:
        """Copy the shards into the slot's memory; one view of it for each file."""
        starts, end = [], 0
        for image in images:
            starts.append(end)
            end += -(-image.bytes // _ALIGNMENT) * _ALIGNMENT
        with _readable(), self._side_stream(begun):  # pinned memory belongs to this device too
            if slot.memory is None or len(slot.memory) < end:
                slot.memory = None
                slot.memory = torch.empty(end, dtype=torch.uint8, pin_memory=begun is not None)
            memory = slot.memory
            files = [memory[start : start + image.bytes] for start, image in zip(starts, images, strict=True)]
            for image, file in zip(images, files, strict=True):
                image.fill(file, self._tensors)
        return files

    @contextlib.contextmanager
    def _side_stream(self, begun: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA: beside training's stream, after what was queued there when the snapshot began; what is
        queued here is done at the end."""
        if begun is None:
            yield
            return
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_event(begun)
            with torch.cuda.stream(self._stream):
                yield
            self._stream.synchronize()

    def _write(self, images: tuple[ShardImage, ...], files: list[Tensor], digested: Future[Snapshot]) -> None:
        # While the disk takes one shard, the next is hashed.
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="writer") as writers:
            for shard in writers.map(self._store, images, files):
                self._saved(digested.result(), shard)
        if not images:
            self._saved(digested.result(), None)

    def _store(self, image: ShardImage, memory: Tensor) -> ShardFile:
        digest = sha256(memory)
        self._directory.store(digest, memory)
        return ShardFile(index=image.shard.index, digest=digest, bytes=image.bytes)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What torch raises where memory is short or a device fails, as an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"the state cannot be read ({error})") from error
