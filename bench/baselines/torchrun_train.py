"""What one would write for torchrun: DDP, a checkpoint every N steps, restart from the newest.

Started by `torchrun`, one worker a node.  Reports each committed step to the step trace.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from bench.baselines.tiny import batch, build, optimizer_for
from trainer.trace import StepTrace


def save(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write parameters, AdamW's state and the step as one file, which appears whole or not at all."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    # GPT-2 ties the head to the embedding; safetensors refuses two names for one storage.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Undo `save`; returns the step, 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict(
        {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(tensors["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--every-steps", type=int, required=True)
    parser.add_argument("--delay-ms", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--collective-timeout-s", type=float, help="default: torch's own 1,800 s")
    parser.add_argument("--steps", type=int, default=0, help="leave after so many; 0: never")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(args.seed)
    optimizer = optimizer_for(model)
    step = load(args.checkpoint, model, optimizer)
    ddp = DistributedDataParallel(model)
    # Names this world: TORCHELASTIC_RESTART_COUNT differs between agents, so rank 0's clock serves.
    epoch = torch.tensor([time.monotonic_ns()])
    dist.broadcast(epoch, src=0)
    dist.barrier()
    if args.collective_timeout_s is not None:
        # Only now that everybody is here: before, it would bound the wait for workers still importing torch.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=args.collective_timeout_s))
    steps = StepTrace()
    while not args.steps or step < args.steps:
        step += 1
        optimizer.zero_grad(set_to_none=True)
        tokens, targets = batch(args.seed, step, rank, world)
        time.sleep(args.delay_ms / 1000)
        loss = ddp(tokens, targets)
        loss.backward()
        optimizer.step()
        steps.committed(step=step, generation=int(epoch.item()), world=world, rank=rank)
        if rank == 0 and step % args.every_steps == 0:
            save(args.checkpoint, step, model, optimizer)


if __name__ == "__main__":
    main()
