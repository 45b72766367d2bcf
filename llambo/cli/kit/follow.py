"""Follow a stream to its end, or to a Ctrl-C: `send` and `attach`.

The first Ctrl-C cancels the request and waits for its end, so that the user sees what was generated. The second one
exits at once; the broker then cancels the request when the client's lease expires. In a shell the shell receives the
signals, and the second one ends only the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import click

from llambo.cli.kit.answer_views import CLEAR_LINE, Clock, JsonView, StdoutWriter, TextView, View, show, statistics_line
from llambo.cli.kit.command import silence_stdout
from llambo.cli.kit.common import Common, connected, run
from llambo.cli.kit.failure import Exit
from llambo.cli.kit.std_streams import paint
from llambo.mesh.wire.errors import Code, LlamboError

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Stream
    from llambo.mesh.client.client import Client

Opener = Callable[["Client"], Awaitable["Stream"]]

#: How long an interrupted command waits for the end of its request.
END_WAIT_S = 2.0


def end_signals() -> list[int]:
    """The signals that end a command. Under `nohup` a closed terminal does not."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


@contextlib.contextmanager
def on_end_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Within it the running loop calls `handler` with the number of each signal that ends a command."""
    loop, numbers = asyncio.get_running_loop(), end_signals()
    for number in numbers:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class SignalSource(Protocol):
    """A shell or a chat, which receives the signals and passes them on to what runs in it."""

    on_signal: Callable[[int], None] | None


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP while a stream is followed. `signal` is the first one received, or 0."""

    def __init__(self, *, cancels: bool, session: SignalSource | None = None) -> None:
        self.signal = 0
        self.stream: Stream | None = None
        self._cancels = cancels
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._work = asyncio.current_task()
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[Interrupts]:
        if self._session is None:
            with on_end_signals(self._on_signal):
                yield self
            return
        self._session.on_signal = self._on_signal
        try:
            yield self
        finally:
            self._session.on_signal = None

    def _on_signal(self, number: int) -> None:
        if self.signal and self._session is None:
            os._exit(128 + number)
        again, self.signal = bool(self.signal), number
        if again or self.stream is None or not self._cancels:
            self._stop()
        else:
            self._tasks.append(self._loop.create_task(self.stream.cancel()))
            self._loop.call_later(END_WAIT_S, self._stop)

    def _stop(self) -> None:
        if self._work is not None:
            self._work.cancel()


def follow(common: Common, opener: Opener, *, as_json: bool, mine: bool) -> int:
    """Show the stream of `opener`, and with -v its statistics on stderr. Returns the exit code."""
    try:
        return run(common, _follow(common, opener, as_json, mine))
    except BrokenPipeError:
        # The reader, such as `head -3`, has closed the pipe. Closing the stream has cancelled the request.
        silence_stdout()
        return Exit.OK


async def _follow(common: Common, opener: Opener, as_json: bool, mine: bool) -> int:
    timeout_ms = common.settings.number("timeout_ms")
    with Interrupts(cancels=mine, session=common.session).installed() as interrupts:
        try:
            async with asyncio.timeout(timeout_ms / 1_000 or None), connected(common) as client:
                if common.session is None and (common.verbose or sys.stderr.isatty()):
                    client.on_link = report_link
                interrupts.stream = await opener(client)
                if common.session is not None:
                    common.session.sent.append(interrupts.stream.id)
                answer, clock = await _show(interrupts.stream, as_json)
        except TimeoutError as error:
            raise LlamboError(Code.TIMEOUT, f"no whole answer within {timeout_ms} ms; it was cancelled") from error
        except asyncio.CancelledError:
            if not interrupts.signal:
                raise
            return _interrupted(interrupts, mine)
    if common.verbose:
        click.echo(statistics_line(answer, clock), err=True)
    return _exit_code(answer, interrupts)


def report_link(lost: str) -> None:
    """Explain why the answer does not go on."""
    if sys.stdout.isatty():
        click.echo(err=True)
    elif sys.stderr.isatty():
        paint(CLEAR_LINE, err=True)
    text = f"lost the broker ({lost}); trying again" if lost else "the broker is back; going on"
    click.echo(f"llambo: {text}", err=True)


async def _show(stream: Stream, as_json: bool) -> tuple[Answer, Clock]:
    with contextlib.closing(StdoutWriter(sys.stdout.fileno())) as out:
        view: View = JsonView(out, stream) if as_json else TextView(out, stream)
        stream.on_place = view.placed
        async with stream:
            try:
                shown = await show(stream, view, out)
            except LlamboError:  # the text so far is printed before the error
                view.close()
                await out.flush()
                raise
            view.close()
            await out.flush()
            return shown


def _exit_code(answer: Answer, interrupts: Interrupts) -> int:
    tokens = len(answer.ids)
    if answer.reason == "deadline":
        raise LlamboError(Code.DEADLINE, f"the deadline has passed after {tokens} tokens")
    if answer.reason != "cancelled":
        return Exit.OK
    if interrupts.signal:
        click.echo(f"llambo: interrupted; the request was cancelled after {tokens} tokens", err=True)
        return 128 + interrupts.signal
    click.echo(f"llambo: the request was cancelled by another user after {tokens} tokens", err=True)
    return Exit.ERROR


def _interrupted(interrupts: Interrupts, mine: bool) -> int:
    stream = interrupts.stream
    if stream is not None and not mine:
        click.echo(f"llambo: interrupted; `llambo attach {stream.id}` follows it again", err=True)
    else:
        click.echo("llambo: interrupted", err=True)
    return 128 + interrupts.signal
