"""Models that other programs saved: they come in whole, or are refused, and nothing in them is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from transformers import GPT2Config, GPT2LMHeadModel

from tests.trainer.fleet import REPOSITORY, job, make_dataset
from trainer.checkpoint import CheckpointDirectory, layout, make_header, make_manifest, state_specs
from trainer.config import parse_config
from trainer.export import export, load_model
from trainer.importing import ImportRefused, import_dcp, import_model, main, read_hf, read_nanogpt
from trainer.model import GPT, ModelShape, configure_optimizer, learning_rate
from trainer.state import TrainingState

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
CONFIG = parse_config(
    {
        "name": "job",
        "data": {"text": "x"},
        "model": {**SIZES, "vocab_size": 257},
        "checkpoint": {"shard_bytes": "64KiB"},
    }
)


def trained(shape: ModelShape, steps: int = 3) -> tuple[GPT, torch.optim.AdamW, TrainingState]:
    """A model that was really updated, with its AdamW."""
    model = GPT(shape, seed=3)
    optimizer = configure_optimizer(model, CONFIG.train, torch.device("cpu"))
    state = TrainingState(model, optimizer)
    stream = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        update(model, optimizer, torch.randint(shape.vocab_size, (2, 17), generator=stream), step)
        state.count_update()
    return model, optimizer, state


def update(model: GPT, optimizer: torch.optim.AdamW, tokens: Tensor, step: int) -> float:
    optimizer.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, CONFIG.train)
    optimizer.step()
    return float(loss.detach())


def save(root: Path, state: TrainingState, shape: ModelShape, step: int) -> None:
    directory = CheckpointDirectory(root)
    specs = state_specs(state.tensors)
    header = make_header(CONFIG, shape, specs, step=step, tokens=1, dataset="d")
    shards = [directory.write_shard(s, state.tensors) for s in layout(specs, header["shard_bytes"])]
    directory.write_manifest(
        make_manifest(
            job="j", step=step, generation=2, state_digest=state.digest(), header=header, shards=shards
        )
    )


# -------------------------------------------------------------------------------------------- DCP


def test_a_checkpoint_comes_back_from_dcp_bit_for_bit(tmp_path: Path) -> None:
    shape = ModelShape(**SIZES, vocab_size=257)
    _, _, state = trained(shape)
    save(tmp_path / "c", state, shape, step=7)
    export(tmp_path / "c", tmp_path / "dcp", step=7, form="dcp")
    manifest = import_dcp(tmp_path / "dcp", tmp_path / "back")
    assert manifest == CheckpointDirectory(tmp_path / "c").manifest(7)
    back = CheckpointDirectory(tmp_path / "back")
    assert back.manifest().to_json() == manifest.to_json()
    back.verify(manifest)


def test_dcp_itself_loads_what_was_exported(tmp_path: Path) -> None:
    shape = ModelShape(**SIZES, vocab_size=257)
    _, _, state = trained(shape)
    save(tmp_path / "c", state, shape, step=7)
    export(tmp_path / "c", tmp_path / "dcp", step=7, form="dcp")
    loaded: dict[str, Any] = {name: torch.zeros_like(t) for name, t in state.tensors.items()}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        state_dict_loader.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.tensors.items())


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip_a_bit(dcp: Path) -> None:
    """In the bytes of the first tensor."""
    file = dcp / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[json.loads((dcp / "muster.json").read_text())["storage"]["model.wte.weight"][1] + 4096] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda dcp: (dcp / "muster.json").unlink(), "is a pickle and is not opened"),
        (
            lambda dcp: change(dcp / "muster.json", "muster-dcp-1", "other"),
            "has no muster.json of the format",
        ),
        (
            lambda dcp: change(dcp / "muster.json", '"__0_0.distcp"', '"../c/blobs/x"'),
            "outside the directory",
        ),
        (lambda dcp: (dcp / "__0_0.distcp").unlink(), "cannot be read"),
        (flip_a_bit, "cannot be read|digest"),
    ],
)
def test_a_damaged_dcp_export_is_refused(tmp_path: Path, damage: Any, told: str) -> None:
    shape = ModelShape(**SIZES, vocab_size=257)
    save(tmp_path / "c", trained(shape)[2], shape, step=7)
    export(tmp_path / "c", tmp_path / "dcp", step=7, form="dcp")
    damage(tmp_path / "dcp")
    with pytest.raises(ImportRefused, match=told):
        import_dcp(tmp_path / "dcp", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --------------------------------------------------------------------------------------------- HF


def make_hf(path: Path, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 257}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too, away from their start
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return model


def test_a_transformers_model_computes_the_same_after_import(tmp_path: Path) -> None:
    theirs = make_hf(tmp_path / "hf")
    assert main(["--format", "hf", "--from", str(tmp_path / "hf"), "--out", str(tmp_path / "c")]) == 0
    ours, step = load_model(CheckpointDirectory(tmp_path / "c"))
    x = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(ours.logits(x), theirs(x).logits, atol=1e-4)
    assert step == 0
    manifest = CheckpointDirectory(tmp_path / "c").manifest()
    rest = CheckpointDirectory(tmp_path / "c").read(manifest, "optimizer.")
    assert not any(tensor.any() for tensor in rest.values())
    assert ours.wte.weight.shape[0] == 320
    assert not ours.wte.weight[257:].any()


def test_a_model_in_parts_and_under_the_hubs_names_is_read(tmp_path: Path) -> None:
    """The hub's gpt2 has no `transformer.` before its names, and masks among them."""
    theirs = make_hf(tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    tensors = {
        name.removeprefix("transformer."): t
        for name, t in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for part, some in parts.items():
        save_file({name: tensors[name] for name in some}, tmp_path / "hf" / part)
    weight_map = {name: part for part, some in parts.items() for name in some}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = read_hf(tmp_path / "hf")
    assert torch.equal(source.parameters["wte.weight"], theirs.transformer.wte.weight)
    import_model(source, tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"n_inner": 77}, "n_inner 77"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ],
)
def test_a_transformers_model_that_computes_otherwise_is_refused(
    tmp_path: Path, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", **settings)
    assert main(["--format", "hf", "--from", str(tmp_path / "hf"), "--out", str(tmp_path / "c")]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def with_model(**model: Any) -> Any:
    return parse_config({"name": "job", "data": {"text": "x"}, "model": {**SIZES, **model}})


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"n_layer": 3}, "model.n_layer: the job file has 3, the source 2"),
        ({"block_size": 64}, "model.block_size: the job file has 64, the source 32"),
        ({"vocab_size": 300}, "model.vocab_size: the job file has 300, the source 257"),
        ({"vocab_size": 190}, "model.vocab_size: the job file has 190, the source 257"),
        ({"bias": False}, "is not zero, but the job's model has no biases"),
    ],
)
def test_a_source_that_does_not_fit_the_job_is_refused(
    tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    make_hf(tmp_path / "hf")
    with pytest.raises(ImportRefused, match=told):
        import_model(read_hf(tmp_path / "hf"), tmp_path / "c", with_model(**model))
    assert not (tmp_path / "c").exists()


def test_a_source_that_contradicts_its_configuration_is_refused(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    change(config, '"n_positions": 32', '"n_positions": 16')
    with pytest.raises(
        ImportRefused, match=r"model.wpe.weight: is torch.float32\[32, 32\], expected .*\[16, 32\]"
    ):
        import_model(read_hf(tmp_path / "hf"), tmp_path / "c")
    change(config, '"n_layer": 2', '"n_layer": 3')
    with pytest.raises(ImportRefused, match=r"lacks h.2.attn.c_attn.bias"):
        import_model(read_hf(tmp_path / "hf"), tmp_path / "c")


def test_our_own_exports_come_back(tmp_path: Path) -> None:
    shape = ModelShape(**SIZES, vocab_size=257, bias=False)
    model, _, state = trained(shape)
    save(tmp_path / "c", state, shape, step=7)
    for form in ("hf", "safetensors"):
        export(tmp_path / "c", tmp_path / form, step=7, form=form)
    job_file = tmp_path / "job.json"
    job_file.write_text(
        json.dumps({"name": "j", "data": {"text": "x"}, "model": {**SIZES, "bias": False, "vocab_size": 257}})
    )
    for form in ("hf", "safetensors"):
        arguments = [
            "--format",
            form,
            "--from",
            str(tmp_path / form),
            "--out",
            str(tmp_path / f"back-{form}"),
        ]
        assert main([*arguments, "--config", str(job_file)]) == 0
        back, _ = load_model(CheckpointDirectory(tmp_path / f"back-{form}"))
        for name, parameter in model.named_parameters():
            rows = 257 if name == "wte.weight" else None
            assert torch.equal(back.get_parameter(name)[:rows], parameter[:rows]), name


# ---------------------------------------------------------------------------------------- nanoGPT


def nanogpt_checkpoint(
    model: GPT, optimizer: torch.optim.AdamW, step: int, *, compiled: bool = False
) -> dict[str, Any]:
    """What nanoGPT's train.py saves: its names, its tied head, its AdamW's state by number."""
    prefix = "_orig_mod.transformer." if compiled else "transformer."
    weights = {f"{prefix}{name}": p.detach() for name, p in model.named_parameters()}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    weights[f"{prefix.removesuffix('transformer.')}lm_head.weight"] = weights[f"{prefix}wte.weight"]
    shape = model.shape
    return {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.n_embd,
            "block_size": shape.block_size,
            "bias": shape.bias,
            "vocab_size": shape.padded_vocab_size,
            "dropout": 0.0,
        },
        "iter_num": step,
        "best_val_loss": torch.tensor(3.5),
        "config": {"batch_size": 12, "dtype": "bfloat16"},
    }


@pytest.mark.parametrize(("bias", "compiled"), [(True, True), (False, False)])
def test_training_goes_on_from_nanogpt_as_if_it_had_never_stopped(
    tmp_path: Path, bias: bool, compiled: bool
) -> None:
    shape = ModelShape(**SIZES, vocab_size=320, bias=bias)
    model, optimizer, state = trained(shape)
    torch.save(nanogpt_checkpoint(model, optimizer, 3, compiled=compiled), tmp_path / "ckpt.pt")
    manifest = import_model(read_nanogpt(tmp_path / "ckpt.pt"), tmp_path / "c")
    assert (manifest.step, manifest.header["model"]["vocab_size"]) == (3, 320)
    assert manifest.state_digest == state.digest()
    # into a fresh model, as trainer.train does
    fresh = GPT(shape, seed=9)
    fresh_optimizer = configure_optimizer(fresh, CONFIG.train, torch.device("cpu"))
    into = TrainingState(fresh, fresh_optimizer)
    CheckpointDirectory(tmp_path / "c").load(manifest, into.tensors)
    into.loaded()
    tokens = torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(8))
    losses = [
        (update(fresh, fresh_optimizer, tokens, s), update(model, optimizer, tokens, s)) for s in (4, 5)
    ]
    assert [a for a, _ in losses] == [b for _, b in losses]
    assert into.tensors["optimizer.updates"].item() == 3


