"""What workers print: a bounded number of lines for each job, in a file of its own.

Lines are not promised to survive a loss of power, so they neither wait for the journal nor hold it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coordinator.bell import Bell

FLUSH_S = 0.1
MAX_WAITING = 20_000
PAGE_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    sequence: int
    at_ms: int
    agent_id: str
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLine:
    job_id: str
    at_ms: int
    agent_id: str
    line: str


class LogFile:
    """The SQLite file.  Blocking; one writer thread, and readers under a lock."""

    def __init__(self, path: Path, lines_per_job: int) -> None:
        self._lines_per_job = lines_per_job
        self._lock = threading.Lock()
        self._db = self._open(path)
        self._next: dict[str, int] = {
            job_id: newest + 1
            for job_id, newest in self._db.execute("SELECT job_id, max(sequence) FROM logs GROUP BY job_id")
        }

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        """Lines are worth less than a start: a damaged file is put aside and a new one begun."""
        try:
            return LogFile._connect(path)
        except sqlite3.DatabaseError:
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            path.replace(path.with_name(path.name + ".damaged"))
            return LogFile._connect(path)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS logs (job_id TEXT NOT NULL, sequence INTEGER NOT NULL, at_ms INTEGER "
                "NOT NULL, agent_id TEXT NOT NULL, line TEXT NOT NULL, PRIMARY KEY (job_id, sequence)) WITHOUT ROWID"
            )
            db.execute("SELECT job_id, max(sequence) FROM logs GROUP BY job_id").fetchall()
        except BaseException:
            db.close()
            raise
        return db

    def append(self, lines: Sequence[NewLine]) -> None:
        """Number and keep the lines; the oldest beyond the bound go."""
        rows = []
        for line in lines:
            sequence = self._next.get(line.job_id, 1)
            self._next[line.job_id] = sequence + 1
            rows.append((line.job_id, sequence, line.at_ms, line.agent_id, line.line))
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT INTO logs VALUES (?, ?, ?, ?, ?)", rows)
                for job_id in {line.job_id for line in lines}:
                    self._db.execute(
                        "DELETE FROM logs WHERE job_id = ? AND sequence < ?",
                        (job_id, self._next[job_id] - self._lines_per_job),
                    )
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def read(self, job_id: str, after: int, limit: int = PAGE_ROWS) -> list[LogRow]:
        """One page of a job's lines after `after`."""
        with self._lock:
            rows = self._db.execute(
                "SELECT sequence, at_ms, agent_id, line FROM logs WHERE job_id = ? AND sequence > ? "
                "ORDER BY sequence LIMIT ?",
                (job_id, after, limit),
            ).fetchall()
        return [LogRow(sequence=row[0], at_ms=row[1], agent_id=row[2], line=row[3]) for row in rows]

    def newest(self, job_id: str) -> int:
        """Sequence number of a job's last line; 0 without any."""
        return self._next.get(job_id, 1) - 1

    def close(self) -> None:
        self._db.close()


class LogBook:
    """Takes lines without waiting and writes them a little later, together."""

    def __init__(self, file: LogFile) -> None:
        self.bell = Bell()
        self.dropped = 0
        self._file = file
        self._waiting: list[NewLine] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="logs")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="log lines")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._flush()
        self._thread.shutdown()
        self._file.close()

    def add(self, lines: Sequence[NewLine]) -> None:
        """Take the lines; those beyond the bound of what may wait are dropped and counted."""
        room = MAX_WAITING - len(self._waiting)
        self._waiting.extend(lines[:room])
        self.dropped += max(0, len(lines) - room)

    async def read(self, job_id: str, after: int) -> list[LogRow]:
        return await asyncio.to_thread(self._file.read, job_id, after)

    def newest(self, job_id: str) -> int:
        return self._file.newest(job_id)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._flush()

    async def _flush(self) -> None:
        if not self._waiting:
            return
        lines, self._waiting = self._waiting, []
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._file.append, lines)
        except sqlite3.Error:
            # A full disk must not end training for the sake of its output.
            self.dropped += len(lines)
        self.bell.ring()
