"""Checkpoints: named tensors cut into safetensors shards, and manifests that make shards a checkpoint.

Format `muster-checkpoint-1` (docs/architecture.md, "Checkpoints").  A directory holds `blobs/<sha256>`
and `manifests/<step>.json`; every file is written as temporary, fsync, rename.  Nothing is ever
unpickled: shards are safetensors, the rest is JSON, and every digest is verified before use.

Names of tensors: the model's parameters are `model.<name>`, whatever else there is has another prefix.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protos import seal
from trainer.config import TrainingConfig, config_digest
from trainer.model import ModelShape

FORMAT = "muster-checkpoint-1"
MODEL_PREFIX = "model."
READERS = 2

_DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DIGEST = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger("muster.checkpoint")


class CheckpointError(Exception):
    """Base of what can be wrong with a checkpoint; each message names the checkpoint's step."""


class DamagedShard(CheckpointError):
    """A shard of checkpoint `step` is absent or is not what its digest and the manifest say."""

    def __init__(self, step: int, index: int, digest: str, why: str) -> None:
        super().__init__(f"checkpoint of step {step}: shard {index} ({digest}) is damaged: {why}")
        self.step, self.index, self.digest, self.why = step, index, digest, why


class DamagedManifest(CheckpointError):
    """A manifest is not readable as one, or is not what was sealed."""


class WrongTensors(CheckpointError):
    """A checkpoint is sound but holds other tensors than the model that should be restored."""


class NoCheckpoint(CheckpointError):
    """There are checkpoints, but none of them is intact."""


