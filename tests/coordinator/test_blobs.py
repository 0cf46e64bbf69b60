"""What only the directory of blobs has: its disk.  What every store has is in test_blob_contract.py."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from coordinator.blobs import BlobRefusedError, DirectoryStore
from coordinator.core.model import Refusal


def store(root: Path, **changes: int) -> DirectoryStore:
    return DirectoryStore(root, **{"max_bytes": 1 << 20, "reserve_bytes": 0, **changes})


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(blobs: DirectoryStore, data: bytes, digest: str | None = None, size: int | None = None) -> bool:
    """Whether it was new."""
    upload = blobs.upload(digest or digest_of(data), len(data) if size is None else size)
    if upload is None:
        return False
    try:
        for start in range(0, len(data), 1000):
            upload.write(data[start : start + 1000])
        upload.finish()
    finally:
        upload.discard()
    return True


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_space_promised_to_uploads_under_way_counts_as_used(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    free_bytes = free.f_bavail * free.f_frsize
    blobs = store(tmp_path, max_bytes=1 << 62, reserve_bytes=0)
    first = blobs.upload(digest_of(b"1"), free_bytes * 2 // 3)
    assert first is not None
    with pytest.raises(BlobRefusedError, match="bytes free"):
        blobs.upload(digest_of(b"2"), free_bytes * 2 // 3)
    first.discard()
    second = blobs.upload(digest_of(b"2"), free_bytes * 2 // 3)
    assert second is not None
    second.discard()


def test_a_full_disk_is_a_refusal_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    upload = blobs.upload(digest_of(b"abc"), 3)
    assert upload is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, upload._file.fileno())
    os.close(full)
    with pytest.raises(BlobRefusedError, match="disk is full") as refused:
        upload.write(b"abc")
    upload.discard()
    assert refused.value.refusal is Refusal.NO_SPACE
    assert files(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed_at_the_start(tmp_path: Path) -> None:
    upload = store(tmp_path).upload(digest_of(b"abc"), 3)
    assert upload is not None
    upload.write(b"ab")
    assert len(files(tmp_path)) == 1
    store(tmp_path)
    assert files(tmp_path) == []
    upload._file.close()
