"""`llambo help`: the documents, in the terminal. They are beside the code in a checkout, and a wheel installs them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path, PurePath

import click
from click.shell_completion import CompletionItem

import llambo
from llambo.cli.kit.command import Command
from llambo.cli.kit.failure import Exit, Failure

EXAMPLES = """
llambo help                          the pages there are
llambo help operations               one of them, in a pager
llambo help send                     the help of a command
llambo help gateway | grep nginx     in a pipe a page is as it was written
"""
#: Besides docs/, what a wheel has of the documents.
SHIPPED = ("README.md", "SECURITY.md", "CHANGELOG.md")
#: As wide as the lines of the pages.
COLUMNS = 120
#: A link: its text and its target.
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
#: HTML in our pages is comments and pictures, a line of it begins with a bracket.
_HTML = re.compile(r"^ *<.*>\n", re.MULTILINE)


def pages() -> dict[str, Path]:
    """Where each page is, by its name in lower case."""
    checkout = Path(llambo.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        found = [*(checkout / file for file in SHIPPED), *checkout.glob("docs/*.md")]
    else:
        files = importlib.metadata.files("llambo") or ()
        found = [Path(str(file.locate())) for file in files if file.parts[-3:-1] == ("doc", "llambo")]
    return {
        page.stem.lower(): page for page in sorted(found, key=lambda page: page.stem.lower()) if page.suffix == ".md"
    }


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    root = context.find_root().command
    commands = root.list_commands(context) if isinstance(root, click.Group) else []
    return [CompletionItem(name) for name in sorted({*pages(), *commands}) if name.startswith(incomplete)]


@click.command("help", cls=Command, examples=EXAMPLES)
@click.argument("topic", nargs=-1, shell_complete=_complete)
@click.pass_context
def help_(context: click.Context, topic: tuple[str, ...]) -> None:
    """Show a page of the documentation, or the help of a command.

    Where a page and a command have the same name, the page is shown, and `--help` behind the command shows its options.
    """
    if not topic:
        _list()
        return
    page = pages().get(topic[0].lower().removesuffix(".md")) if len(topic) == 1 else None
    if page is None:
        click.echo(_help_of(topic, context))
        return
    text = page.read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console

        click.echo_via_pager(drawn(text, min(Console().width, COLUMNS)))
    else:
        click.echo(text, nl=False)


def _list() -> None:
    from llambo.cli.kit.tables import table

    rows = [(name, _about(page.read_text(encoding="utf-8"))) for name, page in pages().items()]
    table(["page", "about"], rows, fixed=1)
    click.echo("`llambo help PAGE` shows one of them, `llambo help COMMAND` the help of a command")


def _about(text: str) -> str:
    """The first sentence of a page, without links and marks."""
    paragraph = next(block for block in text.split("\n\n") if not block.lstrip().startswith("#"))
    sentence = re.split(r"(?<=\.)\s", " ".join(_LINK.sub(r"\1", paragraph).split()), maxsplit=1)[0]
    return sentence.replace("`", "").replace("*", "").rstrip(":")


def _help_of(topic: tuple[str, ...], context: click.Context) -> str:
    """The help of a command, or of a command of a group, as `keys add`."""
    from llambo.cli.main import POINTERS

    at = context.find_root()
    for word in topic:
        command = at.command.get_command(at, word) if isinstance(at.command, click.Group) else None
        if command is None:
            words = " ".join(topic)
            hint = POINTERS.get(words, "`llambo help` lists the pages")
            raise Failure(f"there is no page and no command {words!r}", hint, Exit.USAGE)
        at = command.context_class(command, at, info_name=word, **command.context_settings)
    return at.get_help()


# --- drawing -------------------------------------------------------------------------------------------


def drawn(text: str, width: int) -> str:
    """For a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=width, force_terminal=True)
    with console.capture() as captured:
        console.print(Markdown(_LINK.sub(_shown, _HTML.sub("", text)), code_theme="ansi_dark", hyperlinks=False))
    return captured.get()


def _shown(link: re.Match[str]) -> str:
    """A terminal cannot follow it: the text, and the command that shows the page."""
    text, target = link.groups()
    if target.startswith("http"):
        return link[0]
    page = PurePath(target.partition("#")[0]).stem.lower()
    return text if page in text.lower() or page not in pages() else f"{text} (`llambo help {page}`)"
