"""Certificates say exactly who their holder is; keys and authorities that do not fit are refused."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from coordinator.identity import (
    Authority,
    BadRequestError,
    IdentityError,
    RevokedOperators,
    Role,
    principal_of,
    requested_key,
)
from protos.wire import SERVER_NAME, Identity
from tests.coordinator.harness import signing_request


def test_an_agents_certificate_names_the_agent_and_nothing_else() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = Authority.create().issue_client(key.public_key(), Role.AGENT, "a1234567", dt.timedelta(hours=1))
    principal = principal_of(issued.certificate_pem)
    assert principal is not None
    assert (principal.role, principal.id) == (Role.AGENT, "a1234567")
    assert principal.not_after_unix_s == issued.not_after_unix_s
    certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_servers_certificate_is_no_identity(tmp_path: Path) -> None:
    authority = Authority.create()
    authority.save(tmp_path)
    _, chain = authority.server_credentials(tmp_path)
    leaf, top = x509.load_pem_x509_certificates(chain)
    assert principal_of(chain) is None
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [SERVER_NAME]
    assert top.fingerprint(hashes.SHA256()).hex() == authority.fingerprint


def test_the_servers_certificate_is_kept_until_it_is_damaged(tmp_path: Path) -> None:
    authority = Authority.create()
    authority.save(tmp_path)
    first = authority.server_credentials(tmp_path)
    assert authority.server_credentials(tmp_path) == first
    (tmp_path / "server.pem").write_text("no certificate")
    again = authority.server_credentials(tmp_path)
    assert again != first
    assert Authority.load(tmp_path).server_credentials(tmp_path) == again


def test_a_home_with_another_authoritys_key_is_refused(tmp_path: Path) -> None:
    Authority.create().save(tmp_path)
    (other := tmp_path / "other").mkdir()
    Authority.create().save(other)
    (tmp_path / "authority.key").write_bytes((other / "authority.key").read_bytes())
    with pytest.raises(IdentityError, match=r"authority\.key is not the key of authority\.pem"):
        Authority.load(tmp_path)


def test_an_empty_home_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="musterd init"):
        Authority.load(tmp_path)


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    authority = Authority.create()
    authority.save(tmp_path)
    authority.server_credentials(tmp_path)
    for name in ("authority.key", "server.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_signing_request_gives_the_key_it_was_signed_by() -> None:
    key, request = signing_request()
    assert requested_key(request) == key.public_key()


def rsa_request() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def forged_request() -> bytes:
    _, request = signing_request()
    der = bytearray(x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("request_pem", "says"),
    [
        (b"", "0 bytes"),
        (b"x" * 8193, "8193 bytes"),
        (b"nonsense", "not a PKCS#10 request"),
        (rsa_request(), "must be an elliptic curve key on P-256"),
        (forged_request(), "signature is not by the key"),
    ],
    ids=["empty", "too long", "nonsense", "rsa", "forged"],
)
def test_a_bad_signing_request_is_refused(request_pem: bytes, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        requested_key(request_pem)


def test_a_revoked_operator_is_noticed_without_a_restart(tmp_path: Path) -> None:
    authority = Authority.create()
    identity: Identity = authority.issue_operator(Role.OBSERVER, "eve", "localhost:1")
    principal = principal_of(identity.certificate_pem.encode())
    revoked = RevokedOperators(tmp_path)
    assert principal not in revoked
    RevokedOperators(tmp_path).add(Role.ADMIN, "eve")
    assert principal not in revoked
    RevokedOperators(tmp_path).add(Role.OBSERVER, "eve")
    assert principal in revoked


def test_a_revocation_counts_also_in_a_file_that_somebody_spoiled(tmp_path: Path) -> None:
    identity = Authority.create().issue_operator(Role.OBSERVER, "eve", "localhost:1")
    (tmp_path / "revoked.txt").write_bytes(b"\xff\xfe\nobserver/eve\n\x80")
    assert principal_of(identity.certificate_pem.encode()) in RevokedOperators(tmp_path)
