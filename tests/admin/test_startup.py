"""`muster` starts quickly, imports little and completes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from coordinator.admin.cli import COMMANDS

HEAVY = ("torch", "numpy", "trainer.data", "trainer.train")


def modules_after(code: str) -> set[str]:
    """The modules loaded in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines())


def test_help_answers_in_under_half_a_second_and_loads_neither_torch_nor_grpc() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "coordinator.admin.cli", "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, not wall time: a busy machine must not fail this.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {*HEAVY, "grpc", "rich", "pydantic"}
    for name in COMMANDS:
        assert name in done.stdout


def test_no_command_loads_torch() -> None:
    loaded = modules_after(
        "from coordinator.admin import cli, submission, connection, fleet\n"
        "import click\n"
        "for name in cli.COMMANDS: cli.main.get_command(click.Context(cli.main), name)"
    )
    assert "coordinator.admin.local" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion_script(muster, shell: str) -> None:
    result = muster("completion", shell)
    assert result.exit_code == 0, result.stderr
    assert "_MUSTER_COMPLETE" in result.stdout


def test_completion_offers_the_commands_of_a_group() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from coordinator.admin.cli import main; main(prog_name='muster')"],
        env={
            **os.environ,
            "_MUSTER_COMPLETE": "bash_complete",
            "COMP_WORDS": "muster job ",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    offered = {line.partition(",")[2] for line in done.stdout.splitlines()}
    assert {"submit", "list", "show", "pause", "resume", "scale", "stop", "cancel", "wait", "logs"} <= offered