# ------------------------------------------------------------------------------------------ layout


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, dtype (as torch spells it, without `torch.`) and shape of one tensor of the state."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(name: str, tensor: Tensor) -> TensorSpec:
        return TensorSpec(name=name, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A whole tensor, or elements start … stop−1 of it flattened."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.spec.numel

    @property
    def key(self) -> str:
        return self.spec.name if self.whole else f"{self.spec.name}@{self.start}:{self.stop}"

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.spec.itemsize

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that this piece names; a view where `tensor` is contiguous."""
        return tensor if self.whole else tensor.reshape(-1)[self.start : self.stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    index: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Of tensor data; the file has a small header besides."""
        return sum(piece.bytes for piece in self.pieces)


def layout(specs: Iterable[TensorSpec], shard_bytes: int) -> tuple[ShardLayout, ...]:
    """Cut tensors into shards of at most `shard_bytes` of data.

    A pure function of its arguments, so that every rank, at any world size, cuts alike: tensors fill
    shards in order; one that is larger than a shard is cut into flat ranges.
    """
    shards: list[list[Piece]] = [[]]
    room = shard_bytes
    for spec in specs:
        most = max(1, shard_bytes // spec.itemsize)
        # At least one round, so that an empty tensor has its piece too.
        for start in range(0, max(1, spec.numel), most):
            piece = Piece(spec=spec, start=start, stop=min(start + most, spec.numel))
            if piece.bytes > room and shards[-1]:
                shards.append([])
                room = shard_bytes
            shards[-1].append(piece)
            room -= piece.bytes
    return tuple(ShardLayout(index=i, pieces=tuple(pieces)) for i, pieces in enumerate(shards))


_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "F32": "float32", "F64": "float64", "I64": "int64",
}  # fmt: skip
_SAFETENSORS_NAMES = {ours: theirs for theirs, ours in _SAFETENSORS.items()}
_SAFETENSORS_ORDER = tuple(_SAFETENSORS.values())


class ShardImage:
    """A shard's file, byte for byte, as memory that tensors are copied into.

    The file's header depends on the layout only, so that between a live tensor and the disk there is one
    copy.  The bytes are those that the safetensors library would write: tensors in descending order of
    dtype (its enumeration) and then by name, and a header padded with spaces to a multiple of 8.
    """

    def __init__(self, shard: ShardLayout) -> None:
        self.shard = shard
        ordered = sorted(shard.pieces, key=lambda p: (-_SAFETENSORS_ORDER.index(p.spec.dtype), p.key))
        described: dict[str, Any] = {}
        starts: list[tuple[Piece, int]] = []
        end = 0
        for piece in ordered:
            start, end = end, end + piece.bytes
            starts.append((piece, start))
            described[piece.key] = {
                "dtype": _SAFETENSORS_NAMES[piece.spec.dtype],
                "shape": list(piece.spec.shape) if piece.whole else [piece.stop - piece.start],
                "data_offsets": [start, end],
            }
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._starts = tuple((piece, len(self._header) + start) for piece, start in starts)
        self.bytes = len(self._header) + end
        """Of the whole file."""

    @torch.no_grad()
    def fill(self, memory: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copy the shard's pieces of `tensors` (any device) into `memory`: uint8 [self.bytes] on the CPU,
        at a multiple of 8 in its storage.  Into pinned memory, copies from CUDA are only queued."""
        memory[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        for piece, start in self._starts:
            if piece.bytes:
                source = piece.of(tensors[piece.spec.name])
                target = memory[start : start + piece.bytes].view(source.dtype).view(source.shape)
                target.copy_(source, non_blocking=True)


# ---------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    index: int
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The list that makes shards a checkpoint."""

    job: str
    step: int
    generation: int
    state_digest: str
    header: Mapping[str, Any]
    shards: tuple[ShardFile, ...]

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, byte for byte what the coordinator commits and signs."""
        value = {
            "format": FORMAT,
            "job": self.job,
            "step": self.step,
            "generation": self.generation,
            "state_digest": self.state_digest,
            "header": self.header,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of this checkpoint, in order."""
        return tuple(
            TensorSpec(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"]))
            for t in self.header["tensors"]
        )

    def layout(self) -> tuple[ShardLayout, ...]:
        return layout(self.specs(), self.header["shard_bytes"])


def make_header(
    cfg: TrainingConfig,
    shape: ModelShape,
    specs: Iterable[TensorSpec],
    *,
    step: int,
    tokens: int,
    dataset: str,
) -> dict[str, Any]:
    """The JSON header of a state: everything needed to go on from it, or to export it.

    `tokens` is how many the job has consumed up to and including `step`; `dataset` is the dataset's id.
    """
    return {
        "step": step,
        "tokens": tokens,
        "seed": cfg.train.seed,
        "config_digest": config_digest(cfg),
        "dataset": dataset,
        "slices_per_step": cfg.train.slices_per_step,
        "model": shape.to_dict(),
        "tensors": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs],
        "shard_bytes": cfg.checkpoint.shard_bytes,
    }


def make_manifest(
    *,
    job: str,
    step: int,
    generation: int,
    state_digest: str,
    header: Mapping[str, Any],
    shards: Iterable[ShardFile],
) -> Manifest:
    """A manifest with its shards in order.  Raise ValueError unless they are 0 … n−1, each once."""
    ordered = tuple(sorted(shards, key=lambda shard: shard.index))
    if [shard.index for shard in ordered] != list(range(len(ordered))):
        raise ValueError(
            f"checkpoint of step {step}: shards {[s.index for s in ordered]} are not 0 to n-1 once"
        )
    return Manifest(
        job=job, step=step, generation=generation, state_digest=state_digest, header=header, shards=ordered
    )


def parse_manifest(
    text: str | bytes, source: str = "checkpoint manifest", *, authority: str = "", known: str = ""
) -> Manifest:
    """Raise DamagedManifest, naming `source`, unless `text` is a manifest that can be restored from.

    Whatever seal it bears must fit.  With `authority`, a fingerprint, it must be signed by that one; with
    `known` only if it is signed at all."""
    try:
        found = seal.verified(text, authority) if authority else seal.opened(text)
        if known and found.fingerprint:
            seal.verified(text, known)
        return _manifest_from(found.manifest())
    except seal.SealError as error:
        raise DamagedManifest(f"{source}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedManifest(
            f"{source}: not a {FORMAT} manifest ({type(error).__name__}: {error})"
        ) from error


def _manifest_from(value: Any) -> Manifest:
    if value["format"] != FORMAT:
        raise ValueError(f"format is {value['format']!r}, expected {FORMAT!r}")
    manifest = make_manifest(
        job=str(value["job"]),
        step=int(value["step"]),
        generation=int(value["generation"]),
        state_digest=str(value["state_digest"]),
        header=value["header"],
        shards=[
            ShardFile(index=int(s["index"]), digest=str(s["digest"]), bytes=int(s["bytes"]))
            for s in value["shards"]
        ],
    )
    for shard in manifest.shards:
        if not _DIGEST.fullmatch(shard.digest):
            raise ValueError(f"shard {shard.index} has the digest {shard.digest!r}, expected 64 hex digits")
    for spec in manifest.specs():
        if spec.dtype not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in spec.shape):
            raise ValueError(f"tensor {spec.name} is {spec.dtype}{list(spec.shape)}")
    if not isinstance(manifest.header["shard_bytes"], int) or manifest.header["shard_bytes"] < 1:
        raise ValueError(f"shard_bytes is {manifest.header['shard_bytes']!r}, expected a positive integer")
    if _least_pieces(manifest) > len(manifest.shards) + len(manifest.header["tensors"]):
        raise ValueError(f"{len(manifest.shards)} shards are too few for tensors of these shapes")
    if len(manifest.layout()) != len(manifest.shards):
        raise ValueError(f"{len(manifest.shards)} shards, expected {len(manifest.layout())}")
    return manifest


def _least_pieces(manifest: Manifest) -> int:
    """How many pieces `layout` would make: known before it makes them, for a shape may claim anything."""
    most = manifest.header["shard_bytes"]
    return sum(-(-spec.numel // max(1, most // spec.itemsize)) for spec in manifest.specs())


# --------------------------------------------------------------------------------------- directory


class CheckpointDirectory:
    """A local directory of checkpoints: an agent's cache, or `checkpoint.dir` without a coordinator.

    Safe for several processes that write different shards, and the same ones, at once.
    """

    def __init__(self, root: Path | str, authority: str = "") -> None:
        """With `authority`, a fingerprint, manifests that it has not signed count as damaged.  Without, those
        that are not signed are believed (training without a coordinator writes such), and those that are
        only if they are of the authority that `manifests/authority` names, where there is that file."""
        self.root = Path(root)
        self._authority = authority
        self._blobs = self.root / "blobs"
        self._manifests = self.root / "manifests"

    def write_shard(self, shard: ShardLayout, tensors: Mapping[str, Tensor]) -> ShardFile:
        """Write one shard, cut from `tensors` (name → tensor, any device), durably.

        A blob that is already there under the same digest is kept.  Raise OSError when the disk is full;
        nothing half-written stays.
        """
        image = ShardImage(shard)
        memory = torch.empty(image.bytes, dtype=torch.uint8)
        image.fill(memory, tensors)
        digest = sha256(memory)
        self.store(digest, memory)
        return ShardFile(index=shard.index, digest=digest, bytes=image.bytes)

    def store(self, digest: str, data: Tensor) -> bool:
        """Write a blob (uint8 on the CPU) durably under its SHA-256, which the caller has computed.

        What is there already, whole, is kept: then False.  Raise OSError when the disk is full; nothing
        half-written stays.
        """
        path = self._blobs / digest
        if path.exists() and path.stat().st_size == len(data) and _sha256(path) == digest:
            # A cache evicts what was used longest ago: this is needed again.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            return False
        _write_durably(path, data.numpy().data)
        return True

    def write_manifest(self, manifest: Manifest) -> Path:
        """Commit a checkpoint here.  Write it after all its shards."""
        path = self._manifests / f"{manifest.step}.json"
        _write_durably(path, seal.checksummed(manifest.to_json()).encode())
        return path

    def _read_manifest(self, path: Path) -> Manifest:
        """Raise DamagedManifest or OSError."""
        try:
            known = (self._manifests / "authority").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            known = ""
        found = parse_manifest(path.read_bytes(), str(path), authority=self._authority, known=known)
        if found.step != int(path.stem):
            raise DamagedManifest(f"{path}: says that it is of step {found.step}")
        return found

    def manifests(self) -> list[Manifest]:
        """All readable manifests, newest step first; others are passed over with a warning."""
        found = []
        for path in self._manifests.glob("*.json"):
            if not path.stem.isdigit():
                continue
            try:
                found.append(self._read_manifest(path))
            except (DamagedManifest, OSError) as error:
                logger.warning("%s; passing it over", error)
        return sorted(found, key=lambda manifest: manifest.step, reverse=True)

    def manifest(self, step: int | None = None) -> Manifest:
        """The manifest of `step`, or the newest.  Raise NoCheckpoint, naming the steps that exist, or
        DamagedManifest if it is the one of `step`."""
        path = self._manifests / f"{step}.json"
        if step is not None and path.exists():
            return self._read_manifest(path)
        manifests = self.manifests()
        for manifest in manifests:
            if step is None or manifest.step == step:
                return manifest
        have = ", ".join(str(m.step) for m in manifests) or "none"
        raise NoCheckpoint(
            f"{self.root}: no checkpoint{'' if step is None else f' of step {step}'}; steps here: {have}"
        )

    def verify(self, manifest: Manifest) -> None:
        """Raise DamagedShard unless every shard is there, hashes to its digest and holds what it should."""
        _on_threads(functools.partial(self._verify_shard, manifest), manifest.shards, manifest.layout())

    def _verify_shard(self, manifest: Manifest, shard: ShardFile, expected: ShardLayout) -> None:
        path = self._blobs / shard.digest
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                raise DamagedShard(
                    manifest.step, shard.index, shard.digest, f"{size} bytes instead of {shard.bytes}"
                )
            found = _sha256(path)
        except OSError as error:
            raise DamagedShard(
                manifest.step, shard.index, shard.digest, f"{path}: {error.strerror}"
            ) from error
        if found != shard.digest:
            raise DamagedShard(manifest.step, shard.index, shard.digest, f"its SHA-256 is {found}")
        self._check_structure(manifest, shard, expected)

    def load(self, manifest: Manifest, into: Mapping[str, Tensor]) -> dict[str, Any]:
        """Copy a checkpoint's tensors into `into` (any device) and return the header.

        All shards are verified first, so a checkpoint that is damaged when this begins leaves `into`
        untouched.  Raise DamagedShard, or WrongTensors if names, dtypes or shapes differ.
        """
        expected = {spec.name: spec for spec in manifest.specs()}
        found = {name: TensorSpec.of(name, tensor) for name, tensor in into.items()}
        if expected != found:
            name = min(n for n in {*expected, *found} if expected.get(n) != found.get(n))
            raise WrongTensors(
                f"checkpoint of step {manifest.step}: tensor {name} is {_described(expected.get(name))} in the "
                f"checkpoint and {_described(found.get(name))} in the model; restore with the job file that "
                "the checkpoint was made with, or start in another directory"
            )
        self.verify(manifest)
        self._copy(manifest, into)
        return dict(manifest.header)

    def read(self, manifest: Manifest, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, on the CPU, verified.  Raise DamagedShard."""
        self.verify(manifest)
        tensors = {
            spec.name: torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
            for spec in manifest.specs()
            if spec.name.startswith(prefix)
        }
        self._copy(manifest, tensors)
        return tensors

    def restore_newest(self, into: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Load the newest intact checkpoint and return its header, or None if there is no checkpoint.

        A damaged one is named in a warning and the one before is tried; raise NoCheckpoint if none is
        left, because silently starting anew would throw work away.
        """
        manifests = self.manifests()
        for manifest in manifests:
            try:
                return self.load(manifest, into)
            except DamagedShard as error:
                logger.warning("%s; trying the checkpoint before it", error)
        if any(self._manifests.glob("*.json")):
            raise NoCheckpoint(
                f"{self.root}: every checkpoint is damaged (see the warnings); restore a blob from another copy, "
                "or remove the directory to start anew"
            )
        return None

    def retain(self, keep: int, *, every: int = 0, orphan_age_s: float | None = None) -> None:
        """Keep the newest `keep` (at least one) checkpoints and those of a step that is a multiple of `every`
        (0: none); the others go, with blobs only they used.

        With `orphan_age_s` also blobs and temporaries go that no manifest names and that are older than
        that: younger ones may belong to a checkpoint that is being written.  Give it only where nobody
        else keeps blobs in this directory.
        """
        manifests = self.manifests()
        kept = manifests[: max(1, keep)]
        gone: list[Manifest] = []
        for manifest in manifests[max(1, keep) :]:
            (kept if every and manifest.step % every == 0 else gone).append(manifest)
        used = {shard.digest for manifest in kept for shard in manifest.shards}
        unused = {shard.digest for manifest in gone for shard in manifest.shards} - used
        # Manifests first: a crash in between leaves orphans, never a manifest without its shards.
        for manifest in gone:
            (self._manifests / f"{manifest.step}.json").unlink(missing_ok=True)
        for digest in unused:
            (self._blobs / digest).unlink(missing_ok=True)
        if orphan_age_s is None or not kept:
            return
        oldest_ns = time.time_ns() - int(orphan_age_s * 1e9)
        for path in self._blobs.iterdir():
            try:
                if path.name not in used and path.stat().st_mtime_ns < oldest_ns:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process swept it

    def _check_structure(self, manifest: Manifest, shard: ShardFile, expected: ShardLayout) -> None:
        def damaged(why: str) -> DamagedShard:
            return DamagedShard(manifest.step, shard.index, shard.digest, why)

        try:
            with safe_open(self._blobs / shard.digest, framework="pt") as file:
                if sorted(file.keys()) != sorted(piece.key for piece in expected.pieces):
                    raise damaged("it holds other tensors than the manifest says")
                for piece in expected.pieces:
                    view = file.get_slice(piece.key)
                    shape = piece.spec.shape if piece.whole else (piece.stop - piece.start,)
                    if tuple(view.get_shape()) != shape or _SAFETENSORS[view.get_dtype()] != piece.spec.dtype:
                        raise damaged(f"tensor {piece.key} has another shape or dtype than the manifest says")
        except (SafetensorError, KeyError) as error:
            raise damaged(f"not a safetensors file ({error})") from error

    def _copy(self, manifest: Manifest, into: Mapping[str, Tensor]) -> None:
        _on_threads(functools.partial(self._copy_shard, into), manifest.shards, manifest.layout())

    @torch.no_grad()  # of the thread that runs it
    def _copy_shard(self, into: Mapping[str, Tensor], shard: ShardFile, expected: ShardLayout) -> None:
        """Of a shard that was verified.  Read straight into tensors of the CPU: mapping the file instead
        costs a page fault for every 4 KiB."""
        with (self._blobs / shard.digest).open("rb", buffering=0) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for piece in expected.pieces:
                target = into.get(piece.spec.name)
                if target is None or not piece.bytes:
                    continue
                part = target if piece.whole else target.view(-1)[piece.start : piece.stop]
                direct = part.device.type == "cpu" and part.is_contiguous()
                memory = part.detach() if direct else torch.empty(part.shape, dtype=part.dtype)
                file.seek(8 + header_bytes + header[piece.key]["data_offsets"][0])
                rest = memory.view(-1).view(torch.uint8).numpy().data
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise OSError(errno.EIO, f"shard {shard.digest} is shorter than when it was verified")
                    rest = rest[count:]
                if not direct:
                    part.copy_(memory)


def _on_threads(
    act: Callable[[ShardFile, ShardLayout], None],
    shards: tuple[ShardFile, ...],
    layouts: tuple[ShardLayout, ...],
) -> None:
    """Hashing and copying release the interpreter: one shard is read while another is worked on.  The
    failure of the lowest index is raised."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        for _ in readers.map(act, shards, layouts):
            pass


def _described(spec: TensorSpec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(data: Tensor) -> str:
    """Of a uint8 tensor on the CPU, in hex."""
    return hashlib.sha256(data.numpy().data).hexdigest()


def _write_durably(path: Path, data: bytes | memoryview) -> None:
    """Temporary, fsync, rename, fsync of the directory: readers see all of it or nothing, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new.")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def state_specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The specs of `tensors`, in their order."""
    return tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
