"""One connection, without a socket: bytes in, bytes and orders out.

Commands are carried out in the order they came: one is answered before the next one is looked at, and meanwhile
nothing more is read. A command with a tag is the exception: its answer comes beside others, and each object of it
bears the tag. A peer that does not read what it is told is not listened to either, and holds up nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from llambo.bridge import facts as f
from llambo.bridge import saying
from llambo.bridge.commands import Command, Mistake, Tag, request_of
from llambo.bridge.reading import LineReader, ObjectReader, Reader
from llambo.mesh.wire.errors import Code, ErrorInfo

STOPPED = ErrorInfo(Code.CANCELLED, "the bridge is stopping")
GREETING = {"format": "msgpack"}


@dataclass(frozen=True, slots=True)
class Terms:
    """What every connection may do."""

    line_bytes: int = 1024 * 1024
    #: Answers under way at a time, of one connection.
    in_flight: int = 16
    quit_stops: bool = False


@dataclass(slots=True)
class _Running:
    """A command whose answer is not there yet."""

    name: str
    tag: Tag


class ConnectionCore:
    def __init__(self, terms: Terms) -> None:
        #: What LOAD has chosen.
        self.model = ""
        self._terms = terms
        self._reader: Reader = LineReader(terms.line_bytes)
        self._encode: saying.Encode = saying.as_line
        self._running: dict[int, _Running] = {}
        self._last_number = 0
        #: The command that has to be answered before the next one is looked at.
        self._first: int | None = None
        self._out: list[f.Order] = []
        self._reading = True
        self._room = True
        #: The peer says nothing more; nor does it listen.
        self._finished = self._hung_up = False
        #: The bridge stops: nothing new is begun.
        self._stopping = False
        self._closed = False

    @property
    def answers(self) -> int:
        """Under way."""
        return len(self._running)

    def handle(self, fact: f.Fact) -> list[f.Order]:
        if self._closed:
            return []
        match fact:
            case f.Arrived(data):
                self._reader.feed(data)
            case f.PeerFinished():
                self._finished = True
            case f.PeerHungUp():
                self._hung_up = True
            case f.Filled():
                self._room = False
            case f.Drained():
                self._room = True
            case f.Text(number, text):
                self._more(number, text)
            case f.Done(number, data):
                self._done(number, data)
            case f.Failed(number, error):
                self._answer(number, saying.error(error))
            case f.Stopping():
                self._stopping = True
            case f.TimeIsUp():
                self._time_is_up()
            case _:
                assert_never(fact)
        self._turn()
        ordered, self._out = self._out, []
        return ordered

    # --- commands --------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Look at what has come, as far as that may be; then see how it goes on."""
        while self._may_begin():
            found = self._reader.next()
            if found is None and self._finished:
                found = self._reader.end()
            if found is None:
                break
            self._take(found)
        if self._closed:
            return
        over = self._stopping or (self._finished and self._may_begin())
        if self._hung_up and (self._finished or not self._reading):
            self._leave(f.Abort())
        elif over and not self._running:
            self._leave(f.Close())
        elif (wanted := self._may_begin() and not self._finished) != self._reading:
            self._reading = wanted
            self._out.append(f.Read(wanted))

    def _may_begin(self) -> bool:
        return self._first is None and self._room and not self._stopping and not self._closed

    def _take(self, found: Command | Mistake) -> None:
        if isinstance(found, Mistake):
            said = saying.mistake(found)
            self._say(saying.last(said) if found.streamed else said, found.tag)
            if found.fatal:
                self._leave(f.Close())
            return
        match found.name:
            case "PING":
                self._say(saying.ok("pong", {}), found.tag)
            case "FREE":
                freed, self.model = self.model, ""
                self._say(saying.ok("free", {"model": freed}), found.tag)
            case "BINARY":
                self._binary(found)
            case "QUIT":
                self._say(saying.ok("bye", {}), found.tag)
                if self._terms.quit_stops:
                    self._out.append(f.StopBridge())
                self._leave(f.Close())
            case "STATUS":
                self._begin(found, f.Ask(self._number(), "status"))
            case "LOAD":
                self._begin(found, f.Ask(self._number(), "models"))
            case _:
                prompt, options = request_of(found, self.model)
                self._begin(found, f.Infer(self._number(), prompt, options, streamed=found.name == "INFER_STREAM"))

    def _binary(self, command: Command) -> None:
        """Said in the old way; the next byte is of the new one."""
        if isinstance(self._reader, ObjectReader):
            self._say(saying.mistake(Mistake("this connection is binary already")), command.tag)
            return
        self._say(saying.ok("binary", GREETING), command.tag)
        rest = self._reader.rest()
        self._reader, self._encode = ObjectReader(self._terms.line_bytes), saying.as_object
        self._reader.feed(rest)

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _begin(self, command: Command, order: f.Ask | f.Infer) -> None:
        running = _Running(command.name if command.name != "LOAD" else f"LOAD {command.fields['model']}", command.tag)
        if len(self._running) >= self._terms.in_flight:
            text = f"{len(self._running)} answers are under way on this connection, {self._terms.in_flight} may be"
            refused = Mistake(text, "wait for one of them, or connect once more", code=Code.OVER_LIMIT)
            self._end(running, saying.mistake(refused))
            return
        self._running[order.number] = running
        if command.tag is None:
            self._first = order.number
        self._out.append(order)

    # --- answers ---------------------------------------------------------------------------------------------

    def _more(self, number: int, text: str) -> None:
        if (running := self._running.get(number)) is not None and text:
            self._say(saying.token(text), running.tag)

    def _done(self, number: int, data: Any) -> None:
        if (running := self._running.get(number)) is None:
            return
        name, _, argument = running.name.partition(" ")
        if name == "LOAD":
            self._answer(number, self._loaded(argument, data))
        elif name == "STATUS":
            self._answer(number, saying.ok("up", {"model": self.model, **data}))
        else:
            self._answer(number, saying.ok(data["reason"], data))

    def _loaded(self, model: str, served: list[dict[str, Any]]) -> saying.Said:
        found = next((one for one in served if one.get("model") == model), None)
        if found is None:
            names = ", ".join(str(one.get("model")) for one in served) or "none"
            return saying.error(ErrorInfo(Code.UNKNOWN_MODEL, f"no worker has {model}; there is {names}"[:2_000]))
        self.model = model
        return saying.ok("loaded", found)

    def _answer(self, number: int, said: saying.Said) -> None:
        running = self._running.pop(number, None)
        if running is None:
            return
        if number == self._first:
            self._first = None
        self._end(running, said)

    def _end(self, running: _Running, said: saying.Said) -> None:
        self._say(saying.last(said) if running.name == "INFER_STREAM" else said, running.tag)

    def _say(self, said: saying.Said, tag: Tag) -> None:
        self._out.append(f.Write(self._encode(saying.tagged(said, tag))))

    # --- the end ---------------------------------------------------------------------------------------------

    def _time_is_up(self) -> None:
        self._stopping = True
        for number in list(self._running):
            self._out.append(f.Drop(number))
            self._answer(number, saying.error(STOPPED))

    def _leave(self, how: f.Close | f.Abort) -> None:
        self._out += [f.Drop(number) for number in self._running]
        self._running.clear()
        self._out.append(how)
        self._closed = True
