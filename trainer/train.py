"""Train a GPT: config, data, model, loop.

    python -m trainer.train configs/tiny.yaml                           # one process
    torchrun --nproc-per-node=2 -m trainer.train configs/tiny.yaml      # several, without a coordinator
    python -m trainer.train --job job.json                              # what an agent starts

The loop below is all there is to elastic training from a script's point of view.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from trainer import control


def bind_to_parent() -> None:
    """Die with the agent, however it dies.  Nothing may come before this: an orphan would train on."""
    parent = os.environ.get("MUSTER_PARENT_PID")
    if parent is None:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        control.leave(1)


# Measured to survive the abort of a communicator (docs/architecture.md); read at the first use of CUDA.
NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # With the monitor off nobody answers the watchdog of a broken group, which asks for a dump all the
    # same and waits for it (60 s by default); freeing the group waits for its watchdog.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # it ends the process when a dead group's watchdog hangs
    # No flight recorder: it notes a stack at every collective, and prints one when a group breaks, which
    # took 5 s of a thread that freeing the group waits for.
    "TORCH_FR_BUFFER_SIZE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


def train(path: Path) -> None:
    import torch

    from trainer.checkpoint import make_header
    from trainer.config import config_digest, load_config
    from trainer.data import TokenDataset
    from trainer.elastic import ElasticGroup
    from trainer.model import (
        GPT,
        configure_optimizer,
        learning_rate,
        model_shape,
        resolve_device,
        resolve_dtype,
    )
    from trainer.prepare import ensure_dataset

    # ---- config
    config = load_config(path)
    settings = config.train
    device = resolve_device(settings, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")

    # ---- data
    directory = os.environ.get("MUSTER_DATA") or ensure_dataset(
        config.data, Path(config.checkpoint.dir) / "data"
    )
    data = TokenDataset(directory, window_bytes=int(os.environ.get("MUSTER_DATA_WINDOW", "0")))

    # ---- model
    shape = model_shape(config.model, data.vocab_size)

    def fresh() -> GPT:
        return GPT(shape, seed=settings.seed, compute_dtype=resolve_dtype(settings, device))

    gpt = fresh().to(device)
    optimizer = configure_optimizer(gpt, settings, device)
    step_tokens = settings.slices_per_step * settings.slice_sequences * settings.seq_len
    elastic = ElasticGroup.from_environment(config, device)
    data.ask = elastic.want
    model = elastic.adopt(
        gpt,
        optimizer,
        data,
        identity=config_digest(config),
        schedule=lambda step: learning_rate(step, settings),
        describe=lambda specs, step: make_header(
            config, shape, specs, step=step, tokens=step * step_tokens, dataset=data.id
        ),
        fresh=fresh,
    )

    def held_out(k: int) -> torch.Tensor:
        x, y = data.eval_slice(k, settings)
        loss: torch.Tensor = model(x.to(device), y.to(device))
        return loss

    # ---- loop
    if "MUSTER_CONTROL" not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: elastic.leave_after_step())
    try:
        while elastic.next_step():
            elastic.pause(settings.step_delay_ms / 1000)
            for batch in elastic.slices(data):
                elastic.backward(model(batch.x, batch.y))
            if elastic.commit() and settings.eval_every and elastic.step % settings.eval_every == 0:
                elastic.evaluate(held_out, settings.eval_slices)
    except Exception as error:
        traceback.print_exc()
        elastic.failed(error)
        raise


def main() -> None:
    bind_to_parent()
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description="Train a GPT.")
    parser.add_argument("config", nargs="?", type=Path, help="a YAML job file")
    parser.add_argument("--job", type=Path, help="the same as JSON, from an agent")
    arguments = parser.parse_args()
    path = arguments.job or arguments.config
    if path is None:
        parser.error("give a job file, for example configs/tiny.yaml")
    for name, value in NCCL_SETTINGS.items():
        os.environ.setdefault(name, value)

    from trainer.config import ConfigError
    from trainer.data import DatasetError
    from trainer.prepare import PrepareError
    from trainer.tokenizer import TokenizerError

    try:
        train(path)
    except (ConfigError, DatasetError, PrepareError, TokenizerError) as error:
        print(error, file=sys.stderr)
        control.leave(2)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        control.leave(1)
    control.leave(0)


if __name__ == "__main__":
    main()
