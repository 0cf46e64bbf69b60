"""A blob exists or it does not; whatever goes wrong, nothing half-written stays."""

from __future__ import annotations

import hashlib
import os
import threading
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


def test_a_blob_is_read_back_whole_and_from_an_offset(tmp_path: Path) -> None:
    blobs, data = store(tmp_path), os.urandom(5000)
    assert put(blobs, data)
    reader = blobs.read(digest_of(data), 4000)
    assert reader.chunk() == data[4000:]
    assert reader.chunk() == b""
    reader.close()
    assert files(tmp_path) == [digest_of(data)]
    assert blobs.path(digest_of(data)) == tmp_path / digest_of(data)[:2] / digest_of(data)


def test_a_stored_blob_is_not_taken_again(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    assert put(blobs, b"abc")
    assert not put(blobs, b"abc")


@pytest.mark.parametrize(
    ("data", "digest", "size", "refusal"),
    [
        (b"abc", digest_of(b"other"), 3, Refusal.DIGEST_MISMATCH),
        (b"abc", digest_of(b"abc"), 4, Refusal.INVALID),
        (b"abcd", digest_of(b"abc"), 3, Refusal.INVALID),
        (b"", digest_of(b"abc"), 1 << 21, Refusal.TOO_LARGE),
    ],
    ids=["wrong digest", "truncated", "too long", "over the bound"],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(
    tmp_path: Path, data: bytes, digest: str, size: int, refusal: Refusal
) -> None:
    blobs = store(tmp_path)
    with pytest.raises(BlobRefusedError) as refused:
        put(blobs, data, digest, size)
    assert refused.value.refusal is refusal
    assert files(tmp_path) == []
    assert blobs.missing([digest]) == [digest]


def test_uploads_never_touch_the_reserve_of_the_disk(tmp_path: Path) -> None:
    blobs = store(tmp_path, reserve_bytes=1 << 62)
    with pytest.raises(BlobRefusedError, match="in reserve") as refused:
        blobs.upload(digest_of(b"abc"), 3)
    assert refused.value.refusal is Refusal.NO_SPACE


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


def test_the_same_blob_from_many_at_once_is_stored_once(tmp_path: Path) -> None:
    blobs, data = store(tmp_path), os.urandom(50_000)
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def one() -> None:
        try:
            upload = blobs.upload(digest_of(data), len(data))
            assert upload is not None
            together.wait()
            upload.write(data)
            upload.finish()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files(tmp_path) == [digest_of(data)]
    assert blobs.verify(digest_of(data), len(data)) == ""


def test_leftovers_of_a_killed_process_are_removed_at_the_start(tmp_path: Path) -> None:
    upload = store(tmp_path).upload(digest_of(b"abc"), 3)
    assert upload is not None
    upload.write(b"ab")
    assert len(files(tmp_path)) == 1
    store(tmp_path)
    assert files(tmp_path) == []
    upload._file.close()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(b"abd", "damaged"), (b"ab", "2 bytes instead of 3"), (None, "missing")],
    ids=["flipped", "truncated", "deleted"],
)
def test_verify_says_what_is_wrong_with_a_stored_blob(
    tmp_path: Path, damage: bytes | None, problem: str
) -> None:
    blobs = store(tmp_path)
    put(blobs, b"abc")
    path = blobs.path(digest_of(b"abc"))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert problem in blobs.verify(digest_of(b"abc"), 3)


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    blobs = store(tmp_path)
    with pytest.raises(BlobRefusedError) as refused:
        blobs.read(digest_of(b"abc"), 0)
    assert refused.value.refusal is Refusal.UNKNOWN_BLOB
    put(blobs, b"abc")
    with pytest.raises(BlobRefusedError, match="only 3 bytes"):
        blobs.read(digest_of(b"abc"), 4)
