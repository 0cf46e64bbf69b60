"""Make a dataset: text → tokens → shards of integers with a manifest, all of it or nothing.

python -m trainer.prepare --text PATH… --tokenizer byte|bpe:N|FILE.json --out DIR
python -m trainer.prepare --hf NAME[:CONFIG] --tokenizer … --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from trainer.config import DataSettings
from trainer.data import DatasetError, DatasetManifest, TokenDataset, Tokens, TokenShard
from trainer.mixing import mix
from trainer.tokenizer import FileTokenizer, Tokenizer, TokenizerError, load_tokenizer, train_bpe

PYTHON_TEXT = "@python"
PYTHON_TEXT_BYTES = 4 * 2**20
"""How much of the standard library `@python` takes: enough to learn from, prepared in a second or two."""

SHARD_TOKENS = 32 * 2**20
_MOST_VAL_BLOCKS = 64
_READ_TOKENS = 2**20
_PIECE_CHARACTERS = 64 * 2**10
_BATCH_PIECES = 128

Progress = Callable[[str], None]


class PrepareError(Exception):
    """The dataset cannot be made; the message names the text, the option or the disk, and what to do."""


class Source(Protocol):
    """Texts that can be gone through again (a BPE vocabulary is learnt in a first pass)."""

    name: str

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """All texts in order, each in one piece or several, and whether a piece is its text's last.

        Pieces keep a corpus in one huge file out of memory."""
        ...


class FileText:
    """Files, directories (every UTF-8 file below them, by name) and `@python`."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Raise PrepareError if a path is absent or no text."""
        self.documents: list[Path | tuple[str, str]] = []
        self.name = ""
        for path in paths:
            self.name = self.name or ("python" if path == PYTHON_TEXT else Path(path).resolve().name)
            self.documents += _python_text() if path == PYTHON_TEXT else _files(Path(path))
        if not self.documents:
            raise PrepareError("text: found no document; give files, or directories with UTF-8 text files")

    def pieces(self) -> Iterator[tuple[str, bool]]:
        for document in self.documents:
            if isinstance(document, tuple):
                yield document[1], True
                continue
            for piece in _pieces_of(document):
                yield piece, False
            yield "", True

    def digest(self) -> str:
        """SHA-256 of all texts, in order."""
        total, text = hashlib.sha256(), hashlib.sha256()
        for piece, last in self.pieces():
            text.update(piece.encode())
            if last:
                total.update(text.digest())
                text = hashlib.sha256()
        return total.hexdigest()


class HubText:
    """A dataset that `datasets.load_dataset` finds: a name on the hub, or a local directory."""

    def __init__(self, name: str, split: str, column: str) -> None:
        """`name` is NAME or NAME:CONFIG.  Raise PrepareError if it cannot be loaded or has no such column."""
        try:
            import datasets
        except ImportError as error:
            raise PrepareError(
                "--hf needs the `datasets` library; run: pip install 'muster-train[hf]'"
            ) from error
        repository, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
        self.name = Path(repository).name
        self._column = column
        datasets.disable_progress_bars()
        try:
            self._rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
            columns = list(next(iter(self._rows), {}))
        except Exception as error:  # the library lets many kinds through; each says what it missed
            raise PrepareError(
                f"--hf {name}: cannot load split {split!r} ({type(error).__name__}: {error}); check the name, "
                "the configuration and the network, or give a local directory"
            ) from error
        if column not in columns:
            raise PrepareError(
                f"--hf-column {column}: {name} has the columns {', '.join(columns) or 'none (it is empty)'}; name one"
            )

    def pieces(self) -> Iterator[tuple[str, bool]]:
        for row in self._rows:
            yield str(row[self._column]), True


