"""Blobs straight to and from an object store, by URLs that the coordinator has signed.

The agent holds no key of the store: a URL is good for one object, one method and a short time, and is
itself a secret for that time, so only its host and path are ever shown.  Everything here blocks; run it
in a thread, and `abort` the transfer when nobody waits for it any more.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 60.0
CHUNK_BYTES = 1024 * 1024


class TransferBroken(TimeoutError):
    """The store did not take or give the bytes this time: it is away, the URL has expired, the line broke.

    Like any stall, it is answered by asking for a new URL and trying again."""


class Transfer:
    """One request to an object store; use it once."""

    def __init__(self, url: str) -> None:
        """Raise TransferBroken if the URL is none that can be used."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise TransferBroken(f"object store: {parts.scheme or 'no'} URL; expected https")
        self.where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._target = f"{parts.path}?{parts.query}"
        self._host = parts.netloc  # as it was signed, with or without a port
        self._aborted = False
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname, parts.port, timeout=CONNECT_TIMEOUT_S
            )

    def abort(self) -> None:
        """Let a thread that is in `put` or `get` return with TransferBroken; from any thread."""
        self._aborted = True
        connected = self._connection.sock
        if connected is not None:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it was closed just now

    def put(self, path: Path, headers: Mapping[str, str]) -> None:
        """Send a file with these headers.  Raise TransferBroken, or OSError if the file cannot be opened."""
        with open(path, "rb") as file:
            try:
                self._connect()
                self._connection.putrequest("PUT", self._target, skip_host=True, skip_accept_encoding=True)
                self._connection.putheader("Host", self._host)
                for name, value in headers.items():
                    self._connection.putheader(name, value)
                self._connection.endheaders()
                while data := file.read(CHUNK_BYTES):
                    self._check()
                    self._connection.send(data)
                with self._connection.getresponse() as response:
                    self._answered(response, {200, 201, 204})
            except TransferBroken:
                raise
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error) from error
            finally:
                self._connection.close()

    def get(self, offset: int, size: int, take: Callable[[bytes], None]) -> None:
        """Give the bytes of an object of this size from an offset on to `take`, at most 1 MiB at a time.

        Raise TransferBroken; what `take` got is good.  What `take` raises passes through."""
        headers = {"Host": self._host}
        if offset:
            headers["Range"] = f"bytes={offset}-{size - 1}"
        try:
            with self._response(headers) as response:
                self._answered(response, {206} if offset else {200})
                if offset and not (response.getheader("Content-Range") or "").startswith(f"bytes {offset}-"):
                    raise TransferBroken(f"{self.where}: the store sent another range than it was asked for")
                left = size - offset
                while left:
                    data = self._next(response, min(CHUNK_BYTES, left))
                    left -= len(data)
                    take(data)
        finally:
            self._connection.close()

    def _response(self, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        try:
            self._connect()
            self._connection.request("GET", self._target, headers=dict(headers))
            return self._connection.getresponse()
        except TransferBroken:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error

    def _next(self, response: http.client.HTTPResponse, most: int) -> bytes:
        try:
            self._check()
            data = response.read(most)
        except TransferBroken:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        if not data:
            raise TransferBroken(f"{self.where}: the store stopped in the middle")
        return data

    def _connect(self) -> None:
        self._check()
        self._connection.connect()
        self._connection.sock.settimeout(STALL_TIMEOUT_S)
        self._check()

    def _check(self) -> None:
        if self._aborted:
            raise TransferBroken(f"{self.where}: given up")

    def _answered(self, response: http.client.HTTPResponse, expected: set[int]) -> None:
        if response.status not in expected:
            # The store's own words may repeat the request with its signature: they are not shown.
            meaning = http.client.responses.get(response.status, "")
            raise TransferBroken(f"{self.where}: the object store answered {response.status} {meaning}")

    def _broken(self, error: Exception) -> TransferBroken:
        why = isinstance(error, OSError) and (error.strerror or str(error))
        return TransferBroken(f"{self.where}: {why or type(error).__name__}")
