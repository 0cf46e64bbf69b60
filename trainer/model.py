"""GPT-2's family of language models, their optimizer and learning-rate schedule.

Pre-norm blocks, GELU (tanh), tied embeddings, learned positions, causal scaled-dot-product attention,
as in Radford et al. 2019.  Knows nothing of processes, steps or files.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ConfigError, ModelSettings, TrainSettings

VOCAB_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, for matrix units; padded rows are never predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything that decides the names and shapes of a model's parameters."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    dropout: float = 0.0
    bias: bool = True

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def to_dict(self) -> dict[str, int | float | bool]:
        """JSON-ready; `ModelShape(**value)` reads it back.  Goes into a checkpoint's header as `model`."""
        return asdict(self)


def model_shape(settings: ModelSettings, tokenizer_vocab_size: int) -> ModelShape:
    """The shape for a dataset.  Raise ConfigError if the configured vocabulary cannot hold the tokenizer's."""
    vocab_size = settings.vocab_size or tokenizer_vocab_size
    if vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size: found {vocab_size}; allowed: at least the tokenizer's {tokenizer_vocab_size}; "
            "raise it, or leave it out to use the tokenizer's"
        )
    return ModelShape(
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        vocab_size=vocab_size,
        block_size=settings.block_size,
        dropout=settings.dropout,
        bias=settings.bias,
    )


class Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.dropout = shape.dropout
        self.c_attn = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
        return functional.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return functional.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = self.mlp(self.ln_2(x))
        return x + y


class GPT(nn.Module):
    """A language model whose `forward` is the training loss, so that DDP and compile wrap all of it.

    Parameters are float32 on the CPU after construction (move with `.to(device)`), and are a pure
    function of (shape, seed): each tensor draws from its own stream, keyed by the seed and its name.
    With `compute_dtype` bfloat16 the matrix work inside `forward` and `logits` runs under autocast;
    the loss is always float32.  `compute_dtype` may be assigned later.
    """

    def __init__(
        self, shape: ModelShape, *, seed: int = 0, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape = shape
        self.compute_dtype = compute_dtype
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            self.wte = nn.Embedding(shape.padded_vocab_size, shape.n_embd)
            self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
            self.h = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
            self.ln_f = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.to_empty(device="cpu")
        for name, parameter in self.named_parameters():
            _initialise(name, parameter, shape, seed)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of the targets.

        `x` and `y` are int64 [batch, length ≤ block_size], `y[:, t]` the token after `x[:, t]`.
        Returns a float32 scalar in nats.
        """
        logits = self.logits(x)
        return functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the next token: [batch, length, vocab_size] (exact, without padding) in the compute dtype."""
        length = x.shape[1]
        if length > self.shape.block_size:
            raise ValueError(
                f"sequence of {length} tokens: the model's block_size is {self.shape.block_size}"
            )
        with torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16, cache_enabled=True
        ):
            z = self.wte(x) + self.wpe(torch.arange(length, device=x.device))
            z = functional.dropout(z, self.shape.dropout, self.training)
            for block in self.h:
                z = block(z)
            return functional.linear(self.ln_f(z), self.wte.weight)[..., : self.shape.vocab_size]

    def flops_per_token(self, length: int) -> float:
        """Forward and backward, 6N + 12·layers·width·length (Chowdhery et al. 2022, appendix B)."""
        body = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6.0 * body + 12.0 * self.shape.n_layer * self.shape.n_embd * length


@torch.no_grad()
def _initialise(name: str, parameter: Tensor, shape: ModelShape, seed: int) -> None:
    """GPT-2's: normal(0, 0.02), residual projections scaled by 1/√(2·layers), biases 0, gains 1.

    numpy's Philox streams, because torch's CPU generator gives other numbers on other processors.
    """
    if parameter.ndim < 2:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    std = 0.02 / math.sqrt(2 * shape.n_layer) if name.endswith("c_proj.weight") else 0.02
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    values = stream.standard_normal(tuple(parameter.shape), dtype=np.float32)
    if name == "wte.weight":
        values[shape.vocab_size :] = 0.0
    parameter.copy_(torch.from_numpy(values).mul_(std))


def resolve_device(train: TrainSettings, index: int = 0) -> torch.device:
    """The device to train on.  Raise ConfigError if `train.device` asks for CUDA and there is none."""
    available = torch.cuda.is_available()
    if train.device == "cuda" and not available:
        raise ConfigError(
            "train.device: found 'cuda', but torch sees no CUDA device here; allowed here: auto or cpu; "
            "install a CUDA build of torch and a driver, or change it"
        )
    return torch.device("cuda", index) if available and train.device != "cpu" else torch.device("cpu")


def resolve_dtype(train: TrainSettings, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if train.dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if train.dtype == "bfloat16" else torch.float32


def configure_optimizer(model: nn.Module, train: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW (fused) that decays matrices and embeddings but neither gains nor biases.

    Set each group's `lr` to `learning_rate(step, train)` before every step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=1e-8, fused=fused)


def learning_rate(step: int, train: TrainSettings) -> float:
    """Step numbers begin at 1: linear warm-up to `lr`, then a cosine that reaches `min_lr` at the last step."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    return train.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (train.lr - train.min_lr)
