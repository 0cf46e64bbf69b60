"""The command as its users meet it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.cli import cli
from agent.doctor import Finding, Question, confined_start, examine
from agent.home import Home
from agent.launch import landlock_version
from protos import wire
from tests.agent.fake_coordinator import Authority, FakeCoordinator


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def token_of(coordinator: FakeCoordinator) -> str:
    return f"muster1.{coordinator.authority.fingerprint}.abcd1234{'s' * 32}"


def test_help_needs_no_torch() -> None:
    code = "import sys; from agent.cli import cli; cli(['--help'], standalone_mode=False); assert 'torch' not in sys.modules; assert 'grpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("join", "--token", "nonsense", "h:1"), "not a join token"),
        (("join", "--token", f"muster1.{'a' * 64}.abcd1234{'s' * 32}", "h"), "expected HOST:PORT"),
        (("run", "--gpus", "x"), "expected card numbers"),
        (("run", "--labels", "x"), "expected KEY=VALUE"),
        (("run", "--cache-bytes", "lots"), "expected a size"),
        (("run",), "identity file"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(home: Home, arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments, "--home", str(home.root)) if arguments[0] != "none" else run()
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


async def test_join_enrols_once(coordinator: FakeCoordinator, home: Home) -> None:
    arguments = (
        "join",
        "--no-run",
        "--token",
        token_of(coordinator),
        "--home",
        str(home.root),
        coordinator.address,
    )
    result = await asyncio.to_thread(run, *arguments)
    assert result.exit_code == 0, result.stderr
    assert wire.Identity.load(home.identity).id == "a1"
    result = await asyncio.to_thread(run, *arguments)
    assert result.exit_code == 0
    assert "already joined as a1" in result.stderr
    assert len(coordinator.enrolled) == 1


async def test_join_with_a_token_of_another_coordinator_leaves_nothing_behind(
    coordinator: FakeCoordinator, home: Home
) -> None:
    token = f"muster1.{Authority().fingerprint}.abcd1234{'s' * 32}"
    result = await asyncio.to_thread(
        run, "join", "--no-run", "--token", token, "--home", str(home.root), coordinator.address
    )
    assert result.exit_code == 4
    assert "Nothing secret was sent" in result.stderr
    assert not home.identity.exists()


def test_join_of_an_unreachable_coordinator_exits_with_3(home: Home) -> None:
    token = f"muster1.{'a' * 64}.abcd1234{'s' * 32}"
    result = run("join", "--no-run", "--token", token, "--home", str(home.root), "127.0.0.1:1")
    assert result.exit_code == 3
    assert "127.0.0.1:1" in result.stderr


def test_status_without_an_agent_says_what_to_do(home: Home) -> None:
    result = run("status", "--home", str(home.root))
    assert result.exit_code == 1
    assert "muster-agent run" in result.stderr


def test_leave_with_forget_removes_the_identity(home: Home) -> None:
    Authority().identity("a1", "127.0.0.1:1").save(home.identity)
    result = run("leave", "--forget", "--home", str(home.root))
    assert result.exit_code == 0
    assert not home.identity.exists()


def findings(question: Question) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(question)}


async def test_doctor_finds_nothing_wrong_with_a_joined_machine(
    coordinator: FakeCoordinator, home: Home
) -> None:
    coordinator.authority.identity("a1", coordinator.address).save(home.identity)
    found = await asyncio.to_thread(findings, Question(home=home))
    assert not [f for f in found.values() if f.level == "fail"]
    assert {"torch", "backend", "disk", "certificate", "port", "clock", "coordinator", "advertise"} <= set(
        found
    )
    assert found["coordinator"].level == "ok"


async def test_doctor_names_a_coordinator_that_is_not_ours(coordinator: FakeCoordinator, home: Home) -> None:
    Authority().identity("a1", coordinator.address).save(home.identity)
    found = await asyncio.to_thread(findings, Question(home=home))
    assert found["coordinator"].level == "fail"
    assert "join again" in found["coordinator"].advice


@pytest.fixture
def expired(home: Home) -> Home:
    from datetime import timedelta

    Authority().identity("a1", "127.0.0.1:1", timedelta(microseconds=1)).save(home.identity)
    return home


def test_doctor_says_what_to_do_about_each_failure(expired: Home) -> None:
    result = run(
        "doctor", "-o", "json", "--home", str(expired.root), "--advertise", "192.0.2.1", "--gpus", "99"
    )
    assert result.exit_code == 1
    failures = {f["subject"]: f for f in json.loads(result.stdout) if f["level"] == "fail"}
    assert {"certificate", "port", "advertise"} <= set(failures)
    assert all(failure["advice"] for failure in failures.values())
    assert "--advertise" in failures["advertise"]["advice"]


@pytest.mark.skipif(landlock_version() == 0, reason="this kernel has no Landlock")
def test_doctor_starts_cuda_as_confined_as_a_worker(home: Home) -> None:
    home.prepare()
    secret = home.root / "identity.json"
    secret.write_text("a private key")
    found = confined_start(home, f"open({str(secret)!r})")
    assert found.level == "fail"
    assert "PermissionError" in found.detail
    assert "--confine off" in found.advice
    assert confined_start(home, "import torch").level == "ok"
    assert not list(home.root.glob("doctor-*"))


def test_long_home_keeps_its_sockets_where_their_names_fit(tmp_path: Path) -> None:
    home = Home(root=tmp_path / ("x" * 120))
    home.prepare()
    assert len(str(home.status_socket)) < 108
    assert home.run.is_dir()
    home.run.rmdir()
