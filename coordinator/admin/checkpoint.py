"""`muster checkpoint`: list, verify, keep and export what training has saved, import what others have."""

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
from coordinator.admin.options import with_coordinator, with_output
from coordinator.admin.output import Column, Output, moment, number, size

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
    """List, verify, pin, delete, restore, export and import checkpoints.

    CHECKPOINT is JOB@STEP, or JOB for its newest one.
    """


@checkpoint.command("list")
@click.argument("job_ref", metavar="JOB")
@with_coordinator
def list_checkpoints(*, coordinator: Coordinator, output: Output, job_ref: str) -> None:
    """A job's committed checkpoints, by step, and why each is kept."""
    from protos import admin_pb2

    views = coordinator.views(coordinator.stub.ListCheckpoints, admin_pb2.JobRef(job=job_ref))
    columns = (
        Column(title="STEP", value=lambda view: view.get("step"), right=True),
        Column(title="GENERATION", value=lambda view: view.get("generation"), right=True),
        Column(title="SHARDS", value=lambda view: view.get("shards"), right=True),
        Column(title="SIZE", value=lambda view: size(view.get("bytes")), right=True),
        Column(title="COMMITTED", value=lambda view: moment(view.get("committed_unix_ms"))),
        Column(title="LOSS", value=lambda view: number(view.get("evaluation_loss"), ".4f"), right=True),
        Column(title="KEPT", value=why_kept),
        Column(title="STATE", value=lambda view: str(view.get("state_digest") or "")[:12]),
        Column(title="WITNESSES", value=witnesses),
        Column(title="DAMAGED", value=lambda view: view.get("damaged")),
    )
    output.views(views, columns, "no checkpoint yet")


@checkpoint.command()
@click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
@with_coordinator
def show(*, coordinator: Coordinator, output: Output, name: CheckpointName) -> None:
    """A checkpoint's manifest, and why it is kept."""
    from protos import admin_pb2

    manifest = get_manifest(coordinator, name)
    listed = coordinator.views(coordinator.stub.ListCheckpoints, admin_pb2.JobRef(job=name.job))
    view = next((one for one in listed if one.get("step") == manifest["step"]), {})
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
            ("evaluation loss", view.get("evaluation_loss")),
            ("kept because", why_kept(view)),
            ("witnesses", witnesses(view)),
            ("damaged", view.get("damaged")),
        ],
    )


def witnesses(view: Mapping[str, Any]) -> str:
    """How many members agreed on the state, and why if one was enough."""
    count, alone = view.get("witnesses"), view.get("alone")
    if count is None:
        return ""
    return f"{count} ({str(alone).replace('_', ' ')})" if alone else str(count)


def why_kept(view: Mapping[str, Any]) -> str:
    """The reasons, for people."""
    words = {"every": "every k-th step", "in_use": "in use", "pinned": f"pinned by {view.get('pinned_by')}"}
    return ", ".join(words.get(why, why) for why in view.get("kept") or ())


def _command(verb: str, done: str, help: str) -> None:
    """Add `muster checkpoint VERB CHECKPOINT`, which sends the command of that name."""

    @checkpoint.command(verb, help=help)
    @click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
    @with_coordinator
    def command(*, coordinator: Coordinator, output: Output, name: CheckpointName) -> None:
        from protos import admin_pb2

        kind = f"CHECKPOINT_COMMAND_KIND_{verb.upper()}"
        request = admin_pb2.CheckpointCommandRequest(job=name.job, step=name.step, kind=kind)
        view = coordinator.view(coordinator.stub.CommandCheckpoint, request)
        output.done(view, f"{name}: step {view.get('step', name.step)} {done}")


_command("pin", "is kept until it is unpinned", "Keep it, whatever newer ones there are.")
_command("unpin", "is kept no longer than others", "Let it go like any other when newer ones are there.")
_command(
    "delete",
    "is deleted; `muster checkpoint gc` frees its bytes",
    "Let it go now.  Refused if it is pinned, in use, or what the job would be restored from.",
)


@checkpoint.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@with_coordinator
def gc(*, coordinator: Coordinator, output: Output, dry_run: bool) -> None:
    """Remove blobs that no checkpoint and no live job refers to, once their grace is over.

    The coordinator does so by itself now and then; this is now.
    """
    from protos import admin_pb2

    request = admin_pb2.CollectGarbageRequest(dry_run=dry_run)
    view = coordinator.view(coordinator.stub.CollectGarbage, request, VERIFY_TIMEOUT_S)
    verb = "would be removed" if dry_run else "removed"
    sentence = f"{view.get('blobs', 0)} blobs ({size(view.get('bytes'))}) {verb}"
    if view.get("young_blobs"):
        sentence += (
            f"; {view['young_blobs']} more ({size(view.get('young_bytes'))}) are younger than their grace"
        )
    output.done(view, sentence)


