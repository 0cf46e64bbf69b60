"""Blobs in an S3-compatible object store, which agents reach by presigned URLs and without a key.

    blobs/ab/<digest>           a blob; nobody but the coordinator ever writes here
    incoming/<peer>/<digest>    what a peer has sent by a presigned PUT; not believed yet
    checking/<random>           a copy of that, which its sender can no longer change, while it is hashed
    manifests/<job>/<step>.json  the manifest of a committed checkpoint

A blob appears under its digest by one server-side copy (or one upload of a file that was hashed here), so
it exists or it does not.  Whatever is lost on the way lies in the two other folders until it is swept.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

import obstore
import structlog
from obstore import exceptions
from obstore import store as obstores

from coordinator.blobs import (
    DIGEST,
    MANIFEST,
    READ_BYTES,
    BlobRefusedError,
    BlobsUnavailableError,
    FileUpload,
    Incoming,
    PresignedGet,
    PresignedPut,
    PresignedTransfers,
    beyond_end,
    check_size,
    manifest_key,
    problem,
    unknown,
)
from coordinator.config import Blobs
from coordinator.core.model import Refusal
from coordinator.presign import Credentials, presigned_url

log = structlog.get_logger("coordinator.blobs")

MOST_BYTES = 5 * 2**30
"""What S3 takes in one PUT, and copies in one call."""
PART_BYTES = 8 * 2**20
QUESTIONS_AT_ONCE = 16
START_GRACE_S = 600.0
"""After a start nobody knows which blobs were asked for just before: for so long, none is older than us."""
MOST_WANTED = 100_000


class BucketError(Exception):
    """The bucket does not exist or the key does not open it; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which bucket, and how it is reached."""

    bucket: str
    prefix: str
    endpoint: str  # scheme://host[:port], of the store
    agents_endpoint: str  # the same store as agents reach it
    region: str
    credentials: Credentials

    def url(self, key: str) -> str:
        """The object's URL for agents, in path style, which every store speaks."""
        path = "/".join(part for part in (self.bucket, self.prefix, key) if part)
        return f"{self.agents_endpoint}/{quote(path, safe='/-_.~')}"


def open_store(
    settings: Blobs, bucket: str, prefix: str, *, home: Path, environment: Mapping[str, str]
) -> S3Store:
    """The store that a configuration names.  Raise BucketError or CredentialsError."""
    s3 = settings.s3
    endpoint = s3.endpoint or f"https://s3.{s3.region}.amazonaws.com"
    opened = Bucket(
        Place(
            bucket=bucket,
            prefix=prefix,
            endpoint=endpoint,
            agents_endpoint=s3.agents_endpoint or endpoint,
            region=s3.region,
            credentials=(
                Credentials.load(home / s3.credentials)
                if s3.credentials
                else Credentials.from_environment(environment)
            ),
        )
    )
    opened.check()
    return S3Store(
        opened,
        incoming=home / "incoming",
        max_bytes=settings.max_bytes,
        reserve_bytes=settings.reserve,
        url_expiry_s=s3.url_expiry // 1000,
        staged_bytes_per_peer=s3.staged_per_peer,
        sign_checksum=s3.sha256_header,
    )


