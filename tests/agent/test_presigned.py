"""Transfers straight to and from a store that breaks, stalls and lies; a real HTTP server plays it."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.presigned import Transfer, TransferBroken

DATA = os.urandom(3_000_000)
SECRET = "X-Amz-Signature=0123456789abcdef"


class Store(http.server.ThreadingHTTPServer):
    """One object; what it does to its next requests is for a test to say."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data = DATA
        self.asked: list[tuple[str, str | None]] = []
        self.heads: list[dict[str, str]] = []
        self.break_after: int | None = None
        self.ignore_range = False
        self.status = 200
        self.stalls = threading.Event()
        self.stalled = threading.Event()

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up in the middle is what these tests are about

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/bucket/object?{SECRET}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def _note(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        self.server.heads.append({name.lower(): value for name, value in self.headers.items()})

    def do_GET(self) -> None:
        self._note()
        store, start, status = self.server, 0, self.server.status
        if self.headers["Range"] and not store.ignore_range:
            start, status = int(self.headers["Range"].split("=")[1].split("-")[0]), 206
        body = store.data[start:]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(store.data) - 1}/{len(store.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if store.stalls.is_set():
            self.wfile.write(body[:1000])
            store.stalled.set()
            self.rfile.read(1)  # until the other side hangs up
            return
        self.wfile.write(body[: store.break_after])
        self.close_connection = True

    def do_PUT(self) -> None:
        self._note()
        length = int(self.headers["Content-Length"])
        self.server.data = self.rfile.read(length)
        self.send_response(self.server.status, SECRET)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def test_an_object_is_got_whole_in_bounded_pieces(store: Store) -> None:
    got: list[bytes] = []
    Transfer(store.url()).get(0, len(DATA), got.append)
    assert b"".join(got) == DATA
    assert max(map(len, got)) <= 1 << 20
    assert store.asked == [(f"/bucket/object?{SECRET}", None)]
    assert store.heads[0]["host"] == f"127.0.0.1:{store.server_address[1]}"


def test_a_broken_download_keeps_what_came_and_resumes_by_range(store: Store) -> None:
    got = bytearray()
    store.break_after = 1_500_000
    with pytest.raises(TransferBroken, match="/bucket/object: "):
        Transfer(store.url()).get(0, len(DATA), got.extend)
    assert got == DATA[: len(got)]
    store.break_after = None
    resumed = len(got)
    assert resumed >= 1 << 20
    Transfer(store.url()).get(resumed, len(DATA), got.extend)
    assert bytes(got) == DATA
    assert store.asked[1][1] == f"bytes={resumed}-{len(DATA) - 1}"


def test_a_store_that_ignores_ranges_does_not_corrupt_a_resumed_download(store: Store) -> None:
    store.ignore_range = True
    with pytest.raises(TransferBroken, match="answered 200"):
        Transfer(store.url()).get(10, len(DATA), lambda _: pytest.fail("took bytes of another place"))


def test_a_store_that_sends_more_than_the_coordinator_said_fills_no_disk(store: Store) -> None:
    got = bytearray()
    Transfer(store.url()).get(0, 1000, got.extend)
    assert bytes(got) == DATA[:1000]


@pytest.mark.parametrize("status", [301, 403, 404, 500, 503])
def test_what_the_store_refuses_is_named_without_the_signature(
    store: Store, tmp_path: Path, status: int
) -> None:
    store.status = status
    file = tmp_path / "blob"
    file.write_bytes(b"abc")
    with pytest.raises(TransferBroken, match=f"answered {status}") as got:
        Transfer(store.url()).get(0, len(DATA), lambda _: pytest.fail("took bytes of a refusal"))
    with pytest.raises(TransferBroken, match=f"answered {status}") as put:
        Transfer(store.url()).put(file, {"Content-Length": "3"})
    assert SECRET not in str(got.value) + str(put.value)


def test_a_file_is_put_with_the_headers_that_were_signed_and_no_others_of_ours(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "blob"
    file.write_bytes(DATA)
    signed = {"Content-Length": str(len(DATA)), "x-amz-checksum-sha256": "abc="}
    Transfer(store.url()).put(file, signed)
    assert hashlib.sha256(store.data).digest() == hashlib.sha256(DATA).digest()
    assert set(store.heads[0]) == {"host", "content-length", "x-amz-checksum-sha256"}


def test_an_aborted_transfer_ends_at_once_though_the_store_stalls(store: Store) -> None:
    store.stalls.set()
    transfer = Transfer(store.url())
    ended: list[BaseException] = []

    def get() -> None:
        try:
            transfer.get(0, len(DATA), lambda _: None)
        except TransferBroken as error:
            ended.append(error)

    thread = threading.Thread(target=get)
    thread.start()
    assert store.stalled.wait(10)
    transfer.abort()
    thread.join(10)
    assert not thread.is_alive()
    assert len(ended) == 1


def test_a_transfer_aborted_before_its_start_does_not_begin(store: Store) -> None:
    transfer = Transfer(store.url())
    transfer.abort()
    with pytest.raises(TransferBroken, match="given up"):
        transfer.get(0, len(DATA), lambda _: None)
    assert store.asked == []


def test_a_store_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(TransferBroken, match=f"127.0.0.1:{port}/x"):
        Transfer(f"http://127.0.0.1:{port}/x?{SECRET}").get(0, 1, lambda _: None)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "", "https:///x"])
def test_only_http_urls_are_followed(url: str) -> None:
    with pytest.raises(TransferBroken, match="object store"):
        Transfer(url)
