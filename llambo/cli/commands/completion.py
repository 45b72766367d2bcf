"""`llambo completion`: the shell completes commands, options and values of all three programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
from click.shell_completion import get_completion_class

from llambo.cli.kit.command import Command, load
from llambo.cli.kit.failure import Exit, Failure

EXAMPLES = """
llambo completion bash --install         then begin a new shell
llambo completion --install              for the shell in $SHELL
source <(llambo completion bash)         only for this shell
"""
PROGRAMS = {
    "llambo": "llambo.cli.main:main",
    "llambo-broker": "llambo.cli.services.broker:main",
    "llambo-worker": "llambo.cli.services.worker:main",
}
SHELLS = ("bash", "zsh", "fish")
#: A script of the package bash-completion, which loads ours when they are needed.
BASH_COMPLETION = ("/usr/share/bash-completion/bash_completion", "/etc/bash_completion",
                   "/usr/local/share/bash-completion/bash_completion")  # fmt: skip
#: Ends a line that we have added to a file of the user.
MARK = "  # llambo completion"


class Places(NamedTuple):
    """Where the shell finds completions: a file for each program, and a line that it may need in its own file."""

    folder: Path
    file: str
    startup: Path | None = None
    line: str = ""


@click.command(cls=Command, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Write it to where the shell looks for it.")
def completion(shell: str | None, install: bool) -> None:
    """Print what makes a shell complete commands, options and values, or install it for this user."""
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise Failure(f"name a shell: {', '.join(SHELLS)}", "llambo completion bash --install", Exit.USAGE)
    if install:
        install_at(places(shell, os.environ, bash_completion=any(map(os.path.isfile, BASH_COMPLETION))), shell)
    else:
        click.echo("\n".join(source(shell, program) for program in PROGRAMS), nl=False)


def source(shell: str, program: str) -> str:
    made = get_completion_class(shell)
    assert made is not None, "click knows the shells of SHELLS"
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()
    return made(load(PROGRAMS[program]), {}, program, variable).source()


def places(shell: str, environ: Mapping[str, str], *, bash_completion: bool) -> Places:
    home = Path(environ.get("HOME", "/"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    if shell == "fish":
        return Places(Path(environ.get("XDG_CONFIG_HOME") or home / ".config", "fish/completions"), "{}.fish")
    if shell == "zsh":
        folder = data / "zsh/site-functions"
        line = f"fpath=('{folder}' $fpath); autoload -Uz compinit && compinit"
        return Places(folder, "_{}", Path(environ.get("ZDOTDIR") or home, ".zshrc"), line)
    folder = data / "bash-completion/completions"
    if bash_completion:
        return Places(folder, "{}")
    return Places(folder, "{}", home / ".bashrc", f"for it in '{folder}'/llambo*; do . \"$it\"; done")


def install_at(to: Places, shell: str) -> None:
    at = to.folder
    try:
        to.folder.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            at = to.folder / to.file.format(program)
            at.write_text(source(shell, program), encoding="utf-8")
            click.echo(f"written  {at}")
        if to.startup is not None:
            at = to.startup
            before = at.read_text(encoding="utf-8") if at.exists() else ""
            if MARK not in before:
                with at.open("a", encoding="utf-8") as file:
                    file.write(f"{'' if before.endswith(chr(10)) or not before else chr(10)}{to.line}{MARK}\n")
            click.echo(f"{'kept' if MARK in before else 'written'}  {at}")
    except OSError as error:
        raise Failure(f"{at} cannot be written: {error.strerror}", f"llambo completion {shell} > FILE") from error
    click.echo(f"Begin a new {shell}, and try: llambo <Tab>")
