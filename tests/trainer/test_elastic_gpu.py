"""The same generations over real NCCL: three ranks on one card, talking through sockets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer.fleet import Fleet, job, make_dataset
from trainer import control

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    spec = job(make_dataset(tmp_path / "words"), step_delay_ms=20, device="cuda")
    fleet = Fleet(tmp_path, spec)
    yield fleet
    fleet.close()


def test_kills_freezes_and_joins_over_nccl_leave_the_loss_curve_alone(fleet: Fleet) -> None:
    first, second, third, fourth, alone = fleet.start(5)
    fleet.form([alone], source="fresh")
    fleet.wait_step([alone], 150)
    undisturbed = alone.losses()
    alone.kill()

    fleet.form([first, second, third], source="fresh")
    fleet.wait_step([first, second, third], 10)
    third.kill()
    formed = fleet.form([first, second])
    assert not any(f.healed for f in formed)
    fleet.wait_step([first, second], 30)
    formed = fleet.form([first, second, fourth], cut="after_step")
    assert [f.healed for f in formed] == [False, False, True]
    assert len({f.state_digest for f in formed}) == 1
    fleet.wait_step([first, second, fourth], 50)
    second.signal(signal.SIGSTOP)
    fleet.wait_activity([first, fourth], "reducing")
    fleet.form([first, fourth])
    fleet.wait_step([first, fourth], 70)
    for worker in (first, fourth):
        steps = worker.all(control.Step)
        assert [s.step for s in steps] == list(range(steps[0].step, steps[0].step + len(steps)))
        for step in steps:
            if step.step in undisturbed:
                assert step.loss == pytest.approx(undisturbed[step.step], rel=1e-3)
