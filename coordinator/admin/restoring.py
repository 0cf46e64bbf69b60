"""`muster checkpoint restore`: a checkpoint out of a directory or bucket of shards and manifests, without a
coordinator.

Manifests are believed by their signature, shards by their digest, and nothing else is.  What is damaged in
one place is taken from the next; a checkpoint that is whole nowhere is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from coordinator.admin.errors import BadInput, OperationFailed
from protos import seal
from protos.files import sync_directory, write_whole

FORMAT = "muster-checkpoint-1"
AT_ONCE = 4
CHUNK_BYTES = 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
MAX_SHARDS = 65_536
_DIGEST = re.compile(r"[0-9a-f]{64}")
_JOB = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STEP = re.compile(r"[1-9][0-9]{0,17}")
_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9!_.*'()/-]*))?")


class SourceError(Exception):
    """A source does not give what it was asked for; the message says why, without naming the source."""


class Source(Protocol):
    """A place where shards and manifests lie."""

    name: str

    def manifests(self) -> list[tuple[str, bytes]]:
        """(name, bytes) of every file that should be a manifest.  Raise OperationFailed if it cannot be listed."""

    def read(self, digest: str, offset: int) -> Iterator[bytes]:
        """A shard's bytes from an offset on.  Raise SourceError."""


