from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError, config_digest, load_config, parse_config, read_job_file

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def job(**sections: Any) -> dict[str, Any]:
    return {"name": "job", "data": {"text": "@python"}, **sections}


def problems(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(mapping)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    # script.yaml has nothing for the trainer: people run their own script.  The coordinator's tests read it.
    "path",
    [p for p in CONFIGS if p.name not in {"coordinator.yaml", "script.yaml"}],
    ids=lambda path: path.name,
)
def test_every_job_file_that_we_ship_is_accepted(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.train.seq_len <= config.model.block_size


def test_presets_fill_in_what_is_not_overridden() -> None:
    config = parse_config(job(model={"preset": "small", "n_layer": 2}))
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (2, 12, 768)
    assert config.train.seq_len == config.model.block_size == 1024


def test_human_durations_and_sizes_are_read() -> None:
    config = parse_config(job(train={"collective_timeout": "2m"}, checkpoint={"shard_bytes": "1MiB"}))
    assert config.train.collective_timeout == 120.0
    assert config.checkpoint.shard_bytes == 2**20
    assert parse_config(job(train={"collective_timeout": "1500ms"})).train.collective_timeout == 1.5
    assert parse_config(job(train={"collective_timeout": 30})).train.collective_timeout == 30.0


def test_a_parsed_job_survives_json() -> None:
    config = parse_config(job(train={"lr": "3e-4", "collective_timeout": "5s"}))
    again = parse_config(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert config_digest(again) == config_digest(config)


def test_sections_of_the_coordinator_are_passed_over() -> None:
    assert parse_config(
        job(elastic={"min_nodes": 2}, requires={}, priority=3, launch="muster")
    ) == parse_config(job())


def test_an_unknown_key_is_refused_with_path_value_and_nearest_key() -> None:
    (line,) = problems(job(train={"warmup_stps": 7}))
    assert line.startswith("train.warmup_stps: found 7")
    assert "train.warmup_steps" in line
    (line,) = problems(job(elastics={}))
    assert line.startswith("elastics: found {}")
    assert "elastic" in line


def test_each_problem_has_its_own_line() -> None:
    lines = problems(
        {"name": "a b", "data": {"text": "x"}, "train": {"steps": 0, "compile": 1, "lr": "fast"}}
    )
    assert [line.split(":")[0] for line in lines] == ["name", "train.steps", "train.lr", "train.compile"]
    assert all("found" in line and "allowed" in line for line in lines)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"seq_len": 600}}, "train.seq_len at most model.block_size (they are 600 and 512)"),
        ({"train": {"steps": True}}, "train.steps: found True"),
        ({"train": {"lr": float("nan")}}, "train.lr: found nan"),
        ({"train": {"lr": 1e-5}}, "min_lr at most lr"),
        ({"train": {"dtype": "float16"}}, "'auto', 'float32' or 'bfloat16'"),
        ({"train": {"collective_timeout": "5 parsecs"}}, "units ms, s, m, h"),
        ({"model": {"n_embd": 130}}, "n_embd divisible by n_head (they are 130 and 4)"),
        ({"model": {"preset": "huge"}}, "model.preset: found 'huge'"),
        ({"data": {}}, "exactly one of `path`"),
        ({"data": {"path": "a", "text": "b"}}, "exactly one of `path`"),
        ({"data": {"path": "a", "tokenizer": "bpe:300"}}, "a prepared directory brings its own"),
        (
            {"data": {"text": "a", "tokenizer": "words"}},
            "data.tokenizer: found 'words'; allowed: byte, bpe:N",
        ),
        ({"checkpoint": {"shard_bytes": "1KiB"}}, "checkpoint.shard_bytes"),
        ({"checkpoint": {"every_steps": 20, "keep_every": 30}}, "keep_every a multiple of every_steps"),
        (
            {"checkpoint": {"every_steps": 20, "keep_best": 1}, "train": {"eval_every": 30}},
            "every_steps a multiple of train.eval_every",
        ),
        ({"checkpoint": {"keep_best": 1}, "train": {"eval_every": 0}}, "(they are 100 and 0)"),
        ({"train": 5}, "train: found 5; allowed: a mapping"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(sections: dict[str, Any], told: str) -> None:
    lines = problems(job(**sections))
    assert len(lines) == 1
    assert told in lines[0]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    for text, told in [("a: [1", "not valid YAML"), ("- 1", "at the top"), ("name: a\nname: b", "twice")]:
        bad.write_text(text)
        with pytest.raises(ConfigError, match=told) as caught:
            load_config(bad)
        assert str(bad) in str(caught.value)
    bad.write_text("name: a\ndata: {text: x}\ntrain: {stepz: 1, lr: -1}")
    with pytest.raises(ConfigError) as caught:
        load_config(bad)
    assert all(line.startswith(f"{bad}: train.") for line in str(caught.value).splitlines())


def test_yaml_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ndata: {text: x}\ntrain: {lr: 3e-4}")
    assert read_job_file(path)["train"]["lr"] == 3e-4
    assert load_config(path).train.lr == 3e-4


def test_the_digest_depends_on_what_decides_the_numbers_only() -> None:
    base = config_digest(parse_config(job()))
    assert config_digest(parse_config(job(train={"seed": 2}))) != base
    assert config_digest(parse_config(job(model={"n_layer": 2}))) != base
    assert config_digest(parse_config(job(train={"log_every": 3, "device": "cpu"}))) == base
    assert config_digest(parse_config(job(checkpoint={"dir": "elsewhere"}))) == base
    assert config_digest(parse_config(job(model={"preset": "tiny", "n_layer": 4}))) == base


def test_the_schema_does_not_import_torch() -> None:
    code = "import sys, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
