from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.test_export import save
from trainer.config import parse_config
from trainer.generate import generate, main
from trainer.model import GPT, ModelShape, configure_optimizer

SHAPE = ModelShape(n_layer=1, n_head=2, n_embd=32, vocab_size=257, block_size=16)
LINE = b"abcdefgh"


@pytest.fixture(scope="module")
def model() -> GPT:
    """Knows that the alphabet's first eight letters follow one another, for ever."""
    torch.manual_seed(0)
    model = GPT(SHAPE, seed=1)
    train = parse_config({"name": "j", "data": {"text": "x"}, "train": {"lr": 0.01}}).train
    optimizer = configure_optimizer(model, train, torch.device("cpu"))
    tokens = torch.tensor(list(LINE * 4))
    rows = torch.stack([tokens[i : i + 17] for i in range(8)])
    for _ in range(60):
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_likeliest_text_goes_on_beyond_the_block(model: GPT) -> None:
    made = list(generate(model, list(b"abc"), max_tokens=40, temperature=0, seed=1))
    assert bytes(made) == (LINE * 6)[3:43]


def test_sampling_depends_on_the_seed_only() -> None:
    untrained = GPT(SHAPE, seed=1).eval()

    def sample(seed: int) -> list[int]:
        return list(generate(untrained, [1], max_tokens=20, temperature=1.0, seed=seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generation_stops_at_the_end_of_text(model: GPT) -> None:
    made = list(generate(model, list(b"abc"), max_tokens=40, temperature=0, seed=1, end=ord("g")))
    assert bytes(made) == b"def"


def test_the_command_prints_prompt_and_continuation(
    model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, model)
    given = ["--checkpoint-dir", str(tmp_path), "--prompt", "cde", "--temperature", "0", "--max-tokens", "5"]
    assert main(given) == 0
    assert capsys.readouterr().out == "cdefghab\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", ""], "--prompt ''"),
        (["--tokenizer", "nowhere.json"], "tokenizer 'nowhere.json'"),
        (["--step", "3"], "no checkpoint of step 3"),
    ],
)
def test_bad_input_is_refused(
    model: GPT, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, model)
    assert main(["--checkpoint-dir", str(tmp_path), *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_negative_temperature_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint-dir", str(tmp_path), "--temperature", "-1"])
    assert caught.value.code == 2
    assert "allowed: 0 (likeliest token) or more" in capsys.readouterr().err
