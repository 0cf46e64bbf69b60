"""Hosts the store of torchrun's c10d rendezvous in a process of its own.

By default one of the agents hosts it, and the job ends with that agent; a separate host is the better
configuration, so the baselines get it.
"""

from __future__ import annotations

import argparse
import signal

from torch._C._distributed_c10d import TCPStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    port: int = parser.parse_args().port
    _store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()


if __name__ == "__main__":
    main()
