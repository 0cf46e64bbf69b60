"""How the simulation says that a promise was broken."""

from __future__ import annotations


class Violation(AssertionError):
    """An invariant does not hold, or nothing moves though it should."""


def require(holds: object, message: str) -> None:
    """Raise Violation unless `holds`."""
    if not holds:
        raise Violation(message)
