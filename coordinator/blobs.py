"""The blob store: files named by the SHA-256 of their bytes, `blobs/ab/<digest>`.

A blob exists or it does not: bytes are hashed while they are written to a temporary file, and only
the whole and right file gets its name.  Every function here blocks; the services call them in threads.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from coordinator.core.model import Refusal

DIGEST = re.compile(r"^[0-9a-f]{64}$")
_READ_BYTES = 1024 * 1024


class BlobRefusedError(Exception):
    """A blob is not taken or given; nothing of it was kept."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


class BlobStore:
    """A directory of blobs.  Safe for many threads; one process at a time."""

    def __init__(self, root: Path, *, max_bytes: int, reserve_bytes: int) -> None:
        self._root = root
        self._temporary = root / "incoming"
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._promised = 0  # bytes of uploads under way that are not written yet
        self._temporary.mkdir(parents=True, exist_ok=True)
        for leftover in self._temporary.iterdir():
            leftover.unlink()

    def path(self, digest: str) -> Path:
        assert DIGEST.fullmatch(digest), digest
        return self._root / digest[:2] / digest

    def size(self, digest: str) -> int | None:
        """Bytes of a blob, or None if it is not stored."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those that are not stored.  The others count as wanted just now, so that no sweep takes them
        between this answer and the message that refers to them."""
        return [digest for digest in digests if not self._touch(digest)]

    def _touch(self, digest: str) -> bool:
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    def upload(self, digest: str, size: int) -> Upload | None:
        """Begin to store a blob; None if it is stored already.  Raise BlobRefusedError."""
        if self.size(digest) == size and self._touch(digest):
            return None
        if size > self._max_bytes:
            raise BlobRefusedError(
                Refusal.TOO_LARGE, f"bytes: {size}; this coordinator takes blobs of at most {self._max_bytes}"
            )
        with self._lock:
            free = shutil.disk_usage(self._root).free
            if free - self._promised - size < self._reserve_bytes:
                raise BlobRefusedError(
                    Refusal.NO_SPACE,
                    f"blob of {size} bytes: the coordinator's disk has {free} bytes free and keeps "
                    f"{self._reserve_bytes} in reserve; free some space there or lower blobs.reserve",
                )
            self._promised += size
        try:
            return Upload(self, self._temporary, self.path(digest), digest, size)
        except BaseException:
            self._settle(size)
            raise

    def _settle(self, size: int) -> None:
        with self._lock:
            self._promised -= size

    def read(self, digest: str, offset: int) -> BlobReader:
        """Open a blob at an offset; raise BlobRefusedError if there is no such blob or offset."""
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError:
            raise BlobRefusedError(Refusal.UNKNOWN_BLOB, f"digest: no blob {digest} is stored") from None
        size = os.fstat(file.fileno()).st_size
        if offset > size:
            file.close()
            raise BlobRefusedError(
                Refusal.INVALID, f"offset: {offset}, but blob {digest} has only {size} bytes"
            )
        file.seek(offset)
        return BlobReader(file)

    def verify(self, digest: str, size: int) -> str:
        """Hash a stored blob again: "" if it is what its name says, else what is wrong with it."""
        try:
            with self.path(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.tell()
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"unreadable ({error.strerror})"
        if length != size:
            return f"{length} bytes instead of {size}"
        return "" if found == digest else f"damaged: its bytes hash to {found}"

    def stored(self) -> Iterator[tuple[str, float]]:
        """(digest, age in seconds) of every blob."""
        now = time.time()
        for folder in sorted(self._root.iterdir()):
            if len(folder.name) != 2:
                continue
            for path in sorted(folder.iterdir()):
                try:
                    yield path.name, now - path.stat().st_mtime
                except FileNotFoundError:
                    continue

    def remove(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)


class BlobReader:
    """An open blob, read in chunks; close it, if need be while another thread still reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def chunk(self) -> bytes:
        """The next bytes, at most 1 MiB; empty at the end."""
        with self._lock:
            return b"" if self._file.closed else self._file.read(_READ_BYTES)

    def close(self) -> None:
        with self._lock:
            self._file.close()


class Upload:
    """A blob on its way in.  End it with `finish` or `discard`; discarding after that does no harm.

    A call that was cancelled may leave a thread in `write` or `finish`: the lock lets that end first, so
    that no file is closed under it."""

    def __init__(self, store: BlobStore, temporary: Path, target: Path, digest: str, size: int) -> None:
        self._store = store
        self._target = target
        self._digest = digest
        self._size = size
        self._written = 0
        self._hash = hashlib.sha256()
        self._open = True
        self._lock = threading.Lock()
        descriptor, name = tempfile.mkstemp(dir=temporary)
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Add bytes; raise BlobRefusedError if they are too many or the disk is full."""
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
        """Make the blob exist; raise BlobRefusedError if its bytes are not those it was sent under."""
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
                os.fsync(self._file.fileno())
                self._file.close()
                self._target.parent.mkdir(exist_ok=True)
                os.replace(self._path, self._target)
                _sync_directory(self._target.parent)
            except OSError as error:
                raise _disk(error) from error
            self._end()

    def discard(self) -> None:
        """Leave nothing of it, unless it was finished."""
        with self._lock:
            if self._open:
                self._file.close()
                self._path.unlink(missing_ok=True)
                self._end()

    def _end(self) -> None:
        self._open = False
        self._store._settle(self._size)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk(error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return BlobRefusedError(Refusal.NO_SPACE, "the coordinator's disk is full; free some space there")
    return error
