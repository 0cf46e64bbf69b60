"""Presigned transfers: what a URL is good for, and that nothing is believed before it was hashed."""

from __future__ import annotations

import datetime as dt
import hashlib
import http.client
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from coordinator.blobs import BlobRefusedError, BlobsUnavailableError, PresignedPut
from coordinator.blobs_s3 import START_GRACE_S, Bucket, BucketError, Place, S3Store, open_store
from coordinator.config import Blobs
from coordinator.core.model import Refusal
from coordinator.presign import Credentials, CredentialsError, presigned_url
from coordinator.server import Coordinator, StartError
from tests.coordinator.harness import loopback_config, running_coordinator
from tests.coordinator.s3_server import BUCKET, KEY, REGION, S3Server, s3_server

PEER = "agent-a1"
DATA = b"weights"
DIGEST = hashlib.sha256(DATA).hexdigest()
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY.access_key_id,
    "AWS_SECRET_ACCESS_KEY": KEY.secret_access_key,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server) -> Bucket:
    place = Place(
        bucket=BUCKET,
        prefix=secrets.token_hex(4),
        endpoint=server.url,
        agents_endpoint=server.url,
        region=REGION,
        credentials=KEY,
    )
    return Bucket(place)


def store(bucket: Bucket, incoming: Path, **changes: Any) -> S3Store:
    return S3Store(
        bucket,
        incoming=incoming,
        **{
            "max_bytes": 1 << 20,
            "reserve_bytes": 0,
            "url_expiry_s": 60,
            "staged_bytes_per_peer": 1 << 20,
            **changes,
        },
    )


