"""The seal of a checkpoint's manifest: what tells a manifest that the coordinator committed from any other.

A manifest is one line of canonical JSON, and its seal is one more member at its end:

    {"format":"muster-checkpoint-1",…,"step":7,"seal":{…}}

The *body*, which is what was sealed, is the text up to the last `,"seal":` and a closing brace.  It is
taken byte for byte, so that no reader has to write JSON as we do; whoever ignores the seal reads one JSON
object.  There are two seals.  `ed25519` is the coordinator's signature, by a key that its authority has
certified for nothing else; whoever has pinned the authority's fingerprint (a join token does) needs no
other file to check it.  `sha256` is a checksum: against rot, not against forgery.

The format is explained in docs/checkpoints.md.  Knows no gRPC, for the trainer uses it too.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNER_URI = "muster://checkpoints/coordinator"
"""The one name in a signer's certificate.  No agent or operator can have it: theirs begin otherwise."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_SEAL_BYTES = 16 * 1024
_MARK = b',"seal":'


class SealError(Exception):
    """A manifest is not what it should be; the message says how, to come after the manifest's name."""


class Unsigned(SealError):
    """It bears no signature: nobody vouches for it."""


class UnknownSigner(SealError):
    """It is signed, but not by the authority that is trusted."""


class BrokenSeal(SealError):
    """It is not what was sealed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A manifest whose seal, if there is one, fits its body."""

    body: bytes
    fingerprint: str
    """Of the authority that vouches for it: SHA-256 of its certificate (DER), hex; empty if it is unsigned."""
    sealed: bool

    def manifest(self) -> dict[str, Any]:
        """The body's JSON object.  Raise BrokenSeal if it is none."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise BrokenSeal(f"not JSON ({error})") from None
        if not isinstance(found, dict):
            raise BrokenSeal("not a JSON object")
        return found


def checksummed(body: str) -> str:
    """The manifest with a checksum."""
    return _sealed(body, {"algorithm": "sha256", "digest": hashlib.sha256(body.encode()).hexdigest()})


def signed(body: str, key: Ed25519PrivateKey, chain: Sequence[bytes]) -> str:
    """The manifest with a signature.  `chain` is the signer's certificate and the authority's (DER).

    The same every time: Ed25519 needs no random number."""
    return _sealed(
        body,
        {
            "algorithm": "ed25519",
            "chain": [base64.b64encode(certificate).decode() for certificate in chain],
            "signature": base64.b64encode(key.sign(body.encode())).decode(),
        },
    )


def _sealed(body: str, seal: dict[str, object]) -> str:
    assert body[:1] + body[-1:] == "{}", "a manifest is a JSON object without spaces around it"
    return f"{body[:-1]}{_MARK.decode()}{json.dumps(seal, sort_keys=True, separators=(',', ':'))}}}"


def opened(text: str | bytes) -> Opened:
    """A manifest, whoever sealed it, even nobody.  Raise BrokenSeal."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MAX_MANIFEST_BYTES:
        raise BrokenSeal(f"{len(data)} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
    data = data.rstrip(b"\n")
    head, mark, tail = data.rpartition(_MARK)
    if not mark:
        return Opened(body=data, fingerprint="", sealed=False)
    body, seal = head + b"}", _parsed(tail)
    match seal.get("algorithm"):
        case "sha256":
            if seal.get("digest") != hashlib.sha256(body).hexdigest():
                raise BrokenSeal("it was changed since it was written (its SHA-256 is another)")
            return Opened(body=body, fingerprint="", sealed=True)
        case "ed25519":
            return Opened(body=body, fingerprint=_check_signature(body, seal), sealed=True)
        case other:
            raise BrokenSeal(f"sealed by {other!r}; this version knows ed25519 and sha256")


def verified(text: str | bytes, fingerprint: str) -> Opened:
    """A manifest that the authority with this fingerprint vouches for.

    Raise Unsigned, UnknownSigner or BrokenSeal."""
    found = opened(text)
    if not found.fingerprint:
        raise Unsigned(f"not signed; expected the signature of authority {short(fingerprint)}")
    if found.fingerprint != fingerprint:
        raise UnknownSigner(
            f"signed by authority {short(found.fingerprint)}; expected authority {short(fingerprint)}"
        )
    return found


def fingerprint_of(authority_pem: bytes) -> str:
    """What names an authority: SHA-256 of its certificate (DER), hex.  Raise ValueError."""
    der = x509.load_pem_x509_certificate(authority_pem).public_bytes(serialization.Encoding.DER)
    return hashlib.sha256(der).hexdigest()


def short(fingerprint: str) -> str:
    """A fingerprint as people compare it."""
    return f"{fingerprint[:16]}…"


def _parsed(tail: bytes) -> dict[str, Any]:
    if len(tail) > MAX_SEAL_BYTES or not tail.endswith(b"}"):
        raise BrokenSeal(f"its seal is not whole, or of more than {MAX_SEAL_BYTES} bytes")
    try:
        seal = json.loads(tail[:-1])
    except (ValueError, RecursionError) as error:
        raise BrokenSeal(f"its seal is not readable ({error})") from None
    if not isinstance(seal, dict):
        raise BrokenSeal("its seal is not a JSON object")
    return seal


def _check_signature(body: bytes, seal: dict[str, Any]) -> str:
    """The fingerprint of the authority that certified the signer, whose signature is good."""
    try:
        signer_der, authority_der = (base64.b64decode(text, validate=True) for text in seal["chain"])
        signature = base64.b64decode(seal["signature"], validate=True)
        signer = x509.load_der_x509_certificate(signer_der)
        authority = x509.load_der_x509_certificate(authority_der)
        key = signer.public_key()
        names = signer.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except Exception as error:  # cryptography lets many kinds through
        raise BrokenSeal(f"its seal is not readable ({type(error).__name__}: {error})") from None
    try:
        signer.verify_directly_issued_by(authority)
    except Exception:
        raise BrokenSeal("its signer's certificate is not of the authority that it names") from None
    if not isinstance(key, Ed25519PublicKey) or uris != [SIGNER_URI]:
        raise BrokenSeal(f"signed by {', '.join(uris) or 'nobody'}, who may not sign checkpoints")
    try:
        key.verify(signature, body)
    except InvalidSignature:
        raise BrokenSeal("it was changed since the coordinator signed it, or was never signed") from None
    return hashlib.sha256(authority_der).hexdigest()
