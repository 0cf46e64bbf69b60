from __future__ import annotations

from agent import ledger
from agent.ledger import Ledger
from protos import agent_pb2


def filled(steps: int) -> Ledger:
    book = Ledger()
    for step in range(1, steps + 1):
        book.add(agent_pb2.StepRecord(step=step))
    return book


def batch(book: Ledger) -> list[int]:
    progress = book.batch("j", 1)
    return [] if progress is None else [record.step for record in progress.steps]


def test_a_step_is_kept_until_it_is_acknowledged() -> None:
    book = filled(3)
    assert batch(book) == batch(book) == [1, 2, 3]
    book.acknowledge(2)
    assert batch(book) == [3]
    book.acknowledge(3)
    assert book.batch("j", 1) is None


def test_a_step_known_already_is_not_recorded_twice() -> None:
    book = filled(3)
    book.add(agent_pb2.StepRecord(step=2))
    assert batch(book) == [1, 2, 3]


def test_a_step_that_the_coordinator_has_from_another_member_is_not_kept() -> None:
    book = filled(3)
    book.acknowledge(5)
    book.add(agent_pb2.StepRecord(step=4))
    book.add(agent_pb2.StepRecord(step=6))
    assert batch(book) == [6]


def test_messages_keep_the_bound_of_the_wire() -> None:
    book = filled(ledger.STEPS_A_MESSAGE + 1)
    assert len(batch(book)) == ledger.STEPS_A_MESSAGE
    book.acknowledge(ledger.STEPS_A_MESSAGE)
    assert batch(book) == [ledger.STEPS_A_MESSAGE + 1]


def test_rewind_forgets_what_never_happened() -> None:
    book = filled(5)
    book.acknowledge(4)
    book.rewind(2)
    book.add(agent_pb2.StepRecord(step=3, loss=7.0))
    assert batch(book) == [3]


def test_evaluations_travel_until_they_arrived_and_also_alone() -> None:
    book = filled(2)
    book.evaluated(agent_pb2.Evaluation(step=2, loss=1.0))
    progress = book.batch("j", 1)
    assert progress is not None
    book.acknowledge(2)
    assert [e.step for e in book.batch("j", 1).evaluations] == [2]
    book.evaluated(agent_pb2.Evaluation(step=3, loss=0.5))
    book.heard(progress)
    last = book.batch("j", 1)
    assert last is not None
    assert not last.steps
    assert [e.step for e in last.evaluations] == [3]


def test_evaluations_of_a_state_that_was_given_up_are_forgotten() -> None:
    book = filled(3)
    for step in (1, 2, 3):
        book.evaluated(agent_pb2.Evaluation(step=step, loss=1.0))
    book.acknowledge(3)
    book.forget_evaluations(1)
    progress = book.batch("j", 1)
    assert progress is not None
    assert [e.step for e in progress.evaluations] == [1]


def test_full_ledger_keeps_the_newest() -> None:
    book = filled(ledger.STEPS + 5)
    assert len(book) == ledger.STEPS
    assert batch(book)[0] == 6


def test_a_message_ends_before_steps_that_were_committed_while_we_were_not_there() -> None:
    book = filled(3)
    book.add(agent_pb2.StepRecord(step=6))
    assert batch(book) == [1, 2, 3]
    book.acknowledge(3)
    assert book.first_step == 6
    assert batch(book) == [6]
    book.acknowledge(6)
    assert book.first_step == 0
