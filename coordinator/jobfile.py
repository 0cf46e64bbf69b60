"""The coordinator's sections of a job file: name, elasticity, requirements, priority, launch.

The trainer's sections (data, model, train, checkpoint) are carried along unread, but for the two
numbers that the coordinator needs: which checkpoints to keep and how many steps there are.
Imports nothing that is not needed to check a file on the operator's machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordinator.core.model import JobSpec, Requirements
from coordinator.schema import (
    DurationMs,
    Section,
    SettingError,
    SizeBytes,
    duration_ms,
    size_bytes,
    validated,
)

__all__ = ["JobFile", "SettingError", "duration_ms", "job_spec", "parse", "size_bytes"]

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_VERSION = re.compile(r"^(\d{1,4})(?:\.(\d{1,4}))?$")
_KEEPING = {"keep": (3, 1, 1_000), "keep_every": (0, 0, 10**9), "keep_best": (0, 0, 1_000)}
"""Default, least and most of what the section `checkpoint` says about retention (trainer/config.py)."""
MAX_SPEC_BYTES = 256 * 1024


def _version(value: object) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(part) is int for part in value):
        return int(value[0]), int(value[1])
    match = _VERSION.fullmatch(str(value)) if isinstance(value, str | int | float) else None
    if match is None or isinstance(value, bool):
        raise ValueError(
            f'found {value!r}; expected MAJOR.MINOR such as "8.0" (in quotes, as 2.10 is not 2.1)'
        )
    return int(match[1]), int(match[2] or 0)


def _job_name(value: object) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"found {value!r}; expected 1 to 64 of letters, digits, '.', '_', '-', not starting with a sign"
        )
    return value


Version = Annotated[tuple[int, int], BeforeValidator(_version)]


class Elastic(Section):
    """How many agents, and how patient."""

    min_nodes: int = Field(default=1, ge=1, le=1024)
    max_nodes: int = Field(default=16, ge=1, le=1024)
    last_call: DurationMs = Field(default=2_000, le=3_600_000)
    min_generation: DurationMs = Field(default=5_000, le=86_400_000)
    step_timeout: DurationMs = Field(default=300_000, ge=1_000, le=86_400_000)
    max_failures: int = Field(default=3, ge=0, le=1_000_000)

    @model_validator(mode="before")
    @classmethod
    def _max_follows_min(cls, found: Any) -> Any:
        if isinstance(found, dict) and "max_nodes" not in found and isinstance(found.get("min_nodes"), int):
            return {**found, "max_nodes": max(16, found["min_nodes"])}
        return found

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min_nodes > self.max_nodes:
            raise ValueError(
                f"min_nodes is {self.min_nodes} but max_nodes is {self.max_nodes}; raise max_nodes"
            )
        return self


class Requires(Section):
    """What an agent must have to serve the job; nothing given means anyone."""

    backend: Literal["nccl", "gloo"] | None = None
    min_gpu_memory: SizeBytes = 0
    min_compute_capability: Version = (0, 0)
    min_torch: Version = (0, 0)
    min_disk_free: SizeBytes = 0
    labels: dict[str, str] = Field(default_factory=dict, max_length=32)


class JobFile(Section):
    """A whole job file, the trainer's sections unread."""

    name: Annotated[str, BeforeValidator(_job_name)]
    priority: int = Field(default=0, ge=-1_000, le=1_000)
    launch: Literal["muster", "torchrun"] = "muster"
    elastic: Elastic = Elastic()
    requires: Requires = Requires()
    data: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    checkpoint: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keep(self) -> JobFile:
        for name, (default, least, most) in _KEEPING.items():
            found = self.checkpoint.get(name, default)
            if type(found) is not int or not least <= found <= most:
                raise ValueError(
                    f"checkpoint.{name}: found {found!r}; expected a whole number from {least} to {most}"
                )
        return self

    def keeping(self, name: str) -> int:
        """A number of the section `checkpoint`: keep, keep_every or keep_best."""
        return int(self.checkpoint.get(name, _KEEPING[name][0]))


def parse(found: object) -> JobFile:
    """A job file (already read from YAML or JSON) as JobFile; raise SettingError."""
    return validated(JobFile, found, what="job file")


def job_spec(found: Mapping[str, Any], dataset_json: str) -> JobSpec:
    """What the core needs of a job file; `spec_json` is the file itself as canonical JSON.

    Raise SettingError, also for a file that is larger than the coordinator hands on to agents."""
    from protos import authorship  # brings cryptography along, which checking a file does not need

    job = parse(found)
    if complaint := authorship.escape(found):
        raise SettingError(f"job file: {complaint}")
    spec_json = authorship.canonical(found)
    if len(spec_json.encode()) > MAX_SPEC_BYTES:
        raise SettingError(
            f"job file: {len(spec_json.encode())} bytes as JSON; at most {MAX_SPEC_BYTES} are allowed"
        )
    requires = job.requires
    return JobSpec(
        name=job.name,
        spec_json=spec_json,
        dataset_json=dataset_json,
        launch=job.launch,
        min_nodes=job.elastic.min_nodes,
        max_nodes=job.elastic.max_nodes,
        priority=job.priority,
        requires=Requirements(
            backend=requires.backend,
            min_gpu_memory_bytes=requires.min_gpu_memory,
            min_compute_capability=requires.min_compute_capability,
            min_torch=requires.min_torch,
            min_disk_free_bytes=requires.min_disk_free,
            labels=tuple(sorted(requires.labels.items())),
        ),
        max_failures=job.elastic.max_failures,
        last_call_ms=job.elastic.last_call,
        min_generation_ms=job.elastic.min_generation,
        step_timeout_ms=job.elastic.step_timeout,
        keep_checkpoints=job.keeping("keep"),
        keep_every=job.keeping("keep_every"),
        keep_best=job.keeping("keep_best"),
    )
