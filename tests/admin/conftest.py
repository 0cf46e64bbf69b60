"""Fixtures: a served AdminService, and `muster` run against it in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator.admin.cli import main
from tests.admin.server import Served, serve


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    home = tmp_path / "coordinator"
    home.mkdir(mode=0o700)
    started, server = serve(home)
    yield started
    server.stop(grace=None).wait()


@pytest.fixture
def muster(served: Served, tmp_path: Path) -> Callable[..., Result]:
    """`muster("job", "list")` runs the command as the served coordinator's operator."""

    def run(*arguments: str, identity: Path | None = None) -> Result:
        environment = {
            "MUSTER_IDENTITY": str(identity or served.identity_path),
            "MUSTER_ADDRESS": None,
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        return CliRunner(env=environment).invoke(main, list(arguments))

    return run


@pytest.fixture
def muster_json(muster: Callable[..., Result]) -> Callable[..., Any]:
    """As `muster`, with `-o json`: the parsed standard output of a command that succeeds."""

    def run(*arguments: str) -> Any:
        result = muster(*arguments, "-o", "json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


def error_line(result: Result) -> str:
    """The one line that a failed command leaves on standard error."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]
