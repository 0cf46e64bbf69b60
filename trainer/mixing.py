"""Make one dataset of several, each with a weight: training draws from them in that proportion.

    python -m trainer.mixing --out DIR WEIGHT:DATASET WEIGHT:DATASET…

The tokens stay as they are; blobs are linked, or copied where they cannot be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.data import DatasetError, DatasetManifest, MixPart, TokenDataset
from trainer.mixture import Mixture


def mix(parts: Sequence[tuple[Path, int]], out: Path) -> Path:
    """Make the dataset directory `out` of `parts` (directory, weight), all of it or nothing, and return it.

    One that somebody else made meanwhile is kept.  Raise DatasetError if the parts do not fit together.
    """
    if out.exists():
        raise DatasetError(f"--out {out}: exists already; choose another directory or remove it")
    datasets = [TokenDataset(directory) for directory, _ in parts]
    try:
        weights = Mixture(tuple(weight for _, weight in parts)).weights
    except ValueError as error:
        raise DatasetError(f"mix: {error}") from error
    manifest = _merged([dataset.manifest for dataset in datasets], weights)
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        work.chmod(0o755)
        (work / "blobs").mkdir()
        for dataset in datasets:
            for digest in dataset.manifest.blobs():
                _link(dataset.directory / "blobs" / digest, work / "blobs" / digest)
        (work / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
        try:
            work.rename(out)
        except OSError:
            if not (out / "manifest.json").exists():
                raise
    except OSError as error:
        raise DatasetError(f"--out {out}: {error.strerror or error}; nothing was kept") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return out


def _merged(manifests: list[DatasetManifest], weights: tuple[int, ...]) -> DatasetManifest:
    first = manifests[0]
    for manifest in manifests:
        if manifest.mix:
            raise DatasetError(f"dataset {manifest.name}: is a mixture itself; mix its parts instead")
        for what, found, expected in (
            ("tokenizer", manifest.tokenizer_kind, first.tokenizer_kind),
            ("vocabulary size", manifest.vocab_size, first.vocab_size),
            ("tokenizer.json", manifest.tokenizer_digest, first.tokenizer_digest),
            ("dtype", manifest.dtype, first.dtype),
        ):
            if found != expected:
                raise DatasetError(
                    f"dataset {manifest.name}: its {what} is {found}, that of {first.name} is {expected}; prepare "
                    "all datasets of a mixture with the same tokenizer"
                )
    return DatasetManifest(
        name="+".join(manifest.name for manifest in manifests),
        dtype=first.dtype,
        tokenizer_kind=first.tokenizer_kind,
        vocab_size=first.vocab_size,
        tokenizer_digest=first.tokenizer_digest,
        train=tuple(shard for manifest in manifests for shard in manifest.train),
        val=tuple(shard for manifest in manifests for shard in manifest.val),
        mix=tuple(
            MixPart(name=manifest.name, weight=weight, train=len(manifest.train), val=len(manifest.val))
            for manifest, weight in zip(manifests, weights, strict=True)
        ),
    )


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _part(text: str) -> tuple[Path, int]:
    weight, separator, directory = text.partition(":")
    if not separator or not weight.isdigit() or int(weight) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WEIGHT:DATASET with a whole weight from 1 on")
    return Path(directory), int(weight)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.mixing", description="Make one dataset of several, with weights."
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("parts", nargs="+", type=_part, metavar="WEIGHT:DATASET")
    options = parser.parse_args(arguments)
    try:
        mix(options.parts, options.out)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
