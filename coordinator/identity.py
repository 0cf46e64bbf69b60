"""Who is who: the authority, the server's certificate, the certificates of agents and operators.

A certificate carries exactly one identity, as a URI: muster://agent/ID, muster://admin/NAME or
muster://observer/NAME.  Nothing else in a certificate or a message is believed.
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos import seal
from protos.files import write_whole
from protos.wire import SERVER_NAME, Identity, peer_name

AUTHORITY_TTL = dt.timedelta(days=3650)
SERVER_TTL = dt.timedelta(days=397)
SERVER_RENEW_BEFORE = dt.timedelta(days=90)
OPERATOR_TTL = dt.timedelta(days=3650)
BACKDATE = dt.timedelta(minutes=5)
"""Certificates are valid from a little earlier than now: volunteers' clocks are not exact."""
DOCUMENT_SIGNING = x509.ObjectIdentifier(
    "1.3.6.1.5.5.7.3.36"
)  # RFC 9336: no TLS library takes it for a peer's
MAX_CSR_BYTES = 8 * 1024

_URI = re.compile(r"^muster://(agent|admin|observer)/([A-Za-z0-9._-]{1,64})$")


class IdentityError(Exception):
    """The home's keys or certificates cannot be used; the message says which and what to do."""


class BadRequestError(Exception):
    """A certificate signing request is malformed; the message says how."""


class Role(enum.Enum):
    AGENT = "agent"
    ADMIN = "admin"
    OBSERVER = "observer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who makes a call, as their certificate says."""

    role: Role
    id: str
    not_after_unix_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    certificate_pem: bytes
    serial: str  # hex
    not_after_unix_s: int


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


