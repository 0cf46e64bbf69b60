"""A prepared dataset, and which of its tokens a slice of a step consumes.

Format `muster-dataset-1` (docs/architecture.md, "Data").  Which windows a slice holds is a pure function
of (seed, step, slice): it depends neither on who asks nor on how many train together.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import TrainSettings
from trainer.permutation import permutation

FORMAT = "muster-dataset-1"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Tokens = NDArray[np.unsignedinteger[Any]]


class DatasetError(Exception):
    """A dataset is absent, damaged or too small; the message names the file and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShard:
    digest: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """What `manifest.json` of a dataset says."""

    name: str
    dtype: str  # "uint16" or "uint32", little-endian
    tokenizer_kind: str  # "byte" or "bpe"
    vocab_size: int
    tokenizer_digest: str | None  # blob with tokenizer.json
    train: tuple[TokenShard, ...]
    val: tuple[TokenShard, ...]

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces.  The dataset's id is the SHA-256 of its UTF-8 bytes."""
        value = {
            "format": FORMAT,
            "name": self.name,
            "dtype": self.dtype,
            "tokenizer": {
                "kind": self.tokenizer_kind,
                "vocab_size": self.vocab_size,
                "digest": self.tokenizer_digest,
            },
            "splits": {
                "train": [{"digest": s.digest, "tokens": s.tokens} for s in self.train],
                "val": [{"digest": s.digest, "tokens": s.tokens} for s in self.val],
            },
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def blobs(self) -> tuple[str, ...]:
        """Every digest that must lie under `blobs/`."""
        digests = [shard.digest for shard in (*self.train, *self.val)]
        return tuple(dict.fromkeys([*digests, *([self.tokenizer_digest] if self.tokenizer_digest else [])]))


def parse_dataset_manifest(text: str | bytes, source: str = "dataset manifest") -> DatasetManifest:
    """Raise DatasetError, naming `source`, unless `text` is a manifest of this format."""
    try:
        return _manifest_from(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{source}: not a {FORMAT} manifest ({type(error).__name__}: {error}); prepare the dataset again"
        ) from error


def _manifest_from(value: Any) -> DatasetManifest:
    if value["format"] != FORMAT:
        raise ValueError(f"format is {value['format']!r}, expected {FORMAT!r}")
    splits, tokenizer = value["splits"], value["tokenizer"]
    manifest = DatasetManifest(
        name=str(value["name"]),
        dtype=value["dtype"],
        tokenizer_kind=tokenizer["kind"],
        vocab_size=int(tokenizer["vocab_size"]),
        tokenizer_digest=tokenizer["digest"],
        train=tuple(TokenShard(digest=s["digest"], tokens=int(s["tokens"])) for s in splits["train"]),
        val=tuple(TokenShard(digest=s["digest"], tokens=int(s["tokens"])) for s in splits["val"]),
    )
    if manifest.dtype not in _DTYPES:
        raise ValueError(f"dtype is {manifest.dtype!r}, expected one of {', '.join(_DTYPES)}")
    for digest in manifest.blobs():
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest is {digest!r}, expected 64 hex digits")
    return manifest


def dataset_id(manifest: DatasetManifest) -> str:
    """SHA-256 (hex) of the canonical manifest: equal ids mean equal tokens."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def slice_windows(
    seed: int, step: int, j: int, *, slices_per_step: int, slice_sequences: int, windows: int
) -> list[int]:
    """The windows, of `windows` in the train split, that slice `j` (from 0) of `step` (from 1) holds.

    Every window is used once in an epoch, in an order that depends on the seed and the epoch only.
    """
    if step < 1 or not 0 <= j < slices_per_step:
        raise ValueError(
            f"step {step}, slice {j}: steps begin at 1 and slices are 0 to {slices_per_step - 1}"
        )
    first = ((step - 1) * slices_per_step + j) * slice_sequences
    return [
        permutation(seed, w // windows, windows)(w % windows) for w in range(first, first + slice_sequences)
    ]


def slice_digest(tokens: Tokens | NDArray[np.int64]) -> int:
    """blake2b-64 of the tokens as little-endian uint32, as an unsigned integer (little-endian).

    The step log adds these up modulo 2^64, so that the order and the place of the work do not matter.
    """
    raw = np.ascontiguousarray(tokens, dtype="<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def slice_seed(seed: int, step: int, j: int) -> int:
    """A seed for what is random inside a slice (dropout), the same on whatever rank computes it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{j}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Split:
    """One split as a single stream of tokens, memory-mapped shard by shard."""

    def __init__(self, shards: list[Tokens]) -> None:
        self._shards = shards
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))
        self.tokens = self._ends[-1] if shards else 0

    def windows(self, seq_len: int) -> int:
        return max(0, self.tokens - 1) // seq_len

    def read(self, start: int, stop: int) -> Tokens:
        parts = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            offset = self._ends[index] - len(self._shards[index])
            parts.append(self._shards[index][start - offset : stop - offset])
            start = self._ends[index]
            index += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TokenDataset:
    """A dataset directory (`manifest.json`, `blobs/<digest>`), verified and memory-mapped.

    Shard digests are checked once; a stamp file in the directory remembers size and mtime of what was
    checked, so that the next worker opens at once.
    """

    def __init__(self, directory: Path | str) -> None:
        """Raise DatasetError if the manifest or a blob is absent, damaged or not what the digest says."""
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DatasetError(
                f"{path}: {error.strerror}; make the dataset with `python -m trainer.prepare --out {directory}`"
            ) from error
        self.manifest = parse_dataset_manifest(text, str(path))
        self.id = dataset_id(self.manifest)
        self.vocab_size = self.manifest.vocab_size
        self._verify()
        self._train = _Split([self._map(shard) for shard in self.manifest.train])
        self._val = _Split([self._map(shard) for shard in self.manifest.val])

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json of a BPE dataset; None for bytes."""
        digest = self.manifest.tokenizer_digest
        return self._blob(digest) if digest else None

    @property
    def train_tokens(self) -> int:
        return self._train.tokens

    @property
    def val_tokens(self) -> int:
        return self._val.tokens

    def windows_of(self, step: int, j: int, train: TrainSettings) -> list[int]:
        """`slice_windows` for this dataset.  Raise DatasetError if it has not even one window."""
        windows = self._train.windows(train.seq_len)
        if windows == 0:
            raise self._too_small("train", self._train, train.seq_len)
        return slice_windows(
            train.seed,
            step,
            j,
            slices_per_step=train.slices_per_step,
            slice_sequences=train.slice_sequences,
            windows=windows,
        )

    def slice(self, step: int, j: int, train: TrainSettings) -> tuple[Tensor, Tensor]:
        """Inputs and targets of slice `j` of `step`: int64 [slice_sequences, seq_len] on the CPU."""
        return _inputs_and_targets(self._rows(self._train, self.windows_of(step, j, train), train.seq_len))

    def digest_of(self, step: int, j: int, train: TrainSettings) -> int:
        """`slice_digest` of the windows (seq_len + 1 tokens each) of slice `j` of `step`."""
        return slice_digest(self._rows(self._train, self.windows_of(step, j, train), train.seq_len))

    def slice_and_digest(self, step: int, j: int, train: TrainSettings) -> tuple[Tensor, Tensor, int]:
        """`slice` and `digest_of` from one read."""
        rows = self._rows(self._train, self.windows_of(step, j, train), train.seq_len)
        return *_inputs_and_targets(rows), slice_digest(rows)

    def eval_slice(self, k: int, train: TrainSettings) -> tuple[Tensor, Tensor]:
        """Inputs and targets of evaluation slice `k` (from 0), the same at every step of a job.

        Raise DatasetError if the dataset has no validation split of at least one window.
        """
        windows = self._val.windows(train.seq_len)
        if windows == 0:
            raise self._too_small("val", self._val, train.seq_len)
        first = k * train.slice_sequences
        numbers = [w % windows for w in range(first, first + train.slice_sequences)]
        return _inputs_and_targets(self._rows(self._val, numbers, train.seq_len))

    def _rows(self, split: _Split, windows: list[int], seq_len: int) -> Tokens:
        return np.stack([split.read(w * seq_len, (w + 1) * seq_len + 1) for w in windows])

    def _too_small(self, name: str, split: _Split, seq_len: int) -> DatasetError:
        return DatasetError(
            f"{self.directory}: the {name} split has {split.tokens} tokens; allowed: at least seq_len + 1 = "
            f"{seq_len + 1}; add text, shorten train.seq_len"
            + (", raise val_fraction or set train.eval_every to 0" if name == "val" else "")
        )

    def _blob(self, digest: str) -> Path:
        return self.directory / "blobs" / digest

    def _map(self, shard: TokenShard) -> Tokens:
        if shard.tokens == 0:
            return np.zeros(0, dtype=_DTYPES[self.manifest.dtype])
        return np.memmap(self._blob(shard.digest), dtype=_DTYPES[self.manifest.dtype], mode="r")

    def _verify(self) -> None:
        stamp_path = self.directory / "verified.json"
        known = _read_stamps(stamp_path)
        stamps: dict[str, list[int]] = {}
        tokens = {shard.digest: shard.tokens for shard in (*self.manifest.train, *self.manifest.val)}
        for digest in self.manifest.blobs():
            path = self._blob(digest)
            try:
                status = path.stat()
                stamp = [status.st_size, status.st_mtime_ns]
                if known.get(digest) != stamp:
                    self._verify_blob(path, digest, tokens.get(digest))
            except OSError as error:
                raise DatasetError(
                    f"{path}: {error.strerror}; a blob of the dataset is absent: fetch or prepare it again"
                ) from error
            stamps[digest] = stamp
        if stamps != known:
            _write_stamps(stamp_path, stamps)

    def _verify_blob(self, path: Path, digest: str, tokens: int | None) -> None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise DatasetError(
                f"{path}: its SHA-256 is {found}; the blob is damaged: fetch or prepare it again"
            )
        if tokens is None:
            return
        dtype = _DTYPES[self.manifest.dtype]
        if path.stat().st_size != tokens * dtype.itemsize:
            raise DatasetError(
                f"{path}: has {path.stat().st_size} bytes; the manifest says {tokens} tokens of {self.manifest.dtype}"
            )
        # An id outside the vocabulary would surface as a device assertion in the middle of training.
        largest = int(np.memmap(path, dtype=dtype, mode="r").max()) if tokens else 0
        if largest >= self.vocab_size:
            raise DatasetError(
                f"{path}: holds token {largest}; allowed: below the vocabulary's {self.vocab_size}; prepare it again"
            )


def _inputs_and_targets(rows: Tokens) -> tuple[Tensor, Tensor]:
    block = torch.from_numpy(rows.astype(np.int64))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def _read_stamps(path: Path) -> Mapping[str, list[int]]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_stamps(path: Path, stamps: Mapping[str, list[int]]) -> None:
    """Best effort: a dataset on a read-only disk is verified every time."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".verified.")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(stamps, file)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
