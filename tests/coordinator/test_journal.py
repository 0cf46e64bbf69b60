"""The journal keeps what it has acknowledged, refuses what it cannot trust, and says why."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.journal import (
    CHECKPOINT_ROWS,
    MIGRATIONS,
    Entry,
    EvaluationRow,
    Journal,
    JournalError,
    RecordRow,
    Rollback,
    Snapshot,
    StepRow,
    copy,
)


def record(number: int, job_id: str = "j1") -> RecordRow:
    return RecordRow(
        at_ms=number, kind="Kind", job_id=job_id, body=f'{{"n":{number}}}', text=f"number {number}"
    )


def step(number: int, *, loss: float | None = 1.0, digest: int = 7) -> StepRow:
    return StepRow(
        job_id="j1",
        step=number,
        loss=loss,
        slices=4,
        data_digest=digest,
        tokens=64.0,
        lr=0.1,
        grad_norm=1.0,
        skipped=False,
        generation=1,
        duration_s=0.02,
        at_ms=number,
    )


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.db") as made:
        yield made


def test_records_are_there_after_reopening(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        assert journal.commit([Entry(records=(record(1), record(2))), Entry(records=(record(3),))]) == 3
    with Journal(tmp_path / "j.db") as journal:
        assert [stored.body for stored in journal.history(0)] == ['{"n":1}', '{"n":2}', '{"n":3}']
        assert (journal.last_sequence, journal.last_ms) == (3, 3)
        assert journal.commit([Entry(records=(record(9),))]) == 4


def test_a_failed_commit_leaves_nothing_and_the_next_one_works(journal: Journal) -> None:
    journal.commit([Entry(steps=(step(1),))])
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit([Entry(records=(record(1),)), Entry(records=(record(2),), steps=(step(1),))])
    assert list(journal.history(0)) == []
    assert journal.commit([Entry(records=(record(5),))]) == 1


def test_history_goes_on_across_pages_and_stops_where_told(journal: Journal) -> None:
    journal.commit([Entry(records=tuple(record(number) for number in range(1, 1203)))])
    assert [stored.sequence for stored in journal.history(0)] == list(range(1, 1203))
    assert [stored.sequence for stored in journal.history(1000, 1002)] == [1001, 1002]


def test_records_of_one_job_are_paged_with_their_own_sequence_numbers(journal: Journal) -> None:
    journal.commit([Entry(records=(record(1, "j1"), record(2, "j2"), record(3, "j1")))])
    assert [row.sequence for row in journal.records(0, job_id="j1")] == [1, 3]
    assert [row.sequence for row in journal.records(1, job_id="j1")] == [3]
    assert [row.sequence for row in journal.records(0, limit=2)] == [1, 2]


def test_step_log_keeps_64_bit_digests_and_figures_that_are_not_finite(journal: Journal) -> None:
    journal.commit([Entry(steps=(step(1, digest=2**64 - 1), step(2, loss=None, digest=2**63)))])
    assert [row.data_digest for row in journal.steps("j1", 0)] == [2**64 - 1, 2**63]
    assert journal.steps("j1", 1)[0].loss is None
    assert journal.latest_steps("j1", 1) == [step(2, loss=None, digest=2**63)]


def test_rollback_deletes_later_steps_and_evaluations_in_the_same_commit(journal: Journal) -> None:
    journal.commit(
        [
            Entry(steps=tuple(step(number) for number in range(1, 6))),
            Entry(evaluations=(EvaluationRow(job_id="j1", step=4, loss=2.0),)),
            Entry(records=(record(1),), rollbacks=(Rollback(job_id="j1", to_step=3),)),
            Entry(steps=(step(4, loss=9.0),)),
        ]
    )
    assert [(row.step, row.loss) for row in journal.steps("j1", 0)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 9.0),
    ]
    assert journal.evaluations("j1", 0, 99) == []


def test_snapshots_keep_the_newest_two_and_pass_over_a_damaged_one(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        for sequence in (1, 2, 3):
            journal.write_snapshot(Snapshot(sequence=sequence, body=f"state {sequence}"))
        assert journal.snapshot() == Snapshot(sequence=3, body="state 3")
        assert journal.snapshot(2) == Snapshot(sequence=2, body="state 2")
        assert journal.snapshot(1) is None
    with sqlite3.connect(tmp_path / "j.db") as raw:
        raw.execute("UPDATE snapshots SET body = 'state ?' WHERE sequence = 3")
    raw.close()
    with Journal(tmp_path / "j.db") as journal:
        assert journal.snapshot() == Snapshot(sequence=2, body="state 2")


def test_a_journal_of_a_newer_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    Journal(path).close()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    raw.close()
    with pytest.raises(JournalError, match=r"newer musterd.*Upgrade musterd"):
        Journal(path)


def test_a_file_that_is_no_database_is_refused_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_bytes(b"this is not a database" * 500)
    with pytest.raises(JournalError, match=r"damaged .*restore the coordinator's home from a backup"):
        Journal(path)
    assert path.read_bytes().startswith(b"this is not")


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE cats (name TEXT)")
    raw.close()
    with pytest.raises(JournalError, match="not a Muster journal"):
        Journal(path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE records SET body = replace(body, '2', '4') WHERE sequence = 2", "record 2 does not match"),
        ("DELETE FROM records WHERE sequence = 2", "record 2 is missing"),
    ],
)
def test_a_changed_or_missing_record_is_noticed(tmp_path: Path, damage: str, found: str) -> None:
    path = tmp_path / "j.db"
    with Journal(path) as journal:
        journal.commit([Entry(records=(record(1), record(2), record(3)))])
    raw = sqlite3.connect(path)
    raw.execute(damage)
    raw.commit()
    raw.close()
    with Journal(path) as journal, pytest.raises(JournalError, match=found):
        list(journal.history(0))


def test_overwritten_pages_are_refused_when_opening(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with Journal(path) as journal:
        journal.commit([Entry(records=tuple(record(number) for number in range(1, 2000)))])
    data = bytearray(path.read_bytes())
    data[4096 * 5 : 4096 * 12] = b"\xff" * (4096 * 7)
    path.write_bytes(data)
    with pytest.raises(JournalError, match="damaged"):
        Journal(path)


# ------------------------------------------------------------------------------------- damage


def outcome(path: Path) -> str | list[str]:
    """Every body and step, as a coordinator would read them; or what it would refuse to start with."""
    try:
        with Journal(path) as journal:
            assert journal.last_ms == journal.last_sequence
            steps = [str(row) for row in journal.steps("j1", 0)]
            return [stored.body for stored in journal.history(0)] + steps
    except JournalError as error:
        return str(error)


def test_one_flipped_byte_anywhere_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "whole.db"
    with Journal(whole) as journal:
        journal.commit([Entry(records=(record(n),), steps=(step(n),)) for n in range(1, 301)])
        journal.write_snapshot(Snapshot(sequence=300, body="state " * 200))
    expected = outcome(whole)
    assert isinstance(expected, list)
    data = whole.read_bytes()
    refused = 0
    for place in range(7, len(data), len(data) // 60):
        path = tmp_path / f"flipped{place}.db"
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        found = outcome(path)
        if isinstance(found, list):
            assert found == expected, f"byte {place}"
        else:
            assert str(path) in found, f"byte {place}"
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("kept", [10, 4096, 3 * 4096, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "j.db"
    with Journal(path) as journal:
        journal.commit([Entry(records=tuple(record(number) for number in range(1, 500)))])
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(JournalError, match="damaged"):
        Journal(path)


@pytest.fixture(params=[1, 2 * CHECKPOINT_ROWS + 1], ids=["short", "checkpointed"])
def killed(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, int]:
    """What is on the disk after a SIGKILL, the file and its log, and how many records were committed."""
    (tmp_path / "left").mkdir()
    with Journal(tmp_path / "journal.db") as journal:
        for number in range(1, request.param + 1, 500):
            rows = range(number, min(number + 500, request.param + 1))
            journal.commit([Entry(records=tuple(record(n) for n in rows))])
        for name in ("journal.db", "journal.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / "left" / name)
    return tmp_path / "left" / "journal.db", request.param


def test_a_killed_coordinators_journal_goes_on_with_its_log_and_is_refused_without(
    killed: tuple[Path, int], tmp_path: Path
) -> None:
    left, count = killed
    log = left.with_name("journal.db-wal")
    kept = log.read_bytes()
    log.unlink()
    with pytest.raises(JournalError, match=r"journal\.db-wal is missing.*musterd backup"):
        Journal(left)
    with pytest.raises(JournalError, match=r"journal\.db-wal is missing"):
        copy(left, tmp_path / "copy.db")
    assert not log.exists()
    log.write_bytes(kept)
    assert len(outcome(left)) == count
    assert not log.exists()  # closed cleanly: now the file is whole by itself
    assert len(outcome(left)) == count


def test_looking_into_a_killed_coordinators_journal_does_no_harm(killed: tuple[Path, int]) -> None:
    left, count = killed
    raw = sqlite3.connect(left)
    assert raw.execute("SELECT count(*) FROM records").fetchone() == (count,)
    raw.close()  # SQLite moves the log into the file and removes it
    assert not left.with_name("journal.db-wal").exists()
    assert len(outcome(left)) == count


def test_a_copy_made_while_serving_is_a_whole_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.commit([Entry(records=(record(1), record(2)))])
        copy(tmp_path / "j.db", tmp_path / "copy.db")
        journal.commit([Entry(records=(record(3),))])
    assert outcome(tmp_path / "copy.db") == ['{"n":1}', '{"n":2}']
    assert outcome(tmp_path / "j.db") == ['{"n":1}', '{"n":2}', '{"n":3}']


def test_a_step_or_evaluation_that_changed_on_the_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    with Journal(path) as journal:
        rows = (
            step(1, loss=float("nan")),
            replace(step(2), lr=0, grad_norm=float("inf"), skipped=True),
            step(3),
        )
        evaluation = EvaluationRow(job_id="j1", step=3, loss=2.0)
        journal.commit([Entry(steps=rows, evaluations=(evaluation,))])
        assert [row.loss for row in journal.steps("j1", 0)] == [None, 1.0, 1.0]
        assert journal.steps("j1", 1, 1) == [rows[1]]
        assert journal.evaluations("j1", 0, 9) == [evaluation]
    raw = sqlite3.connect(path)
    raw.execute("UPDATE steps SET loss = 0.5 WHERE step = 3")
    raw.execute("UPDATE evaluations SET loss = 0.5")
    raw.commit()
    raw.close()
    with Journal(path) as journal:
        assert len(journal.steps("j1", 0, 2)) == 2
        with pytest.raises(JournalError, match="step 3 of job j1 does not match its checksum"):
            journal.steps("j1", 0)
        with pytest.raises(JournalError, match="evaluation 3 of job j1"):
            journal.evaluations("j1", 0, 9)
