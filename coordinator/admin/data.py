"""`muster data`: prepare datasets, in a subprocess, as tokenizers have no place in this one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import click

from coordinator.admin.errors import OperationFailed
from coordinator.admin.options import with_output
from coordinator.admin.output import Output


@click.group()
def data() -> None:
    """Prepare datasets."""


@data.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@with_output
@click.pass_context
def prepare(ctx: click.Context, *, output: Output, arguments: tuple[str, ...]) -> None:
    """Make token shards with digests and a manifest from text.

    Takes the arguments of `python -m trainer.prepare`; `muster data prepare --help` shows them.
    """
    command = [sys.executable, "-m", "trainer.prepare", *arguments]
    # With -o json this command's standard output is the summary's alone.
    done = subprocess.run(command, stdout=subprocess.PIPE if output.json else None, text=True, check=False)
    if done.stdout:
        click.echo(done.stdout, err=True, nl=False)
    if done.returncode:
        ctx.exit(done.returncode if done.returncode in (1, 2) else 1)
    if output.json and not {"-h", "--help"} & set(arguments):
        output.done(_summary(_out(arguments)), "")


def _out(arguments: tuple[str, ...]) -> Path:
    for index, argument in enumerate(arguments):
        if argument == "--out" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    raise OperationFailed("trainer.prepare succeeded without --out; there is no dataset to describe")


def _summary(directory: Path) -> dict[str, object]:
    try:
        text = (directory / "manifest.json").read_bytes()
        manifest = json.loads(text)
    except (OSError, ValueError) as error:
        raise OperationFailed(
            f"{directory}: trainer.prepare left no readable manifest.json ({error})"
        ) from error
    return {
        "out": str(directory),
        "dataset": hashlib.sha256(text).hexdigest(),
        "name": manifest.get("name"),
        "dtype": manifest.get("dtype"),
        "tokenizer": manifest.get("tokenizer"),
        "tokens": {
            name: sum(shard["tokens"] for shard in shards) for name, shards in manifest["splits"].items()
        },
    }
