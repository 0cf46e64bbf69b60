"""docs/checkpoints.md is enough to write another reader: the one printed there reads what the trainer writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.test_checkpoint import save, state
from trainer.checkpoint import CheckpointDirectory

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(scope="module")
def read() -> Callable[..., dict[str, tuple[str, list[int], bytes]]]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, DOCUMENT, "exec"), names)
    return names["read_checkpoint"]


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
