"""Becoming somebody: a join token is exchanged for a certificate, and certificates are renewed.

The order protects the secret: fetch the certificates that the other side shows, compare the
authority's fingerprint with the one the token pins, open a channel that trusts that authority alone,
and only then send the secret.
"""

from __future__ import annotations

import hashlib
import select
import socket
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from agent.errors import RefusedByCoordinator, Unreachable, UntrustedCoordinator
from protos import agent_pb2, agent_pb2_grpc, wire

CALL_TIMEOUT_S = 15.0


def fetch_certificates(address: str, timeout_s: float = 10.0) -> tuple[x509.Certificate, ...]:
    """What the server at `address` shows, leaf first, unverified.  Raise Unreachable."""
    host, port = wire.split_address(address)
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_verify(SSL.VERIFY_NONE, lambda *_: True)
    context.set_alpn_protos([b"h2"])
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as plain:
            plain.setblocking(False)
            connection = SSL.Connection(context, plain)
            connection.set_tlsext_host_name(wire.SERVER_NAME.encode())
            connection.set_connect_state()
            while True:
                try:
                    connection.do_handshake()
                    break
                except (SSL.WantReadError, SSL.WantWriteError) as want:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise TimeoutError("no TLS answer") from None
                    reads = [plain] if isinstance(want, SSL.WantReadError) else []
                    select.select(reads, [] if reads else [plain], [], left)
            chain = connection.get_peer_cert_chain(as_cryptography=True) or []
    except (OSError, SSL.Error) as error:
        raise Unreachable(
            f"coordinator {address}: {_cause(error)}; check host and port (the enrolment port is printed by "
            "`muster token create`), that musterd runs, and that no firewall is between"
        ) from error
    return tuple(chain)


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it does not speak TLS ({error})"


def pinned_authority(chain: tuple[x509.Certificate, ...], fingerprint: str, address: str) -> bytes:
    """The authority (PEM) with this SHA-256 fingerprint.

    Raise UntrustedCoordinator unless it is in `chain` and has signed the leaf."""
    for certificate in chain:
        der = certificate.public_bytes(serialization.Encoding.DER)
        if hashlib.sha256(der).hexdigest() != fingerprint:
            continue
        try:
            chain[0].verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise UntrustedCoordinator(
                f"coordinator {address}: shows the pinned authority, but its own certificate is not signed by it; "
                "somebody may be in between. Nothing secret was sent"
            ) from error
        return certificate.public_bytes(serialization.Encoding.PEM)
    found = (
        hashlib.sha256(chain[-1].public_bytes(serialization.Encoding.DER)).hexdigest() if chain else "none"
    )
    raise UntrustedCoordinator(
        f"coordinator {address}: its authority's fingerprint is {found[:16]}…, the token pins {fingerprint[:16]}…; "
        "the token is of another coordinator, or the address is wrong, or somebody is in between. "
        "Nothing secret was sent"
    )


def new_key_and_csr(name: str) -> tuple[str, bytes]:
    """A fresh P-256 key (PEM) that never leaves this machine, and a signing request for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem.decode(), csr.public_bytes(serialization.Encoding.PEM)


def enroll(token: wire.JoinToken, address: str, name: str) -> wire.Identity:
    """Exchange `token` for an identity at the enrolment port `address`.

    Raise Unreachable, UntrustedCoordinator (before the secret is sent) or RefusedByCoordinator."""
    host, _ = wire.split_address(address)
    authority_pem = pinned_authority(fetch_certificates(address), token.fingerprint, address)
    key_pem, csr_pem = new_key_and_csr(name)
    request = agent_pb2.EnrollRequest(
        protocol=wire.PROTOCOL, token_id=token.token_id, secret=token.secret, csr_pem=csr_pem, name=name
    )
    with wire.enroll_channel(authority_pem, address) as channel:
        try:
            reply = agent_pb2_grpc.AgentServiceStub(channel).Enroll(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            refusal = wire.refusal_of(error)
            if refusal is not None:
                raise RefusedByCoordinator(
                    f"coordinator {address} refused: {error.details()} [{agent_pb2.Refusal.Name(refusal)}]"
                ) from error
            raise Unreachable(
                f"coordinator {address}: enrolment failed: {error.code().name}: {error.details()}"
            ) from error
    shown = f"[{host}]" if ":" in host else host
    return wire.Identity(
        role="agent",
        id=reply.agent_id,
        address=f"{shown}:{reply.port}",
        certificate_pem=reply.certificate_pem.decode(),
        key_pem=key_pem,
        authority_pem=authority_pem.decode(),
    )


def validity(identity: wire.Identity) -> tuple[datetime, datetime]:
    """From when to when the identity's certificate is valid."""
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem.encode())
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def renewal_due(identity: wire.Identity, now: datetime | None = None) -> bool:
    """Whether no more than a third of the certificate's life is left."""
    begin, end = validity(identity)
    return end - (now or datetime.now(UTC)) <= (end - begin) / 3


async def renew(
    identity: wire.Identity,
    call: Callable[[agent_pb2.RenewIdentityRequest], Awaitable[agent_pb2.RenewIdentityReply]],
) -> wire.Identity:
    """The next identity, with a new key; errors of `call` pass through."""
    key_pem, csr_pem = new_key_and_csr(identity.id)
    reply = await call(agent_pb2.RenewIdentityRequest(csr_pem=csr_pem))
    return wire.Identity(
        role=identity.role,
        id=identity.id,
        address=identity.address,
        certificate_pem=reply.certificate_pem.decode(),
        key_pem=key_pem,
        authority_pem=identity.authority_pem,
    )
