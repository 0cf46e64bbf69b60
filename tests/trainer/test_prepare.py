from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from trainer.config import DataSettings, parse_config
from trainer.data import TokenDataset
from trainer.prepare import FileText, PrepareError, ensure_dataset, main, prepare
from trainer.tokenizer import END_OF_TEXT, ByteTokenizer, TokenizerError, load_tokenizer, train_bpe

ROOT = Path(__file__).parents[2]
WORDS = "the quick brown fox jumps over the lazy dog; naïve café ☕ 日本\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    (directory / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.py"):
        (directory / name).write_text(f"{name} {WORDS}" * 50)
    (directory / "picture.bin").write_bytes(b"\xff\x00\x80")
    (directory / ".hidden").write_text("secret")
    return directory


def tokens_of(dataset: TokenDataset, split: str) -> list[int]:
    shards = getattr(dataset.manifest, split)
    raw = b"".join((dataset.directory / "blobs" / shard.digest).read_bytes() for shard in shards)
    return np.frombuffer(raw, dtype="<u2").tolist()


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_bytes_of_all_files_in_order_become_tokens(text: Path, tmp_path: Path) -> None:
    out = prepare(FileText([str(text)]), "byte", tmp_path / "out", val_fraction=0.0)
    dataset = TokenDataset(out)
    expected: list[int] = []
    for name in ("a.md", "b.txt", "sub/c.py"):
        expected += [*(text / name).read_bytes(), 256]
    assert tokens_of(dataset, "train") == expected
    assert dataset.val_tokens == 0
    assert dataset.manifest.name == "text"
    assert (dataset.vocab_size, dataset.tokenizer_path) == (257, None)


def test_validation_is_cut_out_evenly_and_nothing_is_lost(text: Path, tmp_path: Path) -> None:
    (text / "big.txt").write_text(WORDS * 3000)
    whole = TokenDataset(prepare(FileText([str(text)]), "byte", tmp_path / "whole", val_fraction=0.0))
    split = TokenDataset(prepare(FileText([str(text)]), "byte", tmp_path / "split", val_fraction=0.1))
    assert split.train_tokens + split.val_tokens == whole.train_tokens
    assert split.val_tokens == pytest.approx(0.1 * whole.train_tokens, rel=0.01)
    assert sorted(tokens_of(split, "train") + tokens_of(split, "val")) == sorted(tokens_of(whole, "train"))


def test_shards_are_bounded_and_read_as_one_stream(text: Path, tmp_path: Path) -> None:
    one = TokenDataset(prepare(FileText([str(text)]), "byte", tmp_path / "one"))
    many = TokenDataset(prepare(FileText([str(text)]), "byte", tmp_path / "many", shard_tokens=1000))
    assert len(many.manifest.train) > 5
    assert all(shard.tokens <= 1000 for shard in (*many.manifest.train, *many.manifest.val))
    assert tokens_of(one, "train") == tokens_of(many, "train")
    train = parse_config({"name": "j", "data": {"text": "x"}, "train": {"seq_len": 64}}).train
    assert one.digest_of(3, 1, train) == many.digest_of(3, 1, train)


def test_bpe_is_learnt_from_the_text_and_kept_with_the_dataset(text: Path, tmp_path: Path) -> None:
    dataset = TokenDataset(prepare(FileText([str(text)]), "bpe:300", tmp_path / "out", val_fraction=0.0))
    assert (dataset.manifest.tokenizer_kind, dataset.vocab_size) == ("bpe", 300)
    assert dataset.tokenizer_path is not None
    tokenizer = load_tokenizer(str(dataset.tokenizer_path))
    tokens = tokens_of(dataset, "train")
    assert tokens.count(tokenizer.end_of_text or 0) == 3
    assert tokenizer.decode(tokens).startswith((text / "a.md").read_text())
    # the kept file makes the same dataset again
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(dataset.tokenizer_path.read_bytes())
    again = TokenDataset(prepare(FileText([str(text)]), str(copy), tmp_path / "again", val_fraction=0.0))
    assert again.id == dataset.id


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_encoding_is_lossless(kind: str) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else train_bpe([WORDS] * 20, 280)
    sample = f"{WORDS} {END_OF_TEXT} \t  \x00 é"
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.end_of_text not in tokenizer.encode(sample)
    assert [ids.tolist() for ids in tokenizer.encode_batch([sample, ""])] == [tokenizer.encode(sample), []]


