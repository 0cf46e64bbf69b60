"""A fleet whose blobs live in a bucket: real processes, and a real S3 server between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.coordinator.s3_server import BUCKET, KEY, REGION, s3_server
from tests.e2e.fleet import Fleet
from tests.e2e.oracle import check_exactly_once, check_slices

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_when_everyone_dies_strangers_without_a_key_go_on_from_the_bucket(
    tmp_path: Path, make_config: Callable[..., dict[str, Any]], dataset: Path
) -> None:
    key = tmp_path / "key.json"
    key.write_text(
        json.dumps({"access_key_id": KEY.access_key_id, "secret_access_key": KEY.secret_access_key})
    )
    key.chmod(0o600)
    config = make_config(steps=100_000)
    root = tmp_path / "f"
    root.mkdir()
    with s3_server(tmp_path) as server:
        s3 = {"endpoint": server.url, "region": REGION, "credentials": str(key)}
        with Fleet(root=root, blobs={"store": f"s3://{BUCKET}/fleet", "s3": s3}) as fleet:
            job = fleet.submit(config)
            fleet.start_agent("first")
            committed = fleet.wait_event(
                lambda kind, record: kind == "ManifestCommitted" and record["checkpoint"]["step"] >= 20,
                "a checkpoint at step 20 or later",
                job=job,
            )
            fleet.agents["first"].kill()
            fleet.start_agent("second")
            resumed = fleet.wait_event(
                lambda kind, _: kind == "GenerationPlanned", "a plan", job=job, after=committed.sequence
            )
            from_step = json.loads(resumed.json)["generation"]["from_checkpoint_step"]
            assert from_step >= 20
            fleet.wait_step(job, from_step + 30)
            fleet.muster("job", "stop", job)
            view = fleet.wait_end(job)
            assert view["phase"] == "COMPLETED", view
            steps = fleet.steps(job)
            check_exactly_once(steps, view["committed_step"])
            check_slices(steps, config, dataset)
            assert fleet.muster("checkpoint", "verify", job)["sound"] is True
        # "query" is how a presigned URL is signed: what agents asked. The coordinator signs in headers.
        asked = {(method, path.split("/")[3]) for how, method, path, _ in server.requests() if how == "query"}
    assert ("PUT", "incoming") in asked
    assert ("GET", "blobs") in asked
    assert {method for method, _ in asked} == {"PUT", "GET"}
    assert not (fleet.home / "blobs").exists()
    seen = [path for path in root.rglob("*") if path.is_file()]
    assert root / "second.log" in seen
    for path in seen:
        assert KEY.secret_access_key.encode() not in path.read_bytes(), path
        if path.suffix == ".log":
            assert b"X-Amz-Signature" not in path.read_bytes(), path
