"""From a job file on the operator's disk to a submitted job: check it by both schemas, prepare its text
if it names text, upload the blobs the coordinator lacks, submit.  Nothing is sent before all is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from coordinator import jobfile
from coordinator.admin.errors import BadInput, OperationFailed, one_line
from trainer import config as training

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator

TRAINER_SECTIONS = ("data", "model", "train", "checkpoint")
PREPARE_LIMIT_S = 24 * 3_600
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job file that both schemas accept."""

    file: Path
    name: str
    spec: Mapping[str, Any]
    training: training.TrainingConfig | None  # None: a torchrun job that brings its own program


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A prepared dataset on this disk whose blobs are all there."""

    directory: Path
    manifest_json: str
    digests: tuple[str, ...]

    @property
    def id(self) -> str:
        return hashlib.sha256(self.manifest_json.encode()).hexdigest()

    def blob(self, digest: str) -> Path:
        return self.directory / "blobs" / digest


def read_job_file(file: Path, settings: Sequence[str] = (), name: str | None = None) -> Submission:
    """Read and check a job file, with `a.b=value` settings put in.  Raise BadInput."""
    try:
        spec = training.read_job_file(file)
        for setting in settings:
            _put(spec, setting)
        if name is not None:
            spec["name"] = name
        checked = jobfile.parse(spec)
        own_program = checked.launch == "torchrun" and not any(
            section in spec for section in TRAINER_SECTIONS
        )
        return Submission(
            file=file,
            name=checked.name,
            spec=spec,
            training=None if own_program else training.parse_config(spec),
        )
    except (training.ConfigError, jobfile.SettingError) as error:
        problems = "; ".join(line.removeprefix("job file: ") for line in str(error).splitlines())
        prefix = "" if problems.startswith(str(file)) else f"{file}: "
        raise BadInput(f"{prefix}{problems}") from error


def submit_job(coordinator: Coordinator, submission: Submission) -> str:
    """Upload what is missing of the dataset and submit; returns the job's id."""
    from protos import admin_pb2, authorship

    spec, dataset_json = dict(submission.spec), ""
    if submission.training is not None:
        dataset = open_dataset(submission.training.data)
        upload(coordinator, dataset)
        dataset_json = dataset.manifest_json
        # Volunteers get the dataset by digest; where it lay on this machine is nobody's business.
        spec["data"] = {"path": f"sha256:{dataset.id}"}
    if complaint := authorship.escape(spec):
        raise BadInput(f"{submission.file}: {complaint}")
    spec_json = authorship.canonical(spec)
    request = admin_pb2.SubmitJobRequest(
        spec_json=spec_json,
        dataset_json=dataset_json,
        signature=authorship.sign(coordinator.identity, spec_json, dataset_json),
        certificate_pem=coordinator.identity.certificate_pem,
    )
    job_id: str = coordinator.call(coordinator.stub.SubmitJob, request).job_id
    return job_id


def open_dataset(data: training.DataSettings) -> Dataset:
    """The dataset that a job's data section names, prepared first if it names text.  Raise BadInput if it
    is damaged, OperationFailed if it cannot be prepared."""
    if data.path is not None:
        return _read_dataset(Path(data.path).expanduser())
    if data.mix is not None:
        return _mixed([open_dataset(part) for part in data.parts()], data.weights())
    cached = _cache_directory() / _text_key(data)
    if not (cached / "manifest.json").exists():
        _prepare(data, cached)
    return _read_dataset(cached)


def _mixed(parts: Sequence[Dataset], weights: Sequence[int]) -> Dataset:
    """One dataset of several, made once for the same tokens and weights."""
    named = list(zip(weights, parts, strict=True))
    key = json.dumps(["mix", *([weight, part.id] for weight, part in named)])
    cached = _cache_directory() / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (cached / "manifest.json").exists():
        try:
            arguments = [f"{weight}:{part.directory}" for weight, part in named]
            run_trainer("mixing", [f"--out={cached}", *arguments], PREPARE_LIMIT_S)
        except OperationFailed:
            if not (cached / "manifest.json").exists():  # else another submission was first
                raise
    return _read_dataset(cached)


def upload(coordinator: Coordinator, dataset: Dataset) -> None:
    """Send the blobs that the coordinator lacks, with a progress bar on a terminal."""
    missing = coordinator.missing_blobs(dataset.digests)
    total = sum(dataset.blob(digest).stat().st_size for digest in missing)
    with progress("uploading", total) as advance:
        for digest in missing:
            with dataset.blob(digest).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise BadInput(
                    f"dataset {dataset.directory}: blobs/{digest} hashes to {found}; it is damaged, prepare the dataset again"
                )
            coordinator.put_blob(digest, dataset.blob(digest), advance)


