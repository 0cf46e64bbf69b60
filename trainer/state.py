"""The training state as an ordered list of named tensors: its digest, and how it moves between peers.

Model parameters (and buffers) are `model.<name>`, Adam's moments `optimizer.exp_avg.<name>` and
`optimizer.exp_avg_sq.<name>`, and `optimizer.updates` counts the updates applied, which is the step
number less the skipped steps: everything else in training is a pure function of the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainer.group import Group

COLUMNS = 256
ROWS = 4096
"""A digest's tensor is read as rows of COLUMNS words of 32 bits, in chunks of ROWS rows."""

_CPU_ROWS = 256  # 256 rows of int64 are 512 KiB: the temporary stays in a core's cache
_CUDA_CHUNKS = 16  # 16 chunks of int64 are 128 MiB of temporary
_SMALL_BYTES = 1 << 20
_CHUNK_MULTIPLIER = 0x9E3779B97F4A7C15
HEAL_CHUNK_BYTES = 16 << 20


class TrainingState:
    """Views of a model's and its AdamW's live tensors.  Order and names depend on the model only."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.tensors[f"model.{name}"] = tensor.detach()
        self.parameter_names = tuple(self.tensors)
        fused = optimizer.defaults["fused"]
        # torch makes these at the first step(): a joiner needs them before, to be healed into.
        for parameter in self._parameters.values():
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, parameter in self._parameters.items():
                self.tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
        device = next(iter(self._parameters.values())).device
        self._updates = torch.zeros(1, dtype=torch.int64, device=device)
        self.tensors["optimizer.updates"] = self._updates

    def count_update(self) -> None:
        """Say that the optimizer has just applied an update."""
        self._updates += 1

    @torch.no_grad()
    def loaded(self) -> None:
        """Say that the tensors were written from outside: Adam's own counters follow `updates`."""
        updates = self._updates.to(torch.float32).squeeze()
        for parameter in self._parameters.values():
            self._optimizer.state[parameter]["step"].copy_(updates)

    @torch.no_grad()
    def reset(self, fresh: nn.Module) -> None:
        """Go back to step 0: the parameters of `fresh`, no moments, no updates."""
        source = {f"model.{name}": t for name, t in (*fresh.named_parameters(), *fresh.named_buffers())}
        for name, tensor in self.tensors.items():
            if name in source:
                tensor.copy_(source[name])
            else:
                tensor.zero_()
        self.loaded()

    def digest(self) -> str:
        """32 hex digits that depend on every bit of the state, its names, shapes and order."""
        return digest(self.tensors)

    @torch.no_grad()
    def heal(self, group: Group, source: int) -> None:
        """Copy the whole state of rank `source` to every rank of `group`.  All ranks call this.

        The state of the other ranks is undefined until it returns; check the digest then.  Data travels
        through buffers of HEAL_CHUNK_BYTES, each used once: a broadcast that was abandoned may still
        write into its buffer when a frozen peer wakes up, and must not hit a live parameter.
        """
        receiving = group.rank != source
        for chunk in _chunks(self.tensors, HEAL_CHUNK_BYTES):
            if receiving:
                staging = torch.empty(
                    sum(len(part) for part in chunk), dtype=torch.uint8, device=chunk[0].device
                )
            else:
                staging = chunk[0] if len(chunk) == 1 else torch.cat(chunk)
            group.broadcast(staging, source)
            if receiving:
                group.settle()
                torch._foreach_copy_(chunk, list(torch.split(staging, [len(part) for part in chunk])))
        group.settle()
        self.loaded()


def _chunks(tensors: dict[str, Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors' bytes in order, as lists of views of at most `limit` bytes together."""
    chunk: list[Tensor] = []
    room = limit
    for tensor in tensors.values():
        data = tensor.view(-1).view(torch.uint8)
        while len(data):
            part = data[:room]
            data = data[room:]
            chunk.append(part)
            room -= len(part)
            if room == 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


# ----------------------------------------------------------------------------------------- digest


@torch.no_grad()
def digest(tensors: dict[str, Tensor]) -> str:
    """blake2b-128 over column sums of the bits, modulo 2^64, each row with its own odd weight.

    A tensor is words w[r, c] of 32 bits, c < 256; its sums are S[c] = Σ_r weight(r)·w[r, c], where
    weight(r) = table[r mod 4096] · M^(r div 4096), odd.  Changing one word changes S[c] for certain;
    exchanging two rows of a chunk does too, since the table's entries are distinct and below 2^31; other
    changes escape with a chance of about 2^-32 or less.  This detects accidents and divergence, not
    forgery.  The order of the additions does not matter, so every device gets the same digest.
    """
    names = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        names.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    sums: list[Tensor] = []
    small: list[Tensor] = []
    for tensor in tensors.values():
        data = tensor.contiguous().view(-1).view(torch.uint8)
        if len(data) % 4:
            data = torch.cat([data, data.new_zeros(-len(data) % 4)])
        words = data.view(torch.int32)
        if len(data) < _SMALL_BYTES:
            small.append(words)
        else:
            sums.append(_column_sums(words))
    if small:
        sums.append(_column_sums(torch.cat(small)))
    names.update(torch.stack(sums).cpu().numpy().tobytes())
    return names.hexdigest()


def _column_sums(words: Tensor) -> Tensor:
    whole = len(words) // COLUMNS * COLUMNS
    table = _weights(words.device)
    block = ROWS * _CUDA_CHUNKS if words.is_cuda else _CPU_ROWS
    rows = words[:whole].view(-1, COLUMNS)
    total = torch.zeros(COLUMNS, dtype=torch.int64, device=words.device)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        first_chunk, row = divmod(start, ROWS)
        if words.is_cuda and len(part) > ROWS:
            chunks = -(-len(part) // ROWS)
            weight = torch.outer(_powers(first_chunk, chunks, words.device), table).view(-1)[: len(part)]
        else:
            weight = table[row : row + len(part)] * _signed(pow(_CHUNK_MULTIPLIER, first_chunk, 1 << 64))
        total += (part * weight[:, None]).sum(0)
    if whole < len(words):
        tail = torch.zeros(COLUMNS, dtype=torch.int32, device=words.device)
        tail[: len(words) - whole] = words[whole:]
        chunk, row = divmod(len(rows), ROWS)
        total += tail * (table[row] * _signed(pow(_CHUNK_MULTIPLIER, chunk, 1 << 64)))
    return total


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _powers(first: int, count: int, device: torch.device) -> Tensor:
    values = [_signed(pow(_CHUNK_MULTIPLIER, first + i, 1 << 64)) for i in range(count)]
    return torch.tensor(values, dtype=torch.int64, device=device)


_tables: dict[torch.device, Tensor] = {}


def _weights(device: torch.device) -> Tensor:
    """ROWS distinct odd numbers below 2^31: an odd multiplier permutes the residues modulo 2^30."""
    if device not in _tables:
        values = [2 * ((i * 0x2545F491 + 0x1234567) % (1 << 30)) + 1 for i in range(ROWS)]
        _tables[device] = torch.tensor(values, dtype=torch.int64, device=device)
    return _tables[device]
