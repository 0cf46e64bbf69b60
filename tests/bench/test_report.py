from __future__ import annotations

import io
import json

import pytest

from bench.report import Row, emit


def row(*samples: float | None, goal: float | None = None, metric: str = "recovery_s") -> Row:
    return Row.of(samples, case="freeze", system="muster", metric=metric, unit="s", goal=goal)


def test_summary_has_median_and_range() -> None:
    made = row(3.0, 1.0, 2.0)
    assert (made.median, made.min, made.max, made.n) == (2.0, 1.0, 3.0, 3)


def test_measurement_beyond_its_limit_is_slower_than_all_others() -> None:
    made = row(1.0, None, 2.0)
    assert (made.median, made.min, made.max, made.n) == (2.0, 1.0, None, 3)
    assert made.note == "1 of 3 not within the limit"


def test_median_is_unknown_when_most_measurements_ran_into_the_limit() -> None:
    made = row(1.0, None, None, goal=5.0)
    assert made.median is None
    assert made.met is False


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    made = row(goal=5.0)
    assert (made.median, made.n, made.met) == (None, 0, None)


@pytest.mark.parametrize(("median", "met"), [(0.9, False), (0.95, True), (0.99, True)])
def test_goodput_is_better_when_it_is_higher(median: float, met: bool) -> None:
    assert row(median, goal=0.95, metric="goodput").met is met


@pytest.mark.parametrize(("median", "met"), [(0.1, True), (0.15, True), (0.2, False)])
def test_seconds_are_better_when_they_are_fewer(median: float, met: bool) -> None:
    assert row(median, goal=0.15).met is met


def test_json_is_one_list_with_the_nine_keys_and_nothing_else() -> None:
    out = io.StringIO()
    emit([row(1.0), row(None)], as_json=True, out=out)
    first, second = json.loads(out.getvalue())
    keys = {"case", "system", "metric", "unit", "median", "min", "max", "n", "goal"}
    assert set(first) == keys
    assert set(second) == keys | {"note"}
    assert second["median"] is None


def test_table_shows_what_was_missed() -> None:
    out = io.StringIO()
    emit([row(None, goal=1.0)], as_json=False, out=out)
    assert "not in limit" in out.getvalue()
    assert "≤ 1" in out.getvalue()
