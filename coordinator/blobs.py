"""Where blobs live: what is asked of a blob store, and the one that is a directory.

A blob is bytes named by their SHA-256, and it exists or it does not.  In a directory, bytes are hashed
while they are written to a temporary file, and only the whole and right file gets its name,
`blobs/ab/<digest>`.  The manifests of checkpoints lie beside them, so that nothing else is needed to
restore one.  Every function here blocks; the services call them in threads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from coordinator.core.model import Refusal
from protos.files import sync_directory, write_whole

DIGEST = re.compile(r"^[0-9a-f]{64}$")
MANIFEST = re.compile(r"manifests/([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})/([1-9][0-9]{0,17})\.json")
"""Where a manifest lies, below the blobs' own directory or the bucket's prefix."""
READ_BYTES = 1024 * 1024
SUSPENDED_PER_SENDER = 8
_SUSPENDED = "suspended-"


class BlobRefusedError(Exception):
    """A blob is not taken or given; nothing of it was kept."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


class BlobsUnavailableError(Exception):
    """The store does not answer now; asking again later may help."""


class BlobUpload(Protocol):
    """A blob on its way in.  End it with `finish` or `discard`; discarding after that does no harm."""

    def write(self, data: bytes) -> None:
        """Add bytes; raise BlobRefusedError if they are too many or there is no room."""

    def finish(self) -> None:
        """Make the blob exist; raise BlobRefusedError if its bytes are not those it was sent under."""

    def discard(self) -> None:
        """Leave nothing of it, unless it was finished."""

    def suspend(self) -> None:
        """Like `discard`, but keep what came for a sender that goes on later."""


class BlobReader(Protocol):
    """An open blob, read in chunks; close it, if need be while another thread still reads."""

    def chunk(self) -> bytes:
        """The next bytes, at most 1 MiB; empty at the end."""

    def close(self) -> None: ...


class BlobStore(Protocol):
    """What the coordinator asks of whatever keeps its blobs.  Safe for many threads."""

    presigned: PresignedTransfers | None
    """How peers reach the bytes without us, where the store can do that."""

    def size(self, digest: str) -> int | None:
        """Bytes of a blob, or None if it is not stored: is a reported shard there, and as long as said?"""

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those that are not stored: what is worth sending?  The others count as wanted just now, so that no
        sweep takes them between this answer and the message that refers to them."""

    def upload(self, digest: str, size: int, *, sender: str = "", offset: int = 0) -> BlobUpload | None:
        """Begin to store a blob whose bytes come through us, or go on at an offset where a suspended upload of
        the same sender broke off; None if it is stored already.

        Raise BlobRefusedError."""

    def received(self, sender: str, digests: Iterable[str]) -> dict[str, int]:
        """How many bytes are kept of each suspended upload of this sender."""

    def read(self, digest: str, offset: int) -> BlobReader:
        """Open a blob at an offset, where a broken download resumes; raise BlobRefusedError if there is no
        such blob or offset."""

    def verify(self, digest: str, size: int) -> str:
        """Hash a stored blob again: "" if it is what its name says, else what is wrong with it.  Disks rot,
        and a checkpoint is worth what its worst shard is."""

    def stored(self) -> Iterator[tuple[str, int, float]]:
        """(digest, bytes, seconds since it was stored or last wanted) of every blob: what may the sweeper take?"""

    def remove(self, digest: str) -> None:
        """Forget a blob; one that is not stored is no error."""

    def manifests(self) -> Iterator[tuple[str, int]]:
        """(job, step) of every manifest that lies beside the blobs: what could be restored from here alone?"""

    def manifest(self, job_id: str, step: int) -> str | None:
        """One of those; None if it is not there."""

    def put_manifest(self, job_id: str, step: int, text: str) -> None:
        """Keep a manifest, in place of one of the same step: all of it or nothing, also after a crash."""

    def remove_manifest(self, job_id: str, step: int) -> None:
        """Forget a manifest; one that is not there is no error."""

    def discard_unfinished(self, older_than_s: float) -> int:
        """Remove what uploads left that never became blobs; returns how many."""

    def close(self) -> None:
        """Give up what is under way, so that a stopping coordinator waits for no transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresignedPut:
    """Where one peer may send one blob, with exactly these headers.  A URL is a secret while it is good."""

    url: str = field(repr=False)
    headers: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PresignedGet:
    """Where a blob may be fetched."""

    url: str = field(repr=False)
    size: int


