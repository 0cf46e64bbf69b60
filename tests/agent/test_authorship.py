"""An agent runs what an admin of its own authority signed, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from protos import agent_pb2, authorship
from tests.agent.conftest import Volunteer
from tests.agent.fake_coordinator import Authority, FakeCoordinator

SPEC = json.dumps({"name": "test", "fake": {}})


def forged(authority: Authority, change: str) -> agent_pb2.Assignment:
    """A signed assignment that somebody has tampered with."""
    whole = agent_pb2.Assignment(job_id="j1", spec_json=SPEC)
    match change:
        case "unsigned":
            return whole
        case "another job file":
            authority.signed(whole).spec_json = SPEC.replace("test", "toast")
        case "another dataset":
            authority.signed(whole).dataset_json = "{}"
        case "another fleet":
            Authority().signed(whole)
        case "an agent's signature":
            agent = authority.identity("a7", "")
            whole.signature = authorship.sign(agent, whole.spec_json, "")
            whole.certificate_pem = agent.certificate_pem
        case "a path outside":
            whole.spec_json = json.dumps({"name": "test", "checkpoint": {"dir": "../../.ssh"}})
            authority.signed(whole)
        case "no certificate at all":
            authority.signed(whole).certificate_pem = "garbage"
    return whole


FORGERIES = {
    "unsigned": "nobody signed it",
    "another job file": "not what muster://admin/admin signed",
    "another dataset": "not what muster://admin/admin signed",
    "another fleet": "not of this fleet's authority",
    "an agent's signature": "only an admin may",
    "a path outside": "checkpoint.dir: found '../../.ssh'",
    "no certificate at all": "not of this fleet's authority",
}


async def test_a_job_that_no_admin_signed_is_not_run(
    volunteer: Volunteer, coordinator: FakeCoordinator
) -> None:
    await volunteer.start()
    for change, says in FORGERIES.items():
        job_id = f"j-{change.replace(' ', '-')}"
        assignment = forged(coordinator.authority, change)
        assignment.job_id = job_id
        coordinator.session.say(assignment=assignment)
        failed = await coordinator.heard("failed")
        assert (failed.job_id, failed.kind) == (job_id, agent_pb2.FAILURE_KIND_PREPARE)
        assert says in failed.detail
        assert not (volunteer.home.root / "jobs" / job_id).exists(), "something of it was made"
    volunteer.assign(job_id="signed")
    assert (await coordinator.heard("ready")).job_id == "signed"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"data": {"path": "sha256:" + "ab" * 32}, "checkpoint": {"dir": "out/run"}}, ""),
        ({"data": {"path": "/etc"}}, "data.path"),
        ({"data": {"path": "~/x"}}, "data.path"),
        ({"data": {"mix": [{"path": "a"}, {"text": ["b/../../c"]}]}}, "data.mix[1].text[0]"),
        ({"checkpoint": {"dir": "a\\..\\b"}}, "checkpoint.dir"),
        ({"checkpoint": []}, ""),
        ([], ""),
    ],
)
def test_paths_that_leave_the_jobs_directory_are_named(spec: Any, complaint: str) -> None:
    assert authorship.escape(spec).partition(":")[0] == complaint