_LEAF_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_AUTHORITY_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """The coordinator's own certificate authority; signs nothing but Muster's identities."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @staticmethod
    def create() -> Authority:
        """A new authority that does not restrict itself to any host."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = _now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("Muster authority"))
            .issuer_name(_name("Muster authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(now + AUTHORITY_TTL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_AUTHORITY_USAGE, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Authority(certificate, key)

    @staticmethod
    def load(home: Path) -> Authority:
        """Read authority.pem and authority.key; raise IdentityError."""
        try:
            certificate = x509.load_pem_x509_certificate((home / "authority.pem").read_bytes())
            key = serialization.load_pem_private_key((home / "authority.key").read_bytes(), None)
        except OSError as error:
            raise IdentityError(
                f"home {home}: {error.filename}: {error.strerror}; make a home with `musterd init {home}`"
            ) from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(
                f"home {home}: authority.pem or authority.key is damaged ({error})"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise IdentityError(
                f"home {home}: authority.key is not the key of authority.pem; restore a backup"
            )
        return Authority(certificate, key)

    def save(self, home: Path) -> None:
        write_whole(home / "authority.key", _key_pem(self._key))
        write_whole(home / "authority.pem", self.certificate_pem)

    @property
    def certificate_pem(self) -> bytes:
        return _pem(self._certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate (DER), hex: what a join token pins."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def _sign(
        self,
        public_key: CertificatePublicKeyTypes,
        *,
        subject: str,
        names: list[x509.GeneralName],
        purposes: list[x509.ObjectIdentifier],
        ttl: dt.timedelta,
    ) -> Issued:
        now = _now()
        not_after = min(now + ttl, self._certificate.not_valid_after_utc).replace(microsecond=0)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_LEAF_USAGE, critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return Issued(
            certificate_pem=_pem(certificate),
            serial=f"{certificate.serial_number:x}",
            not_after_unix_s=int(not_after.timestamp()),
        )

    def issue_client(
        self, public_key: ec.EllipticCurvePublicKey, role: Role, id_: str, ttl: dt.timedelta
    ) -> Issued:
        """A certificate that says its holder is muster://role/id.  An agent may also serve with it, to other
        agents, under a name that is no coordinator's."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"muster://{role.value}/{id_}")]
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role is Role.AGENT:
            names.append(x509.DNSName(peer_name(id_)))
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        return self._sign(public_key, subject=id_, names=names, purposes=purposes, ttl=ttl)

    def sign(self, text: bytes) -> bytes:
        """ECDSA (SHA-256, DER) over a text that no other use of the key could mean: see protos/ticket.py."""
        return self._key.sign(text, ec.ECDSA(hashes.SHA256()))

    def issue_operator(self, role: Role, name: str, address: str) -> Identity:
        """A whole identity, key included, for an admin or observer."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self.issue_client(key.public_key(), role, name, OPERATOR_TTL)
        return Identity(
            role=role.value,
            id=name,
            address=address,
            certificate_pem=issued.certificate_pem.decode(),
            key_pem=_key_pem(key).decode(),
            authority_pem=self.certificate_pem.decode(),
        )

    def write_server_certificate(self, home: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self._sign(
            key.public_key(),
            subject=SERVER_NAME,
            names=[x509.DNSName(SERVER_NAME)],
            purposes=[ExtendedKeyUsageOID.SERVER_AUTH],
            ttl=SERVER_TTL,
        )
        write_whole(home / "server.key", _key_pem(key))
        write_whole(home / "server.pem", issued.certificate_pem)

    def server_credentials(self, home: Path) -> tuple[bytes, bytes]:
        """(key, chain) of the server, leaf before authority; renewed first if it expires soon."""
        try:
            leaf = x509.load_pem_x509_certificate((home / "server.pem").read_bytes())
            key = (home / "server.key").read_bytes()
            leaf.verify_directly_issued_by(self._certificate)
            usable = leaf.not_valid_after_utc - _now() > SERVER_RENEW_BEFORE
            usable = (
                usable and serialization.load_pem_private_key(key, None).public_key() == leaf.public_key()
            )
        except (OSError, ValueError, TypeError, InvalidSignature):
            usable = False
        if not usable:
            self.write_server_certificate(home)
            leaf = x509.load_pem_x509_certificate((home / "server.pem").read_bytes())
            key = (home / "server.key").read_bytes()
        return key, _pem(leaf) + self.certificate_pem

    def manifest_signer(self, home: Path) -> ManifestSigner:
        """Who signs checkpoints here; made anew where the files are absent or not of this authority.

        A key of its own, so that no manifest can be taken for a certificate.  Its certificate goes with
        every signature: an older one stays good when this is replaced."""
        try:
            certificate = x509.load_pem_x509_certificate((home / "checkpoints.pem").read_bytes())
            key = serialization.load_pem_private_key((home / "checkpoints.key").read_bytes(), None)
            certificate.verify_directly_issued_by(self._certificate)
            usable = isinstance(key, Ed25519PrivateKey) and key.public_key() == certificate.public_key()
        except (OSError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            usable = False
        if not usable:
            key = Ed25519PrivateKey.generate()
            issued = self._sign(
                key.public_key(),
                subject="Muster checkpoints",
                names=[x509.UniformResourceIdentifier(seal.SIGNER_URI)],
                purposes=[DOCUMENT_SIGNING],
                ttl=AUTHORITY_TTL,
            )
            write_whole(home / "checkpoints.key", _key_pem(key))
            write_whole(home / "checkpoints.pem", issued.certificate_pem)
            certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
        assert isinstance(key, Ed25519PrivateKey)
        chain = [one.public_bytes(serialization.Encoding.DER) for one in (certificate, self._certificate)]
        return ManifestSigner(key=key, chain=tuple(chain))


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSigner:
    """The coordinator's hand under a manifest."""

    key: Ed25519PrivateKey = field(repr=False)
    chain: tuple[bytes, ...]
    """Its certificate and the authority's, DER."""

    def seal(self, manifest_json: str) -> str:
        """A manifest's canonical JSON, with its signature."""
        return seal.signed(manifest_json, self.key, self.chain)


def requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a signing request whose holder has proven to own it; all else in it is ignored.

    Raise BadRequestError."""
    if not csr_pem or len(csr_pem) > MAX_CSR_BYTES:
        raise BadRequestError(f"csr_pem: {len(csr_pem)} bytes; expected 1 to {MAX_CSR_BYTES}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise BadRequestError("csr_pem: not a PKCS#10 request in PEM form") from error
    if not signed:
        raise BadRequestError("csr_pem: its signature is not by the key that it names")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadRequestError("csr_pem: the key must be an elliptic curve key on P-256")
    return key


@functools.lru_cache(maxsize=4096)
def principal_of(certificate_pem: bytes) -> Principal | None:
    """The identity in a certificate that TLS has already verified; None if it carries none."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes or len(uris) != 1:
        return None
    match = _URI.fullmatch(uris[0])
    if match is None:
        return None
    return Principal(
        role=Role(match[1]), id=match[2], not_after_unix_s=int(certificate.not_valid_after_utc.timestamp())
    )


class RevokedOperators:
    """Admin and observer identities taken back: lines `role/name` of the file revoked.txt in the home.

    The file is looked at again whenever it changes, so that revoking needs no restart."""

    def __init__(self, home: Path) -> None:
        self._path = home / "revoked.txt"
        self._seen: tuple[int, int] | None = None
        self._names: frozenset[str] = frozenset()

    def __contains__(self, principal: object) -> bool:
        if not isinstance(principal, Principal):
            return False
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return False
        if self._seen != (status.st_mtime_ns, status.st_size):
            self._names = frozenset(self._path.read_text(encoding="utf-8", errors="replace").split())
            self._seen = (status.st_mtime_ns, status.st_size)
        return f"{principal.role.value}/{principal.id}" in self._names

    def add(self, role: Role, name: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{role.value}/{name}\n")
            file.flush()
            os.fsync(file.fileno())
