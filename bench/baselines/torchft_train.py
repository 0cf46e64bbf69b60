"""torchft's own recipe (its train_ddp example) on the benchmark's model: one replica group of one
process, healing from a peer, commit by vote.  Reports each committed step to the step trace.

Runs in the virtual environment that `bench.fleets.torchft` makes.
"""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the types.
import argparse
import time
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket, TCPStore
from torchft import (  # type: ignore[import-not-found]  # in an environment of its own
    DistributedDataParallel,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)

from bench.baselines.tiny import batch, build, optimizer_for
from trainer.trace import StepTrace


def patched_hook(state: Manager, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torchft 0.2.0's DDP hook, but for the Future that it hands to DDP.

    The original hands on the Future that `wait` chains to the collective's.  When a peer dies, `wait`
    notes the error for the vote and returns before that Future was made (`_fut` is None), and once an
    error was noted `allreduce` answers with a plain Future that has no `_fut`: the survivors die of
    AssertionError or AttributeError in backward.  After `wait` the bucket holds the result, or what the
    vote will throw away, so a completed Future of the bucket says the same without the crash.
    """
    state.allreduce(bucket.buffer()).wait()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--replica", required=True)
    parser.add_argument("--min-replicas", type=int, required=True)
    parser.add_argument("--delay-ms", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument(
        "--timeout-s",
        type=float,
        help="for collectives and calls; default: the example's 5 s and torchft's 60 s",
    )
    parser.add_argument("--heartbeat-ms", type=int, default=100)
    args = parser.parse_args()

    DistributedDataParallel._comm_hook = staticmethod(patched_hook)
    model = build(args.seed)
    inner = optimizer_for(model)

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": inner.state_dict()}

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeouts = {} if args.timeout_s is None else {"timeout": timedelta(seconds=args.timeout_s)}
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=args.timeout_s or 5)),
        min_replica_size=args.min_replicas,
        load_state_dict=load_state,
        state_dict=state,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=args.lighthouse,
        replica_id=args.replica,
        hostname="127.0.0.1",
        heartbeat_interval=timedelta(milliseconds=args.heartbeat_ms),
        **timeouts,
    )
    ddp = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    steps = StepTrace()
    while True:
        before = manager.current_step()
        optimizer.zero_grad()
        # Which replica this is may only be known when the quorum is; any batch serves the clock.
        tokens, targets = batch(args.seed, before + 1, 0, args.min_replicas)
        time.sleep(args.delay_ms / 1000)
        loss = ddp(tokens, targets)
        loss.backward()
        optimizer.step()
        if manager.current_step() > before:
            steps.committed(
                step=manager.current_step(),
                generation=manager._quorum_id,
                world=manager.num_participants(),
                rank=manager.participating_rank() or 0,
            )


if __name__ == "__main__":
    main()
