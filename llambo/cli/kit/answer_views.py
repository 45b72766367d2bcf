"""How a stream is shown: as text for people, or as one JSON object a line for programs.

The JSON lines are a promise to scripts: fields may be added, none changes its meaning.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import sys
import time
import unicodedata
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.std_streams import json_text, paint
from llambo.cli.kit.tables import duration, plural
from llambo.mesh.wire.errors import printable
from llambo.mesh.wire.reports import waiting

if TYPE_CHECKING:
    from llambo.mesh.client.answer_stream import Answer, Piece, Stream
    from llambo.mesh.wire.tokens import Logprob

#: What is shorter says nothing about a rate.
MEASURABLE_MS = 5.0
#: Between words; a line end is a part of its own.
_SPACES = re.compile(r"([ \t]+|\n)")
#: How far a load is, at the end of a note.
_PERCENT = re.compile(r", \d+ %.*")
#: Begins and ends lines of code in markdown.
FENCE = "```"
#: What a user reads with an answer that no model made.
FAKE = "the fake engine answers: its words are made up"
#: To the first column, and erase what is there.
CLEAR_LINE = "\r\x1b[K"
#: Make room for a line below, remember the place in the text, and go to that line; and back to the text.
TO_LINE_BELOW, TO_TEXT = "\x1bD\x1b[A\x1b7\r\n", "\x1b8"
#: How long a word is held that may not be complete.
HOLD_S = 0.5


class View:
    """How an answer is shown. A method that a view does not need does nothing."""

    def placed(self) -> None:
        """The place in the queue has changed, or what the request waits for."""

    def stalled(self, reason: str, quiet_s: float) -> None:
        """No token has come for so long."""

    def linked(self, lost: str) -> None:
        """The broker is lost, for this reason; or (empty) one answers again."""

    def piece(self, piece: Piece) -> None: ...

    def frame(self) -> float | None:
        """Draw what is new. Returns when to draw again if no piece comes, in the time of the loop."""

    def end(self, answer: Answer, clock: Clock) -> None: ...

    def close(self) -> None: ...


class Clock:
    """What a user waited for, in milliseconds since the request was sent."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._first_tokens = 0
        self.first_ms = 0.0
        self.total_ms = 0.0
        #: How often the broker was lost, which alone knew how often the request had moved before.
        self.broker_losses = 0

    @property
    def quiet_s(self) -> float:
        """How long no token has come."""
        return time.monotonic() - self._last

    def on_piece(self, tokens: int) -> None:
        self._last = time.monotonic()
        if not self._first_tokens:
            self._first_tokens, self.first_ms = tokens, self._now()

    def on_end(self) -> None:
        self.total_ms = self._now()

    def rate(self, tokens: int) -> float:
        """Tokens per second, from the first that came; of an answer that came at once, from the request."""
        later, spent_ms = tokens - self._first_tokens, self.total_ms - self.first_ms
        if later < 1 or spent_ms < MEASURABLE_MS:
            later, spent_ms = tokens, self.total_ms
        return round(later * 1_000 / spent_ms, 1) if spent_ms > 0 else 0.0

    def _now(self) -> float:
        return (time.monotonic() - self._start) * 1_000


def link_text(lost: str) -> str:
    return f"lost the broker ({lost}); trying again" if lost else "the broker is back; going on"


def _without_progress(reason: str) -> str:
    """Where no line can be rewritten, not every percent gets one."""
    return _PERCENT.sub("", reason)


