"""Finds a small part of a failing seed's faults that fails still: delta debugging (Zeller, ddmin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.sim.faults import Fault


def shrink(
    faults: Sequence[Fault], fails: Callable[[list[Fault]], bool], most_runs: int = 300
) -> list[Fault]:
    """A sublist for which `fails` is true and from which no tested part could be left out."""
    kept, parts, runs = list(faults), 2, 0
    while kept and runs < most_runs:
        size = max(1, -(-len(kept) // parts))
        for begin in range(0, len(kept), size):
            smaller = kept[:begin] + kept[begin + size :]
            runs += 1
            if fails(smaller):
                kept, parts = smaller, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(kept), 2 * parts)
    return kept
