from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from trainer.checkpoint import CheckpointDirectory, layout, make_header, make_manifest, state_specs
from trainer.config import parse_config
from trainer.export import export, load_model, main
from trainer.model import GPT, ModelShape
from trainer.tokenizer import END_OF_TEXT, ByteTokenizer, train_bpe

CONFIG = parse_config({"name": "job", "data": {"text": "x"}, "checkpoint": {"shard_bytes": "64KiB"}})


def trained(shape: ModelShape) -> GPT:
    """A model whose every parameter, biases and gains too, is away from its start."""
    model = GPT(shape, seed=3)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream))
    return model.eval()


def save(root: Path, model: GPT, step: int = 7) -> None:
    directory = CheckpointDirectory(root)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer.exp_avg.{name}": torch.zeros(p.shape) for name, p in model.named_parameters()}
    specs = state_specs(tensors)
    header = make_header(CONFIG, model.shape, specs, step=step, tokens=1, dataset="d")
    files = [directory.write_shard(s, tensors) for s in layout(specs, header["shard_bytes"])]
    directory.write_manifest(
        make_manifest(job="j", step=step, generation=1, state_digest="", header=header, shards=files)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_logits(tmp_path: Path, bias: bool) -> None:
    shape = ModelShape(n_layer=2, n_head=4, n_embd=64, vocab_size=257, block_size=32, bias=bias)
    model = trained(shape)
    save(tmp_path / "checkpoints", model)
    status = main(["--checkpoint-dir", str(tmp_path / "checkpoints"), "--out", str(tmp_path / "hf")])
    assert status == 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    x = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, expected = theirs(x).logits, model.logits(x)
        loss = theirs(x, labels=x).loss
    assert found.shape == (2, 32, 257)
    assert torch.allclose(found, expected, atol=1e-4)
    assert loss.item() == pytest.approx(model(x[:, :-1], x[:, 1:]).item(), abs=1e-4)


def test_the_byte_tokenizer_goes_along_for_transformers(tmp_path: Path) -> None:
    save(tmp_path / "c", trained(ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=257, block_size=16)))
    export(tmp_path / "c", tmp_path / "hf", step=7, form="hf", tokenizer=ByteTokenizer())
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    text = "def café():\n\treturn '日本' \x00 end"
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert theirs.eos_token_id == 256
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 256


def test_a_bpe_tokenizer_goes_along_as_it_is(tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text to learn from, some more text"] * 9, 270)
    shape = ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=tokenizer.vocab_size, block_size=16)
    save(tmp_path / "c", trained(shape))
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.as_tokenizers_json())
    status = main(
        ["--checkpoint-dir", str(tmp_path / "c"), "--out", str(tmp_path / "hf"), "--tokenizer", str(file)]
    )
    assert status == 0
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert theirs("some more text")["input_ids"] == tokenizer.encode("some more text")
    assert theirs.eos_token == END_OF_TEXT


def test_plain_safetensors_have_our_names_and_the_shape(tmp_path: Path) -> None:
    model = trained(ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=16))
    save(tmp_path / "c", model)
    export(tmp_path / "c", tmp_path / "out", step=None, form="safetensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert ModelShape(**json.loads((tmp_path / "out" / "model.json").read_text())) == model.shape
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())


def test_the_step_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    shape = ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=16)
    save(tmp_path / "c", trained(shape), step=7)
    save(tmp_path / "c", GPT(shape), step=9)
    model, step = load_model(CheckpointDirectory(tmp_path / "c"), 7)
    assert step == 7
    assert torch.equal(model.wte.weight, trained(shape).wte.weight)
    assert load_model(CheckpointDirectory(tmp_path / "c"))[1] == 9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--step", "8"], "no checkpoint of step 8; steps here: 7"),
        (["--checkpoint-dir", "{tmp}/nowhere"], "no checkpoint; steps here: none"),
        (["--out", "{tmp}/c"], "exists already"),
        (["--tokenizer", "byte"], "has 257 tokens but the model knows 70"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "c", GPT(ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=16)))
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    status = main(["--checkpoint-dir", str(tmp_path / "c"), "--out", str(tmp_path / "hf"), *given])
    assert status == 1
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_a_damaged_shard_stops_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "c", GPT(ModelShape(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=16)))
    for blob in (tmp_path / "c" / "blobs").iterdir():
        blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
    assert main(["--checkpoint-dir", str(tmp_path / "c"), "--out", str(tmp_path / "hf")]) == 1
    assert "step 7: shard 0" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
