"""A short, seeded run of the fuzz targets, without atheris."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutations import NESTED, mutated
from tests.fuzz.targets import TARGETS

ROUNDS = 300


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_refused_and_nothing_else_happens(name: str) -> None:
    target = TARGETS[name]
    rng = random.Random(name)
    for data in (*target.corpus, b"", NESTED, b"\xff" * 100):
        target.read(data)
    for _ in range(ROUNDS):
        data = mutated(rng, rng.choice(target.corpus))
        try:
            target.read(data)
        except Exception as error:
            error.add_note(f"target {name}, input {data[:2_000]!r}")
            raise
