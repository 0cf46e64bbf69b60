"""A prepared dataset, and which of its tokens a slice of a step consumes.

Format `muster-dataset-1` (docs/architecture.md, "Data").  Which windows a slice holds is a pure function
of (seed, step, slice): it depends neither on who asks nor on how many train together.  A dataset may be a
mixture of several: then each window's dataset follows from the weights, and each dataset has a
permutation of its own.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import TrainSettings
from trainer.mixture import Mixture, mixture
from trainer.permutation import permutation

FORMAT = "muster-dataset-1"
MOST_STEPS_AHEAD = 64
MOST_SHARDS_AHEAD = 4_096
ARRIVAL_POLL_S = 0.02
ARRIVAL_TIMEOUT_S = 600.0
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
class MixPart:
    """One dataset of a mixture: its shards follow those of the parts before it."""

    name: str
    weight: int
    train: int  # how many shards of the train split are its own
    val: int


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
    mix: tuple[MixPart, ...] = ()
    """Empty for one dataset; else the splits hold the shards of all parts, one part after another."""

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces.  The dataset's id is the SHA-256 of its UTF-8 bytes."""
        value: dict[str, Any] = {
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
        if self.mix:
            value["mix"] = [asdict(part) for part in self.mix]
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def parts(self) -> tuple[MixPart, ...]:
        """Of a mixture; one dataset is its own only part."""
        return self.mix or (MixPart(name=self.name, weight=1, train=len(self.train), val=len(self.val)),)

    def blobs(self) -> tuple[str, ...]:
        """Every digest that must lie under `blobs/`."""
        digests = [shard.digest for shard in (*self.train, *self.val)]
        return tuple(dict.fromkeys([*digests, *([self.tokenizer_digest] if self.tokenizer_digest else [])]))


def parse_dataset_manifest(text: str | bytes, source: str = "dataset manifest") -> DatasetManifest:
    """Raise DatasetError, naming `source`, unless `text` is a manifest of this format."""
    try:
        return _manifest_from(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
        mix=tuple(
            MixPart(name=str(p["name"]), weight=int(p["weight"]), train=int(p["train"]), val=int(p["val"]))
            for p in value.get("mix", ())
        ),
    )
    if manifest.mix:
        Mixture(tuple(part.weight for part in manifest.mix))
        for split, shards in (("train", manifest.train), ("val", manifest.val)):
            counts = [getattr(part, split) for part in manifest.mix]
            if min(counts) < 0 or sum(counts) != len(shards):
                raise ValueError(f"mix: the parts have {counts} of {len(shards)} shards of the {split} split")
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


def mixed_windows(
    seed: int,
    step: int,
    j: int,
    *,
    slices_per_step: int,
    slice_sequences: int,
    windows: Sequence[int],
    weights: tuple[int, ...],
) -> list[tuple[int, int]]:
    """`slice_windows` for several datasets with so many `windows` and these `weights`: (dataset, window).

    Each dataset is gone through in epochs of its own, in an order that depends on the seed, its number and
    its epoch only.
    """
    if step < 1 or not 0 <= j < slices_per_step:
        raise ValueError(
            f"step {step}, slice {j}: steps begin at 1 and slices are 0 to {slices_per_step - 1}"
        )
    first = ((step - 1) * slices_per_step + j) * slice_sequences
    chosen = []
    for n in range(first, first + slice_sequences):
        part, before = mixture(weights)(n)
        epoch, index = divmod(before, windows[part])
        order = permutation(_part_seed(seed, part), epoch, windows[part])
        chosen.append((part, order(index)))
    return chosen


def _part_seed(seed: int, part: int) -> int:
    """Datasets of one length must not walk in step."""
    digest = hashlib.blake2b(f"{seed}/part {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


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
    """One split as a single stream of tokens, memory-mapped shard by shard as they are read."""

    def __init__(self, shards: Sequence[TokenShard], open_: Callable[[TokenShard], Tokens]) -> None:
        self._shards = tuple(shards)
        self._open = open_
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self.tokens = self._ends[-1] if shards else 0

    def windows(self, seq_len: int) -> int:
        return max(0, self.tokens - 1) // seq_len

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[TokenShard, int, int]]:
        """The shards that hold the tokens start … stop−1, and which of their own these are."""
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            shard, end = self._shards[index], self._ends[index]
            offset = end - shard.tokens
            yield shard, start - offset, min(stop, end) - offset
            start = end
            index += 1

    def shards(self, start: int, stop: int) -> list[TokenShard]:
        return [shard for shard, first, last in self._pieces(start, stop) if first < last]

    def read(self, start: int, stop: int) -> Tokens:
        parts = [self._open(shard)[first:last] for shard, first, last in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TokenDataset:
    """A dataset directory (`manifest.json`, `blobs/<digest>`), verified and memory-mapped.

    Shard digests are checked once; a stamp file in the directory remembers size and mtime of what was
    checked, so that the next worker opens at once.

    With `window_bytes` the shards may be absent: `ask` is told which ones are needed next, in order and at
    most so many bytes ahead, and whoever hears it puts them there and keeps them until they are no longer
    named.  What the next step needs is asked for even if it is more.
    """

    def __init__(self, directory: Path | str, *, window_bytes: int = 0) -> None:
        """Raise DatasetError if the manifest or a blob is absent, damaged or not what the digest says."""
        self.directory = Path(directory)
        self.ask: Callable[[list[str]], None] = lambda digests: None
        self._window_bytes = window_bytes
        self._asked: list[str] = []
        self._opened: dict[str, Tokens] = {}
        self._named: dict[tuple[int, int], list[TokenShard]] = {}
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
        if not window_bytes:
            self._verify(self.manifest.blobs())
        parts = self.manifest.parts()
        self._weights = tuple(part.weight for part in parts)
        self._train = self._splits(self.manifest.train, [part.train for part in parts])
        self._val = self._splits(self.manifest.val, [part.val for part in parts])

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json of a BPE dataset; None for bytes."""
        digest = self.manifest.tokenizer_digest
        return self._blob(digest) if digest else None

    @property
    def train_tokens(self) -> int:
        return sum(split.tokens for split in self._train)

    @property
    def val_tokens(self) -> int:
        return sum(split.tokens for split in self._val)

    def windows_of(self, step: int, j: int, train: TrainSettings) -> list[tuple[int, int]]:
        """Part (0 unless this is a mixture) and window of each sequence of slice `j` of `step`.

        Raise DatasetError if a part has not even one window.
        """
        windows = [split.windows(train.seq_len) for split in self._train]
        if 0 in windows:
            raise self._too_small("train", self._train, windows.index(0), train.seq_len)
        if not self.manifest.mix:
            numbers = slice_windows(
                train.seed,
                step,
                j,
                slices_per_step=train.slices_per_step,
                slice_sequences=train.slice_sequences,
                windows=windows[0],
            )
            return [(0, number) for number in numbers]
        return mixed_windows(
            train.seed,
            step,
            j,
            slices_per_step=train.slices_per_step,
            slice_sequences=train.slice_sequences,
            windows=windows,
            weights=self._weights,
        )

    def ready(
        self, step: int, slices: Sequence[int], train: TrainSettings, given_up: Callable[[], bool]
    ) -> bool:
        """Whether these slices of the step can be read now: waits for their shards until `given_up` says so.

        Asks for what the same slices of the steps after it will read, too."""
        if not self._window_bytes:
            return True
        wanted = self._ahead(step, slices, train)
        if wanted != self._asked:
            self._asked = wanted
            self._opened = {digest: self._opened[digest] for digest in wanted if digest in self._opened}
            self.ask(wanted)
        needed = [shard for j in slices for shard in self._shards_of(step, j, train)]
        while not all(self._is_here(shard.digest) for shard in needed):
            if given_up():
                return False
            time.sleep(ARRIVAL_POLL_S)
        return True

    def _ahead(self, step: int, slices: Sequence[int], train: TrainSettings) -> list[str]:
        held_out = self._held_out(train) if train.eval_every else []
        wanted = dict.fromkeys(shard.digest for shard in held_out)
        tokens_left = self._window_bytes // self._token_bytes - sum(shard.tokens for shard in held_out)
        self._named = {(s, j): named for (s, j), named in self._named.items() if s >= step}
        for later in range(step, step + MOST_STEPS_AHEAD):
            for shard in (shard for j in slices for shard in self._shards_of(later, j, train)):
                if shard.digest in wanted:
                    continue
                tokens_left -= shard.tokens
                if later > step and (tokens_left < 0 or len(wanted) >= MOST_SHARDS_AHEAD):
                    return list(wanted)
                wanted[shard.digest] = None
        return list(wanted)

    def _shards_of(self, step: int, j: int, train: TrainSettings) -> list[TokenShard]:
        named = self._named.get((step, j))
        if named is None:
            windows = self.windows_of(step, j, train)
            named = self._named[step, j] = self._shards_of_windows(self._train, windows, train.seq_len)
        return named

    def _held_out(self, train: TrainSettings) -> list[TokenShard]:
        windows = [w for k in range(train.eval_slices) for w in self._eval_windows(k, train)]
        return self._shards_of_windows(self._val, windows, train.seq_len)

    @staticmethod
    def _shards_of_windows(
        splits: list[_Split], windows: list[tuple[int, int]], seq_len: int
    ) -> list[TokenShard]:
        found = (
            shard for part, w in windows for shard in splits[part].shards(w * seq_len, (w + 1) * seq_len + 1)
        )
        return list(dict.fromkeys(found))

    @property
    def _token_bytes(self) -> int:
        return _DTYPES[self.manifest.dtype].itemsize

    def _is_here(self, digest: str) -> bool:
        return digest in self._opened or self._blob(digest).exists()

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

        In a mixture, the parts that have a window in their validation split take turns by weight.  Raise
        DatasetError if no part has.
        """
        return _inputs_and_targets(self._rows(self._val, self._eval_windows(k, train), train.seq_len))

    def _eval_windows(self, k: int, train: TrainSettings) -> list[tuple[int, int]]:
        windows = [split.windows(train.seq_len) for split in self._val]
        able = [part for part, count in enumerate(windows) if count]
        if not able:
            raise self._too_small("val", self._val, 0, train.seq_len)
        turns = mixture(tuple(self._weights[part] for part in able))
        first = k * train.slice_sequences
        chosen = []
        for n in range(first, first + train.slice_sequences):
            turn, before = turns(n)
            chosen.append((able[turn], before % windows[able[turn]]))
        return chosen

    def _rows(self, splits: list[_Split], windows: list[tuple[int, int]], seq_len: int) -> Tokens:
        return np.stack([splits[part].read(w * seq_len, (w + 1) * seq_len + 1) for part, w in windows])

    def _splits(self, shards: tuple[TokenShard, ...], counts: list[int]) -> list[_Split]:
        rest = iter(shards)
        return [_Split(list(itertools.islice(rest, count)), self._open) for count in counts]

    def _too_small(self, name: str, splits: list[_Split], part: int, seq_len: int) -> DatasetError:
        of = f" of {self.manifest.mix[part].name}" if self.manifest.mix else ""
        return DatasetError(
            f"{self.directory}: the {name} split{of} has {splits[part].tokens} tokens; allowed: at least "
            f"seq_len + 1 = {seq_len + 1}; add text, shorten train.seq_len"
            + (", raise val_fraction or set train.eval_every to 0" if name == "val" else "")
        )

    def _blob(self, digest: str) -> Path:
        return self.directory / "blobs" / digest

    def _open(self, shard: TokenShard) -> Tokens:
        found = self._opened.get(shard.digest)
        if found is None:
            if self._window_bytes:
                self._await(shard.digest)
                self._verify((shard.digest,))
            found = self._opened[shard.digest] = self._map(shard)
        return found

    def _await(self, digest: str) -> None:
        """For what is read without `ready`: the slice that warms a worker up."""
        if not self._is_here(digest) and digest not in self._asked:
            self._asked = [*self._asked, digest]
            self.ask(self._asked)
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while not self._is_here(digest):
            if time.monotonic() > deadline:
                raise DatasetError(
                    f"{self._blob(digest)}: it did not come within {ARRIVAL_TIMEOUT_S:g} s; the agent's log says why"
                )
            time.sleep(ARRIVAL_POLL_S)

    def _map(self, shard: TokenShard) -> Tokens:
        if shard.tokens == 0:
            return np.zeros(0, dtype=_DTYPES[self.manifest.dtype])
        return np.memmap(self._blob(shard.digest), dtype=_DTYPES[self.manifest.dtype], mode="r")

    def _verify(self, digests: Iterable[str]) -> None:
        stamp_path = self.directory / "verified.json"
        known = _read_stamps(stamp_path)
        # Of a window, what was verified before stays known; of all of it, only what is still named.
        stamps: dict[str, list[int]] = dict(known) if self._window_bytes else {}
        tokens = {shard.digest: shard.tokens for shard in (*self.manifest.train, *self.manifest.val)}
        for digest in digests:
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
