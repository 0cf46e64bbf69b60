"""What operators and onlookers may ask.  Every caller has passed `MainAccess`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc.aio
import structlog

from coordinator import jobfile, names, translate, views
from coordinator.access import CallRefusedError, caller
from coordinator.blob_service import BlobService
from coordinator.blobs import BlobStore
from coordinator.caches import Caches
from coordinator.core.checkpoints import newest_good
from coordinator.core.model import (
    ENDED,
    Agent,
    AgentAction,
    AgentCommanded,
    Checkpoint,
    CheckpointCommanded,
    DamageFound,
    Event,
    Job,
    JobCommanded,
    JobId,
    JobScaled,
    JobSpec,
    JobSubmitted,
    Presence,
    Refusal,
    Refused,
    RollbackAsked,
    State,
    TokenAsked,
    TokenId,
    TokenRevokeAsked,
)
from coordinator.identity import principal_of
from coordinator.journal import PAGE_ROWS, Journal
from coordinator.logs import LogBook
from coordinator.loop import Loop
from coordinator.sweep import Sweeper
from protos import admin_pb2, admin_pb2_grpc, agent_pb2, authorship, seal
from protos.wire import JoinToken

log = structlog.get_logger("coordinator.admin")


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    def __init__(
        self,
        *,
        loop: Loop,
        journal: Journal,
        blobs: BlobStore,
        blob_service: BlobService,
        caches: Caches,
        logs: LogBook,
        sweeper: Sweeper,
        fingerprint: str,
        authority_pem: str,
        enroll_port: Callable[[], int],
    ) -> None:
        self._loop = loop
        self._journal = journal
        self._blobs = blobs
        self._blob_service = blob_service
        self._caches = caches
        self._logs = logs
        self._sweeper = sweeper
        self._fingerprint = fingerprint
        self._authority_pem = authority_pem
        self._enroll_port = enroll_port

    async def _decided(self, event: Event) -> None:
        reply = await self._loop.submit(event)
        log.info(
            "operator", by=caller.get().id, command=type(event).__name__, refused=isinstance(reply, Refused)
        )
        if isinstance(reply, Refused):
            raise CallRefusedError(reply.refusal, reply.message)

    async def _job(self, text: str) -> Job:
        return await self._loop.query(lambda state, _: names.job(state, text))

    async def _agent(self, text: str) -> Agent:
        return await self._loop.query(lambda state, _: names.agent(state, text))

    async def _job_view(self, job_id: JobId) -> admin_pb2.View:
        def look(state: State, _: int) -> views.View:
            job = state.jobs[job_id]
            view = self._view_of(state, job)
            return {**view, "spec": json.loads(job.spec.spec_json)}

        return _view(await self._loop.query(look))

    def _view_of(self, state: State, job: Job) -> views.View:
        fetching = {
            agent_id: cache.fetched for agent_id in job.assigned if (cache := self._caches.of(agent_id))
        }
        return views.job(state, job, self._loop.latest_step, fetching)

    # ----------------------------------------------------------------------------- jobs

    async def SubmitJob(  # noqa: N802
        self, request: admin_pb2.SubmitJobRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.SubmitJobReply:
        found = translate.json_object(request.spec_json, "spec_json")
        spec = jobfile.job_spec(found, request.dataset_json)
        if request.dataset_json:
            wanted = translate.dataset_digests(request.dataset_json)
            missing = await asyncio.to_thread(self._blobs.missing, wanted)
            if missing:
                raise CallRefusedError(
                    Refusal.UNKNOWN_DATASET,
                    f"dataset_json: {len(missing)} of its {len(wanted)} blobs are not stored here, the first is "
                    f"{missing[0]}; upload the dataset first (`muster job submit` does)",
                )
        spec = self._signed(request, spec)
        job_id = JobId(names.new_id("j", self._loop.state.jobs))
        await self._decided(JobSubmitted(job_id=job_id, spec=spec))
        return admin_pb2.SubmitJobReply(job_id=job_id)

    def _signed(self, request: admin_pb2.SubmitJobRequest, spec: JobSpec) -> JobSpec:
        """The spec with the caller's signature; one without is taken, and agents will refuse it."""
        certificate, signature = translate.authorship(request)
        if not signature:
            return spec
        complaint = authorship.problem(
            authority_pem=self._authority_pem,
            certificate_pem=certificate,
            signature=signature,
            spec_json=spec.spec_json,
            dataset_json=spec.dataset_json,
        )
        signer = principal_of(certificate.encode())
        if not complaint and (signer is None or signer.id != caller.get().id):
            complaint = "it was signed by somebody else than its sender"
        if complaint:
            raise CallRefusedError(Refusal.INVALID, f"signature: the job file is refused, for {complaint}")
        return replace(spec, signature=signature.hex(), certificate_pem=certificate)

    async def CommandJob(  # noqa: N802
        self, request: admin_pb2.JobCommandRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        action = translate.job_action(request.kind)
        job = await self._job(request.job)
        await self._decided(JobCommanded(job_id=job.job_id, action=action))
        return await self._job_view(job.job_id)

    async def ScaleJob(  # noqa: N802
        self, request: admin_pb2.ScaleJobRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        least, most = translate.nodes(request)
        job = await self._job(request.job)
        await self._decided(JobScaled(job_id=job.job_id, min_nodes=least, max_nodes=most))
        return await self._job_view(job.job_id)

    async def RollBackJob(  # noqa: N802
        self, request: admin_pb2.RollBackJobRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        step = translate.rollback_step(request)
        job = await self._job(request.job)
        await self._decided(RollbackAsked(job_id=job.job_id, step=step, by=caller.get().id))
        return await self._job_view(job.job_id)

    async def ListJobs(  # noqa: N802
        self, request: admin_pb2.ListRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.Views:
        def look(state: State, _: int) -> list[views.View]:
            return [
                self._view_of(state, job)
                for job in state.jobs.values()
                if request.all or job.phase not in ENDED
            ]

        return _views(await self._loop.query(look))

    async def GetJob(  # noqa: N802
        self, request: admin_pb2.JobRef, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        return await self._job_view((await self._job(request.job)).job_id)

    # ----------------------------------------------------------------------------- agents

    async def ListAgents(  # noqa: N802
        self, request: admin_pb2.ListRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.Views:
        here = {Presence.READY, Presence.SUSPECT}

        def look(state: State, now_ms: int) -> list[views.View]:
            return [
                views.agent(state, agent, now_ms, self._caches.of(agent.agent_id))
                for agent in state.agents.values()
                if request.all or agent.presence in here
            ]

        return _views(await self._loop.query(look))

    async def GetAgent(  # noqa: N802
        self, request: admin_pb2.AgentRef, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        def look(state: State, now_ms: int) -> views.View:
            agent = names.agent(state, request.agent)
            return views.agent(state, agent, now_ms, self._caches.of(agent.agent_id))

        return _view(await self._loop.query(look))

    async def CommandAgent(  # noqa: N802
        self, request: admin_pb2.AgentCommandRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        action = translate.agent_action(request.kind)
        reason = translate.reason(request.reason)
        seconds = translate.quarantine_seconds(request)
        agent = await self._agent(request.agent)
        until_ms = None
        if action is AgentAction.QUARANTINE and seconds:
            until_ms = self._loop.now_ms() + seconds * 1000
        await self._decided(
            AgentCommanded(agent_id=agent.agent_id, action=action, reason=reason, until_ms=until_ms)
        )
        return await self.GetAgent(admin_pb2.AgentRef(agent=agent.agent_id), _context)

    # ----------------------------------------------------------------------------- tokens

    async def CreateToken(  # noqa: N802
        self, request: admin_pb2.CreateTokenRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.CreateTokenReply:
        ttl_s, uses, note = translate.token_wish(request)
        token_id = TokenId(names.new_id("", self._loop.state.tokens))
        secret = secrets.token_urlsafe(32)
        await self._decided(
            TokenAsked(
                token_id=token_id,
                secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
                note=note,
                expires_ms=self._loop.now_ms() + ttl_s * 1000,
                uses=uses,
            )
        )
        return admin_pb2.CreateTokenReply(
            token=str(JoinToken(fingerprint=self._fingerprint, token_id=token_id, secret=secret)),
            token_id=token_id,
            enroll_port=self._enroll_port(),
        )

    async def ListTokens(  # noqa: N802
        self, request: admin_pb2.ListRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.Views:
        def look(state: State, now_ms: int) -> list[views.View]:
            found = [views.token(token, now_ms) for token in state.tokens.values()]
            return [view for view in found if request.all or view["standing"] == "usable"]

        return _views(await self._loop.query(look))

    async def RevokeToken(  # noqa: N802
        self, request: admin_pb2.RevokeTokenRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        token = await self._loop.query(lambda state, _: names.token(state, request.token_id))
        await self._decided(TokenRevokeAsked(token_id=token.token_id))

        def look(state: State, now_ms: int) -> views.View:
            return views.token(state.tokens[token.token_id], now_ms)

        return _view(await self._loop.query(look))

    # ----------------------------------------------------------------------------- checkpoints

    async def ListCheckpoints(  # noqa: N802
        self, request: admin_pb2.JobRef, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.Views:
        job = await self._job(request.job)
        return _views(views.checkpoint_list(job))

    async def _checkpoint(
        self, request: admin_pb2.CheckpointRef | admin_pb2.CheckpointCommandRequest
    ) -> tuple[Job, Checkpoint]:
        step = translate.sequence(request.step, "step")
        job = await self._job(request.job)
        newest = newest_good(job) or (job.checkpoints[-1] if job.checkpoints else None)
        found = newest if step == 0 else next((c for c in job.checkpoints if c.step == step), None)
        if found is None:
            have = ", ".join(str(one.step) for one in job.checkpoints) or "none"
            wanted = f"at step {step}" if step else "yet"
            raise CallRefusedError(
                Refusal.UNKNOWN_CHECKPOINT,
                f"step: job {job.job_id} has no checkpoint {wanted}; it has: {have}",
            )
        return job, found

    async def GetCheckpoint(  # noqa: N802
        self, request: admin_pb2.CheckpointRef, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.CheckpointReply:
        _, found = await self._checkpoint(request)
        return admin_pb2.CheckpointReply(manifest_json=found.manifest_json)

    async def VerifyCheckpoint(  # noqa: N802
        self, request: admin_pb2.CheckpointRef, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        job, found = await self._checkpoint(request)
        problems = await self._problems(found)
        if problems:
            await self._decided(
                DamageFound(
                    job_id=job.job_id,
                    step=found.step,
                    manifest_digest=found.manifest_digest,
                    detail="; ".join(_named(problem) for problem in problems[:5])[:1_000],
                )
            )
            await asyncio.to_thread(self._discard_damaged, problems)
            job = await self._job(job.job_id)
            found = next((c for c in job.checkpoints if c.step == found.step), found)
        return _view({**views.checkpoint(job, found), "sound": not problems, "problems": problems})

    async def _problems(self, found: Checkpoint) -> list[dict[str, Any]]:
        try:
            manifest = seal.verified(found.manifest_json, self._fingerprint).manifest()
        except seal.SealError as error:
            return [{"index": None, "digest": found.manifest_digest, "problem": str(error)}]
        problems = []
        for shard in manifest["shards"]:
            problem = await asyncio.to_thread(self._blobs.verify, shard["digest"], shard["bytes"])
            if problem:
                problems.append(
                    {
                        "index": shard["index"],
                        "digest": shard["digest"],
                        "bytes": shard["bytes"],
                        "problem": problem,
                    }
                )
        return problems

    def _discard_damaged(self, problems: list[dict[str, Any]]) -> None:
        """A blob that is not what its name says would pass for stored when somebody sends the right one: a
        state that is computed again, bit for bit, has the same shards."""
        for problem in problems:
            if problem["index"] is not None and self._blobs.verify(
                problem["digest"], problem["bytes"]
            ) not in {
                "",
                "missing",
            }:
                self._blobs.remove(problem["digest"])

    async def CommandCheckpoint(  # noqa: N802
        self, request: admin_pb2.CheckpointCommandRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        action = translate.checkpoint_action(request.kind)
        job, found = await self._checkpoint(request)
        await self._decided(
            CheckpointCommanded(job_id=job.job_id, step=found.step, action=action, by=caller.get().id)
        )
        job = await self._job(job.job_id)
        # What is no more is shown as it was.
        now = next((c for c in job.checkpoints if c.step == found.step), found)
        return _view(views.checkpoint(job, now))

    async def CollectGarbage(  # noqa: N802
        self, request: admin_pb2.CollectGarbageRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.View:
        found = await self._sweeper.collect(self._loop, dry_run=request.dry_run)
        log.info("operator", by=caller.get().id, command="CollectGarbage", dry_run=request.dry_run)
        return _view(views.garbage(found, dry_run=request.dry_run))

    # ----------------------------------------------------------------------------- streams

    async def Watch(  # noqa: N802
        self, request: admin_pb2.WatchRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[admin_pb2.Event]:
        after = translate.sequence(request.after_sequence, "after_sequence")
        job_id = (await self._job(request.job)).job_id if request.job else ""
        while True:
            news = self._loop.record_bell.next
            rows = await asyncio.to_thread(self._journal.records, after, job_id=job_id)
            for row in rows:
                after = row.sequence
                yield admin_pb2.Event(
                    sequence=row.sequence, unix_ms=row.at_ms, kind=row.kind, json=row.body, text=row.text
                )
            if len(rows) == PAGE_ROWS:
                continue
            if not request.follow:
                return
            await news.wait()

    async def Logs(  # noqa: N802
        self, request: admin_pb2.LogsRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[admin_pb2.LogLine]:
        after = translate.sequence(request.after_sequence, "after_sequence")
        job = await self._job(request.job)
        if request.tail:
            after = max(after, self._logs.newest(job.job_id) - request.tail)
        while True:
            news = self._logs.bell.next
            rows = await self._logs.read(job.job_id, after)
            for row in rows:
                after = row.sequence
                yield admin_pb2.LogLine(
                    sequence=row.sequence, unix_ms=row.at_ms, agent_id=row.agent_id, line=row.line
                )
            if rows:
                continue
            if not request.follow:
                return
            await news.wait()

    async def Steps(  # noqa: N802
        self, request: admin_pb2.StepsRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[admin_pb2.StepsReply]:
        after = translate.sequence(request.after_step, "after_step")
        job_id = (await self._job(request.job)).job_id
        evaluated, shown = after, 0
        while True:
            news = self._loop.record_bell.next
            job = await self._loop.query(lambda state, _: state.jobs[job_id])
            ended = job.phase in ENDED
            if job.committed_step < shown:  # it went back: what was shown is made anew
                after = shown = job.committed_step
                evaluated = min(evaluated, after)
            steps = await asyncio.to_thread(self._journal.steps, job_id, after)
            if steps:
                after = shown = steps[-1].step
            evaluations = await asyncio.to_thread(self._journal.evaluations, job_id, evaluated, after)
            evaluated = evaluations[-1].step if evaluations else evaluated
            if steps or evaluations:
                yield admin_pb2.StepsReply(
                    steps=[translate.step_record(row) for row in steps],
                    evaluations=[translate.evaluation(row) for row in evaluations],
                )
            if len(steps) == PAGE_ROWS:
                continue
            if ended or not request.follow:
                return
            await news.wait()

    # ----------------------------------------------------------------------------- blobs

    async def FindBlobs(  # noqa: N802
        self, request: agent_pb2.FindBlobsRequest, _context: grpc.aio.ServicerContext
    ) -> agent_pb2.FindBlobsReply:
        return await self._blob_service.find(request)

    async def GetBlob(  # noqa: N802
        self, request: agent_pb2.GetBlobRequest, _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[agent_pb2.BlobChunk]:
        async for chunk in self._blob_service.get(request):
            yield chunk

    async def PutBlob(  # noqa: N802
        self, requests: AsyncIterator[agent_pb2.PutBlobRequest], _context: grpc.aio.ServicerContext
    ) -> agent_pb2.PutBlobReply:
        return await self._blob_service.put(requests)


def _named(problem: dict[str, Any]) -> str:
    what = "manifest" if problem["index"] is None else f"shard {problem['index']} ({problem['digest']})"
    return f"{what}: {problem['problem']}"


def _view(view: views.View) -> admin_pb2.View:
    return admin_pb2.View(json=views.dump(view))


def _views(found: list[views.View]) -> admin_pb2.Views:
    return admin_pb2.Views(json=[views.dump(view) for view in found])
