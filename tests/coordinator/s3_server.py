"""A real S3 server for tests, a process of its own: moto's, which believes everyone, behind a door that does not.

The door checks what S3 checks and moto does not: the signature of every request, in the header or in the
query, the time a URL is good for, and that a body has the SHA-256 that its header promises.

    python -m tests.coordinator.s3_server LOG     prints its URL, then writes one line a request to LOG
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from coordinator.presign import Credentials

KEY = Credentials(access_key_id="TESTKEYID", secret_access_key="a-secret/of+the-operator")
BUCKET = "muster"
REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A server that runs, seen by a test."""

    url: str
    log: Path

    def requests(self) -> list[tuple[str, str, str, int]]:
        """(how it was signed, method, path, length of the body) of every request there was."""
        found = [line.split(" ") for line in self.log.read_text().splitlines()]
        return [(how, method, path, int(length)) for how, method, path, length in found]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server with one empty bucket; it ends with the context."""
    log = folder / "requests.log"
    log.touch()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with (
        (folder / "server.err").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.coordinator.s3_server", str(log)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, (folder / "server.err").read_text()
            yield S3Server(url=url, log=log)
        finally:
            process.terminate()


class Door:
    """WSGI middleware: what comes in is signed with KEY and is what its signature covers."""

    def __init__(self, app: Callable[..., Iterable[bytes]], log: Path) -> None:
        self._app = app
        self._log = log.open("a", buffering=1)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        path, _, query = environ["RAW_URI"].partition("?")
        how = "query" if "X-Amz-Signature" in query else "header"
        with self._lock:
            self._log.write(f"{how} {environ['REQUEST_METHOD']} {path} {len(body)}\n")
        refused = self._refused(environ, path, dict(parse_qsl(query, keep_blank_values=True)))
        promised = environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")
        if not refused and promised not in {None, base64.b64encode(hashlib.sha256(body).digest()).decode()}:
            refused = "400 BadDigest"
        if not refused:
            return self._app(environ, start_response)
        status, code = refused.split(" ")
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]

    def _refused(self, environ: dict[str, Any], path: str, query: dict[str, str]) -> str:
        if "X-Amz-Signature" in query:
            signature = query.pop("X-Amz-Signature")
            names, stamp = query["X-Amz-SignedHeaders"], query["X-Amz-Date"]
            credential, payload = query["X-Amz-Credential"], "UNSIGNED-PAYLOAD"
            begun = dt.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
            if dt.datetime.now(dt.UTC) > begun + dt.timedelta(seconds=int(query["X-Amz-Expires"])):
                return "403 AccessDenied"
        else:
            found = re.fullmatch(
                r"AWS4-HMAC-SHA256 Credential=(.+), ?SignedHeaders=(.+), ?Signature=(.+)",
                environ.get("HTTP_AUTHORIZATION", ""),
            )
            if found is None:
                return "403 AccessDenied"
            credential, names, signature = found.groups()
            stamp, payload = environ["HTTP_X_AMZ_DATE"], environ["HTTP_X_AMZ_CONTENT_SHA256"]

        def header(name: str) -> str:
            key = name.upper().replace("-", "_")
            own = name in {"content-length", "content-type"}
            return str(environ.get(key if own else f"HTTP_{key}", "")).strip()

        key_id, _, scope = credential.partition("/")
        asked = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in sorted(query.items()))
        covered = "".join(f"{name}:{header(name)}\n" for name in names.split(";"))
        canonical = f"{environ['REQUEST_METHOD']}\n{path}\n{asked}\n{covered}\n{names}\n{payload}"
        signed = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        secret = b"AWS4" + KEY.secret_access_key.encode()
        for part in scope.split("/"):
            secret = hmac.new(secret, part.encode(), hashlib.sha256).digest()
        wanted = hmac.new(secret, signed.encode(), hashlib.sha256).hexdigest()
        if key_id != KEY.access_key_id:
            return "403 InvalidAccessKeyId"
        return "" if wanted == signature else "403 SignatureDoesNotMatch"


def serve(log: Path) -> None:
    """Serve on a port of the system's choice until the process is ended."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        protocol_version = "HTTP/1.1"

    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, REGION)
    door = Door(DomainDispatcherApplication(create_backend_app), log)
    server = make_server("127.0.0.1", 0, door, True, request_handler=Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
