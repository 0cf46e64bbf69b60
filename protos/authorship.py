"""Who ordered a job: the operator signs the job file, and agents run nothing else.

The coordinator stores and forwards what the operator signed; it cannot change a job file, or make one up,
without the key of an admin.  Everything that decides what workers do is under the signature: the job file
and, by its SHA-256, the dataset's manifest.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protos.wire import Identity

MOST_BYTES = 8 * 1024
"""Bound on a certificate, and on a signature, that comes with a job."""


def canonical(spec: Any) -> str:
    """A job file as the text that is signed, stored and sent on.  Raise ValueError."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _signed(spec_json: str, dataset_json: str) -> bytes:
    dataset = hashlib.sha256(dataset_json.encode()).hexdigest() if dataset_json else ""
    return f"muster-job-1\n{dataset}\n{spec_json}".encode()


def sign(identity: Identity, spec_json: str, dataset_json: str) -> bytes:
    """The operator's signature (ECDSA on P-256, SHA-256, DER) under a canonical job file."""
    key = serialization.load_pem_private_key(identity.key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(_signed(spec_json, dataset_json), ec.ECDSA(hashes.SHA256()))


def problem(
    *, authority_pem: str, certificate_pem: str, signature: bytes, spec_json: str, dataset_json: str
) -> str:
    """Why nobody should run this job file; "" if an admin of this fleet signed it."""
    if not certificate_pem or not signature:
        return "nobody signed it; submit it with `muster job submit`"
    try:
        authority = x509.load_pem_x509_certificate(authority_pem.encode())
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        certificate.verify_directly_issued_by(authority)
        uris = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return "the certificate that came with it is not of this fleet's authority"
    if len(uris) != 1 or not uris[0].startswith("muster://admin/"):
        return f"it was signed by {', '.join(uris)[:80] or 'nobody'}, and only an admin may"
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        return f"the certificate of {uris[0][:80]} has expired"
    key = certificate.public_key()
    try:
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, _signed(spec_json, dataset_json), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, AssertionError):
        return f"it is not what {uris[0][:80]} signed"
    return ""


def escape(spec: Any) -> str:
    """The first path of a job file that would leave the job's directory, as a complaint; "" if there is none.

    Only data and checkpoint name paths, and a job for volunteers names its data by digest."""
    for section in ("data", "checkpoint"):
        for field, text in _texts(spec.get(section) if isinstance(spec, dict) else None, section):
            path = PurePosixPath(text.replace("\\", "/"))
            if path.is_absolute() or text.startswith("~") or ".." in path.parts or "\0" in text:
                return (
                    f"{field}: found {text[:80]!r}; on volunteers' machines a path stays in the job's own directory: "
                    "no leading / or ~, and no .."
                )
    return ""


def _texts(value: Any, field: str) -> list[tuple[str, str]]:
    match value:
        case str():
            return [(field, value)]
        case dict():
            return [found for key, inner in value.items() for found in _texts(inner, f"{field}.{key}")]
        case list():
            return [found for at, inner in enumerate(value) for found in _texts(inner, f"{field}[{at}]")]
        case _:
            return []