def test_padding_of_the_vocabulary_is_dropped_for_a_job_that_knows_its_tokenizer(tmp_path: Path) -> None:
    model, optimizer, _ = trained(ModelShape(**SIZES, vocab_size=320))
    torch.save(nanogpt_checkpoint(model, optimizer, 3), tmp_path / "ckpt.pt")
    import_model(read_nanogpt(tmp_path / "ckpt.pt"), tmp_path / "c", CONFIG)
    ours, _ = load_model(CheckpointDirectory(tmp_path / "c"))
    assert ours.shape.vocab_size == 257
    assert torch.equal(ours.wte.weight[:257], model.wte.weight[:257])
    assert not ours.wte.weight[257:].any()


class _Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["model", "model_args", "optimizer", "iter_num", "config", "whole"])
def test_a_pickle_in_a_pt_file_is_refused_and_not_run(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer, _ = trained(ModelShape(**SIZES, vocab_size=320))
    trap = tmp_path / "ran"
    saved: Any = nanogpt_checkpoint(model, optimizer, 3)
    if place == "whole":
        saved = _Malice(trap)
    else:
        saved[place] = {"x": _Malice(trap)}
    torch.save(saved, tmp_path / "ckpt.pt")
    assert (
        main(["--format", "nanogpt", "--from", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "c")]) == 1
    )
    assert "nothing in it was run" in capsys.readouterr().err
    assert not trap.exists()
    assert not (tmp_path / "c").exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert trap.exists(), "the trap does work"


