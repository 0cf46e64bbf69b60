"""Text to token ids and back: plain bytes, or a `tokenizers` file (GPT-2's byte-level BPE and the like)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"


class TokenizerError(Exception):
    """A tokenizer is not known, not readable or cannot be trained; the message says what is allowed."""


class ByteTokenizer:
    """Token i is byte i; token 256 ends a text."""

    kind = "byte"
    vocab_size = 257
    end_of_text: int | None = 256
    json_text: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without a closing token."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 (a text may be cut anywhere) become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def as_tokenizers_json(self) -> str:
        """The same mapping as a `tokenizers` file, so that transformers can use it."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocab = {character: byte for byte, character in enumerate(_byte_characters())}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return str(tokenizer.to_str())


class FileTokenizer:
    """A tokenizer in the JSON form of the `tokenizers` library."""

    kind = "bpe"

    def __init__(self, json_text: str, source: str) -> None:
        """Raise TokenizerError, naming `source`, if the text is no tokenizer."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"tokenizer {source}: not a tokenizer.json of `tokenizers` ({error})"
            ) from error
        self.json_text: str | None = json_text
        # A text that happens to contain the words "<|endoftext|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.end_of_text: int | None = self._tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without a closing token."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def as_tokenizers_json(self) -> str:
        assert self.json_text is not None
        return self.json_text


Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer(spec: str) -> Tokenizer:
    """`byte`, or the path of a tokenizer.json.  Raise TokenizerError."""
    if spec == "byte":
        return ByteTokenizer()
    try:
        text = Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"tokenizer {spec!r}: {error}; allowed: byte or the path of a tokenizer.json"
        ) from error
    return FileTokenizer(text, spec)


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Learn a byte-level BPE vocabulary (smaller than asked for if the text has too few pairs)."""
    if not 257 <= vocab_size <= 1_000_000:
        raise TokenizerError(f"tokenizer bpe:{vocab_size}: allowed: bpe:257 to bpe:1000000")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    # Sorted keys make the file, and with it the dataset's id, the same wherever it is trained.
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False)
    return FileTokenizer(canonical, f"bpe:{vocab_size}")


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE files write each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
