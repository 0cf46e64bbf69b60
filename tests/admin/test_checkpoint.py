"""`muster checkpoint`, `muster generate` and `muster data` with real checkpoints of a real (tiny) model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protos import admin_pb2, seal
from tests.admin.conftest import error_line
from tests.admin.server import Served

JOB = "job00001"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local checkpoint directory that plain `trainer.train` made in two steps."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("A fleet of one trains as well. " * 400)
    config = {
        "name": "t",
        "data": {"text": str(root / "text.txt")},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
        "train": {"steps": 2, "slices_per_step": 1, "slice_sequences": 2, "device": "cpu"},
        "checkpoint": {"every_steps": 2, "dir": str(root / "checkpoint"), "shard_bytes": "64KiB"},
    }
    (root / "job.json").write_text(json.dumps(config))
    subprocess.run(
        [sys.executable, "-m", "trainer.train", str(root / "job.json")],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(root / "cache")},
    )
    return root / "checkpoint"


@pytest.fixture
def stored(served: Served, checkpoint: Path) -> Path:
    """The same checkpoint, stored with the coordinator."""
    for path in (checkpoint / "blobs").iterdir():
        served.service.blobs[path.name] = path.read_bytes()
    [manifest] = (checkpoint / "manifests").iterdir()
    value = seal.opened(manifest.read_bytes()).manifest() | {"job": JOB}
    served.service.manifests[JOB, value["step"]] = json.dumps(value, sort_keys=True, separators=(",", ":"))
    tokenizer = {"kind": "byte", "vocab_size": 257, "digest": None}
    served.service.jobs[JOB] = {
        "id": JOB,
        "name": "t",
        "phase": "COMPLETED",
        "tokenizer": tokenizer,
    }
    return checkpoint


def test_list_and_show_describe_the_checkpoint(muster_json, stored: Path) -> None:
    assert [view["step"] for view in muster_json("checkpoint", "list", JOB)] == [2]
    assert muster_json("checkpoint", "show", JOB) == muster_json("checkpoint", "show", f"{JOB}@2")


def test_verify_fails_for_a_damaged_shard(muster, served: Served, stored: Path) -> None:
    assert muster("checkpoint", "verify", f"{JOB}@2").exit_code == 0
    digest = next(iter(served.service.blobs))
    served.service.blobs[digest] = b"\0" + served.service.blobs[digest][1:]
    result = muster("checkpoint", "verify", f"{JOB}@2", "-o", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["problem"] == "is damaged"
    assert "is damaged" in result.stderr


@pytest.mark.parametrize(
    ("verb", "says"), [("pin", "is kept until"), ("unpin", "no longer than"), ("delete", "is deleted")]
)
def test_a_checkpoint_is_pinned_and_let_go(
    muster, served: Served, stored: Path, verb: str, says: str
) -> None:
    result = muster("checkpoint", verb, f"{JOB}@2")
    assert result.exit_code == 0
    assert says in result.stdout
    [request] = served.service.requests
    assert (request.job, request.step) == (JOB, 2)
    assert request.kind == admin_pb2.CheckpointCommandKind.Value(f"CHECKPOINT_COMMAND_KIND_{verb.upper()}")


def test_gc_says_what_went_or_would_go(muster) -> None:
    young = "1 more (10 B) are younger than their grace\n"
    assert muster("checkpoint", "gc").stdout == f"2 blobs (2.0 KiB) removed; {young}"
    assert muster("checkpoint", "gc", "--dry-run").stdout == f"2 blobs (2.0 KiB) would be removed; {young}"


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_export_writes_a_directory_that_holds_the_model(
    muster_json, served: Served, stored: Path, tmp_path: Path, form: str
) -> None:
    served.service.stream_breaks = 1  # a download breaks once and goes on from where it was
    view = muster_json(
        "checkpoint", "export", JOB, "--format", form, "--out", str(tmp_path / "out" / "model")
    )
    assert view["step"] == 2
    assert "model.safetensors" in view["files"]
    assert sorted(path.name for path in (tmp_path / "out" / "model").iterdir()) == view["files"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_what_was_exported_for_dcp_is_imported_as_the_same_checkpoint(
    muster_json, muster, stored: Path, tmp_path: Path
) -> None:
    out, back = str(tmp_path / "dcp"), str(tmp_path / "back")
    view = muster_json("checkpoint", "export", JOB, "--format", "dcp", "--out", out)
    assert "muster.json" in view["files"]
    view = muster_json("checkpoint", "import", out, "--format", "dcp", "--out", back)
    assert (view["step"], view["out"]) == (2, back)
    assert {path.name for path in Path(back, "blobs").iterdir()} == {
        path.name for path in (stored / "blobs").iterdir()
    }
    options = ("--prompt", "-fleet", "--tokens", "8", "--seed", "3")
    assert muster_json("generate", back, *options)["text"] == muster_json("generate", JOB, *options)["text"]


def test_import_refuses_a_pickle_and_leaves_nothing(muster, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR.")
    result = muster(
        "checkpoint", "import", str(tmp_path / "ckpt.pt"), "--format", "nanogpt", "--out", str(tmp_path / "c")
    )
    assert result.exit_code == 1
    assert "nothing in it was run" in error_line(result)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "c").exists()


def test_export_of_a_damaged_shard_fails_and_leaves_nothing(
    muster, served: Served, stored: Path, tmp_path: Path
) -> None:
    for digest, data in served.service.blobs.items():
        served.service.blobs[digest] = b"\0" + data[1:]
    result = muster("checkpoint", "export", JOB, "--out", str(tmp_path / "out" / "model"))
    assert result.exit_code == 1
    assert "hash to" in error_line(result)
    assert not (tmp_path / "out").exists()


def test_export_does_not_touch_what_exists(muster, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    result = muster("checkpoint", "export", JOB, "--out", str(tmp_path / "mine"))
    assert result.exit_code == 2
    assert "exists already" in error_line(result)


def test_a_manifest_that_names_a_path_is_not_followed(muster, served: Served, tmp_path: Path) -> None:
    shard = {"index": 0, "digest": "../../outside", "bytes": 1}
    manifest = {"format": "muster-checkpoint-1", "job": JOB, "step": 1, "shards": [shard]}
    served.service.manifests[JOB, 1] = json.dumps(manifest)
    result = muster("checkpoint", "export", JOB, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "no usable manifest" in error_line(result)


def test_an_absent_checkpoint_is_refused(muster, stored: Path) -> None:
    result = muster("checkpoint", "show", f"{JOB}@77")
    assert (result.exit_code, error_line(result)) == (
        4,
        "muster: refused (UNKNOWN_CHECKPOINT): no checkpoint at step 77",
    )


def test_generate_gives_the_same_text_from_the_coordinator_and_from_the_directory(
    muster, muster_json, stored: Path
) -> None:
    options = ("--prompt", "-fleet", "--tokens", "8", "--seed", "3")
    remote = muster_json("generate", f"{JOB}@2", *options)
    local = muster_json("generate", str(stored), *options)
    assert remote["text"] == local["text"]
    assert remote["text"].startswith("-fleet")
    assert (remote["job"], remote["step"]) == (JOB, 2)
    assert muster("generate", str(stored), *options).stdout == local["text"] + "\n"


def test_data_prepare_makes_a_dataset_and_describes_it(muster_json, tmp_path: Path, capfd) -> None:
    (tmp_path / "text.txt").write_text("tokens and tokens. " * 300)
    out = tmp_path / "dataset"
    arguments = ["--text", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--out", str(out)]
    view = muster_json("data", "prepare", *arguments)
    assert view["dataset"] == hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    assert view["tokenizer"]["kind"] == "byte"
    assert sum(view["tokens"].values()) == 300 * 19 + 1


def test_data_prepare_fails_as_trainer_prepare_does(muster, tmp_path: Path, capfd) -> None:
    assert (
        muster("data", "prepare", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "o")).exit_code
        == 1
    )
    assert "no such file" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()
    assert muster("data", "prepare", "--nonsense").exit_code == 2