class DirectorySource:
    """A coordinator's home or its blobs, an agent's cache, or a local checkpoint directory."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self._root = root
        if not root.is_dir():
            raise BadInput(f"--from {root}: no such directory")

    def manifests(self) -> list[tuple[str, bytes]]:
        found = []
        for pattern in ("manifests/*.json", "manifests/*/*.json", "blobs/manifests/*/*.json"):
            for path in sorted(self._root.glob(pattern)):
                if not _STEP.fullmatch(path.stem) or not path.is_file():
                    continue
                try:
                    with path.open("rb") as file:
                        data = file.read(seal.MAX_MANIFEST_BYTES + 1)
                except OSError as error:
                    raise OperationFailed(f"--from {self.name}: {path}: {error.strerror}") from error
                found.append((str(path.relative_to(self._root)), data))
        return found

    def read(self, digest: str, offset: int) -> Iterator[bytes]:
        places = [
            self._root / "blobs" / digest,
            self._root / "blobs" / digest[:2] / digest,
            self._root / digest[:2] / digest,
        ]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise SourceError("missing")
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while data := file.read(CHUNK_BYTES):
                    yield data
        except OSError as error:
            raise SourceError(f"unreadable ({error.strerror})") from error


class BucketSource:
    """An S3-compatible bucket, below a prefix."""

    def __init__(self, url: str, *, endpoint: str | None, region: str, key: Mapping[str, str]) -> None:
        match = _BUCKET.fullmatch(url)
        if match is None:
            raise BadInput(f"--from {url!r}: expected s3://BUCKET/PREFIX")
        try:
            import obstore
            from obstore import store
        except ImportError:
            raise BadInput(f"--from {url}: needs obstore; run pip install 'muster-train[s3]'") from None
        self.name = url
        self._obstore = obstore
        self._missing = FileNotFoundError
        self._broken = obstore.exceptions.BaseError
        config: dict[str, Any] = {"region": region, "access_key_id": key["access_key_id"]}
        config["secret_access_key"] = key["secret_access_key"]
        if key.get("session_token"):
            config["session_token"] = key["session_token"]
        if endpoint:
            config["endpoint"] = endpoint
        self._store = store.S3Store(
            match[1],
            prefix=(match[2] or "").strip("/") or None,
            config=config,  # type: ignore[arg-type]
            client_options={"allow_http": (endpoint or "").startswith("http://"), "connect_timeout": "10s"},
        )

    def manifests(self) -> list[tuple[str, bytes]]:
        found = []
        try:
            for page in self._obstore.list(self._store, "manifests", chunk_size=1000):
                for entry in page:
                    key, size = entry["path"], entry["size"]
                    if not _STEP.fullmatch(key.rpartition("/")[2].removesuffix(".json")):
                        continue
                    few = min(size, seal.MAX_MANIFEST_BYTES + 1)
                    data = (
                        bytes(self._obstore.get_range(self._store, key, start=0, length=few)) if few else b""
                    )
                    found.append((key, data))
        except (self._missing, self._broken) as error:
            raise OperationFailed(f"--from {self.name}: {_first_line(error)}") from error
        return found

    def read(self, digest: str, offset: int) -> Iterator[bytes]:
        key = f"blobs/{digest[:2]}/{digest}"
        try:
            size = self._obstore.head(self._store, key)["size"]
            while offset < size:
                length = min(PART_BYTES, size - offset)
                yield bytes(self._obstore.get_range(self._store, key, start=offset, length=length))
                offset += length
        except self._missing:
            raise SourceError("missing") from None
        except self._broken as error:
            raise SourceError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# ---------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    index: int
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A manifest that may be restored from."""

    job: str
    step: int
    generation: int
    shards: tuple[Shard, ...]
    signed_by: str  # fingerprint; empty if nobody who counts
    text: bytes
    where: str

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def candidate(text: bytes, where: str, trusted: str | None, allow_unsigned: bool) -> Candidate:
    """The manifest in a file.  Raise SealError if it is not one, or not one that may be used.

    `trusted` is the authority's fingerprint; None, which needs `allow_unsigned`, trusts nobody's."""
    found = seal.opened(text) if trusted is None or allow_unsigned else seal.verified(text, trusted)
    value = found.manifest()
    try:
        job, step, shards = value["job"], value["step"], value["shards"]
        generation = int(value["generation"])
        pieces = tuple(
            Shard(index=shard["index"], digest=shard["digest"], bytes=shard["bytes"]) for shard in shards
        )
        usable = (
            value["format"] == FORMAT
            and _JOB.fullmatch(job)
            and type(step) is int
            and _STEP.fullmatch(str(step))
            and f"{step}.json" == where.rpartition("/")[2]
            and 0 < len(pieces) <= MAX_SHARDS
            and all(piece.index == at and type(piece.index) is int for at, piece in enumerate(pieces))
            and all(_DIGEST.fullmatch(piece.digest) for piece in pieces)
            and all(type(piece.bytes) is int and piece.bytes >= 0 for piece in pieces)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise seal.BrokenSeal(f"not a {FORMAT} manifest ({type(error).__name__}: {error})") from None
    if not usable:
        raise seal.BrokenSeal(f"not a {FORMAT} manifest of that step")
    return Candidate(
        job=job,
        step=step,
        generation=generation,
        shards=pieces,
        signed_by=found.fingerprint if found.fingerprint == trusted else "",
        text=text,
        where=where,
    )


def candidates(
    sources: Sequence[Source], trusted: str | None, allow_unsigned: bool, warn: Callable[[str], None]
) -> list[Candidate]:
    """What may be restored, newest first.  What is refused is told to `warn`, with its name and why."""
    found: dict[bytes, Candidate] = {}
    for source in sources:
        for name, text in source.manifests():
            where = f"{source.name}/{name}"
            try:
                one = candidate(text, where, trusted, allow_unsigned)
            except seal.SealError as error:
                warn(f"{where}: {error}; it is not used")
            else:
                found.setdefault(text, one)
    return sorted(found.values(), key=lambda one: (one.step, one.generation), reverse=True)


def choose(found: Sequence[Candidate], job: str | None, step: int | None) -> list[Candidate]:
    """Those of one job, and of one step if it is given.  Raise BadInput or OperationFailed."""
    jobs = sorted({one.job for one in found if job is None or one.job.startswith(job)})
    if not jobs:
        have = ", ".join(sorted({one.job for one in found})) or "none"
        raise OperationFailed(f"--job {job or ''}: no usable manifest of it; jobs here: {have}")
    if len(jobs) > 1 and job not in jobs:
        raise BadInput(f"--job: several jobs are here; choose one of {', '.join(jobs)}")
    chosen = [one for one in found if one.job == (job if job in jobs else jobs[0])]
    if step is None:
        return chosen
    have = ", ".join(str(one.step) for one in chosen)
    chosen = [one for one in chosen if one.step == step]
    if not chosen:
        raise OperationFailed(f"--step {step}: no usable manifest of it; steps here: {have}")
    return chosen


# ------------------------------------------------------------------------------------------- shards


class Damaged(Exception):
    """Some shard of a checkpoint is whole in no source; each problem is one line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Restorer:
    """Brings shards into a local checkpoint directory, several at once, each verified before it has its name.

    What was fetched of a shard when the command was ended stays in `.partial-<digest>`, and is gone on from."""

    def __init__(self, out: Path, sources: Sequence[Source]) -> None:
        self._blobs = out / "blobs"
        self._manifests = out / "manifests"
        self._sources = sources
        self._ended = threading.Event()
        self._new: set[str] = set()
        self.fetched_bytes = 0
        self._lock = threading.Lock()

    def prepare(self) -> None:
        for folder in (self._blobs, self._manifests):
            folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, wanted: Candidate, advance: Callable[[int], object]) -> None:
        """All shards of a checkpoint.  Raise Damaged, or OSError if this disk does not take them."""
        shards = {shard.digest: shard for shard in reversed(wanted.shards)}
        problems: list[str] = []
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="restore") as threads:
            try:
                for found in threads.map(lambda shard: self._fetch(shard, advance), shards.values()):
                    problems += found
            except BaseException:
                self._ended.set()
                raise
        if problems:
            raise Damaged(problems)

    def commit(self, wanted: Candidate) -> None:
        """Write the manifest, after its shards, and forget what was fetched in vain."""
        needed = {shard.digest for shard in wanted.shards}
        for digest in self._new - needed:
            (self._blobs / digest).unlink(missing_ok=True)
        for partial in self._blobs.glob(".partial-*"):
            partial.unlink(missing_ok=True)
        sync_directory(self._blobs)
        if wanted.signed_by:
            write_whole(self._manifests / "authority", f"{wanted.signed_by}\n".encode(), mode=0o644)
        write_whole(self._manifests / f"{wanted.step}.json", wanted.text, mode=0o644)

    def _fetch(self, shard: Shard, advance: Callable[[int], object]) -> list[str]:
        """Nothing, or why it is not to be had from each source."""
        path = self._blobs / shard.digest
        if path.exists():
            if _digest_of(path) == shard.digest:
                advance(shard.bytes)
                return []
            path.unlink()
        problems = []
        for source in self._sources:
            why = self._fetch_from(source, shard, path, advance)
            if not why:
                return []
            problems.append(f"shard {shard.index} ({shard.digest[:16]}…) in {source.name}: {why}")
        return problems

    def _fetch_from(self, source: Source, shard: Shard, path: Path, advance: Callable[[int], object]) -> str:
        partial = path.with_name(f".partial-{shard.digest}")
        while True:
            with partial.open("a+b") as file:
                file.seek(0)
                hasher = hashlib.file_digest(file, "sha256")
                begin = done = file.tell()
                advance(begin)
                why = ""
                try:
                    for data in source.read(shard.digest, begin) if done <= shard.bytes else ():
                        if self._ended.is_set():
                            return "given up"
                        done += len(data)
                        if done > shard.bytes:
                            break
                        file.write(data)
                        hasher.update(data)
                        advance(len(data))
                        with self._lock:
                            self.fetched_bytes += len(data)
                except SourceError as error:
                    why = str(error)
                file.flush()
                os.fsync(file.fileno())
            if not why and done == shard.bytes and hasher.hexdigest() == shard.digest:
                os.replace(partial, path)
                with self._lock:
                    self._new.add(shard.digest)
                return ""
            advance(-min(done, shard.bytes))
            if why or done < shard.bytes:
                # What came may be right as far as it goes: the next source goes on from there.
                return why or f"{done} bytes instead of {shard.bytes}"
            partial.unlink()
            if not begin:
                return (
                    f"more than {shard.bytes} bytes"
                    if done > shard.bytes
                    else (f"damaged: its bytes hash to {hasher.hexdigest()[:16]}…")
                )
            # Others may have given the beginning: this source once more, from its start.


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def warn(message: str) -> None:
    click.echo(f"muster: {message}", err=True)


def restore(chosen: Sequence[Candidate], sources: Sequence[Source], out: Path) -> Candidate:
    """The first of the chosen checkpoints that is whole somewhere, in the directory `out`.

    Raise BadInput or OperationFailed."""
    from coordinator.admin.submission import progress

    _check_out(out, chosen)
    restorer = Restorer(out, sources)
    try:
        restorer.prepare()
        for one in chosen:
            try:
                with progress(f"step {one.step}", one.bytes) as advance:
                    restorer.fetch(one, advance)
            except Damaged as error:
                for problem in error.problems:
                    warn(f"step {one.step}: {problem}")
                continue
            restorer.commit(one)
            return one
    except OSError as error:
        raise OperationFailed(
            f"--out {out}: {error.strerror or error}; what was fetched is kept, run the same command again"
        ) from error
    steps = ", ".join(str(one.step) for one in chosen)
    raise OperationFailed(
        f"no checkpoint could be restored: step {steps} is damaged (the lines above name the shards); "
        "name another copy with one more --from"
    )


def _check_out(out: Path, chosen: Sequence[Candidate]) -> None:
    """Raise BadInput unless `out` is new, empty, or a directory of checkpoints that these may join."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "manifests").is_dir()):
        raise BadInput(f"--out {out}: is no directory of checkpoints; choose another one")
    known = out / "manifests" / "authority"
    signers = {one.signed_by for one in chosen if one.signed_by}
    if (
        known.exists()
        and (found := known.read_text(encoding="ascii", errors="replace").strip()) not in signers
    ):
        raise BadInput(
            f"--out {out}: holds checkpoints of authority {seal.short(found)}; choose another directory"
        )
    for one in chosen:
        path = out / "manifests" / f"{one.step}.json"
        if path.exists() and path.read_bytes() != one.text:
            raise BadInput(
                f"--out {out}: holds another checkpoint of step {one.step}; choose another directory"
            )
