"""`llambo chat`: a conversation, kept and searchable; or one question."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from llambo.cli.chat.chat_core import CHAT_TOKENS, TURNS
from llambo.cli.chat.chat_session import one_line
from llambo.cli.commands.send import read_stdin
from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, pass_common
from llambo.cli.kit.flags import Seed, client_options, json_option, setting_option, settings_options
from llambo.cli.kit.output import duration, number, show_json, table
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.cli.chat.chat_store import Store

EXAMPLES = """
llambo chat                                a conversation; /help in it
llambo chat --session travel               go on with one, or begin it
llambo chat "What is AI?"                  one answer
git diff | llambo chat "Explain this"      about what comes from a pipe
llambo chat --session travel "And by train?"
llambo chat --list                         those that are kept
llambo chat --search "night train"         in all of them
llambo chat --json --search train | jq -r '.[].session'
"""


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.argument("prompt", nargs=-1, metavar="[PROMPT|-]")
@click.option(
    "--session", metavar="NAME", help="Go on with this chat, or begin it.",
    shell_complete=lambda context, parameter, typed: [name for name in _store().names() if name.startswith(typed)],
)  # fmt: skip
@click.option("--list", "listed", is_flag=True, help="List the chats that are kept, the last one first.")
@click.option("--search", metavar="TEXT", help="Show where this was said, in any chat that is kept.")
@click.option("--delete", metavar="NAME", help="Remove a chat that is kept.")
@click.option("--private", is_flag=True, help="Keep nothing: no chat, and nothing that is typed.")
@click.option(
    "--turns", type=click.IntRange(0, 10_000), default=TURNS, metavar="NUMBER", show_default=True,
    help="So many earlier turns go along with a question, if there is room.",
)  # fmt: skip
@click.option("--system", metavar="TEXT", help="Tell the model how to behave.")
@click.option("--seed", type=Seed(), metavar="NUMBER", help="The same seed, the same chances.")
@click.option("--no-color", is_flag=True, help="Without colours, as with NO_COLOR in the environment.")
@json_option
@setting_option("max_tokens", default=str(CHAT_TOKENS))
@settings_options(["client_model", "temperature", "connect_ms"])
@client_options
@pass_common
def chat(
    common: Common, /, prompt: tuple[str, ...], as_json: bool, listed: bool, search: str | None, delete: str | None,
    **chosen: Any,
) -> None:  # fmt: skip
    """Talk with a model. Without PROMPT a conversation; with one, or with stdin, a single answer.

    A conversation is kept in a file, which only its owner may read, in $XDG_STATE_HOME/llambo/chats; it has a name of
    its own, and --session takes it up again. A single answer is kept with --session alone. What the model has no room
    for is left out, the oldest turns first, and that is said. The longest answer is no more than half of the room.

    Ctrl-C stops an answer and keeps what there is of it. PROMPT and stdin together are one question. With --json a
    single answer has the lines of `llambo send --json`.
    """
    ways = [listed, search is not None, delete is not None, bool(prompt)]
    if sum(ways) > 1:
        raise click.UsageError("--list, --search, --delete and a PROMPT: one at a time")
    if chosen["private"] and chosen["session"]:
        raise click.UsageError("--private keeps nothing, so there is no --session")
    if listed:
        _list(_store(), as_json)
    elif search is not None:
        _search(_store(), search, as_json)
    elif delete is not None:
        _delete(_store(), delete)
    else:
        _talk(common, prompt, as_json, chosen)


def _store() -> Store:
    from llambo.cli.chat.chat_store import Store, state_folder

    return Store(state_folder(os.environ) / "chats")


# --- those that are kept -------------------------------------------------------------------------------


def _list(store: Store, as_json: bool) -> None:
    found = sorted(store.all(), key=lambda each: each.session.used if each.session else 0, reverse=True)
    if as_json:
        show_json([
            {"session": each.name, "problem": each.problem}
            | ({"turns": len(each.session.turns), "created": each.session.created, "used": each.session.used,
                "model": each.session.model, "first": _first(each.session.turns)} if each.session else {})
            for each in found
        ])  # fmt: skip
        return
    rows = [
        (each.name, number(len(each.session.turns)), _ago(each.session.used), one_line(_first(each.session.turns), 50))
        for each in found if each.session is not None
    ]  # fmt: skip
    table(["session", "turns", "used", "begins with"], rows, nothing=f"no chat is kept in {store.folder}", fixed=1)
    for each in found:
        if each.problem:
            click.echo(f"llambo: {store.path(each.name)} is left alone: {each.problem}", err=True)


def _first(turns: list[Any]) -> str:
    return str(turns[0].question) if turns else ""


def _ago(used_s: int) -> str:
    """Days for what is older than two of them."""
    ago_s = max(0.0, time.time() - used_s)
    return f"{ago_s // 86_400:.0f} days ago" if ago_s > 2 * 86_400 else f"{duration(ago_s * 1_000)} ago"


def _search(store: Store, text: str, as_json: bool) -> None:
    from llambo.cli.chat.chat_session import matches

    if not text.strip():
        raise click.UsageError("--search: there is nothing to look for")
    found = [
        (each.name, turn, said)
        for each in store.all() if each.session is not None
        for turn, said in matches(each.session.turns, text)
    ]  # fmt: skip
    if as_json:
        show_json([{"session": name, "turn": turn, "said": said} for name, turn, said in found])
    else:
        rows = [(name, number(turn), said) for name, turn, said in found]
        table(["session", "turn", "said"], rows, nothing=f"no chat has {text!r} in it", fixed=1)


def _delete(store: Store, name: str) -> None:
    if store.exists(name):
        store.take(name)
    if not store.delete(name):
        raise LlamboError(Code.BAD_REQUEST, f"no chat called {name} is kept; `llambo chat --list` shows those that are")
    click.echo(f"{name} is removed")


# --- talking -------------------------------------------------------------------------------------------


def _talk(common: Common, prompt: tuple[str, ...], as_json: bool, chosen: dict[str, Any]) -> None:
    question = _question(prompt)
    if question is None:
        if as_json:
            raise click.UsageError("--json is for a single answer, --list and --search")
        if not sys.stdout.isatty():
            raise click.UsageError("a conversation needs a terminal; give a PROMPT for a single answer")
    elif not question.strip():
        raise LlamboError(Code.BAD_REQUEST, "the prompt is empty")
    if len(chosen["system"] or "") > limits.SYSTEM_CHARS:
        raise click.UsageError(f"--system may have {limits.SYSTEM_CHARS} characters")
    from llambo.cli.chat.chat_loop import talk

    click.get_current_context().exit(talk(common, _store(), question, as_json=as_json, **chosen))


def _question(arguments: tuple[str, ...]) -> str | None:
    """What is to be asked: the arguments, stdin, or both. None: nothing yet, a person will type it."""
    said = " ".join(word for word in arguments if word != "-")
    if sys.stdin.isatty() and "-" not in arguments:
        return said if arguments else None
    return "\n\n".join(part for part in (said, read_stdin()) if part)
