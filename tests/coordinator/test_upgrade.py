"""Journals of every released schema are opened, read to the same state and written on.

released/1 was made by commit 8a4ff87, the first with a whole core, shell and transcripts: `journal.db` by
its journal and core, `state.json` is what its codec said of the state at the end, `records.jsonl` has
every kind of record with every value of each enumeration in it.  A new schema gets a directory of its own
(make_released.py, before the schema changes).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from coordinator.core import codec
from coordinator.core.model import JobId, Timing
from coordinator.journal import MIGRATIONS, Entry, Journal, JournalError, RecordRow
from coordinator.loop import restore

RELEASED = Path(__file__).with_name("released")
VERSIONS = sorted(RELEASED.iterdir(), key=lambda directory: int(directory.name))


def contained(old: Any, new: Any, where: str = "") -> None:
    """Everything that the old version said is said by the new one, which may say more."""
    if isinstance(old, dict):
        for key, value in old.items():
            assert key in new, f"{where}.{key} is gone"
            contained(value, new[key], f"{where}.{key}")
    elif isinstance(old, list):
        assert len(old) == len(new), where
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            contained(before, after, f"{where}[{place}]")
    else:
        assert old == new, where


@pytest.fixture(params=VERSIONS, ids=lambda directory: directory.name)
def released(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def old(released: Path, tmp_path: Path) -> Path:
    raw = sqlite3.connect(released / "journal.db")
    assert raw.execute("PRAGMA user_version").fetchone() == (int(released.name),)
    raw.close()
    return Path(shutil.copy(released / "journal.db", tmp_path / "journal.db"))


def test_every_schema_but_the_newest_has_its_fixture() -> None:
    assert [int(directory.name) for directory in VERSIONS] == list(range(1, len(MIGRATIONS)))


def test_an_old_journal_folds_to_the_same_state_and_is_written_on(released: Path, old: Path) -> None:
    said = json.loads((released / "state.json").read_text())
    timing = Timing.from_lease(said["timing"]["lease_ms"])
    with Journal(old) as journal:
        records = journal.last_sequence
        contained(said, json.loads(codec.encode_state(restore(journal, timing))))
        assert [row.step for row in journal.steps("tiny", 0)] == list(range(1, 13))
        assert journal.steps("tiny", 0)[0].data_digest == 2**64 - 1
        assert [row.loss for row in journal.evaluations("tiny", 0, 99)] == [2.5]
        row = RecordRow(at_ms=journal.last_ms, kind="Kind", job_id="", body="{}", text="")
        assert journal.commit([Entry(records=(row,))]) == records + 1
    with Journal(old) as journal:
        assert len(list(journal.history(0))) == records + 1


def test_an_old_journal_folds_from_its_records_alone(released: Path, old: Path) -> None:
    raw = sqlite3.connect(old)
    raw.execute("DELETE FROM snapshots")
    raw.commit()
    raw.close()
    said = json.loads((released / "state.json").read_text())
    with Journal(old) as journal:
        state = restore(journal, Timing.from_lease(2_000))
    contained(said, json.loads(codec.encode_state(state)))
    assert state.jobs[JobId("tiny")].committed_step == 12


def test_every_record_that_was_ever_written_is_read(released: Path) -> None:
    for line in (released / "records.jsonl").read_text().splitlines():
        contained(json.loads(line), json.loads(codec.encode_record(codec.decode_record(line))))


def test_a_damaged_record_whose_checksum_would_be_made_anew_is_not_upgraded(tmp_path: Path) -> None:
    old = Path(shutil.copy(RELEASED / "1" / "journal.db", tmp_path / "journal.db"))
    raw = sqlite3.connect(old)
    raw.execute("UPDATE records SET body = body || ' ' WHERE sequence = 3")
    raw.commit()
    raw.close()
    before = old.read_bytes()
    with pytest.raises(JournalError, match="record 3 does not match its checksum"):
        Journal(old)
    assert old.read_bytes() == before
