"""`llambo completion`: the shell completes commands, options and values of all three programs."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click
from click.shell_completion import get_completion_class

from llambo.cli.kit.command import Command, load
from llambo.cli.kit.failure import Exit, Failure

EXAMPLES = """
llambo completion bash --install         then begin a new shell
llambo completion --install              for the shell that you log in with
llambo completion --uninstall            all that --install has written
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
@click.option("--uninstall", is_flag=True, help="Remove what --install has written, for every shell.")
def completion(shell: str | None, install: bool, uninstall: bool) -> None:
    """Print what makes a shell complete commands, options and values, or install it for this user."""
    if uninstall:
        for each in [shell] if shell else SHELLS:
            uninstall_from(places(each, os.environ, bash_completion=False))
        return
    shell = shell or Path(os.environ.get("SHELL") or login_shell()).name
    if shell not in SHELLS:
        raise Failure(f"name a shell: {', '.join(SHELLS)}", "llambo completion bash --install", Exit.USAGE)
    if install:
        install_at(places(shell, os.environ, bash_completion=any(map(os.path.isfile, BASH_COMPLETION))), shell)
    else:
        click.echo("\n".join(source(shell, program) for program in PROGRAMS), nl=False)


def login_shell() -> str:
    """That of the user database: cron, ssh with a command, and containers set no $SHELL."""
    try:
        return pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:  # a container's user may have no entry
        return ""


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
    each = '[ ! -r "$it" ] || . "$it"'  # no error if the files were deleted
    return Places(folder, "{}", home / ".bashrc", f"for it in '{folder}'/llambo*; do {each}; done")


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


def uninstall_from(where: Places) -> None:
    at = where.folder
    try:
        for program in PROGRAMS:
            at = where.folder / where.file.format(program)
            if at.exists():
                at.unlink()
                click.echo(f"removed  {at}")
        if where.startup is not None and where.startup.exists():
            at = where.startup.resolve()  # it may be a link into a folder of dotfiles
            before = at.read_text(encoding="utf-8").splitlines(keepends=True)
            after = [line for line in before if not line.rstrip().endswith(MARK)]
            if after != before:
                draft = at.with_name(f"{at.name}.llambo")
                draft.write_text("".join(after), encoding="utf-8")
                shutil.copymode(at, draft)
                draft.replace(at)
                click.echo(f"removed  a line of {at}")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{at} cannot be changed: {error}", "remove it by hand") from error
