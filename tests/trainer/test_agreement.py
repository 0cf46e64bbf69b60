"""Decisions of a forming generation, without any processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.agreement import (
    NO_OUTCOME,
    Claim,
    Outcome,
    Standing,
    diverged,
    must_apply,
    odd_ones,
    outcome_of,
    reference,
    share,
)

A, B = "a" * 32, "f" * 32


def claim(rank: int, step: int, digest: str = A, *, holds: bool = True) -> Claim:
    return Claim(rank=rank, holds=holds, step=step, digest=digest)


def standing(
    step: int, pending: int = 0, *, holds: bool = True, identity: int = 1, generation: int = 3
) -> Standing:
    """`generation` is the one in which it voted last, and which reduced what is pending."""
    last = Outcome(
        step=step, loss=1.5, slices=4, data_digest=7, grad_norm=0.5, skipped=False, generation=generation
    )
    return Standing(
        holds=holds,
        step=step,
        pending=pending,
        pending_in=generation,
        identity=identity,
        broken=False,
        last=last,
    )


@given(
    st.builds(
        Outcome,
        step=st.integers(0, 2**40),
        loss=st.floats(allow_nan=False),
        slices=st.integers(0, 2**20),
        data_digest=st.integers(0, 2**64 - 1),
        grad_norm=st.floats(allow_nan=False),
        skipped=st.booleans(),
        generation=st.integers(0, 2**40),
    ),
    st.integers(0, 2**64 - 1),
)
def test_what_ranks_tell_each_other_fits_into_signed_words(last: Outcome, identity: int) -> None:
    told = Standing(holds=True, step=3, pending=4, pending_in=2, identity=identity, broken=False, last=last)
    row = told.row()
    assert all(-(2**63) <= word < 2**63 for word in row)
    assert Standing.of(row) == told


@given(st.binary(min_size=16, max_size=16))
def test_a_digest_travels_whole(raw: bytes) -> None:
    told = claim(2, 5, raw.hex())
    assert Claim.of(2, told.row()) == told


def test_the_majority_is_the_reference_and_not_the_largest_step() -> None:
    claims = [claim(0, 900), claim(1, 10, B), claim(2, 10, B)]
    chosen = reference(claims, 10, "")
    assert chosen == claims[1]
    assert diverged(claims[0], chosen)


def test_members_behind_the_record_do_not_count_however_many() -> None:
    claims = [claim(0, 5), claim(1, 5), claim(2, 10, B)]
    chosen = reference(claims, 10, "")
    assert chosen == claims[2]
    assert not diverged(claims[0], chosen), "being older is no contradiction"


def test_a_tie_goes_to_the_recorded_digest_else_to_the_lowest_rank() -> None:
    claims = [claim(0, 10, A), claim(1, 10, B)]
    assert reference(claims, 10, B) == claims[1]
    assert reference(claims, 10, "") == claims[0]
    assert diverged(claims[1], claims[0])


def test_when_all_are_behind_the_record_the_majority_still_trains_on() -> None:
    assert reference([claim(0, 7), claim(1, 8, B), claim(2, 8, B)], 10, "") == claim(1, 8, B)


def test_nobody_with_state_means_no_reference() -> None:
    assert reference([claim(0, 7, holds=False)], 0, "") is None


def test_pending_gradients_are_applied_if_somebodys_vote_completed() -> None:
    mine = standing(5, pending=6)
    assert must_apply(mine, [mine, standing(6)], 5)
    assert must_apply(mine, [mine, mine], 6), "the coordinator has the record of a member that is gone"
    assert not must_apply(mine, [mine, mine], 5)
    assert not must_apply(standing(5), [mine, standing(6)], 6), "nothing in hand"
    assert not must_apply(mine, [mine, standing(6, holds=False)], 5)


def test_pending_gradients_of_a_step_that_was_computed_anew_are_not_applied() -> None:
    mine = standing(5, pending=6, generation=3)
    anew = standing(6, generation=4)
    assert not must_apply(mine, [mine, anew], 6), "a later generation summed step 6 without this rank"
    assert not must_apply(mine, [mine, standing(9, generation=4)], 9), "and has gone on"
    assert must_apply(mine, [anew, mine, standing(6, generation=3)], 6)


def test_what_the_vote_said_comes_from_a_member_that_knows() -> None:
    unknown = Standing(holds=True, step=6, pending=0, identity=1, broken=False, last=NO_OUTCOME)
    mine = standing(5, 6)
    found = outcome_of(mine, [mine, unknown, standing(6)])
    assert found is not None
    assert found.loss == 1.5
    assert outcome_of(mine, [mine, unknown]) is None
    assert outcome_of(mine, [mine, standing(6, generation=4)]) is None


def test_who_trains_something_else_is_found_by_the_majority() -> None:
    assert odd_ones([standing(1, identity=9), standing(1), standing(1)]) == [0]
    assert odd_ones([standing(1), standing(1, identity=9)]) == [1]
    assert odd_ones([standing(1), standing(1)]) == []


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_contiguous_even_and_complete(count: int, world_size: int) -> None:
    shares = [share(count, world_size, rank) for rank in range(world_size)]
    assert [j for block in shares for j in block] == list(range(count))
    sizes = [len(block) for block in shares]
    assert max(sizes) - min(sizes) <= 1
