"""The prompt of a shell at a terminal: editing, history, completion."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterable, Mapping

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app_or_none, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.output import create_output

import llambo
from llambo.cli.chat.prompt import open_history
from llambo.cli.chat.store import state_folder
from llambo.cli.kit.failure import Failure
from llambo.cli.kit.following import tell_link
from llambo.cli.kit.shell_session import Session
from llambo.cli.shell.shell_names import Known, completions
from llambo.cli.shell.shell_run import Leave, Shell, settable
from llambo.mesh.wire.errors import LlamboError, harmless

log = logging.getLogger(__name__)

PROMPT = "llambo> "
HISTORY_FILE = "shell_history"
#: How long a Tab waits for names from the mesh.
NAMES_S = 1.0


async def converse(shell: Shell) -> None:
    """Until the end of the input, or `exit`."""
    shell.session.on_link = _tell_link
    await _greet(shell.session)
    prompt: PromptSession[str] = PromptSession(
        PROMPT,
        history=history(os.environ),
        completer=_Completer(shell.session),
        complete_while_typing=False,
        enable_suspend=True,
        output=create_output(always_prefer_tty=True),
    )
    while True:
        try:
            line = await prompt.prompt_async(handle_sigint=False)
            await shell.line(line)
        except KeyboardInterrupt:
            continue
        except (EOFError, Leave):
            return


async def _greet(session: Session) -> None:
    try:
        found = await (await session.connect()).status()
    except LlamboError as error:
        Failure.of(error).show()
        click.echo("  each command tries again; `help` lists them")
        return
    click.echo(
        f"llambo {llambo.__version__}: {found.ready} of {found.workers} workers ready, "
        f"{found.running} requests running, {found.waiting} waiting; "
        "`help` lists the commands, Ctrl-D leaves"
    )


def _tell_link(lost: str) -> None:
    """Above the prompt, if that is there."""
    if get_app_or_none() is None:
        tell_link(harmless(lost))
    else:
        run_in_terminal(lambda: tell_link(harmless(lost)))


class _Completer(Completer):
    """Asks the mesh for its names when Tab is pressed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        return ()

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        line = document.text_before_cursor
        begun = line.split(" ")[-1].split(";")[-1]
        for word in completions(line, await known(self._session)):
            yield Completion(harmless(word), start_position=-len(begun))


async def known(session: Session) -> Known:
    """What there is to name now. Without a broker only the names of the shell itself."""
    if session.client is None:
        return Known(settable=settable())
    client = session.client
    try:
        async with asyncio.timeout(NAMES_S):
            workers, models, requests = await asyncio.gather(client.workers(), client.models(), client.requests())
    except (LlamboError, TimeoutError) as error:
        log.debug("no names to complete: %s", error)
        return Known(requests=tuple(reversed(session.sent)), settable=settable())
    return Known(
        workers=tuple(row.worker for row in workers),
        models=tuple(row.model for row in models),
        requests=tuple(dict.fromkeys([*reversed(session.sent), *(row.id for row in requests)])),
        settable=settable(),
    )


def history(environ: Mapping[str, str]) -> History:
    """In a file that nobody else can read: prompts are private."""
    return open_history(
        state_folder(environ) / HISTORY_FILE, lambda error: log.warning("no history is kept: %s", error)
    )  # fmt: skip
