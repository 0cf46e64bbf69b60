"""What the members of a new generation tell each other, and what follows from it.

Pure: rows of integers in, decisions out, the same on every rank because every rank sees the same rows.
Nobody believes the largest step: the state that counts is the one the majority holds.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a completed commit vote said about a step: the same on every rank."""

    step: int
    loss: float
    slices: int
    data_digest: int
    grad_norm: float
    skipped: bool
    generation: int = 0
    """In which the vote was held."""

    def row(self) -> list[int]:
        return [
            self.step,
            self.generation,
            _bits(self.loss),
            self.slices,
            _signed(self.data_digest),
            _bits(self.grad_norm),
            int(self.skipped),
        ]

    @staticmethod
    def of(row: Sequence[int]) -> Outcome:
        step, generation, loss, slices, data_digest, grad_norm, skipped = row
        return Outcome(
            step=step,
            generation=generation,
            loss=_float(loss),
            slices=slices,
            data_digest=data_digest % (1 << 64),
            grad_norm=_float(grad_norm),
            skipped=bool(skipped),
        )


NO_OUTCOME = Outcome(step=0, loss=0.0, slices=0, data_digest=0, grad_norm=0.0, skipped=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a rank stands when a generation forms."""

    holds: bool
    """It has training state."""
    step: int
    pending: int
    """The step whose reduced gradients it has, complete but not applied; 0 if none."""
    identity: int
    """Hash of what has to be equal everywhere: configuration, dataset, the layout of gradient buckets."""
    broken: bool
    """It cannot do its part (the leader could not restore the checkpoint)."""
    last: Outcome
    """Of `step`, where it knows it."""
    pending_in: int = 0
    """The generation that reduced the pending gradients."""

    def row(self) -> list[int]:
        return [
            int(self.holds),
            self.step,
            self.pending,
            self.pending_in,
            _signed(self.identity),
            int(self.broken),
            *self.last.row(),
        ]

    @staticmethod
    def of(row: Sequence[int]) -> Standing:
        holds, step, pending, pending_in, identity, broken = row[:6]
        return Standing(
            holds=bool(holds),
            step=step,
            pending=pending,
            pending_in=pending_in,
            identity=identity % (1 << 64),
            broken=bool(broken),
            last=Outcome.of(row[6:]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The state a rank says it holds."""

    rank: int
    holds: bool
    step: int
    digest: str

    def row(self) -> list[int]:
        number = int(self.digest or "0", 16)
        return [int(self.holds), self.step, _signed(number >> 64), _signed(number % (1 << 64))]

    @staticmethod
    def of(rank: int, row: Sequence[int]) -> Claim:
        holds, step, high, low = row
        number = (high % (1 << 64)) << 64 | low % (1 << 64)
        return Claim(rank=rank, holds=bool(holds), step=step, digest=f"{number:032x}")


def must_apply(mine: Standing, everyone: Sequence[Standing], committed_step: int) -> bool:
    """Whether this rank applies the gradients it holds: somebody's vote on them completed.

    That is so if a member has applied the step by the vote of the same generation, or if nobody here has
    come so far and the coordinator has recorded it (the member that reported it is gone).  A vote that
    completed anywhere had everybody's complete gradients.  A step that a later generation computed anew,
    without this rank, was summed otherwise: then this rank heals.
    """
    if not mine.pending:
        return False
    if any(s.holds and s.step >= mine.pending for s in everyone):
        return outcome_of(mine, everyone) is not None
    return committed_step == mine.pending


def outcome_of(mine: Standing, everyone: Sequence[Standing]) -> Outcome | None:
    """What the vote on the gradients that this rank holds said, from the lowest rank that knows."""
    vote = (mine.pending, mine.pending_in)
    return next((s.last for s in everyone if s.holds and (s.last.step, s.last.generation) == vote), None)


def odd_ones(everyone: Sequence[Standing]) -> list[int]:
    """Ranks whose identity is not the most common one; among equals the lowest rank's counts."""
    counts = Counter(standing.identity for standing in everyone)
    common = max(counts, key=lambda identity: counts[identity])  # the first of equals: insertion order
    return [rank for rank, standing in enumerate(everyone) if standing.identity != common]


def reference(claims: Sequence[Claim], committed_step: int, committed_digest: str) -> Claim | None:
    """The claim that everybody heals to, or None if nobody holds state.

    Among holders that are not behind the coordinator's record (all holders, if all are behind), the
    (step, digest) held by most; on a tie the one that matches the record, else the lowest rank's.
    """
    holders = [claim for claim in claims if claim.holds]
    able = [claim for claim in holders if claim.step >= committed_step] or holders
    if not able:
        return None
    votes = Counter((claim.step, claim.digest) for claim in able)

    def weight(claim: Claim) -> tuple[int, bool]:
        recorded = claim.step == committed_step and claim.digest == committed_digest
        return votes[claim.step, claim.digest], recorded

    return max(able, key=weight)  # the first of equals: the lowest rank


def diverged(claim: Claim, chosen: Claim) -> bool:
    """Whether a holder's state contradicts the reference, rather than merely being older."""
    if not claim.holds:
        return False
    return claim.step > chosen.step or (claim.step == chosen.step and claim.digest != chosen.digest)


def share(count: int, world_size: int, rank: int) -> range:
    """This rank's contiguous block of 0 … count−1; blocks differ by at most one."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
