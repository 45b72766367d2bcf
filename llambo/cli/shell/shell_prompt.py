"""The prompt of the shell at a terminal: editing, history, completion, and notices above the line."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History

import llambo
from llambo.cli.chat.prompt import open_history, terminal_output
from llambo.cli.kit.common import state_folder
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.follow import report_link
from llambo.cli.shell.language import MeshNames, completions
from llambo.cli.shell.shell import LeaveShell, Shell, ShellSession
from llambo.mesh.client.client import Client
from llambo.mesh.wire.errors import LlamboError, printable

log = logging.getLogger(__name__)

HISTORY_FILE = "shell_history"
#: How long a completion waits for names from the mesh.
NAMES_S = 1.0


def converse(shell: Shell) -> None:
    """Until the end of the input, or `exit`."""
    prompt: PromptSession[str] = PromptSession(
        "llambo> ",
        history=history(os.environ),
        completer=_ShellCompleter(shell.session),
        complete_while_typing=False,
        complete_in_thread=True,
        enable_suspend=True,
        output=terminal_output(),
    )

    def on_link(lost: str) -> None:
        """On another thread. Above the prompt, if a line is edited."""
        app = prompt.app
        if app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(run_in_terminal, lambda: report_link(lost), context=app.context)
        else:
            report_link(lost)

    shell.session.on_link = on_link
    _greet(shell.session)
    while True:
        try:
            shell.line(prompt.prompt(handle_sigint=False))
        except KeyboardInterrupt:
            continue
        except (EOFError, LeaveShell):
            return


def _greet(session: ShellSession) -> None:
    try:
        found = session.run(session.connect().status())
    except LlamboError as error:
        Failure.of(error).show()
        click.echo("  each command tries again; `help` lists them")
        return
    click.echo(
        f"llambo {llambo.__version__}: {found.ready} of {found.workers} workers ready, "
        f"{found.running} requests running, {found.waiting} waiting; "
        "`help` lists the commands, Ctrl-D leaves"
    )


class _ShellCompleter(Completer):
    """Asks the mesh for its names when Tab is pressed."""

    def __init__(self, session: ShellSession) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        begun = line.split(" ")[-1].split(";")[-1]
        for word in completions(line, mesh_names(self._session)):
            yield Completion(printable(word), start_position=-len(begun))


def mesh_names(session: ShellSession) -> MeshNames:
    """The names that are there now. Without a broker only those of the requests that were sent here."""
    sent = list(reversed(session.sent))
    if session.client is not None:
        try:
            return session.submit(_ask_for_names(session.client, sent)).result()
        except (LlamboError, TimeoutError) as error:
            log.debug("no names to complete: %s", error)
    return MeshNames(requests=tuple(sent))


async def _ask_for_names(client: Client, sent: list[str]) -> MeshNames:
    async with asyncio.timeout(NAMES_S):
        workers, models, requests = await asyncio.gather(client.workers(), client.models(), client.requests())
    return MeshNames(
        workers=tuple(row.worker for row in workers),
        models=tuple(row.model for row in models),
        requests=tuple(dict.fromkeys([*sent, *(row.id for row in requests)])),
    )


def history(environ: Mapping[str, str]) -> History:
    """In a file that only its owner can read: prompts are private."""
    return open_history(
        state_folder(environ, HISTORY_FILE), lambda error: log.warning("no history is stored: %s", error)
    )  # fmt: skip
