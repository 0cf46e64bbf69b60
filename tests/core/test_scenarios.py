"""Each transcript in scenarios/ is a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.scenario import Scenario

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_transcript_holds(path: Path) -> None:
    Scenario().run(path)


def test_transcripts_are_found() -> None:
    assert len(SCENARIOS) >= 15


def test_a_wrong_expectation_is_noticed_with_its_line(tmp_path: Path) -> None:
    transcript = tmp_path / "wrong.txt"
    transcript.write_text("job tiny min 1 max 1\nagent a joins\nagent a ready\nexpect plan 1 [b]\n")
    with pytest.raises(AssertionError, match=r"wrong\.txt:4"):
        Scenario().run(transcript)
