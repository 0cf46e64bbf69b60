"""What is done to a simulated fleet: a list made before the run, so that it can be replayed and shrunk."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass


class Kind(enum.Enum):
    """`target` is a machine unless it says otherwise; `ms` is how long it lasts, or until a restart."""

    KILL_AGENT = "kill agent"  # SIGKILL; started again with its state
    POWER_LOSS = "power loss"  # nobody says that it is gone; started again with its state
    LOSE_DISK = "lose disk"  # killed, and started again without identity and cache
    KILL_WORKER = "kill worker"
    CRASH_WORKER = "crash worker"  # the program raises
    FREEZE = "freeze"  # agent and workers
    FREEZE_AGENT = "freeze agent"
    FREEZE_WORKER = "freeze worker"
    WEDGE_WORKER = "wedge worker"  # computes for ever, and its listener answers
    CUT_BOTH = "cut both ways"  # from the coordinator, silently
    CUT_UP = "cut to the coordinator"
    CUT_DOWN = "cut from the coordinator"
    CUT_DATA = "cut from its peers"
    CUT_ALL = "cut from everybody"
    SPLIT = "split the fleet"  # peers reach their own half only
    BREAK_SESSION = "break session"
    SLOW = "slow link"
    FLAP = "flap"  # killed and started again and again
    CLONE = "clone"  # a second process with its identity
    LIE_READY = "lie in Ready"  # claims a state that it does not hold
    LIE_FORMED = "lie in Formed"
    LIE_TO_PEERS = "lie to peers"
    LIE_VOUCHING = "lie about a checkpoint's state"
    NEVER_VOUCH = "say nothing of a checkpoint's state"  # until its process ends
    CORRUPT = "corrupt state"
    CLOCK_JUMP = "clock jump"
    NO_DATA = "preparation fails"
    HANG = "preparation hangs"  # loses a worker, and the next does not get warm; every second one fetches meanwhile
    BURST = "burst of joins"  # target: how many
    LEAVE = "leave"  # SIGTERM
    DRAIN = "drain"
    QUARANTINE = "quarantine"
    BAN = "ban"
    PAUSE = "pause"  # target: a job, as of those below
    RESUME = "resume"
    SCALE = "scale"
    TAKE_CHECKPOINT = "take checkpoint"
    DAMAGE_CHECKPOINT = "damage checkpoint"
    ROLL_BACK = "roll back"
    PIN = "pin or unpin a checkpoint"
    DELETE_CHECKPOINT = "delete a checkpoint"
    KILL_ALL = "kill all members"
    CRASH_BEFORE = "crash before commit"  # the coordinator, at its next commit
    CRASH_AFTER = "crash after commit"
    CRASH_PARTWAY = "crash while answering"
    CRASH_NOW = "crash now"
    STOP_COORDINATOR = "stop coordinator"  # SIGSTOP
    DISK_FULL = "disk full"  # the journal's
    BLOBS_FULL = "blob disk full"
    CUT_PAIR = "cut from one peer"
    AGENT_DISK_FULL = "agent's disk full"


WEIGHTS: dict[Kind, int] = dict.fromkeys(Kind, 4) | {
    Kind.KILL_AGENT: 12,
    Kind.KILL_WORKER: 12,
    Kind.POWER_LOSS: 6,
    Kind.FREEZE: 8,
    Kind.CUT_BOTH: 8,
    Kind.CUT_ALL: 6,
    Kind.BREAK_SESSION: 8,
    Kind.LEAVE: 6,
    Kind.CRASH_WORKER: 2,
    Kind.BAN: 1,
    Kind.QUARANTINE: 2,
    Kind.BURST: 2,
    Kind.PAUSE: 3,
    Kind.KILL_ALL: 2,
    Kind.CRASH_BEFORE: 6,
    Kind.CRASH_AFTER: 6,
    Kind.CRASH_PARTWAY: 6,
    Kind.DISK_FULL: 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    number: int  # in the whole list of the seed
    at_ms: int
    kind: Kind
    target: int
    ms: int

    def __str__(self) -> str:
        return (
            f"#{self.number} at {self.at_ms / 1000:.3f} s: {self.kind.value} {self.target} for {self.ms} ms"
        )


def make_faults(
    seed: int, *, agents: int, until_ms: int, gap_ms: int, lease_ms: int, burst: int
) -> list[Fault]:
    """The faults of a seed: in clusters, since the second blow is the one that hurts."""
    chance = random.Random(f"faults of {seed}")
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    favourites = chance.choices(kinds, weights, k=6)
    faults: list[Fault] = []
    at_ms = chance.randrange(1_000, 5_000)
    while at_ms < until_ms:
        kind = chance.choice(favourites) if chance.random() < 0.4 else chance.choices(kinds, weights)[0]
        ms = int(lease_ms * chance.choice((0.1, 0.5, 0.9, 1.2, 2.0, 4.0)))
        target = chance.randrange(agents)
        if kind is Kind.BURST:
            target = chance.randrange(1, burst + 1)
        faults.append(Fault(number=len(faults), at_ms=at_ms, kind=kind, target=target, ms=max(20, ms)))
        near = chance.random() < 0.4
        at_ms += chance.randrange(1, 400) if near else chance.randrange(gap_ms // 4, 2 * gap_ms)
    return faults
