"""One of several ranks on the CPU that train in step and save: started by bench.checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import distributed
from torch._C._distributed_c10d import FileStore

from bench.saving import Training, measure
from trainer.checkpoint import CheckpointDirectory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--state-mb", type=float)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--checkpoints", type=int, required=True)
    parser.add_argument("--quiet", type=int, required=True)
    args = parser.parse_args()
    store = FileStore(str(args.directory / "store"), args.world)
    distributed.init_process_group("gloo", store=store, rank=args.rank, world_size=args.world)
    training = Training(
        CheckpointDirectory(args.directory / "cache"),
        state_mb=args.state_mb,
        tokens=args.tokens,
        device=torch.device("cpu"),
    )
    vote = torch.zeros(11, dtype=torch.float64)

    def agree() -> None:
        distributed.all_reduce(vote)

    agree()
    copies = training.copies(5) if args.rank == 0 else []
    agree()
    found = measure(
        training,
        rank=args.rank,
        world_size=args.world,
        checkpoints=args.checkpoints,
        quiet=args.quiet,
        vote=agree,
    )
    found.copy_s = copies
    (args.directory / f"rank{args.rank}.json").write_text(json.dumps(found.as_json()), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
