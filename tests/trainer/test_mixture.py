"""Several datasets with weights: exact proportions, every window once in its dataset's epoch, any step in O(1)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.test_data import settings as train_settings
from tests.trainer.test_data import write_dataset
from trainer.config import ConfigError, DataSettings, parse_config
from trainer.data import (
    DatasetError,
    TokenDataset,
    dataset_id,
    mixed_windows,
    parse_dataset_manifest,
    slice_windows,
)
from trainer.mixing import main, mix
from trainer.mixture import MOST_PARTS, Mixture, mixture
from trainer.prepare import ensure_dataset

weights_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=9).map(tuple)


@given(weights=weights_strategy)
@settings(deadline=None)
def test_after_any_number_of_windows_each_dataset_is_within_one_of_its_share(
    weights: tuple[int, ...],
) -> None:
    turns, total = Mixture(weights), sum(weights)
    used = [0] * len(weights)
    for n in range(2 * turns.period + 1):
        part, before = turns(n)
        assert before == used[part], "the count of earlier windows is exact"
        used[part] += 1
        for count, weight in zip(used, weights, strict=True):
            assert abs(count * total - (n + 1) * weight) < total


@given(weights=weights_strategy, n=st.integers(0, 10**15))
@settings(deadline=None)
def test_far_ahead_the_order_is_the_same_and_counts_are_exact(weights: tuple[int, ...], n: int) -> None:
    turns = Mixture(weights)
    rounds, place = divmod(n, turns.period)
    part, before = turns(place)
    assert turns(n) == (part, before + rounds * turns.weights[part])


def test_two_equal_datasets_alternate_and_one_is_always_chosen() -> None:
    assert [Mixture((1, 1))(n) for n in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [Mixture((7,))(n) for n in range(3)] == [(0, 0), (0, 1), (0, 2)]
    assert "".join(str(Mixture((5, 3, 2))(n)[0]) for n in range(10)) == "0102010102"


@pytest.mark.parametrize("weights", [(), (0, 1), (1,) * (MOST_PARTS + 1), (65_535, 2)])
def test_weights_that_cannot_be_kept_are_refused(weights: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights)


@given(
    seed=st.integers(0, 2**63 - 1),
    slices=st.integers(1, 5),
    sequences=st.integers(1, 4),
    parts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=50)
def test_every_window_of_every_dataset_is_used_once_in_its_epoch(
    seed: int, slices: int, sequences: int, parts: list[tuple[int, int]]
) -> None:
    windows, weights = [count for count, _ in parts], tuple(weight for _, weight in parts)
    steps = 2 * max(windows) * sum(weights) // (slices * sequences) + 1
    used: list[list[int]] = [[] for _ in parts]
    for step in range(1, steps + 1):
        for j in range(slices):
            chosen = mixed_windows(
                seed,
                step,
                j,
                slices_per_step=slices,
                slice_sequences=sequences,
                windows=windows,
                weights=weights,
            )
            for part, window in chosen:
                used[part].append(window)
    for part, count in enumerate(windows):
        assert len(used[part]) >= count, "enough steps for an epoch"
        for start in range(0, len(used[part]) - count + 1, count):
            assert Counter(used[part][start : start + count]) == Counter(range(count))


def test_the_windows_of_a_mixture_never_change() -> None:
    def chosen(step: int, j: int) -> list[tuple[int, int]]:
        return mixed_windows(
            1, step, j, slices_per_step=6, slice_sequences=4, windows=[1000, 1000, 50], weights=(5, 3, 2)
        )

    assert chosen(3, 2) == [(0, 738), (1, 832), (0, 52), (2, 32)]
    assert chosen(10**12, 5) == chosen(10**12, 5)  # at once
    assert {part for part, _ in chosen(10**12, 5)} <= {0, 1, 2}
    first = [w for step in range(1, 50) for part, w in chosen(step, 0) if part == 0]
    second = [w for step in range(1, 50) for part, w in chosen(step, 0) if part == 1]
    assert first[: len(second)] != second, "datasets of one length do not walk in step"
    with pytest.raises(ValueError, match="steps begin at 1"):
        chosen(0, 0)


# --------------------------------------------------------------------------------------- datasets


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """80 windows of tokens below 100 and 20 windows of tokens from 100 on, three to one."""
    low = np.arange(641) % 100
    high = 100 + np.arange(161) % 100
    write_dataset(tmp_path / "low", [low[:300].tolist(), low[300:].tolist()], [1] * 17)
    write_dataset(tmp_path / "high", [high.tolist()], [199] * 17)
    return mix([(tmp_path / "low", 6), (tmp_path / "high", 2)], tmp_path / "mixed")


def test_a_mixture_is_one_manifest_that_names_every_blob(mixed: Path) -> None:
    raw = (mixed / "manifest.json").read_bytes()
    manifest = parse_dataset_manifest(raw)
    assert [(part.weight, part.train, part.val) for part in manifest.mix] == [(3, 2, 1), (1, 1, 1)]
    assert dataset_id(manifest) == hashlib.sha256(raw).hexdigest()
    assert set(manifest.blobs()) == {path.name for path in (mixed / "blobs").iterdir()}
    splits = json.loads(raw)["splits"]  # where the coordinator and the agents look
    assert {shard["digest"] for split in splits.values() for shard in split} == set(manifest.blobs())


def test_training_draws_by_weight_and_goes_through_each_dataset(mixed: Path) -> None:
    dataset, train = TokenDataset(mixed), train_settings()
    seen: Counter[str] = Counter()
    starts: dict[str, list[int]] = {"low": [], "high": []}
    for step in range(1, 21):
        for j in range(3):
            x, y = dataset.slice(step, j, train)
            for row, target in zip(x.tolist(), y.tolist(), strict=True):
                name = "high" if row[0] >= 100 else "low"
                assert {token >= 100 for token in (*row, *target)} == {name == "high"}, "no window spans two"
                assert row[1:] == target[:-1]
                seen[name] += 1
                starts[name].append(row[0])
    assert seen == {"low": 90, "high": 30}
    expected = Counter(100 + 8 * w % 100 for w in range(20))
    assert Counter(starts["high"][:20]) == expected


def test_evaluation_takes_turns_by_weight(mixed: Path) -> None:
    dataset, train = TokenDataset(mixed), train_settings(slice_sequences=4)
    for k in range(3):
        x, _ = dataset.eval_slice(k, train)
        assert sorted(x[:, 0].tolist()) == [1, 1, 1, 199]


def test_who_asks_does_not_matter(mixed: Path) -> None:
    """A slice is the same whatever was asked before, so it is the same in every world and after a resumption."""
    one, train = TokenDataset(mixed), train_settings()
    all_of_them = {(s, j): one.digest_of(s, j, train) for s in range(1, 9) for j in range(3)}
    mixture.cache_clear()
    other = TokenDataset(mixed)
    for s, j in reversed(all_of_them):
        assert other.digest_of(s, j, train) == all_of_them[s, j]


def test_one_dataset_keeps_its_meaning_and_its_id(tmp_path: Path) -> None:
    plain = TokenDataset(write_dataset(tmp_path / "d", [list(range(82))], [1, 2, 3]))
    assert "mix" not in json.loads(plain.manifest.to_json())
    train = train_settings()
    windows = slice_windows(1, 4, 2, slices_per_step=3, slice_sequences=2, windows=10)
    assert plain.windows_of(4, 2, train) == [(0, window) for window in windows]


def test_a_part_without_one_window_is_named(mixed: Path) -> None:
    with pytest.raises(DatasetError, match=r"the train split of numbers has 161 tokens; allowed: .* 201"):
        TokenDataset(mixed).slice(1, 0, train_settings(seq_len=200))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('"weight":3', '"weight":0'), "weights"),
        (('"train":2', '"train":1'), "of 3 shards of the train split"),
        (('"name":"numbers","train":2', '"train":2'), "KeyError"),
    ],
)
def test_a_mixture_that_cannot_be_right_is_refused(mixed: Path, change: tuple[str, str], told: str) -> None:
    path = mixed / "manifest.json"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(DatasetError, match=told):
        TokenDataset(mixed)


def test_datasets_of_different_tokenizers_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "a", [[1, 2, 3]], [1])
    write_dataset(tmp_path / "b", [[1, 2, 3]], [1], vocab_size=300)
    assert main(["--out", str(tmp_path / "m"), f"1:{tmp_path / 'a'}", f"1:{tmp_path / 'b'}"]) == 1
    assert "its vocabulary size is 300, that of numbers is 257" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_mixture_of_a_mixture_is_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="mix its parts instead"):
        mix([(mixed, 1), (tmp_path / "low", 1)], tmp_path / "again")


# --------------------------------------------------------------------------------------- job file


def data(**section: Any) -> DataSettings:
    return parse_config({"name": "job", "data": section}).data


@pytest.mark.parametrize(
    ("weights", "whole"), [([0.7, 0.3], [7, 3]), ([3, 6], [1, 2]), ([1], [1]), (["1e-2", 0.99], [1, 99])]
)
def test_weights_are_exact_proportions(weights: list[Any], whole: list[int]) -> None:
    assert data(mix=[{"path": "d", "weight": weight} for weight in weights]).weights() == whole


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"path": "a", "mix": [{"path": "b"}]}, "exactly one of `path`"),
        ({"mix": []}, "data.mix: found"),
        ({"mix": [{"path": "a", "weight": 0}]}, "data.mix.0.weight: found 0"),
        ({"mix": [{"path": "a", "wieght": 2}]}, "the nearest is data.mix.0.weight"),
        ({"mix": [{"path": "a"}, {"weight": 2}]}, "data.mix.1: .*exactly one of `path`"),
        ({"mix": [{"text": "a"}], "tokenizer": "bpe:300"}, "no bpe:N in a mixture"),
        ({"mix": [{"path": "a"}], "tokenizer": "bpe:300"}, "no `tokenizer` beside `path`"),
        ({"mix": [{"path": "a", "weight": 0.123456789}, {"path": "b"}]}, "round them"),
    ],
)
def test_a_mixture_that_is_wrong_is_refused_with_its_place(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        data(**section)


def test_a_jobs_mixture_is_prepared_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("several datasets, mixed with weights. " * 200)
    write_dataset(tmp_path / "numbers", [list(range(250)) * 3], [1] * 20)
    # of bytes, like the text
    manifest = json.loads((tmp_path / "numbers" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"kind": "byte", "vocab_size": 257, "digest": None}
    section = data(
        mix=[
            {"text": str(tmp_path / "text.txt"), "weight": 0.25},
            {"path": str(tmp_path / "numbers"), "weight": 0.75},
        ]
    )
    made = ensure_dataset(section, tmp_path / "cache")
    stamp = (made / "manifest.json").stat().st_mtime_ns
    assert [part.weight for part in TokenDataset(made).manifest.mix] == [1, 3]
    assert ensure_dataset(section, tmp_path / "cache") == made
    assert (made / "manifest.json").stat().st_mtime_ns == stamp
