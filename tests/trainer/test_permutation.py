from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.permutation import permutation

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
