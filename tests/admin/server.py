"""A small AdminService on a real port with real TLS: what the coordinator promises, without its core."""

# ruff: noqa: N802 - gRPC gives the methods their names
from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from coordinator.identity import Authority, Role
from protos import admin_pb2, admin_pb2_grpc, agent_pb2, wire


@dataclass
class Service(admin_pb2_grpc.AdminServiceServicer):
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    agents: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifests: dict[tuple[str, int], str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    events: list[admin_pb2.Event] = field(default_factory=list)
    lines: list[admin_pb2.LogLine] = field(default_factory=list)
    steps: list[agent_pb2.StepRecord] = field(default_factory=list)
    evaluations: list[agent_pb2.Evaluation] = field(default_factory=list)
    submitted: list[admin_pb2.SubmitJobRequest] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)  # a job was looked at
    suspended: dict[str, bytes] = field(default_factory=dict)
    put_offsets: list[int] = field(default_factory=list)
    put_breaks: int = 0  # how many uploads still to break after their first chunk
    stream_breaks: int = 0  # how many followed streams still to break after each message

    def _refuse(self, context: grpc.ServicerContext, refusal: int, message: str) -> None:
        context.abort_with_status(wire.refusal_status(refusal, message))

    def _job(self, ref: str, context: grpc.ServicerContext) -> dict[str, Any]:
        found = [job for key, job in self.jobs.items() if key.startswith(ref) or job["name"] == ref]
        if len(found) != 1:
            self._refuse(context, agent_pb2.REFUSAL_UNKNOWN_JOB, f"no job {ref!r}; see `muster job list`")
        return found[0]

    def SubmitJob(self, request, context):
        self.submitted.append(request)
        spec = json.loads(request.spec_json)
        if any(job["name"] == spec["name"] for job in self.jobs.values()):
            self._refuse(context, agent_pb2.REFUSAL_NAME_TAKEN, f"a live job is named {spec['name']}")
        job_id = f"j{len(self.jobs):07d}"
        self.jobs[job_id] = {"id": job_id, "name": spec["name"], "phase": "QUEUED", "why": "submitted"}
        return admin_pb2.SubmitJobReply(job_id=job_id)

    def CommandJob(self, request, context):
        self.requests.append(request)
        job = self._job(request.job, context)
        if job["phase"] == "COMPLETED":
            self._refuse(context, agent_pb2.REFUSAL_WRONG_PHASE, "the job is COMPLETED")
        job["phase"] = {
            admin_pb2.JOB_COMMAND_KIND_PAUSE: "PAUSED",
            admin_pb2.JOB_COMMAND_KIND_RESUME: "GATHERING",
            admin_pb2.JOB_COMMAND_KIND_STOP: "STOPPING",
            admin_pb2.JOB_COMMAND_KIND_CANCEL: "CANCELLED",
            admin_pb2.JOB_COMMAND_KIND_CHECKPOINT: job["phase"],
        }[request.kind]
        return admin_pb2.View(json=json.dumps(job))

    def ScaleJob(self, request, context):
        job = self._job(request.job, context)
        job |= {"min_nodes": request.min_nodes, "max_nodes": request.max_nodes}
        return admin_pb2.View(json=json.dumps(job))

    def RollBackJob(self, request, context):
        rollback = {"from_step": 9, "to_step": request.step, "by": "olga", "at_unix_ms": 0}
        return admin_pb2.View(json=json.dumps(self._job(request.job, context) | {"rollback": rollback}))

    def ListJobs(self, request, context):
        ended = {"COMPLETED", "FAILED", "CANCELLED"}
        shown = [job for job in self.jobs.values() if request.all or job["phase"] not in ended]
        return admin_pb2.Views(json=[json.dumps(job) for job in shown])

    def GetJob(self, request, context):
        self.asked.set()
        return admin_pb2.View(json=json.dumps(self._job(request.job, context)))

    def ListAgents(self, request, context):
        return admin_pb2.Views(json=[json.dumps(agent) for agent in self.agents.values()])

    def GetAgent(self, request, context):
        return admin_pb2.View(json=json.dumps(self.agents[request.agent]))

    def CommandAgent(self, request, context):
        self.requests.append(request)
        return admin_pb2.View(json=json.dumps(self.agents[request.agent]))

    def CreateToken(self, request, context):
        self.requests.append(request)
        return admin_pb2.CreateTokenReply(
            token=f"muster1.{'a' * 64}.tok00001{'s' * 43}", token_id="tok00001", enroll_port=7471
        )

    def ListTokens(self, request, context):
        return admin_pb2.Views(json=[json.dumps(token) for token in self.tokens.values()])

    def RevokeToken(self, request, context):
        self.requests.append(request)
        if request.token_id not in self.tokens:
            self._refuse(context, agent_pb2.REFUSAL_UNKNOWN_TOKEN, f"no token {request.token_id}")
        return admin_pb2.View(json=json.dumps(self.tokens[request.token_id] | {"revoked": True}))

    def ListCheckpoints(self, request, context):
        views = [{"step": step, "bytes": 10} for job, step in self.manifests if job == request.job]
        return admin_pb2.Views(json=[json.dumps(view) for view in views])

    def GetCheckpoint(self, request, context):
        steps = [step for job, step in self.manifests if job == request.job]
        step = request.step or max(steps, default=0)
        if step not in steps:
            self._refuse(context, agent_pb2.REFUSAL_UNKNOWN_CHECKPOINT, f"no checkpoint at step {step}")
        return admin_pb2.CheckpointReply(manifest_json=self.manifests[request.job, step])

    def CommandCheckpoint(self, request, context):
        self.requests.append(request)
        manifest = json.loads(self.GetCheckpoint(request, context).manifest_json)
        return admin_pb2.View(json=json.dumps({"step": manifest["step"], "kept": ["last"]}))

    def CollectGarbage(self, request, context):
        view = {"dry_run": request.dry_run, "blobs": 2, "bytes": 2048, "young_blobs": 1, "young_bytes": 10}
        return admin_pb2.View(json=json.dumps(view))

    def VerifyCheckpoint(self, request, context):
        manifest = json.loads(self.GetCheckpoint(request, context).manifest_json)
        bad = [
            s
            for s in manifest["shards"]
            if hashlib.sha256(self.blobs[s["digest"]]).hexdigest() != s["digest"]
        ]
        problems = [{"index": s["index"], "digest": s["digest"], "problem": "is damaged"} for s in bad]
        return admin_pb2.View(
            json=json.dumps({"step": manifest["step"], "sound": not bad, "problems": problems})
        )

    def _stream(self, messages: list[Any], after: int, key: Any, follow: bool, context: Any) -> Iterator[Any]:
        for message in messages:
            if key(message) > after:
                yield message
                if follow and self.stream_breaks > 0:
                    self.stream_breaks -= 1
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is stopping")

    def Watch(self, request, context):
        yield from self._stream(
            self.events, request.after_sequence, lambda e: e.sequence, request.follow, context
        )

    def Logs(self, request, context):
        self.requests.append(request)
        lines = self.lines[-request.tail :] if request.tail else self.lines
        yield from self._stream(lines, request.after_sequence, lambda e: e.sequence, request.follow, context)

    def Steps(self, request, context):
        replies = [
            admin_pb2.StepsReply(
                steps=[step], evaluations=[e for e in self.evaluations if e.step == step.step]
            )
            for step in self.steps
        ]
        yield from self._stream(
            replies, request.after_step, lambda r: r.steps[-1].step, request.follow, context
        )

    def FindBlobs(self, request, context):
        missing = [digest for digest in request.digests if digest not in self.blobs]
        received = {digest: len(self.suspended[digest]) for digest in missing if digest in self.suspended}
        return agent_pb2.FindBlobsReply(missing=missing, received=received)

    def GetBlob(self, request, context):
        blob = self.blobs[request.digest][request.offset :]
        for index, first in enumerate(range(0, len(blob), 1_000)):
            yield agent_pb2.BlobChunk(data=blob[first : first + 1_000])
            if index == 1 and self.stream_breaks > 0:
                self.stream_breaks -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "the coordinator is stopping")

    def PutBlob(self, request_iterator, context):
        header = next(request_iterator).header
        data = self.suspended.pop(header.digest, b"")[: header.offset]
        self.put_offsets.append(header.offset)
        for message in request_iterator:
            data += message.data
            if self.put_breaks and data:
                self.put_breaks -= 1
                self.suspended[header.digest] = data
                context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")
        if hashlib.sha256(data).hexdigest() != header.digest or len(data) != header.bytes:
            self._refuse(context, agent_pb2.REFUSAL_DIGEST_MISMATCH, f"blob {header.digest}")
        self.blobs[header.digest] = data
        return agent_pb2.PutBlobReply()


@dataclass
class Served:
    """The service, served; and the identity file of its operator."""

    service: Service
    authority: Authority
    address: str
    identity_path: Path

    def identity(self, path: Path, role: Role = Role.ADMIN, address: str | None = None) -> Path:
        self.authority.issue_operator(role, "operator", address or self.address).save(path)
        return path


def serve(home: Path) -> tuple[Served, grpc.Server]:
    """Start a Service on a free port, with mutual TLS."""
    authority = Authority.create()
    authority.save(home)
    authority.write_server_certificate(home)
    key, chain = authority.server_credentials(home)
    credentials = grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=authority.certificate_pem, require_client_auth=True
    )
    service = Service()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=wire.SERVER_OPTIONS)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    served = Served(
        service=service, authority=authority, address=f"127.0.0.1:{port}", identity_path=home / "admin.json"
    )
    served.identity(served.identity_path)
    return served, server