@checkpoint.command()
@click.argument("name", metavar="CHECKPOINT", type=checkpoint_name)
@with_coordinator
def verify(*, coordinator: Coordinator, output: Output, name: CheckpointName) -> None:
    """Let the coordinator check the signature and hash every shard again; exit 1 if one is damaged.

    A damaged checkpoint is marked so, and training never begins from it.
    """
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
    type=click.Choice(["hf", "safetensors", "dcp"]),
    default="hf",
    show_default=True,
    help="hf: a directory for transformers' GPT2LMHeadModel; safetensors: the parameters; "
    "dcp: parameters and optimizer state for torch.distributed.checkpoint.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory to make; must not exist yet."
)
@click.option(
    "--tokenizer", metavar="byte|FILE.json", help="To go along; default the one of the job's dataset."
)
@with_coordinator
def export(
    *,
    coordinator: Coordinator,
    output: Output,
    name: CheckpointName,
    form: str,
    out: Path,
    tokenizer: str | None,
) -> None:
    """Download a checkpoint, verify every digest and write its model in another format."""
    from coordinator.admin.submission import run_trainer

    if out.exists():
        raise BadInput(f"--out {out}: exists already; name a directory that does not, or remove it")
    with downloaded(coordinator, name) as fetched:
        arguments = [*fetched.arguments(tokenizer), "--format", form, "--out", str(out)]
        run_trainer("export", arguments, EXPORT_LIMIT_S)
    files = sorted(path.name for path in out.iterdir())
    view = {"job": fetched.job, "step": fetched.step, "format": form, "out": str(out), "files": files}
    output.done(view, f"{out}: step {fetched.step} as {form} ({', '.join(files)})")


@checkpoint.command("import")
@click.argument("source", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "safetensors", "nanogpt", "dcp"]),
    required=True,
    help="hf: a directory of a GPT2LMHeadModel; safetensors, dcp: one that `export` made; "
    "nanogpt: a ckpt.pt, of which nothing is run.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory to make; must not exist yet."
)
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="The job file that is to go on from it."
)
@with_output
def import_checkpoint(*, output: Output, source: Path, form: str, out: Path, config: Path | None) -> None:
    """Make a local checkpoint directory of what another program saved.

    `muster generate DIR` reads it, and training without a coordinator goes on from it where it is the
    job file's checkpoint.dir.
    """
    from coordinator.admin.submission import run_trainer

    if out.exists():
        raise BadInput(f"--out {out}: exists already; name a directory that does not, or remove it")
    arguments = ["--format", form, "--from", str(source), "--out", str(out)]
    if config is not None:
        arguments += ["--config", str(config)]
    step = int(run_trainer("importing", arguments, EXPORT_LIMIT_S, capture=True))
    view = {"source": str(source), "format": form, "step": step, "out": str(out)}
    output.done(view, f"{out}: step {step} from {source}")


@checkpoint.command()
@click.option(
    "--from",
    "places",
    metavar="DIR|s3://BUCKET/PREFIX",
    multiple=True,
    required=True,
    help="Where shards and manifests lie: a coordinator's home or its blobs, its bucket, an agent's cache, a "
    "checkpoint directory. Repeat it for copies: what is damaged in one is taken from the next.",
)
@click.option("--job", metavar="ID", help="The job's id, or its beginning; needed where there are several.")
@click.option(
    "--step", type=click.IntRange(min=1), help="This step and no other; default the newest whole one."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Checkpoint directory to make, or to go on with.",
)
@click.option(
    "--authority",
    metavar="FINGERPRINT|FILE",
    help="Who must have signed the manifest: SHA-256 of the authority's certificate, the file authority.pem, or an "
    "identity file; default the authority of your own identity.",
)
@click.option(
    "--allow-unsigned",
    is_flag=True,
    help="Also take a manifest that is unsigned or signed by somebody unknown. Its shards are verified against it.",
)
@click.option(
    "--endpoint", envvar="AWS_ENDPOINT_URL", metavar="URL", help="Of the object store; default AWS."
)
@click.option("--region", envvar="AWS_REGION", default="us-east-1", show_default=True)
@click.option(
    "--credentials",
    type=click.Path(path_type=Path),
    help="File of mode 0600 with the object store's key as JSON; default AWS_ACCESS_KEY_ID and so on.",
)
@with_output
def restore(
    *,
    output: Output,
    places: tuple[str, ...],
    job: str | None,
    step: int | None,
    out: Path,
    authority: str | None,
    allow_unsigned: bool,
    endpoint: str | None,
    region: str,
    credentials: Path | None,
) -> None:
    """Bring a checkpoint out of a directory or bucket, without a coordinator.

    Verifies the manifest's signature and every shard's digest. Ended in the middle, the same command goes
    on where it was. Training without a coordinator goes on from DIR where it is the job file's
    checkpoint.dir, and `muster generate DIR` and `python -m trainer.export` read it.
    """
    from coordinator.admin import restoring

    trusted = _trusted_authority(authority)
    if trusted is None and not allow_unsigned:
        raise BadInput(
            "--authority: missing, and there is no identity that names one; give the fingerprint in the middle of a "
            "join token, the coordinator's authority.pem or an identity file, or --allow-unsigned"
        )
    sources = [
        restoring.BucketSource(place, endpoint=endpoint, region=region, key=_store_key(credentials))
        if place.startswith("s3://")
        else restoring.DirectorySource(Path(place))
        for place in places
    ]
    found = restoring.candidates(sources, trusted, allow_unsigned, restoring.warn)
    chosen = restoring.choose(found, job, step)
    done = restoring.restore(chosen, sources, out)
    view = {
        "job": done.job,
        "step": done.step,
        "generation": done.generation,
        "shards": len(done.shards),
        "bytes": done.bytes,
        "signed_by": done.signed_by or None,
        "manifest": done.where,
        "out": str(out),
    }
    by = f"signed by authority {done.signed_by[:16]}…" if done.signed_by else "NOT signed by anybody known"
    output.done(view, f"{out}: step {done.step} of job {done.job}, {size(done.bytes)}, {by}")


