"""Taking checkpoints beside training: a snapshot at a step boundary, written by a thread.

Every rank takes the shards whose index is its rank modulo the world size.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import CheckpointDirectory, ShardFile, ShardLayout, TensorSpec, layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a checkpoint's shards have in common."""

    generation: int
    step: int
    count: int
    state_digest: str
    header: dict[str, Any]


class Saver:
    """One checkpoint in flight at a time.  `saved` is called on the writing thread, shard by shard."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        tensors: dict[str, Tensor],
        shard_bytes: int,
        saved: Callable[[Snapshot, ShardFile], None],
    ) -> None:
        self.specs = tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
        self._layout = layout(self.specs, shard_bytes)
        self._directory = directory
        self._tensors = tensors
        self._saved = saved
        self._thread: threading.Thread | None = None
        self._copied: torch.cuda.Event | None = None
        self._error: OSError | None = None
        self.newest: Snapshot | None = None
        """The last one taken here, written or not."""

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def take(
        self,
        *,
        generation: int,
        step: int,
        state_digest: str,
        header: dict[str, Any],
        rank: int,
        world_size: int,
    ) -> None:
        """Copy this rank's shards of the state as it is now; write them on a thread.  Not while `busy`."""
        assert not self.busy
        snapshot = Snapshot(
            generation=generation,
            step=step,
            count=len(self._layout),
            state_digest=state_digest,
            header=header,
        )
        mine = self._layout[rank::world_size]
        names = {piece.spec.name for shard in mine for piece in shard.pieces}
        copies, copied = _copy_to_host({name: self._tensors[name] for name in names})
        self.newest, self._copied, self._error = snapshot, copied, None
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, mine, copies, copied), name="saver", daemon=True
        )
        self._thread.start()

    def before_update(self) -> None:
        """Call before tensors change: the device then finishes copying first.  The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def wait(self) -> None:
        """Wait for the checkpoint in flight.  Raise OSError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(
        self,
        snapshot: Snapshot,
        shards: tuple[ShardLayout, ...],
        copies: dict[str, Tensor],
        copied: torch.cuda.Event | None,
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            for shard in shards:
                self._saved(snapshot, self._directory.write_shard(shard, copies))
        except OSError as error:
            self._error = error
            print(
                f"worker: checkpoint of step {snapshot.step}: {error}; training goes on without it",
                file=sys.stderr,
                flush=True,
            )


@torch.no_grad()
def _copy_to_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies in host memory.  On CUDA they are pinned and complete once the event has happened."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.clone() for name, tensor in tensors.items()}, None
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        for name, tensor in tensors.items()
    }
    with torch.cuda.stream(stream):
        for name, tensor in tensors.items():
            copies[name].copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return copies, event
