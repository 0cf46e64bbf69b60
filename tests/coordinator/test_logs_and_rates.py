"""Small parts of the shell: log lines, rates, the clock, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import names
from coordinator.clock import Clock
from coordinator.core.model import State, Timing, Token, TokenId
from coordinator.logs import MAX_WAITING, LogBook, LogFile, NewLine
from coordinator.rates import Bucket, Buckets


def lines(count: int, job_id: str = "j1") -> list[NewLine]:
    return [NewLine(job_id=job_id, at_ms=n, agent_id="a1", line=f"line {n}") for n in range(1, count + 1)]


def test_only_the_newest_lines_of_a_job_are_kept_and_numbers_go_on(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "logs.db", lines_per_job=3)
    file.append(lines(5))
    file.append(lines(1, "j2"))
    assert [(row.sequence, row.line) for row in file.read("j1", 0)] == [
        (3, "line 3"),
        (4, "line 4"),
        (5, "line 5"),
    ]
    file.close()
    file = LogFile(tmp_path / "logs.db", lines_per_job=3)
    file.append(lines(1))
    assert [row.sequence for row in file.read("j1", 0)] == [4, 5, 6]
    assert file.newest("j1") == 6
    file.close()


def test_a_damaged_log_file_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "logs.db").write_bytes(b"not a database, not at all" * 100)
    file = LogFile(tmp_path / "logs.db", lines_per_job=3)
    file.append(lines(1))
    assert len(file.read("j1", 0)) == 1
    file.close()
    assert (tmp_path / "logs.db.damaged").exists()


async def test_lines_beyond_what_may_wait_are_dropped_and_counted(tmp_path: Path) -> None:
    book = LogBook(LogFile(tmp_path / "logs.db", lines_per_job=10))
    book.add(lines(MAX_WAITING + 7))
    assert book.dropped == 7
    await book.stop()
    with LogFileReader(tmp_path / "logs.db") as file:
        assert file.newest("j1") == MAX_WAITING


class LogFileReader:
    def __init__(self, path: Path) -> None:
        self._file = LogFile(path, 10)

    def __enter__(self) -> LogFile:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_a_bucket_allows_its_burst_and_then_its_rate() -> None:
    now = [0.0]
    bucket = Bucket(per_s=10, burst=3, monotonic=lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now[0] = 0.1
    assert [bucket.take() for _ in range(2)] == [True, False]


def test_a_bucket_charges_on_credit_of_one_burst() -> None:
    now = [0.0]
    bucket = Bucket(per_s=1, burst=3, monotonic=lambda: now[0])
    assert bucket.take()
    bucket.charge(100)
    now[0] = 3.9
    assert not bucket.take()
    now[0] = 4.1
    assert bucket.take()


def test_buckets_of_peers_do_not_mix_and_are_bounded() -> None:
    buckets = Buckets(per_s=0.001, burst=1)
    assert buckets.take("a")
    assert not buckets.take("a")
    assert buckets.take("b")
    for peer in range(Buckets.MOST):
        buckets.take(str(peer))
    assert len(buckets._buckets) == Buckets.MOST


def test_the_clock_never_goes_back_over_a_restart_or_when_the_wall_clock_is_set() -> None:
    monotonic = [100.0]
    clock = Clock(
        not_before_ms=5_000_000, largest_gap_ms=2_000, wall=lambda: 1.0, monotonic=lambda: monotonic[0]
    )
    assert clock.now_ms() == 5_000_000
    monotonic[0] += 0.25
    assert clock.now_ms() == 5_000_250


def test_time_in_which_the_process_stood_still_does_not_count() -> None:
    monotonic = [0.0]
    clock = Clock(not_before_ms=0, largest_gap_ms=500, wall=lambda: 1000.0, monotonic=lambda: monotonic[0])
    monotonic[0] += 3600
    assert clock.now_ms() == 1_000_500


def token(token_id: str) -> Token:
    return Token(
        token_id=TokenId(token_id), secret_sha256="", note="", created_ms=0, expires_ms=1, uses_left=1
    )


def test_a_prefix_names_a_thing_only_if_it_is_unique() -> None:
    state = State(timing=Timing.from_lease(1_000))
    for token_id in ("abcd0000", "abce0000"):
        state.tokens[TokenId(token_id)] = token(token_id)
    assert names.token(state, "abcd").token_id == "abcd0000"
    for ambiguous, says in (
        ("abc", "could be any of 2 tokens"),
        ("x", "there is no token 'x'"),
        ("", "there is no"),
    ):
        with pytest.raises(names.UnknownNameError, match=says):
            names.token(state, ambiguous)


def test_new_ids_have_their_form_and_are_not_taken() -> None:
    made = names.new_id("j", [])
    assert made[0] == "j"
    assert len(made) == 9
    assert made[1:].isalnum()
