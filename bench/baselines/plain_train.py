"""The loop that Muster's trainer would be without fault tolerance: plain DDP on the same slices of the
same data, with the same model, optimizer, clipping and schedule, and no vote, digest, control or report.

Started by torchrun; reports each step to the step trace, as Muster's worker does.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer.agreement import share
from trainer.config import load_config
from trainer.data import TokenDataset
from trainer.model import GPT, configure_optimizer, learning_rate, model_shape
from trainer.trace import StepTrace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="Muster's job file")
    config = load_config(parser.parse_args().job)
    train = config.train
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert config.data.path is not None
    data = TokenDataset(config.data.path)
    model = GPT(model_shape(config.model, data.vocab_size), seed=train.seed)
    optimizer = configure_optimizer(model, train, torch.device("cpu"))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    mine = share(train.slices_per_step, world, rank)
    steps = StepTrace()
    for step in range(1, train.steps + 1):
        optimizer.zero_grad(set_to_none=True)
        time.sleep(train.step_delay_ms / 1000)
        for j in mine:
            x, y = data.slice(step, j, train)
            with contextlib.nullcontext() if j == mine[-1] else ddp.no_sync():
                # DDP divides by the world size; the mean is over the step's slices.
                (ddp(x, y) * (world / train.slices_per_step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train)
        optimizer.step()
        steps.committed(step=step, generation=1, world=world, rank=rank)


if __name__ == "__main__":
    main()
