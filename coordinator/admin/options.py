"""Options and argument types that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from coordinator.admin.output import Output

if TYPE_CHECKING:
    from coordinator.admin.connection import Coordinator

R = TypeVar("R")

_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_NODES = re.compile(r"(\d{1,9})(?::(\d{1,9}))?", re.ASCII)


def duration(text: str) -> float:
    """`250ms`, `5s`, `10m`, `2h`, `7d`, or a number of seconds, as seconds.  Raise BadParameter."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a duration; expected for example 30s, 10m, 2h, 7d.")
    return float(match[1]) * _UNIT_MS[match[2] or "s"] / 1_000


def node_range(text: str) -> tuple[int, int]:
    """`MIN:MAX`, or `N` for both, with 1 ≤ MIN ≤ MAX ≤ 1024.  Raise BadParameter."""
    match = _NODES.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not MIN:MAX; expected for example 2:8.")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high <= 1_024:
        raise click.BadParameter(f"{text!r}: expected 1 ≤ MIN ≤ MAX ≤ 1024.")
    return low, high


def with_output(function: Callable[..., R]) -> Callable[..., R]:
    """Add `-o`; the function gets `output`, an Output."""

    @click.option(
        "-o",
        "--output",
        "output_form",
        type=click.Choice(["table", "json"]),
        default="table",
        help="What to print.",
    )
    @functools.wraps(function)
    def run(*args: Any, output_form: str, **named: Any) -> R:
        return function(*args, output=Output(json=output_form == "json"), **named)

    return run


def with_coordinator_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add `-o`, `--identity`, `--address`; the function gets `output`, `identity` and `address`."""
    function = click.option("--address", metavar="HOST:PORT", help="Dial this address.")(function)
    function = click.option("--identity", type=click.Path(path_type=Path), help="Identity file.")(function)
    return with_output(function)


def with_coordinator(function: Callable[..., R]) -> Callable[..., R]:
    """Add `-o`, `--identity`, `--address`; the function gets `output` and `coordinator`, an open connection."""

    @with_coordinator_options
    @functools.wraps(function)
    def run(*args: Any, identity: Path | None, address: str | None, **named: Any) -> R:
        with connected(identity, address) as coordinator:
            return function(*args, coordinator=coordinator, **named)

    return run


def connected(identity: Path | None, address: str | None) -> Coordinator:
    """A connection as this command's options, or else those of `muster` itself, say."""
    from coordinator.admin.connection import Coordinator

    root = click.get_current_context().find_root().params
    return Coordinator.open(identity or root.get("identity"), address or root.get("address"))
