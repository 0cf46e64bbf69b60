"""Make a checkpoint of what another program saved, so that `trainer.train` goes on from it.

    python -m trainer.importing --format hf|safetensors|nanogpt|dcp --from PATH --out DIR [--config JOB.yaml]

| format | PATH | what comes along |
|---|---|---|
| hf | directory of a GPT2LMHeadModel: config.json and model.safetensors, whole or in parts | parameters; step 0 |
| safetensors | directory that `trainer.export --format safetensors` made | parameters; step 0 |
| nanogpt | ckpt.pt of nanoGPT, read with `weights_only=True`: nothing in it is run | parameters, AdamW's state, step |
| dcp | directory that `trainer.export --format dcp` made | everything, bit for bit |

Where the source has no optimizer state, moments and updates are 0.  `DIR` is a local layout (`blobs/`,
`manifests/`): give it as `checkpoint.dir`, or to `trainer.generate` and `trainer.export`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint import (
    CheckpointDirectory,
    CheckpointError,
    Manifest,
    layout,
    make_header,
    make_manifest,
    parse_manifest,
    state_specs,
)
from trainer.config import ConfigError, TrainingConfig, load_config, parse_config
from trainer.export import DCP_FORMAT, DCP_INDEX
from trainer.model import GPT, ModelShape, configure_optimizer
from trainer.state import TrainingState, digest

MOMENTS = ("exp_avg", "exp_avg_sq")

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


class ImportRefused(Exception):
    """The source cannot become a checkpoint; the message names what was found, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A GPT that another program saved, under our names and in our layouts."""

    shape: ModelShape
    parameters: Mapping[str, Tensor]
    step: int = 0
    moments: Mapping[str, Mapping[str, Tensor]] | None = None
    """Adam's, by MOMENTS and then by parameter; None if the source has none."""
    updates: int = 0


# ---------------------------------------------------------------------------------------- reading


def read_hf(directory: Path) -> Source:
    """A transformers directory of a GPT2LMHeadModel or GPT2Model.  Raise ImportRefused."""
    config = _read_json(directory / "config.json")
    if config.get("model_type") != "gpt2":
        raise ImportRefused(
            f"{directory}: its config.json has model_type {config.get('model_type')!r}; only gpt2 can be imported"
        )
    shape = ModelShape(
        n_layer=_whole(config, "n_layer", directory),
        n_head=_whole(config, "n_head", directory),
        n_embd=_whole(config, "n_embd", directory),
        vocab_size=_whole(config, "vocab_size", directory),
        block_size=_whole(config, "n_positions", directory),
    )
    for key, allowed in (
        ("activation_function", _GELU_TANH),
        ("n_inner", (None, 4 * shape.n_embd)),
        ("layer_norm_epsilon", (1e-5,)),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("tie_word_embeddings", (True,)),
    ):
        found = config.get(key, allowed[0])
        if found not in allowed:
            raise ImportRefused(
                f"{directory}: its config.json has {key} {found!r}; this model computes with "
                f"{' or '.join(map(repr, allowed))} and would give other results"
            )
    tensors = {name.removeprefix("transformer."): t for name, t in _read_safetensors(directory).items()}
    parameters = {
        name: tensor.t().contiguous() if name.endswith(_CONV1D) and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_MASKS)
    }
    return Source(shape=shape, parameters=_tied(parameters, directory))


def read_safetensors(directory: Path) -> Source:
    """A directory that `trainer.export` made with `--format safetensors`.  Raise ImportRefused."""
    value = _read_json(directory / "model.json")
    try:
        shape = ModelShape(**value)
    except TypeError as error:
        raise ImportRefused(
            f"{directory / 'model.json'}: not a model's shape ({error}); export it again"
        ) from error
    parameters = _read_safetensors(directory)
    if "wte.weight" in parameters:  # it has the padding too
        parameters["wte.weight"] = parameters["wte.weight"][: shape.vocab_size]
    return Source(shape=shape, parameters=parameters)


