"""Seeded damage: to bytes as bytes, and to JSON as JSON, where a flipped bit would seldom get past the parser."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, "", "x", "../../x", "\x00", 0, -1, 2**63, 10**40, 10**400, 1.5, 1e400, [], {}, [[]], {"": 0}, "ab" * 32,
)  # fmt: skip
NESTED = b"[" * 100_000


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to four changes."""
    for _ in range(rng.randint(1, 4)):
        data = _json_changed(rng, data) if rng.random() < 0.6 else _bytes_changed(rng, data)
    return data


def _bytes_changed(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
        case 2:
            return data[:at] + data[at + rng.randint(1, 9) :]
        case 3:
            return data[:at] + data[:at] + data[at:]
        case 4 if rng.random() < 0.1:
            return data[:at] + NESTED + data[at:]
        case _:
            changed = bytearray(data)
            if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            return bytes(changed)


def _json_changed(rng: random.Random, data: bytes) -> bytes:
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return _bytes_changed(rng, data)
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    match rng.randrange(4):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}x"] = holder[key]
        case 2 if isinstance(holder, list) and holder is not root:
            holder.append(holder[key])
        case _:
            holder[key] = rng.choice(ODD)
    return json.dumps(root[0]).encode()