@contextlib.contextmanager
def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A function that is told of bytes done; it draws a bar on standard error if that is a terminal."""
    if not sys.stderr.isatty() or total_bytes == 0:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _put(spec: dict[str, Any], setting: str) -> None:
    path, separator, text = setting.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise BadInput(f"--set {setting!r}: expected A.B=VALUE, for example train.steps=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {setting!r}: the value is not YAML ({one_line(str(error))})") from error
    section = spec
    for depth, key in enumerate(keys[:-1], start=1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise BadInput(f"--set {setting!r}: {'.'.join(keys[:depth])} is {section!r}, not a section")
    section[keys[-1]] = value


def _read_dataset(directory: Path) -> Dataset:
    manifest = directory / "manifest.json"
    try:
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadInput(
            f"data.path: {manifest}: {reason}; expected a directory made by `muster data prepare`"
        ) from error
    try:
        sizes = _blob_sizes(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"data.path: {manifest}: not a dataset manifest ({error}); prepare the dataset again"
        ) from error
    dataset = Dataset(directory=directory, manifest_json=text, digests=tuple(sizes))
    for digest, expected in sizes.items():
        path = dataset.blob(digest)
        try:
            actual = path.stat().st_size
        except OSError as error:
            raise BadInput(f"data.path: {path}: {error.strerror}; prepare the dataset again") from error
        if expected is not None and actual != expected:
            raise BadInput(
                f"data.path: {path}: {actual} bytes, expected {expected}; prepare the dataset again"
            )
    return dataset


def _blob_sizes(manifest: Mapping[str, Any]) -> dict[str, int | None]:
    """The bytes of every blob that a dataset manifest names; None where it does not say."""
    if manifest["format"] != "muster-dataset-1":
        raise ValueError(f"format is {manifest['format']!r}, expected 'muster-dataset-1'")
    item_bytes = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
    shards = [shard for split in manifest["splits"].values() for shard in split]
    sizes: dict[str, int | None] = {shard["digest"]: shard["tokens"] * item_bytes for shard in shards}
    tokenizer = manifest["tokenizer"].get("digest")
    if tokenizer:
        sizes.setdefault(tokenizer, None)
    for digest in sizes:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a SHA-256 digest")
    return sizes


def _cache_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "muster" / "datasets"


def _text_key(data: training.DataSettings) -> str:
    """A name for the dataset that these settings make of these files as they are now."""
    key: list[object] = [1, data.tokenizer, data.val_fraction]
    tokenizer = [data.tokenizer] if data.tokenizer.endswith(".json") else []
    for source in [*(data.text or ()), *tokenizer]:
        if source.startswith("@"):
            key.append([source, sys.version])
            continue
        root = Path(source).expanduser().resolve()
        if not root.exists():
            raise BadInput(f"data: {root}: no such file or directory")
        files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        stats = [(str(path), path.stat()) for path in files]
        key.append([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _prepare(data: training.DataSettings, target: Path) -> None:
    """Make the dataset in a subprocess (tokenizers and torch stay out of this one), all of it or nothing."""
    click.echo(f"muster: preparing {', '.join(data.text or ())} as {data.tokenizer}", err=True)
    texts = [text if text.startswith("@") else str(Path(text).expanduser()) for text in data.text or ()]
    options = {"tokenizer": data.tokenizer, "val-fraction": str(data.val_fraction), "out": str(target)}
    try:
        arguments = [f"--{name}={value}" for name, value in options.items()]
        run_trainer("prepare", ["--text", *texts, *arguments], PREPARE_LIMIT_S)
    except OperationFailed:
        # Another submission may have prepared the same text meanwhile.
        if not (target / "manifest.json").exists():
            raise


def run_trainer(module: str, arguments: Sequence[str], limit_s: float, *, capture: bool = False) -> str:
    """Run `python -m trainer.MODULE`; its last words become the error if it fails.  Returns its output
    with `capture`, else its output is not shown."""
    command = [sys.executable, "-m", f"trainer.{module}", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OperationFailed(f"trainer.{module} did not finish within {limit_s:g} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"exit status {done.returncode}"
        kind = BadInput if done.returncode == 2 else OperationFailed
        raise kind(f"trainer.{module} failed: {reason}")
    return done.stdout if capture else ""
