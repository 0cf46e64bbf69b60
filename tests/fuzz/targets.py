"""Every reader of bytes that another machine, or a damaged disk, may have written.

A target takes any bytes and either returns or raises the one error that its contract names; everything else is
a finding.  `python -m tests.fuzz NAME` runs one under atheris; the suite runs all with seeded mutations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from agent import blobs as agent_blobs
from agent import control as agent_control
from agent.errors import BlobError
from coordinator import jobfile, translate
from coordinator.core import codec
from coordinator.core.model import AgentId, SessionId
from protos import agent_pb2, seal, wire
from tests.core.scenario import Scenario
from trainer import checkpoint, data
from trainer import control as trainer_control


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    read: Callable[[bytes], None]
    corpus: tuple[bytes, ...]  # inputs that are read without error


def _text(data_: bytes) -> str:
    return data_.decode("utf-8", "replace")


# --------------------------------------------------------------------------------- the journal's codec


def _lived() -> Scenario:
    scenario = Scenario()
    for line in (
        "job tiny min 2 max 2 last_call 200",
        *(f"agent {name} {what}" for what in ("joins", "ready", "formed") for name in "ab"),
        "agent a steps 1 5",
        "agent a shard 5 0/2",
        "agent b shard 5 1/2",
        "operator pause",
    ):
        scenario.say(line)
    return scenario


_LIVED = _lived()


def read_record(data_: bytes) -> None:
    with contextlib.suppress(codec.CodecError):
        record = codec.decode_record(_text(data_))
        assert codec.decode_record(codec.encode_record(record)) == record


def read_state(data_: bytes) -> None:
    with contextlib.suppress(codec.CodecError):
        state = codec.decode_state(_text(data_))
        assert codec.encode_state(codec.decode_state(codec.encode_state(state))) == codec.encode_state(state)


# --------------------------------------------------------------------------------- what agents send


def read_session_message(data_: bytes) -> None:
    with contextlib.suppress(DecodeError, translate.MalformedError):
        message = agent_pb2.AgentMessage.FromString(data_)
        agent_id, session_id = AgentId("a"), SessionId("s")
        match message.WhichOneof("body"):
            case "hello":
                translate.hello(message.hello, agent_id, session_id)
            case "heartbeat":
                translate.heartbeat(message.heartbeat, agent_id, session_id)
            case "progress":
                translate.progress(message.progress, agent_id, 0)
            case "logs":
                translate.log_lines(message.logs, agent_id, 0)
            case "cached":
                translate.cached(message.cached)
            case _:
                translate.report(message, agent_id)


def read_shard_report(data_: bytes) -> None:
    with contextlib.suppress(DecodeError, translate.MalformedError):
        translate.shard_report(agent_pb2.ReportShardRequest.FromString(data_), AgentId("a"))


def read_job_file(data_: bytes) -> None:
    with contextlib.suppress(translate.MalformedError, jobfile.SettingError):
        jobfile.job_spec(translate.json_object(_text(data_), "spec_json"), "")


def read_token(data_: bytes) -> None:
    with contextlib.suppress(wire.MalformedToken):
        wire.JoinToken.parse(_text(data_))


# --------------------------------------------------------------------------------- manifests


def read_checkpoint_manifest(data_: bytes) -> None:
    with contextlib.suppress(checkpoint.DamagedManifest):
        manifest = checkpoint.parse_manifest(data_)
        assert checkpoint.parse_manifest(manifest.to_json()) == manifest
        assert len(manifest.layout()) == len(manifest.shards)
    with contextlib.suppress(BlobError, seal.SealError):
        agent_blobs.Checkpoint.of(seal.opened(data_).manifest(), "j1")


def read_dataset_manifest(data_: bytes) -> None:
    with contextlib.suppress(data.DatasetError):
        data.parse_dataset_manifest(data_)
    with contextlib.suppress(BlobError):
        agent_blobs.dataset_pieces(_text(data_))
    with contextlib.suppress(translate.MalformedError):
        translate.dataset_digests(_text(data_))


# --------------------------------------------------------------------------------- shards


_DIRECTORY = tempfile.TemporaryDirectory(prefix="muster-fuzz-")
_STATE = {
    "model.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.b": torch.ones(4, dtype=torch.int64),
}


def _checkpoint() -> tuple[checkpoint.Manifest, bytes]:
    store = checkpoint.CheckpointDirectory(Path(_DIRECTORY.name))
    specs = checkpoint.state_specs(_STATE)
    (layout,) = checkpoint.layout(specs, 4096)
    file = store.write_shard(layout, _STATE)
    header = {
        "tensors": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs],
        "shard_bytes": 4096,
    }
    manifest = checkpoint.make_manifest(
        job="j", step=5, generation=1, state_digest="00", header=header, shards=[file]
    )
    return manifest, (Path(_DIRECTORY.name) / "blobs" / file.digest).read_bytes()


_MANIFEST, _SHARD = _checkpoint()


def read_shard(data_: bytes) -> None:
    """A shard whose digest is right for what it holds: whoever wrote it meant to do harm."""
    digest = hashlib.sha256(data_).hexdigest()
    path = Path(_DIRECTORY.name) / "blobs" / digest
    path.write_bytes(data_)
    file = replace(_MANIFEST.shards[0], digest=digest, bytes=len(data_))
    store = checkpoint.CheckpointDirectory(Path(_DIRECTORY.name))
    into = {name: torch.zeros_like(tensor) for name, tensor in _STATE.items()}
    try:
        with contextlib.suppress(checkpoint.DamagedShard):
            store.load(replace(_MANIFEST, shards=(file,)), into)
    finally:
        if digest != _MANIFEST.shards[0].digest:
            path.unlink()


# --------------------------------------------------------------------------------- the control socket


def read_control_lines(data_: bytes) -> None:
    with contextlib.suppress(agent_control.ControlError):
        agent_control.decode(data_)
    with contextlib.suppress(trainer_control.BadMessage):
        trainer_control.decode(data_)


_DIGEST = "ab" * 32
TARGETS: Mapping[str, Target] = {
    "record": Target(read=read_record, corpus=tuple(line.encode() for line in _LIVED.journal.lines)),
    "state": Target(read=read_state, corpus=(codec.encode_state(_LIVED.state).encode(),)),
    "session": Target(
        read=read_session_message,
        corpus=tuple(
            agent_pb2.AgentMessage(**body).SerializeToString()
            for body in (
                {
                    "hello": agent_pb2.Hello(
                        protocol=1, incarnation="i", probe=agent_pb2.Probe(worker_count=1)
                    )
                },
                {"ready": agent_pb2.Ready(job_id="j", store_host="h", store_port=1)},
                {
                    "progress": agent_pb2.Progress(
                        job_id="j", generation=1, steps=[agent_pb2.StepRecord(step=1)]
                    )
                },
                {"logs": agent_pb2.LogLines(job_id="j", lines=["a", "b"])},
            )
        ),
    ),
    "report": Target(
        read=read_shard_report,
        corpus=(
            agent_pb2.ReportShardRequest(
                job_id="j", generation=1, step=5, count=2, digest=_DIGEST, bytes=9, header_json="{}"
            ).SerializeToString(),
        ),
    ),
    "jobfile": Target(
        read=read_job_file,
        corpus=(
            b'{"name":"tiny","elastic":{"min_nodes":2,"last_call":"2s"},"requires":{"min_torch":"2.11"}}',
        ),
    ),
    "token": Target(read=read_token, corpus=(f"muster1.{_DIGEST}.abcdefgh{'x' * 43}".encode(),)),
    "checkpoint": Target(read=read_checkpoint_manifest, corpus=(_MANIFEST.to_json().encode(),)),
    "dataset": Target(
        read=read_dataset_manifest,
        corpus=(
            json.dumps(
                {
                    "format": "muster-dataset-1",
                    "name": "d",
                    "dtype": "uint16",
                    "tokenizer": {"kind": "byte", "vocab_size": 257, "digest": None},
                    "splits": {"train": [{"digest": _DIGEST, "tokens": 9}], "val": []},
                }
            ).encode(),
        ),
    ),
    "shard": Target(read=read_shard, corpus=(_SHARD,)),
    "control": Target(
        read=read_control_lines,
        corpus=(
            b'{"type":"hello","pid":1,"version":1}',
            (
                b'{"type":"step","generation":1,"step":1,"loss":1.0,"slices":1,"data_digest":"1","tokens":1.0,"lr":0.1,'
                b'"grad_norm":1.0,"skipped":false,"duration_s":0.1}'
            ),
            b'{"type":"abort","generation":3}',
        ),
    ),
}
