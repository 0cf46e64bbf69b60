"""`muster checkpoint`: list, verify and export what training has saved."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.admin.errors import BadInput, OperationFailed
from coordinator.admin.options import with_coordinator
from coordinator.admin.output import Column, Output, moment, size

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator

EXPORT_LIMIT_S = 3_600
VERIFY_TIMEOUT_S = 3_600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointName:
    """`JOB` or `JOB@STEP`; step 0 is the newest."""

    job: str
    step: int

    def __str__(self) -> str:
        return f"{self.job}@{self.step}" if self.step else self.job


def checkpoint_name(text: str) -> CheckpointName:
    """`JOB` or `JOB@STEP` as CheckpointName.  Raise BadParameter."""
    match = re.fullmatch(r"([^@]+)(?:@([1-9][0-9]{0,17}))?", text)
    if match is None:
        raise click.BadParameter(f"{text!r}: expected JOB, or JOB@STEP with a step from 1 on.")
    return CheckpointName(job=match[1], step=int(match[2] or 0))


@click.group()
def checkpoint() -> None:
    """List, verify and export checkpoints.

    CHECKPOINT is JOB@STEP, or JOB for its newest one.
    """


@checkpoint.command("list")
@click.argument("job_ref", metavar="JOB")
@with_coordinator
def list_checkpoints(*, coordinator: Coordinator, output: Output, job_ref: str) -> None:
    """A job's committed checkpoints, by step."""
    from protos import admin_pb2

    views = coordinator.views(coordinator.stub.ListCheckpoints, admin_pb2.JobRef(job=job_ref))
    columns = (
        Column(title="STEP", value=lambda view: view.get("step"), right=True),
        Column(title="GENERATION", value=lambda view: view.get("generation"), right=True),
        Column(title="SHARDS", value=lambda view: view.get("shards"), right=True),
        Column(title="SIZE", value=lambda view: size(view.get("bytes")), right=True),
        Column(title="COMMITTED", value=lambda view: moment(view.get("committed_ms"))),
        Column(title="STATE", value=lambda view: str(view.get("state_digest") or "")[:12]),
        Column(title="DAMAGED", value=lambda view: view.get("damaged")),
    )
    output.views(views, columns, "no checkpoint yet")


@checkpoint.command()
@click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
@with_coordinator
def show(*, coordinator: Coordinator, output: Output, name: CheckpointName) -> None:
    """A checkpoint's manifest."""
    manifest = get_manifest(coordinator, name)
    shards = manifest["shards"]
    header = manifest.get("header") or {}
    output.view(
        manifest,
        [
            ("job", manifest.get("job")),
            ("step", manifest.get("step")),
            ("generation", manifest.get("generation")),
            ("tokens", header.get("tokens")),
            ("seed", header.get("seed")),
            ("dataset", header.get("dataset")),
            ("config digest", header.get("config_digest")),
            ("state digest", manifest.get("state_digest")),
            ("tensors", len(header.get("tensors") or ())),
            ("shards", len(shards)),
            ("size", size(sum(shard["bytes"] for shard in shards))),
        ],
    )


@checkpoint.command()
@click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
@with_coordinator
def verify(*, coordinator: Coordinator, output: Output, name: CheckpointName) -> None:
    """Let the coordinator hash every shard again; exit 1 if one is damaged."""
    from protos import admin_pb2

    request = admin_pb2.CheckpointRef(job=name.job, step=name.step)
    view = coordinator.view(coordinator.stub.VerifyCheckpoint, request, VERIFY_TIMEOUT_S)
    damage = _damage(view)
    output.done(view, f"{name}: step {view.get('step', name.step)} {'is damaged' if damage else 'is whole'}")
    if damage:
        raise OperationFailed(f"checkpoint {name}: {damage}; training restores an older one in its place")


@checkpoint.command()
@click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "safetensors"]),
    default="hf",
    show_default=True,
    help="hf: a directory for transformers' GPT2LMHeadModel; safetensors: parameters and optimizer state.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory to make; must not exist yet."
)
@with_coordinator
def export(*, coordinator: Coordinator, output: Output, name: CheckpointName, form: str, out: Path) -> None:
    """Download a checkpoint, verify every digest and write it in another format."""
    from coordinator.admin.submission import run_trainer

    with new_directory(out) as made, downloaded(coordinator, name) as (directory, step):
        arguments = [str(directory), "--step", str(step), "--format", form, "--out", str(made)]
        run_trainer("export", arguments, EXPORT_LIMIT_S)
        files = sorted(path.name for path in made.iterdir())
    view = {"job": name.job, "step": step, "format": form, "out": str(out), "files": files}
    output.done(view, f"{out}: step {step} as {form} ({', '.join(files)})")


# ----------------------------------------------------------------------------------- shared with others


def get_manifest(coordinator: Coordinator, name: CheckpointName) -> dict[str, Any]:
    """The checkpoint's manifest, checked for what this command relies on.  Raise OperationFailed."""
    return _parse_manifest(_manifest_json(coordinator, name), name)


@contextlib.contextmanager
def downloaded(coordinator: Coordinator, name: CheckpointName) -> Iterator[tuple[Path, int]]:
    """A temporary directory with the checkpoint in the local layout (`blobs/`, `manifests/`), and its step.

    Every blob's digest was verified."""
    from coordinator.admin.submission import progress

    text = _manifest_json(coordinator, name)
    manifest = _parse_manifest(text, name)
    shards: Sequence[dict[str, Any]] = manifest["shards"]
    with tempfile.TemporaryDirectory(prefix="muster-checkpoint-") as scratch:
        directory = Path(scratch)
        (directory / "blobs").mkdir()
        (directory / "manifests").mkdir()
        with progress("downloading", sum(shard["bytes"] for shard in shards)) as advance:
            for digest in dict.fromkeys(shard["digest"] for shard in shards):
                coordinator.get_blob(digest, directory / "blobs" / digest, advance)
        (directory / "manifests" / f"{manifest['step']}.json").write_text(text, encoding="utf-8")
        yield directory, manifest["step"]


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that becomes `out` when the block succeeds and vanishes when it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {out}: exists already; name a directory that does not, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-")
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from error
    with scratch:
        made = Path(scratch.name) / out.name
        made.mkdir()
        yield made
        os.replace(made, out)


def _manifest_json(coordinator: Coordinator, name: CheckpointName) -> str:
    from protos import admin_pb2

    request = admin_pb2.CheckpointRef(job=name.job, step=name.step)
    text: str = coordinator.call(coordinator.stub.GetCheckpoint, request).manifest_json
    return text


def _parse_manifest(text: str, name: CheckpointName) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(text)
        problem = _manifest_problem(manifest)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise OperationFailed(f"checkpoint {name}: the coordinator sent no usable manifest ({problem})")
    return manifest


def _manifest_problem(manifest: Mapping[str, Any]) -> str:
    if manifest["format"] != "muster-checkpoint-1":
        return f"format is {manifest['format']!r}, expected 'muster-checkpoint-1'"
    if type(manifest["step"]) is not int:
        return f"step is {manifest['step']!r}, expected a number"
    for shard in manifest["shards"]:
        # The digest becomes a file name here.
        if not _DIGEST.fullmatch(shard["digest"]) or type(shard["bytes"]) is not int:
            return f"shard {shard!r} has no SHA-256 digest or no size"
    return ""


def _damage(view: dict[str, Any]) -> str:
    if view.get("damaged"):
        return str(view["damaged"])
    if view.get("ok") is False or view.get("verified") is False:
        return str(view.get("detail") or "a shard is damaged")
    return ""
