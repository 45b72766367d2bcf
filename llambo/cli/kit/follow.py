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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import click

from llambo.cli.kit.answer_views import (
    CLEAR_LINE,
    Clock,
    JsonView,
    StdoutWriter,
    TextView,
    View,
    link_text,
    show,
    statistics_line,
)
from llambo.cli.kit.command import silence_stdout
from llambo.cli.kit.common import Common, connected, run
from llambo.cli.kit.failure import Exit
from llambo.cli.kit.std_streams import paint
from llambo.cli.kit.tables import plural
from llambo.mesh.wire.errors import Code, Fault, LlamboError
from llambo.mesh.wire.reports import waiting

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Stream
    from llambo.mesh.client.client import Client
    from llambo.mesh.wire.reports import RequestStory

Opener = Callable[["Client"], Awaitable["Stream"]]

#: How long an interrupted command waits for the end of its request.
END_WAIT_S = 2.0
#: After so long without a token the reason is looked for, again and again; and how long a broker may take to answer.
STALL_S, ASK_S, ANSWER_S = 3.0, 1.0, 2.0
#: The same without a terminal: what has to come before the request can go on is reported there, once.
QUIET_STALL_S = 8.0
#: Digits of an id that are enough to find it.
ID_SHOWN = 8


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
        #: The request is this command's own.
        self.cancels = cancels
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
        if again or self.stream is None or not self.cancels:
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
    with Interrupts(cancels=mine, session=common.session).installed() as interrupts:
        try:
            return await _followed(common, opener, as_json, interrupts)
        except asyncio.CancelledError:
            if not interrupts.signal:
                raise
            return _interrupted(interrupts, mine)
        except LlamboError as error:
            if (stream := interrupts.stream) is None:
                raise
            if common.verbose:
                click.echo(f"id {stream.id}", err=True)
            raise _with_story(error, stream) from error


async def _followed(common: Common, opener: Opener, as_json: bool, interrupts: Interrupts) -> int:
    timeout_ms = common.settings.number("timeout_ms")
    try:
        async with asyncio.timeout(timeout_ms / 1_000 or None), connected(common) as client:
            interrupts.stream = await opener(client)
            if common.session is not None:
                common.session.sent.append(interrupts.stream.id)
            explains = bool(common.verbose) or sys.stderr.isatty()
            answer, clock = await _show(client, interrupts.stream, as_json, explains, common.session is None)
    except TimeoutError as error:
        raise LlamboError(Code.TIMEOUT, f"no whole answer within {timeout_ms} ms; it was cancelled") from error
    if common.verbose:
        click.echo(statistics_line(answer, clock), err=True)
    if answer.reason == "length" and not as_json:
        most = common.settings.number("max_tokens") if interrupts.cancels else 0
        click.echo(f"llambo: {cut_text(len(answer.ids), most)}", err=True)
    return _exit_code(answer, interrupts)


def cut_text(tokens: int, most: int) -> str:
    """The model had not ended its answer. `most`: what was asked for, if this command did."""
    if tokens < most:
        return f"cut after {plural(tokens, 'token')}: the context is full"
    return f"cut after {plural(tokens, 'token')}; --max-tokens{'' if most else ' of `llambo send`'} allows more"


def report_link(lost: str) -> None:
    """Explain on a line of its own why nothing goes on, where no view does."""
    if sys.stdout.isatty():
        click.echo(err=True)
    elif sys.stderr.isatty():
        paint(CLEAR_LINE, err=True)
    click.echo(f"llambo: {link_text(lost)}", err=True)


