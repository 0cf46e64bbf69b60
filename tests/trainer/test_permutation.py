from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer.permutation
from trainer.agreement import share
from trainer.data import slice_windows
from trainer.permutation import Permutation, permutation

seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, epoch=st.integers(0, 100), n=st.integers(1, 500))
def test_it_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert sorted(map(permutation(seed, epoch, n), range(n))) == list(range(n))


@given(seed=seeds, n=st.integers(2, 2**40), indices=st.sets(st.integers(0, 2**40), min_size=2, max_size=50))
def test_no_two_indices_meet_however_large_the_range(seed: int, n: int, indices: set[int]) -> None:
    inside = {index % n for index in indices}
    images = {permutation(seed, 0, n)(index) for index in inside}
    assert len(images) == len(inside)
    assert all(0 <= image < n for image in images)


def test_any_place_costs_the_same_and_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming is a matter of asking for the next index: nothing before it is gone through, no table is made."""
    mixed: list[int] = []
    honest = trainer.permutation._mix
    monkeypatch.setattr(trainer.permutation, "_mix", lambda z: (mixed.append(z), honest(z))[1])
    n = 2**50 + 1
    order = Permutation(9, 3, n)
    for index in (0, 1, n // 2, n - 1):
        mixed.clear()
        order(index)
        assert len(mixed) <= 6 * 8, "a few rounds and, rarely, a few walks"
    assert sum(sys.getsizeof(getattr(order, name)) for name in Permutation.__slots__) < 1_000


@given(
    seed=seeds,
    step=st.integers(1, 10**9),
    slices=st.integers(1, 40),
    sequences=st.integers(1, 4),
    windows=st.integers(1, 10**9),
    worlds=st.lists(st.integers(1, 50), min_size=2, max_size=3),
)
def test_a_step_is_the_same_windows_in_any_world(
    seed: int, step: int, slices: int, sequences: int, windows: int, worlds: list[int]
) -> None:
    """Whoever shares a step, together they compute each slice once, and each slice is what it always is."""

    def computed(world: int) -> list[list[int]]:
        return [
            slice_windows(seed, step, j, slices_per_step=slices, slice_sequences=sequences, windows=windows)
            for rank in range(world)
            for j in share(slices, world, rank)
        ]

    assert all(computed(world) == computed(1) for world in worlds)
    assert len(computed(1)) == slices


def test_its_values_never_change() -> None:
    assert list(map(permutation(1, 0, 10), range(10))) == [7, 5, 0, 2, 9, 6, 8, 4, 1, 3]


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = {
        tuple(map(permutation(seed, epoch, 100), range(100))) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_neighbours_are_scattered() -> None:
    n = 10_000
    image = list(map(permutation(5, 0, n), range(n)))
    steps = [abs(b - a) for a, b in itertools.pairwise(image)]
    assert sum(steps) / len(steps) == pytest.approx(n / 3, rel=0.05)  # as for random pairs
    # each tenth of the range is hit evenly by each tenth of the indices
    for start in range(0, n, 1000):
        low = sum(i < 1000 for i in image[start : start + 1000])
        assert 60 <= low <= 140


def test_indices_outside_and_empty_ranges_are_refused() -> None:
    with pytest.raises(IndexError, match="index 10 of a permutation of 10"):
        permutation(1, 0, 10)(10)
    with pytest.raises(ValueError, match="at least 1"):
        permutation(1, 0, 0)
