"""Which of several datasets each window of training comes from: weights kept to within one window.

A window n uses dataset d for its (c+1)-th time as if datasets were periodic tasks on one processor: that
use becomes due at ⌊c·W/w⌋ and must be over by ⌈(c+1)·W/w⌉, where w is the dataset's weight and W their
sum.  Earliest deadline first meets every deadline (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate
progress"), so after any n windows a dataset has been used less than one time more or less than n·w/W.
The order repeats after W windows, in which each dataset is used exactly `w` times: any window is found,
and counted, by one look into a table of W entries.
"""

from __future__ import annotations

import functools
import math

from trainer.config import MOST_PERIOD

MOST_PARTS = 32


class Mixture:
    """The order for whole weights from 1 on.  It depends on nothing else, above all not on who trains."""

    __slots__ = ("_before", "_part", "period", "weights")

    def __init__(self, weights: tuple[int, ...]) -> None:
        """Raise ValueError unless there are 1 to MOST_PARTS weights, from 1 on, whose sum, reduced, is at
        most MOST_PERIOD."""
        if not 1 <= len(weights) <= MOST_PARTS or min(weights) < 1:
            raise ValueError(f"weights {weights}: allowed are 1 to {MOST_PARTS} whole numbers from 1 on")
        divisor = math.gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        self.period = sum(self.weights)
        if self.period > MOST_PERIOD:
            raise ValueError(
                f"weights {weights}: their sum is {self.period}; allowed: at most {MOST_PERIOD}; round them"
            )
        used = [0] * len(weights)
        self._part: list[int] = []
        self._before: list[int] = []
        for n in range(self.period):
            _, part = min(
                (-(-(count + 1) * self.period // weight), part)
                for part, (count, weight) in enumerate(zip(used, self.weights, strict=True))
                if count * self.period // weight <= n
            )
            self._part.append(part)
            self._before.append(used[part])
            used[part] += 1
        assert tuple(used) == self.weights

    def __call__(self, n: int) -> tuple[int, int]:
        """Which dataset window `n` (from 0) comes from, and how many windows before it did.  O(1)."""
        round_, place = divmod(n, self.period)
        part = self._part[place]
        return part, round_ * self.weights[part] + self._before[place]


@functools.lru_cache(maxsize=8)
def mixture(weights: tuple[int, ...]) -> Mixture:
    """A kept Mixture."""
    return Mixture(weights)
