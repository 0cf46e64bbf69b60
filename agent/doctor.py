"""`muster-agent doctor`: what would keep this machine from serving, found before it joins, each finding
with what to do about it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import grpc
from cryptography import x509

from agent import launch
from agent.confinement import Launch, clean_environment
from agent.enroll import fetch_certificates, validity
from agent.errors import AgentError
from agent.home import Home, JobFiles
from agent.network import address_of, interface_of, reaching_address
from protos import agent_pb2, agent_pb2_grpc, wire

DISK_WANTED_BYTES = 10 * 2**30
DISK_NEEDED_BYTES = 2**30
ANSWER_TIMEOUT_S = 10.0
CUDA_TIMEOUT_S = 120.0

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    level: Level
    subject: str
    detail: str
    advice: str = ""  # what to do; empty if nothing need be done


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the doctor is to look at."""

    home: Home
    address: str = ""  # the coordinator's, when there is no identity yet
    advertise: str = ""
    interface: str = ""
    gpus: tuple[int, ...] | None = None


def ok(subject: str, detail: str) -> Finding:
    return Finding(level="ok", subject=subject, detail=detail)


def examine(question: Question) -> Iterator[Finding]:
    """All findings, in an order in which an earlier one explains the later ones."""
    yield from _torch()
    yield from _cards(question.gpus)
    yield from _disk(question.home)
    yield from _confinement(question)
    identity = None
    try:
        identity = wire.Identity.load(question.home.identity)
    except wire.WireError as error:
        if question.home.identity.exists():
            yield Finding(
                level="fail", subject="identity", detail=str(error), advice="join again with a new token"
            )
        else:
            yield Finding(
                level="warn",
                subject="identity",
                detail="this machine has not joined a coordinator",
                advice="ask the operator for a token, then run: muster-agent join --token TOKEN HOST:PORT",
            )
    if identity is not None:
        yield from _certificate(identity)
    address = question.address or (identity.address if identity is not None else "")
    if address:
        yield from _coordinator(address, identity)
    yield from _advertised(question, address)


def _torch() -> Iterator[Finding]:
    from agent import probe

    try:
        version, number = probe.torch_version()
    except AgentError as error:
        yield Finding(
            level="fail", subject="torch", detail=str(error), advice="install torch in this environment"
        )
        return
    span = f"{version}; Muster is made for 2.11 to 2.13"
    if number < probe.OLDEST_TORCH:
        yield Finding(level="fail", subject="torch", detail=span, advice="install torch 2.11, 2.12 or 2.13")
    elif number > probe.NEWEST_TORCH:
        yield Finding(level="warn", subject="torch", detail=span, advice="use 2.13 if training misbehaves")
    else:
        yield ok("torch", version)
    backends = probe.backends()
    if backends:
        yield ok("backend", ", ".join(backends))
    else:
        yield Finding(
            level="fail",
            subject="backend",
            detail="torch has neither nccl nor gloo",
            advice="install an official build",
        )


