"""What every configuration file of the coordinator's side shares: sections that refuse unknown keys,
durations, sizes, and errors that name the field, what was found and the nearest known key.

Pydantic only, so that the `muster` command can check a job file without starting anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*$")
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\s*$")
_DURATION_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SIZE_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_MOST = 2**53


class SettingError(ValueError):
    """A configuration is wrong; the message names each field, what was found and what is allowed."""


def duration_ms(value: object) -> int:
    """`"250ms"`, `"5s"`, `"2m"`, `"24h"`, `"7d"` or a number of seconds, in milliseconds.  Raise ValueError."""
    found = _quantity(value, _DURATION, _DURATION_MS, plain=1_000)
    if found is None:
        raise ValueError(
            f'found {value!r}; expected a duration such as "250ms", "5s", "2m" or a number of seconds'
        )
    return found


def size_bytes(value: object) -> int:
    """`"64MiB"`, `"8GB"` or a number of bytes, in bytes.  Raise ValueError."""
    found = _quantity(value, _SIZE, _SIZE_BYTES, plain=1)
    if found is None:
        raise ValueError(f'found {value!r}; expected a size such as "64MiB", "8GB" or a number of bytes')
    return found


def _quantity(value: object, pattern: re.Pattern[str], units: Mapping[str, int], *, plain: int) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        scaled = value * plain
    else:
        match = pattern.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return None
        scaled = float(match[1]) * units[match[2]]
    return round(scaled) if 0 <= scaled <= _MOST else None


DurationMs = Annotated[int, BeforeValidator(duration_ms)]
SizeBytes = Annotated[int, BeforeValidator(size_bytes)]


class Section(BaseModel):
    """One mapping of a configuration file: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


def validated(model: type[SectionType], found: object, *, what: str) -> SectionType:
    """`found` as `model`; raise SettingError with one line for each thing that is wrong."""
    if not isinstance(found, Mapping):
        raise SettingError(f"{what}: expected a mapping of sections, found {type(found).__name__}")
    try:
        return model.model_validate(dict(found))
    except ValidationError as error:
        lines = [_sentence(model, dict(detail)) for detail in error.errors()]
        raise SettingError("\n".join(f"{what}: {line}" for line in lines)) from None


def _sentence(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    location = tuple(detail["loc"])
    path = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{path}: unknown key; {hint}known keys here are {', '.join(known)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[:1].lower()}{message[1:]}, found {detail['input']!r}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