def read_nanogpt(file: Path) -> Source:
    """A ckpt.pt of nanoGPT.  Raise ImportRefused.

    Only tensors and plain values are read (`weights_only=True`): what a pickle in it would run is refused.
    nanoGPT computes GELU exactly, this model with GPT-2's tanh: losses differ in the fourth digit.
    """
    if not file.is_file():
        raise ImportRefused(f"{file}: not a file on this machine; give the path of a ckpt.pt")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets many kinds through
        raise ImportRefused(
            f"{file}: holds something else than tensors and plain values, or is damaged ({_why(error)}); nothing "
            "in it was run"
        ) from error
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ImportRefused(
            f"{file}: has no `model` and `model_args`; only nanoGPT's ckpt.pt can be imported"
        )
    arguments, raw = saved["model_args"], saved["model"]
    if not isinstance(arguments, dict) or not isinstance(raw, dict):
        raise ImportRefused(f"{file}: `model` and `model_args` must be mappings, as nanoGPT writes them")
    shape = ModelShape(
        **{
            name: _whole(arguments, name, file)
            for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
        },
        dropout=float(arguments.get("dropout") or 0.0),
        bias=bool(arguments.get("bias", True)),
    )
    parameters = {}
    for name, tensor in raw.items():
        ours = str(name).removeprefix("_orig_mod.").removeprefix("transformer.")
        if not isinstance(tensor, Tensor):
            raise ImportRefused(f"{file}: model.{name} is {type(tensor).__name__}, expected a tensor")
        if not ours.endswith(_MASKS):
            parameters[ours] = tensor
    parameters = _tied(parameters, file)
    step = saved.get("iter_num", 0)
    if not isinstance(step, int) or step < 0:
        raise ImportRefused(f"{file}: iter_num is {step!r}, expected a number of steps")
    moments, updates = None, 0
    if saved.get("optimizer"):
        moments, updates = _nanogpt_moments(saved["optimizer"], parameters, file)
    return Source(shape=shape, parameters=parameters, step=step, moments=moments, updates=updates)