class TextView(View):
    """The answer on stdout. On a terminal a line below it says what it waits for, until it goes on."""

    def __init__(self, out: StdoutWriter, stream: Stream, *, in_place: bool = True) -> None:
        """`in_place`: no other text comes to this terminal meanwhile, so the line below can be rewritten."""
        self._out = out
        self._stream = stream
        self._in_place = in_place and sys.stderr.isatty()
        self._last = "\n"
        self._begun = False
        self._words = WordWrap()
        #: When a word that is held is shown, in the time of the loop.
        self._show_at = 0.0
        #: The line below is there; and it is below text, which goes on where it ended.
        self._status = self._below = False
        self._reason = ""

    def placed(self) -> None:
        # A request that starts at once reports 0 as well; the place is shown only after a wait.
        ahead, note = self._stream.ahead, self._stream.note
        if self._in_place and not self._begun and note:
            self._rewrite(waiting(note))
        elif self._in_place and not self._begun and (ahead or self._status):
            self._rewrite(f"waiting, {ahead} ahead" if ahead else "waiting, next in line")

    def stalled(self, reason: str, quiet_s: float) -> None:
        if self._in_place:
            self._rewrite(reason if self._stream.note else f"{quiet_s:.0f} s without a token: {reason}")
        elif _without_progress(reason) != _without_progress(self._reason):
            self._say(reason)
        self._reason = reason

    def linked(self, lost: str) -> None:
        self._say(link_text(lost))

    def piece(self, piece: Piece) -> None:
        self._clear()
        self._reason = ""
        if not self._begun and self._stream.fake:
            click.echo(f"llambo: {FAKE}", err=True)
        self._begun = True
        self._show_at = asyncio.get_running_loop().time() + HOLD_S
        self._put(self._words.feed(piece.text, self._out.columns) if self._out.columns else piece.text)

    def frame(self) -> float | None:
        """The rest of a word may come much later: what is here of it is shown after a moment."""
        if not self._words.held:
            return None
        if asyncio.get_running_loop().time() < self._show_at:
            return self._show_at
        self._clear()
        self._put(self._words.rest(self._out.columns))
        return None

    def close(self) -> None:
        self._clear()
        self._put(self._words.rest(self._out.columns))
        if self._last != "\n":
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            self._out.put(text)
            self._last = text[-1]

    def _say(self, text: str) -> None:
        """A line of its own, for good. On a terminal the answer goes on below it."""
        self._clear()
        if self._out.columns and self._last != "\n":
            self._put(self._words.rest(self._out.columns) + "\n")
            self._words = WordWrap()
        click.echo(f"llambo: {text}", err=True)

    def _rewrite(self, text: str) -> None:
        if not self._status:
            self._status = True
            self._below = bool(self._out.columns) and self._last != "\n"
            paint(TO_LINE_BELOW if self._below else "", err=True)
        width = shutil.get_terminal_size().columns - 1
        paint(f"{CLEAR_LINE}{' '.join(printable(text).split())[:width]}", err=True)

    def _clear(self) -> None:
        if self._status:
            self._status = False
            paint(f"{CLEAR_LINE}{TO_TEXT if self._below else ''}", err=True)


class WordWrap:
    """Breaks lines between words, as text for a terminal arrives. A word is held until it is complete, or asked for.

    The text stays what the model wrote: markdown is drawn by `llambo chat`. Lines of code are left as they are.
    """

    def __init__(self) -> None:
        self._word = ""
        #: The line so far, of which only the width and the beginning matter.
        self._columns = 0
        self._begin = ""
        self._code = False

    @property
    def held(self) -> bool:
        return bool(self._word)

    def feed(self, text: str, columns: int) -> str:
        *whole, self._word = _SPACES.split(self._word + text)
        return "".join(self._place(part, columns) for part in whole)

    def rest(self, columns: int) -> str:
        """What is held. The word may go on after it."""
        word, self._word = self._word, ""
        return self._place(word, columns) if word else ""

    def _place(self, part: str, columns: int) -> str:
        """`part`: a word, or a space or a line end."""
        if part == "\n":
            if self._begin.lstrip().startswith(FENCE):
                self._code = not self._code
            self._columns, self._begin = 0, ""
            return part
        wide = sum(_cells(letter) for letter in part)
        breaks = not self._code and self._columns > 0 and self._columns + wide > columns
        self._begin = (self._begin + part)[: 2 * len(FENCE)]
        if breaks and part.isspace():
            return ""  # the next word begins a line in any case
        self._columns = wide if breaks else self._columns + wide
        return f"\n{part}" if breaks else part


