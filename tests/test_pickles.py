"""A pickle in the place of every file that we read: none of it runs, and what is said names the file.

Each position plants it where a file of ours, or of another program, belongs, and reads that through the door
that people and daemons use.  What comes over the wire as a blob or a manifest is tried in `tests/agent`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import coordinator.admin.cli
import coordinator.daemon
from agent.blobs import BlobCache
from agent.cli import cli as agent_cli
from coordinator.admin import submission
from coordinator.admin.errors import BadInput
from coordinator.blobs import DirectoryStore
from coordinator.identity import Authority, Role
from coordinator.journal import Journal
from tests.trainer.fleet import job, make_dataset
from tests.trainer.test_importing import SIZES, nanogpt_checkpoint, save, trained
from trainer import export, generate, importing, plot
from trainer.checkpoint import CheckpointDirectory, make_manifest
from trainer.config import ConfigError, load_config
from trainer.data import DatasetError, TokenDataset
from trainer.model import ModelShape

STEP = 7


class Malice:
    """Makes a directory when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trap),)


def archive(trap: Path) -> bytes:
    """As torch.save writes it: a zip with a pickle in it."""
    file = io.BytesIO()
    torch.save({"model.wte.weight": Malice(trap)}, file)
    return file.getvalue()


MALICE: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda trap: pickle.dumps(Malice(trap)),
    "pickle in ASCII": lambda trap: pickle.dumps(Malice(trap), protocol=0),  # survives being read as text
    "pt": archive,
    "yaml": lambda trap: f"!!python/object/apply:os.mkdir [{json.dumps(str(trap))}]\n".encode(),
}


def spring(kind: str, malice: bytes) -> None:
    """What nothing of ours does."""
    if kind == "yaml":
        yaml.load(malice, Loader=yaml.UnsafeLoader)
    elif kind == "pt":
        torch.load(io.BytesIO(malice), weights_only=False)
    else:
        pickle.loads(malice)


@dataclass(kw_only=True)
class Place:
    """A directory with honest files of every kind, and the one in whose place there is something else."""

    root: Path
    malice: bytes
    planted: list[str] = field(default_factory=list)

    def plant(self, path: Path) -> Path:
        """Name by which the file must be called in what is said: its own, or a digest's beginning."""
        path.parent.mkdir(parents=True, exist_ok=True)
        private = path.exists() and not path.stat().st_mode & 0o077
        path.unlink(missing_ok=True)
        path.write_bytes(self.malice)
        path.chmod(0o600 if private else 0o644)
        self.planted.append(path.name[:16])
        return path

    def blob(self, checkpoint: str = "checkpoint") -> str:
        """The digest of a shard."""
        return CheckpointDirectory(self.root / checkpoint).manifest().shards[0].digest


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("honest")
    shape = ModelShape(**SIZES, vocab_size=257)
    model, optimizer, state = trained(shape)
    save(root / "checkpoint", state, shape, STEP)
    for form in ("hf", "safetensors", "dcp"):
        export.export(root / "checkpoint", root / form, step=STEP, form=form)
    torch.save(nanogpt_checkpoint(model, optimizer, STEP), root / "ckpt.pt")
    make_dataset(root / "data")
    tokenizer = b'{"version":"1.0"}'
    digest = hashlib.sha256(tokenizer).hexdigest()
    manifest = json.loads((root / "data" / "manifest.json").read_text())
    manifest["tokenizer"] = {"kind": "bpe", "vocab_size": 256, "digest": digest}
    (root / "data" / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))
    (root / "data" / "blobs" / digest).write_bytes(tokenizer)
    (root / "job.yaml").write_text(yaml.safe_dump(job(root / "data")))

    home = root / "home"
    home.mkdir()
    authority = Authority.create()
    authority.save(home)
    authority.issue_operator(Role.ADMIN, "admin", "localhost:1").save(home / "admin.json")
    (home / "authority.pem").chmod(0o644)
    Journal(home / "journal.db").close()
    mirror = root / "mirror"
    shutil.copytree(root / "checkpoint" / "blobs", mirror / "blobs")
    (mirror / "manifests").mkdir()
    text = CheckpointDirectory(root / "checkpoint").manifest().to_json()
    (mirror / "manifests" / f"{STEP}.json").write_text(authority.manifest_signer(home).seal(text))
    return root


# -------------------------------------------------------------------------------------------- doors


