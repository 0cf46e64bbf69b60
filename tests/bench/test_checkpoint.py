"""The checkpoint benchmarks, with a state so small that they only show that they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.checkpoint import Settings, beside, durable, restore, stall, upload
from bench.gpu_checkpoint import rows_of
from bench.report import Row
from bench.saving import Timings, shape_of


@pytest.fixture
def tiny(tmp_path: Path) -> Settings:
    return Settings(state_mb=2.0, repeats=2, tokens=16, directory=tmp_path)


def by_name(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.system, row.metric): row for row in rows}


def test_a_snapshot_is_measured_in_a_world_of_two_beside_a_copy(tiny: Settings) -> None:
    rows = by_name(stall(tiny))
    held, copied = rows["muster", "stall_s"], rows["memory copy", "copy_s"]
    assert held.n == tiny.repeats
    assert held.goal == copied.median
    assert copied.min is not None
    assert copied.min > 0


def test_the_disk_and_the_way_back_are_measured_beside_plain_writing_and_reading(tiny: Settings) -> None:
    for measure, share in ((durable, "of_dd"), (restore, "of_cold_read")):
        row = by_name(measure(tiny))["muster", share]
        assert (row.n, row.goal) == (tiny.repeats, 0.8)
        assert row.median is not None
        assert row.median > 0
    assert list(tiny.directory.iterdir()) == [], "nothing is left behind"


def test_uploads_are_measured_through_a_real_coordinator(tiny: Settings) -> None:
    rows = upload(tiny)
    assert {row.metric for row in rows} == {"mib_per_s", "rss_growth_mib"}
    assert all(row.n == tiny.repeats for row in rows)
    assert list(tiny.directory.iterdir()) == []


# torch's own: DCP says that there is no process group, which is meant, on a thread of its own too.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_three_systems_save_the_same_state(tiny: Settings) -> None:
    rows = by_name(beside(tiny))
    assert {system for system, _ in rows} == {"muster", "dcp async_save", "torch.save"}
    for (system, metric), row in rows.items():
        assert row.median is not None, (system, metric)
        assert row.median <= rows[system, "total_s"].median


def test_the_state_is_about_as_large_as_asked() -> None:
    for megabytes in (2.0, 20.0, 300.0):
        shape = shape_of(megabytes)
        parameters = 48 * shape.n_embd**2 + (320 + 256) * shape.n_embd
        assert 0.7 < parameters * 12 / 1e6 / megabytes < 1.1


def test_a_cards_stall_is_what_its_step_took_longer() -> None:
    found = Timings(
        copy_s=[0.03], take_s=[0.001], wait_s=[0.002], quiet_s=[0.2, 0.2], first_s=[0.23], beside_s=[0.202]
    )
    rows = by_name(rows_of(found, "case"))
    assert rows["muster", "stall_ms"].median == pytest.approx(30)
    assert rows["muster", "stall_ms"].goal == pytest.approx(50)
    assert rows["muster", "later_steps_slower"].median == pytest.approx(1)


def test_the_card_benchmark_can_be_rehearsed(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "bench.gpu_checkpoint", "--device", "cpu", "--json", "--state-mb", "2"),
        *("--checkpoints", "2", "--quiet", "2", "--tokens", "16", "--sequences", "1"),
        *("--directory", str(tmp_path)),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        cwd=root,
        env={"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert [row["metric"] for row in rows][:4] == ["step_ms", "copy_ms", "host_held_ms", "stall_ms"]
    assert json.loads((tmp_path / "gpu_checkpoint.json").read_text())["rows"] == rows
