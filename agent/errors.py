"""What can go wrong in the agent, as one tree; the class decides the command's exit code."""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """The message names the thing, what was found, what is allowed and what to do."""

    exit_code: ClassVar[int] = 1


class BadInput(AgentError):
    """An option, a file or this machine's software is not usable."""

    exit_code = 2


class Unreachable(AgentError):
    """Nobody answers at the coordinator's address."""

    exit_code = 3


class RefusedByCoordinator(AgentError):
    """The coordinator answered no, and asking again would not help."""

    exit_code = 4


class UntrustedCoordinator(AgentError):
    """Whoever answered is not the coordinator that the token pins; nothing secret was sent."""

    exit_code = 4


class BlobError(AgentError):
    """A blob cannot be had: the message names its digest and why."""
