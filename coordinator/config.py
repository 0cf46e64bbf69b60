"""coordinator.yaml: what `musterd serve` reads.  One duration, `lease`, sets the whole timing budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import BeforeValidator, Field, model_validator

from coordinator.core.model import Timing
from coordinator.schema import DurationMs, Section, SettingError, SizeBytes, validated
from protos.wire import BadAddress, split_address

__all__ = ["CoordinatorConfig", "SettingError", "load"]


def _address(value: object) -> str:
    try:
        split_address(str(value))
    except BadAddress as error:
        raise ValueError(str(error)) from None
    return str(value)


Address = Annotated[str, BeforeValidator(_address)]


class Listen(Section):
    """Where the coordinator listens; port 0 lets the system choose (see run/addresses.json)."""

    main: Address = "0.0.0.0:7470"
    enroll: Address = "0.0.0.0:7471"
    metrics: Address = "127.0.0.1:7472"


class TimingOverrides(Section):
    """Parts of the budget that shall not follow from `lease`; each is checked against the others."""

    heartbeat: DurationMs | None = Field(default=None, ge=20, le=300_000)
    grace: DurationMs | None = Field(default=None, ge=0, le=600_000)
    rebuild_timeout: DurationMs | None = Field(default=None, ge=500, le=3_600_000)
    quarantine_base: DurationMs | None = Field(default=None, ge=1, le=86_400_000)
    quarantine_max: DurationMs | None = Field(default=None, ge=1, le=604_800_000)
    forgive: DurationMs | None = Field(default=None, ge=1, le=604_800_000)
    prepare_timeout: DurationMs | None = Field(default=None, ge=1_000, le=604_800_000)
    """An agent that was given a job and neither gets ready nor fetches anything for so long loses its place."""


class Certificates(Section):
    agent_ttl: DurationMs = Field(default=86_400_000, ge=60_000, le=31_536_000_000)
    """How long an agent's certificate is valid; agents renew in time."""


_STORE = re.compile(
    r"^s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[A-Za-z0-9!_.*'()/-]*))?$"
)


def _shown(text: str) -> str:
    return "something with an @, which may hold a key" if "@" in text else repr(text)


def _store(value: object) -> str:
    text = str(value)
    if text != "directory" and _STORE.fullmatch(text) is None:
        raise ValueError(f"found {_shown(text)}; expected directory or s3://BUCKET/PREFIX")
    return text


def _endpoint(value: object) -> str:
    text = str(value)
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.query:
        raise ValueError(f"found {_shown(text)}; expected http(s)://HOST or http(s)://HOST:PORT and no key")
    return text.rstrip("/")


Endpoint = Annotated[str, BeforeValidator(_endpoint)]


class S3(Section):
    """How the bucket of `blobs.store: s3://…` is reached."""

    endpoint: Endpoint | None = None
    """The store's address; without one, AWS in `region`."""
    agents_endpoint: Endpoint | None = None
    """The same store's address as agents reach it, if that is another one."""
    region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]{1,64}$")
    credentials: str | None = None
    """File of mode 0600 with the key as JSON, relative to the home; without one, AWS_ACCESS_KEY_ID and so on in
    the environment.  A key is never written into this configuration."""
    url_expiry: DurationMs = Field(default=900_000, ge=1_000, le=604_800_000)
    """How long a presigned URL is good: a transfer must begin within this time."""
    staged_per_peer: SizeBytes = Field(default=16 * 2**30, ge=1)
    """What one agent may have sent without having reported it."""
    sha256_header: bool = True
    """Let the store check an upload's SHA-256 too; for a store that refuses x-amz-checksum-sha256, false."""


class Blobs(Section):
    store: Annotated[str, BeforeValidator(_store)] = "directory"
    """`directory`, in the home, or `s3://BUCKET/PREFIX`, which agents then reach by presigned URLs."""
    s3: S3 = S3()
    max_bytes: SizeBytes = Field(default=8 * 2**30, ge=1)
    """Largest blob accepted."""
    unreported_per_agent: SizeBytes = Field(default=16 * 2**30, ge=1)
    """What one agent may have sent through the coordinator that is no shard of any checkpoint."""
    reserve: SizeBytes = 2**30
    """Free disk space that uploads never touch: the journal needs room."""
    retired_grace: DurationMs = 600_000
    """How long the shards of a retired checkpoint stay, for agents that are just fetching them."""
    orphan_grace: DurationMs = 86_400_000
    """How long a blob stays that no job or checkpoint refers to (yet)."""
    transfers_per_peer: int = Field(default=8, ge=1, le=1_024)
    """Uploads, and apart from them downloads, that one peer may have under way at once."""
    chunk_timeout: DurationMs = Field(default=60_000, ge=1)
    """An upload that sends nothing for so long is dropped."""
    slowest_upload: SizeBytes = Field(default=4_096, ge=1)
    """Bytes a second: an upload that is slower as a whole is dropped after `chunk_timeout` more."""

    def bucket(self) -> tuple[str, str] | None:
        """(bucket, prefix) of an object store; None for the directory."""
        found = _STORE.fullmatch(self.store)
        return None if found is None else (found["bucket"], (found["prefix"] or "").strip("/"))


