"""`llambo shell`: a prompt over the whole mesh, or a script of commands, over one connection.

Each command runs by the function that `llambo` itself calls for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llambo.cli.kit.command import Command
from llambo.cli.kit.common import Common, connect, where
from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.flags import client_options, json_option, settings_options
from llambo.cli.kit.follow import end_signals
from llambo.cli.shell.language import TABLE, TO_MODEL, BadLine, CommandCall, command_of, parse, settable
from llambo.mesh.wire import limits
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.client import Client

T = TypeVar("T")

EXAMPLES = """
llambo shell
llambo shell -c 'status; nodes'
llambo shell -c 'drain tiny-01; watch --times 3 nodes' --keep-going
llambo shell < morning.llambo
llambo shell --json -c 'infer --max-tokens 20 hello' | jq .
"""

SETTINGS = ("client_model", "max_tokens", "temperature", "connect_ms", "timeout_ms")
#: The longest line: a prompt, and what stands before it.
LINE_BYTES = limits.PROMPT_BYTES + 4_096
#: A usage error with this many words behind the command may be a sentence for the model.
SENTENCE_WORDS = 3


@click.command(cls=Command, examples=EXAMPLES, exit_codes=True)
@click.option("-c", "text", metavar="TEXT", help="Carry this out and leave: commands, with `;` between them.")
@click.option(
    "--keep-going", is_flag=True, help="In a script: go on after a failure. The exit code is the first one's."
)
@json_option
@settings_options(SETTINGS)
@client_options
def shell(common: Common, text: str | None, keep_going: bool, as_json: bool) -> None:
    """Type commands and prompts, over one connection to the mesh.

    At `llambo>`: help, status, nodes, models, queue, infer, send, attach, cancel, drain, undrain, spawn, why, events,
    watch, set, unset, exit. They are the commands of `llambo`, with all their options; `help` says what each does.
    Anything else is a prompt to the model.

    With -c, or when stdin is no terminal, it carries out the commands and leaves. The first failure ends it with its
    exit code. With --json each command prints its JSON, one after another.
    """
    _ = common.settings  # a wrong setting is reported before anything else
    interactive = text is None and sys.stdin.isatty()
    shell = Shell(common, as_json=as_json, keep_going=keep_going or interactive)
    try:
        with shell.signals():
            if interactive:
                from llambo.cli.shell.shell_prompt import converse

                converse(shell)
            else:
                with suppress(LeaveShell):
                    shell.lines(text.splitlines() if text is not None else stdin_lines())
    finally:
        shell.session.close()
    click.get_current_context().exit(Exit.OK if interactive else shell.failed)


class LeaveShell(Exception):
    """The shell ends."""


class Shell:
    def __init__(self, common: Common, *, as_json: bool = False, keep_going: bool = False) -> None:
        self.session = ShellSession(common)
        #: The exit code of the first command that failed.
        self.failed: int = Exit.OK
        #: What `set` has set, as text for the options.
        self.chosen: dict[str, Any] = {}
        self._common = common
        self._as_json = as_json
        self._keep_going = keep_going
        self._ended_by = 0
        # Child contexts find the shell by it; it has no name, so that usage lines begin with the command.
        self._context = click.Context(
            click.Command("shell"), info_name="", obj=self, help_option_names=["-h", "--help"]
        )  # fmt: skip

    # --- lines -----------------------------------------------------------------------------------------

    def lines(self, lines: Iterable[str]) -> None:
        """Carry them out. A failure ends them unless they are to keep going; a Ctrl-C does in any case."""
        for line in lines:
            self.line(line)
            if self._stops():
                return

    def line(self, line: str) -> None:
        self.session.interrupted = False
        try:
            calls = parse(line, TABLE)
        except BadLine as error:
            Failure(str(error), code=Exit.USAGE).show()
            self.failed = self.failed or Exit.USAGE
            return
        for call in calls:
            if isinstance(call, CommandCall):
                code = self.do(call.name, call.words, call.rest)
            else:
                code = self.do("send", ("--", call.text)) if call.text else Exit.OK
            if self._ended_by:
                sys.exit(128 + self._ended_by)
            self.failed = self.failed or code
            if self._stops():
                break

    def _stops(self) -> bool:
        return self.session.interrupted or (self.failed != Exit.OK and not self._keep_going)

    def do(self, name: str, words: Iterable[str], typed: str = "") -> int:
        """Run a command and show its errors. Its exit code."""
        try:
            self._invoke(name, list(words))
        except click.exceptions.Exit as left:
            return left.exit_code
        except click.ClickException as error:
            error.show()
            if isinstance(error, click.UsageError) and len(typed.split()) >= SENTENCE_WORDS:
                click.echo(f"  to ask the model that, begin with `{TO_MODEL}`", err=True)
            return error.exit_code
        except LlamboError as error:
            failure = Failure.of(error, as_json=self._as_json)
            failure.show()
            return failure.exit_code
        except KeyboardInterrupt:
            return Exit.INTERRUPTED
        return Exit.OK

    def _invoke(self, name: str, words: list[str]) -> None:
        command = command_of(name)
        given = list(TABLE[name].arguments)
        if self._as_json and any(option.name == "as_json" for option in command.params):
            given.append("--json")
        common = Common(dict(self._common.flags), self._common.config, self._common.verbose, self.session)
        chosen = {option.name: self.chosen[name] for name, option in settable().items() if name in self.chosen}
        context = command.make_context(name, [*given, *words], parent=self._context, obj=common, default_map=chosen)
        with context:
            command.invoke(context)

    # --- signals ---------------------------------------------------------------------------------------

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C stops the command that runs, and a script with it. SIGTERM and SIGHUP also end the shell."""
        before = {number: signal.signal(number, self._on_signal) for number in end_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._ended_by = number
        if self.session.waiting:
            self.session.interrupt(number)
        elif self._ended_by:
            sys.exit(128 + self._ended_by)
        else:
            self.session.interrupted = True
            raise KeyboardInterrupt


def stdin_lines() -> Iterator[str]:
    """Each line as soon as it is there: its writer may wait for the result of the one before."""
    while data := sys.stdin.buffer.readline(LINE_BYTES + 2):
        if len(data.rstrip(b"\r\n")) > LINE_BYTES:
            raise LlamboError(Code.TOO_LONG, f"a line on stdin is longer than {LINE_BYTES} bytes")
        try:
            yield data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise LlamboError(Code.BAD_REQUEST, f"a line on stdin is not UTF-8 text: {error}") from error


# --- One connection for all commands, and the event loop it lives on. ---
#
# The loop runs in a thread of its own, all the time: a broker drops a client from which no heartbeat comes. The
# commands run in the main thread and are the same functions that `llambo` calls; instead of a loop and a connection of
# their own (`cli/kit/common.py`) they get these. Ctrl-C stops what a command waits for, not the shell.

#: This many requests of the shell are offered for completion after their end.
REMEMBERED = 50


#: A signal that arrives just before the main thread begins to wait is handled when the wait ends: it takes no longer.
SIGNALS_S = 0.25


class ShellSession:
    def __init__(self, common: Common) -> None:
        self._common = common
        #: None until the first command that needs it.
        self.client: Client | None = None
        #: A command waits for the mesh.
        self.waiting = False
        #: There was a Ctrl-C since the command began.
        self.interrupted = False
        #: Called at a signal while a stream is followed: it is cancelled, and its end awaited.
        self.on_signal: Callable[[int], None] | None = None
        #: Called with the reason when the broker is lost, and with "" when one is back. On the thread of the loop.
        self.on_link: Callable[[str], None] | None = None
        #: The ids of the requests that were sent here, the latest last.
        self.sent: deque[str] = deque(maxlen=REMEMBERED)
        self._work: asyncio.Task[Any] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llambo-shell", daemon=True)
        self._thread.start()

    # --- in the main thread ----------------------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs on the loop; raises KeyboardInterrupt after a Ctrl-C."""
        self.waiting = True
        try:
            future = self.submit(self._interruptible(work))
            while not concurrent.futures.wait([future], SIGNALS_S).done:
                pass
            return future.result()
        except concurrent.futures.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self.waiting = False

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Stop what the command waits for, now or next."""
        self.interrupted = True
        self._loop.call_soon_threadsafe(self._interrupt, number)

    def connect(self) -> Client:
        return self.run(self._connected())

    def close(self) -> None:
        self.submit(self._wind_up()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the loop -----------------------------------------------------------------------------------------------

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        if self.interrupted:
            work.close()
            raise asyncio.CancelledError
        self._work = asyncio.current_task()
        try:
            return await work
        finally:
            self._work = None

    def _interrupt(self, number: int) -> None:
        if self.on_signal is not None:
            self.on_signal(number)
        elif self._work is not None:
            self._work.cancel()

    @asynccontextmanager
    async def connected(self, common: Common) -> AsyncIterator[Client]:
        """The connection of this session; a command with another broker or key gets one of its own."""
        if where(common) == where(self._common):
            yield await self._connected()
        else:
            async with connect(common) as other:
                yield other

    async def _connected(self) -> Client:
        if self.client is None:
            client = connect(self._common)
            client.on_link = self._on_link
            await client.connect()
            self.client = client
        return self.client

    async def _wind_up(self) -> None:
        if self.client is not None:
            await self.client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _on_link(self, lost: str) -> None:
        if self.on_link is not None:
            self.on_link(lost)
