"""A keyed permutation of 0 … n−1 that needs no table: O(1) memory and time for any index."""

from __future__ import annotations

import functools
import hashlib
import math

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of range(n), a pure function of (seed, epoch, n).

    A Feistel network over the grid a × b, a = ⌈√n⌉ and b = ⌈n/a⌉, whose halves are added modulo a and b
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5); results at n or beyond
    walk the cycle on.  The grid has fewer than n + a cells, so that is rare.
    """

    __slots__ = ("_columns", "_keys", "_rows", "n")

    def __init__(self, seed: int, epoch: int, n: int) -> None:
        if n < 1:
            raise ValueError(f"permutation of {n} items: n must be at least 1")
        self.n = n
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        stream = hashlib.shake_128(f"muster permutation {seed} {epoch} {n}".encode()).digest(8 * _ROUNDS)
        self._keys = tuple(int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8))

    def __call__(self, index: int) -> int:
        """The image of `index`.  Raise IndexError outside range(n)."""
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} of a permutation of {self.n} items")
        rows, columns, keys = self._rows, self._columns, self._keys
        while True:
            left, right = divmod(index, columns)
            for i in range(0, _ROUNDS, 2):
                left = (left + _mix(right ^ keys[i])) % rows
                right = (right + _mix(left ^ keys[i + 1])) % columns
            index = left * columns + right
            if index < self.n:
                return index


def _mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@functools.lru_cache(maxsize=64)
def permutation(seed: int, epoch: int, n: int) -> Permutation:
    """A kept Permutation: its keys are derived once for each epoch."""
    return Permutation(seed, epoch, n)
