"""The operator's connection to the coordinator: one blocking channel, deadlines on every call, streams
that resume where they broke, blobs verified by digest, and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import grpc

from coordinator.admin.errors import BadInput, OperationFailed, Refused, Unreachable, one_line
from protos import admin_pb2_grpc, agent_pb2, wire

CALL_TIMEOUT_S = 15.0
TRANSFER_TIMEOUT_S = 3_600.0
STREAM_TIMEOUT_S = 900.0  # a followed stream is opened anew this often, so that none is open for ever
RECONNECT_WINDOW_S = 600.0
RECONNECT_PAUSE_S = 1.0
FIND_BATCH = 10_000  # FindBlobsRequest's bound
DOWNLOAD_ATTEMPTS = 5
UPLOAD_ATTEMPTS = 5


def default_identity_path() -> Path:
    """Where the admin identity lies unless the operator says otherwise."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "muster" / "admin.json"


class Coordinator:
    """An open connection; a context manager.  Every method raises `Unreachable` or `Refused`."""

    def __init__(self, identity: wire.Identity, address: str, identity_path: Path) -> None:
        self.identity = identity
        self.address = address
        self._identity_path = identity_path
        self._channel = wire.channel(identity, address)
        self.stub: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    @staticmethod
    def open(identity_path: Path | None = None, address: str | None = None) -> Coordinator:
        """Load the identity and make a channel; nothing is sent yet.  Raise BadInput."""
        path = identity_path or default_identity_path()
        try:
            if identity_path is None and not path.exists():
                raise BadInput(
                    f"no identity: {path} does not exist. `musterd init` writes admin.json: copy it there, or name "
                    "it with --identity or MUSTER_IDENTITY"
                )
            identity = wire.Identity.load(path)
            dialled = address or _served_address(identity, path)
            wire.split_address(dialled)
        except wire.WireError as error:
            raise BadInput(str(error)) from error
        if identity.role not in ("admin", "observer"):
            raise BadInput(
                f"identity file {path}: role is {identity.role!r}, but `muster` needs an admin or observer identity; "
                "use the admin.json that `musterd init` wrote"
            )
        return Coordinator(identity, dialled, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    # ------------------------------------------------------------------------------- calls

    def call(self, method: Callable[..., Any], request: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """One unary call with a deadline."""
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self.explain(error, timeout_s) from error

    def view(
        self, method: Callable[..., Any], request: object, timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """A call that replies with a View, as the object its JSON holds."""
        view: dict[str, Any] = json.loads(self.call(method, request, timeout_s).json)
        return view

    def views(self, method: Callable[..., Any], request: object) -> list[dict[str, Any]]:
        """A call that replies with Views, as objects."""
        return [json.loads(text) for text in self.call(method, request).json]

    # ------------------------------------------------------------------------------- streams

    def stream(
        self, method: Callable[..., Any], request: object, timeout_s: float = CALL_TIMEOUT_S
    ) -> Iterator[Any]:
        """The messages of one finite server stream.  An abandoned call is cancelled."""
        call = method(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.explain(error, timeout_s) from error
        finally:
            call.cancel()

    def resumed(
        self,
        method: Callable[..., Any],
        request: Callable[[int], object],
        after: int,
        position: Callable[[Any], int],
    ) -> Iterator[Any]:
        """The messages of a followed stream, for as long as the server keeps it open.

        `request(n)` asks for what comes after position n; `position(message)` is the position a message
        reaches.  A broken connection is made again for up to ten minutes and nothing is repeated."""
        broken_since: float | None = None
        reached_once = False
        while True:
            try:
                for message in self.stream(method, request(after), STREAM_TIMEOUT_S):
                    broken_since, reached_once = None, True
                    after = max(after, position(message))
                    yield message
            except Unreachable as error:
                cause = error.__cause__
                if isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    reached_once = True
                    continue
                if not reached_once:
                    raise
                if broken_since is None:
                    broken_since = time.monotonic()
                    click.echo(f"muster: lost the coordinator at {self.address}; reconnecting", err=True)
                if time.monotonic() - broken_since > RECONNECT_WINDOW_S:
                    raise
                time.sleep(RECONNECT_PAUSE_S)
            else:
                return

    # ------------------------------------------------------------------------------- blobs

    def missing_blobs(self, digests: Sequence[str]) -> list[str]:
        """Those of `digests` that the coordinator does not have, in order."""
        missing: list[str] = []
        for first in range(0, len(digests), FIND_BATCH):
            request = agent_pb2.FindBlobsRequest(digests=digests[first : first + FIND_BATCH])
            missing += self.call(self.stub.FindBlobs, request).missing
        return missing

    def put_blob(self, digest: str, path: Path, advance: Callable[[int], object]) -> None:
        """Upload a file under its digest, going on where a broken attempt, also one of an earlier command, ended;
        `advance` hears the bytes of each chunk that was sent."""

        def messages(offset: int) -> Iterator[agent_pb2.PutBlobRequest]:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = agent_pb2.PutBlobHeader(digest=digest, bytes=size, offset=offset)
                yield agent_pb2.PutBlobRequest(header=header)
                file.seek(offset)
                while chunk := file.read(wire.CHUNK_BYTES):
                    yield agent_pb2.PutBlobRequest(data=chunk)
                    advance(len(chunk))

        for left in reversed(range(UPLOAD_ATTEMPTS)):
            found = self.call(self.stub.FindBlobs, agent_pb2.FindBlobsRequest(digests=[digest]))
            if not found.missing:
                return
            try:
                self.call(self.stub.PutBlob, messages(found.received.get(digest, 0)), TRANSFER_TIMEOUT_S)
            except Unreachable:
                if not left:
                    raise
                time.sleep(RECONNECT_PAUSE_S)
            else:
                return

    def get_blob(self, digest: str, path: Path, advance: Callable[[int], object]) -> None:
        """Download a blob to `path`, resuming where a broken connection left off.  Raise OperationFailed
        if the bytes do not hash to the digest; `path` then does not exist."""
        partial = path.with_name(f"{path.name}.partial")
        hasher = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
                    try:
                        request = agent_pb2.GetBlobRequest(digest=digest, offset=file.tell())
                        for chunk in self.stream(self.stub.GetBlob, request, TRANSFER_TIMEOUT_S):
                            file.write(chunk.data)
                            hasher.update(chunk.data)
                            advance(len(chunk.data))
                        break
                    except Unreachable:
                        if attempt == DOWNLOAD_ATTEMPTS:
                            raise
                        time.sleep(RECONNECT_PAUSE_S)
            if hasher.hexdigest() != digest:
                raise OperationFailed(
                    f"blob {digest}: the coordinator sent bytes that hash to {hasher.hexdigest()}; its copy is damaged. "
                    "Run `muster checkpoint verify` and use another checkpoint"
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------- errors

    def explain(self, error: grpc.RpcError, timeout_s: float) -> OperationFailed:
        """The failure of a call as one of this command's errors."""
        code, details = error.code(), one_line(error.details() or "")
        refusal = wire.refusal_of(error)
        if refusal is not None:
            return Refused(agent_pb2.Refusal.Name(refusal).removeprefix("REFUSAL_"), details)
        match code:
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Unreachable(
                    f"coordinator at {self.address} did not answer within {timeout_s:g} s; is it overloaded, or does a "
                    "firewall swallow the connection?"
                )
            case grpc.StatusCode.UNAVAILABLE:
                return self._explain_unavailable(details)
            case grpc.StatusCode.UNKNOWN | grpc.StatusCode.INTERNAL | grpc.StatusCode.CANCELLED:
                return OperationFailed(f"coordinator at {self.address} failed: {code.name}: {details}")
            case _:
                return Refused(code.name, details)

    def _explain_unavailable(self, details: str) -> OperationFailed:
        problem = _identity_problem(self.identity)
        if problem:
            return BadInput(f"identity file {self._identity_path}: {problem}")
        last = re.sub(r"^[A-Z_]+: (ipv[46]:\S+: )?", "", details.rpartition("last error: ")[2])
        if any(
            sign in details
            for sign in ("CERTIFICATE_VERIFY_FAILED", "certificate verify failed", "handshak", "SSL_ERROR")
        ):
            return Unreachable(
                f"coordinator at {self.address} could not be verified: what answers there was not certified by the "
                f"authority in {self._identity_path}. Check --address, or use the admin.json of that coordinator"
            )
        return Unreachable(
            f"coordinator at {self.address} is unreachable ({last}). Check that musterd runs there and that the port "
            "is open, or name another address with --address"
        )


def _served_address(identity: wire.Identity, path: Path) -> str:
    """The identity's address; one with port 0 is looked up where a coordinator started in the same home
    has written the port it got."""
    if not identity.address.endswith(":0"):
        return identity.address
    served = path.parent / "run" / "addresses.json"
    try:
        main = json.loads(served.read_text(encoding="utf-8"))["main"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"identity file {path}: its address {identity.address} has no port, and {served} names none; start "
            "`musterd serve`, or name the address with --address"
        ) from error
    return str(main)


def _identity_problem(identity: wire.Identity) -> str:
    """Why the coordinator cannot accept this identity, if that can be seen from here; else empty."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate(identity.certificate_pem.encode())
        x509.load_pem_x509_certificate(identity.authority_pem.encode())
        load_pem_private_key(identity.key_pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        return f"holds a malformed certificate or key ({one_line(str(error))}); copy admin.json from the coordinator again"
    if certificate.not_valid_after_utc < datetime.now(UTC):
        return (
            f"its certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; "
            "make a new one on the coordinator's machine"
        )
    return ""
