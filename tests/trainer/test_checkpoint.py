from __future__ import annotations

import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from protos import seal
from trainer.checkpoint import (
    CheckpointDirectory,
    DamagedManifest,
    DamagedShard,
    Manifest,
    NoCheckpoint,
    ShardFile,
    TensorSpec,
    WrongTensors,
    layout,
    make_header,
    make_manifest,
    parse_manifest,
    state_specs,
)
from trainer.config import parse_config
from trainer.model import ModelShape

SHARD_BYTES = 65_536
CONFIG = parse_config({"name": "job", "data": {"text": "x"}, "checkpoint": {"shard_bytes": SHARD_BYTES}})
SHAPE = ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=10, block_size=8)


def state(seed: int) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {
        "model.large": torch.randn(100, 333, generator=stream),  # cut into three
        "model.small": torch.randn(7, generator=stream),
        "model.half": torch.randn(3, 5, generator=stream).to(torch.bfloat16),
        "optimizer.step": torch.tensor(float(seed)),
        "optimizer.none": torch.empty(0),
        "rng": torch.arange(16, dtype=torch.uint8),
    }


def save(directory: CheckpointDirectory, step: int, tensors: dict[str, Tensor]) -> Manifest:
    specs = state_specs(tensors)
    manifest = make_manifest(
        job="job-1",
        step=step,
        generation=3,
        state_digest="ab",
        header=make_header(CONFIG, SHAPE, specs, step=step, tokens=10 * step, dataset="d"),
        shards=[directory.write_shard(shard, tensors) for shard in layout(specs, SHARD_BYTES)],
    )
    directory.write_manifest(manifest)
    return manifest


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture
def directory(tmp_path: Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints")


def blob(directory: CheckpointDirectory, manifest: Manifest, index: int) -> Path:
    return directory.root / "blobs" / manifest.shards[index].digest


specs_strategy = st.lists(
    st.builds(
        lambda name, dtype, shape: TensorSpec(name=f"t{name}", dtype=dtype, shape=tuple(shape)),
        st.integers(0, 1000),
        st.sampled_from(["float32", "bfloat16", "uint8", "int64"]),
        st.lists(st.integers(0, 20), max_size=3),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda spec: spec.name,
)


@given(specs=specs_strategy, shard_bytes=st.integers(8, 2000))
def test_layout_covers_every_element_once_in_bounded_shards(
    specs: list[TensorSpec], shard_bytes: int
) -> None:
    shards = layout(specs, shard_bytes)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(len(shard.pieces) > 0 and shard.bytes <= shard_bytes for shard in shards)
    pieces = [piece for shard in shards for piece in shard.pieces]
    for spec in specs:
        own = [piece for piece in pieces if piece.spec == spec]
        assert own[0].start == 0
        assert own[-1].stop == spec.numel
        assert all(a.stop == b.start for a, b in itertools.pairwise(own))
    keys = [piece.key for piece in pieces]
    assert len(set(keys)) == len(keys)
    # bounded from below too: two neighbours would not have fitted into one
    assert all(a.bytes + b.pieces[0].bytes > shard_bytes for a, b in itertools.pairwise(shards))


def test_what_was_saved_is_restored_bit_for_bit(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 20, state(1))
    assert len(manifest.shards) == 3
    assert manifest.layout()[0].pieces[0].key == "model.large@0:16384"
    into = empty()
    header = directory.load(manifest, into)
    assert same(into, state(1))
    assert (header["step"], header["tokens"], header["model"]) == (20, 200, SHAPE.to_dict())


def test_the_newest_checkpoint_is_restored(directory: CheckpointDirectory) -> None:
    assert directory.restore_newest(empty()) is None
    for step in (9, 100, 20):
        save(directory, step, state(step))
    assert [manifest.step for manifest in directory.manifests()] == [100, 20, 9]
    into = empty()
    header = directory.restore_newest(into)
    assert header is not None
    assert header["step"] == 100
    assert same(into, state(100))


def test_shards_written_by_several_processes_make_the_same_checkpoint(
    directory: CheckpointDirectory, tmp_path: Path
) -> None:
    alone = save(CheckpointDirectory(tmp_path / "alone"), 5, state(1))
    shards = layout(state_specs(state(1)), SHARD_BYTES)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        files = pool.starmap(
            _write_in_another_process, [(directory.root, s.index % 3) for s in (*shards, *shards)]
        )
    assert tuple(files[:3]) == tuple(files[3:]) == alone.shards
    directory.write_manifest(alone)
    into = empty()
    directory.load(alone, into)
    assert same(into, state(1))


def _write_in_another_process(root: Path, index: int) -> ShardFile:
    return CheckpointDirectory(root).write_shard(layout(state_specs(state(1)), SHARD_BYTES)[index], state(1))


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_shard_is_named_and_leaves_the_state_untouched(
    directory: CheckpointDirectory, damage: Callable[[Path], None], index: int
) -> None:
    manifest = save(directory, 20, state(1))
    damage(blob(directory, manifest, index))
    into = empty()
    with pytest.raises(
        DamagedShard, match=f"step 20: shard {index} .{manifest.shards[index].digest}"
    ) as caught:
        directory.load(manifest, into)
    assert (caught.value.step, caught.value.index) == (20, index)
    assert same(into, empty())


def test_restoring_falls_back_to_the_previous_checkpoint_with_a_warning(
    directory: CheckpointDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    save(directory, 10, state(1))
    newest = save(directory, 20, state(2))
    flip_a_bit(blob(directory, newest, 1))
    into = empty()
    with caplog.at_level(logging.WARNING):
        header = directory.restore_newest(into)
    assert header is not None
    assert header["step"] == 10
    assert same(into, state(1))
    assert newest.shards[1].digest in caplog.text
    assert "step 20: shard 1" in caplog.text


def test_when_every_checkpoint_is_damaged_nothing_starts_anew_silently(
    directory: CheckpointDirectory,
) -> None:
    manifest = save(directory, 10, state(1))
    flip_a_bit(blob(directory, manifest, 0))
    with pytest.raises(NoCheckpoint, match="every checkpoint is damaged"):
        directory.restore_newest(empty())


def test_writing_a_shard_again_repairs_a_damaged_blob(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 10, state(1))
    flip_a_bit(blob(directory, manifest, 0))
    assert save(directory, 10, state(1)) == manifest
    directory.verify(manifest)


def test_a_sound_checkpoint_of_another_model_is_refused_not_skipped(directory: CheckpointDirectory) -> None:
    save(directory, 10, state(1))
    into = empty() | {"model.small": torch.zeros(8)}
    with pytest.raises(WrongTensors, match=r"model.small is float32\[7\] in the checkpoint and float32\[8\]"):
        directory.restore_newest(into)
    assert not into["model.large"].any()


def test_only_the_wanted_tensors_are_read(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 10, state(1))
    tensors = directory.read(manifest, "model.")
    assert list(tensors) == ["model.large", "model.small", "model.half"]
    assert same(state(1), tensors)


def test_the_manifest_is_canonical_json(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 10, state(1))
    text = seal.opened((directory.root / "manifests" / "10.json").read_bytes()).body.decode()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert set(json.loads(text)) == {
        "format",
        "job",
        "step",
        "generation",
        "state_digest",
        "header",
        "shards",
    }
    assert parse_manifest(text) == manifest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('"muster-checkpoint-1"', '"other"'), "format is 'other'"),
        (('"digest":"', '"digest":"../../'), "expected 64 hex digits"),
        (('"index":2', '"index":1'), "are not 0 to n-1"),
        (('"shard_bytes":65536', '"shard_bytes":0'), "expected a positive integer"),
        (('"shard_bytes":65536', '"shard_bytes":32768'), "3 shards, expected 5"),
        (('"float32"', '"object"'), "is object"),
        (("333", "-1"), "tensor model.large is"),
        (('"header"', '"footer"'), "KeyError"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(
    directory: CheckpointDirectory, change: tuple[str, str], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = save(directory, 10, state(1)).to_json().replace(*change)
    with pytest.raises(DamagedManifest, match=told):
        parse_manifest(text)
    (directory.root / "manifests" / "20.json").write_text(text)
    header = directory.restore_newest(empty())
    assert header is not None
    assert header["step"] == 10
    assert "20.json" in caplog.text


def test_a_manifest_under_another_steps_name_is_passed_over(directory: CheckpointDirectory) -> None:
    save(directory, 10, state(1))
    (directory.root / "manifests" / "10.json").rename(directory.root / "manifests" / "99.json")
    assert directory.manifests() == []


def test_retention_keeps_the_newest_and_what_they_share(directory: CheckpointDirectory) -> None:
    for step in (10, 20, 30):
        save(directory, step, state(1) | {"optimizer.step": torch.tensor(float(step))})
    shared = directory.manifests()[0].shards[0].digest
    directory.retain(2)
    assert [manifest.step for manifest in directory.manifests()] == [30, 20]
    directory.retain(0)  # never the only one
    (left,) = directory.manifests()
    directory.verify(left)
    assert left.step == 30
    assert shared in {shard.digest for shard in left.shards}
    assert len(list((directory.root / "blobs").iterdir())) == len(left.shards)


def test_retention_keeps_every_kth_step_too(directory: CheckpointDirectory) -> None:
    for step in (10, 20, 30, 40, 50):
        save(directory, step, state(1))
    directory.retain(1, every=20)
    assert [manifest.step for manifest in directory.manifests()] == [50, 40, 20]


def test_orphans_are_swept_only_when_asked_and_old(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 10, state(1))
    old, young = directory.root / "blobs" / ("a" * 64), directory.root / "blobs" / ("b" * 64)
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    directory.retain(1)
    assert old.exists()
    directory.retain(1, orphan_age_s=60.0)
    assert not old.exists()
    assert young.exists()
    directory.verify(manifest)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = f"""
import errno, resource, sys
from pathlib import Path
from tests.trainer.test_checkpoint import *
directory = CheckpointDirectory({str(tmp_path / "d")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save(directory, 10, state(1))
except OSError as error:
    assert error.errno == errno.EFBIG, error
    assert list((directory.root / "blobs").iterdir()) == []
    assert directory.manifests() == []
    sys.exit(3)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 3


class _Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def _malicious(path: Path) -> list[bytes]:
    plain = pickle.dumps(_Malice(path))
    archive = io.BytesIO()
    torch.save({"model.small": _Malice(path)}, archive)
    return [plain, archive.getvalue()]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_pickle_in_any_files_place_never_runs(
    directory: CheckpointDirectory, tmp_path: Path, kind: int
) -> None:
    trap = tmp_path / "ran"
    pickle.loads(_malicious(trap)[0])  # the trap does work
    trap.rmdir()
    malice = _malicious(trap)[kind]
    for index in range(3):
        manifest = save(directory, 10, state(1))
        blob(directory, manifest, index).write_bytes(malice)
        with pytest.raises(DamagedShard):
            directory.load(manifest, empty())
        # and as a shard whose digest is right, named by a manifest that somebody made
        forged = directory.write_shard(manifest.layout()[index], state(1))
        digest = _put(directory, malice)
        shards = [s for s in manifest.shards if s.index != index]
        evil = make_manifest(
            job="j",
            step=11,
            generation=1,
            state_digest="",
            header=manifest.header,
            shards=[*shards, ShardFile(index=forged.index, digest=digest, bytes=len(malice))],
        )
        with pytest.raises(DamagedShard, match="not a safetensors file"):
            directory.load(evil, empty())
    (directory.root / "manifests" / "12.json").write_bytes(malice)
    assert directory.restore_newest(empty()) is not None
    assert not trap.exists()


def _put(directory: CheckpointDirectory, data: bytes) -> str:
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    (directory.root / "blobs" / digest).write_bytes(data)
    return digest


def test_a_shard_with_other_tensors_than_the_manifest_says_is_damaged(directory: CheckpointDirectory) -> None:
    manifest = save(directory, 10, state(1))
    large, *rest = manifest.shards
    for tensors, told in [
        ({"x": torch.zeros(3)}, "other tensors"),
        ({"model.large@0:16384": torch.zeros(5)}, "another shape or dtype"),
        ({"model.large@0:16384": torch.zeros(16384, dtype=torch.int32)}, "another shape or dtype"),
    ]:
        data = safetensors_bytes(tensors)
        shard = ShardFile(index=large.index, digest=_put(directory, data), bytes=len(data))
        forged = make_manifest(
            job="j", step=11, generation=1, state_digest="", header=manifest.header, shards=[shard, *rest]
        )
        into = empty()
        with pytest.raises(DamagedShard, match=told):
            directory.load(forged, into)
        assert same(into, empty())
