from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import TrainSettings, parse_config
from trainer.data import (
    DatasetError,
    DatasetManifest,
    TokenDataset,
    TokenShard,
    dataset_id,
    parse_dataset_manifest,
    slice_digest,
    slice_windows,
)


def settings(**train: object) -> TrainSettings:
    train = {"seq_len": 8, "slices_per_step": 3, "slice_sequences": 2, **train}
    return parse_config({"name": "job", "data": {"text": "x"}, "train": train}).train


def write_dataset(directory: Path, train: list[list[int]], val: list[int], vocab_size: int = 257) -> Path:
    blobs = directory / "blobs"
    blobs.mkdir(parents=True)

    def shard(tokens: list[int]) -> TokenShard:
        raw = np.array(tokens, dtype="<u2").tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        (blobs / digest).write_bytes(raw)
        return TokenShard(digest=digest, tokens=len(tokens))

    manifest = DatasetManifest(
        name="numbers",
        dtype="uint16",
        tokenizer_kind="byte",
        vocab_size=vocab_size,
        tokenizer_digest=None,
        train=tuple(map(shard, train)),
        val=(shard(val),),
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    return directory


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """82 tokens 0 … 81 in three shards: ten windows of eight, cut across shards."""
    return write_dataset(
        tmp_path / "numbers",
        [list(range(30)), list(range(30, 33)), list(range(33, 82))],
        list(range(100, 120)),
    )


@given(
    seed=st.integers(0, 2**63 - 1),
    slices=st.integers(1, 7),
    sequences=st.integers(1, 5),
    windows=st.integers(1, 60),
)
def test_every_window_is_used_once_in_every_epoch(
    seed: int, slices: int, sequences: int, windows: int
) -> None:
    steps = 2 * windows  # enough for at least two epochs
    used = [
        window
        for step in range(1, steps + 1)
        for j in range(slices)
        for window in slice_windows(
            seed, step, j, slices_per_step=slices, slice_sequences=sequences, windows=windows
        )
    ]
    for start in range(0, len(used) - windows + 1, windows):
        assert Counter(used[start : start + windows]) == Counter(range(windows))


def test_the_windows_of_a_slice_never_change() -> None:
    windows = slice_windows(1, 3, 2, slices_per_step=6, slice_sequences=4, windows=1000)
    assert windows == slice_windows(1, 3, 2, slices_per_step=6, slice_sequences=4, windows=1000)
    assert windows == [76, 204, 272, 315]
    with pytest.raises(ValueError, match="steps begin at 1"):
        slice_windows(1, 0, 0, slices_per_step=6, slice_sequences=4, windows=1000)
    with pytest.raises(ValueError, match="slices are 0 to 5"):
        slice_windows(1, 1, 6, slices_per_step=6, slice_sequences=4, windows=1000)


def test_a_slice_holds_its_windows_and_targets_are_one_ahead(numbers: Path) -> None:
    dataset, train = TokenDataset(numbers), settings()
    for step in range(1, 5):
        for j in range(3):
            x, y = dataset.slice(step, j, train)
            assert x.dtype == y.dtype == torch.int64
            assert x.shape == y.shape == (2, 8)
            windows = slice_windows(1, step, j, slices_per_step=3, slice_sequences=2, windows=10)
            assert x[:, 0].tolist() == [8 * w for w in windows]
            assert torch.equal(y, x + 1)  # tokens are their own positions, also across shards


def test_the_digest_is_of_inputs_and_last_target_as_uint32(numbers: Path) -> None:
    dataset, train = TokenDataset(numbers), settings()
    x, y, digest = dataset.slice_and_digest(2, 1, train)
    rows = torch.cat([x, y[:, -1:]], dim=1).numpy()
    expected = hashlib.blake2b(rows.astype("<u4").tobytes(), digest_size=8).digest()
    assert (
        digest == dataset.digest_of(2, 1, train) == slice_digest(rows) == int.from_bytes(expected, "little")
    )
    assert 0 <= digest < 2**64
    assert digest != dataset.digest_of(2, 2, train)


def test_evaluation_slices_are_in_order_and_wrap_around(numbers: Path) -> None:
    dataset, train = TokenDataset(numbers), settings()
    assert dataset.eval_slice(0, train)[0][:, 0].tolist() == [100, 108]
    assert dataset.eval_slice(1, train)[0][:, 0].tolist() == [100, 108]


def test_a_split_without_one_window_is_refused_with_its_size(numbers: Path) -> None:
    dataset = TokenDataset(numbers)
    with pytest.raises(
        DatasetError, match=r"train split has 82 tokens; allowed: at least seq_len \+ 1 = 101"
    ):
        dataset.slice(1, 0, settings(seq_len=100))
    with pytest.raises(DatasetError, match="val split has 20 tokens"):
        dataset.eval_slice(0, settings(seq_len=30))


def test_the_id_is_the_digest_of_the_manifest_file(numbers: Path) -> None:
    raw = (numbers / "manifest.json").read_bytes()
    assert TokenDataset(numbers).id == hashlib.sha256(raw).hexdigest()
    assert dataset_id(parse_dataset_manifest(raw)) == hashlib.sha256(raw).hexdigest()


def test_a_damaged_blob_is_noticed_and_named(numbers: Path) -> None:
    blob = min((numbers / "blobs").iterdir())
    raw = bytearray(blob.read_bytes())
    raw[3] ^= 1
    blob.write_bytes(raw)
    with pytest.raises(DatasetError, match=f"{blob.name}: its SHA-256 is"):
        TokenDataset(numbers)


def test_a_blob_that_changes_after_it_was_verified_is_verified_again(numbers: Path) -> None:
    TokenDataset(numbers)
    blob = min((numbers / "blobs").iterdir())
    blob.write_bytes(bytes(blob.stat().st_size))
    os.utime(blob, ns=(0, 0))
    with pytest.raises(DatasetError, match="damaged"):
        TokenDataset(numbers)


def test_blobs_that_were_verified_are_not_read_again(numbers: Path) -> None:
    TokenDataset(numbers)
    blob = min((numbers / "blobs").iterdir())
    before = blob.stat()
    raw = bytearray(blob.read_bytes())
    raw[0] ^= 1
    blob.write_bytes(raw)
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    TokenDataset(numbers)  # same size and time: the stamp is believed


def test_an_absent_blob_or_manifest_is_named(numbers: Path, tmp_path: Path) -> None:
    blob = min((numbers / "blobs").iterdir())
    blob.unlink()
    with pytest.raises(DatasetError, match=f"{blob.name}: No such file"):
        TokenDataset(numbers)
    with pytest.raises(DatasetError, match=r"manifest\.json: No such file"):
        TokenDataset(tmp_path / "nowhere")


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    directory = write_dataset(tmp_path / "d", [[1, 2, 900]], [1, 2], vocab_size=257)
    with pytest.raises(DatasetError, match="holds token 900; allowed: below the vocabulary's 257"):
        TokenDataset(directory)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('"muster-dataset-1"', '"other"'), "format is 'other'"),
        (('"uint16"', '"int8"'), "dtype is 'int8'"),
        (('"digest":"', '"digest":"../'), "expected 64 hex digits"),
        (('"splits"', '"parts"'), "KeyError"),
        (("}", ""), "JSONDecodeError"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(numbers: Path, change: tuple[str, str], told: str) -> None:
    path = numbers / "manifest.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DatasetError, match=told) as caught:
        TokenDataset(numbers)
    assert str(path) in str(caught.value)
