"""Configuration and job files: everything wrong is named, with what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator import config, jobfile
from coordinator.core.model import Requirements, Timing
from coordinator.schema import SettingError, duration_ms, size_bytes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("written", "milliseconds"),
    [
        ("250ms", 250),
        ("5s", 5_000),
        ("2m", 120_000),
        ("1.5h", 5_400_000),
        ("7d", 604_800_000),
        (3, 3_000),
        (0.25, 250),
    ],
)
def test_durations_have_units_or_are_seconds(written: object, milliseconds: int) -> None:
    assert duration_ms(written) == milliseconds


@pytest.mark.parametrize(
    ("written", "size"), [("64MiB", 64 << 20), ("8GB", 8 * 10**9), (17, 17), ("1.5KiB", 1536), ("5 B", 5)]
)
def test_sizes_have_units_or_are_bytes(written: object, size: int) -> None:
    assert size_bytes(written) == size


@pytest.mark.parametrize(
    "written", ["5", "5 weeks", "-3s", -1, True, None, [], "1e400s", float("inf"), "5s\n5s"]
)
def test_what_is_no_duration_is_refused_with_examples(written: object) -> None:
    with pytest.raises(ValueError, match=r"expected a duration such as"):
        duration_ms(written)


def test_the_shipped_config_is_the_defaults() -> None:
    assert config.load(ROOT / "configs/coordinator.yaml") == config.CoordinatorConfig()


def test_the_whole_budget_follows_from_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lease: 2s\n")
    assert config.load(path).budget() == Timing.from_lease(2_000)
    path.write_text("lease: 2s\ntiming: {grace: 300ms}\n")
    assert config.load(path).budget().grace_ms == 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "lease: 2s\ntiming: {heartbeat: 1s}",
            "timing.heartbeat is 1000 ms but must be less than half of lease",
        ),
        ("lease: 2s\ntiming: {grace: 3s}", "timing.grace is 3000 ms but must not exceed lease"),
        ("timing: {rebuild_timeout: 600ms}", "timing.rebuild_timeout is 600 ms but must not be less than"),
        (
            "timing: {prepare_timeout: 15s}",
            "timing.prepare_timeout is 15000 ms but must not be less than lease",
        ),
        ("timing: {quarantine_base: 2h}", "timing.quarantine_base is 7200000 ms but must not exceed"),
        ("lease: 10 parsecs", "lease: found '10 parsecs'; expected a duration"),
        ("leese: 10s", "leese: unknown key; did you mean 'lease'?"),
        ("blobs: {reserv: 1GiB}", "blobs.reserv: unknown key; did you mean 'reserve'?"),
        ("listen: {main: nowhere}", "listen.main: address 'nowhere': expected HOST:PORT"),
        ("lease: [", "not YAML"),
        ("- a", "expected a mapping of sections, found list"),
        ("lease: 1ms", "lease: input should be greater than or equal to 200, found"),
    ],
)
def test_a_bad_config_names_the_file_and_the_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingError) as error:
        config.load(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_an_absent_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"absent\.yaml: cannot be read"):
        config.load(tmp_path / "absent.yaml")


JOB: dict[str, Any] = {
    "name": "demo",
    "elastic": {"min_nodes": 2, "max_nodes": 4, "last_call": "1s", "step_timeout": "1m", "max_failures": 5},
    "requires": {
        "backend": "nccl",
        "min_gpu_memory": "16GiB",
        "min_compute_capability": "8.0",
        "min_torch": "2.11",
        "min_disk_free": "1GB",
        "labels": {"site": "home"},
    },
    "priority": 3,
    "train": {"steps": 10},
    "checkpoint": {"keep": 2},
}


def test_a_job_file_becomes_what_the_core_decides_by() -> None:
    spec = jobfile.job_spec(JOB, "{}")
    assert (spec.name, spec.min_nodes, spec.max_nodes, spec.priority) == ("demo", 2, 4, 3)
    assert (spec.last_call_ms, spec.step_timeout_ms, spec.max_failures, spec.keep_checkpoints) == (
        1_000,
        60_000,
        5,
        2,
    )
    assert spec.requires == Requirements(
        backend="nccl",
        min_gpu_memory_bytes=16 << 30,
        min_compute_capability=(8, 0),
        min_torch=(2, 11),
        min_disk_free_bytes=10**9,
        labels=(("site", "home"),),
    )
    assert json.loads(spec.spec_json) == JOB
    assert spec.dataset_json == "{}"


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem != "coordinator"), ids=str
)
def test_every_shipped_job_file_is_accepted(path: Path) -> None:
    jobfile.job_spec(yaml.safe_load(path.read_text()), "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a b"}, "name: found 'a b'; expected 1 to 64"),
        ({"nmae": 1}, "nmae: unknown key; did you mean 'name'?"),
        ({"elastic": {"min_node": 1}}, "elastic.min_node: unknown key; did you mean 'min_nodes'?"),
        ({"elastic": {"min_nodes": 3, "max_nodes": 2}}, "elastic: min_nodes is 3 but max_nodes is 2"),
        (
            {"elastic": {"max_nodes": 5000}},
            "elastic.max_nodes: input should be less than or equal to 1024, found 5000",
        ),
        ({"requires": {"backend": "mpi"}}, "requires.backend: input should be 'nccl' or 'gloo', found 'mpi'"),
        ({"requires": {"min_torch": "new"}}, "requires.min_torch: found 'new'; expected MAJOR.MINOR"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep: found 0"),
        ({"checkpoint": {"keep_every": -1}}, "checkpoint.keep_every: found -1; expected a whole number"),
        ({"checkpoint": {"keep_best": True}}, "checkpoint.keep_best: found True"),
        ({"launch": "slurm"}, "launch: input should be 'muster' or 'torchrun'"),
    ],
)
def test_a_bad_job_file_names_the_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as error:
        jobfile.job_spec({**JOB, **change}, "")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("written", "bucket"),
    [
        ("directory", None),
        ("s3://muster", ("muster", "")),
        ("s3://muster/", ("muster", "")),
        ("s3://my.bucket/fleets/one/", ("my.bucket", "fleets/one")),
    ],
)
def test_blobs_live_in_a_directory_or_a_bucket(written: str, bucket: tuple[str, str] | None) -> None:
    assert config.Blobs.model_validate({"store": written}).bucket() == bucket


@pytest.mark.parametrize(
    ("blobs", "message"),
    [
        ({"store": "s3:/muster"}, "expected directory or s3://BUCKET/PREFIX"),
        ({"store": "/srv/blobs"}, "expected directory or s3://BUCKET/PREFIX"),
        ({"store": "s3://Key:secret@host/x"}, "expected directory or s3://BUCKET/PREFIX"),
        ({"s3": {"endpoint": "s3.example.org"}}, "expected http"),
        ({"s3": {"endpoint": "https://key:secret@s3.example.org"}}, "and no key"),
        ({"s3": {"access_key_id": "k"}}, "access_key_id"),
        ({"s3": {"url_expiry": "30d"}}, "url_expiry"),
    ],
)
def test_a_store_that_cannot_be_reached_as_written_is_refused(blobs: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        config.validated(config.CoordinatorConfig, {"blobs": blobs}, what="config")
    assert "secret" not in str(error.value)
