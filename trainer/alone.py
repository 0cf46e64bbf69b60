"""Training without a coordinator: one generation for life, from torchrun's environment or a world of one.

Stands where the agent stands otherwise.  Checkpoints go to `checkpoint.dir`, which all ranks share, and
training resumes from the newest intact one there; a failure ends the process, and torchrun starts it again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from trainer import control
from trainer.checkpoint import CheckpointDirectory, ShardFile, make_manifest
from trainer.config import TrainingConfig
from trainer.group import Group
from trainer.saving import Snapshot

CONNECT_TIMEOUT_S = 300.0


class Alone:
    """An agent's stand-in: hands out the one plan, prints progress, commits checkpoints."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._on_message: Callable[[control.Down], None]
        self._shards: list[control.Shard] = []
        self._store: TCPStore | None = None

    def listen(self, on_message: Callable[[control.Down], None]) -> None:
        self._on_message = on_message
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
        agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self._world_size > 1 and self._rank == 0 and not agent_serves:
            self._store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
            )
        on_message(
            control.Plan(
                # The store outlives a restart by torchrun, so each restart has its own prefix in it.
                generation=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1,
                rank=self._rank,
                world_size=self._world_size,
                group_rank=self._rank,
                group_world_size=self._world_size,
                store_host=host,
                store_port=port,
                cut="abort",
                committed_step=0,
                committed_digest="",
                source="checkpoint",
                checkpoint_step=None,
                release=False,
                checkpoint_before_cut=False,
                timeout_s=CONNECT_TIMEOUT_S,
            )
        )

    def send(self, message: control.Up) -> None:
        match message:
            case control.Shard():
                if message.digest:
                    self._shards.append(message)
            case control.Failed():
                print(f"rank {self._rank}: {message.kind}: {message.detail}", file=sys.stderr)
                control.leave(1)
            case control.Finished():
                self._on_message(control.Stop())
            case _:
                pass

    def commit(self, checkpoints: CheckpointDirectory, group: Group, snapshot: Snapshot) -> None:
        """Make the shards that the ranks wrote a checkpoint.  All ranks call this after writing theirs."""
        row = [0] * (5 * snapshot.count)
        for shard in self._shards:
            digest = bytes.fromhex(shard.digest)
            words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
            row[5 * shard.index : 5 * shard.index + 5] = [shard.bytes, *words]
        self._shards.clear()
        table = [sum(column) for column in zip(*group.exchange(row), strict=True)]
        files = []
        for index in range(snapshot.count):
            size, *words = table[5 * index : 5 * index + 5]
            if size == 0:
                print(
                    f"checkpoint of step {snapshot.step}: shard {index} was not written; none made",
                    file=sys.stderr,
                )
                return
            digest = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
            files.append(ShardFile(index=index, digest=digest.hex(), bytes=size))
        if group.rank == 0:
            manifest = make_manifest(
                job=self._config.name,
                step=snapshot.step,
                generation=snapshot.generation,
                state_digest=snapshot.state_digest,
                header=snapshot.header,
                shards=files,
            )
            checkpoints.write_manifest(manifest)
            settings = self._config.checkpoint
            checkpoints.retain(settings.keep, every=settings.keep_every)
