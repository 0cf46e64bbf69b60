"""The coordinator may die at any moment: nothing that it acknowledged is forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.crash.crash import Crash


def test_nothing_acknowledged_is_forgotten_and_no_generation_is_disturbed(tmp_path: Path) -> None:
    done = asyncio.run(Crash(tmp_path, jobs=2, seed=5).run(kills=4))
    assert done.kills == 4
    assert done.steps > 4
    assert done.checkpoints > 0
