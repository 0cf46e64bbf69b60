"""An ordinary DDP script that has never heard of Muster: `torchrun_script.py DIR`.

Each rank appends a line when it begins and when its last step is done; it trains until DIR/enough exists
on all ranks' account (rank 0 looks, everybody hears)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

directory = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


def note(what: str) -> None:
    with open(directory / "notes", "a", encoding="utf-8") as file:
        file.write(f"{what} {rank}/{world} pid {os.getpid()}\n")


model = DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
note("began")
enough = torch.zeros(1)
while not enough:
    loss = model(torch.randn(2, 4)).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (directory / "enough").exists():
        enough += 1
    dist.broadcast(enough, 0)
note("done")
dist.destroy_process_group()
