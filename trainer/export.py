"""Take a trained model out of its checkpoint: for transformers, as plain safetensors, or all of it for DCP.

    python -m trainer.export --checkpoint-dir DIR [--step N] --format hf|safetensors|dcp --out DIR [--tokenizer …]

`DIR` is a local layout (`blobs/`, `manifests/`).  hf and safetensors take the model's parameters, dcp the
whole state, optimizer included.  `trainer.importing` reads all three back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_saver

from trainer.checkpoint import MODEL_PREFIX, CheckpointDirectory, CheckpointError, Manifest
from trainer.model import GPT, ModelShape
from trainer.tokenizer import END_OF_TEXT, Tokenizer, TokenizerError, load_tokenizer

DCP_INDEX = "muster.json"
DCP_FORMAT = "muster-dcp-1"


class ExportError(Exception):
    """The export cannot be written; the message names the path and what to do."""


def load_model(directory: CheckpointDirectory, step: int | None = None) -> tuple[GPT, int]:
    """The model of a checkpoint (the newest without `step`), on the CPU, for evaluation; and its step.

    Raise a CheckpointError if it is absent, damaged or not of this family.
    """
    manifest = directory.manifest(step)
    try:
        shape = ModelShape(**manifest.header["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint of step {manifest.step}: its header has no shape of a GPT ({error}); only checkpoints "
            "that trainer.train made can be exported"
        ) from error
    tensors = directory.read(manifest, MODEL_PREFIX)
    model = GPT(shape)
    try:
        model.load_state_dict({name.removeprefix(MODEL_PREFIX): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint of step {manifest.step}: {error}") from error
    return model.eval(), manifest.step


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The parameters under the names and in the layouts of transformers' GPT2LMHeadModel.

    Its projections are `Conv1D`, whose weight is transposed; it always has biases, so a model without
    them gets zeros; the embedding loses the padding of its vocabulary and is tied to the head.
    """
    shape = model.shape
    state = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name == "wte.weight":
            tensor = tensor[: shape.vocab_size]
        elif name.split(".")[-2] in {"c_attn", "c_fc", "c_proj"} and tensor.ndim == 2:
            tensor = tensor.t()
        state[f"transformer.{name}"] = tensor.contiguous()
        if name.endswith(".weight") and not shape.bias and not name.startswith(("wte", "wpe")):
            state[f"transformer.{name.removesuffix('weight')}bias"] = torch.zeros(tensor.shape[-1])
    return state


def hf_config(shape: ModelShape, end_of_text: int | None) -> dict[str, Any]:
    """config.json of a GPT2LMHeadModel with this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def export(
    checkpoint_dir: Path | str,
    out: Path | str,
    *,
    step: int | None,
    form: str,
    tokenizer: Tokenizer | None = None,
) -> int:
    """Write the export directory `out`, all of it or nothing, and return the checkpoint's step.

    `form` is `hf` (config.json, model.safetensors, tokenizer files if a tokenizer is given), `safetensors`
    (our own names, and model.json with the shape) or `dcp` (for `torch.distributed.checkpoint.load`, and
    muster.json for the way back).  Raise CheckpointError or ExportError.
    """
    out = Path(out)
    if out.exists():
        raise ExportError(f"--out {out}: exists already; choose another directory or remove it")
    directory = CheckpointDirectory(checkpoint_dir)
    model, found = load_model(directory, step)
    if tokenizer is not None and tokenizer.vocab_size > model.shape.vocab_size:
        raise ExportError(
            f"--tokenizer: has {tokenizer.vocab_size} tokens but the model knows {model.shape.vocab_size}; "
            "give the tokenizer that the dataset was prepared with"
        )
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        work.chmod(0o755)
        if form == "hf":
            save_file(hf_state(model), work / "model.safetensors", metadata={"format": "pt"})
            end_of_text = tokenizer.end_of_text if tokenizer else None
            _write_json(work / "config.json", hf_config(model.shape, end_of_text))
        elif form == "dcp":
            _write_dcp(directory, directory.manifest(found), work)
        else:
            save_file({name: p.detach() for name, p in model.named_parameters()}, work / "model.safetensors")
            _write_json(work / "model.json", model.shape.to_dict())
        if form != "dcp":
            (work / "model.safetensors").chmod(0o644)  # the library makes it private
        if tokenizer is not None:
            (work / "tokenizer.json").write_text(tokenizer.as_tokenizers_json(), encoding="utf-8")
            if form == "hf":
                special = END_OF_TEXT if tokenizer.end_of_text is not None else None
                _write_json(
                    work / "tokenizer_config.json",
                    {
                        "tokenizer_class": "PreTrainedTokenizerFast",
                        "eos_token": special,
                        "bos_token": special,
                        "model_max_length": model.shape.block_size,
                        "clean_up_tokenization_spaces": False,
                    },
                )
        work.rename(out)
    except OSError as error:
        raise ExportError(f"--out {out}: {error.strerror or error}; nothing was kept") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return found


def _write_dcp(directory: CheckpointDirectory, manifest: Manifest, out: Path) -> None:
    """The whole state as DCP writes it without a process group, and where in it each tensor lies.

    DCP's own index is a pickle, which nothing of ours opens: muster.json says the same.
    """
    tensors: dict[str, Any] = dict(directory.read(manifest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group is meant
        writer = filesystem.FileSystemWriter(out, overwrite=False)
        saved = state_dict_saver.save(tensors, storage_writer=writer, no_dist=True)
    storage = {
        index.fqn: [place.relative_path, place.offset, place.length]
        for index, place in saved.storage_data.items()
    }
    value = {"format": DCP_FORMAT, "manifest": json.loads(manifest.to_json()), "storage": storage}
    _write_json(out / DCP_INDEX, value)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export", description="Export a checkpoint's model."
    )
    parser.add_argument("--checkpoint-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--step", type=int, help="which checkpoint (the newest)")
    parser.add_argument("--format", choices=("hf", "safetensors", "dcp"), default="hf")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tokenizer", metavar="byte|FILE.json", help="the dataset's tokenizer, to go along")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        step = export(
            options.checkpoint_dir, options.out, step=options.step, form=options.format, tokenizer=tokenizer
        )
    except (CheckpointError, ExportError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported step {step} to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