def _cells(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


class JsonView(View):
    def __init__(self, out: StdoutWriter, stream: Stream) -> None:
        self._out = out
        self._stream = stream
        self._accepted = False
        self._reason = ""

    def stalled(self, reason: str, quiet_s: float) -> None:
        if _without_progress(reason) != _without_progress(self._reason):
            click.echo(f"llambo: {reason}", err=True)
        self._reason = reason

    def linked(self, lost: str) -> None:
        click.echo(f"llambo: {link_text(lost)}", err=True)

    def placed(self) -> None:
        if self._accepted:
            note = {"note": waiting(self._stream.note)} if self._stream.note else {}
            self._put({"type": "waiting", "ahead": self._stream.ahead or 0, **note})
        else:
            self._accept()

    def piece(self, piece: Piece) -> None:
        self._accept()
        self._reason = ""
        line: dict[str, object] = {"type": "token", "index": piece.index, "ids": piece.ids, "text": piece.text}
        if piece.logprobs:
            line["logprobs"] = [each and _logprob(each) for each in piece.logprobs]
        self._put(line)

    def end(self, answer: Answer, clock: Clock) -> None:
        self._accept()
        self._put({"type": "end"} | statistics(answer, clock))

    def _accept(self) -> None:
        """Always the first line, also of a request that was over when it was attached to."""
        if not self._accepted:
            self._accepted = True
            stream = self._stream
            self._put({"type": "accepted", "id": stream.id, "model": stream.model, "ahead": stream.ahead or 0})

    def _put(self, line: dict[str, object]) -> None:
        self._out.put(json_text(line) + "\n")


async def show(
    stream: Stream, view: View, out: StdoutWriter, texts: list[str] | None = None, clock: Clock | None = None
) -> tuple[Answer, Clock]:
    """Show the stream to its end. Each piece of text is appended to `texts` before it is shown."""
    clock = clock or Clock()
    while True:
        try:
            async with asyncio.timeout_at(view.frame()):
                piece = await stream.next_piece()
        except TimeoutError:
            continue
        if piece is None:
            break
        clock.on_piece(len(piece.ids))
        if texts is not None:
            texts.append(piece.text)
        view.piece(piece)
        await out.room()
    clock.on_end()
    assert stream.answer is not None, "a stream that was read to its end has an answer"
    view.end(stream.answer, clock)
    return stream.answer, clock


def _logprob(token: Logprob) -> dict[str, object]:
    top = [{"id": t.id, "text": t.piece.decode(errors="replace"), "logprob": t.logprob} for t in token.top]
    return {"logprob": token.logprob, "top": top}


def statistics(answer: Answer, clock: Clock) -> dict[str, object]:
    return {
        "id": answer.id,
        "reason": answer.reason,
        "tokens": len(answer.ids),
        "prompt_tokens": answer.usage.prompt_tokens,
        "worker": answer.worker,
        "moves": answer.moves,
        "queued_ms": answer.queued_ms,
        "first_token_ms": round(clock.first_ms, 1),
        "total_ms": round(clock.total_ms, 1),
        "tokens_per_s": clock.rate(len(answer.ids)),
        "fake": answer.fake,
    }


def statistics_line(answer: Answer, clock: Clock) -> str:
    moves = [f"moved {plural(answer.moves, 'time')}"] if answer.moves else []
    moves += [f"broker lost {plural(clock.broker_losses, 'time')}"] if clock.broker_losses else []
    pace = ", ".join(pace_of(answer, clock, f" in {duration(clock.total_ms)}"))
    return (
        f"{pace}, queued {duration(answer.queued_ms)}, worker {answer.worker or '?'}, "
        f"{', '.join(moves) or 'never moved'}, {answer.reason}, "
        f"id {answer.id}"
    )


def pace_of(answer: Answer, clock: Clock, within: str = "") -> list[str]:
    """How much came and how fast, in parts of a sentence. Without a token there is no speed."""
    tokens = len(answer.ids)
    if not tokens:
        return [f"no tokens{within}"]
    return [
        f"{plural(tokens, 'token')}{within}", f"{clock.rate(tokens):.1f} tokens/s",
        f"first after {duration(clock.first_ms)}",
    ]  # fmt: skip


# --- Writing an answer to stdout as it comes, without ever blocking the event loop. ---
#
# A pager that is not scrolled stops reading. A client that waited for it would miss its heartbeats, and the broker
# would cancel its request. So what stdout does not take now is stored, and `room` waits for it; meanwhile the client
# goes on, and the broker stores what it has no room for.

#: A pipe that is writable takes as much as this at once (PIPE_BUF), so that a write does not block.
WRITE_BYTES = 4_096
#: What may be stored here before the reader has to wait.
BACKLOG_BYTES = 64 * 1024


class StdoutWriter:
    """Belongs to one event loop. After its reader has left, `room` and `flush` raise BrokenPipeError."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._terminal = os.isatty(descriptor)
        self._loop = asyncio.get_running_loop()
        self._pending = bytearray()
        self._watching = False
        self._error: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def columns(self) -> int:
        """The width of the terminal; 0: it is none, or reports no width."""
        try:
            return os.get_terminal_size(self._descriptor).columns if self._terminal else 0
        except OSError:
            return 0

    def put(self, text: str) -> None:
        # A file gets the text of the model unchanged. A terminal must not act on control characters in it.
        self.paint(printable(text) if self._terminal else text)

    def paint(self, drawn: str) -> None:
        """Text with control sequences of our own, for a terminal."""
        self._pending += drawn.encode("utf-8", "replace")
        if not self._watching:
            self._push()

    async def room(self) -> None:
        await self._below(BACKLOG_BYTES)

    async def flush(self) -> None:
        await self._below(0)

    def close(self) -> None:
        """What was not written yet is lost."""
        self._watch(False)

    async def _below(self, level: int) -> None:
        while self._error is None and len(self._pending) > level:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error

    def _push(self) -> None:
        try:
            while self._pending and self._error is None:
                if not select.select([], [self._descriptor], [], 0)[1]:
                    self._watch(True)
                    return
                written = os.write(self._descriptor, self._pending[:WRITE_BYTES])
                del self._pending[:written]
        except OSError as error:
            self._error = error
        self._watch(False)
        self._wake()

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._watching:
            self._loop.add_writer(self._descriptor, self._push_some)
        elif self._watching and not wanted:
            self._loop.remove_writer(self._descriptor)
        self._watching = wanted

    def _push_some(self) -> None:
        self._push()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