def test_a_pickle_anywhere_in_a_dcp_export_is_not_run(tmp_path: Path) -> None:
    shape = ModelShape(**SIZES, vocab_size=257)
    save(tmp_path / "c", trained(shape)[2], shape, step=7)
    export(tmp_path / "c", tmp_path / "dcp", step=7, form="dcp")
    trap = tmp_path / "ran"
    torch.save(_Malice(trap), tmp_path / "malice.pt")
    malice = (tmp_path / "malice.pt").read_bytes()
    (tmp_path / "dcp" / ".metadata").write_bytes(malice)
    import_dcp(tmp_path / "dcp", tmp_path / "back")  # DCP's index is not even opened
    index = tmp_path / "dcp" / "muster.json"
    value = json.loads(index.read_text())
    (tmp_path / "dcp" / "evil").write_bytes(malice)
    value["storage"]["optimizer.updates"] = ["evil", 0, len(malice)]
    index.write_text(json.dumps(value))
    with pytest.raises(ImportRefused, match="nothing in it was run"):
        import_dcp(tmp_path / "dcp", tmp_path / "again")
    index.write_bytes(malice)
    with pytest.raises(ImportRefused):
        import_dcp(tmp_path / "dcp", tmp_path / "again")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda saved: saved.pop("model_args"), "has no `model` and `model_args`"),
        (lambda saved: saved["model_args"].update(n_layer="2"), "n_layer is '2'"),
        (lambda saved: saved.update(iter_num=-1), "iter_num is -1"),
        (lambda saved: saved["optimizer"]["state"].pop(3), "not the state of nanoGPT's AdamW"),
        (
            lambda saved: saved["optimizer"]["state"][3].update(exp_avg=torch.zeros(5)),
            r"optimizer.exp_avg.* is torch.float32\[5\]",
        ),
        (
            lambda saved: saved["optimizer"]["state"][3].update(step=torch.tensor(9.0)),
            r"updated \[3, 9\] times",
        ),
        (
            lambda saved: saved["model"].update({"lm_head.weight": torch.zeros(320, 32)}),
            "this model ties them",
        ),
        (
            lambda saved: saved.pop("optimizer") and saved["model"].pop("transformer.ln_f.weight"),
            "lacks ln_f.weight",
        ),
    ],
)
def test_a_pt_file_that_is_not_nanogpts_is_refused(tmp_path: Path, spoil: Any, told: str) -> None:
    model, optimizer, _ = trained(ModelShape(**SIZES, vocab_size=320))
    saved = nanogpt_checkpoint(model, optimizer, 3)
    spoil(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(ImportRefused, match=told):
        import_model(read_nanogpt(tmp_path / "ckpt.pt"), tmp_path / "c")


def test_a_url_or_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="not a file on this machine"):
        read_nanogpt(Path("https://example.org/ckpt.pt"))


def test_the_trainer_goes_on_from_an_imported_checkpoint(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "words")
    spec = job(data, steps=5, log_every=1)
    spec["checkpoint"] = {"every_steps": 5, "dir": str(tmp_path / "c")}
    (tmp_path / "job.json").write_text(json.dumps(spec))
    config = parse_config(spec)
    model, optimizer, _ = trained(
        ModelShape(
            **config.model.model_dump(include={"n_layer", "n_head", "n_embd", "block_size"}),
            vocab_size=320,
        )
    )
    torch.save(nanogpt_checkpoint(model, optimizer, 3), tmp_path / "ckpt.pt")
    arguments = ["--format", "nanogpt", "--from", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "c")]
    spec["model"]["vocab_size"] = 257
    (tmp_path / "job.json").write_text(json.dumps(spec))
    assert main([*arguments, "--config", str(tmp_path / "job.json")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "trainer.train", str(tmp_path / "job.json")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stdout
    assert CheckpointDirectory(tmp_path / "c").manifest().step == 5