def prepare(
    source: Source,
    tokenizer: str,
    out: Path | str,
    *,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    name: str | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Make the dataset directory `out` and return it.

    `tokenizer` is `byte`, `bpe:N` (learnt from the text) or the path of a tokenizer.json.  Every text is
    closed by the tokenizer's end-of-text token if it has one.  The validation split is cut out of the
    whole text evenly.  Everything is written beside `out` first and renamed at the end, so on failure
    nothing stays.  Raise PrepareError or TokenizerError.
    """
    out = Path(out)
    if out.exists():
        raise PrepareError(f"--out {out}: exists already; choose another directory or remove it")
    if not 0.0 <= val_fraction <= 0.5:
        raise PrepareError(f"--val-fraction: found {val_fraction}; allowed: 0 to 0.5")
    if shard_tokens < 1:
        raise PrepareError(f"--shard-tokens: found {shard_tokens}; allowed: at least 1")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise PrepareError(
            f"--out {out}: {error.strerror}; choose a directory that can be written"
        ) from error
    try:
        work.chmod(0o755)  # mkdtemp makes it private; the dataset is not a secret
        _build(source, tokenizer, work, val_fraction, shard_tokens, name or source.name, progress)
        try:
            work.rename(out)
        except OSError:
            if not (out / "manifest.json").exists():
                raise
            shutil.rmtree(work)  # somebody else made the same one meanwhile
    except OSError as error:
        raise PrepareError(
            f"--out {out}: {error.strerror or error} while writing; nothing was kept; free space or choose another disk"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def ensure_dataset(data: DataSettings, cache_dir: Path | str, progress: Progress = lambda _: None) -> Path:
    """The directory of a job's dataset, prepared under `cache_dir` if that has not been done yet.

    Several processes may ask at once.  Raise PrepareError, TokenizerError or DatasetError.
    """
    if data.path is not None:
        TokenDataset(data.path)
        return Path(data.path)
    if data.mix is not None:
        parts = [ensure_dataset(part, cache_dir, progress) for part in data.parts()]
        weighted = list(zip(parts, data.weights(), strict=True))
        ids = " ".join(f"{weight}:{TokenDataset(part).id}" for part, weight in weighted)
        mixed = Path(cache_dir) / hashlib.sha256(f"mix {ids}".encode()).hexdigest()[:32]
        if not (mixed / "manifest.json").exists():
            try:
                mix(weighted, mixed)
            except DatasetError:
                if not (mixed / "manifest.json").exists():  # else another process was first
                    raise
        return mixed
    source = FileText(data.text or ())
    tokenizer = data.tokenizer
    if tokenizer.endswith(".json"):
        loaded = load_tokenizer(tokenizer)
        tokenizer = f"json:{hashlib.sha256(loaded.as_tokenizers_json().encode()).hexdigest()}"
    key = f"{source.digest()} {tokenizer} {data.val_fraction!r}"
    out = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (out / "manifest.json").exists():
        try:
            prepare(source, data.tokenizer, out, val_fraction=data.val_fraction, progress=progress)
        except PrepareError:
            if not (out / "manifest.json").exists():  # else another process was first
                raise
    return out


def _build(
    source: Source,
    tokenizer_spec: str,
    work: Path,
    val_fraction: float,
    shard_tokens: int,
    name: str,
    progress: Progress,
) -> None:
    blobs = work / "blobs"
    blobs.mkdir()
    if tokenizer_spec.startswith("bpe:"):
        progress(f"learning a vocabulary ({tokenizer_spec})")
        size = tokenizer_spec.removeprefix("bpe:")
        tokenizer: Tokenizer = train_bpe(
            (piece for piece, _ in source.pieces()), int(size) if size.isdigit() else 0
        )
    else:
        tokenizer = load_tokenizer(tokenizer_spec)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")

    # Split sizes need the total, so the tokens are spooled once.
    spool = work / "spool"
    total = _spool(source, tokenizer, spool, dtype, progress)
    if total < 2:
        raise PrepareError(f"text {name}: has {total} tokens; allowed: at least 2; give more text")
    tokens: Tokens = np.memmap(spool, dtype=dtype, mode="r")
    train_ranges, val_ranges = _split(total, val_fraction)
    train = _write_shards(tokens, train_ranges, blobs, shard_tokens)
    val = _write_shards(tokens, val_ranges, blobs, shard_tokens)
    del tokens
    spool.unlink()

    tokenizer_digest = None
    if isinstance(tokenizer, FileTokenizer):
        raw = tokenizer.as_tokenizers_json().encode()
        tokenizer_digest = hashlib.sha256(raw).hexdigest()
        _write_synced(blobs / tokenizer_digest, raw)
    manifest = DatasetManifest(
        name=name,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        tokenizer_kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        tokenizer_digest=tokenizer_digest,
        train=train,
        val=val,
    )
    _write_synced(work / "manifest.json", manifest.to_json().encode())
    progress(
        f"{sum(s.tokens for s in train):,} training and {sum(s.tokens for s in val):,} validation tokens, "
        f"vocabulary {tokenizer.vocab_size:,}"
    )


def _spool(source: Source, tokenizer: Tokenizer, spool: Path, dtype: np.dtype[np.uint16 | np.uint32], progress: Progress) -> int:  # fmt: skip
    total, reported = 0, 0
    closing = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], dtype=dtype)
    pieces = source.pieces()
    with spool.open("wb") as file:
        while batch := list(islice(pieces, _BATCH_PIECES)):
            encoded = tokenizer.encode_batch([piece for piece, _ in batch])
            for ids, (_, last) in zip(encoded, batch, strict=True):
                end = closing if last else closing[:0]
                file.write(ids.astype(dtype).tobytes() + end.tobytes())
                total += len(ids) + len(end)
            if total - reported >= 10_000_000:
                progress(f"{total:,} tokens")
                reported = total
    return total


def _split(total: int, val_fraction: float) -> tuple[list[range], list[range]]:
    """Which ranges of the stream train and which validate: up to 64 blocks, evenly spread."""
    wanted = min(round(total * val_fraction), total - 1)
    if wanted == 0:
        return [range(total)], []
    blocks = max(1, min(_MOST_VAL_BLOCKS, wanted // 4096))
    size, stride = wanted // blocks, total // blocks
    train, val, position = [], [], 0
    for k in range(blocks):
        stop = total if k == blocks - 1 else (k + 1) * stride
        train.append(range(position, stop - size))
        val.append(range(stop - size, stop))
        position = stop
    return train, val


def _write_shards(
    tokens: Tokens, ranges: list[range], blobs: Path, shard_tokens: int
) -> tuple[TokenShard, ...]:
    shards: list[TokenShard] = []
    parts = _cut(ranges, shard_tokens)
    for shard in parts:
        path = blobs / ".new"
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for part in shard:
                for start in range(part.start, part.stop, _READ_TOKENS):
                    raw = tokens[start : min(start + _READ_TOKENS, part.stop)].tobytes()
                    digest.update(raw)
                    file.write(raw)
            _sync(file)
        path.rename(blobs / digest.hexdigest())
        shards.append(TokenShard(digest=digest.hexdigest(), tokens=sum(map(len, shard))))
    return tuple(shards)


def _cut(ranges: list[range], most: int) -> list[list[range]]:
    """The ranges, one after another, cut into groups of at most `most` numbers."""
    groups: list[list[range]] = []
    room = 0
    for whole in ranges:
        rest = whole
        while rest:
            if room == 0:
                groups.append([])
                room = most
            part, rest = rest[:room], rest[room:]
            groups[-1].append(part)
            room -= len(part)
    return groups


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _files(path: Path) -> list[Path | tuple[str, str]]:
    if path.is_file():
        if not _is_text(path):
            raise PrepareError(f"text {path}: not UTF-8 text; convert it or leave it out")
        return [path]
    if not path.is_dir():
        raise PrepareError(f"text {path}: no such file or directory; give a path, or {PYTHON_TEXT}")
    below = sorted(p for p in path.rglob("*") if p.is_file())
    return [
        p
        for p in below
        if not any(part.startswith(".") for part in p.relative_to(path).parts) and _is_text(p)
    ]


def _pieces_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        while lines := file.readlines(_PIECE_CHARACTERS):
            yield "".join(lines)


def _is_text(path: Path) -> bool:
    try:
        return not any("\0" in piece for piece in _pieces_of(path))
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise PrepareError(f"text {path}: {error.strerror}; make it readable or leave it out") from error


def _python_text() -> list[Path | tuple[str, str]]:
    """What every machine has: pydoc's topics and the standard library's modules, by name, up to a few MB."""
    from pydoc_data.topics import topics

    documents: list[Path | tuple[str, str]] = [
        (f"topic {name}", text) for name, text in sorted(topics.items())
    ]
    room = PYTHON_TEXT_BYTES - sum(len(text.encode()) for text in topics.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        size = path.stat().st_size
        if 0 < size <= room and _is_text(path):
            documents.append(path)
            room -= size
    return documents


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.prepare", description="Make a dataset from text."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="PATH", help=f"files or directories, or {PYTHON_TEXT}")
    source.add_argument("--hf", metavar="NAME[:CONFIG]", help="a dataset of the `datasets` library")
    parser.add_argument("--hf-split", default="train", metavar="SPLIT", help="which split of it (train)")
    parser.add_argument(
        "--hf-column", default="text", metavar="COLUMN", help="which column has the text (text)"
    )
    parser.add_argument("--tokenizer", default="byte", metavar="byte|bpe:N|FILE.json")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--name", help="the dataset's name (the source's)")
    parser.add_argument("--val-fraction", type=float, default=0.05)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    options = parser.parse_args(arguments)
    try:
        text: Source = (
            FileText(options.text)
            if options.text
            else HubText(options.hf, options.hf_split, options.hf_column)
        )
        prepare(
            text,
            options.tokenizer,
            options.out,
            val_fraction=options.val_fraction,
            shard_tokens=options.shard_tokens,
            name=options.name,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (PrepareError, TokenizerError, DatasetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