class Bucket:
    """The few questions that are asked of the object store.  What is absent is None or no error; anything else
    that goes wrong is BlobsUnavailableError, and its cause is in the log."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._closed = threading.Event()
        credentials = place.credentials
        config: obstores.S3Config = {
            "endpoint": place.endpoint,
            "region": place.region,
            "access_key_id": credentials.access_key_id,
            "secret_access_key": credentials.secret_access_key,
            "disable_bulk_delete": True,  # many stores that speak S3 do not speak that
        }
        if credentials.session_token:
            config["session_token"] = credentials.session_token
        self._store = obstores.S3Store(
            place.bucket,
            prefix=place.prefix or None,
            config=config,
            client_options={
                "allow_http": urlsplit(place.endpoint).scheme == "http",
                "connect_timeout": "10s",
                "timeout": "120s",
            },
            retry_config={"max_retries": 5, "retry_timeout": dt.timedelta(seconds=60)},
        )

    @contextlib.contextmanager
    def _asking(self, question: str) -> Iterator[None]:
        if self._closed.is_set():
            raise BlobsUnavailableError("the coordinator is stopping")
        try:
            yield
        except exceptions.BaseError as error:
            log.warning("object store", question=question, error=str(error)[:500])
            raise BlobsUnavailableError(
                f"the object store did not {question}; the coordinator's log says why; try again later"
            ) from error

    def close(self) -> None:
        self._closed.set()

    def check(self) -> None:
        """Write and delete one small object.  Raise BucketError if the bucket or the key is wrong; a store that
        does not answer is only logged: it may come back, and a coordinator must not wait for that."""
        key = f"checking/{secrets.token_hex(8)}"
        try:
            obstore.put(self._store, key, b"muster", use_multipart=False)
            obstore.delete(self._store, key)
        except (
            FileNotFoundError,
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
        ) as error:
            log.error("object store", question="check", error=str(error)[:500])  # noqa: TRY400 - no traceback
            raise BucketError(
                f"blobs.store: bucket {self.place.bucket!r} at {self.place.endpoint} cannot be written with the key "
                f"{self.place.credentials.access_key_id!r} ({type(error).__name__}); it must exist, and the key "
                "must be allowed to get, put, copy, list and delete in it"
            ) from None
        except exceptions.BaseError as error:
            log.warning("object store", question="check", error=str(error)[:500])

    def size(self, key: str) -> int | None:
        with self._asking("say whether it has a blob"):
            try:
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

    def part(self, key: str, start: int, length: int) -> bytes | None:
        """So many bytes from `start`, all of which the object has."""
        with self._asking("give a blob"):
            try:
                return bytes(obstore.get_range(self._store, key, start=start, length=length))
            except FileNotFoundError:
                return None

    def digest(self, key: str, size: int) -> str | None:
        """SHA-256 of an object of this size, in bounded memory; None if it is absent."""
        hasher = hashlib.sha256()
        for start in range(0, size, PART_BYTES):
            data = self.part(key, start, min(PART_BYTES, size - start))
            if data is None:
                return None
            hasher.update(data)
        return hasher.hexdigest()

    def whole(self, key: str) -> bytes | None:
        """A small object."""
        with self._asking("give a manifest"):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes) -> None:
        """A small object, in one request."""
        with self._asking("take a manifest"):
            obstore.put(self._store, key, data, use_multipart=False)

    def put(self, key: str, file: Path) -> None:
        with self._asking("take a blob"):
            obstore.put(self._store, key, file, chunk_size=PART_BYTES, max_concurrency=2)

    def copy(self, source: str, target: str) -> bool:
        """Whether there was something to copy."""
        with self._asking("copy a blob"):
            try:
                obstore.copy(self._store, source, target)
            except FileNotFoundError:
                return False
        return True

    def remove(self, *keys: str) -> None:
        with self._asking("remove a blob"):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, key)

    def objects(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """(key, bytes, when it was written, in seconds since the epoch) of everything in a folder."""
        with self._asking("list its blobs"):
            for page in obstore.list(self._store, folder, chunk_size=1000):
                for found in page:
                    yield found["path"], found["size"], found["last_modified"].timestamp()


class S3Store:
    """The BlobStore of a bucket.  What comes through the coordinator is hashed in a file of its disk first."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        incoming: Path,
        max_bytes: int,
        reserve_bytes: int,
        url_expiry_s: int,
        staged_bytes_per_peer: int,
        sign_checksum: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        most = min(max_bytes, MOST_BYTES)
        self._bucket = bucket
        self._incoming = Incoming(incoming, max_bytes=most, reserve_bytes=reserve_bytes)
        self._now = now
        self._opened_at = now()
        self._lock = threading.Lock()
        self._wanted: dict[str, float] = {}
        self.transfers = S3Transfers(
            bucket,
            self,
            max_bytes=most,
            url_expiry_s=url_expiry_s,
            staged_bytes_per_peer=staged_bytes_per_peer,
            sign_checksum=sign_checksum,
            now=now,
        )
        self.presigned: PresignedTransfers | None = self.transfers

    @staticmethod
    def key(digest: str) -> str:
        assert DIGEST.fullmatch(digest), digest
        return f"blobs/{digest[:2]}/{digest}"

    def size(self, digest: str) -> int | None:
        return self._bucket.size(self.key(digest))

    def missing(self, digests: Iterable[str]) -> list[str]:
        wanted = list(digests)
        with ThreadPoolExecutor(min(QUESTIONS_AT_ONCE, max(1, len(wanted)))) as questions:
            sizes = list(questions.map(self._wants, wanted))
        return [digest for digest, size in zip(wanted, sizes, strict=True) if size is None]

    def _wants(self, digest: str) -> int | None:
        """The blob's size if it is stored; it counts as wanted just now.

        Wanted first, asked then: a sweep between the two finds it young.  The time of an object cannot be set,
        so this one is kept in memory; START_GRACE_S covers what a restart forgets."""
        with self._lock:
            self._wanted.pop(digest, None)
            self._wanted[digest] = self._now()
            if len(self._wanted) > MOST_WANTED:
                del self._wanted[next(iter(self._wanted))]
        return self.size(digest)

    def received(self, sender: str, digests: Iterable[str]) -> dict[str, int]:
        return self._incoming.received(sender, digests)

    def upload(self, digest: str, size: int, *, sender: str = "", offset: int = 0) -> FileUpload | None:
        if self._wants(digest) == size:
            return None
        key = self.key(digest)

        def keep(_file: BinaryIO, temporary: Path) -> None:
            self._bucket.put(key, temporary)

        return self._incoming.begin(digest, size, keep, sender=sender, offset=offset)

    def read(self, digest: str, offset: int) -> S3Reader:
        size = self.size(digest)
        if size is None:
            raise unknown(digest)
        if offset > size:
            raise beyond_end(digest, offset, size)
        return S3Reader(self._bucket, self.key(digest), offset, size)

    def verify(self, digest: str, size: int) -> str:
        key = self.key(digest)
        length = self._bucket.size(key)
        found = None if length is None else self._bucket.digest(key, length)
        return "missing" if length is None or found is None else problem(digest, size, found, length)

    def stored(self) -> Iterator[tuple[str, int, float]]:
        for key, size, written_at in self._bucket.objects("blobs"):
            digest = key.rpartition("/")[2]
            now = self._now()
            age_s = now - max(written_at, self._wanted.get(digest, 0.0))
            uptime_s = now - self._opened_at
            yield digest, size, age_s if uptime_s > START_GRACE_S else min(age_s, uptime_s)

    def remove(self, digest: str) -> None:
        self._bucket.remove(self.key(digest))

    def manifests(self) -> Iterator[tuple[str, int]]:
        for key, *_ in self._bucket.objects("manifests"):
            found = MANIFEST.fullmatch(key)
            if found is not None:
                yield found[1], int(found[2])

    def manifest(self, job_id: str, step: int) -> str | None:
        data = self._bucket.whole(manifest_key(job_id, step))
        return None if data is None else data.decode(errors="replace")

    def put_manifest(self, job_id: str, step: int, text: str) -> None:
        self._bucket.write(manifest_key(job_id, step), text.encode())

    def remove_manifest(self, job_id: str, step: int) -> None:
        self._bucket.remove(manifest_key(job_id, step))

    def discard_unfinished(self, older_than_s: float) -> int:
        suspended = self._incoming.discard_suspended(older_than_s, self._now())
        return suspended + self.transfers.discard_unfinished(older_than_s)

    def close(self) -> None:
        self._bucket.close()


