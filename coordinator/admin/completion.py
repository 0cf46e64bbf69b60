"""`muster completion`: a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash:  eval "$(muster completion bash)"         in ~/.bashrc
    zsh:   eval "$(muster completion zsh)"          in ~/.zshrc
    fish:  muster completion fish > ~/.config/fish/completions/muster.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(ctx.find_root().command, {}, "muster", "_MUSTER_COMPLETE").source())