def test_a_text_larger_than_a_piece_is_one_text(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    file.write_text(WORDS * 5000)
    dataset = TokenDataset(prepare(FileText([str(file)]), "byte", tmp_path / "out", val_fraction=0.0))
    assert tokens_of(dataset, "train") == [*file.read_bytes(), 256]


def test_the_standard_library_is_text_enough_for_a_demonstration(tmp_path: Path) -> None:
    data = DataSettings(text=["@python"])
    dataset = TokenDataset(ensure_dataset(data, tmp_path))
    assert 2_000_000 < dataset.train_tokens + dataset.val_tokens < 4_400_000
    assert dataset.manifest.name == "python"


def test_ensuring_a_dataset_prepares_it_once(text: Path, tmp_path: Path) -> None:
    data = DataSettings(text=[str(text)], tokenizer="bpe:280")
    cache = tmp_path / "cache"
    first = ensure_dataset(data, cache)
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert ensure_dataset(data, cache) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    (text / "a.md").write_text("changed " * 100)
    assert ensure_dataset(data, cache) != first
    assert len(left_over(cache)) == 2
    assert ensure_dataset(DataSettings(path=str(first)), cache) == first


def test_several_may_ask_for_the_same_dataset_at_once(text: Path, tmp_path: Path) -> None:
    data = DataSettings(text=[str(text)])
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: ensure_dataset(data, tmp_path / "cache"), range(4)))
    (path,) = paths
    TokenDataset(path)
    assert left_over(tmp_path / "cache") == [path.name]


@pytest.mark.parametrize("form", ["parquet", "json", "text"])
def test_a_dataset_of_the_hub_in_a_local_directory(form: str, tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    rows = ["alpha beta", "gamma", "δέλτα"]
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows, "other": [1, 2, 3]}), source / "part.parquet")
    elif form == "json":
        (source / "part.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        (source / "part.txt").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    done = run("--hf", str(source), "--out", str(out), "--val-fraction", "0")
    assert done.returncode == 0, done.stderr
    dataset = TokenDataset(out)
    assert ByteTokenizer().decode(tokens_of(dataset, "train")) == "".join(rows)
    assert dataset.manifest.name == "corpus"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_reports_and_prints_the_directory(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--text", str(text), "--out", str(tmp_path / "out"), "--name", "mine"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert "training" in captured.err
    assert TokenDataset(tmp_path / "out").manifest.name == "mine"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--text", "{tmp}/absent"], "text {tmp}/absent: no such file or directory"),
        (["--text", "{tmp}/text/picture.bin"], "picture.bin: not UTF-8 text"),
        (["--text", "{tmp}/empty"], "found no document"),
        (["--text", "{tmp}/text", "--tokenizer", "bpe:12"], "bpe:12: allowed: bpe:257 to"),
        (["--text", "{tmp}/text", "--tokenizer", "bpe:x"], "allowed: bpe:257 to"),
        (["--text", "{tmp}/text", "--tokenizer", "words"], "tokenizer 'words': "),
        (["--text", "{tmp}/text", "--tokenizer", "{tmp}/text/a.md"], "not a tokenizer.json"),
        (["--text", "{tmp}/text", "--val-fraction", "0.9"], "--val-fraction: found 0.9; allowed: 0 to 0.5"),
        (["--text", "{tmp}/text", "--shard-tokens", "0"], "--shard-tokens: found 0"),
        (["--text", "{tmp}/text", "--out", "{tmp}/text"], "exists already"),
        (["--hf", "{tmp}/absent"], "cannot load split 'train'"),
        (["--hf", "{tmp}/text/sub", "--hf-column", "body"], "--hf-column body"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    text: Path, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (text / "sub" / "d.txt").write_text("one line\n")
    (text / "sub" / "c.py").unlink()
    before = left_over(tmp_path)
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    status = main(["--out", str(tmp_path / "out"), *given])
    error = capsys.readouterr().err.splitlines()
    assert status == 1
    assert told.replace("{tmp}", str(tmp_path)) in error[-1]
    assert error[-1].startswith("error: ")
    assert left_over(tmp_path) == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from trainer.prepare import main
sys.exit(main(["--text", "@python", "--out", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large while writing; nothing was kept" in done.stderr
    assert left_over(tmp_path) == []


def test_a_prepared_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    from trainer.data import DatasetError

    with pytest.raises(DatasetError, match=r"nowhere/manifest\.json: No such file"):
        ensure_dataset(DataSettings(path=str(tmp_path / "nowhere")), tmp_path)


def test_errors_of_the_library_are_ours() -> None:
    with pytest.raises(PrepareError, match="no such file"):
        FileText(["/nowhere/at/all"])
    with pytest.raises(TokenizerError, match="bpe:5"):
        train_bpe(["x"], 5)
