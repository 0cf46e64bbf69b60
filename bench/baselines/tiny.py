"""Model, optimizer and batches of the baselines: the same as Muster's own worker has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.job import SLICE_SEQUENCES, SLICES_PER_STEP, job_file
from trainer.config import parse_config
from trainer.model import GPT, configure_optimizer, model_shape

_CONFIG = parse_config(
    job_file(
        name="baseline",
        steps=10_000_000,
        step_delay_ms=0,
        seed=1,
        device="cpu",
        elastic={},
        data={"path": "unused"},
    )
)


def build(seed: int) -> GPT:
    """The benchmark's model; the same numbers in every process."""
    torch.set_num_threads(1)
    return GPT(model_shape(_CONFIG.model, 257), seed=seed)


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """The AdamW that Muster's trainer uses, at a constant learning rate."""
    return configure_optimizer(model, _CONFIG.train, torch.device("cpu"))


def batch(seed: int, step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a step's sequences: int64 inputs and targets, [sequences, seq_len]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 101 + rank)
    sequences = max(1, SLICES_PER_STEP * SLICE_SEQUENCES // world)
    tokens = torch.randint(0, 257, (sequences, _CONFIG.train.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
