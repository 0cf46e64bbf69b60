"""Requirements, as sentences."""

from __future__ import annotations

import pytest

from coordinator.core.matching import unmet
from coordinator.core.model import Agent, AgentFacts, AgentId, GpuFacts, JobSpec, Requirements

GIB = 2**30


def spec(**requires: object) -> JobSpec:
    return JobSpec(
        name="job",
        spec_json="{}",
        dataset_json="",
        launch="muster",
        min_nodes=1,
        max_nodes=1,
        priority=0,
        requires=Requirements(**requires),
        max_failures=1,
        last_call_ms=0,
        min_generation_ms=0,
        step_timeout_ms=1_000,
        keep_checkpoints=1,
    )


def agent(**facts: object) -> Agent:
    return Agent(
        agent_id=AgentId("a"), name="a", certificate_serial="1", admitted_ms=0, facts=AgentFacts(**facts)
    )


CARDS = (
    GpuFacts(index=0, name="big", memory_bytes=80 * GIB, capability=(9, 0)),
    GpuFacts(index=1, name="small", memory_bytes=24 * GIB, capability=(8, 6)),
)


@pytest.mark.parametrize(
    ("requires", "facts", "sentence"),
    [
        ({"backend": "nccl"}, {}, "backend nccl is required; found gloo"),
        (
            {"min_gpu_memory_bytes": 40 * GIB},
            {"gpus": CARDS},
            "GPU memory of 40 GiB is required; found 24 GiB on the smallest card",
        ),
        ({"min_gpu_memory_bytes": GIB}, {}, "GPU memory of 1 GiB is required; found no GPU"),
        (
            {"min_compute_capability": (9, 0)},
            {"gpus": CARDS},
            "compute capability 9.0 is required; found 8.6",
        ),
        ({"min_compute_capability": (7, 0)}, {}, "compute capability 7.0 is required; found no GPU"),
        (
            {"min_torch": (2, 12)},
            {"torch_version": "2.9.1+cu128"},
            "torch 2.12 or newer is required; found 2.9.1+cu128",
        ),
        ({"min_torch": (2, 11)}, {}, "torch 2.11 or newer is required; found no torch"),
        (
            {"min_disk_free_bytes": 10 * GIB},
            {"disk_free_bytes": 512 * 2**20},
            "free disk of 10 GiB is required; found 512 MiB",
        ),
        ({"labels": (("site", "oslo"),)}, {}, "label site=oslo is required; found no such label"),
        (
            {"labels": (("site", "oslo"),)},
            {"labels": (("site", "rome"),)},
            "label site=oslo is required; found site=rome",
        ),
    ],
)
def test_an_unmet_requirement_is_a_sentence_with_what_was_found(
    requires: dict[str, object], facts: dict[str, object], sentence: str
) -> None:
    assert unmet(spec(**requires), agent(**facts)) == (sentence,)


def test_what_is_met_is_not_mentioned() -> None:
    asked = spec(
        backend="gloo",
        min_gpu_memory_bytes=24 * GIB,
        min_compute_capability=(8, 6),
        min_torch=(2, 11),
        min_disk_free_bytes=GIB,
        labels=(("site", "oslo"),),
    )
    found = agent(
        gpus=CARDS, torch_version="2.11.0", disk_free_bytes=GIB, labels=(("site", "oslo"), ("rack", "4"))
    )
    assert unmet(asked, found) == ()
    assert unmet(spec(), agent()) == ()


def test_every_unmet_requirement_is_mentioned() -> None:
    sentences = unmet(spec(backend="nccl", min_torch=(2, 11), labels=(("a", "b"),)), agent())
    assert len(sentences) == 3
