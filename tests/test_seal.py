"""A manifest is what its authority signed, byte for byte, or it is refused and the message says why."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.identity import Authority, ManifestSigner, Role, principal_of
from protos import seal
from tests.coordinator.harness import signing_request

BODY = '{"format":"muster-checkpoint-1","header":{"dropout":1e-05,"name":"é"},"job":"j1","step":7}'


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def signer(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> ManifestSigner:
    return authority.manifest_signer(tmp_path_factory.mktemp("home"))


def with_seal(text: str, **changes: object) -> str:
    """The manifest with another seal."""
    head, mark, tail = text.rpartition(',"seal":')
    return f"{head}{mark}{json.dumps(json.loads(tail[:-1]) | changes)}}}"


def test_what_was_signed_is_read_back(authority: Authority, signer: ManifestSigner) -> None:
    text = signer.seal(BODY)
    assert text == signer.seal(BODY), "the same every time"
    found = seal.verified(text, authority.fingerprint)
    assert found.body == BODY.encode()
    assert found.manifest() == json.loads(BODY)
    assert json.loads(text).keys() == {*json.loads(BODY), "seal"}, "a reader may ignore the seal"
    assert seal.fingerprint_of(authority.certificate_pem) == authority.fingerprint


def test_no_byte_of_it_can_be_changed(authority: Authority, signer: ManifestSigner) -> None:
    text = signer.seal(BODY).encode()
    for place in (*range(len(BODY)), *range(len(BODY), len(text), 7)):
        edited = bytearray(text)
        edited[place] ^= 1
        with pytest.raises(seal.SealError):
            seal.verified(bytes(edited), authority.fingerprint)


@pytest.mark.parametrize("length", [0, 1, 40, -1, -2, -60])
def test_a_truncated_manifest_is_refused(authority: Authority, signer: ManifestSigner, length: int) -> None:
    with pytest.raises(seal.SealError):
        seal.verified(signer.seal(BODY)[:length], authority.fingerprint)


def test_another_authority_is_named(signer: ManifestSigner) -> None:
    other = Authority.create()
    with pytest.raises(seal.UnknownSigner, match=f"expected authority {other.fingerprint[:16]}"):
        seal.verified(signer.seal(BODY), other.fingerprint)


@pytest.mark.parametrize("text", [BODY, seal.checksummed(BODY)])
def test_an_unsigned_manifest_is_not_verified(authority: Authority, text: str) -> None:
    assert seal.opened(text).manifest() == json.loads(BODY)
    with pytest.raises(seal.Unsigned, match="not signed"):
        seal.verified(text, authority.fingerprint)


def test_a_checksum_notices_rot() -> None:
    with pytest.raises(seal.BrokenSeal, match="changed since it was written"):
        seal.opened(seal.checksummed(BODY).replace('"step":7', '"step":8'))


def test_another_key_under_the_signers_certificate_is_refused(
    authority: Authority, signer: ManifestSigner, tmp_path: Path
) -> None:
    other = authority.manifest_signer(tmp_path)
    forged = seal.signed(BODY, other.key, signer.chain)
    with pytest.raises(seal.BrokenSeal, match="changed since the coordinator signed it"):
        seal.verified(forged, authority.fingerprint)
    # A key that the authority has certified later is as good as the first.
    assert seal.verified(other.seal(BODY), authority.fingerprint).body == BODY.encode()


def test_a_forger_cannot_name_the_authority_as_his_own(
    authority: Authority, signer: ManifestSigner, tmp_path: Path
) -> None:
    forger = Authority.create().manifest_signer(tmp_path)
    forged = seal.signed(BODY, forger.key, [forger.chain[0], signer.chain[1]])
    with pytest.raises(seal.BrokenSeal, match="not of the authority"):
        seal.verified(forged, authority.fingerprint)


def test_an_agents_certificate_signs_no_checkpoint(authority: Authority, signer: ManifestSigner) -> None:
    key, _ = signing_request()
    issued = authority.issue_client(key.public_key(), Role.AGENT, "a1", timedelta(hours=1))
    signature = base64.b64encode(key.sign(BODY.encode(), ec.ECDSA(hashes.SHA256()))).decode()
    der = base64.b64encode(base64.b64decode("".join(issued.certificate_pem.decode().split("\n")[1:-2])))
    chain = [der.decode(), base64.b64encode(signer.chain[1]).decode()]
    forged = with_seal(signer.seal(BODY), chain=chain, signature=signature)
    with pytest.raises(seal.BrokenSeal, match="muster://agent/a1, who may not sign checkpoints"):
        seal.verified(forged, authority.fingerprint)


def test_the_signers_certificate_opens_no_session(authority: Authority, tmp_path: Path) -> None:
    authority.manifest_signer(tmp_path)
    assert principal_of((tmp_path / "checkpoints.pem").read_bytes()) is None
    assert (tmp_path / "checkpoints.key").stat().st_mode & 0o077 == 0


def test_the_signer_is_kept_until_it_is_damaged(authority: Authority, tmp_path: Path) -> None:
    first = authority.manifest_signer(tmp_path)
    assert authority.manifest_signer(tmp_path).chain == first.chain
    (tmp_path / "checkpoints.key").write_text("no key")
    second = authority.manifest_signer(tmp_path)
    assert second.chain != first.chain
    assert authority.manifest_signer(tmp_path).chain == second.chain
    assert seal.verified(first.seal(BODY), authority.fingerprint)


def test_a_header_that_looks_like_a_seal_is_part_of_the_body(
    authority: Authority, signer: ManifestSigner
) -> None:
    looks = {"algorithm": "sha256", "digest": hashlib.sha256(b'{"a":1,"header":{"b":2}').hexdigest()}
    body = json.dumps({"a": 1, "header": {"b": 2, "seal": looks}, "step": 7}, separators=(",", ":"))
    assert seal.verified(signer.seal(body), authority.fingerprint).body == body.encode()
    with pytest.raises(seal.BrokenSeal):
        seal.opened(body)


def test_a_manifest_without_end_is_not_read(authority: Authority) -> None:
    with pytest.raises(seal.BrokenSeal, match="at most 4194304"):
        seal.verified(b"x" * (seal.MAX_MANIFEST_BYTES + 1), authority.fingerprint)


SCRAPS = st.sampled_from(["", "ed25519", "sha256", "AAAA", None, 1, ["AAAA", "AAAA"], ["A"], {}])


@given(
    st.binary(max_size=300),
    st.dictionaries(st.sampled_from(["algorithm", "chain", "signature", "digest"]), SCRAPS),
)
def test_whatever_is_read_is_refused_or_opened(body: bytes, parts: dict[str, object]) -> None:
    for data in (body, b'{"a":1,"seal":' + body, b'{"a":1,"seal":' + json.dumps(parts).encode() + b"}"):
        try:
            found = seal.opened(data)
            assert not found.fingerprint
            found.manifest()
        except seal.SealError:
            pass
