"""Let a checkpoint's model continue a text.

python -m trainer.generate --checkpoint-dir DIR [--step N] --tokenizer byte|FILE.json --prompt TEXT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.checkpoint import CheckpointDirectory, CheckpointError
from trainer.export import load_model
from trainer.model import GPT
from trainer.tokenizer import TokenizerError, load_tokenizer


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], *, max_tokens: int, temperature: float, seed: int, end: int | None = None
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens that follow `prompt` (not empty), stopping at `end`.

    Temperature 0 takes the likeliest token; equal seeds give equal text on one machine.
    """
    stream = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        x = torch.tensor([tokens[-model.shape.block_size :]])
        scores = model.logits(x)[0, -1].float()
        if temperature == 0:
            token = int(scores.argmax())
        else:
            chances = torch.softmax(scores / temperature, dim=0)
            token = int(torch.multinomial(chances, 1, generator=stream))
        if token == end:
            return
        tokens.append(token)
        yield token


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.generate", description="Continue a text.")
    parser.add_argument("--checkpoint-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--step", type=int, help="which checkpoint (the newest)")
    parser.add_argument("--tokenizer", default="byte", metavar="byte|FILE.json")
    parser.add_argument("--prompt", default="\n", help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.temperature < 0:
        parser.error(f"--temperature: found {options.temperature}; allowed: 0 (likeliest token) or more")
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        model, _ = load_model(CheckpointDirectory(options.checkpoint_dir), options.step)
    except (CheckpointError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    prompt = tokenizer.encode(options.prompt)
    if not prompt or max(prompt) >= model.shape.vocab_size:
        print(
            f"error: --prompt {options.prompt!r}: gives the tokens {prompt[:8]}…; allowed: at least one, all below "
            f"the model's {model.shape.vocab_size}; give another prompt or the dataset's own --tokenizer",
            file=sys.stderr,
        )
        return 1
    made = generate(
        model,
        prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        end=tokenizer.end_of_text,
    )
    print(options.prompt + tokenizer.decode(list(made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
