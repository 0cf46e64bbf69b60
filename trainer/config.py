"""The training side of a job file: what to train, on which data, how, and where to keep checkpoints.

The sections `elastic`, `requires`, `priority` and `launch` of the same file belong to the coordinator
(`coordinator/jobfile.py`) and are passed over here.  This module imports neither torch nor anything of
ours, so that a bad job file is refused on the operator's machine before anything is sent.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

MOST_PERIOD = 65_536
"""Bound on the sum of a mixture's weights (`trainer/mixture.py`)."""

COORDINATOR_SECTIONS = ("elastic", "requires", "priority", "launch")

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 512},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024},
    "large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "block_size": 1024},
}
"""GPT-2's family (Radford et al. 2019, table 2) and one that learns on a laptop in a minute."""


class ConfigError(Exception):
    """A job file cannot be used.  The message has one line per problem: field, found, allowed, what to do."""


# ------------------------------------------------------------------------------- human quantities

_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _quantity(value: Any, units: Mapping[str, float], what: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"{what}, a number with one of the units {', '.join(units)}, or a plain number")
    return float(match[1]) * units[match[2]]


def _duration(value: Any) -> float:
    return float(_quantity(value, _DURATION_UNITS, 'a duration such as "250ms", "5s" or "2m"'))


def _size(value: Any) -> int:
    return int(_quantity(value, _SIZE_UNITS, 'a size such as "64MiB" or "8GB"'))


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` (no dot) as a string; people mean the number."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _list_of_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(_duration)]
Bytes = Annotated[int, BeforeValidator(_size)]


# --------------------------------------------------------------------------------------- sections


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class MixedDataset(_Section):
    """One dataset of a mixture, `path` or `text`, and how much of training it gets beside the others."""

    path: str | None = None
    text: Annotated[list[str] | None, BeforeValidator(_list_of_text)] = None
    weight: Number = Field(default=1.0, gt=0.0, le=1e6)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (not self.text):
            raise ValueError(
                "exactly one of `path` (a prepared directory) and `text` (files, directories or @python); give one"
            )
        return self


class DataSettings(_Section):
    """One of `path`, a directory that `trainer.prepare` made; `text` to prepare with `tokenizer`; and `mix`,
    several of these with weights, whose texts are all prepared with `tokenizer` and `val_fraction`.

    Relative paths are relative to the working directory of whoever prepares the data.
    """

    path: str | None = None
    text: Annotated[list[str] | None, BeforeValidator(_list_of_text)] = None
    mix: list[MixedDataset] | None = Field(default=None, min_length=1, max_length=32)
    tokenizer: str = Field(default="byte", pattern=r"^(byte|bpe:[0-9]{1,7}|.+\.json)$")
    val_fraction: Number = Field(default=0.05, ge=0.0, le=0.5)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is not None) + bool(self.text) + (self.mix is not None) != 1:
            raise ValueError(
                "exactly one of `path` (a prepared directory), `text` (files, directories or @python) and `mix` "
                "(a list of these with a `weight`); give one"
            )
        if self.mix is not None and self.tokenizer.startswith("bpe:") and any(p.text for p in self.mix):
            raise ValueError(
                "no bpe:N in a mixture, since each text would learn another vocabulary: byte, or one "
                "tokenizer .json for all; change tokenizer"
            )
        if not self.texts() and self.tokenizer != "byte":
            raise ValueError("no `tokenizer` beside `path`: a prepared directory brings its own; remove it")
        self.weights()
        return self

    def texts(self) -> list[str]:
        """Everything that is to be prepared."""
        return [*(self.text or ()), *(text for part in self.mix or () for text in part.text or ())]

    def parts(self) -> list[DataSettings]:
        """The datasets of a mixture, each as if it were alone."""
        return [
            DataSettings(path=part.path)
            if part.path is not None
            else DataSettings(text=part.text, tokenizer=self.tokenizer, val_fraction=self.val_fraction)
            for part in self.mix or ()
        ]

    def weights(self) -> list[int]:
        """The weights of a mixture as whole numbers in the same proportion: 0.7 and 0.3 are 7 and 3."""
        fractions = [Fraction(str(part.weight)) for part in self.mix or ()]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        whole = [int(fraction * scale) for fraction in fractions]
        divisor = math.gcd(*whole) or 1
        whole = [weight // divisor for weight in whole]
        if sum(whole) > MOST_PERIOD:
            raise ValueError(
                f"weights in a proportion of small whole numbers, whose sum is at most {MOST_PERIOD} (it is "
                f"{sum(whole)}); round them"
            )
        return whole


class ModelSettings(_Section):
    """A preset with overrides.  `vocab_size` is the tokenizer's unless it is set here."""

    preset: Literal["tiny", "small", "medium", "large"] = "tiny"
    n_layer: int = Field(ge=1, le=512)
    n_head: int = Field(ge=1, le=512)
    n_embd: int = Field(ge=1, le=65_536)
    vocab_size: int | None = Field(default=None, ge=2, le=2**24)
    block_size: int = Field(ge=1, le=2**20)
    dropout: Number = Field(default=0.0, ge=0.0, lt=1.0)
    bias: bool = True

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        preset = value.get("preset", "tiny")
        # An unknown preset is reported for itself; any preset's numbers keep other reports away.
        return {**PRESETS.get(preset if isinstance(preset, str) else "", PRESETS["tiny"]), **value}

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd divisible by n_head (they are {self.n_embd} and {self.n_head}); change one of them"
            )
        return self


class TrainSettings(_Section):
    """The optimisation.  A step consumes slices_per_step × slice_sequences × seq_len tokens, whoever is there."""

    steps: int = Field(default=1000, ge=1)
    slices_per_step: int = Field(default=8, ge=1, le=65_536)
    slice_sequences: int = Field(default=4, ge=1, le=65_536)
    seq_len: int = Field(ge=1)
    lr: Number = Field(default=6e-4, gt=0.0)
    min_lr: Number = Field(default=6e-5, ge=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: Number = Field(default=0.1, ge=0.0)
    betas: Annotated[tuple[Number, Number], Field(strict=False)] = (0.9, 0.95)
    grad_clip: Number = Field(default=1.0, ge=0.0, description="0 switches clipping off")
    seed: int = Field(default=1, ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    eval_every: int = Field(default=0, ge=0, description="0 switches evaluation off")
    eval_slices: int = Field(default=4, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    step_delay_ms: int = Field(default=0, ge=0, description="slows a demonstration down")
    collective_timeout: Seconds = Field(default=600.0, ge=1.0)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr at most lr (they are {self.min_lr} and {self.lr}); lower min_lr")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps at most steps (they are {self.warmup_steps} and {self.steps}); lower it"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas from 0 to below 1 (they are {list(self.betas)}); change them")
        return self


class CheckpointSettings(_Section):
    """When state is kept.  `dir` is used only without a coordinator."""

    every_steps: int = Field(default=100, ge=1)
    shard_bytes: Bytes = Field(default=64 * 2**20, ge=64 * 2**10, le=2**30)
    dir: str
    keep: int = Field(default=3, ge=1, le=1000)
    keep_every: int = Field(default=0, ge=0, le=10**9)
    keep_best: int = Field(default=0, ge=0, le=1000)
    """Only a coordinator knows the losses of checkpoints; without one it keeps none."""

    @model_validator(mode="after")
    def _made_at_all(self) -> Self:
        if self.keep_every % self.every_steps:
            raise ValueError(
                f"keep_every a multiple of every_steps (they are {self.keep_every} and {self.every_steps}), "
                "for no other step has a checkpoint; change one"
            )
        return self


class TrainingConfig(_Section):
    """A whole job as the trainer sees it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    checkpoint: CheckpointSettings

    @model_validator(mode="before")
    @classmethod
    def _defaults_across_sections(cls, value: Any) -> Any:
        """Sections may be left out; `train.seq_len` follows the model, `checkpoint.dir` the name."""
        if not isinstance(value, Mapping):
            return value
        filled: dict[Any, Any] = {"model": {}, "train": {}, "checkpoint": {}, **value}
        model, train, checkpoint = filled["model"], filled["train"], filled["checkpoint"]
        if isinstance(train, Mapping):
            shape = model if isinstance(model, Mapping) else {}
            preset = PRESETS.get(str(shape.get("preset", "tiny")), PRESETS["tiny"])
            filled["train"] = {"seq_len": shape.get("block_size", preset["block_size"]), **train}
        if isinstance(checkpoint, Mapping):
            filled["checkpoint"] = {"dir": f"out/{filled.get('name')}", **checkpoint}
        return filled

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.train.seq_len > self.model.block_size:
            raise ValueError(
                f"train.seq_len at most model.block_size (they are {self.train.seq_len} and "
                f"{self.model.block_size}); shorten seq_len or raise block_size"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        every, evaluated = self.checkpoint.every_steps, self.train.eval_every
        if self.checkpoint.keep_best and (not evaluated or every % evaluated):
            raise ValueError(
                "checkpoint.every_steps a multiple of train.eval_every where checkpoint.keep_best is used (they "
                f"are {every} and {evaluated}), for a checkpoint's loss is that of its own step; change one"
            )
        return self


# ---------------------------------------------------------------------------------------- reading


class _JobFileLoader(yaml.SafeLoader):
    """YAML that reads `3e-4` as a number (as YAML 1.2 does) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_JobFileLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_job_file(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML (or .json) job file, all sections, unchecked.  Raise ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_JobFileLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a readable YAML job file") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML ({reason}); correct the file at that place") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: found {_shown(value)} at the top; allowed: a mapping with the keys "
            f"{', '.join(_known_keys(TrainingConfig))}; see configs/demo.yaml"
        )
    return value


def load_config(path: Path | str) -> TrainingConfig:
    """Read and check a job file.  Raise ConfigError with one line per problem."""
    mapping = read_job_file(path)
    try:
        return parse_config(mapping)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def parse_config(mapping: Mapping[str, Any]) -> TrainingConfig:
    """Check a job file's mapping.  Raise ConfigError with one line per problem."""
    own = {key: value for key, value in mapping.items() if key not in COORDINATOR_SECTIONS}
    try:
        return TrainingConfig.model_validate(own)
    except ValidationError as error:
        lines = [_line(details) for details in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _known_keys(section: type[BaseModel]) -> list[str]:
    extra = COORDINATOR_SECTIONS if section is TrainingConfig else ()
    return [*section.model_fields, *extra]


def _section_of(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str | None]:
    """The section that holds the field at `location`, and the field's name there."""
    section: type[BaseModel] = TrainingConfig
    for name in location:
        if isinstance(name, int):
            continue  # the place in a list whose section was entered already
        field = section.model_fields.get(str(name))
        if field is None:
            return section, None
        if field.annotation == list[MixedDataset] | None and name != location[-1]:
            section = MixedDataset
            continue
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return section, str(name)
        section = field.annotation
    return section, None


def _line(details: ErrorDetails) -> str:
    location = details["loc"]
    path = ".".join(str(part) for part in location) or "job file"
    section, name = _section_of(location)
    if details["type"] == "extra_forbidden":
        known = _known_keys(section)
        prefix = "".join(f"{part}." for part in location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)[0]
        return (
            f"{path}: found {_shown(details['input'])}, but there is no such key; the nearest is "
            f"{prefix}{near}; allowed: {', '.join(known)}; rename or remove it"
        )
    field = section.model_fields.get(name) if name else None
    if details["type"] == "missing":
        return f"{path}: found nothing; allowed: {_allowed(path)}; add it"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if details["type"] == "string_pattern_mismatch":
        message = _allowed(path)
    elif details["type"] in {"model_type", "model_attributes_type"}:
        message = f"a mapping with the keys {', '.join(_known_keys(section))}"
    if field is None:
        return (
            f"{path}: allowed: {message}"
            if details["type"] == "value_error"
            else (f"{path}: found {_shown(details['input'])}; allowed: {message}; change it")
        )
    default = (
        "" if field.is_required() else f", or leave it out for the default {_shown(field.get_default())}"
    )
    return f"{path}: found {_shown(details['input'])}; allowed: {message}; change it{default}"


def _allowed(path: str) -> str:
    match path:
        case "name":
            return "1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        case "data":
            return 'a mapping with `path`, or with `text` (for example text: "@python") and `tokenizer`, or with `mix`'
        case "data.tokenizer":
            return "byte, bpe:N (N from 257 on) or the path of a tokenizer .json file"
        case _:
            return "a value"


# --------------------------------------------------------------------------------------- identity

# What changes speed or reporting but not which numbers a step computes.
_NOT_IDENTITY = {
    "compile", "eval_every", "eval_slices", "device", "step_delay_ms", "collective_timeout", "log_every",
}  # fmt: skip


def config_digest(cfg: TrainingConfig) -> str:
    """SHA-256 (hex) of what decides the numbers: the resolved model and the optimisation.

    The data's identity is the dataset's own digest, so a job may be moved to another directory.
    """
    identity = {
        "model": cfg.model.model_dump(exclude={"preset"}),
        "train": cfg.train.model_dump(exclude=_NOT_IDENTITY),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
