"""`muster` against a real `musterd`, and the documented keys against the coordinator's views."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator import jobfile, views
from coordinator.admin.cli import main
from coordinator.admin.fleet import Fleet
from coordinator.core.model import Agent, AgentId, Checkpoint, Job, JobId, State, Timing
from protos import wire
from tests.admin.conftest import error_line
from tests.admin.test_job import write_dataset, write_job

DOCUMENTED = set(re.findall(r"`([a-z_]+)`", (Path(__file__).parents[2] / "docs" / "cli.md").read_text()))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A running coordinator without agents."""
    with Fleet(home=tmp_path_factory.mktemp("fleet"), environment=dict(os.environ)) as started:
        started.start_coordinator()
        yield started


@pytest.fixture
def real(fleet: Fleet) -> Callable[..., Result]:
    """Run `muster` as the coordinator's admin, or with another identity file."""

    def run(*arguments: str, identity: Path | None = None) -> Result:
        # The identity has port 0: the command finds the address that the coordinator got.
        environment = {"MUSTER_IDENTITY": str(identity or fleet.identity_path)}
        return CliRunner(env=environment).invoke(main, list(arguments))

    return run


def loaded(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def undocumented(view: Mapping[str, Any]) -> set[str]:
    """Keys of the view, and of the objects in it, that docs/cli.md does not name."""
    found = set()
    for key, value in view.items():
        found |= {key} - DOCUMENTED
        if isinstance(value, Mapping) and key not in {"spec", "labels", "record"}:
            found |= undocumented(value)
    return found


def test_a_job_goes_through_its_life(real: Callable[..., Result], tmp_path: Path) -> None:
    path = write_job(tmp_path / "job.yaml", write_dataset(tmp_path / "dataset"))
    job = loaded(real("job", "submit", str(path), "-o", "json"))["job_id"]
    assert [view["id"] for view in loaded(real("job", "list", "-o", "json"))] == [job]
    view = loaded(real("job", "show", job[:5], "-o", "json"))
    assert (view["phase"], view["steps_total"], view["tokenizer"]["kind"]) == ("QUEUED", 10, "byte")
    assert undocumented(view) == set()
    assert "no agent" in real("job", "show", "demo").stdout
    assert loaded(real("job", "scale", "demo", "2:5", "-o", "json"))["max_nodes"] == 5
    assert loaded(real("job", "pause", "demo", "-o", "json"))["phase"] == "PAUSED"
    assert loaded(real("job", "resume", "demo", "-o", "json"))["phase"] == "QUEUED"
    again = real("job", "submit", str(path))
    assert (again.exit_code, "NAME_TAKEN" in error_line(again)) == (4, True)
    assert loaded(real("job", "cancel", "demo", "-o", "json"))["phase"] == "CANCELLED"
    assert real("job", "wait", job).exit_code == 5
    late = real("job", "pause", job)
    assert (late.exit_code, "WRONG_PHASE" in error_line(late)) == (4, True)
    assert loaded(real("job", "list", "-o", "json")) == []
    events = [json.loads(line) for line in real("job", "events", job, "-o", "json").stdout.splitlines()]
    assert {"JobAdmitted", "JobRescaled", "JobPhaseChanged"} <= {event["kind"] for event in events}
    assert loaded(real("checkpoint", "list", job, "-o", "json")) == []
    none = real("checkpoint", "show", job)
    assert (none.exit_code, "UNKNOWN_CHECKPOINT" in error_line(none)) == (4, True)


def test_a_token_is_made_listed_and_revoked(real: Callable[..., Result], fleet: Fleet) -> None:
    made = loaded(real("token", "create", "--ttl", "7d", "--uses", "10", "--note", "lab", "-o", "json"))
    assert made["command"] == f"muster-agent join --token {made['token']} {fleet.addresses['enroll']}"
    assert wire.JoinToken.parse(made["token"]).token_id == made["token_id"]
    [view] = loaded(real("token", "list", "-o", "json"))
    assert (view["id"], view["uses_left"], view["note"]) == (made["token_id"], 10, "lab")
    assert (undocumented(view) | undocumented(made)) == set()
    assert real("token", "revoke", made["token"]).exit_code == 0
    assert loaded(real("token", "list", "-o", "json")) == []
    assert loaded(real("token", "list", "--all", "-o", "json"))[0]["standing"] == "revoked"


def test_an_observer_may_look_but_not_touch(
    real: Callable[..., Result], fleet: Fleet, tmp_path: Path
) -> None:
    observer = tmp_path / "observer.json"
    home = fleet.home / "coordinator"
    subprocess.run(
        [
            *(sys.executable, "-c", "from coordinator.daemon import main; main()", "operator", "issue"),
            *(
                "--home",
                str(home),
                "--role",
                "observer",
                "--address",
                fleet.addresses["main"],
                "--out",
                str(observer),
            ),
            "onlooker",
        ],
        check=True,
        capture_output=True,
    )
    assert real("agent", "list", identity=observer).exit_code == 0
    refused = real("token", "create", identity=observer)
    assert (refused.exit_code, "WRONG_ROLE" in error_line(refused)) == (4, True)


def test_an_unknown_agent_is_refused_with_what_to_look_at(real: Callable[..., Result]) -> None:
    result = real("agent", "drain", "nobody")
    assert (result.exit_code, "UNKNOWN_AGENT" in error_line(result)) == (4, True)


def test_every_key_of_a_checkpoints_view_is_documented(fleet: Fleet, real: Callable[..., Result]) -> None:
    found = Checkpoint(
        step=1, generation=1, manifest_json='{"shards":[]}', manifest_digest="", state_digest="", bytes=0, committed_ms=0
    )  # fmt: skip
    spec = jobfile.job_spec({"name": "n"}, "")
    job = Job(job_id=JobId("j"), spec=spec, submitted_ms=0, order=0, checkpoints=(found,))
    view = views.checkpoint(job, found)
    assert undocumented(view) == set()
    assert view["kept"] == ["last"]
    assert undocumented(loaded(real("checkpoint", "gc", "--dry-run", "-o", "json"))) == set()


def test_every_key_of_an_agents_view_is_documented() -> None:
    agent = Agent(agent_id=AgentId("a"), name="n", certificate_serial="0", admitted_ms=0)
    state = State(timing=Timing.from_lease(1_000), agents={agent.agent_id: agent})
    assert undocumented(views.agent(state, agent, 0)) == set()