def command(main: Callable[[list[str]], int], *arguments: str | Path) -> str:
    """What `python -m trainer.…` says; it must not succeed."""
    import contextlib

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(argument) for argument in arguments]) == 1
    return said.getvalue()


def console(main: click.Command, *arguments: str | Path) -> str:
    """What a command says; it must not succeed, nor fall over."""
    result = CliRunner(env={"MUSTER_IDENTITY": None, "MUSTER_AGENT_HOME": None}).invoke(
        main, [str(argument) for argument in arguments]
    )
    assert result.exit_code in {1, 2}, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.split())


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def imported(place: Place, form: str, source: Path) -> str:
    out = place.root / "out"
    told = command(importing.main, "--format", form, "--from", source, "--out", out)
    assert not out.exists()
    return told


def hf_import(place: Place, name: str) -> str:
    """Of a directory in whose file `name` the payload lies."""
    return imported(place, "hf", place.plant(place.root / "hf" / name).parent)


def hf_import_of_part(place: Place, name: str) -> str:
    """The same, of a file that the index names in place of the whole."""
    (place.root / "hf" / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": name}}
    (place.root / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return hf_import(place, name)


def restored(place: Place, *arguments: str | Path) -> str:
    authority = ("--authority", place.root / "home" / "authority.pem")
    mirror = ("--from", place.root / "mirror", "--out", place.root / "out")
    return console(coordinator.admin.cli.main, "checkpoint", "restore", *mirror, *(arguments or authority))


# ---------------------------------------------------------------------------------------- positions

Position = Callable[[Place], str]
"""Plants, reads, and returns what was said."""
POSITIONS: dict[str, Position] = {}


def position(found: Position) -> Position:
    POSITIONS[found.__name__.replace("_", " ").strip()] = found
    return found


@position
def shard_of_a_checkpoint(place: Place) -> str:
    place.plant(place.root / "checkpoint" / "blobs" / place.blob())
    return command(
        generate.main, "--checkpoint-dir", place.root / "checkpoint", "--prompt", "a", "--max-tokens", "1"
    )


@position
def shard_that_a_manifest_names_rightly(place: Place) -> str:
    """Its digest is right: somebody who may write manifests wrote this one."""
    directory = CheckpointDirectory(place.root / "checkpoint")
    honest = directory.manifest()
    path = place.plant(directory.root / "blobs" / hashlib.sha256(place.malice).hexdigest())
    first, *rest = honest.shards
    shards = [type(first)(index=0, digest=path.name, bytes=len(place.malice)), *rest]
    directory.write_manifest(
        make_manifest(
            job="j", step=STEP, generation=2, state_digest="", header=dict(honest.header), shards=shards
        )
    )
    return command(export.main, "--checkpoint-dir", directory.root, "--out", place.root / "out")


@position
def manifest_of_a_checkpoint(place: Place) -> str:
    place.plant(place.root / "checkpoint" / "manifests" / f"{STEP}.json")
    out = ("--step", str(STEP), "--out", place.root / "out")
    return command(export.main, "--checkpoint-dir", place.root / "checkpoint", *out)


@position
def manifest_of_a_dataset(place: Place) -> str:
    path = place.plant(place.root / "data" / "manifest.json")
    told = refused(BadInput, lambda: submission._read_dataset(path.parent))
    assert path.name in told
    return refused(DatasetError, lambda: TokenDataset(path.parent))


@position
def shard_of_a_dataset(place: Place) -> str:
    manifest = json.loads((place.root / "data" / "manifest.json").read_text())
    path = place.plant(place.root / "data" / "blobs" / manifest["splits"]["train"][0]["digest"])
    return refused(DatasetError, lambda: TokenDataset(path.parents[1]))


@position
def tokenizer_of_a_dataset(place: Place) -> str:
    manifest = json.loads((place.root / "data" / "manifest.json").read_text())
    path = place.plant(place.root / "data" / "blobs" / manifest["tokenizer"]["digest"])
    return refused(DatasetError, lambda: TokenDataset(path.parents[1]))


@position
def tokenizer(place: Place) -> str:
    path = place.plant(place.root / "tokenizer.json")
    return command(
        generate.main, "--checkpoint-dir", place.root / "checkpoint", "--tokenizer", path, "--prompt", "a"
    )


@position
def notes_of_what_was_verified(place: Place) -> str:
    """The one file that is passed over in silence: without it everything is verified again."""
    place.plant(place.root / "data" / "verified.json")
    TokenDataset(place.root / "data")
    return " ".join(place.planted)


@position
def job_file(place: Place) -> str:
    path = place.plant(place.root / "job.yaml")
    told = refused(BadInput, lambda: submission.read_job_file(path))
    assert path.name in told
    return refused(ConfigError, lambda: load_config(path))


@position
def job_file_of_a_worker(place: Place) -> str:
    path = place.plant(place.root / "job.json")
    return refused(ConfigError, lambda: load_config(path))


@position
def setting_of_a_job_file(place: Place) -> str:
    text = place.malice.decode("latin-1")
    job_file = place.root / "job.yaml"
    return refused(BadInput, lambda: submission.read_job_file(job_file, (f"train.steps={text}",)))


@position
def loss_curve(place: Place) -> str:
    path = place.plant(place.root / "steps.jsonl")
    return command(plot.main, "--steps", path, "--out", place.root / "out.png")


@position
def nanogpt(place: Place) -> str:
    return imported(place, "nanogpt", place.plant(place.root / "ckpt.pt"))


@position
def configuration_of_a_transformers_model(place: Place) -> str:
    return hf_import(place, "config.json")


@position
def weights_of_a_transformers_model(place: Place) -> str:
    return hf_import(place, "model.safetensors")


@position
def index_of_a_transformers_model(place: Place) -> str:
    (place.root / "hf" / "model.safetensors").unlink()
    return hf_import(place, "model.safetensors.index.json")


@position
def part_of_a_transformers_model(place: Place) -> str:
    return hf_import_of_part(place, "model-1-of-2.safetensors")


@position
def old_weights_of_a_transformers_model(place: Place) -> str:
    """pytorch_model.bin is a pickle: a directory that has nothing else cannot be imported."""
    (place.root / "hf" / "model.safetensors").unlink()
    return hf_import(place, "pytorch_model.bin")


@position
def old_weights_that_an_index_names(place: Place) -> str:
    return hf_import_of_part(place, "pytorch_model.bin")


@position
def shape_of_a_safetensors_export(place: Place) -> str:
    return imported(place, "safetensors", place.plant(place.root / "safetensors" / "model.json").parent)


@position
def weights_of_a_safetensors_export(place: Place) -> str:
    return imported(
        place, "safetensors", place.plant(place.root / "safetensors" / "model.safetensors").parent
    )


@position
def our_index_of_a_dcp_directory(place: Place) -> str:
    return imported(place, "dcp", place.plant(place.root / "dcp" / "muster.json").parent)


@position
def index_of_a_foreign_dcp_directory(place: Place) -> str:
    (place.root / "dcp" / "muster.json").unlink()
    return imported(place, "dcp", place.plant(place.root / "dcp" / ".metadata").parent)


@position
def index_of_our_dcp_directory(place: Place) -> str:
    """It is not opened: ours says the same in JSON."""
    source = place.plant(place.root / "dcp" / ".metadata").parent
    assert importing.main(["--format", "dcp", "--from", str(source), "--out", str(place.root / "out")]) == 0
    return " ".join(place.planted)


@position
def part_of_a_dcp_directory(place: Place) -> str:
    path = place.plant(place.root / "dcp" / "__0_0.distcp")
    index = path.with_name("muster.json")
    value = json.loads(index.read_text())
    value["storage"] = {name: [path.name, 0, len(place.malice)] for name in value["storage"]}
    index.write_text(json.dumps(value))
    return imported(place, "dcp", path.parent)


@position
def manifest_in_a_mirror(place: Place) -> str:
    place.plant(place.root / "mirror" / "manifests" / f"{STEP}.json")
    return restored(place)


@position
def shard_in_a_mirror(place: Place) -> str:
    place.plant(place.root / "mirror" / "blobs" / place.blob())
    return restored(place)


@position
def authority_of_a_mirror(place: Place) -> str:
    return restored(place, "--authority", place.plant(place.root / "home" / "authority.pem"))


@position
def key_of_a_bucket(place: Place) -> str:
    path = place.plant(place.root / "key.json")
    path.chmod(0o600)
    return restored(place, "--authority", "ab" * 32, "--from", "s3://bucket/prefix", "--credentials", path)


@position
def unfinished_shard_of_a_restore(place: Place) -> str:
    """What an earlier attempt left is hashed like the rest, and fetched anew where it is wrong."""
    out = place.root / "out"
    (out / "manifests").mkdir(parents=True)
    partial = place.plant(out / "blobs" / f".partial-{place.blob()}")
    authority = ("--authority", str(place.root / "home" / "authority.pem"))
    result = CliRunner().invoke(
        coordinator.admin.cli.main,
        ["checkpoint", "restore", "--from", str(place.root / "mirror"), "--out", str(out), *authority],
    )
    assert result.exit_code == 0, result.stderr
    assert not partial.exists()
    manifest = CheckpointDirectory(place.root / "mirror").manifest()
    CheckpointDirectory(out).verify(manifest)
    return " ".join(place.planted)


@position
def identity_of_an_operator(place: Place) -> str:
    path = place.plant(place.root / "home" / "admin.json")
    return console(coordinator.admin.cli.main, "--identity", path, "job", "list")


@position
def identity_of_an_agent(place: Place) -> str:
    home = place.root / "agent"
    shutil.copytree(place.root / "home", home)
    (home / "admin.json").rename(home / "identity.json")
    place.plant(home / "identity.json")
    return console(agent_cli, "run", "--home", home)


@position
def blob_in_an_agents_cache(place: Place) -> str:
    """Noticed and removed, as any damage, so that it is fetched again."""
    path = place.plant(place.root / "cache" / place.blob())
    assert not BlobCache(path.parent).holds(path.name)
    assert not path.exists()
    return path.name


@position
def blob_of_a_coordinator(place: Place) -> str:
    digest = place.blob()
    store = DirectoryStore(place.root / "blobs", max_bytes=1 << 20, reserve_bytes=0)
    place.plant(place.root / "blobs" / digest[:2] / digest)
    told = store.verify(digest, 1000)
    assert told
    return f"{digest}: {told}"


@position
def configuration_of_a_coordinator(place: Place) -> str:
    path = place.plant(place.root / "coordinator.yaml")
    return console(coordinator.daemon.main, "serve", "--config", path, "--home", place.root / "home")


@position
def certificate_of_a_coordinator(place: Place) -> str:
    home = place.plant(place.root / "home" / "authority.pem").parent
    return console(coordinator.daemon.main, "serve", "--home", home)


@position
def key_of_a_coordinator(place: Place) -> str:
    home = place.plant(place.root / "home" / "authority.key").parent
    return console(coordinator.daemon.main, "serve", "--home", home)


@position
def journal_of_a_coordinator(place: Place) -> str:
    home = place.plant(place.root / "home" / "journal.db").parent
    return console(coordinator.daemon.main, "replay", "--home", home)


@position
def backup_of_a_coordinator(place: Place) -> str:
    path = place.plant(place.root / "backup.tar")
    return console(coordinator.daemon.main, "restore", "--home", place.root / "new", path)


@position
def file_in_a_backup(place: Place) -> str:
    """With the digest that the contents name: whoever made the backup put it there."""
    home, made, evil = place.root / "home", place.root / "made.tar", place.root / "backup.tar"
    assert (
        CliRunner().invoke(coordinator.daemon.main, ["backup", "--home", str(home), str(made)]).exit_code == 0
    )
    with tarfile.open(made) as old, tarfile.open(evil, "w") as new:
        for member in old:
            data = old.extractfile(member)
            assert data is not None
            text = data.read()
            if member.isreg() and b"muster-backup" in text[:200]:
                contents: dict[str, Any] = json.loads(text)
                contents["digests"]["journal.db"] = hashlib.sha256(place.malice).hexdigest()
                text = json.dumps(contents).encode()
            if member.name == "journal.db":
                text = place.malice
            member.size = len(text)
            new.addfile(member, io.BytesIO(text))
    place.planted.append("backup.tar")
    return console(coordinator.daemon.main, "restore", "--home", place.root / "new", evil)


# --------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", MALICE)
@pytest.mark.parametrize("name", POSITIONS)
def test_it_does_not_run_and_the_file_is_named(name: str, kind: str, honest: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    place = Place(root=tmp_path / "root", malice=MALICE[kind](trap))
    shutil.copytree(honest, place.root)
    told = POSITIONS[name](place)
    assert not trap.exists(), f"it ran; {told}"
    assert all(re.search(re.escape(named), told) for named in place.planted), (place.planted, told)
    assert "Traceback" not in told
    assert "weights_only" not in told, "torch's advice would run it"
    spring(kind, place.malice)
    assert trap.exists(), "the trap does work"