def call(method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> int:
    """The status of one request, made as somebody would who has nothing but the URL."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request(method, f"{parts.path}?{parts.query}", body=body, headers=dict(headers or {}))
    status = connection.getresponse().status
    connection.close()
    return status


def url_for(blobs: S3Store, digest: str = DIGEST, size: int = len(DATA), peer: str = PEER) -> PresignedPut:
    found = blobs.transfers.put(peer, digest, size)
    assert found is not None
    return found


def keys(bucket: Bucket) -> list[str]:
    return [key for folder in ("blobs", "incoming", "checking") for key, *_ in bucket.objects(folder)]


def test_what_was_sent_by_a_url_is_a_blob_once_it_was_taken_in(bucket: Bucket, tmp_path: Path) -> None:
    blobs = store(bucket, tmp_path)
    put = url_for(blobs)
    assert call("PUT", put.url, DATA, put.headers) == 200
    assert blobs.missing([DIGEST]) == [DIGEST]
    assert list(blobs.stored()) == []
    assert blobs.transfers.put(PEER, DIGEST, len(DATA)) is None
    blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    assert keys(bucket) == [f"blobs/{DIGEST[:2]}/{DIGEST}"]
    assert blobs.verify(DIGEST, len(DATA)) == ""
    got = blobs.transfers.get(DIGEST)
    assert got.size == len(DATA)
    assert call("GET", got.url) == 200


def test_a_coordinator_that_was_restarted_takes_in_what_was_sent_before(
    bucket: Bucket, tmp_path: Path
) -> None:
    put = url_for(store(bucket, tmp_path))
    assert call("PUT", put.url, DATA, put.headers) == 200
    blobs = store(bucket, tmp_path)
    blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    assert blobs.size(DIGEST) == len(DATA)


def test_a_url_is_good_for_one_object_one_method_one_length_and_one_content(
    bucket: Bucket, tmp_path: Path
) -> None:
    blobs = store(bucket, tmp_path)
    put = url_for(blobs)
    other = put.url.replace(DIGEST, hashlib.sha256(b"other").hexdigest())
    assert call("PUT", other, DATA, put.headers) == 403
    assert call("PUT", put.url.replace("incoming/agent-a1", "blobs"), DATA, put.headers) == 403
    assert call("GET", put.url) == 403
    assert call("DELETE", put.url) == 403
    assert call("PUT", put.url, DATA + b"!", {**put.headers, "Content-Length": "8"}) == 403
    assert call("PUT", put.url, b"WEIGHTS", put.headers) == 400
    assert call("PUT", put.url, DATA, {"Content-Length": "7"}) == 403
    assert call("PUT", put.url.partition("?")[0], DATA, put.headers) == 403
    assert keys(bucket) == []


def test_a_url_ends(bucket: Bucket, tmp_path: Path) -> None:
    past = presigned_url(
        bucket.place.url(f"blobs/{DIGEST[:2]}/{DIGEST}"),
        method="GET",
        headers={},
        credentials=KEY,
        region=REGION,
        at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=61),
        expires_s=60,
    )
    assert call("GET", past) == 403
    assert "X-Amz-Expires=60" in url_for(store(bucket, tmp_path)).url


@pytest.mark.parametrize("sent", [b"WEIGHTS", b"short"], ids=["other bytes", "another length"])
def test_other_bytes_under_a_right_name_are_deleted_and_refused(
    bucket: Bucket, tmp_path: Path, sent: bytes
) -> None:
    blobs = store(bucket, tmp_path, sign_checksum=False)
    # A store that enforces nothing: the sender is free to lie.
    put = url_for(blobs, size=len(sent))
    assert call("PUT", put.url, sent, put.headers) == 200
    with pytest.raises(BlobRefusedError, match="send it again") as refused:
        blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    assert refused.value.refusal is Refusal.DIGEST_MISMATCH
    assert keys(bucket) == []
    put = url_for(blobs)
    assert call("PUT", put.url, DATA, put.headers) == 200
    blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    assert blobs.verify(DIGEST, len(DATA)) == ""


def test_what_never_came_is_unknown(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(BlobRefusedError) as refused:
        store(bucket, tmp_path).transfers.take_in(PEER, DIGEST, len(DATA))
    assert refused.value.refusal is Refusal.UNKNOWN_BLOB
    with pytest.raises(BlobRefusedError) as refused:
        store(bucket, tmp_path).transfers.get(DIGEST)
    assert refused.value.refusal is Refusal.UNKNOWN_BLOB


def test_one_peer_cannot_take_in_what_another_sent(bucket: Bucket, tmp_path: Path) -> None:
    blobs = store(bucket, tmp_path)
    put = url_for(blobs, peer="agent-b")
    assert call("PUT", put.url, DATA, put.headers) == 200
    with pytest.raises(BlobRefusedError) as refused:
        blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    assert refused.value.refusal is Refusal.UNKNOWN_BLOB


def test_what_one_peer_has_sent_and_not_reported_is_bounded(bucket: Bucket, tmp_path: Path) -> None:
    blobs = store(bucket, tmp_path, staged_bytes_per_peer=10)
    put = url_for(blobs)
    url_for(blobs)  # the same again costs nothing
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(BlobRefusedError) as refused:
        blobs.transfers.put(PEER, other, 5)
    assert refused.value.refusal is Refusal.RATE_LIMITED
    url_for(blobs, digest=other, size=5, peer="agent-b")
    call("PUT", put.url, DATA, put.headers)
    blobs.transfers.take_in(PEER, DIGEST, len(DATA))
    url_for(blobs, digest=other, size=5)


def test_blobs_over_the_bound_get_no_url(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(BlobRefusedError) as refused:
        store(bucket, tmp_path).transfers.put(PEER, DIGEST, (1 << 20) + 1)
    assert refused.value.refusal is Refusal.TOO_LARGE


def test_the_same_blob_from_two_peers_at_once_is_one_blob(bucket: Bucket, tmp_path: Path) -> None:
    blobs = store(bucket, tmp_path)
    peers = ["agent-a", "agent-b", "agent-c"]
    for put in [url_for(blobs, peer=peer) for peer in peers]:
        assert call("PUT", put.url, DATA, put.headers) == 200
    failures: list[BaseException] = []

    def one(peer: str) -> None:
        try:
            blobs.transfers.take_in(peer, DIGEST, len(DATA))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert keys(bucket) == [f"blobs/{DIGEST[:2]}/{DIGEST}"]


def test_what_was_sent_and_never_reported_is_swept_after_its_grace(bucket: Bucket, tmp_path: Path) -> None:
    later = 0.0
    blobs = store(bucket, tmp_path, now=lambda: time.time() + later, staged_bytes_per_peer=10)
    put = url_for(blobs)
    assert call("PUT", put.url, DATA, put.headers) == 200
    assert blobs.discard_unfinished(3_600) == 0
    later = 3_700.0
    assert blobs.discard_unfinished(3_600) == 1
    assert keys(bucket) == []
    assert call("PUT", put.url, DATA, put.headers) == 200  # the URL still works: swept again, next time
    assert blobs.discard_unfinished(3_600) == 1
    url_for(blobs, digest=hashlib.sha256(b"other").hexdigest(), size=9, peer="agent-b")


def test_after_a_start_no_blob_is_older_than_the_coordinator_for_a_while(
    bucket: Bucket, tmp_path: Path
) -> None:
    upload = store(bucket, tmp_path).upload(DIGEST, len(DATA))
    assert upload is not None
    upload.write(DATA)
    upload.finish()
    later = 100_000.0
    blobs = store(bucket, tmp_path, now=lambda: time.time() + later)
    ((*_, age_s),) = blobs.stored()
    assert age_s < 60
    later += START_GRACE_S + 1
    ((*_, age_s),) = blobs.stored()
    assert age_s > 100_000


def test_a_closed_store_gives_up_at_once(bucket: Bucket, tmp_path: Path) -> None:
    blobs = store(bucket, tmp_path)
    blobs.close()
    with pytest.raises(BlobsUnavailableError, match="stopping"):
        blobs.size(DIGEST)


# ------------------------------------------------------------------------------------- opening


def settings(server_url: str, **s3: Any) -> Blobs:
    return Blobs.model_validate(
        {"store": f"s3://{BUCKET}/fleet/one/", "reserve": 0, "s3": {"endpoint": server_url, **s3}}
    )


def opened(found: Blobs, home: Path, environment: Mapping[str, str]) -> S3Store:
    place = found.bucket()
    assert place is not None
    return open_store(found, *place, home=home, environment=environment)


def test_a_store_opens_with_a_key_from_the_environment_or_from_a_file(
    server: S3Server, tmp_path: Path
) -> None:
    assert opened(settings(server.url), tmp_path, ENVIRONMENT).missing([DIGEST]) == [DIGEST]
    file = tmp_path / "s3.json"
    file.write_text(
        json.dumps({"access_key_id": KEY.access_key_id, "secret_access_key": KEY.secret_access_key})
    )
    file.chmod(0o600)
    blobs = opened(settings(server.url, credentials="s3.json"), tmp_path, {})
    assert urlsplit(url_for(blobs).url).path == f"/{BUCKET}/fleet/one/incoming/{PEER}/{DIGEST}"


def test_urls_name_the_address_at_which_agents_reach_the_store(server: S3Server, tmp_path: Path) -> None:
    found = settings(server.url, agents_endpoint="https://blobs.example.org:9000")
    put = url_for(opened(found, tmp_path, ENVIRONMENT))
    assert put.url.startswith(f"https://blobs.example.org:9000/{BUCKET}/")


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ('{"access_key_id": "k", "secret_access_key": "hush"}', 0o644, "chmod 600"),
        ('{"access_key_id": "k", "secret": "hush"}', 0o600, "must be a JSON object"),
        ("hush", 0o600, "must be a JSON object"),
        ('["hush"]', 0o600, "must be a JSON object"),
    ],
    ids=["readable by others", "unknown field", "no JSON", "no object"],
)
def test_an_unusable_key_file_is_named_and_not_shown(
    tmp_path: Path, content: str, mode: int, message: str
) -> None:
    file = tmp_path / "s3.json"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(CredentialsError, match=message) as error:
        Credentials.load(file)
    assert str(file) in str(error.value)
    assert "hush" not in str(error.value)


def test_a_missing_key_says_where_one_is_looked_for(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID is not in the environment"):
        opened(settings(server.url), tmp_path, {})
    with pytest.raises(CredentialsError, match="cannot be read"):
        opened(settings(server.url, credentials="absent.json"), tmp_path, ENVIRONMENT)


def test_a_wrong_key_or_bucket_is_refused_at_the_start_and_no_secret_is_shown(
    server: S3Server, tmp_path: Path
) -> None:
    secret = "not-the-secret-of-this-key"
    wrong = {**ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": "token-" + secret}
    with capture_logs() as logs, pytest.raises(BucketError, match="cannot be written") as error:
        opened(settings(server.url), tmp_path, wrong)
    assert secret not in str(error.value) + str(logs)
    assert secret not in repr(Credentials.from_environment(wrong))
    nowhere = Blobs.model_validate({"store": "s3://nowhere", "s3": {"endpoint": server.url}})
    with pytest.raises(BucketError, match="nowhere"):
        opened(nowhere, tmp_path, ENVIRONMENT)


async def test_without_obstore_the_default_serves_and_a_bucket_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "coordinator.blobs_s3")
    monkeypatch.delattr("coordinator.blobs_s3")
    async with running_coordinator(tmp_path):
        pass
    with pytest.raises(StartError, match=r"pip install 'muster-train\[s3\]'"):
        Coordinator(tmp_path / "home", loopback_config(blobs={"store": "s3://muster"}))


def test_signing_agrees_with_the_example_that_amazon_publishes() -> None:
    # https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
    url = presigned_url(
        "https://examplebucket.s3.amazonaws.com/test.txt",
        method="GET",
        headers={},
        credentials=Credentials(
            access_key_id="AKIAIOSFODNN7EXAMPLE",
            secret_access_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        ),
        region="us-east-1",
        at=dt.datetime(2013, 5, 24, tzinfo=dt.UTC),
        expires_s=86_400,
    )
    assert url.endswith("X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")


def test_a_session_token_is_part_of_what_is_signed(bucket: Bucket) -> None:
    key = Credentials(
        access_key_id=KEY.access_key_id,
        secret_access_key=KEY.secret_access_key,
        session_token=os.urandom(4).hex(),
    )
    url = presigned_url(
        bucket.place.url("blobs/x"),
        method="PUT",
        headers={"Content-Length": "0"},
        credentials=key,
        region=REGION,
        at=dt.datetime.now(dt.UTC),
        expires_s=60,
    )
    assert call("PUT", url, b"", {"Content-Length": "0"}) == 200
    assert call("PUT", url.replace(key.session_token, "0"), b"", {"Content-Length": "0"}) == 403
