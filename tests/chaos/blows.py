"""What is done to a fleet's processes: a list made from a seed before anything runs.  Touches no process."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass


class Kind(enum.Enum):
    KILL = "kill"  # SIGKILL; whoever supervises the process starts it again
    STOP = "stop"  # SIGSTOP, later SIGCONT
    TERM = "term"  # SIGTERM: an agent drains, a coordinator closes, a worker just dies


class Whom(enum.Enum):
    WORKER = "worker"
    AGENT = "agent"  # stopped together with its workers
    AGENT_ONLY = "agent only"  # stopped alone: its workers go on
    COORDINATOR = "coordinator"
    EVERYONE = "everyone"  # all agents at once


CHOICES: dict[tuple[Kind, Whom], int] = {
    (Kind.KILL, Whom.WORKER): 5,
    (Kind.KILL, Whom.AGENT): 5,
    (Kind.KILL, Whom.COORDINATOR): 4,
    (Kind.KILL, Whom.EVERYONE): 1,
    (Kind.STOP, Whom.WORKER): 3,
    (Kind.STOP, Whom.AGENT): 3,
    (Kind.STOP, Whom.AGENT_ONLY): 2,
    (Kind.STOP, Whom.COORDINATOR): 3,
    (Kind.STOP, Whom.EVERYONE): 1,
    (Kind.TERM, Whom.WORKER): 1,
    (Kind.TERM, Whom.AGENT): 4,
    (Kind.TERM, Whom.COORDINATOR): 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    number: int
    at_s: float
    kind: Kind
    whom: Whom
    target: int
    """Which agent, counted modulo how many there are."""
    seconds: float
    """Until SIGCONT, or until the process is started again."""
    forgets: bool
    """A killed agent comes back with an empty disk, as a stranger."""

    def __str__(self) -> str:
        return f"#{self.number} at {self.at_s:.2f} s: {self.kind.value} {self.whom.value}"


def make_blows(seed: int, *, until_s: float, gap_s: float, lease_s: float) -> list[Blow]:
    """The blows of a seed.  Four in ten come together with the one before: the second is the one that hurts."""
    chance = random.Random(f"chaos {seed}")
    blows: list[Blow] = []
    at_s = chance.uniform(0.0, gap_s)
    while at_s < until_s:
        kind, whom = chance.choices(list(CHOICES), list(CHOICES.values()))[0]
        blows.append(
            Blow(
                number=len(blows),
                at_s=at_s,
                kind=kind,
                whom=whom,
                target=chance.randrange(1_000),
                seconds=lease_s * chance.choice((0.1, 0.4, 0.9, 1.5, 2.5)),
                forgets=chance.random() < 0.2,
            )
        )
        at_s += chance.uniform(0.0, 0.3) if chance.random() < 0.4 else chance.expovariate(1 / gap_s)
    return blows
