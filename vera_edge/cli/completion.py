"""`vera-edge completion`: what a shell has to read to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_VERA_EDGE_COMPLETE"  # what click itself answers to


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what SHELL reads to complete commands, options and their choices.

    bash, in ~/.bashrc: eval "$(vera-edge completion bash)"; zsh, in ~/.zshrc: the same with zsh;
    fish: vera-edge completion fish > ~/.config/fish/completions/vera-edge.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    main = click.get_current_context().find_root().command
    script = found(main, {}, "vera-edge", _VARIABLE)
    click.echo(script.source_template % script.source_vars())
