"""What can go wrong with a `muster` command, and the exit code of each kind."""

from __future__ import annotations

import sys
from typing import IO, Any

import click


class OperationFailed(click.ClickException):
    """The command was understood and allowed, and did not succeed."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """One line on standard error, whatever the message holds: scripts read it by line."""
        click.echo(f"muster: {one_line(self.message)}", file=file or sys.stderr)


class BadInput(OperationFailed):
    """What the operator gave is malformed; nothing was sent."""

    exit_code = 2


class Unreachable(OperationFailed):
    """The coordinator did not answer."""

    exit_code = 3


class Refused(OperationFailed):
    """The coordinator answered no; `reason` is the name of its refusal code."""

    exit_code = 4

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"refused ({reason}): {message}")
        self.reason = reason


class JobNotCompleted(OperationFailed):
    """A job that was waited for ended FAILED or CANCELLED."""

    exit_code = 5


INTERRUPTED = 130


def one_line(text: str) -> str:
    """`text` with every run of white space as one blank."""
    return " ".join(text.split())