class S3Reader:
    """A BlobReader that asks for one part after another, so that a slow reader holds no connection."""

    def __init__(self, bucket: Bucket, key: str, offset: int, size: int) -> None:
        self._bucket = bucket
        self._key = key
        self._next = offset
        self._size = size
        self._part = memoryview(b"")
        self._lock = threading.Lock()

    def chunk(self) -> bytes:
        with self._lock:
            if not self._part and self._next < self._size:
                length = min(PART_BYTES, self._size - self._next)
                part = self._bucket.part(self._key, self._next, length)
                if part is None:
                    raise BlobsUnavailableError(f"blob {self._key} was removed while it was read")
                self._part, self._next = memoryview(part), self._next + length
            found, self._part = bytes(self._part[:READ_BYTES]), self._part[READ_BYTES:]
            return found

    def close(self) -> None:
        with self._lock:
            self._part, self._next = memoryview(b""), self._size


class S3Transfers:
    """The PresignedTransfers of a bucket.

    A peer writes to a key of its own, which is derived from its name and the digest: a coordinator that
    was restarted between the PUT and the report finds what was sent, and no peer can touch another's."""

    def __init__(
        self,
        bucket: Bucket,
        store: S3Store,
        *,
        max_bytes: int,
        url_expiry_s: int,
        staged_bytes_per_peer: int,
        sign_checksum: bool,
        now: Callable[[], float],
    ) -> None:
        self._bucket = bucket
        self._store = store
        self._max_bytes = max_bytes
        self._url_expiry_s = url_expiry_s
        self._staged_bytes_per_peer = staged_bytes_per_peer
        self._sign_checksum = sign_checksum
        self._now = now
        self._lock = threading.Lock()
        self._staged: dict[str, dict[str, tuple[int, float]]] = {}

    def put(self, peer: str, digest: str, size: int) -> PresignedPut | None:
        check_size(size, self._max_bytes)
        key = _incoming(peer, digest)
        if self._store.size(digest) == size or self._bucket.size(key) == size:
            return None
        self._promise(peer, digest, size)
        headers = {"Content-Length": str(size)}
        if self._sign_checksum:
            headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(digest)).decode()
        return PresignedPut(url=self._url(key, "PUT", headers), headers=headers)

    def get(self, digest: str) -> PresignedGet:
        size = self._store.size(digest)
        if size is None:
            raise unknown(digest)
        return PresignedGet(url=self._url(self._store.key(digest), "GET", {}), size=size)

    def take_in(self, peer: str, digest: str, size: int) -> None:
        staged, checked = _incoming(peer, digest), f"checking/{secrets.token_hex(16)}"
        if self._store.size(digest) == size:
            self._bucket.remove(staged)
            self._forget(peer, digest)
            return
        try:
            wrong = self._check(staged, checked, digest, size)
            if not wrong:
                self._bucket.copy(checked, self._store.key(digest))
            self._bucket.remove(staged)
            self._forget(peer, digest)
        finally:
            with contextlib.suppress(BlobsUnavailableError):  # then the sweep takes it
                self._bucket.remove(checked)
        if wrong:
            raise BlobRefusedError(Refusal.DIGEST_MISMATCH, f"digest: {wrong}; send it again")

    def _check(self, staged: str, checked: str, digest: str, size: int) -> str:
        """What is wrong with what was sent, "" if nothing is.

        What is hashed, and then kept, is a copy: the sender's URL may still be good for the original."""
        found = self._bucket.size(staged)
        if found is not None and found != size:
            return f"blob {digest} was to have {size} bytes but {found} were sent"
        hashed = self._bucket.digest(checked, size) if self._bucket.copy(staged, checked) else None
        if hashed is None:
            raise unknown(digest)
        return "" if hashed == digest else f"sent as {digest} but the bytes hash to {hashed}"

    def discard_unfinished(self, older_than_s: float) -> int:
        removed = 0
        for folder in ("incoming", "checking"):
            for key, _, written_at in self._bucket.objects(folder):
                if self._now() - written_at > older_than_s:
                    self._bucket.remove(key)
                    removed += 1
        with self._lock:
            for peer, promises in list(self._staged.items()):
                kept = {
                    digest: (size, at)
                    for digest, (size, at) in promises.items()
                    if self._now() - at <= older_than_s + self._url_expiry_s
                }
                self._staged[peer] = kept
                if not kept:
                    del self._staged[peer]
        return removed

    def _promise(self, peer: str, digest: str, size: int) -> None:
        """Count what a peer may have in `incoming`, so that no volunteer fills the bucket."""
        with self._lock:
            promises = self._staged.setdefault(peer, {})
            others = sum(held for name, (held, _) in promises.items() if name != digest)
            if others + size > self._staged_bytes_per_peer and others:
                raise BlobRefusedError(
                    Refusal.RATE_LIMITED,
                    f"{others} bytes that this peer has sent or may send are not reported yet, and "
                    f"{self._staged_bytes_per_peer} are allowed; report them first",
                )
            promises[digest] = (size, self._now())

    def _forget(self, peer: str, digest: str) -> None:
        with self._lock:
            promises = self._staged.get(peer, {})
            promises.pop(digest, None)
            if not promises:
                self._staged.pop(peer, None)

    def _url(self, key: str, method: str, headers: dict[str, str]) -> str:
        place = self._bucket.place
        return presigned_url(
            place.url(key),
            method=method,
            headers=headers,
            credentials=place.credentials,
            region=place.region,
            at=dt.datetime.now(dt.UTC),
            expires_s=self._url_expiry_s,
        )


def _incoming(peer: str, digest: str) -> str:
    assert DIGEST.fullmatch(digest), digest
    return f"incoming/{peer}/{digest}"
