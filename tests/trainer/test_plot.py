from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.plot import main, plot_losses


def test_a_loss_curve_becomes_a_png(tmp_path: Path) -> None:
    steps = [{"step": s, "loss": 5.0 / s, "generation": s // 20} for s in range(1, 50)]
    out = plot_losses(steps, [{"step": 25, "loss": 1.0}], tmp_path / "new" / "loss.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["loss.png"]


def test_the_command_reads_json_lines(tmp_path: Path) -> None:
    lines = [{"type": "step", "step": s, "loss": 1.0} for s in (1, 2)]
    lines += [{"type": "evaluation", "step": 2, "loss": 1.0}, {"type": "formed", "generation": 1}]
    file = tmp_path / "steps.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert main(["--steps", str(file), "--out", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "no step with a finite loss"), ('{"step": 1, "loss": NaN}', "no step"), ("{", "Expecting")],
)
def test_nothing_to_draw_is_said_and_no_file_is_left(
    tmp_path: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(text)
    assert main(["--steps", str(file), "--out", str(tmp_path / "loss.png")]) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]
