"""The coordinator passes on what an operator signed, and takes no signature that is not good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from coordinator.identity import Authority, Role
from protos import admin_pb2, agent_pb2, authorship
from protos.wire import Identity, refusal_of
from tests.coordinator.harness import RPC_TIMEOUT_S, AgentSession, RunningCoordinator, running_coordinator

SPEC = {"name": "demo", "checkpoint": {"dir": "out/demo"}}


def request(signer: Identity | None, spec: Any = None, **changes: Any) -> admin_pb2.SubmitJobRequest:
    text = authorship.canonical(spec or SPEC)
    signed: dict[str, Any] = {}
    if signer is not None:
        signed = {
            "signature": authorship.sign(signer, text, ""),
            "certificate_pem": signer.certificate_pem,
        }
    return admin_pb2.SubmitJobRequest(**{"spec_json": text, **signed, **changes})


async def test_agents_get_the_job_file_as_it_was_signed_also_after_a_restart(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        identity = await c.enroll()
        await (await c.admin()).SubmitJob(request(c.admin_identity), timeout=RPC_TIMEOUT_S)
    async with running_coordinator(tmp_path) as c:
        session = AgentSession(await c.agent(identity))
        await session.hello()
        assignment = (await session.hear("assignment")).assignment
    assert (
        authorship.problem(
            authority_pem=identity.authority_pem,
            certificate_pem=assignment.certificate_pem,
            signature=assignment.signature,
            spec_json=assignment.spec_json,
            dataset_json=assignment.dataset_json,
        )
        == ""
    )


def forgeries(c: RunningCoordinator) -> list[tuple[str, admin_pb2.SubmitJobRequest]]:
    admin = c.admin_identity
    stranger = Authority.create().issue_operator(Role.ADMIN, "admin", c.main_address)
    colleague = c.identity(Role.ADMIN, "colleague")
    return [
        ("not what muster://admin/admin signed", request(admin, spec_json='{"name":"other"}')),
        ("not of this fleet's authority", request(stranger)),
        ("somebody else than its sender", request(colleague)),
        ("only an admin may", request(c.identity(Role.OBSERVER, "eve"))),
        ("certificate_pem: 9000 characters", request(admin, certificate_pem="x" * 9_000)),
        ("signature: 9000 bytes", request(admin, signature=b"x" * 9_000)),
        ("checkpoint.dir: found '/data'", request(admin, {"name": "demo", "checkpoint": {"dir": "/data"}})),
        ("data.path: found '../x'", request(None, {"name": "demo", "data": {"path": "../x"}})),
    ]


async def test_a_submission_that_agents_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    async with running_coordinator(tmp_path) as c:
        admin = await c.admin()
        for says, asked in forgeries(c):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await admin.SubmitJob(asked, timeout=RPC_TIMEOUT_S)
            assert refusal_of(error.value) == agent_pb2.REFUSAL_INVALID
            assert says in (error.value.details() or "")
        jobs = await admin.ListJobs(admin_pb2.ListRequest(all=True), timeout=RPC_TIMEOUT_S)
    assert [json.loads(view) for view in jobs.json] == []
