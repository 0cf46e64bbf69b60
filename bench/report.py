"""What a benchmark says: rows with a median and a range, as a table for people or one JSON list.

A measurement that did not end within its limit counts as slower than every one that did: the median
of three with one such is still a number, the maximum is not (`None`, shown as "not within the
limit").  `n` counts all attempts.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table

# Metrics of which more is better; a goal for any other metric is an upper bound.
AT_LEAST = frozenset({"goodput", "mib_per_s", "of_dd", "of_cold_read", "decisions_per_s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a result.  `median`, `min` and `max` are in `unit`; None means "not within the
    limit" (or not measured at all if n is 0, and then `note` says why)."""

    case: str
    system: str
    metric: str
    unit: str
    median: float | None
    min: float | None
    max: float | None
    n: int
    goal: float | None
    note: str = ""

    @staticmethod
    def of(
        samples: Sequence[float | None],
        *,
        case: str,
        system: str,
        metric: str,
        unit: str,
        goal: float | None = None,
        note: str = "",
    ) -> Row:
        """Summarise `samples`; None stands for a measurement that ran into its limit."""
        values = sorted(math.inf if s is None else s for s in samples)
        missed = sum(s is None for s in samples)
        if missed:
            note = "; ".join(filter(None, [f"{missed} of {len(samples)} not within the limit", note]))
        return Row(
            case=case,
            system=system,
            metric=metric,
            unit=unit,
            median=_finite(statistics.median(values)) if values else None,
            min=_finite(values[0]) if values else None,
            max=_finite(values[-1]) if values else None,
            n=len(values),
            goal=goal,
            note=note,
        )

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the goal; None if there is no goal or nothing was measured."""
        if self.goal is None or self.n == 0:
            return None
        if self.median is None:
            return False
        return self.median >= self.goal if self.metric in AT_LEAST else self.median <= self.goal

    def as_json(self) -> dict[str, str | float | int | None]:
        """The nine keys of the contract, and `note` where there is something to note."""
        row: dict[str, str | float | int | None] = {
            "case": self.case,
            "system": self.system,
            "metric": self.metric,
            "unit": self.unit,
            "median": self.median,
            "min": self.min,
            "max": self.max,
            "n": self.n,
            "goal": self.goal,
        }
        if self.note:
            row["note"] = self.note
        return row


def progress(text: str) -> None:
    """Tell a person what is going on, where it cannot spoil the JSON."""
    print(text, file=sys.stderr, flush=True)


def emit(rows: Sequence[Row], *, as_json: bool, out: TextIO | None = None) -> None:
    """Print the result on `out` (standard output): one JSON list and nothing else, or a table."""
    out = out or sys.stdout
    if as_json:
        json.dump([row.as_json() for row in rows], out, indent=1, allow_nan=False)
        out.write("\n")
        out.flush()
        return
    table = Table("case", "system", "metric", "unit", "median", "min", "max", "n", "goal", "met", "note")
    for row in rows:
        bound = "≥" if row.metric in AT_LEAST else "≤"
        table.add_row(
            row.case,
            row.system,
            row.metric,
            row.unit,
            *(_shown(v, row.n) for v in (row.median, row.min, row.max)),
            str(row.n),
            "" if row.goal is None else f"{bound} {row.goal:g}",
            {None: "", True: "yes", False: "no"}[row.met],
            row.note,
        )
    # A file or a pipe has no width of its own; 80 columns would fold every row.
    Console(file=out, width=None if out.isatty() else 200).print(table)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None, n: int) -> str:
    if value is None:
        return "not in limit" if n else "-"
    return f"{value:.4g}"
