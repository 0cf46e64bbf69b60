from __future__ import annotations

from agent import ledger
from agent.ledger import Ledger
from protos import agent_pb2


def filled(steps: int) -> Ledger:
    book = Ledger()
    for step in range(1, steps + 1):
        book.add(agent_pb2.StepRecord(step=step))
    return book


def sent(book: Ledger) -> list[int]:
    return [record.step for progress in book.unsent("j", 1) for record in progress.steps]


def test_each_step_is_sent_once_until_it_must_be_sent_again() -> None:
    book = filled(3)
    assert sent(book) == [1, 2, 3]
    assert sent(book) == []
    book.acknowledge(2)
    book.resend()
    assert sent(book) == [3]


def test_a_step_known_already_is_not_recorded_twice() -> None:
    book = filled(3)
    book.add(agent_pb2.StepRecord(step=2))
    assert sent(book) == [1, 2, 3]


def test_messages_keep_the_bound_of_the_wire() -> None:
    book = filled(ledger.STEPS_A_MESSAGE * 2 + 1)
    assert [len(progress.steps) for progress in book.unsent("j", 1)] == [1000, 1000, 1]


def test_rewind_forgets_what_never_happened() -> None:
    book = filled(5)
    sent(book)
    book.rewind(2)
    book.add(agent_pb2.StepRecord(step=3, loss=7.0))
    book.resend()
    assert sent(book) == [1, 2, 3]
    assert len(book) == 3


def test_evaluations_travel_once_and_also_alone() -> None:
    book = filled(2)
    book.evaluated(agent_pb2.Evaluation(step=2, loss=1.0))
    (progress,) = book.unsent("j", 1)
    assert [e.step for e in progress.evaluations] == [2]
    book.evaluated(agent_pb2.Evaluation(step=3, loss=0.5))
    (progress,) = book.unsent("j", 1)
    assert not progress.steps
    assert [e.step for e in progress.evaluations] == [3]
    assert list(book.unsent("j", 1)) == []


def test_full_ledger_keeps_the_newest() -> None:
    book = filled(ledger.STEPS + 5)
    assert len(book) == ledger.STEPS
    assert sent(book)[0] == 6
