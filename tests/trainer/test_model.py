from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from trainer.config import ConfigError, ModelSettings, parse_config
from trainer.model import GPT, ModelShape, configure_optimizer, learning_rate, model_shape, resolve_dtype

CPU = torch.device("cpu")
SHAPE = ModelShape(n_layer=2, n_head=2, n_embd=32, vocab_size=70, block_size=16)


def batch(vocab_size: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def settings(**train: object):
    return parse_config({"name": "job", "data": {"text": "x"}, "train": train}).train


@pytest.mark.parametrize(
    ("preset", "parameters"), [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080)]
)
def test_presets_have_the_parameters_of_gpt2(preset: str, parameters: int) -> None:
    config = parse_config({"name": "job", "data": {"text": "x"}, "model": {"preset": preset}}).model
    shape = model_shape(config, 50_257)
    # GPT-2 publishes its sizes without padding; ours adds rows to the embedding only.
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd
    block = 12 * shape.n_embd**2 + 13 * shape.n_embd
    embeddings = (shape.padded_vocab_size + shape.block_size + 2) * shape.n_embd
    assert shape.n_layer * block + embeddings - padding == parameters


def test_the_formula_of_the_parameter_count_is_the_model() -> None:
    n = sum(p.numel() for p in GPT(SHAPE).parameters())
    assert n == 2 * (12 * 32**2 + 13 * 32) + (128 + 16 + 2) * 32


def test_the_tiny_preset_has_under_a_million_parameters() -> None:
    config = parse_config({"name": "job", "data": {"text": "x"}}).model
    assert 5e5 < sum(p.numel() for p in GPT(model_shape(config, 257)).parameters()) < 1e6


def test_initial_parameters_are_a_function_of_seed_and_shape() -> None:
    torch.manual_seed(1)
    first = GPT(SHAPE, seed=7).state_dict()
    torch.manual_seed(2)
    torch.rand(10)
    second = GPT(SHAPE, seed=7).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], GPT(SHAPE, seed=8).state_dict()["wte.weight"])


def test_initialisation_is_gpt2s() -> None:
    state = GPT(ModelShape(n_layer=8, n_head=2, n_embd=128, vocab_size=500, block_size=64)).state_dict()
    assert state["h.3.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["h.3.mlp.c_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert state["h.3.ln_1.weight"].eq(1).all()
    assert state["h.3.mlp.c_fc.bias"].eq(0).all()


def test_forward_is_the_mean_cross_entropy_of_logits() -> None:
    model = GPT(SHAPE, seed=1)
    x, y = batch()
    logits = model.logits(x)
    assert logits.shape == (3, 16, 70)  # padding of the vocabulary is not shown
    loss = model(x, y)
    assert loss.dtype == torch.float32
    assert loss.ndim == 0
    assert torch.allclose(loss, functional.cross_entropy(logits.reshape(-1, 70), y.reshape(-1)))
    assert loss.item() == pytest.approx(math.log(70), abs=0.3)


def test_padded_rows_of_the_embedding_never_learn() -> None:
    model = GPT(SHAPE, seed=1)
    model(*batch()).backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad[70:].eq(0).all()
    assert model.wte.weight.grad[:70].ne(0).any()


def test_attention_looks_back_only() -> None:
    model = GPT(SHAPE, seed=1)
    x, _ = batch()
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 70
    before, after = model.logits(x), model.logits(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_bfloat16_compute_gives_nearly_the_same_float32_loss() -> None:
    model = GPT(SHAPE, seed=1)
    exact = model(*batch())
    model.compute_dtype = torch.bfloat16
    rough = model(*batch())
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    assert model.logits(batch()[0]).dtype == torch.bfloat16


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 16"):
        GPT(SHAPE).logits(torch.zeros(1, 17, dtype=torch.int64))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    config = ModelSettings(preset="tiny", vocab_size=100, n_layer=1, n_head=1, n_embd=8, block_size=8)
    with pytest.raises(ConfigError, match="found 100; allowed: at least the tokenizer's 257"):
        model_shape(config, 257)
    assert model_shape(config, 90).vocab_size == 100


def test_weight_decay_spares_gains_and_biases() -> None:
    model = GPT(SHAPE)
    optimizer = configure_optimizer(model, settings(weight_decay=0.3), CPU)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim < 2 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_the_optimizer_learns_one_batch_by_heart() -> None:
    model = GPT(SHAPE, seed=1)
    optimizer = configure_optimizer(model, settings(lr=0.01), CPU)
    losses = []
    for _ in range(30):
        loss = model(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_learning_rate_warms_up_and_follows_a_cosine_down() -> None:
    train = settings(steps=110, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert learning_rate(1, train) == pytest.approx(0.1)
    assert learning_rate(10, train) == pytest.approx(1.0)
    assert learning_rate(60, train) == pytest.approx(0.55)
    assert learning_rate(110, train) == pytest.approx(0.1)
    assert learning_rate(1000, train) == pytest.approx(0.1)
    assert learning_rate(1, settings(steps=10, lr=1.0)) < 1.0  # without a warm-up the cosine begins at once


def test_dtype_auto_is_float32_on_a_cpu() -> None:
    assert resolve_dtype(settings(), CPU) == torch.float32
    assert resolve_dtype(settings(dtype="bfloat16"), CPU) == torch.bfloat16
