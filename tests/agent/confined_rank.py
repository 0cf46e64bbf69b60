"""One of several ranks on one card: joins them with NCCL and prints the sum of their ranks.

Arguments: rank, world size, port of the store; `compile` to have torch.compile make a kernel too.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

rank, world, port = (int(one) for one in sys.argv[1:4])
store = dist.TCPStore("127.0.0.1", port, is_master=False)
dist.init_process_group("nccl", store=store, rank=rank, world_size=world)
value = torch.full((1 << 20,), float(rank), device="cuda")
if "compile" in sys.argv:
    value = torch.compile(lambda x: x * 2 - x)(value)
dist.all_reduce(value)
print(value[0].item())
dist.destroy_process_group()
