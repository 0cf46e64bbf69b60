"""The coordinator's memory on disk: one SQLite file that holds the records in order, snapshots of the
state, and the step log.

What `commit` has returned for survives the loss of power.  Knows SQLite and the shapes of rows; does
not know what a record means: the loop hands in text and takes text out.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

APPLICATION_ID = 0x4D535452  # "MSTR"
SNAPSHOTS_KEPT = 2
PAGE_ROWS = 500
CHECKPOINT_ROWS = 1_000
"""So many rows are written to the write-ahead log before it is moved into the file."""


class JournalError(Exception):
    """The journal cannot be used; the message names the file, what was found and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRow:
    at_ms: int
    kind: str
    job_id: str  # "" if the record is not about a job
    body: str  # JSON
    text: str  # one line for people


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    sequence: int
    at_ms: int
    kind: str
    job_id: str
    body: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One committed step; NaN is kept as None, which SQLite does anyway."""

    job_id: str
    step: int
    loss: float | None
    slices: int
    data_digest: int  # 0 .. 2^64 - 1
    tokens: float
    lr: float
    grad_norm: float | None
    skipped: bool
    generation: int
    duration_s: float
    at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    job_id: str
    step: int
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Forget this job's steps and evaluations after `to_step`."""

    job_id: str
    to_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one event leaves behind, written in this order."""

    records: tuple[RecordRow, ...] = ()
    steps: tuple[StepRow, ...] = ()
    evaluations: tuple[EvaluationRow, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    sequence: int  # of the last record it contains
    body: str


T = TypeVar("T", StepRow, EvaluationRow)

MIGRATIONS: tuple[str, ...] = (
    # version 1
    """
    CREATE TABLE records (
        sequence INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        job_id TEXT NOT NULL,
        body TEXT NOT NULL,
        text TEXT NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE INDEX records_by_job ON records (job_id, sequence);
    CREATE INDEX records_by_kind ON records (kind, sequence);
    CREATE TABLE snapshots (
        sequence INTEGER PRIMARY KEY,
        body TEXT NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE TABLE steps (
        job_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        loss REAL,
        slices INTEGER NOT NULL,
        data_digest INTEGER NOT NULL,
        tokens REAL NOT NULL,
        lr REAL NOT NULL,
        grad_norm REAL,
        skipped INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        duration_s REAL NOT NULL,
        at_ms INTEGER NOT NULL,
        PRIMARY KEY (job_id, step)
    ) WITHOUT ROWID;
    CREATE TABLE evaluations (
        job_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        loss REAL,
        PRIMARY KEY (job_id, step)
    ) WITHOUT ROWID;
    """,
    # version 2: a record's checksum covers all its columns, since the clock goes on from `at_ms`; and a file
    # whose newest commits are in its write-ahead log says so (see `Journal._checkpoint`).
    """
    CREATE TABLE needs_log (since_ms INTEGER NOT NULL);
    UPDATE records SET crc = summed_anew(sequence, at_ms, kind, job_id, body, text, crc);
    """,
    # version 3: steps and evaluations have checksums, too.
    """
    ALTER TABLE steps ADD COLUMN crc INTEGER NOT NULL DEFAULT 0;
    UPDATE steps SET crc = summed(job_id, step, loss, slices, data_digest, tokens, lr, grad_norm, skipped,
                                  generation, duration_s, at_ms);
    ALTER TABLE evaluations ADD COLUMN crc INTEGER NOT NULL DEFAULT 0;
    UPDATE evaluations SET crc = summed(job_id, step, loss);
    """,
)
"""Each brings the schema from its index to its index plus one; never edited once released."""

_STEP_COLUMNS = ", ".join((*(field.name for field in fields(StepRow)), "crc"))
_STEP_MARKS = ", ".join("?" for _ in (*fields(StepRow), "crc"))


def _crc(*columns: object) -> int:
    return zlib.crc32("\0".join(map(str, columns)).encode(errors="surrogatepass"))


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def copy(source: Path, target: Path) -> None:
    """Make `target` a whole journal with everything that `source` holds now, whoever is writing to it.

    Raise JournalError if the source cannot be read, OSError if the target cannot be written."""
    if _is_cut_off(source):
        raise JournalError(_cut_off(source))
    try:
        reading = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
        writing = sqlite3.connect(target)
        try:
            reading.backup(writing)
            if writing.execute("SELECT 1 FROM sqlite_master WHERE name = 'needs_log'").fetchone():
                writing.execute("DELETE FROM needs_log")
                writing.commit()
        finally:
            writing.close()
            reading.close()
    except sqlite3.Error as error:
        raise JournalError(f"journal {source}: cannot be copied ({error})") from error


def _is_cut_off(path: Path) -> bool:
    """Whether the write-ahead log of `path` is not there, and the file says that it needs it."""
    if not path.exists() or _wal(path).exists():
        return False
    # Without a log there is nothing to recover: the file is looked at as it is, and left as it is.
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        return connection.execute("SELECT 1 FROM needs_log").fetchone() is not None
    return False


def _cut_off(path: Path) -> str:
    return (
        f"journal {path}: {_wal(path).name} is missing; a coordinator was serving when this copy was made, and what "
        "it decided last is in that file. Copy both while nothing serves, or restore what `musterd backup` made"
    )


class Journal:
    """One writer (any one thread at a time), and readers that see only what is committed."""

    def __init__(self, path: Path) -> None:
        """Open or create; raise JournalError for a damaged, foreign or newer file."""
        self.path = path
        self._unmoved_rows = 0
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        if _is_cut_off(path):
            raise JournalError(_cut_off(path))
        try:
            self._writer = self._connect()
            try:
                self._check()
                self._migrate()
                self._checkpoint()
                self._reader = self._connect()
            except BaseException:
                self._writer.close()
                raise
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error
        newest = self._newest()
        self._last_sequence = 0 if newest is None else newest.sequence
        self._last_ms = 0 if newest is None else newest.at_ms

    def _checkpoint(self) -> None:
        """Move the write-ahead log into the file, with a row that the next commit, in the log, takes back.

        So the file with its log is as it was, and the file alone says that something is missing; whoever
        closes it last, be it the sqlite3 command after a crash, makes it whole by itself again."""
        self._writer.execute("INSERT INTO needs_log VALUES (?)", (int(time.time() * 1000),))
        self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        self._writer.execute("DELETE FROM needs_log")
        self._unmoved_rows = 0

    def _newest(self) -> StoredRecord | None:
        """The last record; decisions go on from its number and its time."""
        try:
            last = self._read("SELECT max(sequence) FROM records")[0][0]
            found = [] if last is None else list(self.history(last - 1))
        except BaseException:
            self.close()
            raise
        return found[0] if found else None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA busy_timeout = 5000")
            connection.execute("PRAGMA wal_autocheckpoint = 0")  # see _checkpoint
        except BaseException:
            connection.close()
            raise
        return connection

    def _damaged(self, found: str) -> JournalError:
        return JournalError(
            f"journal {self.path}: damaged ({found}). Stop here, keep the file for inspection, and restore the "
            "coordinator's home from a backup; a copy of journal.db must include journal.db-wal"
        )

    def _check(self) -> None:
        found = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._damaged(found)

    def _migrate(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        application = self._writer.execute("PRAGMA application_id").fetchone()[0]
        tables = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != APPLICATION_ID and (tables or application):
            raise JournalError(
                f"journal {self.path}: an SQLite file, but not a Muster journal; name another home"
            )
        if version > len(MIGRATIONS):
            raise JournalError(
                f"journal {self.path}: written by a newer musterd (schema {version}; this one knows up to "
                f"{len(MIGRATIONS)}). Upgrade musterd, or restore a backup from before the upgrade"
            )
        wrong: list[int] = []

        def summed_anew(sequence: int, *columns: object) -> int:
            if _crc(columns[3]) != columns[5]:  # version 1 summed the body alone
                wrong.append(sequence)
            return _crc(sequence, *columns[:5])

        self._writer.create_function("summed_anew", 7, summed_anew, deterministic=True)
        self._writer.create_function("summed", -1, _crc, deterministic=True)
        for number in range(version, len(MIGRATIONS)):
            self._writer.executescript(
                f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {number + 1};"
            )
            if wrong:
                self._writer.execute("ROLLBACK")
                raise self._damaged(f"record {wrong[0]} does not match its checksum")
            self._writer.execute("COMMIT")

    def close(self) -> None:
        """Close both connections; safe to call twice."""
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------- writing

    @property
    def last_sequence(self) -> int:
        return self._last_sequence

    @property
    def last_ms(self) -> int:
        """When the newest record was decided; the coordinator's time never goes back before it."""
        return self._last_ms

    def commit(self, entries: Sequence[Entry]) -> int:
        """Write all of `entries` or, raising, none.  Returns the sequence number of the last record."""
        sequence = self._last_sequence
        at_ms = self._last_ms
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                for entry in entries:
                    for record in entry.records:
                        sequence += 1
                        at_ms = max(at_ms, record.at_ms)
                        row = (
                            sequence,
                            record.at_ms,
                            record.kind,
                            record.job_id,
                            record.body,
                            record.text,
                        )
                        self._writer.execute(
                            "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, _crc(*row))
                        )
                    self._write_steps(entry)
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            self._unmoved_rows += sum(len(entry.records) + len(entry.steps) for entry in entries)
            if self._unmoved_rows >= CHECKPOINT_ROWS:
                self._checkpoint()
        self._last_sequence = sequence
        self._last_ms = at_ms
        return sequence

    def _write_steps(self, entry: Entry) -> None:
        self._writer.executemany(
            f"INSERT INTO steps ({_STEP_COLUMNS}) VALUES ({_STEP_MARKS})",  # noqa: S608 (constants)
            [_summed(row) for row in entry.steps],
        )
        self._writer.executemany(
            "INSERT OR REPLACE INTO evaluations (job_id, step, loss, crc) VALUES (?, ?, ?, ?)",
            [_summed(row) for row in entry.evaluations],
        )
        for rollback in entry.rollbacks:
            for table in ("steps", "evaluations"):
                self._writer.execute(
                    f"DELETE FROM {table} WHERE job_id = ? AND step > ?",  # noqa: S608 (constants)
                    (rollback.job_id, rollback.to_step),
                )

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Keep the newest snapshots; the records stay, as watching resumes from them."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._writer.execute(
                    "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)",
                    (snapshot.sequence, snapshot.body, _crc(snapshot.body)),
                )
                self._writer.execute(
                    "DELETE FROM snapshots WHERE sequence NOT IN "
                    "(SELECT sequence FROM snapshots ORDER BY sequence DESC LIMIT ?)",
                    (SNAPSHOTS_KEPT,),
                )
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            self._checkpoint()

    # --------------------------------------------------------------------------- reading

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._read_lock:
                return self._reader.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def snapshot(self, at_most: int | None = None) -> Snapshot | None:
        """The newest undamaged snapshot, of at most this sequence number.

        A damaged one is passed over: the records are all there, only the start takes longer."""
        for sequence, body, crc in self._read(
            "SELECT sequence, body, crc FROM snapshots ORDER BY sequence DESC"
        ):
            if (at_most is None or sequence <= at_most) and _crc(body) == crc:
                return Snapshot(sequence=sequence, body=body)
        return None

    def history(self, after: int, until: int | None = None) -> Iterator[StoredRecord]:
        """Every record after `after`, up to `until`; raise JournalError at a hole or a damaged record."""
        expected = after + 1
        while until is None or expected <= until:
            rows = self._read(
                "SELECT sequence, at_ms, kind, job_id, body, text, crc FROM records WHERE sequence >= ? "
                "ORDER BY sequence LIMIT ?",
                (expected, PAGE_ROWS),
            )
            if not rows:
                return
            for row in rows:
                sequence = row[0]
                if until is not None and sequence > until:
                    return
                if sequence != expected:
                    raise self._damaged(f"record {expected} is missing")
                yield self._stored(row)
                expected += 1

    def records(
        self, after: int, *, job_id: str = "", kind: str = "", limit: int = PAGE_ROWS
    ) -> list[StoredRecord]:
        """One page of records after `after`, perhaps of one job or kind only."""
        where, values = "sequence > ?", [after]
        for column, value in (("job_id", job_id), ("kind", kind)):
            if value:
                where += f" AND {column} = ?"
                values.append(value)  # type: ignore[arg-type]
        rows = self._read(
            f"SELECT sequence, at_ms, kind, job_id, body, text, crc FROM records WHERE {where} "  # noqa: S608
            "ORDER BY sequence LIMIT ?",
            [*values, limit],
        )
        return [self._stored(row) for row in rows]

    def _stored(self, row: tuple[Any, ...]) -> StoredRecord:
        *columns, crc = row
        if _crc(*columns) != crc:
            raise self._damaged(f"record {columns[0]} does not match its checksum")
        sequence, at_ms, kind, job_id, body, text = columns
        return StoredRecord(sequence=sequence, at_ms=at_ms, kind=kind, job_id=job_id, body=body, text=text)

    def steps(self, job_id: str, after_step: int, limit: int = PAGE_ROWS) -> list[StepRow]:
        """One page of a job's steps after `after_step`, in order."""
        rows = self._read(
            f"SELECT {_STEP_COLUMNS} FROM steps WHERE job_id = ? AND step > ? ORDER BY step LIMIT ?",  # noqa: S608
            (job_id, after_step, limit),
        )
        return [self._row(StepRow, row) for row in rows]

    def _row(self, kind: type[T], row: tuple[Any, ...]) -> T:
        *columns, crc = row
        if _crc(*columns) != crc:
            what = "step" if kind is StepRow else "evaluation"
            raise self._damaged(f"{what} {columns[1]} of job {columns[0]} does not match its checksum")
        values = dict(zip((field.name for field in fields(kind)), columns, strict=True))
        if kind is StepRow:
            values |= {"data_digest": values["data_digest"] % 2**64, "skipped": bool(values["skipped"])}
        return kind(**values)

    def evaluations(self, job_id: str, after_step: int, until_step: int) -> list[EvaluationRow]:
        """A job's evaluations after `after_step` up to `until_step`, in order."""
        rows = self._read(
            "SELECT job_id, step, loss, crc FROM evaluations WHERE job_id = ? AND step > ? AND step <= ? ORDER BY step",
            (job_id, after_step, until_step),
        )
        return [self._row(EvaluationRow, row) for row in rows]

    def latest_steps(self, job_id: str, count: int) -> list[StepRow]:
        """A job's last `count` steps, in order."""
        newest = self._read("SELECT max(step) FROM steps WHERE job_id = ?", (job_id,))[0][0]
        return [] if newest is None else self.steps(job_id, newest - count, count)


def _summed(row: StepRow | EvaluationRow) -> tuple[object, ...]:
    """Its columns as SQLite gives them back, and their checksum."""
    columns = [_stored(getattr(row, field.name), str(field.type)) for field in fields(row)]
    return (*columns, _crc(*columns))


def _stored(value: Any, kind: str) -> object:
    if value is None or kind == "str":
        return value
    if "float" in kind:
        number = float(value)
        return None if math.isnan(number) else number
    # SQLite's integers are signed: a digest is stored as the same 64 bits.
    whole = int(value)
    return whole - 2**64 if whole >= 2**63 else whole
