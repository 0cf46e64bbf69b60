"""The state's digest and its counters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.state import COLUMNS, ROWS, TrainingState, digest


def big() -> torch.Tensor:
    """More than one chunk, with rows of zeros in between and a tail."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS * COLUMNS + 5 * COLUMNS + 7, generator=generator)


def test_the_digest_is_known_and_the_same_in_one_piece_or_many() -> None:
    tensors = {"a": torch.arange(10, dtype=torch.float32), "b": torch.ones(3, dtype=torch.int64)}
    assert digest(tensors) == digest({name: tensor.clone() for name, tensor in tensors.items()})
    assert digest(tensors) == DIGEST


DIGEST = "d846454a4f9d63dabd46e595ebdacd06"


@given(st.integers(0, ROWS * COLUMNS + 5 * COLUMNS + 6), st.integers(0, 31))
@settings(max_examples=30, deadline=None)
def test_one_flipped_bit_anywhere_changes_the_digest(index: int, bit: int) -> None:
    tensor = big()
    before = digest({"a": tensor})
    flip = -(1 << 31) if bit == 31 else 1 << bit
    tensor.view(torch.int32)[index] ^= flip
    assert digest({"a": tensor}) != before


@pytest.mark.parametrize("other", [1, 255, ROWS, ROWS + 4])
def test_exchanged_rows_change_the_digest(other: int) -> None:
    tensor = big()
    rows = tensor[: (ROWS + 5) * COLUMNS].view(-1, COLUMNS)
    before = digest({"a": tensor})
    rows[[0, other]] = rows[[other, 0]].clone()
    assert digest({"a": tensor}) != before


def test_names_order_shape_and_dtype_are_part_of_the_digest() -> None:
    a, b = torch.zeros(4), torch.ones(4)
    digests = {
        digest({"a": a, "b": b}),
        digest({"b": b, "a": a}),
        digest({"a": b, "b": a}),
        digest({"a": a.view(2, 2), "b": b}),
        digest({"a": a, "c": b}),
        digest({"a": a.to(torch.bfloat16), "b": b}),
    }
    assert len(digests) == 6


def test_odd_sizes_have_a_digest() -> None:
    odd = torch.ones(3, dtype=torch.bfloat16)
    before = digest({"a": odd})
    odd[2] = 2.0
    assert digest({"a": odd}) != before


def test_adams_counter_is_part_of_the_state_and_restored_from_it() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.AdamW, TrainingState]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return model, optimizer, TrainingState(model, optimizer)

    def train(model: torch.nn.Module, optimizer: torch.optim.AdamW, state: TrainingState) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        state.count_update()

    first, second = make(), make()
    for _ in range(3):
        train(*first)
    assert first[2].digest() != second[2].digest()
    for name, tensor in second[2].tensors.items():
        tensor.copy_(first[2].tensors[name])
    second[2].loaded()
    train(*first)
    train(*second)
    assert first[2].digest() == second[2].digest()
    second[2].reset(torch.nn.Linear(4, 4))
    assert second[2].tensors["optimizer.updates"].item() == 0
    assert all(float(state["step"]) == 0.0 for state in second[1].state.values())