class Journal(Section):
    snapshot_records: int = Field(default=10_000, ge=1)
    """A snapshot is written after so many records, so that a start folds no more than that."""


class Logs(Section):
    lines_per_job: int = Field(default=100_000, ge=1)
    """Workers' output kept for each job; the oldest lines go first."""


class Limits(Section):
    hello_timeout: DurationMs = Field(default=60_000, ge=1)
    """A session whose first message does not come within this time is closed."""
    session_queue: int = Field(default=1_024, ge=8)
    """Messages that may wait for an agent that does not read; then its session is closed."""
    session_messages_per_s: float = Field(default=500.0, gt=0)
    session_burst: int = Field(default=2_000, ge=1)
    """Messages one session may send; beyond, it is closed with RATE_LIMITED."""
    calls_per_s: float = Field(default=500.0, gt=0)
    calls_burst: int = Field(default=2_000, ge=1)
    """Calls one identity may start; beyond, they are refused with RATE_LIMITED."""
    open_calls: int = Field(default=256, ge=8)
    """Calls one identity may have under way at once, its streams among them."""
    enrolments_per_s: float = Field(default=20.0, gt=0)
    enrolments_burst: int = Field(default=200, ge=1)
    """Enrolments one address may try; beyond, they are refused with RATE_LIMITED.  A wrong token counts as ten."""
    handshake_timeout: DurationMs = Field(default=60_000, ge=100, le=120_000)
    """A connection whose TLS handshake takes longer is closed."""
    connections: int = Field(default=16_384, ge=16)
    """Connections that each port accepts at once."""
    connections_per_address: int = Field(default=2_048, ge=16)
    """Connections one address (of IPv6: one /64) may have; beyond, those that have said least are closed."""


class CoordinatorConfig(Section):
    home: str | None = None
    """Directory made by `musterd init`; relative to this file.  `--home` wins."""
    listen: Listen = Listen()
    lease: DurationMs = Field(default=10_000, ge=200, le=600_000)
    timing: TimingOverrides = TimingOverrides()
    certificates: Certificates = Certificates()
    blobs: Blobs = Blobs()
    journal: Journal = Journal()
    logs: Logs = Logs()
    limits: Limits = Limits()

    def budget(self) -> Timing:
        """The timing that follows from `lease`, with the overrides put in."""
        derived = Timing.from_lease(self.lease)
        over = self.timing

        def chosen(override: int | None, default: int) -> int:
            return default if override is None else override

        return Timing(
            lease_ms=self.lease,
            heartbeat_ms=chosen(over.heartbeat, derived.heartbeat_ms),
            grace_ms=chosen(over.grace, derived.grace_ms),
            rebuild_timeout_ms=chosen(over.rebuild_timeout, derived.rebuild_timeout_ms),
            quarantine_base_ms=chosen(over.quarantine_base, derived.quarantine_base_ms),
            quarantine_max_ms=chosen(over.quarantine_max, derived.quarantine_max_ms),
            forgive_ms=chosen(over.forgive, derived.forgive_ms),
            prepare_timeout_ms=chosen(over.prepare_timeout, derived.prepare_timeout_ms),
        )

    @model_validator(mode="after")
    def _consistent(self) -> CoordinatorConfig:
        timing = self.budget()
        if 2 * timing.heartbeat_ms >= timing.lease_ms:
            raise ValueError(
                f"timing.heartbeat is {timing.heartbeat_ms} ms but must be less than half of lease "
                f"({timing.lease_ms} ms), or one late heartbeat loses an agent; lower it or raise lease"
            )
        if timing.grace_ms > timing.lease_ms:
            raise ValueError(
                f"timing.grace is {timing.grace_ms} ms but must not exceed lease ({timing.lease_ms} ms), "
                "which would end first; lower it or raise lease"
            )
        if timing.rebuild_timeout_ms < timing.heartbeat_ms:
            raise ValueError(
                f"timing.rebuild_timeout is {timing.rebuild_timeout_ms} ms but must not be less than "
                f"timing.heartbeat ({timing.heartbeat_ms} ms); raise it"
            )
        if timing.prepare_timeout_ms < max(timing.lease_ms, timing.rebuild_timeout_ms):
            raise ValueError(
                f"timing.prepare_timeout is {timing.prepare_timeout_ms} ms but must not be less than lease "
                f"({timing.lease_ms} ms) and timing.rebuild_timeout ({timing.rebuild_timeout_ms} ms): an agent that was "
                "in a generation prepares anew; raise it"
            )
        if timing.quarantine_base_ms > timing.quarantine_max_ms:
            raise ValueError(
                f"timing.quarantine_base is {timing.quarantine_base_ms} ms but must not exceed "
                f"timing.quarantine_max ({timing.quarantine_max_ms} ms); lower one or raise the other"
            )
        return self


def load(path: Path) -> CoordinatorConfig:
    """Read a coordinator.yaml; raise SettingError naming the file and the field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"config {path}: cannot be read ({error})") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingError(f"config {path}: not YAML ({error})") from error
    return validated(CoordinatorConfig, {} if found is None else found, what=f"config {path}")