async def _show(client: Client, stream: Stream, as_json: bool, explains: bool, alone: bool) -> tuple[Answer, Clock]:
    """`explains`: whatever keeps the answer is reported on stderr. `alone`: no shell reports the link itself."""
    with contextlib.closing(StdoutWriter(sys.stdout.fileno())) as out:
        view: View = JsonView(out, stream) if as_json else TextView(out, stream, in_place=alone)
        stream.on_place, clock = view.placed, Clock()

        def linked(lost: str) -> None:
            clock.broker_losses += bool(lost)
            view.linked(lost)

        if alone and explains:
            client.on_link = linked
        async with stream, _explaining(client, stream, view, clock, explains):
            try:
                shown = await show(stream, view, out, clock=clock)
            except LlamboError:  # the text so far is printed before the error
                view.close()
                await out.flush()
                raise
            view.close()
            await out.flush()
            return shown


def _with_story(error: LlamboError, stream: Stream) -> LlamboError:
    """Where the story of the request explains the error, the hint has the command that shows it."""
    story, hint = f"`llambo why {stream.id[:ID_SHOWN]}`", error.hint
    if "`llambo why ID`" in hint:
        hint = hint.replace("`llambo why ID`", story)
    elif stream.ahead is not None and error.trait.fault is Fault.MESH and error.code is not Code.NO_BROKER:
        hint = f"{hint}; {story} shows what happened"
    return LlamboError(error.code, error.text, error.retry_after_ms, hint=hint)


# --- why no token comes ---


@contextlib.asynccontextmanager
async def _explaining(client: Client, stream: Stream, view: View, clock: Clock, explains: bool) -> AsyncIterator[None]:
    work = _explain(client, stream, view, clock) if explains else _explain_once(client, stream, view, clock)
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _explain(client: Client, stream: Stream, view: View, clock: Clock) -> None:
    """While no token comes, show what the broker knows about the request."""
    while not stream.over:
        if clock.quiet_s < STALL_S:
            await asyncio.sleep(STALL_S - clock.quiet_s)
            continue
        reason = waiting(stream.note) if stream.note else await _reason(client, stream.id)
        if clock.quiet_s >= STALL_S and not stream.over:
            view.stalled(reason, clock.quiet_s)
        await asyncio.sleep(ASK_S)


async def _explain_once(client: Client, stream: Stream, view: View, clock: Clock) -> None:
    """Report what the request waits for, if it is more than its turn."""
    while not stream.over:
        await asyncio.sleep(QUIET_STALL_S)
        if clock.quiet_s < QUIET_STALL_S:
            continue
        with contextlib.suppress(TimeoutError, LlamboError):  # a lost link is reported when the time is up
            async with asyncio.timeout(ANSWER_S):
                found = await client.why(stream.id)
            if found.waits_for and not stream.over:
                view.stalled(stall_text(found), clock.quiet_s)
                return


async def _reason(client: Client, id: str) -> str:
    try:
        async with asyncio.timeout(ANSWER_S):
            return stall_text(await client.why(id))
    except TimeoutError:
        return "waiting: the broker does not answer"
    except LlamboError as error:
        return unknown_text(error)


def unknown_text(error: LlamboError) -> str:
    """A restarted broker has the request again as soon as its worker, or this client, has sent it."""
    if error.code is Code.UNKNOWN_REQUEST:
        return "waiting: the broker was restarted, and the request is being brought back to it"
    return f"waiting: {error.text}"


def stall_text(found: RequestStory) -> str:
    """Why its next token has not come."""
    match found.state:
        case "waiting":
            place = f"{found.ahead} ahead" if found.ahead else "next in line"
            text = waiting(found.waits_for or f"a free worker, {place}")
            lost = [step for step in found.story if step.what != "waits"][-1:] if found.moves else []
            return text + "".join(f"; {step.what}: {step.detail}" for step in lost)
        case "dispatched":
            return f"waiting for {found.worker}, which has not accepted it yet"
        case "running":
            tokens = plural(found.tokens, "token")
            # After a move some of them, or all, are of the worker before.
            does = f"continues the answer, which has {tokens}" if found.moves and found.tokens else f"has made {tokens}"
            return f"waiting for {found.worker}, which {does}"
        case "completing":
            return f"waiting for the last tokens from {found.worker}, which were lost on their way"
        case _:
            return "waiting for the end of the answer"


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
