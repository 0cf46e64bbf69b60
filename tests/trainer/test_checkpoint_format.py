"""docs/checkpoints.md is enough to write another reader: the one printed there reads what the trainer writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature

from coordinator.identity import Authority
from tests.trainer.test_checkpoint import save, state
from trainer.checkpoint import CheckpointDirectory

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def documented(name: str) -> Any:
    """A function that the page prints."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, DOCUMENT, "exec"), names)
    return names[name]


@pytest.fixture(scope="module")
def read() -> Callable[..., dict[str, tuple[str, list[int], bytes]]]:
    return documented("read_checkpoint")


def test_the_documented_reader_reads_every_tensor_bit_for_bit(read, tmp_path: Path) -> None:
    written = state(5)
    manifest = save(CheckpointDirectory(tmp_path), 7, written)
    assert len(manifest.shards) > 2  # a large tensor is cut
    found = read(tmp_path, 7)
    assert list(found) == list(written)
    for name, (dtype, shape, data) in found.items():
        tensor = written[name].contiguous()
        assert (f"torch.{dtype}", shape) == (str(tensor.dtype), list(tensor.shape))
        assert data == bytes(tensor.untyped_storage())[: tensor.nbytes]


def test_the_documented_reader_refuses_a_flipped_bit(read, tmp_path: Path) -> None:
    manifest = save(CheckpointDirectory(tmp_path), 7, state(5))
    path = tmp_path / "blobs" / manifest.shards[1].digest
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard 1 is damaged"):
        read(tmp_path, 7)


def test_the_documented_check_of_a_signature_accepts_it_and_nothing_else(tmp_path: Path) -> None:
    check = documented("signed_manifest")
    authority, other = Authority.create(), Authority.create()
    manifest = save(CheckpointDirectory(tmp_path), 7, state(5))
    text = authority.manifest_signer(tmp_path).seal(manifest.to_json())
    assert check(text.encode(), authority.fingerprint) == json.loads(manifest.to_json())
    with pytest.raises(ValueError, match="trusted"):
        check(text.encode(), other.fingerprint)
    with pytest.raises(InvalidSignature):
        check(text.replace('"step":7', '"step":8', 1).encode(), authority.fingerprint)