def _nanogpt_moments(
    optimizer: Any, parameters: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """AdamW numbers its parameters: nanoGPT gives it matrices first, then vectors, in the model's order."""
    names = [n for n, p in parameters.items() if p.ndim >= 2] + [
        n for n, p in parameters.items() if p.ndim < 2
    ]
    try:
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        states = [optimizer["state"][number] for number in numbers]
        moments = {
            moment: {name: state[moment] for name, state in zip(names, states, strict=True)}
            for moment in MOMENTS
        }
        updates = {int(state["step"]) for state in states}
    except (KeyError, TypeError, ValueError) as error:
        raise ImportRefused(
            f"{file}: `optimizer` is not the state of nanoGPT's AdamW over {len(names)} parameters "
            f"({type(error).__name__}: {error}); remove it from the file to import the parameters alone"
        ) from error
    if len(updates) != 1:
        raise ImportRefused(
            f"{file}: AdamW's parameters were updated {sorted(updates)} times, expected one number"
        )
    return moments, updates.pop()


def _tied(parameters: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Without the head, which must be the embedding.  Raise ImportRefused if it is not."""
    head = parameters.pop("lm_head.weight", None)
    embedding = parameters.get("wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ImportRefused(
            f"{where}: lm_head.weight differs from wte.weight; this model ties them, so it cannot hold both"
        )
    return parameters


def _read_safetensors(directory: Path) -> dict[str, Tensor]:
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if (
        not whole.exists()
        and not index.exists()
        and (pickled := sorted(directory.glob("pytorch_model*.bin")))
    ):
        raise ImportRefused(
            f"{directory}: has {pickled[0].name} but no {whole.name}; the former is a pickle and is not opened. Where "
            "you trust it, let transformers make the latter: `model.save_pretrained(DIR, safe_serialization=True)`"
        )
    if whole.exists() or not index.exists():
        files = [whole]
    else:
        named = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in named):
            raise ImportRefused(f"{index}: names files outside its directory; download the model again")
        files = [directory / name for name in named]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise ImportRefused(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImportRefused(f"{path}: {reason}; give the directory that the other program wrote") from error
    if not isinstance(value, dict):
        raise ImportRefused(f"{path}: not a JSON object")
    return value


def _whole(mapping: Mapping[str, Any], key: str, where: Path) -> int:
    value = mapping.get(key)
    if type(value) is not int or value < 1:
        raise ImportRefused(f"{where}: {key} is {value!r}, expected a whole number from 1 on")
    return value


def _why(error: Exception) -> str:
    """torch's reason without torch's advice, which is to open what it refused with `weights_only=False`."""
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return f"{type(error).__name__}: {''.join(lines[:1])[:200]}"


# ---------------------------------------------------------------------------------------- writing


def import_model(source: Source, out: Path, config: TrainingConfig | None = None) -> Manifest:
    """Write the checkpoint directory `out`, all of it or nothing.

    With `config` the checkpoint is one of that job, whose model must have the source's shape; its
    vocabulary may be smaller by what the source has as padding.  Raise ImportRefused.
    """
    if config is None:
        shape = source.shape
        config = _plain_config(shape)
    else:
        shape = _shape_of_job(source.shape, config)
    model = GPT(shape)
    state = TrainingState(model, configure_optimizer(model, config.train, torch.device("cpu")))
    _fill(state, "model", source.parameters, source.shape, shape.vocab_size)
    for moment in MOMENTS:
        if source.moments is not None:
            _fill(state, f"optimizer.{moment}", source.moments[moment], source.shape, shape.vocab_size)
    state.tensors["optimizer.updates"].fill_(source.updates)
    specs = state_specs(state.tensors)
    header = make_header(config, shape, specs, step=source.step, tokens=0, dataset="")
    manifest = Manifest(
        job=config.name,
        step=source.step,
        generation=0,
        state_digest=state.digest(),
        header=header,
        shards=(),
    )
    return _write(manifest, state.tensors, out)


def _plain_config(shape: ModelShape) -> TrainingConfig:
    model = {name: value for name, value in shape.to_dict().items() if name != "dropout"}
    return parse_config({"name": "imported", "data": {"path": "."}, "model": model})


def _shape_of_job(found: ModelShape, config: TrainingConfig) -> ModelShape:
    wanted = config.model
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if getattr(found, name) != getattr(wanted, name):
            raise ImportRefused(
                f"model.{name}: the job file has {getattr(wanted, name)}, the source {getattr(found, name)}; "
                "change the job file, or import without --config"
            )
    vocab_size = wanted.vocab_size or found.vocab_size
    shape = dataclasses.replace(found, vocab_size=vocab_size, bias=wanted.bias, dropout=wanted.dropout)
    if not vocab_size <= found.vocab_size <= shape.padded_vocab_size:
        raise ImportRefused(
            f"model.vocab_size: the job file has {vocab_size}, the source {found.vocab_size} tokens; allowed: "
            f"{found.vocab_size}, or less by padding up to a multiple of 64 only; change the job file"
        )
    if shape.bias and not found.bias:
        raise ImportRefused("model.bias: the job file has true, the source has no biases; set it to false")
    return shape


@torch.no_grad()
def _fill(
    state: TrainingState, prefix: str, tensors: Mapping[str, Tensor], shape: ModelShape, vocab_size: int
) -> None:
    """Copy the source's tensors (of `shape`) into the state's `prefix.…`; of the embedding, `vocab_size` rows."""
    targets = {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in state.tensors.items()
        if name.startswith(f"{prefix}.")
    }
    given = dict(tensors)
    for name in [name for name in given if name not in targets and name.endswith("bias")]:
        # transformers always has biases; a model without them is the one whose biases are zero
        if given[name].any():
            raise ImportRefused(
                f"{prefix}.{name}: is not zero, but the job's model has no biases; set model.bias to true"
            )
        del given[name]
    if given.keys() != targets.keys():
        absent, surplus = sorted(targets.keys() - given.keys()), sorted(given.keys() - targets.keys())
        raise ImportRefused(
            f"{prefix}: the source lacks {_some(absent)} and has besides {_some(surplus)}; it is not a GPT-2 "
            f"with {shape.n_layer} layers"
        )
    for name, target in targets.items():
        value = given[name]
        expected = list(target.shape)
        if name == "wte.weight":
            expected[0] = shape.vocab_size
        if list(value.shape) != expected or not value.is_floating_point():
            raise ImportRefused(
                f"{prefix}.{name}: is {value.dtype}{list(value.shape)}, expected floating point {expected}; the "
                "source contradicts its own configuration"
            )
        if name == "wte.weight":
            target.zero_()
            target[:vocab_size] = value[:vocab_size]
        else:
            target.copy_(value)


def _some(names: list[str]) -> str:
    return (
        "nothing"
        if not names
        else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    )


def _write(manifest: Manifest, tensors: Mapping[str, Tensor], out: Path) -> Manifest:
    """Write shards for `manifest`, whose own are ignored, and commit it in the new directory `out`."""
    if out.exists():
        raise ImportRefused(f"--out {out}: exists already; choose another directory or remove it")
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        work.chmod(0o755)
        directory = CheckpointDirectory(work)
        shards = [
            directory.write_shard(shard, tensors)
            for shard in layout(state_specs(tensors), manifest.header["shard_bytes"])
        ]
        made = make_manifest(
            job=manifest.job,
            step=manifest.step,
            generation=manifest.generation,
            state_digest=manifest.state_digest,
            header=manifest.header,
            shards=shards,
        )
        if manifest.shards and made.shards != manifest.shards:
            raise ImportRefused("the tensors are not those that were exported; export the checkpoint again")
        directory.write_manifest(made)
        work.rename(out)
    except OSError as error:
        raise ImportRefused(f"--out {out}: {error.strerror or error}; nothing was kept") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return made


# -------------------------------------------------------------------------------------------- DCP


def import_dcp(directory: Path, out: Path) -> Manifest:
    """Undo `trainer.export --format dcp`, bit for bit.  Raise ImportRefused.

    DCP's own index, `.metadata`, is a pickle and is not opened: where each tensor lies is in muster.json.
    """
    value = _read_json(directory / DCP_INDEX) if (directory / DCP_INDEX).exists() else {}
    if value.get("format") != DCP_FORMAT:
        raise ImportRefused(
            f"{directory}: has no {DCP_INDEX} of the format {DCP_FORMAT}; only what `export --format dcp` made can "
            "be imported, because DCP's own index, .metadata, is a pickle and is not opened. Where you trust it, "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes a .pt of it"
        )
    manifest = parse_manifest(json.dumps(value.get("manifest")), str(directory / DCP_INDEX))
    tensors: dict[str, Tensor] = {}
    for spec in manifest.specs():
        try:
            tensor = _read_dcp(directory, *value["storage"][spec.name])
        except Exception as error:  # torch lets many kinds through
            raise ImportRefused(
                f"{directory}: {spec.name} cannot be read ({_why(error)}); nothing in it was run; export the "
                "checkpoint again"
            ) from error
        if not isinstance(tensor, Tensor) or state_specs({spec.name: tensor}) != (spec,):
            raise ImportRefused(
                f"{directory}: {spec.name} is not {spec.dtype}{list(spec.shape)}; export it again"
            )
        tensors[spec.name] = tensor
    if manifest.state_digest and digest(tensors) != manifest.state_digest:
        raise ImportRefused(
            f"{directory}: the state's digest is {digest(tensors)}, {DCP_INDEX} says {manifest.state_digest}; "
            "export the checkpoint again"
        )
    return _write(manifest, tensors, out)


def _read_dcp(directory: Path, name: str, offset: int, length: int) -> Any:
    if Path(name).name != name:
        raise ValueError(f"{DCP_INDEX} says that it lies in {name!r}, outside the directory")
    with (directory / name).open("rb") as file:
        file.seek(offset)
        data = io.BytesIO(file.read(length))
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets many kinds through
        raise ValueError(f"in {name}: {_why(error)}") from error


# ------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.importing", description="Make a checkpoint of another program's model."
    )
    parser.add_argument("--format", choices=("hf", "safetensors", "nanogpt", "dcp"), required=True)
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--config", type=Path, help="the job file that is to go on from it")
    options = parser.parse_args(arguments)
    if options.format == "dcp" and options.config:
        parser.error("--config: a dcp export is a whole checkpoint and brings its own; leave it out")
    try:
        config = load_config(options.config) if options.config else None
        if options.format == "dcp":
            manifest, whole = import_dcp(options.source, options.out), True
        else:
            read = {"hf": read_hf, "safetensors": read_safetensors, "nanogpt": read_nanogpt}[options.format]
            source = read(options.source)
            manifest, whole = import_model(source, options.out, config), source.moments is not None
    except (CheckpointError, ConfigError, ImportRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    brought = "with" if whole else "without"
    print(f"imported step {manifest.step} {brought} optimizer state to {options.out}", file=sys.stderr)
    print(manifest.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