def _trusted_authority(text: str | None) -> str | None:
    """The fingerprint that --authority, or else the operator's identity, names; None if there is none."""
    from coordinator.admin.connection import default_identity_path
    from protos import seal

    if text is not None and _DIGEST.fullmatch(text.replace(":", "").lower()):
        return text.replace(":", "").lower()
    root = click.get_current_context().find_root().params
    path = Path(text) if text is not None else root.get("identity") or default_identity_path()
    try:
        data = path.read_bytes()
        if data.lstrip().startswith(b"{"):
            data = str(json.loads(data)["authority_pem"]).encode()
        return seal.fingerprint_of(data)
    except OSError as error:
        if text is None:
            return None
        raise BadInput(
            f"--authority {text}: {error.strerror}; expected 64 hex digits or a readable file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        named = f"--authority {path}" if text is not None else f"identity file {path}"
        raise BadInput(f"{named}: holds no certificate; give authority.pem or an identity file") from error


def _store_key(file: Path | None) -> dict[str, str]:
    from coordinator.presign import Credentials, CredentialsError

    try:
        key = Credentials.load(file) if file is not None else Credentials.from_environment(os.environ)
    except CredentialsError as error:
        if file is not None:
            raise BadInput(f"--credentials: {error}") from None
        raise BadInput(
            "--credentials: missing, and AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is not in the environment"
        ) from None
    return {
        "access_key_id": key.access_key_id,
        "secret_access_key": key.secret_access_key,
        "session_token": key.session_token,
    }


# ----------------------------------------------------------------------------------- shared with others


def get_manifest(coordinator: Coordinator, name: CheckpointName) -> dict[str, Any]:
    """The checkpoint's manifest, checked for what this command relies on.  Raise OperationFailed."""
    return _parse_manifest(_manifest_json(coordinator, name), name)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCheckpoint:
    """A checkpoint in the local layout (`blobs/`, `manifests/`), and what reads its dataset's tokens."""

    directory: Path
    job: str
    step: int
    tokenizer: str | None = None  # "byte" or a file; None if it is not known

    def arguments(self, tokenizer: str | None = None) -> list[str]:
        """How trainer.export and trainer.generate are told of it; `tokenizer` is used instead of its own."""
        chosen = tokenizer or self.tokenizer
        named = ["--checkpoint-dir", str(self.directory), "--step", str(self.step)]
        return [*named, "--tokenizer", chosen] if chosen else named


@contextlib.contextmanager
def downloaded(coordinator: Coordinator, name: CheckpointName) -> Iterator[LocalCheckpoint]:
    """The checkpoint in a temporary directory, with its tokenizer; every blob's digest was verified."""
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
        yield LocalCheckpoint(
            directory=directory,
            job=manifest["job"],
            step=manifest["step"],
            tokenizer=_tokenizer(coordinator, manifest["job"], directory),
        )


def _tokenizer(coordinator: Coordinator, job_id: str, directory: Path) -> str | None:
    """The tokenizer of the job's dataset: "byte", or its file, downloaded to `directory`."""
    from coordinator.admin.job import get_job

    tokenizer = get_job(coordinator, job_id).get("tokenizer") or {}
    digest = tokenizer.get("digest")
    if not digest:
        return tokenizer.get("kind")
    if not _DIGEST.fullmatch(digest):
        raise OperationFailed(f"job {job_id}: the coordinator names {digest!r} as its tokenizer's digest")
    file = directory / "tokenizer.json"
    coordinator.get_blob(digest, file, lambda _: None)
    return str(file)


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
    if not isinstance(manifest["job"], str) or type(manifest["step"]) is not int:
        return f"job is {manifest['job']!r} and step {manifest['step']!r}, expected an id and a number"
    for shard in manifest["shards"]:
        # The digest becomes a file name here.
        if not _DIGEST.fullmatch(shard["digest"]) or type(shard["bytes"]) is not int:
            return f"shard {shard!r} has no SHA-256 digest or no size"
    return ""


def _damage(view: Mapping[str, Any]) -> str:
    problems = [
        f"{'manifest' if found.get('index') is None else 'shard ' + str(found['index'])}: {found.get('problem')}"
        for found in view.get("problems") or ()
    ]
    if not problems and view.get("sound") is False:
        problems = [str(view.get("damaged") or "a shard is damaged")]
    return "; ".join(problems)