def _cards(gpus: Sequence[int] | None) -> Iterator[Finding]:
    from agent import probe

    found, driver = probe.cards()
    if not driver:
        yield Finding(
            level="warn",
            subject="driver",
            detail="no NVIDIA driver answers; this machine would train on its CPU",
            advice="if it has a card, install the driver and check that nvidia-smi shows it",
        )
        return
    names = ", ".join(f"{gpu.index}: {gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in found)
    yield ok("driver", f"{driver}; {names or 'no cards'}")
    try:
        probe.lent(gpus, found)
    except AgentError as error:
        yield Finding(
            level="fail", subject="cards", detail=str(error), advice="name only cards that the driver shows"
        )
    with contextlib.suppress(AgentError):
        probe.torch_version()
        if found and "nccl" not in probe.backends():
            yield Finding(
                level="warn",
                subject="cards",
                detail="there are cards, but this torch was built without CUDA: they would not be used",
                advice="install a CUDA build of torch",
            )


def _disk(home: Home) -> Iterator[Finding]:
    try:
        home.prepare()
    except AgentError as error:
        yield Finding(
            level="fail", subject="disk", detail=str(error), advice="choose another directory with --home"
        )
        return
    free = shutil.disk_usage(home.root).free
    detail = f"{free / 2**30:.1f} GiB free at {home.root}"
    if free < DISK_NEEDED_BYTES:
        yield Finding(
            level="fail",
            subject="disk",
            detail=detail,
            advice="free at least 1 GiB, or choose another --home",
        )
    elif free < DISK_WANTED_BYTES:
        advice = "data and checkpoints of a larger job may not fit; 10 GiB or more is comfortable"
        yield Finding(level="warn", subject="disk", detail=detail, advice=advice)
    else:
        yield ok("disk", detail)


def _confinement(question: Question) -> Iterator[Finding]:
    version = launch.landlock_version()
    if not version:
        yield Finding(
            level="warn",
            subject="confinement",
            detail="this kernel has no Landlock: workers would run with all rights of this user",
            advice="run the agent as a user of its own, or on Linux 5.13 or newer; docs/security.md says more",
        )
        return
    yield ok("confinement", f"Landlock {version}: workers see only their job's files")
    with contextlib.suppress(AgentError, OSError):  # a home that cannot be used was found above
        from agent import probe

        if probe.lent(question.gpus, probe.cards()[0]) and "nccl" in probe.backends():
            yield confined_start(question.home)


def confined_start(home: Home, program: str = "import torch; torch.cuda.init()") -> Finding:
    """Whether CUDA starts as confined as a worker is, which takes seconds; `program` is what is started."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=home.root) as root:
        start = Launch(files=JobFiles(root=Path(root)), blobs=home.blobs, confined=True)
        start.files.temporary.mkdir()
        environment = start.environment(clean_environment(os.environ))
        try:
            done = subprocess.run(
                start.command((sys.executable, "-c", program), environment),
                env=environment,
                cwd=root,
                capture_output=True,
                text=True,
                timeout=CUDA_TIMEOUT_S,
                check=False,
            )
            complaint = ""
            if done.returncode != 0:
                said = done.stderr.strip().rpartition("\n")[2][:500]
                complaint = said or f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            complaint = f"it took more than {CUDA_TIMEOUT_S:.0f} s"
    if not complaint:
        return ok("confined CUDA", "starts")
    return Finding(
        level="fail",
        subject="confined CUDA",
        detail=f"CUDA does not start in a confined worker: {complaint}",
        advice="if `python -c 'import torch; torch.cuda.init()'` fails, too, mend driver and torch; if not, "
        "run the agent with --confine off, as a user of its own",
    )


def _certificate(identity: wire.Identity) -> Iterator[Finding]:
    begin, end = validity(identity)
    now = datetime.now(UTC)
    if now < begin:
        yield Finding(
            level="fail",
            subject="clock",
            detail=f"it is {now:%Y-%m-%d %H:%M} here, before our certificate begins ({begin:%Y-%m-%d %H:%M})",
            advice="set this machine's clock (timedatectl set-ntp true)",
        )
    elif now > end:
        yield Finding(
            level="fail",
            subject="certificate",
            detail=f"of {identity.id}, expired on {end:%Y-%m-%d %H:%M}",
            advice="run `muster-agent leave --forget`, then join again with a new token",
        )
    else:
        left = end - now
        yield ok(
            "certificate",
            f"of {identity.id}, valid for {left.days} days {left.seconds // 3600} hours; renews itself",
        )


def _coordinator(address: str, identity: wire.Identity | None) -> Iterator[Finding]:
    try:
        host, port = wire.split_address(address)
    except wire.WireError as error:
        yield Finding(level="fail", subject="coordinator", detail=str(error), advice="give HOST:PORT")
        return
    try:
        numbers = sorted(
            {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        )
    except OSError as error:
        detail = f"{host} cannot be resolved: {error.strerror or error}"
        yield Finding(
            level="fail", subject="name", detail=detail, advice="check the name and this machine's DNS"
        )
        return
    yield ok("name", f"{host} is {', '.join(numbers)}")
    try:
        chain = fetch_certificates(address)
    except AgentError as error:
        yield Finding(
            level="fail",
            subject="port",
            detail=str(error),
            advice="check address, firewall and that musterd runs",
        )
        return
    yield ok("port", f"{address} answers with TLS")
    yield from _clock(chain)
    if identity is None:
        return
    yield _answer(identity, address)


def _answer(identity: wire.Identity, address: str) -> Finding:
    """Whether the coordinator proves to be ours and takes our identity: one harmless call."""
    with wire.channel(identity, address) as channel:
        try:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            stub.FindBlobs(agent_pb2.FindBlobsRequest(digests=["0" * 64]), timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            return Finding(
                level="fail",
                subject="coordinator",
                detail=f"{address} answers, but not to our identity: {error.details()}",
                advice="is it the coordinator that we joined, and its main port (not the enrolment port)? "
                "If so, run `muster-agent leave --forget` and join again",
            )
    return ok("coordinator", "it proves to be the one we joined, and takes our certificate")


def _clock(chain: Sequence[x509.Certificate]) -> Iterator[Finding]:
    """Only that our clock lies within the validity of what the coordinator shows; finer skew is not measured."""
    now = datetime.now(UTC)
    for certificate in chain:
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            yield Finding(
                level="fail",
                subject="clock",
                detail=f"it is {now:%Y-%m-%d %H:%M} UTC here, outside the coordinator's certificate "
                f"({certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M})",
                advice="set this machine's clock (timedatectl set-ntp true); if it is right, tell the operator",
            )
            return
    if chain:
        yield ok("clock", f"{now:%Y-%m-%d %H:%M} UTC, within the coordinator's certificates")


def _advertised(question: Question, address: str) -> Iterator[Finding]:
    try:
        host = question.advertise or (address_of(question.interface) if question.interface else "")
        host = host or (reaching_address(address) if address else "")
    except AgentError as error:
        yield Finding(
            level="fail",
            subject="advertise",
            detail=str(error),
            advice="choose with --advertise or --interface",
        )
        return
    if not host:
        return
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as server:
            server.bind(target)
            server.listen(1)
            with socket.create_connection(server.getsockname()[:2], timeout=5):
                pass
    except OSError as error:
        yield Finding(
            level="fail",
            subject="advertise",
            detail=f"{host} is not an address of this machine, or does not accept connections: {error.strerror or error}",
            advice="peers connect to this address: give one of this machine's own, e.g. the overlay's, with --advertise",
        )
        return
    where = f"{host} on {interface_of(host) or 'an unknown interface'}"
    loopback = host.startswith("127.") or host in {"::1", "localhost"}
    if loopback:
        advice = "only agents on this machine can reach it; give the overlay's address with --advertise"
        yield Finding(
            level="warn", subject="advertise", detail=f"{where} is this machine's loopback", advice=advice
        )
    else:
        yield ok(
            "advertise",
            f"{where} accepts connections, tested from this machine only: "
            "whether peers reach it depends on firewalls between you",
        )
