"""From the tokens of a feed to the bytes of server-sent events.

Every event has an id: the feed, when it was begun, and the number of the event. `Last-Event-ID` brings it back, and
the reader is given what follows. Nothing here waits or sends.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from llambo.gateway.answers.asking import Event, Renderer, Token
from llambo.gateway.answers.feed import Feed
from llambo.gateway.answers.problems import FieldError

#: Tokens that are made events of at a time. Who reads slowly would be given all of a long answer at once, which then
#: stands in memory until he has taken it; and to others nothing is told while it is made.
AT_ONCE = 256
_ID = re.compile(r"([0-9a-f]{32})-([0-9a-f]{1,10})-(\d{1,9})")
_decoder = codecs.getincrementaldecoder("utf-8")


def place_of(last_event_id: str) -> tuple[str, int, int]:
    """Feed, when it was begun, and how many events the reader has seen."""
    found = _ID.fullmatch(last_event_id.strip())
    if found is None:
        raise FieldError("Last-Event-ID", f"{last_event_id[:80]!r} is no event id of this gateway")
    return found[1], int(found[2], 16), int(found[3])


class Rendering:
    """One reader's way through a feed. `skip`: how many events it has seen already."""

    def __init__(self, feed: Feed, renderer: Renderer, skip: int = 0) -> None:
        self._feed, self._renderer, self._skip = feed, renderer, skip
        self._at = 0
        self._number = 0
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._begun = False
        self._prefix = f"{feed.id}-{feed.created:x}-"
        #: Everything there is has been rendered, and no more will come.
        self.finished = False

    @property
    def behind(self) -> bool:
        """There is more to be told at once."""
        return self._begun and self._at < len(self._feed.pieces)

    def pull(self) -> bytes:
        """The events of whatever has come since the last time, as they go over HTTP."""
        out = bytearray()
        for id, event in self.events():
            if event.name:
                out += b"event: %s\n" % event.name.encode()
            out += b"id: %s\ndata: %s\n\n" % (id.encode(), event.data)
        return bytes(out)

    def events(self) -> list[tuple[str, Event]]:
        """The same with their ids, for who tells them otherwise."""
        feed = self._feed
        out: list[tuple[str, Event]] = []
        if not self._begun and feed.begun and not (feed.error and not feed.pieces):
            self._begun = True
            self._put(out, self._renderer.begin(feed.about))
        until = min(len(feed.pieces), self._at + AT_ONCE)
        while self._at < until:
            self._put(out, self._next(feed))
            self._at += 1
        if feed.over and not self.behind and not self.finished:
            self.finished = True
            if feed.error is not None:
                self._put(out, self._renderer.failed(feed.error))
            else:
                self._put(out, self._renderer.done(feed.all_answers()))
        return out

    def _next(self, feed: Feed) -> Iterable[Event]:
        at = self._at
        choice, piece = feed.choices[at], feed.pieces[at]
        decoder = self._decoders.get(choice)
        if decoder is None:
            decoder = self._decoders[choice] = _decoder("replace")
        if piece is not None:
            token = Token(choice, decoder.decode(piece), feed.ids[at], piece, feed.logprobs.get(at))
            return self._renderer.token(token)
        events = self._renderer.end(choice, feed.answers[choice])
        rest = decoder.decode(b"", final=True)
        return [*self._renderer.token(Token(choice, rest, -1)), *events] if rest else events

    def _put(self, out: list[tuple[str, Event]], events: Iterable[Event]) -> None:
        for event in events:
            self._number += 1
            if self._number > self._skip:
                out.append((f"{self._prefix}{self._number}", event))


def comment(text: str) -> bytes:
    """What a reader of events does not see, but a connection that is kept open does."""
    return f": {text}\n\n".encode()


def waiting(ahead: int) -> bytes:
    return comment(f"waiting, {ahead} before you" if ahead else "waiting, you are next")
