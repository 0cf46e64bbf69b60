"""A dataset that does not fit the disk: its shards are named before they are read, and no others are kept."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

import trainer.data
from tests.trainer.test_data import settings, write_dataset
from trainer.data import DatasetError, TokenDataset

SHARD = 80  # tokens: ten windows of eight
SHARDS = 12
WINDOW = 6 * SHARD * 2  # bytes of six shards of uint16


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    tokens = np.arange(SHARD * SHARDS) % 250
    shards = [tokens[i : i + SHARD].tolist() for i in range(0, len(tokens), SHARD)]
    return write_dataset(tmp_path / "whole", shards, list(range(100, 150)))


class Supplier:
    """Puts what is asked for, and takes away what is not named any more."""

    def __init__(self, whole: Path, window: Path) -> None:
        self.whole, self.window = whole / "blobs", window / "blobs"
        self.window.mkdir(parents=True)
        shutil.copy(whole / "manifest.json", window)
        self.asked: list[list[str]] = []
        self.withheld: set[str] = set()

    def __call__(self, digests: list[str]) -> None:
        self.asked.append(digests)
        for digest in digests:
            if digest not in self.withheld:
                shutil.copy(self.whole / digest, self.window / digest)
        for path in self.window.iterdir():
            if path.name not in digests:
                path.unlink()


@pytest.fixture
def supplier(whole: Path, tmp_path: Path) -> Supplier:
    return Supplier(whole, tmp_path / "window")


def opened(supplier: Supplier, window: int = WINDOW) -> TokenDataset:
    dataset = TokenDataset(supplier.window.parent, window_bytes=window)
    dataset.ask = supplier
    return dataset


def never() -> bool:
    return False


def test_through_a_window_every_step_is_what_it_is_in_the_whole(whole: Path, supplier: Supplier) -> None:
    train = settings(slices_per_step=2, slice_sequences=1)
    all_of_it, windowed = TokenDataset(whole), opened(supplier)
    for step in range(1, 60):
        assert windowed.ready(step, [0, 1], train, never)
        for j in (0, 1):
            assert windowed.digest_of(step, j, train) == all_of_it.digest_of(step, j, train)
        kept = sum(path.stat().st_size for path in supplier.window.iterdir())
        assert kept <= WINDOW
        assert len(windowed._opened) <= 6
    assert windowed.id == all_of_it.id
    assert len(supplier.asked) > 10


def test_what_is_needed_next_is_named_first_and_the_bound_is_kept(supplier: Supplier) -> None:
    train = settings(slices_per_step=2, slice_sequences=1)
    windowed = opened(supplier)
    windowed.ready(7, [1], train, never)
    (asked,) = supplier.asked
    expected: list[str] = []
    for step in range(7, 70):
        for shard in windowed._shards_of(step, 1, train):
            if shard.digest not in expected:
                expected.append(shard.digest)
    assert asked == expected[: len(asked)]
    assert 5 <= len(asked) <= 6


def test_a_step_that_needs_more_than_the_window_gets_it(whole: Path, supplier: Supplier) -> None:
    train = settings(slices_per_step=2, slice_sequences=20)
    windowed = opened(supplier, window=1)
    assert windowed.ready(1, [0, 1], train, never)
    assert windowed.digest_of(1, 1, train) == TokenDataset(whole).digest_of(1, 1, train)


def test_the_shards_of_the_evaluation_are_always_kept(whole: Path, supplier: Supplier) -> None:
    train = settings(slices_per_step=2, slice_sequences=1, eval_every=5, eval_slices=2)
    all_of_it, windowed = TokenDataset(whole), opened(supplier)
    held_out = {shard.digest for shard in all_of_it.manifest.val}
    for step in range(1, 20):
        assert windowed.ready(step, [0], train, never)
        assert held_out <= set(supplier.asked[-1])
        assert windowed.eval_slice(1, train)[0].equal(all_of_it.eval_slice(1, train)[0])


def test_waiting_for_a_shard_ends_when_it_comes_or_when_it_is_given_up(supplier: Supplier) -> None:
    train = settings(slices_per_step=2, slice_sequences=1)
    windowed = opened(supplier)
    late = windowed._shards_of(1, 0, train)[0].digest
    supplier.withheld = {late}
    assert not windowed.ready(1, [0], train, lambda: True)
    looked = threading.Event()

    def comes() -> bool:
        if not looked.is_set():
            looked.set()
            shutil.copy(supplier.whole / late, supplier.window / late)
        return False

    assert windowed.ready(1, [0], train, comes)
    assert looked.is_set()


def test_a_worker_warms_up_on_a_slice_that_it_asks_for(
    whole: Path, supplier: Supplier, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = settings()
    windowed = opened(supplier)
    assert windowed.digest_of(1, 0, train) == TokenDataset(whole).digest_of(1, 0, train)
    assert supplier.asked
    monkeypatch.setattr(trainer.data, "ARRIVAL_TIMEOUT_S", 0.0)
    supplier.withheld = {path.name for path in supplier.whole.iterdir()}
    with pytest.raises(DatasetError, match="did not come within"):
        all(windowed.digest_of(step, 0, train) for step in range(2, 30))


def test_a_shard_that_came_damaged_is_named(supplier: Supplier) -> None:
    train = settings()
    windowed = opened(supplier)

    def damages(digests: list[str]) -> None:
        for digest in digests:
            (supplier.window / digest).write_bytes(b"x" * SHARD * 2)

    windowed.ask = damages
    assert windowed.ready(1, [0], train, never)
    with pytest.raises(DatasetError, match="its SHA-256 is"):
        windowed.digest_of(1, 0, train)