class PresignedTransfers(Protocol):
    """A store that peers reach by themselves.  What they send is nothing until `take_in` has hashed it."""

    def put(self, peer: str, digest: str, size: int) -> PresignedPut | None:
        """Let a peer send a blob; None if its bytes are there already.  Raise BlobRefusedError."""

    def get(self, digest: str) -> PresignedGet:
        """Let anyone who has the URL fetch a blob; raise BlobRefusedError if it is not stored."""

    def take_in(self, peer: str, digest: str, size: int) -> None:
        """Hash what a peer has sent and make it a blob; harmless if it is one already.

        Raise BlobRefusedError if nothing came, or if other bytes came; those are deleted."""


class Incoming:
    """A directory for blobs that come through us; what an earlier process left in it is removed."""

    def __init__(self, root: Path, *, max_bytes: int, reserve_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._promised = 0  # bytes of uploads under way that are not written yet
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.iterdir():
            if not leftover.name.startswith(_SUSPENDED):
                leftover.unlink()

    def received(self, sender: str, digests: Iterable[str]) -> dict[str, int]:
        found = {}
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                found[digest] = self._suspended(sender, digest).stat().st_size
        return found

    def _suspended(self, sender: str, digest: str) -> Path:
        return self._root / f"{_SUSPENDED}{sender}-{digest}"

    def _suspend(self, sender: str, digest: str, path: Path) -> None:
        """Keep what came, and of too many only the newest: nobody fills the disk by breaking off."""
        os.replace(path, self._suspended(sender, digest))
        found = sorted(self._root.glob(f"{_SUSPENDED}{glob.escape(sender)}-*"), key=_modified)
        for old in found[:-SUSPENDED_PER_SENDER]:
            old.unlink(missing_ok=True)

    def discard_suspended(self, older_than_s: float, now: float) -> int:
        """Remove what nobody went on with for so long; returns how many."""
        removed = 0
        for path in self._root.glob(f"{_SUSPENDED}*"):
            if now - _modified(path) > older_than_s:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def begin(
        self,
        digest: str,
        size: int,
        keep: Callable[[BinaryIO, Path], None],
        *,
        sender: str = "",
        offset: int = 0,
    ) -> FileUpload:
        """An upload whose whole and right file is given to `keep`.  Raise BlobRefusedError."""
        check_size(size, self._max_bytes)
        begun = self._take_up(sender, digest, size, offset) if sender else None
        promised = size - offset
        with self._lock:
            free = shutil.disk_usage(self._root).free
            if free - self._promised - promised < self._reserve_bytes:
                raise BlobRefusedError(
                    Refusal.NO_SPACE,
                    f"blob of {size} bytes: the coordinator's disk has {free} bytes free and keeps "
                    f"{self._reserve_bytes} in reserve; free some space there or lower blobs.reserve",
                )
            self._promised += promised
        suspend = functools.partial(self._suspend, sender, digest) if sender else None
        try:
            return FileUpload(
                self._root,
                digest,
                size,
                keep=keep,
                ended=lambda: self._settle(promised),
                suspend=suspend,
                begun=begun,
                offset=offset,
            )
        except BaseException:
            self._settle(promised)
            raise

    def _take_up(self, sender: str, digest: str, size: int, offset: int) -> Path | None:
        """The file of a suspended upload, which nobody else can take up now.  Raise BlobRefusedError."""
        suspended = self._suspended(sender, digest)
        if not offset:
            suspended.unlink(missing_ok=True)
            return None
        kept = self.received(sender, [digest]).get(digest, 0)
        if not offset <= min(kept, size):
            # Not INVALID: the sender is to ask what is kept now, and go on there.
            raise BlobRefusedError(
                Refusal.UNKNOWN_BLOB,
                f"offset: {offset}, but of blob {digest} only {kept} bytes are kept; ask again what is missing",
            )
        descriptor, name = tempfile.mkstemp(dir=self._root)
        os.close(descriptor)
        os.replace(suspended, name)
        return Path(name)

    def _settle(self, size: int) -> None:
        with self._lock:
            self._promised -= size


def check_size(size: int, most: int) -> None:
    """Raise BlobRefusedError if a blob is too large to be taken."""
    if size > most:
        raise BlobRefusedError(
            Refusal.TOO_LARGE, f"bytes: {size}; this coordinator takes blobs of at most {most}"
        )


class DirectoryStore:
    """A directory of blobs.  Safe for many threads; one process at a time."""

    presigned: PresignedTransfers | None = None

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        reserve_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._now = now
        self._incoming = Incoming(root / "incoming", max_bytes=max_bytes, reserve_bytes=reserve_bytes)

    def path(self, digest: str) -> Path:
        assert DIGEST.fullmatch(digest), digest
        return self._root / digest[:2] / digest

    def size(self, digest: str) -> int | None:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def missing(self, digests: Iterable[str]) -> list[str]:
        return [digest for digest in digests if not self._touch(digest)]

    def _touch(self, digest: str) -> bool:
        try:
            os.utime(self.path(digest), times=(self._now(), self._now()))
        except FileNotFoundError:
            return False
        return True

    def received(self, sender: str, digests: Iterable[str]) -> dict[str, int]:
        return self._incoming.received(sender, digests)

    def upload(self, digest: str, size: int, *, sender: str = "", offset: int = 0) -> FileUpload | None:
        if self.size(digest) == size and self._touch(digest):
            return None
        target = self.path(digest)

        def keep(file: BinaryIO, temporary: Path) -> None:
            os.fsync(file.fileno())
            target.parent.mkdir(exist_ok=True)
            os.replace(temporary, target)
            sync_directory(target.parent)

        return self._incoming.begin(digest, size, keep, sender=sender, offset=offset)

    def read(self, digest: str, offset: int) -> FileReader:
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError:
            raise unknown(digest) from None
        size = os.fstat(file.fileno()).st_size
        if offset > size:
            file.close()
            raise beyond_end(digest, offset, size)
        file.seek(offset)
        return FileReader(file)

    def verify(self, digest: str, size: int) -> str:
        try:
            with self.path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.tell()
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"unreadable ({error.strerror})"
        return problem(digest, size, found, length)

    def stored(self) -> Iterator[tuple[str, int, float]]:
        now = self._now()
        for folder in sorted(self._root.iterdir()):
            if len(folder.name) != 2:
                continue
            for path in sorted(folder.iterdir()):
                try:
                    found = path.stat()
                    yield path.name, found.st_size, now - found.st_mtime
                except FileNotFoundError:
                    continue

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def _manifest(self, job_id: str, step: int) -> Path:
        return self._root / manifest_key(job_id, step)

    def manifests(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self._root.glob("manifests/*/*.json")):
            found = MANIFEST.fullmatch(path.relative_to(self._root).as_posix())
            if found is not None:
                yield found[1], int(found[2])

    def manifest(self, job_id: str, step: int) -> str | None:
        try:
            return self._manifest(job_id, step).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def put_manifest(self, job_id: str, step: int, text: str) -> None:
        path = self._manifest(job_id, step)
        for folder in (path.parent.parent, path.parent):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                sync_directory(folder.parent)
        write_whole(path, text.encode(), beside=self._root / "incoming")

    def remove_manifest(self, job_id: str, step: int) -> None:
        path = self._manifest(job_id, step)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of other steps, or never there
            path.parent.rmdir()

    def discard_unfinished(self, older_than_s: float) -> int:
        return self._incoming.discard_suspended(older_than_s, self._now())

    def close(self) -> None:
        pass


def manifest_key(job_id: str, step: int) -> str:
    key = f"manifests/{job_id}/{step}.json"
    assert MANIFEST.fullmatch(key), key
    return key


def unknown(digest: str) -> BlobRefusedError:
    return BlobRefusedError(Refusal.UNKNOWN_BLOB, f"digest: no blob {digest} is stored")


def beyond_end(digest: str, offset: int, size: int) -> BlobRefusedError:
    return BlobRefusedError(Refusal.INVALID, f"offset: {offset}, but blob {digest} has only {size} bytes")


def problem(digest: str, size: int, found: str, length: int) -> str:
    """What is wrong with a blob whose bytes have the hash `found` and this length; "" if nothing is."""
    if length != size:
        return f"{length} bytes instead of {size}"
    return "" if found == digest else f"damaged: its bytes hash to {found}"


class FileReader:
    """A BlobReader of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def chunk(self) -> bytes:
        with self._lock:
            return b"" if self._file.closed else self._file.read(READ_BYTES)

    def close(self) -> None:
        with self._lock:
            self._file.close()


class FileUpload:
    """A BlobUpload into a temporary file.

    A call that was cancelled may leave a thread in `write` or `finish`: the lock lets that end first, so
    that no file is closed under it."""

    def __init__(
        self,
        folder: Path,
        digest: str,
        size: int,
        *,
        keep: Callable[[BinaryIO, Path], None],
        ended: Callable[[], None],
        suspend: Callable[[Path], None] | None = None,
        begun: Path | None = None,
        offset: int = 0,
    ) -> None:
        """`keep` gets the whole and right file and may move it; `ended` is called once, at the end.  The upload
        goes on at `offset` of the file `begun`, if there is one; `suspend` gets the file of one that broke off."""
        self._digest = digest
        self._size = size
        self._keep = keep
        self._ended = ended
        self._suspend = suspend
        self._written = offset
        self._hash = hashlib.sha256()
        self._open = True
        self._lock = threading.Lock()
        if begun is None:
            descriptor, name = tempfile.mkstemp(dir=folder)
            self._path = Path(name)
            self._file = os.fdopen(descriptor, "wb", buffering=0)
        else:
            self._path = begun
            os.truncate(begun, offset)
            self._file = begun.open("r+b", buffering=0)
            while data := self._file.read(READ_BYTES):
                self._hash.update(data)

    def write(self, data: bytes) -> None:
        with self._lock:
            if not self._open:
                return
            if self._written + len(data) > self._size:
                raise BlobRefusedError(
                    Refusal.INVALID, f"bytes: the header said {self._size} but more than that came"
                )
            try:
                view = memoryview(data)
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise _disk(error) from error
            self._hash.update(data)
            self._written += len(data)

    def finish(self) -> None:
        with self._lock:
            if not self._open:
                return
            if self._written != self._size:
                raise BlobRefusedError(
                    Refusal.INVALID,
                    f"bytes: the header said {self._size} but only {self._written} came; send it again",
                )
            found = self._hash.hexdigest()
            if found != self._digest:
                raise BlobRefusedError(
                    Refusal.DIGEST_MISMATCH,
                    f"digest: sent as {self._digest} but the bytes hash to {found}; send it again",
                )
            try:
                self._keep(self._file, self._path)
            except OSError as error:
                raise _disk(error) from error
            self._end()

    def discard(self) -> None:
        with self._lock:
            if self._open:
                self._end()

    def suspend(self) -> None:
        with self._lock:
            if not self._open:
                return
            if self._suspend is not None and 0 < self._written <= self._size:
                self._suspend(self._path)
            self._end()

    def _end(self) -> None:
        self._open = False
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._ended()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # somebody goes on with it just now


def _disk(error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return BlobRefusedError(Refusal.NO_SPACE, "the coordinator's disk is full; free some space there")
    return error
